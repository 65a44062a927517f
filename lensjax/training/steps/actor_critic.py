"""What every policy gradient with a value baseline has in common, once log-probabilities, values and rewards are there.

L = -mean A_t log pi(a_t) + value_weight * value loss - entropy_weight * H + kl_weight * KL(pi || reference)
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax import losses
from lensjax._numerics import masked_mean, masked_std
from lensjax.losses import advantages, trajectories
from lensjax.training.metrics import Metrics
from lensjax.training.optim import schedules


class Settings(Protocol):
    """What is read of a configuration, such as `OnlineConfig`."""

    @property
    def whiten(self) -> bool: ...  # noqa: D102
    @property
    def value_weight(self) -> float: ...  # noqa: D102
    @property
    def entropy_weight(self) -> float: ...  # noqa: D102
    @property
    def entropy_decay(self) -> float: ...  # noqa: D102
    @property
    def entropy_floor(self) -> float: ...  # noqa: D102
    @property
    def kl_weight(self) -> float: ...  # noqa: D102


def episode_advantages(rewards: ArrayLike, values: ArrayLike, *, discount: ArrayLike, trace_decay: ArrayLike) -> Array:
    """Generalised advantages of an episode that ends with its last step.

    Args:
      rewards: float32[S], of the steps.
      values: float32[S], expected before each step.
      discount: float32[], gamma.
      trace_decay: float32[], lambda.

    Returns:
      float32[S].
    """
    rewards, values = jnp.asarray(rewards), jnp.asarray(values)
    # Nothing is to come after the last step.
    continues = jnp.arange(rewards.shape[0]) < rewards.shape[0] - 1
    whole = jnp.concatenate([values, jnp.zeros_like(values[:1])])
    return advantages.generalised_advantages(rewards, whole, continues, discount=discount, trace_decay=trace_decay)


def loss(
    step: ArrayLike,
    *,
    log_probs: Array,
    entropies: Array,
    divergences: Array,
    values: Array,
    advantages: Array,
    returns: Array,
    where: Array,
    settings: Settings,
    amplification: float = 1.0,
) -> tuple[Array, Metrics]:
    """The loss of a batch of actions.

    Args:
      step: int32[], updates done, for the weight of the entropy.
      log_probs: float32[...], of the actions taken.
      entropies: float32[...], of the policy where they were taken.
      divergences: float32[...], of the policy from its reference there.
      values: float32[...], what was expected.
      advantages: float32[...], constants.
      returns: float32[...], constants: what the values should have been.
      where: bool[...], actions that count.
      settings: weights.
      amplification: static factor of advantages above 0, once they are whitened.

    Returns:
      float32[], and its parts by the names under which they are logged.
    """
    spread = masked_std(advantages, where) + 1e-8
    used = (advantages - masked_mean(advantages, where)) / spread if settings.whiten else advantages
    if amplification != 1:
        used = trajectories.amplified(used, factor=amplification)
    policy_loss = losses.policy_gradient(log_probs, used, where)
    value_loss = losses.value_loss(values, returns, where)
    weight = schedules.exponential(
        step, start=settings.entropy_weight, decay=settings.entropy_decay, floor=settings.entropy_floor
    )
    entropy, divergence = masked_mean(entropies, where), masked_mean(divergences, where)
    total = policy_loss + settings.value_weight * value_loss - weight * entropy + settings.kl_weight * divergence
    report = {
        "rl/policy_loss": policy_loss,
        "rl/value_loss": value_loss,
        "rl/entropy": entropy,
        "rl/entropy_coefficient": weight,
        "rl/advantages": masked_mean(advantages, where),
        "rl/kl_divergence": divergence,
        "rl/total_loss": total,
    }
    return total, jax.lax.stop_gradient(report)
