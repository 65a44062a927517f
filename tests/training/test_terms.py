"""Preference terms by name: what each makes of the same batch, and that anyone's function can be one."""

import functools
import typing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lensjax import losses
from lensjax.models.decision import policy_scores
from lensjax.training import agreement
from lensjax.training.objective import Statistics, term_inputs
from lensjax.training.steps import preference
from lensjax.training.steps.train_state import init_train_state
from lensjax.training.terms.inputs import ObjectiveConfig
from lensjax.training.terms.table import TERMS
from tests import reference, slow_objective
from tests.small import LENS, batch, jit
from tests.training.scored import (
    BATCH,
    EMPTY,
    GEOMETRY,
    KEY,
    VARIANTS,
    as_arrays,
    compiled,
    objective,
    random_case,
)

HYPER = {
    "kl_weight": 0.2,
    "beta": 1.3,
    "reward_temperature": 0.4,
    "cpl_bias": 0.7,
    "temperature": 0.6,
    "rpo_weight": 0.3,
    "clip": 0.1,
}
BETA, TAU = {"beta": 1.3}, {"tau": 0.6}
OVER_GROUPS = {
    **dict.fromkeys(["logistic", "hinge", "ipo", "copg", "a_star_po", "plackett_luce"], BETA),
    **dict.fromkeys(["disco", "info_nce"], TAU),
    "cpl": {"alpha": 1.3, "bias": 0.7},
    "grpo": BETA | {"clip": 0.1, "baseline": "standardised"},
    "info_nca": {"alpha": 0.4, "beta": 1.3},
    "rpo": BETA | {"weight": 0.3},
}
OVER_ENTRIES = ("spans", "mse", "span_advantages", "gtpo")


def test_every_name_of_an_objective_has_a_term_and_every_term_a_name():
    names = typing.get_args(typing.get_type_hints(ObjectiveConfig)["name"])
    assert set(names) == set(TERMS) == {*OVER_ENTRIES, *OVER_GROUPS, "pg_rank"}
    assert {name for name in names if not ObjectiveConfig(name=name).is_over_groups} == set(OVER_ENTRIES)


# What a term looks at


def case(seed=3):
    """A batch in which the second sequence holds no preference."""
    scored, scores, anchor = random_case(seed)
    return replace(scored, nll=scored.nll * np.asarray([[1], [0], [1]], np.float32)), scores, anchor


@functools.cache
def _gather(local_edits, keep):
    recipe, _ = objective(local_edits=local_edits, keep=keep)
    return recipe, jit(functools.partial(term_inputs, recipe=recipe))


def inputs_of(scored, scores, anchor, *, key=KEY, local_edits=0, keep=None, **hyper):
    recipe, gather = _gather(local_edits, keep)
    weights = as_arrays(replace(recipe.hyper, **(HYPER | hyper)))
    inputs = gather(key, scored, scores, anchor, Statistics(EMPTY, EMPTY, weights.temperature), weights)
    return recipe, inputs


def as_batch(inputs):
    return replace(inputs, objective=ObjectiveConfig(name="info_nce", group="batch"))


def test_values_are_relative_to_the_anchor_where_the_divergence_weighs_something():
    """In a sweep an arm without a weight for it has the anchor's scores all the same."""
    scored, scores, anchor = case()
    recipe, inputs = inputs_of(scored, scores, anchor)
    own, theirs = (
        [[row.value(v) for v in range(VARIANTS)] for row in slow_objective.rows(scored, policy, None, recipe)]
        for policy in (scores, anchor)
    )
    np.testing.assert_allclose(inputs.values, own, atol=1e-6)
    np.testing.assert_allclose(inputs.relative_values, np.asarray(own) - np.asarray(theirs), atol=1e-6)
    for given, weight in ((anchor, 0.0), (None, 0.2)):
        _, alone = inputs_of(scored, scores, given, kl_weight=weight)
        np.testing.assert_allclose(alone.relative_values, own, atol=1e-6)


def groups_of(scored, scores, anchor, recipe):
    """(relative value, reward) of the variants that are compared, of each sequence that holds a preference."""
    own, theirs = (slow_objective.rows(scored, policy, None, recipe) for policy in (scores, anchor))
    groups = [
        [(row.value(v) - other.value(v), -row.losses[v]) for v in row.compared]
        for row, other in zip(own, theirs, strict=True)
    ]
    return [group for group in groups if len({reward for _, reward in group}) > 1]


