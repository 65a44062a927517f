"""Objectives over a group: N scored variants of one context, and what each turned out to be worth.

All take `(scores, rewards, where, *, hyperparameters)` and return one float32 scalar, to be minimised.

    scores   float32[N]  h_i, the policy's score of each variant (`agreement.variant_values`); where there is a
                         reference policy, the difference D_i = h_i - h_i^ref
    rewards  float32[N]  r_i, higher is better: -nll, or any other measure
    where    bool[N]     variants that count; the others may hold anything

Those of preferences are in `lensjax.losses.pairs`, those of rankings in `lensjax.losses.ranking`; here are those of
advantages, of better variants against worse ones, and of whole distributions.

The scores stand where the papers have log-probabilities. They are compared within the group, so that adding a constant
to all of them changes nothing, but in `a_star_po`, which regresses the scores themselves, in `cpl` with a bias below 1,
in `rpo` and in `grpo`. Where no pair of variants differs in reward, the objectives of preferences (`logistic`, `rpo`,
`hinge`, `ipo`, `cpl`), of better against worse ones (`disco`, `info_nce`), of rankings (`plackett_luce`, `pg_rank`) and
of advantages (`grpo`) are 0 with gradient 0. A NaN among the scores or rewards that count makes any objective NaN.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean
from lensjax.losses._variants import cleared, log_mean_exp, log_softmax, or_nan
from lensjax.losses.advantages import group_advantages
from lensjax.losses.policy import clipped_surrogate


def copg(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> Array:
    """Contrastive policy gradient: differences of scores regressed on differences of rewards, over all pairs.

        mean over i < j of 1/2 [(r_i - r_j) - beta (D_i - D_j)]^2

    which is the group's variance (unbiased) of r - beta D. Its minimum is the optimum of the KL-regularised problem
    from whatever data, without importance weights.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N], in the unit of beta.
      where: bool[N].
      beta: float32[], above 0, strength of the KL term.

    Returns:
      float32[].

    References:
      Flet-Berliac et al., Contrastive Policy Gradient, arXiv:2406.19185.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> float(lx.losses.copg(scores, rewards, every, beta=0.5))
      0.125
    """
    scores, rewards, where = cleared(scores, rewards, where)
    rest = rewards - beta * scores
    count = jnp.sum(where, dtype=jnp.float32)
    squares = jnp.sum(jnp.where(where, jnp.square(rest - masked_mean(rest, where)), 0.0))
    return squares / jnp.maximum(count - 1, 1)


def a_star_po(
    scores: ArrayLike,
    rewards: ArrayLike,
    where: ArrayLike,
    *,
    beta: ArrayLike,
    value: ArrayLike | None = None,
) -> Array:
    """Scores regressed on the advantage under the optimal policy of the KL-regularised problem.

        mean (beta D_i - (r_i - V*))^2,    V* = beta log mean exp(r / beta) over samples of the reference policy

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N], in the unit of beta.
      where: bool[N].
      beta: float32[], above 0, strength of the KL term.
      value: float32[], V*, computed beforehand; None where the reference policy drew this group, for V* of the group.

    Returns:
      float32[].

    References:
      Brantley et al., A*-PO, arXiv:2505.20686 (here one beta for both of its stages).

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> float(lx.losses.a_star_po(scores, rewards, every, beta=1.0, value=0.5))  # the scores are the advantages
      0.0
    """
    scores, rewards, where = cleared(scores, rewards, where)
    value = beta * log_mean_exp(rewards / beta, where) if value is None else value
    return masked_mean(jnp.square(beta * scores - (rewards - value)), where)


def info_nca(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, alpha: ArrayLike, beta: ArrayLike) -> Array:
    """Cross-entropy between what the rewards and what the scores say of the whole group.

        -sum_i softmax(r / alpha)_i log softmax(beta D)_i

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      alpha: float32[], above 0, temperature of the rewards, in their unit.
      beta: float32[], above 0.

    Returns:
      float32[].

    References:
      Chen et al., Noise Contrastive Alignment, arXiv:2402.05369.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.info_nca(scores, rewards, every, alpha=1.0, beta=1.0):.3f}")
      0.582
    """
    scores, rewards, where = cleared(scores, rewards, where)
    wanted = jnp.exp(log_softmax(rewards / jnp.asarray(alpha), where))
    return -jnp.sum(jnp.where(where, wanted * log_softmax(jnp.asarray(beta) * scores, where), 0.0))


def grpo(
    scores: ArrayLike,
    rewards: ArrayLike,
    where: ArrayLike,
    *,
    beta: ArrayLike,
    clip: ArrayLike,
    baseline: Literal["standardised", "mean", "leave_one_out"],
) -> Array:
    """Clipped surrogate of a ratio to the reference policy, with the group as baseline (GRPO, Dr.GRPO, RLOO).

        -mean_i min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i),    rho_i = exp(beta D_i)

    Here the reference policy is also the one that is taken to have drawn the group, and the KL term of the paper is
    that of the whole objective.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0: nats of log-probability that a unit of score stands for.
      clip: float32[], epsilon in (0, 1).
      baseline: A_i of `advantages.group_advantages`: GRPO, Dr.GRPO and RLOO, in this order.

    Returns:
      float32[].

    References:
      Shao et al., GRPO, arXiv:2402.03300; Liu et al., Dr.GRPO, arXiv:2503.20783; Ahmadian et al., RLOO,
      arXiv:2402.14740.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.grpo(scores, rewards, every, beta=1.0, clip=0.2, baseline='mean'):.3f}")
      -0.100
    """
    scores, rewards, where = cleared(scores, rewards, where)
    advantages = group_advantages(rewards, where, baseline=baseline)
    old = jnp.zeros_like(scores)
    return clipped_surrogate(jnp.asarray(beta) * scores, advantages, where, old_log_probs=old, clip=clip)


def disco(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, tau: ArrayLike) -> Array:
    """Discriminative objective: better variants above the hardest of the worse ones.

        -mean_i [D_i - tau log mean_j exp(D_j / tau)],    i nearer in reward to the best, j to the worst

    The paper's constraint on the KL divergence is `losses.policy_kl` beside it.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N]; the paper's are 0 or 1.
      where: bool[N].
      tau: float32[], above 0; small looks at the hardest of the worse alone.

    Returns:
      float32[]; 0 unless both kinds are there.

    References:
      Li et al., DisCO, arXiv:2505.12366.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> float(lx.losses.disco(scores, rewards, every, tau=0.5))
      -1.0
    """
    scores, rewards, where = cleared(scores, rewards, where)
    positive, negative = _better_and_worse(rewards, where)
    loss = tau * log_mean_exp(scores / tau, negative) - masked_mean(scores, positive)
    return or_nan(jnp.where(jnp.any(positive), loss, 0.0), scores, rewards)


def info_nce(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, tau: ArrayLike) -> Array:
    """Each better variant against the whole group (InfoNCE with several positives).

        -mean_i log(exp(D_i / tau) / sum_a exp(D_a / tau)),    i nearer in reward to the best than to the worst

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      tau: float32[], above 0; small looks at the hardest negatives alone (Wang and Liu, arXiv:2012.09740).

    Returns:
      float32[]; 0 where all are worth the same.

    References:
      Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362, Eq. 2.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.info_nce(scores, rewards, every, tau=0.5):.3f}")
      0.127
    """
    scores, rewards, where = cleared(scores, rewards, where)
    positive, _ = _better_and_worse(rewards, where)
    return or_nan(masked_mean(-log_softmax(scores / tau, where), positive), scores, rewards)


def _better_and_worse(rewards: Array, where: Array) -> tuple[Array, Array]:
    """Which variants are worth more than the middle between the best and the worst, and which are not.

    Neither kind is empty unless all are worth the same: then all are of the second one.
    """
    best = jnp.max(jnp.where(where, rewards, -jnp.inf))
    worst = jnp.min(jnp.where(where, rewards, jnp.inf))
    positive = where & (rewards > worst + 0.5 * (best - worst))
    return positive, where & ~positive
