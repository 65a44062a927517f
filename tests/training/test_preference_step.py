"""`train_step` as a whole: what it reports, what it trains, what it remembers, and that it is one program."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.training.metrics import HISTOGRAMS, MAY_BE_UNDEFINED
from lensjax.training.steps import preference
from lensjax.training.steps.train_state import init_train_state
from tests import reference, slow_objective
from tests.foreign import ForeignModel
from tests.small import FULL, HALF_PRECISION, OTHER, SMALL, Run, batch, jit

PARTS = ("base", "gist", "lens")
# Without optional LOD 2 there is one cut of 20 entries, so that the last rollout becomes an aggressive one.
DUPLICATES = {"context_start": 20 / 32, "context_end": 20 / 32, "high_lod_share": 0.0}


@functools.cache
def history(run, seed=0, steps=3):
    """States and reports of a run's first steps; read only."""
    return run.history(run.state(seed), steps)


def numbers(report):
    return {name: float(value) for name, value in report.items() if name not in HISTOGRAMS}


def not_finite(report):
    """Names that must be finite and are not."""
    return [name for name, x in numbers(report).items() if not np.isfinite(x) and name not in MAY_BE_UNDEFINED]


def moved(before, after):
    """For every leaf by its path, whether any of its bits changed."""
    pairs = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before, after)
    return {jax.tree_util.keystr(path): changed for path, changed in jax.tree_util.tree_leaves_with_path(pairs)}


# What it reports.


@pytest.mark.parametrize(("run", "settings"), [(FULL, {}), (FULL, DUPLICATES), (OTHER, {})])
def test_reports_and_moving_averages_are_those_of_the_slow_reference(run, settings):
    states, reports = run.history(run.state(**settings), 3)
    recipe, hyper = run.recipe, run.recipe.hyper
    deltas, balances = [], []
    for step, (state, after, report) in enumerate(zip(states[:-1], states[1:], reports, strict=True)):
        scored, scores, anchor = run.observe(state, batch(step))
        temperature = hyper.temperature + (hyper.temperature_end - hyper.temperature) * step / (recipe.steps - 1)
        # Raw deltas, and no average to keep to, until there was an update.
        moments = reference.ema_mean_var(deltas, [hyper.adv_norm_beta] * step) if step else None
        average = reference.ema_mean_var(balances, [hyper.budget_smooth_beta] * step)[0] if step else None
        expected = slow_objective.objective(
            scored,
            scores,
            anchor,
            advantage_moments=moments,
            balance_average=average,
            temperature=temperature,
            recipe=recipe,
        )
        found = {name: value for name, value in numbers(report).items() if name in expected}
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-5, nan_ok=True), step
        assert float(report["temperature"]) == pytest.approx(temperature)

        rows = slow_objective.rows(scored, scores, None, recipe)
        deltas.append([row.deltas[v] for row in rows for v in row.distinct])
        balances.append([row.balance(v) for row in rows for v in row.distinct])
        for moments, values, beta in (
            (after.normaliser, deltas, hyper.adv_norm_beta),
            (after.demand, balances, hyper.budget_smooth_beta),
        ):
            mean, variance = reference.ema_mean_var(values, [beta] * (step + 1))
            assert float(moments.mean) == pytest.approx(mean, rel=1e-3, abs=1e-6)
            assert float(moments.variance) == pytest.approx(variance, rel=1e-3, abs=1e-6)
        counts, _ = np.histogram(
            [row.deltas[v] for row in rows for v in row.distinct if v > 0], HISTOGRAMS["mc/adv_histogram"]
        )
        assert report["mc/adv_histogram"].tolist() == counts.tolist()


