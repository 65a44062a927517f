"""How much of a group's outcome one action is credited with, beside what the others of the group did.

Constants to the losses that use them, as the advantages are: no gradient passes through any of these.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean
from lensjax.losses._variants import log_softmax
from lensjax.losses.advantages import importance_weights


def contrastive_reward(rewards: ArrayLike, does: ArrayLike, where: ArrayLike, *, threshold: ArrayLike) -> Array:
    """Whether an action was worth doing in its group: group contrastive masking (GCPO).

        +1 where mean r of those that do it - mean r of those that do not > threshold,  -1 where < -threshold,  else 0

    Args:
      rewards: float32[N], of the samples of the group.
      does: bool[N], samples that do it.
      where: bool[N], samples that count: that do it or do not.
      threshold: float32[], at least 0, in the unit of the rewards: a smaller difference says nothing.

    Returns:
      float32[]; 0 unless both kinds are there, NaN where a reward that counts is NaN.

    References:
      Wang et al., GeometryZero, arXiv:2506.07160: there the action is an auxiliary construction, and the rewards are
      answers that are right or wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.losses import credit
      >>> rewards, does, every = jnp.array([1.0, 0.5, 0.0]), jnp.array([True, False, False]), jnp.ones(3, bool)
      >>> [float(credit.contrastive_reward(rewards, does, every, threshold=bound)) for bound in (0.5, 1.0)]
      [1.0, 0.0]
    """
    rewards, does, where = jax.lax.stop_gradient(jnp.asarray(rewards)), jnp.asarray(does), jnp.asarray(where)
    with_it, without = where & does, where & ~does
    gap = masked_mean(rewards, with_it) - masked_mean(rewards, without)
    gap = jnp.where(jnp.any(with_it) & jnp.any(without), gap, 0.0 * masked_mean(rewards, where))
    # Unlike a comparison, the sign of a NaN is a NaN.
    return jnp.sign(jnp.where(jnp.abs(gap) <= jnp.asarray(threshold), 0.0, gap))


def conflict_advantages(advantages: ArrayLike, conflict: ArrayLike) -> Array:
    """Advantages in which actions that good and bad samples share are never discouraged (GTPO).

        A_i of an action without conflict;  of one in conflict 0 where A_i < 0, and 2 A_i where A_i > 0

    Args:
      advantages: float32[...], of the samples, at each of their actions.
      conflict: bool[...], actions that samples of both signs of advantage took.

    Returns:
      float32[...].

    References:
      Simoni et al., GTPO, arXiv:2508.03772: no negative update and an amplified positive one (abstract); that it is
      doubled is in the authors' code, which also asks that the shared tokens stand together at either end of the
      completions, and subtracts a share of the entropy from the advantage: both are left out.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.losses import credit
      >>> advantages, conflict = jnp.array([1.0, -1.0, -1.0]), jnp.array([True, True, False])
      >>> credit.conflict_advantages(advantages, conflict).tolist()
      [2.0, 0.0, -1.0]
    """
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages))
    return jnp.where(jnp.asarray(conflict), 2 * jnp.maximum(advantages, 0.0), advantages)


def group_weights(scores: ArrayLike, where: ArrayLike, *, beta: ArrayLike, most: ArrayLike) -> Array:
    """Importance weights of a group: how much rather the policy would have drawn each of them.

        rho_i = min(most, n pi_i),    pi = softmax(beta h) over the n samples that count

    The sampler is taken to draw each of the samples at hand as readily as any other.

    Args:
      scores: float32[N], h.
      where: bool[N], samples that count.
      beta: float32[], above 0: nats of log-probability that a unit of score stands for.
      most: float32[], above 0, bound on a weight.

    Returns:
      float32[N], 0 where not valid.

    References:
      Ionides, Truncated Importance Sampling (2008); HPT's unified estimator, arXiv:2509.04419, calls it the reference
      policy's denominator.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.losses import credit
      >>> scores = jnp.log(jnp.array([3.0, 1.0]))
      >>> [round(float(one), 3) for one in credit.group_weights(scores, jnp.ones(2, bool), beta=1.0, most=10.0)]
      [1.5, 0.5]
    """
    where = jnp.asarray(where)
    log_policy = log_softmax(jnp.where(where, jnp.asarray(beta) * jnp.asarray(scores), 0.0), where)
    log_sampler = -jnp.log(jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1))
    return jnp.where(where, importance_weights(log_policy, log_sampler, most=most), 0.0)


def bernoulli_entropy(logits: ArrayLike) -> Array:
    """Entropy of a choice between two: -p log p - (1 - p) log(1 - p), p = sigmoid(logit).

    Args:
      logits: float32[...], in nats.

    Returns:
      float32[...], in nats: log 2 where the logit is 0, and 0 where it is far from it.

    Example:
      >>> from lensjax.losses import credit
      >>> print(f"{credit.bernoulli_entropy(0.0):.3f}")
      0.693
    """
    logits = jax.lax.stop_gradient(jnp.asarray(logits, jnp.float32))
    p = jax.nn.sigmoid(logits)
    return -(p * jax.nn.log_sigmoid(logits) + (1 - p) * jax.nn.log_sigmoid(-logits))
