"""What may change the terms over pairs, and who is taught instead: against the slow reference, and in a step."""

import dataclasses
import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.context import nodes
from lensjax.models import Models
from lensjax.models.decision import split
from lensjax.runs import sweep
from lensjax.training import lessons
from lensjax.training.objective import Statistics, lens_objective, term_inputs
from lensjax.training.steps import preference
from lensjax.training.terms.table import TERMS
from tests import reference, slow_objective
from tests.foreign import ForeignModel
from tests.small import LENS, SMALL, Run, batch, jit, tiny_models
from tests.training.scored import BATCH, EMPTY, GEOMETRY, KEY, as_arrays, one_update, random_case

NODES = len(nodes.table(GEOMETRY).lod)
MOMENTS = one_update(0.1, 0.3)


def with_worths(scored, seed):
    """What a teacher might say; of the second sequence nothing."""
    worth = np.random.default_rng(seed).exponential(size=(BATCH, NODES)).astype(np.float32)
    worth[1] = 0
    return replace(scored, worth=worth)


@functools.cache
def compiled(**changes):
    """The recipe, and the objective of variants, scores, anchor's scores, weights and stage."""
    recipe = _settings.replace(SMALL.recipe, **{"objective.max_pairs": 4} | changes)

    @jit
    def call(scored, scores, anchor, hyper, is_second):
        statistics = Statistics(MOMENTS, one_update(-0.2, 0.06), hyper.temperature, is_second=is_second)
        return lens_objective(KEY, scored, scores, anchor, statistics, hyper, recipe=recipe)

    return recipe, call


SOFT = {"hyper.label_smoothing": 0.1, "hyper.gap_margin": 0.2}
ATTRIBUTED = {"hyper.attribution_weight": 0.7}
IN_STAGES = {"objective.stages": "easy_first"}
GATED = {"objective.gate": "teacher"}


@pytest.mark.parametrize(
    ("choice", "swept"),
    [
        (SOFT | ATTRIBUTED, [{}, {"gap_margin": 0.0}, {"label_smoothing": 0.0, "attribution_weight": 1e-9}]),
        (SOFT | IN_STAGES | {"objective.granularity": "pair"}, [{}, {"easy_quantile": 0.2}, {"easy_quantile": 1.0}]),
        (
            GATED | IN_STAGES | ATTRIBUTED,
            [{}, {"gate_gain": 0.3}, {"gate": 0.4}, {"gate": 1.0}, {"gate": 0.5, "gate_gain": 0.1}],
        ),
        ({"objective.name": "mse"} | GATED, [{"gate": 0.4}]),
    ],
    ids=["soft", "stages", "gate", "squared"],
)
def test_the_objective_is_the_slow_reference(choice, swept):
    recipe, call = compiled(**choice)
    shares, found_losses = set(), set()
    has_gate = recipe.objective.gate == "teacher"
    for seed, values in enumerate(3 * swept):
        changed = replace(recipe, hyper=replace(recipe.hyper, **values))
        scored, scores, anchor = random_case(seed)
        scored = with_worths(scored, seed) if has_gate else scored
        is_second = bool(seed % 2)
        output = call(scored, scores, anchor, as_arrays(changed.hyper), is_second)
        expected = slow_objective.objective(
            scored,
            scores,
            anchor,
            advantage_moments=(0.1, 0.3),
            balance_average=-0.2,
            temperature=recipe.hyper.temperature,
            recipe=changed,
            is_second=is_second,
        )
        found = {name: float(value) for name, value in output.metrics.items()}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
        assert float(output.loss) == found["mc/lens_loss"]
        shares.add(found.get("mc/taught_share"))
        found_losses.add(found["mc/preference_loss"])
    assert len(found_losses) > 1
    assert not has_gate or len(shares) > 1


def test_a_term_of_variants_knows_the_stage_and_how_strong_a_preference_is():
    choice = {"objective.name": "logistic", **SOFT, **IN_STAGES, "hyper.easy_quantile": 0.4, "hyper.beta": 1.3}
    recipe = _settings.replace(SMALL.recipe, **choice)
    scored, scores, _ = random_case(3)
    gather = functools.partial(term_inputs, recipe=recipe)

    @jit
    def term(is_second):
        inputs = gather(
            KEY, scored, scores, None, Statistics(EMPTY, EMPTY, 1.0, is_second=is_second), as_arrays(recipe.hyper)
        )
        return TERMS["logistic"](inputs)

    rows = slow_objective.rows(scored, scores, None, recipe)
    for is_second in (False, True):
        pairs = slow_objective._pairs(rows, replace(recipe, objective=replace(recipe.objective, stages="one")), False)
        gaps = slow_objective.easy_gaps([gap for row in pairs for *_, gap in row], 0.4, is_second)
        options = {"beta": 1.3, "label_smoothing": 0.1, "gap_margin": 0.2, "gap_range": gaps}
        groups = [[(row.value(v), -row.losses[v]) for v in row.compared] for row in rows]
        expected = np.mean([reference.logistic(group, **options) for group in groups])
        assert float(term(is_second)) == pytest.approx(expected, rel=1e-4)


