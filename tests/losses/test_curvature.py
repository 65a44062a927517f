"""How far one sample moves a policy, by hand, by matrices, and by derivatives of the policy itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.losses import curvature
from tests.reference import estimators

WIDE = {"step": 1.0, "low": -1e9, "high": 1e9, "shift": 1e9}


def test_curvature_by_hand():
    # pi = 1/2, 1/4, 1/4: of the first u = (1/2, -1/4, -1/4).
    logits, where = jnp.log(jnp.asarray([2.0, 1.0, 1.0, 7.0])), jnp.asarray([True, True, True, False])
    norms, curvatures = curvature.softmax_curvature(logits, where)
    np.testing.assert_allclose(norms, [3 / 8, 7 / 8, 7 / 8, 0], rtol=1e-6)
    # sum pi u^2 = 1/8 + 1/64 + 1/64 = 10/64, sum pi u = 1/8; of the second u = (-1/2, 3/4, -1/4): 18/64 and -1/8.
    np.testing.assert_allclose(curvatures, [9 / 64, 17 / 64, 17 / 64, 0], rtol=1e-6)
    norms, curvatures = curvature.bernoulli_curvature(jnp.log(jnp.asarray([3.0, 3.0])), jnp.asarray([True, False]))
    np.testing.assert_allclose(norms, [1 / 16, 9 / 16], rtol=1e-6)
    np.testing.assert_allclose(curvatures, [3 / 256, 27 / 256], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_curvature_is_that_of_the_score_function_and_the_fisher_matrix(seed):
    random = np.random.default_rng(seed)
    logits, where = random.normal(size=6).astype("f"), random.random(6) < 0.7
    where[0] = True
    found = curvature.softmax_curvature(np.where(where, logits, np.nan), where)
    policy = estimators.softmax(logits[where].tolist())
    expected = [estimators.curvature(policy, i) for i in range(len(policy))]
    np.testing.assert_allclose(np.stack(found, 1)[where], expected, rtol=1e-4, atol=1e-6)
    assert not np.stack(found, 1)[~where].any()


def test_a_choice_between_two_is_a_softmax_over_them():
    """With logits (z, 0) the score function has the same part twice, which doubles the square norm."""
    logits = jnp.asarray([-2.0, 0.3, 4.0])
    for action in (0, 1):
        norms, curvatures = curvature.bernoulli_curvature(logits, jnp.full(3, action == 0))
        both = jnp.stack([logits, jnp.zeros(3)], 1)
        twice = jax.vmap(curvature.softmax_curvature, (0, None))(both, jnp.ones(2, bool))
        np.testing.assert_allclose(2 * norms, twice[0][:, action], rtol=1e-5)
        np.testing.assert_allclose(4 * curvatures, twice[1][:, action], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("advantage", "step"), [(0.7, 0.5), (-1.3, 0.5), (2.0, 0.1)])
def test_the_predicted_step_is_the_second_order_expansion_of_objective_and_divergence(advantage, step):
    """m_H of A pi / pi_now and m_F of KL(pi_now || pi), by derivatives in the logits."""
    logits, chosen = jnp.asarray([0.4, -0.8, 0.1]), 1
    now = jax.nn.log_softmax(logits)

    def gained(x):
        return advantage * jnp.exp(jax.nn.log_softmax(x)[chosen] - now[chosen])

    def divergence(x):
        return jnp.sum(jnp.exp(now) * (now - jax.nn.log_softmax(x)))

    gradient = jax.grad(gained)(logits)
    moved = step * gradient
    rise = gradient @ moved + 0.5 * moved @ jax.hessian(gained)(logits) @ moved
    shift = 0.5 * moved @ jax.hessian(divergence)(logits) @ moved
    norms, curvatures = (leaf[chosen] for leaf in curvature.softmax_curvature(logits, jnp.ones(3, bool)))

    def is_trusted(**bounds):
        return bool(curvature.trusted(advantage, norms, curvatures, **(WIDE | {"step": step} | bounds)))

    margin = 1e-4 * abs(float(rise))
    assert is_trusted(low=rise - margin, high=rise + margin, shift=shift * 1.0001)
    assert not is_trusted(low=rise + margin)
    assert not is_trusted(high=rise - margin)
    assert not is_trusted(shift=shift * 0.9999)


def test_unlikely_actions_that_are_punished_hard_are_not_trusted():
    norms, curvatures = curvature.bernoulli_curvature(jnp.asarray([-3.0, 3.0]), jnp.ones(2, bool))
    bounds = WIDE | {"low": 0.0}
    assert curvature.trusted(-3.0, norms, curvatures, **bounds).tolist() == [False, True]
    assert curvature.trusted(3.0, norms, curvatures, **bounds).all()
    # The ends belong to the interval: with |u|^2 = 1/4 and u F u = 1/16 the rise is 1/4, the divergence 1/32.
    assert curvature.trusted(1.0, 0.25, 0.0625, step=1.0, low=0.25, high=0.25, shift=0.03125)
    # Nothing is risked where nothing is gained.
    assert curvature.trusted(0.0, norms, curvatures, step=1.0, low=0.0, high=1.0, shift=0.0).all()


def test_what_is_broken_stays_and_all_are_constants():
    logits = jnp.asarray([0.1, jnp.nan])
    kept = curvature.trusted(1.0, *curvature.bernoulli_curvature(logits, jnp.ones(2, bool)), **WIDE)
    assert kept.tolist() == [True, True]
    assert np.isnan(curvature.softmax_curvature(logits, jnp.ones(2, bool))[0]).all()
    for function in (curvature.softmax_curvature, curvature.bernoulli_curvature):
        gradient = jax.grad(lambda x, f=function: sum(leaf.sum() for leaf in f(x, jnp.ones(2, bool))))(jnp.ones(2))
        assert not gradient.any()
