"""What a teacher in hindsight says of each node, as losses of a policy's scores of these nodes."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean
from lensjax.losses._variants import cleared, log_softmax, or_nan

FLOOR = 1e-4
"""Of the largest target: what is below it is worth nothing, and not more and more nothing."""
_EPSILON = 1e-6


def listwise_distillation(scores: ArrayLike, targets: ArrayLike, where: ArrayLike, *, temperature: ArrayLike) -> Array:
    """Divergence of the distribution that the scores make over nodes from the teacher's.

        KL(p || softmax(scores / temperature)),    p_n = max(targets_n, 0) / sum_m max(targets_m, 0)

    Args:
      scores: float32[N], the policy's.
      targets: float32[N], the worth of each node in full, in any unit; negative counts as 0. No gradient reaches them.
      where: bool[N], nodes that count.
      temperature: float32[], above 0; small lets scores of [-1, 1] tell far apart.

    Returns:
      float32[], in nats; 0, with no gradient, where no node that counts is worth anything.

    References:
      DeepSeek-AI, DeepSeek-V3.2-Exp (2025), the dense warm-up of its indexer, where p is attention summed over heads
      and normalised, and the temperature is 1.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, targets, every = jnp.array([0.1, 0.0]), jnp.array([3.0, 1.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.listwise_distillation(scores, targets, every, temperature=0.1):.4f}")
      0.0009
    """
    scores, targets, where = cleared(scores, targets, where)
    worth = jnp.maximum(targets, 0.0)
    total = jnp.sum(worth)
    share = worth / jnp.where(total > 0, total, 1.0)
    log_policy = log_softmax(scores / jnp.asarray(temperature), where)
    # Where a share is 0 its logarithm is not read.
    log_share = jnp.log(jnp.where(share > 0, share, 1.0))
    return or_nan(jnp.sum(share * (log_share - log_policy)), scores, targets)


def pointwise_distillation(scores: ArrayLike, targets: ArrayLike, where: ArrayLike) -> Array:
    """Squared error of the scores against the logarithms of the targets, both standardised over the nodes.

        mean_n (z(s)_n - z(log t)_n)^2,    z(x) = (x - mean x) / sqrt(var x + 1e-6)

    Targets span orders of magnitude, and their logarithms tell the middling nodes apart as well as the best ones. Only
    the order of scores and their proportions are asked for, not their size.

    Args:
      scores: float32[N], the policy's.
      targets: float32[N], the worth of each node in full, in any unit, raised to `FLOOR` of the largest. No gradient
        reaches them.
      where: bool[N], nodes that count.

    Returns:
      float32[], 2 - 2 correlation up to the 1e-6; 0, with no gradient, where no node that counts is worth anything.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> targets, every = jnp.array([0.001, 0.01, 0.1]), jnp.ones(3, bool)
      >>> right, wrong = jnp.array([-0.5, 0.0, 0.5]), jnp.array([0.5, 0.0, -0.5])
      >>> print(*(f"{lx.losses.pointwise_distillation(scores, targets, every):.3f}" for scores in (right, wrong)))
      0.000 4.000
    """
    scores, targets, where = cleared(scores, targets, where)
    largest = jnp.max(targets, initial=0.0)
    is_worth = largest > 0
    logs = jnp.log(jnp.maximum(targets / jnp.where(is_worth, largest, 1.0), FLOOR))
    loss = masked_mean(jnp.square(_standardised(scores, where) - _standardised(logs, where)), where)
    return or_nan(jnp.where(is_worth, loss, 0.0), scores, targets)


def _standardised(values: Array, where: Array) -> Array:
    """Of mean 0 and variance 1; equal values stay near each other, with a gradient that parts them."""
    apart = values - masked_mean(values, where)
    return apart / jnp.sqrt(masked_mean(jnp.square(apart), where) + _EPSILON)
