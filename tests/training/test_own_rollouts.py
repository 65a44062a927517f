"""Rollouts that the policy draws: their probabilities by enumeration, their weights, and the step that uses them."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.context.edits import Swaps
from lensjax.context.geometry import Geometry
from lensjax.runs import sweep
from lensjax.training import own_rollouts, preferences
from lensjax.training.objective import Statistics, term_inputs
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps import preference
from tests import reference
from tests.small import SMALL, Run, batch, jit
from tests.training import scored

FLAT = Geometry(history=20, block_size=2, max_lod=1, recent_tokens=4)
DEEP = Geometry(history=16, block_size=2, max_lod=2, recent_tokens=3)
TEMPERATURE = 0.5
WEIGHED = Run(
    **{
        "context.local_edits": 2,
        "context.own_rollouts": 1,
        "context.rollouts": 4,
        "objective.pair_weights": "importance",
    }
)


def scores_of(geometry, seed=0):
    count = allocator.from_cut(np.zeros(geometry.history, np.int32), geometry).collapsed.shape[0]
    return np.random.default_rng(seed).uniform(-0.9, 0.9, count).astype(np.float32)


def state_of(geometry, seed=3):
    entries = reference.random_cut(geometry, geometry.length_of_fraction(0.75), np.random.default_rng(seed))
    cut = np.zeros(geometry.history, np.int32)
    for start, lod in entries:
        cut[start : start + geometry.block_size**lod] = lod
    return entries, allocator.from_cut(cut, geometry)


def sequences(entries, scores, geometry, draws):
    """Every order of so many swaps, each a swap whatever it costs, with its probability."""
    values = dict(zip(reference.nodes(geometry), scores.tolist(), strict=True))

    def go_on(now, left):
        table = reference.swap_probabilities(entries, now, values, geometry, {}, temperature=TEMPERATURE)
        swaps = {pair: p for pair, p in table.items() if pair is not None}
        if left == 0 or not swaps:
            yield (), 1.0
            return
        total = sum(swaps.values())
        for pair, p in swaps.items():
            tree = reference.Allocator(now, geometry, {})
            tree.expand(pair[0])
            tree.collapse(pair[1])
            for rest, q in go_on(sorted(tree.entries), left - 1):
                yield (pair, *rest), p / total * q

    return dict(go_on(entries, draws))


@pytest.mark.parametrize("geometry", [FLAT, DEEP], ids=["flat", "deep"])
def test_ratios_are_those_of_enumerated_probabilities_and_their_mean_is_one(geometry):
    entries, state = state_of(geometry)
    scores, share, draws = scores_of(geometry), 0.25, 2
    ours = sequences(entries, scores, geometry, draws)
    alike = sequences(entries, np.zeros_like(scores), geometry, draws)
    assert ours.keys() == alike.keys() and len(ours) > 10
    table = reference.nodes(geometry)
    none = (len(table),) * 2
    padded = [(*swaps, *[None] * (draws - len(swaps))) for swaps in ours]
    numbers = [[none if pair is None else tuple(map(table.index, pair)) for pair in swaps] for swaps in padded]
    swaps = Swaps(*np.moveaxis(np.asarray(numbers, np.int32), -1, 0))
    ratio = functools.partial(own_rollouts.log_ratios, geometry=geometry, share=share, temperature=TEMPERATURE)
    found = np.exp(jit(ratio)(swaps, state, scores))
    mixture = np.asarray([share * p + (1 - share) * alike[key] for key, p in ours.items()])
    np.testing.assert_allclose(found, np.asarray(list(ours.values())) / mixture, rtol=2e-4)
    # An expectation under the mixture, weighed, is one under the policy.
    np.testing.assert_allclose((mixture * found).sum(), 1, rtol=1e-4)
    assert found.max() <= 1 / share * (1 + 1e-5)


def test_ratios_worked_by_hand():
    # Blocks 0 and 1 collapsed, 2 and 3 in full: four swaps of (0 or 1) for (2 or 3).
    geometry = Geometry(history=10, block_size=2, max_lod=1, recent_tokens=2)
    state = allocator.from_cut([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], geometry)
    swaps = Swaps(np.asarray([[0], [1]], np.int32), np.asarray([[2], [3]], np.int32))
    scores = np.asarray([math.log(3), 0.0, 0.0, 0.0], np.float32)
    # The policy at temperature 1 expands block 0 three times in four, and collapses either: 3/8 and 1/8, against 1/4.
    found = jnp.exp(own_rollouts.log_ratios(swaps, state, scores, geometry, share=0.5, temperature=1.0))
    np.testing.assert_allclose(found, [(3 / 8) / (5 / 16), (1 / 8) / (3 / 16)], rtol=1e-5)
    alone = own_rollouts.log_ratios(swaps, state, scores, geometry, share=1, temperature=1.0)
    np.testing.assert_array_equal(alone, 0)


def drawn(own, temperature, seeds=100):
    scores = scores_of(FLAT, 5)

    def score_fn(context):
        return jnp.asarray(scores)[jnp.minimum(context.start // FLAT.block_size, len(scores) - 1)]

    draw = functools.partial(
        own_rollouts.draw,
        score_fn=score_fn,
        length=15,
        high_lod_share=0.0,
        rollouts=4,
        own=own,
        draws=2,
        temperature=temperature,
        geometry=FLAT,
        capacity=17,
    )
    found, ratio = jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), seeds))
    cuts = np.asarray(jax.vmap(jax.vmap(lambda one: contexts.to_cut(one, FLAT)))(found))
    return found, cuts, np.asarray(ratio), scores


def test_the_last_rollouts_are_the_policys_and_all_have_the_length():
    found, cuts, ratio, scores = drawn(own=1, temperature=1e-3)
    assert (found.length == 15).all() and (ratio[:, 0] == 0).all()
    blocks = cuts[:, :, : 2 * len(scores) : 2]
    worth = (scores * (blocks == 0)).sum(-1)
    # A cold policy makes the two best swaps; drawn alike, most are others.
    assert (worth[:, 3] >= worth[:, 1:3].max(1) - 1e-5).all() and (worth[:, 3] > worth[:, 1] + 1e-3).mean() > 0.6
    flips = (blocks[:, 1:] != blocks[:, :1]).sum(-1)
    assert set(np.unique(flips)) == {4}
    # What nobody but the policy would have drawn weighs 1 / share; what it would not, nothing.
    assert np.exp(ratio[:, 3]).min() > 2 and np.median(np.exp(ratio[:, 1])) < 1e-3


def test_weights_of_a_pair_are_the_product_and_bounded():
    better, worse = (np.asarray(index, np.int32) for index in ([1, 1, 2], [2, 3, 3]))
    pairs = preferences.PreferencePairs(better, worse, np.ones(3, np.float32), np.ones(3, bool))
    ratio = jnp.log(jnp.asarray([1.0, 2.0, 0.25, 8.0]))
    found = preferences.drawn_pair_weights(ratio, pairs, most=10.0)
    np.testing.assert_allclose(found, [0.5, 10.0, 2.0], rtol=1e-6)


def pair_weights(log_ratio):
    """float32[B, P]: what the pairs of random variants weigh, and which there are."""
    recipe, _ = scored.objective(local_edits=1, pair_weights="importance")
    variants, scores, _ = jax.tree.map(jnp.asarray, scored.random_case(0))
    inputs = term_inputs(
        scored.KEY,
        replace(variants, log_ratio=log_ratio),
        scores,
        None,
        Statistics(scored.EMPTY, scored.EMPTY, 1.0),
        recipe.hyper,
        recipe=recipe,
    )
    return inputs.pair_weights, inputs.pairs


def test_the_objective_weighs_pairs_by_the_known_ratios():
    ratio = np.random.default_rng(0).normal(size=(scored.BATCH, scored.VARIANTS)).astype(np.float32)
    found, pairs = jit(pair_weights)(ratio)
    take = functools.partial(np.take_along_axis, ratio, axis=1)
    np.testing.assert_allclose(found, np.minimum(np.exp(take(pairs.better) + take(pairs.worse)), 10), rtol=1e-5)


@functools.cache
def swept():
    """Two arms of one seed that differ in their rate, after three steps, and their reports."""
    arms = [_settings.replace(WEIGHED.config, **{"hyper.learning_rate": rate}) for rate in (1e-3, 3e-2)]
    recipe, run = sweep.program(arms), WEIGHED
    state, frozen = sweep.init(
        arms, {0: jax.random.key(0)}, recipe=recipe, models=run.models, params={**run.frozen(), **run.state().params}
    )
    assert state.draw.tolist() == [0, 1]
    step, reports = jit(functools.partial(sweep.step, recipe=recipe, models=run.models)), []
    for index in range(3):
        state, report = step(state, {"tokens": batch(index)["tokens"][None]}, frozen)
        reports.append(report)
    assert step._cache_size() == 1
    return state, reports


@pytest.mark.slow
def test_arms_of_a_sweep_draw_each_by_its_own_policy_as_their_runs_do():
    _, reports = swept()
    _, alone = WEIGHED.history(WEIGHED.state(learning_rate=3e-2), 3)
    assert WEIGHED.train_step._cache_size() == 1
    for name in ("mc/adv_delta_mean", "mc/preference_loss"):
        np.testing.assert_allclose([report[name][1] for report in reports], [one[name] for one in alone], rtol=1e-4)
    first, last = (report["mc/adv_delta_mean"] for report in (reports[0], reports[-1]))
    # Policies that learned at different rates draw different cuts.
    assert first[0] == first[1] and last[0] != last[1]


def test_no_gradient_passes_through_drawing():
    run, state = WEIGHED, WEIGHED.state()

    def total(lens):
        params = {**run.frozen(), "lens": lens}
        drawn = preference.score_batch(params, state, batch(), recipe=run.recipe, models=run.models)
        return drawn.nll.sum() + drawn.log_ratio.sum()

    for leaf in jax.tree.leaves(jit(jax.grad(total))(state.params["lens"])):
        np.testing.assert_array_equal(leaf, 0)


def test_arms_share_draws_only_where_they_are_the_same_run():
    arms = [
        _settings.replace(SMALL, **{"context.local_edits": 1, "context.own_rollouts": own, "hyper.margin": margin})
        for own in (0, 1)
        for margin in (0.1, 0.1, 0.4)
    ]
    shared, alone = ([sweep._draw(arm) for arm in part] for part in (arms[:3], arms[3:]))
    assert len(set(shared)) == 1 and len(set(alone)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"own_rollouts": 1}, "context.own_rollouts needs context.local_edits"),
        ({"own_rollouts": 4, "local_edits": 1}, "context.own_rollouts must be below context.rollouts 4"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ContextConfig(**changes)


def test_a_policy_that_draws_needs_a_temperature():
    run = WEIGHED
    with pytest.raises(ValueError, match="own_temperature must be given"):
        run.observe(run.state(), batch())
