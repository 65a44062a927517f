"""The state before the first step, the curriculum, and what a step gives to a preference term."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.training.steps import difficulty, preference
from lensjax.training.steps.train_state import init_train_state, objective_key
from tests.small import LENS, SMALL, Run, batch, jit

STATIC = {"recipe": LENS.recipe, "models": LENS.models}


def test_given_parts_are_taken_and_the_others_are_drawn():
    key = jax.random.key(3)
    base = LENS.models.base.init(jax.random.key(7))
    drawn, others = init_train_state(key, **STATIC)
    state, frozen = init_train_state(key, **STATIC, params={"base": base})
    chex.assert_trees_all_equal(state.params, drawn.params)
    chex.assert_trees_all_equal(frozen, {**others, "base": base})
    assert frozen["base"] is base, "what is frozen is not copied"
    assert int(state.step) == 0 and state.anchor is None
    assert float(state.hyper.context_end) == LENS.recipe.hyper.context_end
    other, _ = init_train_state(jax.random.key(4), **STATIC)
    assert not np.array_equal(drawn.params["lens"]["content"]["kernel"], other.params["lens"]["content"]["kernel"])


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="params may hold base, gist, lens and trainable parts, got head, tail"):
        init_train_state(jax.random.key(0), **STATIC, params={"tail": {}, "head": {}, "base": {}})


@pytest.mark.parametrize("changes", [{}, {"context.block_size": 4}, {"optimizer.curriculum_steps": None}])
@pytest.mark.parametrize(("start", "end"), [(0.8, 0.5), (0.5, 0.8), (0.7, 0.7)])
def test_lengths_of_the_curriculum_are_reachable_and_monotone(changes, start, end):
    recipe = _settings.replace(SMALL.recipe, **changes, **{"hyper.context_start": start, "hyper.context_end": end})
    hyper = jax.tree.map(jnp.float32, recipe.hyper)
    steps, geometry = np.arange(recipe.steps, dtype=np.int32), recipe.geometry
    lengths = jax.vmap(lambda step: difficulty.current_length(step, hyper, recipe=recipe))(steps).tolist()
    assert all(geometry.length(length) == length for length in lengths)
    assert lengths[0] == geometry.length_of_fraction(start)
    # The default curriculum is half of the run, which is 6 steps here as well.
    assert set(lengths[5:]) == {geometry.length_of_fraction(end)}
    assert lengths == sorted(lengths, reverse=start > end)
    assert max(lengths) == recipe.capacity


def test_a_step_gives_its_temperature_and_a_key_that_no_sequence_has_to_the_term():
    key = jax.random.key(7)
    rows = jax.random.key_data(jax.random.split(key, 4096)).tolist()
    assert jax.random.key_data(objective_key(key)).tolist() not in rows
    run = Run(**{"hyper.temperature": 1.0, "hyper.temperature_end": 0.05})
    scored, _, _ = run.observe(run.state(), batch())
    loss = functools.partial(preference.total_loss, recipe=run.recipe, models=run.models)

    @jit
    def given(state):
        _, (_, _, report) = loss(run.params(), state, scored, term=lambda inputs: jax.random.uniform(inputs.key))
        _, (_, _, other) = loss(run.params(), state, scored, term=lambda inputs: inputs.temperature)
        return report["mc/preference_loss"], other["mc/preference_loss"]

    found = [[float(x) for x in given(run.state(step=step))] for step in (0, 3, 3, SMALL.steps - 1)]
    drawn, temperatures = zip(*found, strict=True)
    assert drawn[1] == drawn[2] and len(set(drawn)) == 3
    step_key = jax.random.fold_in(run.state().key, 3)
    assert drawn[1] == float(jax.random.uniform(objective_key(step_key)))
    assert temperatures == pytest.approx([1.0, *[1 - 0.95 * 3 / 11] * 2, 0.05])
