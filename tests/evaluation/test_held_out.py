"""Held-out measurements, with a policy whose scores are known."""

import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.context import allocator, refocus
from lensjax.context import working as contexts
from lensjax.evaluation import held_out
from lensjax.models.decision import build_tree, policy, split
from tests import reference
from tests.small import FULL, SMALL, Run, batch, jit

SHAPE, GEOMETRY = SMALL.context, SMALL.geometry
BLOCKS = GEOMETRY.blocks(1)
SIZE, SHORTEST_CURRICULUM = SHAPE.block_size, 22


class KnownScores:
    """A policy whose parameters are its scores of the LOD-1 blocks, oldest first, and so of their tokens."""

    def init(self, key):
        return {"scores": jax.random.uniform(key, (BLOCKS,), minval=-0.9, maxval=0.9)}

    def apply(self, params, entries):
        start = SHAPE.history - 1 - entries.distances - (entries.spans - 1) / 2
        block = jnp.clip((start / SIZE).astype(jnp.int32), 0, BLOCKS - 1)
        return jnp.where(entries.valid & (entries.lods <= 1), params["scores"][block], 0.0)


# At 22 of 32 entries two blocks of twelve can be in full.
RUN = Run(
    lambda config: replace(config.build_models(), lens=KnownScores()),
    **{"hyper.context_end": SHORTEST_CURRICULUM / SHAPE.history},
)
KEY = jax.random.key(11)


@functools.cache
def eval_step():
    return jit(functools.partial(held_out.eval_step, recipe=RUN.recipe, models=RUN.models))


def state_that_scores(scores):
    state = RUN.state()
    return replace(state, params={**state.params, "lens": {"scores": jnp.asarray(scores, jnp.float32)}})


def evaluate(scores, answer_blocks=(0, 0, 0), key=KEY, **hyper):
    """The report on a batch whose answers start in the blocks given."""
    state = state_that_scores(scores)
    state = replace(state, hyper=replace(state.hyper, **{n: jnp.asarray(x, jnp.float32) for n, x in hyper.items()}))
    rows = batch() | {"answers": SIZE * jnp.asarray(answer_blocks, jnp.int32).reshape(3, -1)}
    report = eval_step()(key, state, rows, RUN.frozen())
    return {name: float(value) for name, value in report.items()}


def wish(block):
    return np.eye(BLOCKS)[block] * 0.5


def assert_same(found, expected):
    """To the bit; undefined values are equal."""
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


# The policy's pick.


def policy_contexts(params, history, length):
    """From the cold start on."""
    score_fn = policy(RUN.models.lens, params["lens"], build_tree(RUN.models, params, history, GEOMETRY))
    return refocus.cold_start(score_fn, length, GEOMETRY, capacity=RUN.recipe.capacity, settings=RUN.config.focus)


def test_the_policys_contexts_lead_from_the_cold_start_to_what_it_wishes():
    state = state_that_scores(wish(4))
    params, history = {**RUN.frozen(), **state.params}, batch()["tokens"][0, : SHAPE.history]

    @jit
    def walk(params, length):
        return policy_contexts(params, history, length)

    for length in (22, 19):
        shown = walk(params, length)
        assert np.asarray(shown.length).tolist() == [length] * (RUN.config.focus.steps + 1)
        cuts = np.asarray(jax.vmap(lambda one: contexts.to_cut(one, GEOMETRY))(shown))
        np.testing.assert_array_equal(cuts[0], allocator.to_cut(allocator.uniform(length, GEOMETRY), GEOMETRY))
        assert (cuts[-1, 4 * SIZE : 5 * SIZE] == 0).all()