def test_what_the_teacher_takes_over_gets_no_gradient_of_preferences_and_the_others_none_of_the_teacher():
    recipe, _ = compiled(**GATED)
    scored, scores, _ = random_case(2)
    scored = with_worths(scored, 0)
    alone = dict.fromkeys(("rank_weight", "budget_weight", "smooth_weight", "kl_weight"), 0.0)
    hyper = as_arrays(replace(recipe.hyper, **alone))
    # The first sequence is made one without good rollouts, the others have some.
    losses = np.asarray(scored.nll).copy()
    losses[0, 0], losses[1:, 0] = losses[0].min() - 1, losses[1:].max() + 1
    scored = replace(scored, nll=losses)
    taught = [row.is_taught for row in slow_objective.rows(scored, scores, None, recipe)]
    assert taught == [True, False, False]

    @jit
    def gradient(worth, nll):
        changed = replace(scored, worth=worth, nll=nll)
        statistics = Statistics(MOMENTS, EMPTY, 1.0)
        loss = functools.partial(lens_objective, KEY, changed, recipe=recipe)
        return jax.grad(lambda s: loss(s, None, statistics, hyper).loss)(jnp.asarray(scores))

    plain = gradient(scored.worth, losses)
    assert np.isfinite(plain).all() and all(np.abs(plain[b]).max() > 0 for b in range(BATCH))
    other = gradient(scored.worth[::-1], losses)
    assert (other[0] != plain[0]).any()
    np.testing.assert_array_equal(other[1:], plain[1:])
    moved = losses.copy()
    moved[0, 1:] = moved[0, 1:][::-1]
    np.testing.assert_array_equal(gradient(scored.worth, moved)[0], plain[0])
    # Recency need not show the whole history, and nothing is asked of it.
    assert not np.asarray(plain[0, 0]).any()


@pytest.mark.parametrize(
    ("nll", "expected"),
    [([2, 1, 3, 3], 1 / 3), ([2, 1.5, 1.5, 1.4], 1.0), ([2, 1.6, 3, 1], 1 / 3), ([2, 3, 3, 3], 0.0)],
)
def test_the_gate_by_hand(nll, expected):
    """Half a nat below recency is good enough."""
    nll, every = np.asarray(nll, np.float32), np.ones(4, bool)
    for most in (0.0, 0.3, 0.4, 0.9, 1.0):
        assert bool(lessons.needs_teacher(nll, every, gain=0.5, most=most)) == (expected <= most)
    assert lessons.needs_teacher(nll, np.asarray([True, False, False, False]), gain=0.5, most=0.0)


