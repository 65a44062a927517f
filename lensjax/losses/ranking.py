"""Objectives over the order of a group's variants by reward.

Arguments and results are those of `lensjax.losses.groups`.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean
from lensjax.losses._variants import NEVER, cleared, or_nan
from lensjax.losses.advantages import group_advantages
from lensjax.losses.policy import policy_gradient


def plackett_luce(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> Array:
    """Negative log-likelihood of the order by rewards, the best first (ListMLE), a variant.

        -1/n sum_i log [exp(beta D_i) / (exp(beta D_i) + sum_{r_j < r_i} exp(beta D_j))]

    Without ties it is that of Plackett and Luce, which draws each variant out of those that are left. Variants of equal
    rewards are not ordered: each of them is drawn from itself and all that are worth less, so that they do not compete,
    and a group of ties is 0. The sources leave ties open, or put them in an order, which teaches to prefer the earlier.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0.

    Returns:
      float32[].

    References:
      Xia et al., Listwise Approach to Learning to Rank (2008); for preferences, Rafailov et al., arXiv:2305.18290,
      appendix A.3.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.plackett_luce(scores, rewards, every, beta=2.0):.3f}")
      0.063
    """
    scores, rewards, where = cleared(scores, rewards, where)
    logits = jnp.asarray(beta) * scores
    is_less = where[None, :] & (rewards[None, :] < rewards[:, None])
    # With the variant itself no row is empty.
    rivals = jnp.where(is_less | jnp.eye(logits.shape[0], dtype=bool), logits[None, :], NEVER)
    losses = jax.nn.logsumexp(rivals, axis=1) - logits
    return or_nan(masked_mean(losses, where), scores, rewards)


def pg_rank(
    scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike, key: Array, samples: int
) -> Array:
    """Policy gradient of the expected utility of a ranking that the scores draw.

        -mean_s (M(sigma_s) - mean_{t != s} M(sigma_t)) log pi(sigma_s),    sigma_s ~ Plackett-Luce(beta D)

    M is the normalised discounted cumulative gain, with the rewards above the group's lowest as gains:

        M(sigma) = DCG(sigma) / DCG(order by rewards),    DCG(sigma) = sum_k (r_sigma(k) - min r) / log2(k + 1)

    The gradient is an unbiased estimate of that of -E[M]; the value says nothing.

    Args:
      scores: float32[N]; the paper has no reference policy, whose scores are then 0.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0; large draws the order by scores.
      key: PRNG key of the rankings, consumed.
      samples: static number of rankings, at least 2: each is the others' baseline.

    Returns:
      float32[].

    Raises:
      ValueError: there are fewer than two samples.

    References:
      Gao et al., Policy-Gradient Training of Language Models for Ranking (PG-RANK), arXiv:2310.04407.

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> every, key = jnp.ones(2, bool), jax.random.key(0)
      >>> loss = lambda scores: lx.losses.pg_rank(scores, jnp.array([1.0, 0.0]), every, beta=1.0, key=key, samples=64)
      >>> jnp.sign(jax.jit(jax.grad(loss))(jnp.zeros(2))).tolist()  # a step down raises the better variant
      [-1.0, 1.0]
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, since each ranking is the others' baseline, got {samples}")
    scores, rewards, where = cleared(scores, rewards, where)
    logits = jnp.asarray(beta) * scores
    gains = jnp.where(where, rewards - jnp.min(jnp.where(where, rewards, jnp.inf)), 0.0)
    discounts = 1 / jnp.log2(jnp.arange(2, gains.shape[0] + 2, dtype=jnp.float32))
    most = jnp.sum(discounts * jnp.sort(gains, descending=True))

    def ranking(key: Array) -> tuple[Array, Array]:
        # Logits with Gumbel noise come in the order that Plackett-Luce draws.
        noisy = jax.lax.stop_gradient(logits) + jax.random.gumbel(key, logits.shape)
        order = jnp.argsort(jnp.where(where, -noisy, jnp.inf))
        utility = jnp.sum(discounts * gains[order]) / jnp.where(most > 0, most, 1.0)
        return jnp.sum(_choices(logits, order, where)), utility

    log_probs, utilities = jax.vmap(ranking)(jax.random.split(key, samples))
    every = jnp.ones(samples, bool)
    return policy_gradient(log_probs, group_advantages(utilities, every, baseline="leave_one_out"), every)


def _choices(logits: Array, order: Array, where: Array) -> Array:
    """Log-probability of each choice of an order, each out of what is left: float32[N] in that order.

    What does not count must come last: it weighs nothing in the sums of the others, and its own choices are 0.
    """
    valid = where[order]
    logits = jnp.where(valid, logits[order], NEVER)
    return jnp.where(valid, logits - jax.lax.cumlogsumexp(logits, reverse=True), 0.0)