def test_the_swap_rate_is_that_of_the_steps_from_the_cold_start():
    params = {**RUN.frozen(), **state_that_scores(wish(4)).params}

    @jit
    @jax.vmap
    def walk(tokens):
        return policy_contexts(params, split(tokens, horizon=SHAPE.horizon).history, RUN.recipe.budget)

    shown, rates = walk(batch()["tokens"]), []
    for row in range(len(batch()["tokens"])):
        steps = reference.unstack(jax.tree.map(lambda leaf, row=row: leaf[row], shown))
        rates += [len(set(after) - set(before)) / len(after) for before, after in itertools.pairwise(steps)]
    assert 0 < np.mean(rates) < 1
    assert evaluate(wish(4))["mc/swap_rate"] == pytest.approx(np.mean(rates))


def test_wishes_that_cancel_out_swap_nothing():
    report = evaluate(np.full(BLOCKS, -0.5))
    assert report["mc/edit_wish_rate"] > 0.5 and report["mc/swap_rate"] == 0


@pytest.mark.parametrize(
    ("answers", "rate"), [((7, 7, 7), 1), ((6, 8, 0), 0), ((7, 6, 7), 2 / 3)], ids=["hit", "missed", "some"]
)
def test_the_hit_rate_is_that_of_a_policy_whose_scores_are_known(answers, rate):
    report = evaluate(wish(7), answers)
    assert report["hit_rate"] == pytest.approx(rate)
    assert 0 < report["hit_rate_random"] < 0.6


def test_the_oracle_depends_on_the_answer_and_the_policy_does_not():
    report, wrong = evaluate(wish(4), (4, 4, 4)), evaluate(wish(4), (1, 1, 1))
    assert wrong["nll_policy"] == report["nll_policy"]
    assert abs(wrong["nll_oracle"] - report["nll_oracle"]) > 1e-6
    assert report["hit_rate"] == 1


def test_without_answers_nothing_is_said_about_them():
    run = functools.partial(held_out.eval_step, recipe=RUN.recipe, models=RUN.models)
    names = set(jax.eval_shape(run, KEY, RUN.state(), batch(), RUN.frozen()))
    assert set(evaluate(wish(0))) - names == {"hit_rate", "hit_rate_random", "nll_oracle"}
    assert "nll_policy" in names


