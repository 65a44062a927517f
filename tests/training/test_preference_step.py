"""`train_step` as a whole: what it reports, what it trains, what it remembers, and that it is one program."""

import functools
import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.models import build_models
from lensjax.runs import config as configs
from lensjax.training.metrics import HISTOGRAMS, MAY_BE_UNDEFINED
from lensjax.training.steps import preference
from tests import reference, slow_objective
from tests.small import FULL, HALF_PRECISION, LENS, OTHER, SMALL, Run, batch, jit

PARTS = ("base", "gist", "lens")
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(PARTS, size)]

REPORT = {
    *("loss", "grad_norm", "lr", "temperature", "context_length"),
    *("nll_baseline", "nll_rollout_mean", "nll_rollout_best"),
    *("reward_mean", "reward_std", "frac_reward_zero_std"),
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    *(f"mc/adv_delta_{name}" for name in ("mean", "p95", "std")),
    *("mc/adv_ema_mean", "mc/adv_ema_std", *HISTOGRAMS),
    *(f"mc/preference_corr_{name}" for name in ("mean", "max", "min", "defined_share")),
    *("mc/preference_agreement", "mc/preference_agreement_lod_only", "mc/preference_pair_count"),
    *("mc/preference_tie_share", "mc/distinct_share", "mc/edit_wish_rate"),
    *("mc/policy_score_abs_mean", "mc/policy_score_std_mean"),
    *("mc/lens_loss", "mc/preference_loss", "mc/rank_loss", "mc/budget_loss", "mc/smooth_loss"),
    *("mc/lod_loss/0", "mc/lod_loss/1", "mc/lod_loss/2"),
}
# Without optional LOD 2 there is one cut of 20 entries, so that the last rollout becomes an aggressive one.
DUPLICATES = {"context_start": 20 / 32, "context_end": 20 / 32, "lod2_share": 0.0}
KL, JOINT = {"kl", "mc/kl_loss"}, {"token_loss", "gist_delta_loss"}


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


@pytest.mark.parametrize(("run", "extra"), [(LENS, set()), (FULL, KL | JOINT), (OTHER, KL | JOINT)])
def test_the_names_of_the_report(run, extra):
    step = functools.partial(preference.train_step, config=run.config, models=run.models)
    _, report = jax.eval_shape(step, run.state(), batch())
    assert set(report) == REPORT | extra
    shapes = {name: (len(HISTOGRAMS[name]) - 1,) if name in HISTOGRAMS else () for name in report}
    assert {name: value.shape for name, value in report.items()} == shapes
    assert all(value.dtype == jnp.float32 for value in report.values())


