"""All policies on one sequence, and the statistics of their differences."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import allocator, rollouts
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.evaluation import baselines, compare, rivals
from lensjax.models.decision import build_tree, policy_scores, split
from lensjax.models.lensnet import LensConfig
from lensjax.training import agreement, key_tokens, nll
from tests import reference
from tests.small import OMITTING, Run, batch, jit

RUN = Run(**{"focus.steps": 2, "base.copy_heads": 1, "context.key.alpha": 0.0, "context.key.beta": -100.0})
SHAPE, GEOMETRY, RECIPE = RUN.config.context, RUN.config.geometry, RUN.recipe
LENGTH, DRAWS, ANSWERS = 19, 3, [6]
NAMES = {
    *("recency", "recency_sink", "uniform", "random", "recent_random", "key_norm", "snapkv", "bm25", "lookup"),
    *("snapkv_next", "lookup_next"),
    *("lensnet_1", "lensnet_2", "lensnet_fresh", "snapkv_hindsight", "bm25_hindsight", "best_of_3", "oracle"),
}
KEY = jax.random.key(5)
RANDOM_KEY = jax.random.split(jax.random.split(KEY)[0])[0]


@functools.cache
def program(run):
    options = {"length": LENGTH, "draws": DRAWS, "oracle_rounds": 1, "recipe": run.recipe}
    return jit(functools.partial(compare.measure, run.models, **options))


@functools.cache
def compared(has_answer=True, row=0):
    answers = jnp.asarray(ANSWERS) if has_answer else None
    return jax.device_get(program(RUN)(RUN.params(), batch()["tokens"][row], answers, KEY))


def measured(has_answer):
    return {name: one for name, one in compared(has_answer).policies.items() if name != compare.FULL}


WITHOUT_ANSWER = pytest.param(False, marks=pytest.mark.slow)  # another program, as long as that of all others


@pytest.mark.parametrize("has_answer", [True, WITHOUT_ANSWER])
def test_every_policy_has_exactly_the_entries(has_answer):
    found = measured(has_answer)
    assert set(found) == NAMES | ({"answer"} if has_answer else set())
    assert all(one.entries.tolist() == [LENGTH, LENGTH] for one in found.values())
    assert all(np.isfinite(one.nll) for one in found.values())


@pytest.mark.parametrize("has_answer", [True, WITHOUT_ANSWER])
def test_only_what_has_an_answer_can_hit_and_only_what_has_steps_can_move(has_answer):
    found = measured(has_answer)
    assert all(0 <= one.hit <= 1 if has_answer else math.isnan(one.hit) for one in found.values())
    for name, one in found.items():
        assert math.isnan(one.swap_rate) == math.isnan(one.residency) == (not name.startswith("lensnet"))
    # Half of all entries replaced in one step: each was there for two contexts of four thirds of their number.
    first = found["lensnet_1"]
    assert first.residency == pytest.approx(2 / (1 + first.swap_rate))


@pytest.mark.parametrize("has_answer", [True, WITHOUT_ANSWER])
def test_what_sees_the_loss_is_better_than_what_it_chose_from(has_answer):
    found = measured(has_answer)
    assert found["best_of_3"].nll <= found["random"].nll
    others = [one.nll for name, one in found.items() if name not in ("recency", "random", "recent_random")]
    assert found["oracle"].nll <= min(others)


def test_each_policy_is_the_one_it_is_called():
    params, tokens = RUN.params(), batch()["tokens"][0]
    models = RUN.models
    window = split(tokens, horizon=SHAPE.horizon)

    @jit
    def losses(params):
        tree = build_tree(models, params, window.history, GEOMETRY)

        def of_state(state):
            return allocator.to_context(state, GEOMETRY, capacity=LENGTH)

        # The query is the last 8 tokens of the history of 32; those that predict the 4 behind it begin with its last.
        query, knowing = window.history[24:], slice(31, 35)
        attention, norms = baselines.attention(models.base, params["base"], window.history, slice(24, 32), GEOMETRY)
        in_hindsight, _ = baselines.attention(models.base, params["base"], tokens, knowing, GEOMETRY)
        drawn, _ = rollouts.sample_rollouts(
            RANDOM_KEY, LENGTH, RECIPE.hyper.high_lod_share, rollouts=DRAWS, geometry=GEOMETRY, capacity=LENGTH
        )
        single = [
            contexts.recency(LENGTH, GEOMETRY, capacity=LENGTH),
            of_state(allocator.uniform(LENGTH, GEOMETRY)),
            *(
                of_state(baselines.by_scores(scores, LENGTH, GEOMETRY))
                for scores in (
                    norms,
                    attention,
                    baselines.bm25(window.history, query, GEOMETRY),
                    baselines.lookup(window.history, GEOMETRY),
                    baselines.and_next(attention, LENGTH, GEOMETRY),
                    baselines.and_next(baselines.lookup(window.history, GEOMETRY), LENGTH, GEOMETRY),
                    in_hindsight,
                    baselines.bm25(window.history, window.horizon, GEOMETRY),
                )
            ),
        ]
        variants = jax.tree.map(lambda many, *leaves: jnp.concatenate([jnp.stack(leaves), many]), drawn, *single)
        return nll.variant_nll(models.base, params["base"], tree, variants, window.horizon, GEOMETRY)[0]

    expected, found = np.asarray(losses(params)), measured(True)
    names = ("recency", "uniform", "key_norm", "snapkv", "bm25", "lookup", "snapkv_next", "lookup_next")
    names += ("snapkv_hindsight", "bm25_hindsight")
    np.testing.assert_allclose([found[name].nll for name in names], expected[:-DRAWS], rtol=1e-5)
    assert len(set(expected)) == len(expected)
    assert found["random"].nll == pytest.approx(expected[-DRAWS:].mean(), rel=1e-5)
    assert found["best_of_3"].nll == pytest.approx(expected[-DRAWS:].min(), rel=1e-5)


def pick(run, **hyper):
    recipe = replace(run.recipe, hyper=replace(run.recipe.hyper, **hyper))
    return jit(functools.partial(compare.measure_pick, run.models, recipe=recipe))


@pytest.mark.parametrize("has_answer", [True, WITHOUT_ANSWER])
def test_the_pick_is_that_of_the_table_at_the_budget(has_answer):
    params, tokens = RUN.params(), batch()["tokens"][0]
    run = pick(RUN, context_end=LENGTH / SHAPE.history)
    lens_key = jax.random.split(KEY)[1]
    expected, answers = measured(has_answer), jnp.asarray(ANSWERS) if has_answer else None
    found = jax.device_get(run(params, tokens, answers, lens_key))
    assert found["lensnet"] == pytest.approx(expected["lensnet_2"].nll, rel=1e-6)
    assert found["recency"] == pytest.approx(expected["recency"].nll, rel=1e-6)
    assert found["hit"] == pytest.approx(expected["lensnet_2"].hit, nan_ok=True)
    assert abs(found["lensnet"] - found["recency"]) > 1e-5


def test_the_pick_with_omission_is_what_lensnet_ends_with():
    params, tokens, length = OMITTING.params(), batch()["tokens"][0], OMITTING.config.budget
    shape, geometry = OMITTING.config.context, OMITTING.config.geometry

    @jit
    def by_hand(params):
        window = split(tokens, horizon=shape.horizon)
        # The table's; nothing is sampled here.
        options = {"length": length, "draws": 2, "oracle_rounds": 0, "recipe": OMITTING.recipe}
        own = compare.measure(OMITTING.models, params, tokens, None, KEY, **options).focus
        entries = contexts.materialise(
            build_tree(OMITTING.models, params, window.history, geometry), contexts.read(own, geometry)
        )
        return own, nll.token_nll(OMITTING.models.base, params["base"], entries, window.horizon).mean()

    own, expected = by_hand(params)
    shown = np.flatnonzero(contexts.to_cut(own, geometry) == 0)
    assert len(shown) == length
    run, hits = pick(OMITTING), {}
    for start in range(0, 24, 2):
        found = jax.device_get(run(params, tokens, jnp.asarray([start]), KEY))
        hits[start] = found["hit"].item()
    assert found["lensnet"] == pytest.approx(float(expected), rel=1e-5)
    assert abs(found["lensnet"] - found["recency"]) > 1e-5
    assert hits == {start: float(start in shown) for start in hits} and set(hits.values()) == {0, 1}


def test_the_bounds_are_those_of_recency_and_of_the_search():
    options = {"length": LENGTH, "draws": DRAWS, "oracle_rounds": 1, "recipe": RECIPE}
    run = jit(functools.partial(compare.bounds, RUN.models, **options))
    recency, oracle = run(RUN.params(), batch()["tokens"][0], jnp.asarray(ANSWERS), KEY)
    found = measured(True)
    assert float(recency) == pytest.approx(found["recency"].nll, rel=1e-5)
    # It is never worse than where it starts; that of the table may start from LensNet's contexts too.
    starts = ("uniform", "key_norm", "snapkv", "bm25", "lookup", "best_of_3")
    assert found["oracle"].nll - 1e-5 <= oracle <= min(found[name].nll for name in starts) + 1e-5


def test_the_full_context_is_the_ordinary_loss_of_the_horizon():
    found = compared().policies[compare.FULL]
    whole = jit(functools.partial(nll.sequence_nll, RUN.models.base))(RUN.params()["base"], batch()["tokens"][0])
    assert float(found.nll) == pytest.approx(float(whole[-SHAPE.horizon :].mean()), rel=1e-5)
    assert found.entries.tolist() == [SHAPE.history, SHAPE.history] and found.hit == 1


def test_losses_of_key_tokens_are_of_those_that_less_than_recency_does_not_help():
    params, tokens = RUN.params(), batch()["tokens"][0]

    @jit
    def look(params):
        window = split(tokens, horizon=SHAPE.horizon)
        # Half of 19 entries.
        is_key = key_tokens.find(RUN.models.base, params["base"], window, SHAPE.key, short=9)
        tree = build_tree(RUN.models, params, window.history, GEOMETRY)
        entries = contexts.materialise(tree, contexts.recency(LENGTH, GEOMETRY, capacity=LENGTH))
        recency = nll.token_nll(RUN.models.base, params["base"], entries, window.horizon)
        return is_key, recency, nll.sequence_nll(RUN.models.base, params["base"], tokens)[-SHAPE.horizon :]

    is_key, recency, whole = (np.asarray(each) for each in look(params))
    assert 0 < is_key.sum() < SHAPE.horizon
    found = measured(True)
    assert {int(one.key_tokens) for one in found.values()} == {is_key.sum()}
    assert found["recency"].key_nll == pytest.approx(recency[is_key].mean(), rel=1e-5)
    full = compared().policies[compare.FULL]
    assert float(full.key_nll) == pytest.approx(whole[is_key].mean(), rel=1e-5)
    foreign, _ = shown_by(0)
    assert foreign.key_nll == pytest.approx(found["lensnet_2"].key_nll, rel=1e-5)
    assert foreign.key_tokens == is_key.sum()


@functools.cache
def foreign_program():
    return jit(functools.partial(compare.measure_foreign, RUN.models, length=LENGTH, recipe=RECIPE))


def shown_by(row):
    """The first sequence as the focus on another one of the batch would have it."""
    tokens, answers = batch()["tokens"][0], jnp.asarray(ANSWERS)
    return jax.device_get(foreign_program()(RUN.params(), tokens, answers, compared(), compared(row=row).focus))


def test_a_sequence_s_own_focus_is_that_of_the_table():
    (foreign, changed), expected = shown_by(0), measured(True)["lensnet_2"]
    assert foreign.nll == pytest.approx(expected.nll, rel=1e-6) and foreign.hit == expected.hit
    assert changed == 0


def test_another_sequence_s_focus_is_read_with_this_sequence_s_tokens():
    @jit
    def loss(params):
        window = split(batch()["tokens"][0], horizon=SHAPE.horizon)
        entries = contexts.materialise(build_tree(RUN.models, params, window.history, GEOMETRY), compared(row=1).focus)
        return nll.token_nll(RUN.models.base, params["base"], entries, window.horizon).mean()

    found, _ = shown_by(1)
    assert found.nll == pytest.approx(float(loss(RUN.params())), rel=1e-5)
    assert found.entries.tolist() == [LENGTH, LENGTH] and math.isnan(found.swap_rate)
    assert found.nll != pytest.approx(measured(True)["lensnet_2"].nll, rel=1e-5)


def collapsed(context):
    """Every node that is hidden below an entry, or is one."""
    entries = reference.entries_of(context)
    return {
        (start + step * SHAPE.block_size**level, level)
        for start, lod in entries
        for level in range(1, lod + 1)
        for step in range(SHAPE.block_size ** (lod - level))
    }


def test_what_a_focus_changes_is_counted_by_entries_and_by_edits():
    focused = [compared(row=row).focus for row in (0, 1)]
    recency = contexts.recency(LENGTH, GEOMETRY, capacity=LENGTH)
    own, last = (tuple(reference.entries_of(one)) for one in (focused[0], recency))
    assert compared().divergence == pytest.approx(reference.edit_distance(own, last) / LENGTH)
    cold = collapsed(allocator.to_context(allocator.uniform(LENGTH, GEOMETRY), GEOMETRY, capacity=LENGTH))
    edits, others = (collapsed(one) ^ cold for one in focused)
    assert edits and edits != others
    _, changed = shown_by(1)
    assert changed == pytest.approx(len(edits ^ others) / len(edits | others))
    other_way = foreign_program()(RUN.params(), batch()["tokens"][1], jnp.asarray(ANSWERS), compared(row=1), focused[0])
    assert other_way[1] == changed


def test_the_correlation_is_over_the_rollouts_of_the_table():
    @jit
    def values_and_losses(params):
        window = split(batch()["tokens"][0], horizon=SHAPE.horizon)
        tree = build_tree(RUN.models, params, window.history, GEOMETRY)
        drawn, _ = rollouts.sample_rollouts(
            RANDOM_KEY,
            LENGTH,
            RECIPE.hyper.high_lod_share,
            rollouts=DRAWS,
            geometry=GEOMETRY,
            capacity=LENGTH,
        )
        losses, entries = nll.variant_nll(RUN.models.base, params["base"], tree, drawn, window.horizon, GEOMETRY)
        scores = policy_scores(RUN.models.lens, params["lens"], entries)
        return agreement.variant_values(scores, drawn, GEOMETRY), losses

    values, losses = values_and_losses(RUN.params())
    assert float(losses.mean()) == pytest.approx(measured(True)["random"].nll, rel=1e-5)
    expected = np.corrcoef(values, -losses)[0, 1]
    assert compared().correlation == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("policy", "recency", "reference", "expected"),
    [(4.0, 4.0, 1.0, 0), (1.0, 4.0, 1.0, 1), (2.0, 4.0, 1.0, 2 / 3), (5.0, 4.0, 1.0, -1 / 3)],
)
def test_the_gap_by_hand(policy, recency, reference, expected):
    assert compare.gap_closed(policy, recency, reference) == pytest.approx(expected)


@pytest.mark.parametrize("reference", [4.0, 4.5])
def test_without_a_gap_nothing_is_closed(reference):
    assert math.isnan(compare.gap_closed(3.0, 4.0, reference))


# What follows a match.

PAIRS = Geometry(history=32, block_size=2, max_lod=1, recent_tokens=2, omit=True)


def test_what_comes_next_by_hand():
    scores = jnp.zeros(32).at[jnp.asarray([4, 5, 11, 28])].set(jnp.asarray([2.0, 4.0, 1.0, 8.0]))
    # Blocks 2, 5 and 14 have 3, 0.5 and 4, and each gives it to the four behind it; the best counts.
    of_blocks = [0, 0, 3, 3, 3, 3, 3, 0.5, 0.5, 0.5, 0, 0, 0, 0, 4]
    found = baselines.and_next(scores, 0, PAIRS)
    np.testing.assert_array_equal(found, [*np.repeat(of_blocks, 2), 0, 0])
    # Half of 7 entries, rounded down, are the last three tokens.
    np.testing.assert_array_equal(baselines.and_next(scores, 7, PAIRS)[-4:], [4, *[np.inf] * 3])


def test_next_to_the_last_tokens_stands_what_followed_when_the_query_came_before():
    tokens = np.random.default_rng(0).permutation(40)[:32]
    tokens[30:] = tokens[4:6]
    scores = baselines.and_next(baselines.lookup(jnp.asarray(tokens), PAIRS), 20, PAIRS)
    cut = np.asarray(allocator.to_cut(baselines.by_scores(scores, 20, PAIRS), PAIRS))
    assert np.flatnonzero(cut == 0).tolist() == [*range(6, 16), *range(22, 32)]


def test_what_follows_a_match_is_causal_reads_every_token_and_stands_beside_the_match():
    for name in ("snapkv_next", "lookup_next"):
        assert rivals.information(name) == "causal" and rivals.reads(name, history=32, horizon=4, rows=7) == 32
    names = ["lensnet_4", "lookup_next", "bm25_hindsight", "lookup", "bm25", "snapkv_next", "snapkv", "key_norm"]
    expected = ["key_norm", "snapkv", "snapkv_next", "bm25", "lookup", "lookup_next", "lensnet_4", "bm25_hindsight"]
    assert sorted(names, key=rivals.order) == sorted(names[::-1], key=rivals.order) == expected


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 12 + 10),
        ({"reads": "states"}, 12 + 10 + 32),
        ({"reads": "attention"}, 12 + 10 + 32),
        ({"map": False}, 12),
        ({"map": False, "reads": "states"}, 12 + 32),
    ],
)
def test_what_lensnet_looks_at_is_entries_map_and_tokens(settings, rows):
    # Twelve tokens of 32 in full; the others are ten blocks.
    assert rivals.lens_rows(LensConfig(**settings), PAIRS, 12) == rows
    # Without omission the gists are entries.
    in_gists = replace(PAIRS, omit=False)
    assert rivals.lens_rows(LensConfig(), in_gists, 20) == 20
    assert rivals.lens_rows(LensConfig(reads="states"), in_gists, 20) == 52
