"""One step down a gradient, on losses that are worked out by hand."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lensjax.training.optim.optimizer import OptimizerConfig, make_optimizer
from lensjax.training.steps.update import Learner, all_parts, gradient_step, init_learner, split_parts

KEY = jax.random.key(0)
PARAMS = {"one": {"w": jnp.asarray([3.0, 4.0])}, "other": {"w": jnp.asarray([0.3, 0.4])}}


def half_square(params):
    """Its gradient is the parameters themselves."""
    total = sum(0.5 * jnp.sum(part["w"] ** 2) for part in params.values())
    return total, {"norm": jnp.linalg.norm(params["one"]["w"])}


def step(learner, tx, *, loss_fn=half_square, **rates):
    return gradient_step(learner, loss_fn, tx=tx, rates=rates)


def weights(learner):
    return {name: part["w"].tolist() for name, part in learner.params.items()}


def test_a_learner_starts_at_step_0_with_a_state_of_what_moves():
    learner = init_learner(KEY, PARAMS, tx=optax.adam(0.1))
    assert int(learner.step) == 0 and learner.params is PARAMS and learner.key is KEY
    assert list(learner.opt_state[0].mu) == ["one", "other"]


def test_a_step_of_gradient_descent_by_hand():
    """Nothing of `optax.sgd` can be set from outside: its rate is its own."""
    tx = optax.sgd(0.5)
    learner = init_learner(KEY, PARAMS, tx=tx)
    after, seen = step(learner, tx, learning_rate=9.0)
    assert weights(after) == {"one": [1.5, 2.0], "other": pytest.approx([0.15, 0.2])}
    assert int(after.step) == 1 and after.key is KEY
    assert float(seen.loss) == pytest.approx(0.5 * (25 + 0.25)) and float(seen.aux["norm"]) == 5
    assert {name: part["w"].tolist() for name, part in seen.grads.items()} == {
        "one": [3.0, 4.0],
        "other": pytest.approx([0.3, 0.4]),
    }


@pytest.mark.parametrize(
    "tx",
    [optax.adam(0.1), optax.chain(optax.clip(0.1), optax.sgd(1.0, momentum=0.9)), optax.rmsprop(0.01)],
    ids=["adam", "chain", "rmsprop"],
)
def test_any_optimizer_takes_its_own_steps(tx):
    learner, parts = init_learner(KEY, PARAMS, tx=tx), PARAMS
    state = tx.init(parts)
    for _ in range(2):
        learner, _ = step(learner, tx)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(parts, state, parts)  # the gradient is the parameters
            parts = optax.apply_updates(parts, updates)
    jax.tree.map(np.testing.assert_array_equal, learner.params, parts)
    jax.tree.map(np.testing.assert_array_equal, learner.opt_state, state)


def test_what_is_frozen_gets_no_gradient_and_no_state():
    tx = optax.adam(1.0)
    trained, frozen = split_parts(PARAMS, ["other"])
    assert frozen["one"] is PARAMS["one"]
    own, given = trained["other"]["w"], PARAMS["other"]["w"]
    assert own.unsafe_buffer_pointer() != given.unsafe_buffer_pointer(), "a donated state takes its buffers with it"
    learner = init_learner(KEY, trained, tx=tx)
    after, seen = step(learner, tx, loss_fn=lambda parts: half_square({**frozen, **parts}))
    assert list(after.params) == list(seen.grads) == list(after.opt_state[0].mu) == ["other"]
    assert float(seen.loss) == pytest.approx(0.5 * (25 + 0.25))


def test_all_parts_are_those_of_the_state_and_the_frozen_ones():
    learner = init_learner(KEY, {"lens": {}}, tx=optax.sgd(1.0))
    assert all_parts(learner, {"base": {}, "gist": {}}).keys() == {"base", "gist", "lens"}
    with pytest.raises(ValueError, match="frozen must hold base, gist, which the state does not train"):
        all_parts(learner, {})
    with pytest.raises(ValueError, match="frozen must not hold lens, which the state trains: leave it out there"):
        all_parts(learner, {"base": {}, "gist": {}, "lens": {}})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counting(Learner):
    seen: jax.Array


def test_what_a_state_adds_stays_as_it_is():
    tx = optax.sgd(0.5)
    state = Counting(**vars(init_learner(KEY, PARAMS, tx=tx)), seen=jnp.asarray(7))
    after, _ = step(state, tx)
    assert isinstance(after, Counting) and after.seen is state.seen


# The optimizer of a configuration


def test_each_part_is_clipped_by_its_own_norm():
    # A first step of Adam is g / (|g| + 1e-8), which tells the norm where it is not far above that.
    tx = make_optimizer(OptimizerConfig(clip_norm=1e-7))
    after, _ = step(init_learner(KEY, PARAMS, tx=tx), tx, learning_rate=1.0, weight_decay=0.0)
    # Both gradients have the direction (0.6, 0.8), and with one norm for all the smaller would all but vanish.
    expected = np.asarray([6e-8, 8e-8]) / (np.asarray([6e-8, 8e-8]) + 1e-8)
    np.testing.assert_allclose(after.params["one"]["w"], [3, 4] - expected, rtol=1e-5)
    np.testing.assert_allclose(after.params["other"]["w"], [0.3, 0.4] - expected, rtol=1e-5)


def test_many_rates_in_one_program_are_as_many_runs():
    tx = make_optimizer(OptimizerConfig())
    fresh, rates = init_learner(KEY, PARAMS, tx=tx), jnp.asarray([0.01, 0.1, 1.0])

    def run(learner, rate):
        for _ in range(3):
            learner, _ = step(learner, tx, learning_rate=rate, weight_decay=0.1 * rate)
        return learner

    together = jax.jit(jax.vmap(run, (None, 0)))(fresh, rates)
    assert together.opt_state.hyperparams["learning_rate"].tolist() == rates.tolist()
    for index, rate in enumerate(rates):
        alone = jax.jit(functools.partial(run, rate=rate))(fresh)
        one = jax.tree.map(lambda leaf, i=index: leaf[i], together.params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), one, alone.params)
