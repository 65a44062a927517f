"""The policies that LensNet is measured against, and the search for the best context."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import context as contexts
from lensjax import focus, nll, policies
from lensjax.lengths import CutGeometry
from lensjax.decision import build_tree
from tests import reference
from tests.small import LENS, SMALL, Run, batch, jit, tiny_models

GEOMETRY = CutGeometry(window=32, block_size=2, max_lod=3, recent_tokens=6)
LENGTHS = range(GEOMETRY.window, GEOMETRY.shortest - 1, 1 - GEOMETRY.block_size)


@functools.cache
def by_scores():
    return jit(functools.partial(policies.by_scores, geometry=GEOMETRY))


def cut_of(scores, length):
    return np.asarray(focus.to_cut(by_scores()(jnp.asarray(scores, jnp.float32), length), GEOMETRY))


def test_a_cut_by_scores_has_exactly_the_length_and_is_legal():
    scores = np.random.default_rng(0).uniform(-1, 1, GEOMETRY.window)
    for length in LENGTHS:
        context = contexts.from_cut(cut_of(scores, length), block_size=2, capacity=GEOMETRY.window)
        found = contexts.invariants(context, window=32, block_size=2, length=length, recent_tokens=6)
        assert all(found.values()), (length, found)


def test_the_lowest_scored_blocks_go_first_and_of_equal_ones_the_oldest():
    scores = np.zeros(GEOMETRY.window)
    scores[10:12] = -1.0
    assert np.flatnonzero(cut_of(scores, 31)).tolist() == [10, 11]
    assert np.flatnonzero(cut_of(scores, 30)).tolist() == [0, 1, 10, 11]


def test_the_highest_scored_block_stays_in_full_to_the_end():
    scores = np.zeros(GEOMETRY.window)
    scores[4:6] = 1.0
    # Its parents of all levels, of 2, 4 and 8 tokens, are the last that could be collapsed.
    assert (cut_of(scores, GEOMETRY.shortest + 3)[4:6] == 0).all()
    assert (cut_of(scores, GEOMETRY.shortest)[:24] == 3).all()


def slow_bm25(tokens, geometry):
    size, count = geometry.block_size, geometry.blocks(1)
    blocks = [list(tokens[i * size : (i + 1) * size]) for i in range(count)]
    scores = np.zeros(geometry.window)
    for index, block in enumerate(blocks):
        for term in set(tokens[-geometry.recent_tokens :]):
            holding = sum(term in other for other in blocks)
            idf = math.log(1 + (count - holding + 0.5) / (holding + 0.5))
            frequency = block.count(term)
            scores[index * size : (index + 1) * size] += idf * frequency * 2.5 / (frequency + 1.5)
    return scores


@pytest.mark.parametrize("vocabulary", [3, 8, 40])
def test_bm25_is_that_of_a_slow_count(vocabulary):
    geometry = CutGeometry(window=30, block_size=4, max_lod=1, recent_tokens=5)
    score = jit(functools.partial(policies.bm25, geometry=geometry))
    for seed in range(5):
        tokens = np.random.default_rng(seed).integers(0, vocabulary, 30)
        np.testing.assert_allclose(score(jnp.asarray(tokens)), slow_bm25(tokens.tolist(), geometry), rtol=1e-5)


def test_bm25_by_hand():
    geometry = CutGeometry(window=7, block_size=2, max_lod=1, recent_tokens=1)
    scores = policies.bm25(jnp.asarray([5, 5, 5, 1, 2, 3, 5]), geometry)
    # The term is in two of three blocks: ln(1 + 1.5 / 2.5), once twice and once alone.
    expected = math.log(1.6) * np.asarray([2 * 2.5 / 3.5] * 2 + [1.0] * 2 + [0] * 3)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_the_base_models_attention_is_that_of_the_tail_over_the_whole_window():
    config, models = LENS.config, LENS.models
    params, tokens, geometry = LENS.state().params, batch()["tokens"][0], LENS.config.context.geometry

    @jit
    def both(params):
        tree = build_tree(models, params, tokens, config)
        rows = jnp.arange(geometry.window - geometry.recent_tokens, geometry.window)
        count = geometry.window
        probe = models.base.attention(
            params["base"], tree.levels[0], jnp.arange(count, dtype=jnp.float32), jnp.ones(count), rows
        )
        return policies.tail_attention(models.base, params["base"], tree, geometry), probe

    (attention, minus_norms), (weights, norms) = jax.device_get(both(params))
    assert attention.sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(attention, weights.reshape(-1, *weights.shape[2:]).mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(minus_norms, -norms.reshape(-1, geometry.window).mean(axis=0), rtol=1e-5)
    assert (minus_norms < 0).all()


def recent_random(length, geometry, *, draws):
    draw = functools.partial(policies.recent_random, length=length, draws=draws, geometry=geometry)
    return jit(lambda key: draw(key, lod2_share=0.3))(jax.random.key(0))


@pytest.mark.parametrize(("length", "recent"), [(24, 12), (20, 10), (12, 6)])
def test_recent_and_random_keeps_half_the_budget_for_the_newest_tokens(length, recent):
    drawn = recent_random(length, GEOMETRY, draws=12)
    cuts = np.asarray(jax.vmap(lambda one: contexts.to_cut(one, window=32))(drawn))
    assert (np.asarray(drawn.length) == length).all()
    assert (cuts[:, -recent:] == 0).all()
    assert len({cut.tobytes() for cut in cuts}) > 1
    assert (cuts[:, : 32 - recent - 2] > 0).any()


def test_where_half_the_budget_leaves_too_little_the_tail_is_as_long_as_it_can_be():
    geometry = CutGeometry(window=32, block_size=2, max_lod=1, recent_tokens=6)
    # 20 of 32 takes 12 collapses of blocks of two: 24 tokens before the tail, and not the 22 that half would leave.
    drawn = recent_random(20, geometry, draws=2)
    cuts = np.asarray(jax.vmap(lambda one: contexts.to_cut(one, window=32))(drawn))
    assert (np.asarray(drawn.length) == 20).all()
    assert (cuts[:, :24] == 1).all() and (cuts[:, 24:] == 0).all()


# The search. A base model that is cheap to run, in a window that is small enough to try every cut.

TINY = Run(
    tiny_models,
    **{
        "gist.heads": 1,
        "context.window": 14,
        "context.recent_tokens": 5,
        "context.max_lod": 2,
        "context.horizon": 3,
        "hyper.context_end": 0.7,
    },
)
LENGTH = 10


@functools.cache
def search(rounds):
    config, models = TINY.config, TINY.models

    def one(params, tokens, starts):
        tree = build_tree(models, params, tokens, config)
        return policies.greedy_oracle(models, params, tree, tokens, starts, length=LENGTH, rounds=rounds, config=config)

    return jit(one)


@functools.cache
def loss_of_cuts():
    config, models = TINY.config, TINY.models

    def one(params, tokens, cuts):
        tree = build_tree(models, params, tokens, config)
        variants = jax.vmap(lambda cut: contexts.from_cut(cut, block_size=2, capacity=LENGTH))(cuts)
        return nll.variant_losses(models.base, params["base"], tree, variants, tokens, horizon=3)[0]

    return jit(one)


def all_cuts():
    geometry = TINY.config.context.geometry
    legal = [entries for entries in reference.legal_cuts(geometry) if len(entries) == LENGTH]
    return jnp.asarray([reference.cut_of(entries, geometry.window, 2) for entries in legal], jnp.int32)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_bounded_by_the_best_of_all_cuts_and_never_worse_than_its_starts(seed):
    params = TINY.state(seed).params
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, 7, 14), jnp.int32)
    cuts, geometry = all_cuts(), TINY.config.context.geometry
    losses = np.asarray(loss_of_cuts()(params, tokens, cuts))
    starts = jax.vmap(lambda cut: focus.from_cut(cut, geometry))(cuts[:3])
    found = []
    for rounds in (0, 1, 4):
        cut = np.asarray(focus.to_cut(search(rounds)(params, tokens, starts), geometry))
        (place,) = np.flatnonzero((np.asarray(cuts) == cut).all(axis=1))  # a legal cut, of exactly the length
        found.append(losses[place])
    assert found[0] == losses[:3].min()
    assert found[0] >= found[1] >= found[2] >= losses.min()


def test_the_search_finds_better_contexts_than_it_starts_from():
    cuts, geometry = all_cuts(), TINY.config.context.geometry
    starts = jax.tree.map(lambda leaf: leaf[None], focus.from_cut(cuts[0], geometry))
    gains = []
    for seed in range(4):
        params = TINY.state(seed).params
        tokens = jnp.asarray(np.random.default_rng(seed).integers(0, 7, 14), jnp.int32)
        found = focus.to_cut(search(4)(params, tokens, starts), geometry)
        before, after = loss_of_cuts()(params, tokens, jnp.stack([cuts[0], found]))
        gains.append(before - after)
    assert max(gains) > 1e-3


def test_lengths_of_the_small_geometry_are_what_the_tests_say():
    assert len(all_cuts()) > 3 and SMALL.context.geometry.shortest < SMALL.context.window
    assert all(one < other for one, other in itertools.pairwise(sorted(LENGTHS)))
