"""What a teacher in hindsight says of each node, as a loss of a policy's scores of these nodes."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.losses._variants import cleared, log_softmax, or_nan


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
