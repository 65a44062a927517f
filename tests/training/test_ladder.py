"""The self-play curriculum: a ladder by hand, against a slow reference, and in a step."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.runs import sweep
from lensjax.runs.store import checkpoint
from lensjax.training import agreement, objective
from lensjax.training.optim.ladder import CurriculumConfig, init_ladder, update_ladder
from lensjax.training.steps import difficulty, preference
from tests.small import SMALL, Run, batch, jit
from tests.toy_state import assert_same_bits
from tests.training import scored

SELF_PLAY = {"curriculum.name": "self_play", "optimizer.curriculum_steps": None}
climbing = Run(
    **SELF_PLAY,
    **{"curriculum.levels": 3, "curriculum.patience": 1, "curriculum.high_lod_share": 0.9, "hyper.success_beta": 0.0},
)
update = jit(update_ladder, static_argnames="patience")


class SlowLadder:
    """All successes of each level, in a list."""

    def __init__(self, levels):
        self.level, self.stayed, self.seen = 0, 0, [[] for _ in range(levels)]

    def rate(self, level):
        total = weight = 0.0
        for age, (success, beta) in enumerate(reversed(self.seen[level])):
            later = np.prod([b for _, b in self.seen[level][len(self.seen[level]) - age :]])
            total, weight = total + later * (1 - beta) * success, weight + later * (1 - beta)
        return total / weight if weight else 0.0

    def update(self, success, counts, target, beta, patience):
        if not counts:
            return
        self.seen[self.level].append((success, beta))
        self.stayed += 1
        rate, before = self.rate(self.level), self.level
        if self.stayed >= patience and rate != target:
            self.level = min(max(self.level + (1 if rate > target else -1), 0), len(self.seen) - 1)
        self.stayed = 0 if self.level != before else self.stayed


@pytest.mark.parametrize("patience", [1, 3])
def test_a_ladder_is_that_of_the_slow_reference(patience):
    random = np.random.default_rng(patience)
    slow, ladder, levels = SlowLadder(4), init_ladder(4), set()
    for _ in range(120):
        success = float(np.float32(random.uniform() * (1 - 0.15 * slow.level)))
        counts, beta = bool(random.uniform() < 0.9), float(random.choice([0.5, 0.9]))
        slow.update(success, counts, 0.45, beta, patience)
        ladder = update(ladder, success, counts, target=0.45, beta=beta, patience=patience)
        assert (int(ladder.level), int(ladder.stayed)) == (slow.level, slow.stayed)
        np.testing.assert_allclose(ladder.success, [slow.rate(level) for level in range(4)], rtol=1e-4, atol=1e-6)
        levels.add(slow.level)
    assert len(levels) >= 3 and update._cache_size() <= 2


def test_a_ladder_by_hand():
    step = functools.partial(update, target=0.5, beta=0.5, patience=2)
    ladder = step(init_ladder(2), 1.0, True)
    assert (int(ladder.level), int(ladder.stayed), ladder.success.tolist()) == (0, 1, [1.0, 0.0])
    ladder = step(ladder, 0.25, True)  # (1/4 * 1 + 1/2 * 1/4) / (3/4) = 1/2, the target itself
    assert int(ladder.level) == 0 and float(ladder.success[0]) == 0.5
    ladder = step(ladder, 1.0, True)
    assert int(ladder.level) == 1 and int(ladder.stayed) == 0
    ladder = step(step(ladder, 0.9, True), 0.9, True)
    assert int(ladder.level) == 1, "there is nothing above the hardest level"
    ladder = step(step(ladder, 0.0, True), 0.0, True)
    assert int(ladder.level) == 0
    assert_same_bits(step(ladder, np.nan, False), ladder)


def test_success_is_held_near_the_target():
    """A policy whose success falls by a tenth a level from 0.9 on, with noise."""
    random, ladder, rates, levels = np.random.default_rng(0), init_ladder(8), [], []
    for _ in range(600):
        success = 0.9 - 0.1 * int(ladder.level) + 0.1 * random.standard_normal()
        levels.append(int(ladder.level))
        rates.append(success)
        ladder = update(ladder, np.float32(success), True, target=0.65, beta=0.9, patience=5)
    assert abs(np.mean(rates[100:]) - 0.65) < 0.05 and set(levels[100:]) <= {1, 2, 3, 4}


def test_a_nan_stays_and_moves_nothing():
    ladder = update(init_ladder(2), np.nan, True, target=0.5, beta=0.5, patience=1)
    assert np.isnan(ladder.success[0]) and int(ladder.level) == 0


def test_levels_go_from_the_mildest_to_the_hardest_of_the_fixed_curriculum():
    recipe, hyper = climbing.recipe, climbing.state().hyper
    ladder = climbing.state().ladder
    of = functools.partial(difficulty.of_step, 0, hyper, recipe=recipe)
    lengths, shares = zip(*(of(replace(ladder, level=jnp.int32(level))) for level in range(3)), strict=True)
    ends = [recipe.geometry.length_of_fraction(end) for end in (0.8, 0.5)]
    assert [int(lengths[0]), int(lengths[-1])] == ends and ends[0] > int(lengths[1]) > ends[1]
    np.testing.assert_allclose(shares, [0.3, 0.6, 0.9], rtol=1e-6)
    assert float(difficulty.hardest_share(hyper, recipe)) == pytest.approx(0.9)


def test_without_a_ladder_nothing_of_it_is_there():
    run = Run()
    assert run.state().ladder is None
    length, share = difficulty.of_step(3, run.state().hyper, None, recipe=run.recipe)
    assert int(length) == int(difficulty.current_length(3, run.state().hyper, recipe=run.recipe))
    assert share is not None
    _, report = jax.eval_shape(
        functools.partial(preference.train_step, recipe=run.recipe, models=run.models),
        *(run.state(), batch(), run.frozen()),
    )
    assert not any("curriculum" in name or "success" in name for name in report)


@pytest.mark.slow
def test_a_run_climbs_where_it_is_right_and_goes_on_from_a_checkpoint(tmp_path):
    states, reports = climbing.history(climbing.state(success_target=0.0), 4)
    assert climbing.train_step._cache_size() == 1
    assert [int(state.ladder.level) for state in states] == [0, 1, 2, 2, 2]
    lengths = [int(report["context_length"]) for report in reports]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] == climbing.recipe.budget < lengths[0]
    rates = [float(report["mc/preference_success"]) for report in reports]
    assert all(0 <= rate <= 1 for rate in rates)
    checkpoint.save(tmp_path, 2, states[2])
    restored, _ = checkpoint.restore(tmp_path, 2, jax.eval_shape(lambda: states[2]))
    for index in (2, 3):
        restored, _ = climbing.train_step(restored, batch(index), climbing.frozen())
    assert_same_bits((restored.ladder, restored.params), (states[4].ladder, states[4].params))


def test_success_is_the_share_of_nats_between_best_and_worst_in_which_the_best_is_asked_for():
    recipe, _ = scored.objective()
    variants, scores, _ = jax.tree.map(jnp.asarray, scored.random_case(1))

    @jit
    def measure(scores):
        earlier = objective.Statistics(scored.EMPTY, scored.EMPTY, 1.0)
        inputs = objective.term_inputs(
            scored.KEY, variants, scores, None, earlier, scored.as_arrays(recipe.hyper), recipe=recipe
        )
        margins = jax.vmap(agreement.pair_margins)(scores, inputs.targets, inputs.pairs)
        return objective._preference_metrics(inputs, tells_success=True), inputs.pairs, margins

    for values in (scores, -scores):
        report, pairs, margins = measure(values)
        wins, gaps = [], []
        for row in range(scored.BATCH):
            nll = np.where(variants.distinct[row], variants.nll[row], np.nan)
            ends = (np.nanargmin(nll), np.nanargmax(nll))
            place = list(zip(pairs.better[row].tolist(), pairs.worse[row].tolist(), strict=True)).index(ends)
            wins.append(margins[row, place] > 0)
            gaps.append(np.nanmax(nll) - np.nanmin(nll))
        assert float(report["mc/preference_success"]) == pytest.approx(np.dot(wins, gaps) / np.sum(gaps))
        assert int(report["mc/preference_success_count"]) == scored.BATCH


def test_arms_with_ladders_share_only_their_own_draws():
    arms = [_settings.replace(SMALL, **SELF_PLAY, **{"hyper.margin": margin}) for margin in (0.1, 0.1, 0.4)]
    assert len({sweep._draw(arm) for arm in arms}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"high_lod_share": 0.5}, "curriculum.high_lod_share is of curriculum.name self_play"),
        ({"name": "self_play", "levels": 1}, "curriculum.levels must be in"),
    ],
)
def test_what_no_ladder_reads_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CurriculumConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.curriculum_steps": 6}, "optimizer.curriculum_steps must be None with curriculum.name self_play"),
        (
            {"context.max_lod": 1, "curriculum.high_lod_share": 0.5},
            "curriculum.high_lod_share needs context.max_lod above 1",
        ),
    ],
)
def test_a_recipe_says_what_does_not_go_with_a_ladder(changes, message):
    with pytest.raises(ValueError, match=message):
        _settings.replace(SMALL.recipe, **{**SELF_PLAY, "hyper.context_end": 0.7, **changes})
