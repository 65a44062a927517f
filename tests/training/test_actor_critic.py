import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.training.steps import actor_critic
from lensjax.training.steps.online import OnlineConfig
from tests.small import jit

SETTINGS = {"value_weight": 0.5, "entropy_weight": 0.2, "entropy_decay": 0.5, "entropy_floor": 0.1, "kl_weight": 0.25}
PARTS = {
    "log_probs": [-1.0, -2.0, -9.0],
    "entropies": [0.5, 1.0, 9.0],
    "divergences": [0.0, 0.4, 9.0],
    "values": [1.0, 0.0, 9.0],
    "advantages": [3.0, 1.0, 9.0],
    "returns": [2.0, 4.0, -9.0],
}


def test_advantages_of_an_episode_end_with_its_last_step():
    found = jit(actor_critic.episode_advantages)(
        jnp.asarray([0.0, 1.0]), jnp.asarray([0.5, 0.25]), discount=0.5, trace_decay=0.5
    )
    assert found.tolist() == pytest.approx([0.5 * 0.25 - 0.5 + 0.25 * 0.75, 1 - 0.25])


@pytest.mark.parametrize(("whiten", "policy_loss"), [(False, (3 + 2) / 2), (True, (1 - 2) / 2)])
def test_the_loss_by_hand(whiten, policy_loss):
    """The third action does not count. Whitened, the advantages of the others are 1 and -1."""
    parts = {name: jnp.asarray(values) for name, values in PARTS.items()}
    settings = OnlineConfig(whiten=whiten, **SETTINGS)
    total, report = actor_critic.loss(
        jnp.asarray(3, jnp.int32), **parts, where=jnp.asarray([True, True, False]), settings=settings
    )
    value_loss = 0.5 * (1 + 16) / 2
    # The weight of the entropy has come down to its floor.
    assert float(total) == pytest.approx(policy_loss + 0.5 * value_loss - 0.1 * 0.75 + 0.25 * 0.2, rel=1e-5)
    expected = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": 0.75, "entropy_coefficient": 0.1}
    expected |= {"advantages": 2.0, "kl_divergence": 0.2, "total_loss": float(total)}
    np.testing.assert_allclose([float(report[f"rl/{name}"]) for name in expected], list(expected.values()), rtol=1e-5)


def test_advantages_above_0_are_amplified_once_they_are_whitened():
    """Whitened they are 1 and -1, of which the first counts three times."""
    parts = {name: jnp.asarray(values) for name, values in PARTS.items()}
    settings = OnlineConfig(whiten=True, **SETTINGS)
    where = jnp.asarray([True, True, False])
    _, report = actor_critic.loss(jnp.zeros((), jnp.int32), **parts, where=where, settings=settings, amplification=3.0)
    assert float(report["rl/policy_loss"]) == pytest.approx((3 * 1 - 2) / 2, rel=1e-5)
