"""Policy-gradient losses of sampled actions; the advantages come from `lensjax.losses.advantages`."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean

# A ratio beyond exp(20) says nothing that one of exp(20) does not, and would overflow.
_MOST_LOG_RATIO = 20.0


def policy_gradient(log_probs: ArrayLike, advantages: ArrayLike, where: ArrayLike) -> Array:
    """REINFORCE: actions that were better than expected become more probable.

        -mean_i A_i log pi(a_i)

    Args:
      log_probs: float32[N], of the actions taken.
      advantages: float32[N], constants; times importance weights where another policy took the actions.
      where: bool[N], actions that count.

    Returns:
      float32[].

    References:
      Williams, Simple Statistical Gradient-Following Algorithms (1992).

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> log_probs, advantages = jnp.array([-1.0, -2.0]), jnp.array([1.0, 0.5])
      >>> float(lx.losses.policy_gradient(log_probs, advantages, jnp.ones(2, bool)))
      1.0
    """
    where = jnp.asarray(where)
    log_probs, advantages = _cleared(log_probs, where), _cleared(jax.lax.stop_gradient(advantages), where)
    return -masked_mean(advantages * log_probs, where)


def clipped_surrogate(
    log_probs: ArrayLike, advantages: ArrayLike, where: ArrayLike, *, old_log_probs: ArrayLike, clip: ArrayLike
) -> Array:
    """The loss of PPO and GRPO: a ratio to the policy that acted, which stops paying once it left a band.

        -mean_i min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i),    rho_i = pi(a_i) / pi_old(a_i)

    Args:
      log_probs: float32[N], of the actions taken.
      advantages: float32[N], constants.
      where: bool[N], actions that count.
      old_log_probs: float32[N], constants: of the policy that took the actions.
      clip: float32[], epsilon in (0, 1).

    Returns:
      float32[].

    References:
      Schulman et al., PPO, arXiv:1707.06347, Eq. 7; Shao et al., GRPO, arXiv:2402.03300, Eq. 3.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> old, new, every = jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> float(lx.losses.clipped_surrogate(new, jnp.ones(2), every, old_log_probs=old, clip=0.25))  # -(1.25 + 1) / 2
      -1.125
    """
    where = jnp.asarray(where)
    old, advantages = (_cleared(jax.lax.stop_gradient(x), where) for x in (old_log_probs, advantages))
    log_ratio = _cleared(log_probs, where) - old
    ratio = jnp.exp(jnp.clip(log_ratio, -_MOST_LOG_RATIO, _MOST_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - jnp.asarray(clip), 1 + jnp.asarray(clip))
    return -masked_mean(jnp.minimum(ratio * advantages, clipped * advantages), where)


def value_loss(values: ArrayLike, returns: ArrayLike, where: ArrayLike) -> Array:
    """Mean squared error of a value baseline, halved: mean_i 1/2 (V_i - R_i)^2.

    Args:
      values: float32[N], what was expected.
      returns: float32[N], constants: what came (for GAE, A_i + V_i).
      where: bool[N], steps that count.

    Returns:
      float32[].

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> float(lx.losses.value_loss(jnp.array([0.0, 1.0]), jnp.array([1.0, 1.0]), jnp.ones(2, bool)))
      0.25
    """
    where = jnp.asarray(where)
    returns = _cleared(jax.lax.stop_gradient(returns), where)
    return 0.5 * masked_mean(jnp.square(_cleared(values, where) - returns), where)


def _cleared(values: ArrayLike, where: Array) -> Array:
    """0 where nothing counts: what stands there reaches neither loss nor gradient."""
    return jnp.where(where, values, 0.0)