@pytest.mark.parametrize("settings", [{}, DUPLICATES])
def test_the_loss_adds_the_token_losses_to_the_lens_loss(settings):
    (state, _), (report,) = FULL.history(FULL.state(**settings), 1)
    scored, _, _ = FULL.observe(state, batch())
    losses, distinct = np.asarray(scored.nll), np.asarray(scored.distinct)
    rises = np.maximum(losses - losses[:, :1], 0)
    found, hyper = numbers(report), FULL.recipe.hyper
    assert found["token_loss"] == pytest.approx(losses[distinct].mean(), rel=1e-5)
    assert found["gist_delta_loss"] == pytest.approx(rises[distinct].mean(), rel=1e-3)
    joint = hyper.token_loss_weight * found["token_loss"] + hyper.gist_delta_weight * found["gist_delta_loss"]
    assert found["loss"] == pytest.approx(found["mc/lens_loss"] + joint, rel=1e-5)


def test_the_rate_is_that_of_the_schedule():
    rates = [float(report["lr"]) for report in history(FULL)[1]]
    full = FULL.recipe.hyper.learning_rate
    assert rates == pytest.approx([full / 3, 2 * full / 3, full], rel=1e-5)


# What it trains.


def fresh_frozen(run):
    """What the steps were given of the frozen parts, drawn once more."""
    return init_train_state(jax.random.key(0), recipe=run.recipe, models=run.models)[1]


@pytest.mark.parametrize("run", [FULL, pytest.param(OTHER, marks=pytest.mark.slow), HALF_PRECISION])
def test_every_trainable_leaf_moves_and_every_frozen_one_stays(run):
    # At full length all variants are equal, so the policy's first lesson is the second step.
    first, second = history(run)[0][1:3]
    assert set(first.params) == set(second.params) == set(run.recipe.trainable)
    assert set(run.frozen()) == set(PARTS) - set(run.recipe.trainable)
    assert all(moved(first.params, second.params).values())
    jax.tree.map(np.testing.assert_array_equal, run.frozen(), jax.device_get(fresh_frozen(run)))


def test_the_policy_loss_trains_the_policy_alone():
    """Its inputs are detached: without token loss nothing else moves by a single bit."""
    before, after = FULL.history(FULL.state(token_loss_weight=0.0, gist_delta_weight=0.0), 1)[0]
    assert not any(moved(before.params["base"], after.params["base"]).values())
    assert not any(moved(before.params["gist"], after.params["gist"]).values())
    assert all(moved(before.params["lens"], after.params["lens"]).values())


def test_the_token_losses_train_everything_but_the_policy():
    _, plain = FULL.history(FULL.state(), 1)[0]
    _, heavy = FULL.history(FULL.state(token_loss_weight=9.0, gist_delta_weight=9.0), 1)[0]
    _, light = FULL.history(FULL.state(token_loss_weight=1.0, gist_delta_weight=9.0), 1)[0]
    for other in (heavy, light):
        assert not any(moved(plain.params["lens"], other.params["lens"]).values())
        assert any(moved(plain.params["base"], other.params["base"]).values())
        assert any(moved(plain.params["gist"], other.params["gist"]).values())


# The anchor policy.


def test_the_divergence_from_the_anchor_is_zero_at_first_and_positive_after_a_step():
    # The policy of OTHER has nothing to learn from at full length but to balance its demands.
    for run in (FULL, OTHER, HALF_PRECISION):
        first, *later = [float(report["kl"]) for report in history(run)[1]]
        assert first < 1e-12
        assert all(divergence > 1e-9 for divergence in later), later


@pytest.mark.parametrize(("run", "kind"), [(FULL, "previous"), (OTHER, "ema"), (HALF_PRECISION, "fixed")])
def test_which_anchor_each_step_is_given(run, kind):
    assert run.recipe.objective.anchor == kind
    states, _ = history(run)
    policies = [state.params["lens"] for state in states]
    assert any(moved(policies[1], policies[2]).values())
    beta, average = run.recipe.hyper.anchor_beta, policies[0]
    for step, state in enumerate(states):
        if kind == "ema" and step > 0:
            average = jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, average, policies[step])
        expected = {"previous": policies[max(step - 1, 0)], "fixed": policies[0], "ema": average}[kind]
        assert_same = chex.assert_trees_all_close if kind == "ema" else chex.assert_trees_all_equal
        assert_same(state.anchor, expected)


