"""The parts of a policy gradient in their terms: each choice of them equals a slow reference, and changes something."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.training.objective import Statistics, term_inputs
from lensjax.training.optim.moving import EPS
from lensjax.training.terms.table import TERMS
from tests import slow_gradients, slow_objective
from tests.small import SMALL, Run, batch, jit
from tests.training.scored import EMPTY, GEOMETRY, KEY, as_arrays, objective, random_case, scored_cuts

HYPER = {"kl_weight": 0.2, "beta": 1.7, "temperature": 0.4, "clip": 0.1, "outcome_width": 0.4, "trust_high": 0.4}
SHARE = 0.45
BASELINES = ("standardised", "mean", "leave_one_out", "optimal", "blended", "sets")
GRPO = [
    *({"group_baseline": baseline} for baseline in BASELINES),
    {"group_baseline": "sets", "set_size": 3},
    {"group_weights": "importance"},
    {"mask": "trust"},
    {"group_baseline": "optimal", "group_weights": "importance", "mask": "trust"},
]
GTPO = [
    *GRPO,
    {"mask": "informative"},
    {"group_baseline": "mean", "group_weights": "importance", "mask": "informative"},
]
SPANS = [
    {},
    {"mask": "trust"},
    {"mask": "informative"},
    {"group_reward": "contrastive"},
    {"group_reward": "contrastive", "mask": "informative"},
]
CHOICES = [
    *({"name": "grpo"} | one for one in GRPO),
    *({"name": "gtpo"} | one for one in GTPO),
    *({"name": "span_advantages"} | one for one in SPANS),
]


def recipe_of(choice, **hyper):
    changes = {f"objective.{name}": value for name, value in choice.items()}
    changes |= {f"hyper.{name}": value for name, value in (HYPER | hyper).items()}
    return _settings.replace(SMALL.recipe, **changes, **{"objective.anchor": "fixed"})


@functools.cache
def gather():
    return jit(functools.partial(term_inputs, recipe=SMALL.recipe))


def inputs_of(case, recipe):
    hyper = as_arrays(recipe.hyper)
    statistics = Statistics(EMPTY, EMPTY, hyper.temperature, informative_share=jnp.asarray(SHARE, jnp.float32))
    return replace(gather()(KEY, *case, statistics, hyper), objective=recipe.objective)


@functools.cache
def program(name):
    """A term and its gradient in scores, values and losses; one compile for each choice of its parts."""

    def loss(scores, values, losses, inputs):
        scored = replace(inputs.scored, nll=losses)
        return TERMS[name](replace(inputs, scores=scores, values=values, scored=scored))

    return jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def evaluated(inputs, **changes):
    """Value, and gradient in scores, values and losses."""
    given = {"scores": inputs.scores, "values": inputs.values, "losses": inputs.scored.nll} | changes
    return program(inputs.objective.name)(*given.values(), inputs)


def value(inputs, **changes):
    return float(evaluated(inputs, **changes)[0])


def slow(case, recipe):
    scored, scores, anchor = case
    rows, anchors = (slow_objective.rows(scored, policy, None, recipe) for policy in (scores, anchor))
    if recipe.objective.name == "grpo":
        return slow_gradients.grpo(rows, anchors, recipe)
    if recipe.objective.name == "gtpo":
        return slow_gradients.gtpo(rows, recipe, share=SHARE)
    return slow_gradients.spans(rows, recipe, share=SHARE, scale=1 / np.sqrt(1 + EPS))


each = pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))


@each
def test_a_term_with_its_parts_is_the_slow_reference(choice):
    recipe = recipe_of(choice)
    for seed in range(4):
        case = random_case(seed)
        assert value(inputs_of(case, recipe)) == pytest.approx(slow(case, recipe), rel=1e-4, abs=1e-5)


@each
def test_every_part_changes_the_gradient_is_a_constant_of_it_and_reads_what_counts(choice):
    scored, scores, _ = case = random_case(1)
    assert not scored.distinct.all()
    inputs, default = inputs_of(case, recipe_of(choice)), inputs_of(case, recipe_of({"name": choice["name"]}))
    _, gradient = evaluated(inputs)
    _, plain = evaluated(default)
    by = 1 if choice["name"] == "grpo" else 0
    assert np.isfinite(gradient[by]).all() and np.abs(gradient[by]).max() > 0
    assert inputs.objective == default.objective or not np.allclose(gradient[by], plain[by], atol=1e-6)
    assert not np.asarray(gradient[1 - by]).any() and not np.asarray(gradient[2]).any()
    _, again = evaluated(
        inputs,
        scores=np.where(scored.distinct[..., None] & scored.contexts.valid, scores, np.nan),
        values=np.where(scored.distinct, inputs.values, np.nan),
        losses=np.where(scored.distinct, scored.nll, np.nan),
    )
    np.testing.assert_array_equal(again[by], gradient[by])


@each
def test_a_nan_that_counts_is_not_hidden(choice):
    inputs = inputs_of(random_case(1), recipe_of(choice))
    broken = inputs.values.at[1, 1].set(jnp.nan)
    if choice["name"] == "grpo":
        assert np.isnan(value(inputs, values=broken))
        return
    losses = inputs.scored.nll.at[1, 1].set(jnp.nan)
    assert np.isnan(value(replace(inputs, advantages=inputs.advantages.at[1, 1].set(jnp.nan)), losses=losses))
    plain = inputs_of(random_case(1), recipe_of({"name": "span_advantages"}))
    learned = np.argwhere(evaluated(plain)[1][0])[0]
    assert np.isnan(value(inputs, scores=inputs.scores.at[tuple(learned)].set(jnp.nan)))


# By hand


@pytest.mark.parametrize("name", ["gtpo", "span_advantages"])
def test_a_step_by_hand(name):
    """Two variants, 3 nats apart, that differ in two blocks of two tokens: advantages are +1 and -1 in either term."""
    choice = {"name": name} | ({} if name == "gtpo" else {"group_reward": "contrastive"})
    recipe = recipe_of(choice, temperature=0.5)
    recent = [(token, 0) for token in range(4, GEOMETRY.history)]
    one, other = [(0, 1), (2, 0), (3, 0), *recent], [(0, 0), (1, 0), (2, 1), *recent]
    scored = scored_cuts(
        [one, other, one, one], [True, True, False, False], [1.0, 4.0, np.nan, np.nan], capacity=GEOMETRY.history
    )
    scores = np.zeros((1, 4, GEOMETRY.history), np.float32)
    scores[0, 0, :3], scores[0, 1, :3] = [-0.5, 0.25, 0.75], [1.0, -1.0, 0.5]
    case = (jax.tree.map(lambda leaf: leaf[None], scored), scores, scores)
    found, (gradient, _, _) = evaluated(inputs_of(case, recipe))
    # Tokens covered, and what the better variant does there: its own entries, then those of the worse one.
    spans, taken = np.asarray([2, 1, 1, 1, 1, 2]), np.asarray([-1, 1, 1, 1, 1, -1])
    gained, policy = np.asarray([1, 1, 1, -1, -1, -1]), scores[0, :2, :3].ravel()
    if name == "gtpo":
        likelihood = -np.log1p(np.exp(-taken * policy / 0.5))
        slope = taken / 0.5 / (1 + np.exp(taken * policy / 0.5))
    else:
        likelihood, slope = taken * policy, taken
    assert float(found) == pytest.approx(-(spans * gained * likelihood).sum() / 8, rel=1e-5)
    np.testing.assert_allclose(gradient[0, :2, :3].ravel(), -spans * gained * slope / 8, rtol=1e-5)
    assert not np.asarray(gradient[0, :2, 3:]).any() and not np.asarray(gradient[0, 2:]).any()


def test_the_entropy_limit_of_gtpo_leaves_undecided_variants_out():
    case = random_case(2)
    found = [
        value(inputs_of(case, recipe_of({"name": "gtpo"}, entropy_limit=limit))) for limit in (1e-6, 0.5, 0.7, 10.0)
    ]
    # log 2 is the most that there is.
    assert found[0] == 0 and found[2] == found[3] and len(set(found)) == 3
    recipe = recipe_of({"name": "gtpo"}, entropy_limit=0.5)
    assert found[1] == pytest.approx(slow(case, recipe), rel=1e-4)


def test_ties_count_in_a_blended_baseline_alone():
    scored, scores, anchor = random_case(2)
    tied = replace(scored, nll=np.broadcast_to(np.asarray([[1.0], [2.0], [4.0]], np.float32), scored.nll.shape))
    for baseline in BASELINES:
        inputs = inputs_of((tied, scores, anchor), recipe_of({"name": "grpo", "group_baseline": baseline}))
        assert (abs(value(inputs)) > 1e-3) == (baseline == "blended"), baseline


# In the objective and in a step


def test_no_choice_of_numbers_compiles_anew():
    for choice in CHOICES[-1], {"name": "gtpo", "mask": "trust"}, {"name": "grpo", "group_baseline": "blended"}:
        evaluated(inputs_of(random_case(0), recipe_of(choice)))
        before = program(choice["name"])._cache_size()
        other = {"trust_high": 0.2, "entropy_limit": 0.6, "outcome_width": 0.2, "contrast_threshold": 0.3}
        evaluated(inputs_of(random_case(1), recipe_of(choice, **other)))
        assert program(choice["name"])._cache_size() == before


def test_without_the_flags_their_numbers_are_not_read():
    unused = {
        name: 0.123
        for name in vars(SMALL.hyper)
        if name.split("_")[0] in ("outcome", "blend", "contrast", "entropy", "trust", "informative")
    }
    assert len(unused) == 11
    for name in ("spans", "grpo", "span_advantages"):
        recipe, call = objective(name=name)
        trace = jax.make_jaxpr(lambda hyper, call=call: call(*random_case(0), EMPTY, EMPTY, hyper).loss)
        jaxpr = trace(as_arrays(recipe.hyper)).jaxpr
        names = list(vars(recipe.hyper))
        used = {str(one) for equation in jaxpr.eqns for one in equation.invars}
        assert not [names[i] for i, one in enumerate(jaxpr.invars) if names[i] in unused and str(one) in used]


@pytest.mark.slow
def test_a_step_with_all_parts_compiles_once_and_its_mask_grows_with_the_run():
    run = Run(
        **{
            "objective.name": "gtpo",
            "objective.group_baseline": "sets",
            "objective.group_weights": "importance",
            "objective.mask": "informative",
            "hyper.informative_start": 0.1,
        }
    )
    losses = []
    for step in (0, run.config.steps - 1, run.config.steps - 1):
        share = 1.0 if len(losses) == 2 else 0.1
        state = run.state(step=step, informative_end=share)
        _, report = run.train_step(state, batch(), run.frozen())
        losses.append(float(report["mc/preference_loss"]))
    assert run.train_step._cache_size() == 1
    assert np.isfinite(losses).all() and losses[1] != losses[2]