@pytest.mark.parametrize(
    ("changes", "message", "fine"),
    [
        (
            {"hyper.label_smoothing": 0.1, "objective.name": "mse"},
            "hyper.label_smoothing must be 0 where objective.name is mse",
            {"hyper.label_smoothing": 0.1, "objective.name": "logistic"},
        ),
        (
            {"hyper.gap_margin": 0.1, "objective.name": "ipo"},
            "hyper.gap_margin must be 0 where objective.name is ipo",
            {"hyper.gap_margin": 0.1},
        ),
        ({"hyper.label_smoothing": 0.5}, "hyper.label_smoothing must be in [0, 0.5)", {"hyper.label_smoothing": 0.4}),
        (
            {"hyper.attribution_weight": 0.1, "objective.name": "span_advantages"},
            "hyper.attribution_weight must be 0 where objective.name is span_advantages",
            {"hyper.attribution_weight": 0.1, "objective.name": "copg"},
        ),
        (
            {"objective.stages": "easy_first", "objective.name": "grpo"},
            "objective.stages easy_first chooses among pairs",
            {"objective.stages": "easy_first", "objective.name": "mse"},
        ),
        (
            {"objective.gate": "teacher", "trainable": ("lens", "hypernet"), "context.window": 48},
            "objective.gate must be none for the hypernetwork",
            {"trainable": ("lens", "hypernet"), "context.window": 48},
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_full_path(changes, message, fine):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _settings.replace(SMALL.recipe, **changes)
    _settings.replace(SMALL.recipe, **fine)


def test_what_the_objective_lacks_is_named():
    scored, scores, anchor = random_case(0)
    for choice, message in ((GATED, "scored.worth must be given"), (IN_STAGES, "statistics.is_second must be given")):
        _, call = compiled(**choice)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call, scored, scores, anchor, as_arrays(SMALL.recipe.hyper), None)


# In a step.


@dataclasses.dataclass(frozen=True)
class Counting(ForeignModel):
    """A base model that notes each reading when a program is traced."""

    readings: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def logits(self, params, entries, rows):
        self.readings.append(entries.valid.shape)
        return super().logits(params, entries, rows)


def counted(**changes):
    base = Counting()
    run = Run(lambda config: replace(tiny_models(config), base=base), **{"gist.heads": 1} | changes)
    assert isinstance(run.models, Models)
    step = functools.partial(preference.train_step, recipe=run.recipe, models=run.models)
    _, report = jax.eval_shape(step, run.state(), batch(), run.frozen())
    return len(base.readings), set(report)


def test_nothing_is_read_or_reported_for_what_is_off():
    readings, names = counted()
    more, gated = counted(**GATED, **{"distill.teacher": "gradient"})
    assert more > readings == 1 and gated - names == {"mc/lesson_loss", "mc/taught_share"}
    same, attributed = counted(**ATTRIBUTED, **SOFT, **IN_STAGES)
    assert same == readings and attributed - names == {"mc/attribution_loss"}


def test_an_arm_decides_for_all_of_its_program():
    arms = [SMALL, _settings.replace(SMALL, **ATTRIBUTED), _settings.replace(SMALL, **SOFT, seed=1)]
    recipe = sweep.program(arms)
    assert recipe.has_attribution and recipe.is_softened and not recipe.has_anchor
    alone = sweep.program(arms[:1])
    assert not alone.has_attribution and not alone.is_softened


ALL = Run(
    tiny_models,
    **{"gist.heads": 1, "distill.teacher": "gradient", "hyper.kl_weight": 0.5, "objective.anchor": "stage"},
    **GATED | IN_STAGES | ATTRIBUTED | SOFT | {"steps": 4, "hyper.gate": 0.5, "optimizer.curriculum_steps": 0},
)


@functools.cache
def history():
    return ALL.history(ALL.state(), 4)


def test_the_steps_of_both_stages_are_one_program_and_the_anchor_is_that_of_the_stage():
    states, reports = history()
    assert ALL.train_step._cache_size() == 1
    lens = [state.params["lens"] for state in states]
    for index, expected in enumerate([0, 0, 2, 2, 2]):
        jax.tree.map(np.testing.assert_array_equal, states[index].anchor, lens[expected])
    # What a stage starts from is what it is held to.
    assert [float(report["kl"]) < 1e-8 for report in reports] == [True, False, True, False]
    assert all(0 <= float(report["mc/taught_share"]) <= 1 for report in reports)
    assert all(np.isfinite(float(report["loss"])) for report in reports)


def test_a_step_is_that_of_the_slow_reference():
    states, reports = history()
    for step in (0, 1, 2, 3):
        state, report = states[step], reports[step]
        scored, scores, anchor = ALL.observe(state, batch(step))
        scored = replace(scored, worth=worths(batch(step)["tokens"]))
        moments, demand = state.normaliser, state.demand
        expected = slow_objective.objective(
            scored,
            scores,
            anchor,
            advantage_moments=(float(moments.mean), float(moments.variance)) if step else None,
            balance_average=float(demand.mean) if step else None,
            temperature=1.0,
            recipe=ALL.recipe,
            is_second=step >= 2,
        )
        found = {name: float(report[name]) for name in expected}
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-5, nan_ok=True), step


@jit
def worths(tokens):
    """By the teacher's own function, sequence by sequence."""
    recipe, base = ALL.recipe, ALL.models.base
    options = {"settings": recipe.distill, "short": recipe.short}
    one = functools.partial(lessons.node_worths, base, ALL.frozen()["base"], geometry=recipe.geometry, **options)
    return jax.vmap(lambda row: one(window=split(row, horizon=recipe.context.horizon)))(tokens)


@pytest.mark.slow
def test_a_sweep_scores_and_teaches_as_a_run_does():
    static = {"recipe": ALL.recipe, "models": ALL.models}

    @jit
    def step(state, tokens, frozen):
        scored = preference.score_batch(frozen, state, tokens, **static)
        return preference.lens_step(state, scored, **static)

    state, report = step(ALL.state(), batch(0), ALL.frozen())
    states, reports = history()
    for name, value in reports[0].items():
        np.testing.assert_allclose(report[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.params, states[1].params)


def test_without_any_of_it_a_step_computes_what_it_did():
    """As many operations, and no output more, whatever the numbers of what is off."""
    step = functools.partial(preference.train_step, models=LENS.models)
    programs = [
        jax.make_jaxpr(functools.partial(step, recipe=_settings.replace(LENS.recipe, **changes)))(
            LENS.state(), batch(), LENS.frozen()
        )
        for changes in ({}, {"hyper.gate": 0.5, "hyper.easy_quantile": 0.1, "hyper.stage_boundary": 0.9})
    ]
    assert str(programs[0]) == str(programs[1])