# One pure program.


def test_a_whole_run_is_one_program_that_moves_nothing_to_or_from_the_host(compiles):
    state, (first, *rest) = FULL.state(), [batch(i) for i in range(SMALL.steps)]
    state, report = FULL.train_step(state, first, FULL.frozen())
    reports = [report]
    with compiles() as names, jax.transfer_guard("disallow"):
        for tokens in rest:
            state, report = FULL.train_step(state, tokens, FULL.frozen())
            reports.append(report)
    assert names == []
    assert int(state.step) == SMALL.steps
    lengths = [int(report["context_length"]) for report in reports]
    assert lengths == [25, 23, 21, 19, 17, *[16] * 7]
    assert [not_finite(report) for report in reports] == [[]] * SMALL.steps


def test_equal_keys_give_equal_bits_and_other_keys_other_rollouts():
    one, again, other = (FULL.history(replace(FULL.state(), key=jax.random.key(k)), 2) for k in (5, 5, 6))
    chex.assert_trees_all_equal(one, again)
    assert float(one[1][0]["nll_rollout_mean"]) != float(other[1][0]["nll_rollout_mean"])
    assert float(one[1][0]["nll_baseline"]) == float(other[1][0]["nll_baseline"])
    assert any(moved(one[0][2].params["lens"], other[0][2].params["lens"]).values())


def test_each_step_draws_new_rollouts():
    means = [float(FULL.history(FULL.state(step=step), 1)[1][0]["nll_rollout_mean"]) for step in (8, 9, 10)]
    assert len(set(means)) == 3


@pytest.mark.parametrize("run", [FULL, OTHER])
def test_the_state_is_donated_but_for_rates_that_are_set_anew(run):
    state = run.state()
    run.train_step(state, batch(), run.frozen())
    kept = [path for path, leaf in jax.tree.leaves_with_path(state) if not leaf.is_deleted()]
    assert all("hyperparams" in jax.tree_util.keystr(path) for path in kept) and len(kept) == 2


def test_hyperparameters_are_data(compiles):
    changes = {
        "temperature": 0.25,
        "collapse_weight": 3.0,
        "rank_weight": 2.0,
        "margin": 0.9,
        "budget_weight": 2.0,
        "smooth_weight": 2.0,
        "kl_weight": 9.0,
        "token_loss_weight": 2.0,
        "gist_delta_weight": 4.0,
        "hard_negative_ratio": 0.0,
        "high_lod_share": 0.9,
        "context_start": 0.6,
        "learning_rate": 0.5,
    }
    _, (_, plain) = FULL.history(FULL.state(), 2)
    with compiles() as names:
        for name, value in changes.items():
            _, (_, report) = FULL.history(FULL.state(**{name: value}), 2)
            assert numbers(report)["loss"] != numbers(plain)["loss"], name
    assert names == []


