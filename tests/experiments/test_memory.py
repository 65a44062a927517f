"""What a step plans to hold: its own state, what is frozen once, and no copy of it."""

import functools
import io
from contextlib import redirect_stdout

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import memory
from lensjax import _settings
from lensjax.training.steps import preference
from lensjax.training.steps.train_state import init_train_state
from tests.small import LENS, SMALL, batch

LARGE = _settings.replace(SMALL, batch_size=1, **{"base.vocab_size": 20_000, "base.dim": 64, "gist.heads": 2})


@pytest.fixture(scope="module")
def found():
    return memory.measure(LARGE)


def test_a_step_holds_the_base_model_once(found):
    models = LARGE.build_models()
    base = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(models.base.init, jax.random.key(0))))
    assert found["base"] == 4 * base > 50 * found["state"] > 0
    assert found["peak"] < 1.3 * (found["base"] + found["activations"]) and found["ratio"] < 1.3
    # Another copy would not fit.
    assert found["peak"] - found["temporaries"] < 1.1 * found["base"]
    assert found["temporaries"] < found["base"]


@pytest.mark.slow
def test_bfloat16_halves_the_matrices_and_a_trained_base_model_is_more_state(found):
    half = memory.measure(_settings.replace(LARGE, **{"checkpoint.path": "-", "checkpoint.dtype": "bfloat16"}))
    assert half["base"] == pytest.approx(found["base"] / 2, rel=0.01)
    trained = memory.measure(_settings.replace(LARGE, trainable=("base", "lens")))
    assert trained["state"] > 3 * found["base"] and trained["peak"] > 4 * found["base"]


def test_what_is_frozen_is_neither_donated_nor_copied():
    state, frozen = LENS.state(), LENS.frozen()
    places = jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), frozen)
    step = functools.partial(preference.train_step, recipe=LENS.recipe, models=LENS.models)
    plan = memory.plan(step, state, batch(), frozen, donate=0)
    rates = 2 * 4  # of the optimizer, set anew at every step
    assert (
        plan.arguments
        == memory.size((jax.random.key_data(state.key), frozen, batch()))
        + memory.size([leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)])
        - rates
    )
    for index in range(2):
        state, _ = LENS.train_step(state, batch(index), frozen)
    assert jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), frozen) == places
    given = init_train_state(jax.random.key(0), recipe=LENS.recipe, models=LENS.models, params=frozen)[1]
    assert jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), given) == places


@pytest.mark.slow
def test_the_command_line_is_that_of_training():
    words = ["recall", "--batch-size", "1", "--context.rollouts", "2", "--steps", "0", "--distill.steps", "30"]
    with redirect_stdout(io.StringIO()) as told:
        memory.main(words)
    lines = [line.split() for line in told.getvalue().splitlines()]
    assert [line[0] for line in lines] == ["base", "state", "activations", "temporaries", "peak", "ratio"]
    assert all(float(line[1]) > 0 for line in lines) and lines[0][2] == "MiB"
    with pytest.raises(SystemExit, match=r"checkpoint.path nowhere is not there"):
        memory.main(["recall", "--checkpoint.path", "nowhere"])
