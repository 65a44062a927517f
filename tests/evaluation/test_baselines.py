"""The policies that LensNet is measured against, and the search for the best context."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusState
from lensjax.context.geometry import Geometry
from lensjax.evaluation import baselines
from lensjax.models.decision import build_tree, split
from lensjax.training import nll
from tests import reference
from tests.small import LENS, Run, batch, jit, tiny_models

GEOMETRY = Geometry(history=32, block_size=2, max_lod=3, recent_tokens=6)
LENGTHS = range(GEOMETRY.history, GEOMETRY.shortest - 1, 1 - GEOMETRY.block_size)


@functools.cache
def by_scores():
    return jit(functools.partial(baselines.by_scores, geometry=GEOMETRY))


def cut_of(scores, length):
    return np.asarray(allocator.to_cut(by_scores()(jnp.asarray(scores, jnp.float32), length), GEOMETRY))


def test_a_cut_by_scores_has_exactly_the_length_and_is_legal():
    scores = np.random.default_rng(0).uniform(-1, 1, GEOMETRY.history)
    for length in LENGTHS:
        context = contexts.from_cut(cut_of(scores, length), GEOMETRY, capacity=GEOMETRY.history)
        found = contexts.invariants(context, GEOMETRY, length=length)
        assert all(found.values()), (length, found)


def test_the_lowest_scored_blocks_go_first_and_of_equal_ones_the_oldest():
    scores = np.zeros(GEOMETRY.history)
    scores[10:12] = -1.0
    assert np.flatnonzero(cut_of(scores, 31)).tolist() == [10, 11]
    assert np.flatnonzero(cut_of(scores, 30)).tolist() == [0, 1, 10, 11]


def test_the_highest_scored_block_stays_in_full_to_the_end():
    scores = np.zeros(GEOMETRY.history)
    scores[4:6] = 1.0
    # Its parents of all levels, of 2, 4 and 8 tokens, are the last that could be collapsed.
    assert (cut_of(scores, GEOMETRY.shortest + 3)[4:6] == 0).all()
    assert (cut_of(scores, GEOMETRY.shortest)[:24] == 3).all()


@pytest.mark.parametrize("lowest", [-np.inf, np.nan], ids=str)
def test_infinite_worth_stays_in_full_and_none_goes_first(lowest):
    scores = np.full(GEOMETRY.history, -1e38)
    scores[4:6], scores[6:10] = np.inf, lowest
    assert np.flatnonzero(cut_of(scores, 31)).tolist() == [6, 7]
    assert np.flatnonzero(cut_of(scores, 30)).tolist() == [6, 7, 8, 9]
    assert (cut_of(scores, GEOMETRY.shortest + 3)[4:6] == 0).all()


def slow_bm25(tokens, query, geometry):
    size, count = geometry.block_size, geometry.blocks(1)
    blocks = [list(tokens[i * size : (i + 1) * size]) for i in range(count)]
    scores = np.zeros(geometry.history)
    for index, block in enumerate(blocks):
        for term in set(query):
            holding = sum(term in other for other in blocks)
            idf = math.log(1 + (count - holding + 0.5) / (holding + 0.5))
            frequency = block.count(term)
            scores[index * size : (index + 1) * size] += idf * frequency * 2.5 / (frequency + 1.5)
    return scores


@pytest.mark.parametrize("vocabulary", [3, 8, 40])
def test_bm25_is_that_of_a_slow_count(vocabulary):
    geometry = Geometry(history=30, block_size=4, max_lod=1, recent_tokens=5)
    score = jit(functools.partial(baselines.bm25, geometry=geometry))
    for seed in range(5):
        tokens = np.random.default_rng(seed).integers(0, vocabulary, 34)
        # The end of the history, or, in hindsight, what comes behind it.
        for query in (tokens[25:30], tokens[30:]):
            found = score(jnp.asarray(tokens[:30]), jnp.asarray(query))
            np.testing.assert_allclose(found, slow_bm25(tokens[:30].tolist(), query.tolist(), geometry), rtol=1e-5)


def test_bm25_by_hand():
    geometry = Geometry(history=7, block_size=2, max_lod=1, recent_tokens=1)
    tokens = jnp.asarray([5, 5, 5, 1, 2, 3, 5])
    # The term is in two of three blocks: ln(1 + 1.5 / 2.5), once twice and once alone. Asked twice it counts once.
    expected = math.log(1.6) * np.asarray([2 * 2.5 / 3.5] * 2 + [1.0] * 2 + [0] * 3)
    np.testing.assert_allclose(baselines.bm25(tokens, [5], geometry), expected, rtol=1e-6)
    np.testing.assert_allclose(baselines.bm25(tokens, [5, 5], geometry), expected, rtol=1e-6)
    # Another query, in one block of three: ln(1 + 2.5 / 1.5).
    expected = math.log(8 / 3) * np.asarray([0] * 4 + [1.0] * 2 + [0])
    np.testing.assert_allclose(baselines.bm25(tokens, [3, 7], geometry), expected, rtol=1e-6)


def test_lookup_by_hand():
    geometry = Geometry(history=10, block_size=2, max_lod=1, recent_tokens=3)
    scores = baselines.lookup(jnp.asarray([7, 8, 9, 4, 6, 9, 5, 7, 8, 9]), geometry)
    # Before the 4 stand 7 8 9, all of the query; before the 5 a 9 alone. Nothing else follows a 9.
    assert scores.tolist() == [0, 0, 0, 3, 0, 0, 1, 0, 0, 0]


def test_lookup_matches_no_longer_than_the_query_and_not_around_the_beginning():
    tokens = jnp.asarray([9, 1, 8, 9, 2, 8, 9])
    one, two, three = (
        baselines.lookup(tokens, Geometry(history=7, block_size=2, max_lod=1, recent_tokens=recent)).tolist()
        for recent in (1, 2, 3)
    )
    assert one == [0, 1, 0, 0, 1, 0, 0]
    # Before the first 9 there is nothing, though the last token but one is an 8.
    assert two == [0, 1, 0, 0, 2, 0, 0]
    assert three == two


def test_lookup_opens_the_block_that_goes_on_from_the_longest_match():
    tokens = np.random.default_rng(0).permutation(40)[:32]
    tokens[30:], tokens[20] = tokens[4:6], tokens[5]
    geometry = Geometry(history=32, block_size=2, max_lod=2, recent_tokens=2)
    scores = baselines.lookup(jnp.asarray(tokens), geometry)
    # The pair stands before token 6; its last token alone before token 21.
    assert np.flatnonzero(scores).tolist() == [6, 21] and scores[6] == 2 and scores[21] == 1
    context = baselines.by_scores(scores, geometry.shortest + 2, geometry)
    assert (np.asarray(allocator.to_cut(context, geometry))[6:8] == 0).all()


@pytest.mark.parametrize("is_hindsight", [False, True], ids=["query", "horizon"])
def test_the_base_models_attention_is_that_of_the_query(is_hindsight):
    models, geometry = LENS.models, LENS.config.geometry
    params, window, count = LENS.params()["base"], batch()["tokens"][0], geometry.history
    # Of the history alone the last tokens ask; in hindsight those that predict the horizon.
    tokens = window if is_hindsight else window[:count]
    query = slice(count - 1, -1) if is_hindsight else slice(-geometry.recent_tokens, None)
    rows = jnp.arange(count - 1, len(tokens) - 1) if is_hindsight else jnp.arange(count - 8, count)

    @jit
    def both(params):
        entries = contexts.in_full(models.base.embed(params, tokens), jnp.arange(len(tokens)))
        probe = models.base.attention(params, entries, rows)
        return baselines.attention(models.base, params, tokens, query, geometry), probe

    (attention, minus_norms), (weights, norms) = jax.device_get(both(params))
    by_hand = weights.reshape(-1, *weights.shape[2:]).mean(axis=(0, 1))
    np.testing.assert_allclose(attention, by_hand[:count], rtol=1e-5)
    np.testing.assert_allclose(minus_norms, -norms.reshape(-1, len(tokens)).mean(axis=0)[:count], rtol=1e-5)
    assert attention.shape == minus_norms.shape == (count,) and (minus_norms < 0).all()
    # What the horizon gives to its own tokens is left out.
    assert attention.sum() < 1 - 1e-3 if is_hindsight else attention.sum() == pytest.approx(1, rel=1e-5)


def recent_random(length, geometry, *, draws):
    draw = functools.partial(baselines.recent_random, length=length, draws=draws, geometry=geometry)
    return jit(lambda key: draw(key, high_lod_share=0.3))(jax.random.key(0))


@pytest.mark.parametrize(("length", "recent"), [(24, 12), (20, 10), (12, 6)])
def test_recent_and_random_keeps_half_the_budget_for_the_newest_tokens(length, recent):
    drawn = recent_random(length, GEOMETRY, draws=12)
    cuts = np.asarray(jax.vmap(lambda one: contexts.to_cut(one, GEOMETRY))(drawn))
    assert (np.asarray(drawn.length) == length).all()
    assert (cuts[:, -recent:] == 0).all()
    assert len({cut.tobytes() for cut in cuts}) > 1
    assert (cuts[:, : 32 - recent - 2] > 0).any()


def test_where_half_the_budget_leaves_too_little_the_tail_is_as_long_as_it_can_be():
    geometry = Geometry(history=32, block_size=2, max_lod=1, recent_tokens=6)
    # 20 of 32 takes 12 collapses of blocks of two: 24 tokens before the tail, and not the 22 that half would leave.
    drawn = recent_random(20, geometry, draws=2)
    cuts = np.asarray(jax.vmap(lambda one: contexts.to_cut(one, geometry))(drawn))
    assert (np.asarray(drawn.length) == 20).all()
    assert (cuts[:, :24] == 1).all() and (cuts[:, 24:] == 0).all()


# The search. A base model that is cheap to run, in a window that is small enough to try every cut.

TINY = Run(
    tiny_models,
    **{
        "gist.heads": 1,
        "context.window": 17,
        "context.recent_tokens": 5,
        "context.max_lod": 2,
        "context.horizon": 3,
        "hyper.context_end": 0.7,
    },
)
LENGTH = 10


@functools.cache
def search(rounds):
    models, geometry = TINY.models, TINY.config.geometry

    def one(params, tokens, starts):
        window = split(tokens, horizon=3)
        tree = build_tree(models, params, window.history, geometry)

        def loss(context):
            entries = contexts.materialise(tree, context)
            return nll.token_nll(models.base, params["base"], entries, window.horizon).mean()

        def loss_of_state(collapsed):
            state = FocusState(collapsed, jnp.zeros(collapsed.shape, jnp.int32))
            return loss(allocator.to_context(state, geometry, capacity=LENGTH))

        losses = jax.vmap(loss_of_state)(starts.collapsed)
        return baselines.greedy_oracle(loss, starts, losses, geometry, length=LENGTH, rounds=rounds)

    return jit(one)


@functools.cache
def loss_of_cuts():
    models, geometry = TINY.models, TINY.config.geometry

    def one(params, tokens, cuts):
        window = split(tokens, horizon=3)
        tree = build_tree(models, params, window.history, geometry)
        variants = jax.vmap(lambda cut: contexts.from_cut(cut, geometry, capacity=LENGTH))(cuts)
        return nll.variant_nll(models.base, params["base"], tree, variants, window.horizon, geometry)[0]

    return jit(one)


def all_cuts():
    geometry = TINY.config.geometry
    legal = [entries for entries in reference.legal_cuts(geometry) if len(entries) == LENGTH]
    return jnp.asarray([reference.cut_of(entries, geometry.history, 2) for entries in legal], jnp.int32)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_bounded_by_the_best_of_all_cuts_and_never_worse_than_its_starts(seed):
    params = TINY.params(seed)
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, 7, 17), jnp.int32)
    cuts, geometry = all_cuts(), TINY.config.geometry
    losses = np.asarray(loss_of_cuts()(params, tokens, cuts))
    starts = jax.vmap(lambda cut: allocator.from_cut(cut, geometry))(cuts[:3])
    found = []
    for rounds in (0, 1, 4):
        cut = np.asarray(allocator.to_cut(search(rounds)(params, tokens, starts)[0], geometry))
        (place,) = np.flatnonzero((np.asarray(cuts) == cut).all(axis=1))  # a legal cut, of exactly the length
        found.append(losses[place])
    assert found[0] == losses[:3].min()
    assert found[0] >= found[1] >= found[2] >= losses.min()


def test_the_search_finds_better_contexts_than_it_starts_from():
    cuts, geometry = all_cuts(), TINY.config.geometry
    starts = jax.tree.map(lambda leaf: leaf[None], allocator.from_cut(cuts[0], geometry))
    gains = []
    for seed in range(4):
        params = TINY.params(seed)
        tokens = jnp.asarray(np.random.default_rng(seed).integers(0, 7, 17), jnp.int32)
        found = allocator.to_cut(search(4)(params, tokens, starts)[0], geometry)
        before, after = loss_of_cuts()(params, tokens, jnp.stack([cuts[0], found]))
        gains.append(before - after)
    assert max(gains) > 1e-3


def test_the_geometries_are_what_the_tests_say():
    assert len(all_cuts()) > 3
    assert all(one < other for one, other in itertools.pairwise(sorted(LENGTHS)))