@pytest.mark.parametrize(("run", "settings"), [(FULL, {}), (FULL, DUPLICATES), (OTHER, {})])
def test_reports_and_moving_averages_are_those_of_the_slow_reference(run, settings):
    states, reports = run.history(run.state(**settings), 3)
    hyper, config = run.config.hyper, run.config
    deltas, balances = [], []
    for step, (state, after, report) in enumerate(zip(states[:-1], states[1:], reports, strict=True)):
        scored, scores, anchor = run.observe(state, batch(step))
        temperature = hyper.temperature + (hyper.temperature_end - hyper.temperature) * step / (config.steps - 1)
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
            config=config,
        )
        found = {name: value for name, value in numbers(report).items() if name in expected}
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-5, nan_ok=True), step
        assert float(report["temperature"]) == pytest.approx(temperature)

        scored, scores = jax.device_get((scored, scores))
        rows = [
            slow_objective.Row(jax.tree.map(lambda leaf, b=b: leaf[b], scored), scores[b], None, config)
            for b in range(len(scores))
        ]
        deltas.append([row.deltas[v] for row in rows for v in row.distinct])
        balances.append([row.balance(v) for row in rows for v in row.distinct])
        for moments, values, beta in (
            (after.normaliser, deltas, hyper.adv_norm_beta),
            (after.budget, balances, hyper.budget_smooth_beta),
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
    losses, distinct = np.asarray(scored.losses), np.asarray(scored.distinct)
    rises = np.maximum(losses - losses[:, :1], 0)
    found, hyper = numbers(report), FULL.config.hyper
    assert found["token_loss"] == pytest.approx(losses[distinct].mean(), rel=1e-5)
    assert found["gist_delta_loss"] == pytest.approx(rises[distinct].mean(), rel=1e-3)
    joint = hyper.token_loss_weight * found["token_loss"] + hyper.gist_delta_weight * found["gist_delta_loss"]
    assert found["loss"] == pytest.approx(found["mc/lens_loss"] + joint, rel=1e-5)


def test_the_rate_is_that_of_the_schedule():
    rates = [float(report["lr"]) for report in history(FULL)[1]]
    full = FULL.config.hyper.learning_rate
    assert rates == pytest.approx([full / 3, 2 * full / 3, full], rel=1e-5)


# What it trains.


@pytest.mark.parametrize("run", [FULL, OTHER, HALF_PRECISION])
def test_every_trainable_leaf_moves_and_every_frozen_one_stays(run):
    # At full length all variants are equal, so the policy's first lesson is the second step.
    first, second = history(run)[0][1:3]
    for part in PARTS:
        changed = moved(first.params[part], second.params[part])
        assert set(changed.values()) == {part in run.config.trainable}, changed


@pytest.mark.parametrize("trainable", SUBSETS, ids="+".join)
def test_frozen_parts_are_passed_through_for_every_choice_of_trainable_parts(trainable):
    """Read off the program: the output for a frozen leaf is the input itself."""
    config = configs.replace(SMALL, trainable=trainable)
    state = preference.init_train_state(jax.random.key(0), config=config, models=LENS.models)
    step = functools.partial(preference.train_step, config=config, models=LENS.models)
    program, (after, _) = jax.make_jaxpr(step, return_shape=True)(state, batch())
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert names == [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(after)]
    passed = {
        name: before is outcome
        for name, before, outcome in zip(names, program.jaxpr.invars, program.jaxpr.outvars, strict=False)
    }
    frozen = [part for part in PARTS if part not in trainable]
    for name, is_passed in passed.items():
        if name.startswith(".params"):
            assert is_passed == any(f"['{part}']" in name for part in frozen), name


@pytest.mark.slow
@pytest.mark.parametrize("trainable", SUBSETS, ids="+".join)
def test_one_step_with_every_choice_of_trainable_parts(trainable):
    run = Run(trainable=trainable)
    before, after = run.history(run.state(), 1)[0]
    for part in PARTS:
        assert set(moved(before.params[part], after.params[part]).values()) == {part in trainable}


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
    assert run.config.objective.anchor == kind
    states, _ = history(run)
    policies = [state.params["lens"] for state in states]
    assert any(moved(policies[1], policies[2]).values())
    beta, average = run.config.hyper.anchor_beta, policies[0]
    for step, state in enumerate(states):
        if kind == "ema" and step > 0:
            average = jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, average, policies[step])
        expected = {"previous": policies[max(step - 1, 0)], "fixed": policies[0], "ema": average}[kind]
        assert_same = chex.assert_trees_all_close if kind == "ema" else chex.assert_trees_all_equal
        assert_same(state.anchor, expected)


class CountingLens:
    """A policy that notes each application when a program is traced."""

    def __init__(self):
        self.applied = 0

    def init(self, key):
        return {"weight": jax.random.normal(key, (SMALL.base.dim,))}

    def apply(self, params, entries):
        self.applied += 1
        return jnp.where(entries.valid, jnp.tanh(entries.embeddings @ params["weight"]), 0.0)


@pytest.mark.parametrize(("weight", "applications"), [(0.0, 1), (0.1, 2)])
def test_without_divergence_there_is_no_anchor_and_no_second_pass(weight, applications):
    lens = CountingLens()
    run = Run(lambda config: replace(build_models(config), lens=lens), **{"hyper.kl_weight": weight})
    state = run.state()
    assert (state.anchor is None) == (weight == 0)
    jax.eval_shape(functools.partial(preference.train_step, config=run.config, models=run.models), state, batch())
    assert lens.applied == applications


# What reaches an objective over groups.


def lens_reports(run, steps):
    """Of single steps of LensNet alone, on the variants of the first one; and those variants with their scores."""
    scored, scores, _ = run.observe(run.state(step=steps[0]), batch())
    step = jit(functools.partial(preference.lens_step, config=run.config, models=run.models))
    return [numbers(step(run.state(step=i), scored)[1]) for i in steps], scored, scores