@pytest.mark.slow
def test_several_settings_in_one_program_are_several_runs():
    settings = [
        {"temperature": 0.5, "context_end": 0.5, "learning_rate": 1e-3},
        {"temperature": 2.0, "context_end": 0.7, "learning_rate": 1e-2},
        {"kl_weight": 2.0, "high_lod_share": 0.9, "hard_negative_ratio": 1.0, "learning_rate": 1e-3},
    ]
    # Second steps, so that there is an anchor, an average and a normaliser.
    states = [FULL.history(FULL.state(seed, **hyper), 1)[0][1] for seed, hyper in enumerate(settings)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    step = functools.partial(preference.train_step, recipe=FULL.recipe, models=FULL.models)
    found, reports = jit(jax.vmap(step, in_axes=(0, None, None)))(together, batch(1), {})
    for index, state in enumerate(states):
        expected, report = FULL.train_step(state, batch(1), FULL.frozen())
        ours, our_report = jax.tree.map(lambda leaf, i=index: leaf[i], (found, reports))
        assert numbers(our_report) == pytest.approx(numbers(report), rel=1e-3, abs=1e-5, nan_ok=True)
        chex.assert_trees_all_close(ours.normaliser, expected.normaliser, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(ours.params, expected.params, atol=1e-5)


def test_half_precision_stays_finite_and_keeps_parameters_in_float32():
    states, reports = history(HALF_PRECISION)
    assert [not_finite(report) for report in reports] == [[]] * len(reports)
    for leaf in jax.tree.leaves((states[-1].params, states[-1].opt_state, states[-1].normaliser, reports)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    # The baseline holds no gist: its loss is that of the same base model in float32, to rounding.
    assert float(reports[0]["nll_baseline"]) == pytest.approx(float(history(FULL)[1][0]["nll_baseline"]), abs=0.01)


# Degenerate batches.


def test_a_base_model_that_predicts_nothing_is_reported_as_ties():
    state = OTHER.state(step=4)
    blank = {**state.params["base"], "head": jnp.zeros_like(state.params["base"]["head"])}
    state = replace(state, params={**state.params, "base": blank})
    _, (report,) = OTHER.history(state, 1)
    found = numbers(report)
    assert not_finite(report) == []
    assert found["nll_baseline"] == pytest.approx(np.log(ForeignModel.vocab_size))
    assert found["nll_rollout_best"] == pytest.approx(found["nll_baseline"])
    assert found["mc/preference_tie_share"] == found["frac_reward_zero_std"] == 1
    assert found["mc/preference_pair_count"] == found["mc/preference_loss"] == found["mc/rank_loss"] == 0
    assert np.isnan([found[f"mc/preference_corr_{name}"] for name in ("mean", "max", "min")]).all()


def test_at_the_length_of_the_history_every_variant_is_recency():
    report = history(OTHER)[1][0]
    found = numbers(report)
    assert not_finite(report) == []
    assert found["context_length"] == SMALL.context.history
    assert found["mc/distinct_share"] == 0
    # No two distinct variants are left: nothing to prefer, and no rollout to average over.
    assert found["mc/preference_pair_count"] == found["mc/preference_tie_share"] == found["nll_rollout_mean"] == 0


def test_duplicates_and_an_aggressive_variant_stay_finite():
    _, reports = FULL.history(FULL.state(**DUPLICATES, hard_negative_ratio=1.0), 2)
    for report in reports:
        assert not_finite(report) == []
        assert numbers(report)["context_length"] == 20
        assert numbers(report)["mc/distinct_share"] == pytest.approx(2 / 3)
        # Three distinct variants of each of three sequences.
        assert numbers(report)["mc/preference_pair_count"] == 9


def test_padding_changes_nothing():
    """Contexts of 16 entries, in arrays for 25 and in arrays for 16. The objective is compared with its reference."""
    tight = Run(**{"hyper.context_start": SMALL.hyper.context_end})
    assert (FULL.recipe.capacity, tight.recipe.capacity) == (25, 16)
    padded, padded_scores, _ = FULL.observe(FULL.state(step=6), batch())
    found, scores, _ = tight.observe(tight.state(step=6), batch())
    np.testing.assert_array_equal(padded.contexts.length, found.contexts.length)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[..., :16], padded.contexts), found.contexts)
    np.testing.assert_allclose(padded.nll, found.nll, rtol=1e-5)
    np.testing.assert_allclose(padded_scores[..., :16], scores, rtol=1e-4, atol=1e-6)
    assert not padded_scores[..., 16:].any()


def test_given_parts_outlive_a_donated_state():
    for run in (FULL, HALF_PRECISION):
        params = jax.tree.map(jnp.copy, run.params())
        state, frozen = init_train_state(jax.random.key(0), recipe=run.recipe, models=run.models, params=params)
        with jax.numpy_dtype_promotion("standard"):
            run.train_step(state, batch(), frozen)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, frozen)))