def test_an_allocator_that_samples_is_measured_too():
    recipe = _settings.replace(RUN.recipe, **{"focus.temperature": 0.5})
    step = jit(functools.partial(held_out.eval_step, recipe=recipe, models=RUN.models))
    losses = [
        float(step(jax.random.key(seed), state_that_scores(wish(5)), batch(), RUN.frozen())["nll_policy"])
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


# The report.


def test_training_and_evaluation_measure_the_same_loss():
    """One function: the baseline's loss does not depend on who asks, nor on the policy or the rollouts."""
    state = FULL.state(step=11, context_end=SHORTEST_CURRICULUM / SHAPE.history)
    frozen = {name: jax.tree.map(jnp.copy, state.params[name]) for name in ("base", "gist")}
    scored, _, _ = FULL.observe(state, batch())
    other = replace(state_that_scores(wish(3)), step=jnp.asarray(0, jnp.int32))
    report = eval_step()(KEY, other, batch() | {"answers": jnp.zeros((3, 1), jnp.int32)}, frozen)
    assert (np.asarray(scored.contexts.length) == SHORTEST_CURRICULUM).all()
    assert float(report["nll_baseline"]) == pytest.approx(float(scored.nll[:, 0].mean()), rel=1e-5)


def test_at_the_length_of_the_history_it_is_the_ordinary_loss_of_the_horizon():
    run = Run(**{"hyper.context_start": 1.0, "hyper.context_end": 1.0})
    state = run.state()
    scored, _, _ = run.observe(state, batch())
    pretrained = jit(functools.partial(held_out.pretrain_eval_step, horizon=SHAPE.horizon, models=run.models))
    report = pretrained(run.params(), batch())
    tails = np.asarray(scored.nll)
    assert float(report["nll_full_tail"]) == pytest.approx(tails[:, 0].mean(), rel=1e-5)
    np.testing.assert_allclose(tails, np.broadcast_to(tails[:, :1], tails.shape), rtol=1e-5)
    assert abs(float(report["nll_full"]) - float(report["nll_full_tail"])) > 1e-3


def test_every_metric_of_the_objective_is_there():
    report = evaluate(wish(0))
    step = functools.partial(jax.eval_shape, RUN.train_step)
    _, trained = step(RUN.state(), batch(), RUN.frozen())
    of_training = {"loss", "grad_norm", "lr", "temperature", "context_length", "mc/adv_histogram"}
    assert set(trained) - set(report) == of_training


def test_one_key_is_one_measurement_and_another_key_other_rollouts():
    one, again, other = evaluate(wish(5)), evaluate(wish(5)), evaluate(wish(5), key=jax.random.key(12))
    assert_same(again, one)
    assert other["nll_rollout_mean"] != one["nll_rollout_mean"]
    for name in ("nll_baseline", "nll_policy", "nll_oracle", "hit_rate"):
        assert other[name] == one[name]


def test_measured_at_the_end_of_the_curriculum_and_of_the_temperature():
    report, sharp = evaluate(wish(5)), evaluate(wish(5), temperature_end=0.1)
    assert sharp["mc/preference_loss"] != report["mc/preference_loss"]
    # All 25 entries of the array, instead of 22: more is read.
    assert evaluate(wish(5), context_end=25 / 32)["nll_baseline"] != report["nll_baseline"]
    assert_same(evaluate(wish(5), context_start=0.6, temperature=0.1), report)


# Means over batches.


def test_means_over_batches():
    rows = [
        {"nll_policy": 1.0, "mc/preference_pair_count": 3.0, "mc/preference_corr_mean": 0.5},
        {"nll_policy": 2.0, "mc/preference_pair_count": 0.0, "mc/preference_corr_mean": math.nan},
        {"nll_policy": 6.0, "mc/preference_pair_count": 5.0, "mc/preference_corr_mean": -0.25},
    ]
    for name, values in (("max", (0.9, math.nan, 0.2)), ("min", (-0.5, math.nan, -0.75))):
        for row, value in zip(rows, values, strict=True):
            row[f"mc/preference_corr_{name}"] = value
    found = held_out.mean_over_batches({name: jnp.float32(x) for name, x in row.items()} for row in rows)
    assert found == pytest.approx(
        {
            "nll_policy": 3.0,
            "mc/preference_pair_count": 8.0,
            "mc/preference_corr_mean": 0.125,
            "mc/preference_corr_max": 0.9,
            "mc/preference_corr_min": -0.75,
        }
    )
    assert all(type(value) is float for value in found.values())


def test_a_loss_on_key_tokens_is_their_mean_over_all_batches():
    rows = [
        {"nll_policy_key": 1.0, "key_token_share": 0.3},
        {"nll_policy_key": math.nan, "key_token_share": 0.0},
        {"nll_policy_key": 5.0, "key_token_share": 0.1},
    ]
    assert held_out.mean_over_batches(rows) == pytest.approx({"nll_policy_key": 2.0, "key_token_share": 0.4 / 3})
    assert math.isnan(held_out.mean_over_batches(rows[1:2])["nll_policy_key"])


def test_only_correlations_may_be_undefined_in_a_mean():
    rows = [
        {"nll_policy": np.float32(1), "mc/preference_corr_mean": np.float32("nan")},
        {"nll_policy": np.float32("nan"), "mc/preference_corr_mean": np.float32("nan")},
    ]
    found = held_out.mean_over_batches(rows)
    assert math.isnan(found["nll_policy"]) and math.isnan(found["mc/preference_corr_mean"])


@pytest.mark.parametrize(
    "drawn", [{"own_rollouts": 2, "local_edits": 1}, {"proposed_rollouts": 2, "candidates": 2, "local_edits": 1}]
)
@pytest.mark.parametrize("reward", ["mean", "key"])
def test_whoever_draws_the_variants_of_training_they_are_measured_on_random_ones(drawn, reward):
    changes = {f"context.{name}": value for name, value in drawn.items()}
    trained, plain = (
        _settings.replace(SMALL, **{"context.reward": reward, "context.rollouts": 4, **more})
        for more in (changes, {"context.local_edits": 1})
    )
    state = jax.eval_shape(RUN.state)
    for measure, given in ((held_out.eval_step, batch()), (held_out.variant_maps, batch()["tokens"])):
        order = (KEY, state, given) if measure is held_out.eval_step else (state, given, KEY)
        programs = [
            str(jax.make_jaxpr(functools.partial(measure, recipe=one.recipe, models=RUN.models))(*order, RUN.frozen()))
            for one in (trained, plain)
        ]
        assert programs[0] == programs[1]


# Maps.


def test_maps_show_recency_the_rollouts_and_the_pick():
    scores = np.linspace(-0.9, 0.9, BLOCKS)
    state = state_that_scores(scores)
    draw = jit(functools.partial(held_out.variant_maps, recipe=RUN.recipe, models=RUN.models))
    maps = jax.device_get(draw(state, batch()["tokens"], KEY, RUN.frozen()))
    shape = (3, SHAPE.rollouts + 2, SHAPE.history)
    assert (maps["cuts"].shape, maps["scores"].shape, maps["nll"].shape) == (shape, shape, shape[:2])
    shown = maps["cuts"] != contexts.MISSING
    np.testing.assert_array_equal(np.isnan(maps["scores"]), ~shown)
    head = SHAPE.history - SHORTEST_CURRICULUM
    assert not shown[:, 0, :head].any() and shown[:, 0, head:].all() and shown[:, 1:].all()
    # The pick keeps the block of the highest score, here the last one before the tail.
    assert (maps["cuts"][:, -1, (BLOCKS - 1) * SIZE :] == 0).all()
    # Every token has the score of the entry that shows it.
    by_token = np.full(SHAPE.history, scores[-1])
    by_token[: BLOCKS * SIZE] = np.repeat(scores, SIZE)
    expected = np.where(shown, np.where(maps["cuts"] <= 1, by_token, 0), np.nan)
    np.testing.assert_allclose(maps["scores"], expected, rtol=1e-6)

    report = evaluate(scores)
    assert maps["nll"][:, 0].mean() == pytest.approx(report["nll_baseline"], rel=1e-5)
    assert maps["nll"][:, -1].mean() == pytest.approx(report["nll_policy"], rel=1e-5)
    distinct = maps["nll"][:, 1:-1]
    assert distinct.min(1).mean() == pytest.approx(report["nll_rollout_best"], rel=1e-5)


@pytest.mark.parametrize("curriculum", [None, pytest.param(6, marks=pytest.mark.slow)])
def test_without_preferences_it_is_measured_at_the_same_length(curriculum):
    """A run that distils alone, or nothing yet, has no step of the curriculum."""
    changes = {"hyper.context_end": SHORTEST_CURRICULUM / SHAPE.history, "optimizer.curriculum_steps": curriculum}
    run = Run(lambda config: RUN.models, steps=0, **changes)
    assert int(held_out.final_length(RUN.state(), run.recipe)) == SHORTEST_CURRICULUM == run.config.budget
    state, rows = RUN.state(), batch() | {"answers": jnp.zeros((3, 1), jnp.int32)}
    step = jit(functools.partial(held_out.eval_step, recipe=run.recipe, models=run.models))
    report = step(KEY, state, rows, RUN.frozen())
    expected = eval_step()(KEY, state, rows, RUN.frozen())
    assert report.keys() == expected.keys()
    for name, value in report.items():
        np.testing.assert_array_equal(value, expected[name])
    assert np.isfinite(report["nll_policy"]) and np.isfinite(report["mc/lens_loss"])