def test_the_schedule_of_the_temperature_reaches_info_nce():
    run = Run(**{"objective.name": "info_nce", "hyper.temperature": 1.0, "hyper.temperature_end": 0.05})
    reports, scored, scores = lens_reports(run, (0, SMALL.steps - 1))
    for report, temperature in zip(reports, (1.0, 0.05), strict=True):
        expected = []
        for b in range(len(scores)):
            one = jax.tree.map(lambda leaf, b=b: leaf[b], jax.device_get(scored))
            row = slow_objective.Row(one, scores[b], None, run.config)
            group = [(row.value(v), -row.losses[v]) for v in row.compared]
            expected.append(reference.info_nce(group, tau=temperature))
        assert report["mc/preference_loss"] == pytest.approx(np.mean(expected), rel=1e-3)


def test_each_step_draws_new_rankings_from_a_key_that_no_sequence_has():
    key = jax.random.key(7)
    rows = jax.random.key_data(jax.random.split(key, 4096)).tolist()
    assert jax.random.key_data(preference.objective_key(key)).tolist() not in rows
    run = Run(**{"objective.name": "pg_rank", "context.rollouts": 6})
    terms = [report["mc/preference_loss"] for report in lens_reports(run, (3, 3, 4))[0]]
    assert terms[0] == terms[1] != terms[2] and np.isfinite(terms).all()


@pytest.mark.parametrize(
    "changes",
    [{"objective.name": "mse"}, {"objective.name": "span_advantages"}, {"objective.pair_weights": "importance"}],
    ids=lambda changes: "-".join(changes.values()),
)
def test_what_takes_the_place_of_the_preference_loss_trains(changes):
    run = Run(steps=30, **changes, **{"hyper.rank_weight": 0.0, "hyper.learning_rate": 0.01})
    scored, _, _ = run.observe(run.state(), batch())
    step = jit(functools.partial(preference.lens_step, config=run.config, models=run.models))
    state, reports = run.state(), []
    for _ in range(run.config.steps):
        state, report = step(state, scored)
        reports.append(numbers(report))
    first, last = reports[0], reports[-1]
    # The normaliser is new after the first step, and with it the unit of the loss.
    assert last["mc/preference_loss"] < reports[1]["mc/preference_loss"] - 0.02
    assert last["mc/preference_agreement"] > first["mc/preference_agreement"] + 0.2


# One pure program.


def test_a_whole_run_is_one_program_that_moves_nothing_to_or_from_the_host(compiles):
    state, (first, *rest) = FULL.state(), [batch(i) for i in range(SMALL.steps)]
    state, report = FULL.train_step(state, first)
    reports = [report]
    with compiles() as names, jax.transfer_guard("disallow"):
        for tokens in rest:
            state, report = FULL.train_step(state, tokens)
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
def test_the_state_is_donated_whole(run):
    state = run.state()
    run.train_step(state, batch())
    kept = [path for path, leaf in jax.tree_util.tree_leaves_with_path(state) if not leaf.is_deleted()]
    assert kept == []


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
        "lod2_share": 0.9,
        "context_start": 0.6,
        "learning_rate": 0.5,
    }
    _, (_, plain) = FULL.history(FULL.state(), 2)
    with compiles() as names:
        for name, value in changes.items():
            _, (_, report) = FULL.history(FULL.state(**{name: value}), 2)
            assert numbers(report)["loss"] != numbers(plain)["loss"], name
    assert names == []