@pytest.mark.parametrize(("local_edits", "keep"), [(0, None), (2, None), (0, 2)])
def test_terms_over_groups_are_the_mean_over_the_sequences_that_hold_a_preference(local_edits, keep):
    scored, scores, anchor = case()
    recipe, inputs = inputs_of(scored, scores, anchor, local_edits=local_edits, keep=keep)
    groups = groups_of(scored, scores, anchor, recipe)
    assert len(groups) == 2
    found = jit(lambda inputs: {name: TERMS[name](inputs) for name in OVER_GROUPS})(inputs)
    for name, hyper in OVER_GROUPS.items():
        expected = np.mean([getattr(reference, name)(group, **hyper) for group in groups])
        assert float(found[name]) == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_the_variants_of_a_batch_are_one_group_relative_to_their_sequence():
    scored, scores, anchor = case()
    recipe, inputs = inputs_of(scored, scores, anchor)
    groups = groups_of(scored, scores, anchor, recipe)
    together = [tuple(one - np.mean(group, axis=0)) for group in groups for one in group]
    names = [name for name in OVER_GROUPS if name != "a_star_po"]
    found = jit(lambda inputs: {name: TERMS[name](inputs) for name in names})(as_batch(inputs))
    for name in names:
        expected = getattr(reference, name)(together, **OVER_GROUPS[name])
        assert float(found[name]) == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_rankings_are_drawn_from_the_key():
    scored, scores, _ = random_case(4)
    # Two sequences of equal variants and values draw different rankings.
    scored, scores = jax.tree.map(lambda leaf: leaf.at[1].set(leaf[2]), jax.tree.map(jnp.asarray, (scored, scores)))
    term = jit(TERMS["pg_rank"])
    keys = [jax.random.key(seed) for seed in (0, 0, 1)]
    recipe, inputs = inputs_of(scored, scores, None)
    for given in (inputs, as_batch(inputs)):
        once, again, other = (float(term(replace(given, key=key))) for key in keys)
        assert once == again != other
    each = jit(functools.partial(losses.pg_rank, beta=1.3, samples=recipe.objective.rankings))
    values = jnp.asarray(
        [[row.value(v) for v in range(VARIANTS)] for row in slow_objective.rows(scored, scores, None, recipe)],
        jnp.float32,
    )
    expected = [
        float(each(values[b], -scored.nll[b], scored.distinct[b], key=key))
        for b, key in enumerate(jax.random.split(keys[0], BATCH))
    ]
    assert float(term(replace(inputs, key=keys[0]))) == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-5)
    assert expected[1] != expected[2]


# In the objective


def test_a_term_over_groups_takes_the_place_of_that_over_pairs_and_of_nothing_else():
    scored, scores, anchor = case()
    recipe, call = compiled(name="copg")
    hyper = as_arrays(replace(recipe.hyper, **HYPER))
    found, other = (choice(scored, scores, anchor, EMPTY, EMPTY, hyper).metrics for choice in (call, compiled()[1]))
    _, inputs = inputs_of(scored, scores, anchor)
    assert float(found["mc/preference_loss"]) == pytest.approx(float(jit(TERMS["copg"])(inputs)), rel=1e-5)
    for metric in set(found) - {"mc/preference_loss", "mc/lens_loss"}:
        np.testing.assert_allclose(found[metric], other[metric], rtol=1e-5, err_msg=metric)
    rest = [float(one["mc/lens_loss"] - one["mc/preference_loss"]) for one in (found, other)]
    assert rest[0] == pytest.approx(rest[1], abs=1e-4)


def test_logistic_with_the_divergence_from_a_fixed_policy_is_hypo():
    """2406.01462: the preferences' loss plus lambda KL, and nothing else."""
    recipe, call = compiled(name="logistic")
    alone = dict.fromkeys(["rank_weight", "budget_weight", "smooth_weight"], 0.0)
    hyper = replace(recipe.hyper, beta=1.3, kl_weight=0.7, temperature=0.6, **alone)
    scored, scores, anchor = random_case(5)
    output = call(scored, scores, anchor, EMPTY, EMPTY, as_arrays(hyper))
    expected = np.mean([reference.logistic(group, beta=1.3) for group in groups_of(scored, scores, anchor, recipe)])
    rows = slow_objective.rows(scored, scores, anchor, recipe)
    divergence = np.mean([row.kl(v, 0.6) for row in rows for v in row.distinct])
    assert divergence > 0.01
    assert float(output.loss) == pytest.approx(expected + 0.7 * divergence, rel=1e-4)


# Anyone's


def squared_values(inputs):
    """A term of no use but that its gradient is easily had: the policy is to value no variant."""
    return jnp.mean(inputs.values**2)


def test_a_step_with_anyones_term_and_optimizer_goes_down_the_gradient_of_the_term():
    alone = dict.fromkeys(["rank_weight", "budget_weight", "smooth_weight"], 0.0)
    tx, rate = optax.sgd(0.5), 0.5
    static = {"recipe": LENS.recipe, "models": LENS.models}
    fresh, frozen = init_train_state(jax.random.key(0), tx=tx, **static)
    state = replace(fresh, hyper=replace(fresh.hyper, **{name: jnp.zeros(()) for name in alone}))
    step = jit(functools.partial(preference.train_step, tx=tx, term=squared_values, **static))
    after, report = step(state, batch(), frozen)
    scored, _, _ = LENS.observe(state, batch())

    @jit
    @jax.value_and_grad
    def loss(lens):
        scores = policy_scores(LENS.models.lens, lens, scored.entries)
        values = jax.vmap(functools.partial(agreement.variant_values, geometry=GEOMETRY))(scores, scored.contexts)
        return jnp.mean(values**2)

    value, gradient = loss(state.params["lens"])
    assert float(report["loss"]) == float(report["mc/preference_loss"]) == pytest.approx(float(value), rel=1e-5)
    expected = jax.tree.map(lambda leaf, slope: leaf - rate * slope, state.params["lens"], gradient)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after.params["lens"], expected)
    assert any(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient))
    # The rate is the optimizer's own.
    assert "lr" not in report
