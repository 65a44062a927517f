"""What a teacher says of nodes, as a loss: values by hand, a slow reference, gradients, and where nothing is said."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lensjax import losses
from tests import reference

LISTWISE = jax.jit(losses.listwise_distillation)
COLD = functools.partial(LISTWISE, temperature=0.1)
EVERY = np.ones(3, bool)


def floats(*values):
    return np.asarray(values, np.float32)


def test_listwise_by_hand():
    # Shares 3/4 and 1/4, of which the third node and its 9 are left out; the policy's are as e^2 to 1.
    where = np.asarray([True, True, False])
    expected = 0.75 * math.log(0.75 * (1 + math.e**2) / math.e**2) + 0.25 * math.log(0.25 * (1 + math.e**2))
    found = LISTWISE(floats(1.0, 0.0, 0.9), floats(3, 1, 9), where, temperature=0.5)
    assert float(found) == pytest.approx(expected, abs=1e-6)
    # One node alone is worth anything: minus the logarithm of the policy's share of it.
    found = LISTWISE(floats(0.5, 0.0, 0.9), floats(2, 0, 9), where, temperature=0.5)
    assert float(found) == pytest.approx(math.log(1 + 1 / math.e), rel=1e-5)


def test_the_listwise_gradient_is_the_policys_share_less_the_teachers():
    scores, targets = floats(0.3, -0.2, 0.1), floats(2, 6, 0)
    weights = np.exp(scores / 0.4)
    gradient = jax.grad(LISTWISE)(scores, targets, EVERY, temperature=0.4)
    np.testing.assert_allclose(gradient, (weights / weights.sum() - [0.25, 0.75, 0]) / 0.4, rtol=1e-5)


def test_listwise_is_zero_where_the_policy_says_what_the_teacher_does():
    targets = floats(0.1, 0.2, 0.05)
    value, gradient = jax.value_and_grad(COLD)(0.1 * np.log(targets), targets, EVERY)
    assert float(value) == pytest.approx(0, abs=1e-6) and np.abs(gradient).max() < 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_losses_agree_with_the_reference(seed):
    rng = np.random.default_rng(seed)
    where = rng.random(12) < 0.7
    scores = np.where(where, rng.uniform(-1, 1, 12), np.nan).astype(np.float32)
    # Some do harm, and some are worth far more than others.
    targets = np.where(where, rng.choice([-1, 1, 1], 12) * np.exp(rng.normal(scale=2, size=12)), np.inf).astype("f")
    temperature = np.float32(rng.uniform(0.1, 2))
    kept = scores[where].tolist(), targets[where].tolist()
    expected = reference.listwise_distillation(*kept, temperature=temperature)
    assert float(LISTWISE(scores, targets, where, temperature=temperature)) == pytest.approx(expected, rel=1e-4)


def test_gradients_agree_with_finite_differences():
    targets, where = floats(0.5, 0.1, 0, 2, 9), np.asarray([True] * 4 + [False])
    scores = jnp.asarray(floats(0.2, -0.1, 0.3, -0.3, 0.6))
    check_grads(lambda x: COLD(x, targets, where), (scores,), order=1, modes=["rev"], eps=1e-3, atol=5e-3, rtol=5e-3)
    assert np.asarray(jax.grad(COLD)(scores, targets, where))[:4].all()


@pytest.mark.parametrize("targets", [floats(0, 0, 0), floats(-1, 0, -3)], ids=["worthless", "harmful"])
def test_without_anything_of_worth_nothing_is_learnt(targets):
    value, gradient = jax.value_and_grad(COLD)(floats(0.5, -0.5, 0), targets, EVERY)
    assert float(value) == 0 and not np.asarray(gradient).any()


def test_the_teacher_gets_no_gradient():
    gradient = jax.grad(COLD, argnums=1)(floats(0.5, -0.5, 0), floats(1, 2, 3), EVERY)
    assert not np.asarray(gradient).any()


def test_a_step_down_brings_the_order_of_the_teacher():
    scores, targets = jnp.zeros(3), floats(0.1, 0.8, 0.3)
    for _ in range(100):
        scores = scores - 1e-3 * jax.grad(COLD)(scores, targets, EVERY)
    assert np.argsort(scores).tolist() == [0, 2, 1]