def test_several_settings_in_one_program_are_several_runs():
    settings = [
        {"temperature": 0.5, "context_end": 0.5, "learning_rate": 1e-3},
        {"temperature": 2.0, "context_end": 0.7, "learning_rate": 1e-2},
        {"kl_weight": 2.0, "lod2_share": 0.9, "hard_negative_ratio": 1.0, "learning_rate": 1e-3},
    ]
    # Second steps, so that there is an anchor, an average and a normaliser.
    states = [FULL.history(FULL.state(seed, **hyper), 1)[0][1] for seed, hyper in enumerate(settings)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    step = functools.partial(preference.train_step, config=FULL.config, models=FULL.models)
    found, reports = jit(jax.vmap(step, in_axes=(0, None)))(together, batch(1))
    for index, state in enumerate(states):
        expected, report = FULL.train_step(state, batch(1))
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
    assert found["nll_baseline"] == pytest.approx(np.log(reference.TinyModel.vocab_size))
    assert found["nll_rollout_best"] == pytest.approx(found["nll_baseline"])
    assert found["mc/preference_tie_share"] == found["frac_reward_zero_std"] == 1
    assert found["mc/preference_pair_count"] == found["mc/preference_loss"] == found["mc/rank_loss"] == 0
    assert np.isnan([found[f"mc/preference_corr_{name}"] for name in ("mean", "max", "min")]).all()


def test_at_the_length_of_the_history_every_variant_is_the_baseline():
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
    assert (FULL.config.context_capacity, tight.config.context_capacity) == (25, 16)
    padded, padded_scores, _ = FULL.observe(FULL.state(step=6), batch())
    found, scores, _ = tight.observe(tight.state(step=6), batch())
    np.testing.assert_array_equal(padded.contexts.length, found.contexts.length)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[..., :16], padded.contexts), found.contexts)
    np.testing.assert_allclose(padded.losses, found.losses, rtol=1e-5)
    np.testing.assert_allclose(padded_scores[..., :16], scores, rtol=1e-4, atol=1e-6)
    assert not padded_scores[..., 16:].any()


# The start, the curriculum, other models.


def test_given_parts_are_taken_and_the_others_are_drawn():
    key = jax.random.key(3)
    base = LENS.models.base.init(jax.random.key(7))
    drawn = preference.init_train_state(key, config=LENS.config, models=LENS.models)
    state = preference.init_train_state(key, config=LENS.config, models=LENS.models, params={"base": base})
    chex.assert_trees_all_equal(state.params, {**drawn.params, "base": base})
    assert int(state.step) == 0 and state.anchor is None
    assert float(state.hyper.context_end) == LENS.config.hyper.context_end
    other = preference.init_train_state(jax.random.key(4), config=LENS.config, models=LENS.models)
    assert all(moved(drawn.params["lens"]["content"], other.params["lens"]["content"]).values())


def test_given_parts_outlive_a_donated_state():
    params = jax.tree.map(jnp.copy, FULL.state().params)
    state = preference.init_train_state(jax.random.key(0), config=FULL.config, models=FULL.models, params=params)
    FULL.train_step(state, batch())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="params may hold base, gist, lens, got head, tail"):
        preference.init_train_state(
            jax.random.key(0), config=LENS.config, models=LENS.models, params={"tail": {}, "head": {}, "base": {}}
        )


@pytest.mark.parametrize("changes", [{}, {"context.block_size": 4}, {"optimizer.curriculum_steps": None}])
@pytest.mark.parametrize(("start", "end"), [(0.8, 0.5), (0.5, 0.8), (0.7, 0.7)])
def test_lengths_of_the_curriculum_are_reachable_and_monotone(changes, start, end):
    config = configs.replace(SMALL, **changes, **{"hyper.context_start": start, "hyper.context_end": end})
    hyper = jax.tree.map(jnp.float32, config.hyper)
    steps = np.arange(config.steps, dtype=np.int32)
    lengths = jax.vmap(lambda step: preference.current_length(step, hyper, config))(steps).tolist()
    geometry = config.context.geometry
    assert all(geometry.length(length) == length for length in lengths)
    assert lengths[0] == geometry.length_of_fraction(start)
    # The default curriculum is half of the run, which is 6 steps here as well.
    assert set(lengths[5:]) == {geometry.length_of_fraction(end)}
    assert lengths == sorted(lengths, reverse=start > end)
    assert max(lengths) == config.context_capacity


def test_a_base_model_that_is_no_flax_module_can_be_trained():
    """All that it needs is `init`, `embed` and `apply`."""
    assert not hasattr(OTHER.models.base, "config")
    state, tokens, losses = OTHER.state(step=6, learning_rate=0.03), batch(), []
    for _ in range(6):
        state, report = OTHER.train_step(state, tokens)
        assert not_finite(report) == []
        losses.append(float(report["nll_baseline"]))
    assert losses[-1] < losses[0] - 0.1
