import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lensjax import losses
from lensjax.losses.advantages import group_advantages

WHERE = jnp.asarray([True, True, True, False])


def test_the_policy_gradient_by_hand():
    log_probs, advantages = jnp.asarray([-1.0, -2.0, -3.0, 9.0]), jnp.asarray([1.0, -1.0, 2.0, 9.0])
    value, gradient = jax.value_and_grad(losses.policy_gradient)(log_probs, advantages, WHERE)
    assert value == pytest.approx(-(-1 + 2 - 6) / 3)
    np.testing.assert_allclose(gradient, [-1 / 3, 1 / 3, -2 / 3, 0], rtol=1e-6)


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """Over all actions, each weighed by its probability: grad sum_a pi(a) r(a)."""
    logits, rewards = jnp.asarray([0.2, -0.4, 1.0]), jnp.asarray([1.0, 3.0, -2.0])
    expected = jax.grad(lambda x: -jnp.sum(jax.nn.softmax(x) * rewards))(logits)
    weights = 3 * jax.nn.softmax(logits)
    for baseline in (0.0, 5.0):
        found = jax.grad(
            lambda x, b=baseline: losses.policy_gradient(
                jax.nn.log_softmax(x), weights * (rewards - b), jnp.ones(3, bool)
            )
        )(logits)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # gained enough
        (1.5, -2.0, 3.0, 3.0),  # went the wrong way: no band
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, expected, slope):
    def loss(log_prob):
        return losses.clipped_surrogate(
            log_prob[None], jnp.asarray([advantage]), jnp.ones(1, bool), old_log_probs=jnp.asarray([-1.0]), clip=0.2
        )

    value, gradient = jax.value_and_grad(loss)(jnp.log(ratio) - 1)
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradient == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_where_the_policy_acted_itself_the_surrogate_has_the_gradient_of_reinforce():
    random = np.random.default_rng(0)
    log_probs, rewards = random.normal(size=4).astype("f"), random.normal(size=4).astype("f")
    advantages = group_advantages(rewards, WHERE, baseline="standardised")
    clipped = jax.grad(losses.clipped_surrogate)(log_probs, advantages, WHERE, old_log_probs=log_probs, clip=0.2)
    plain = jax.grad(losses.policy_gradient)(log_probs, advantages, WHERE)
    np.testing.assert_allclose(clipped, plain, rtol=1e-6)


def test_the_value_loss_by_hand():
    value, gradient = jax.value_and_grad(losses.value_loss)(
        jnp.asarray([1.0, 2.0, 0.0, 7.0]), jnp.asarray([3.0, 2.0, 1.0, 0.0]), WHERE
    )
    assert value == pytest.approx((4 + 0 + 1) / 6)
    np.testing.assert_allclose(gradient, [-2 / 3, 0, -1 / 3, 0], rtol=1e-6)


def test_gradients_are_those_of_the_values():
    random = np.random.default_rng(1)
    first, second, old = (jnp.asarray(random.normal(size=4).astype("f")) for _ in range(3))
    for loss in (losses.policy_gradient, losses.value_loss):
        check_grads(lambda x, loss=loss: loss(x, second, WHERE), (first,), order=1, rtol=1e-2, atol=1e-3)
    check_grads(
        lambda x: losses.clipped_surrogate(x, second, WHERE, old_log_probs=old, clip=0.5),
        (first,),
        order=1,
        rtol=1e-2,
        atol=1e-3,
    )


def test_advantages_and_returns_get_no_gradient():
    log_probs, advantages = jnp.asarray([-1.0, -2.0, -3.0, 9.0]), jnp.asarray([1.0, -1.0, 2.0, 9.0])
    for loss in (losses.policy_gradient, losses.value_loss):
        assert not jax.grad(loss, argnums=1)(log_probs, advantages, WHERE).any()
