"""Objectives over the preferences of a group: all pairs of variants, the better one against the worse.

Arguments and results are those of `lensjax.losses.groups`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean
from lensjax.losses._softened import softened
from lensjax.losses._variants import cleared, or_nan


def logistic(
    scores: ArrayLike,
    rewards: ArrayLike,
    where: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike | None = None,
    gap_margin: ArrayLike | None = None,
    gap_range: tuple[ArrayLike, ArrayLike] | None = None,
) -> Array:
    """Logistic loss of the difference, over all pairs with a better variant i.

        mean over r_i > r_j of softplus(-y),    y = beta (D_i - D_j) - gap_margin (r_i - r_j)

    With `label_smoothing` epsilon each is (1 - epsilon) softplus(-y) + epsilon softplus(y), so that no preference is
    pushed to infinity.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0; large is sharp.
      label_smoothing: float32[] in [0, 1/2), the probability that a preference is the wrong way round; None for 0.
      gap_margin: float32[], at least 0, in 1 / nat: how far beyond 0 a difference of rewards asks for; None for 0.
      gap_range: float32[] each: a pair counts where its difference of rewards is at least the first and below the
        second (`stages.gap_range`); None for all.

    Returns:
      float32[].

    References:
      Rafailov et al., Direct Preference Optimization, arXiv:2305.18290, Eq. 7; Mitchell (2023), conservative DPO, and
      Amini et al., DPO with an Offset, arXiv:2402.10571, whose margin may have any scaling and is linear here.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.logistic(scores, rewards, every, beta=1.0):.3f}")
      0.313
      >>> print(f"{lx.losses.logistic(scores, rewards, every, beta=1.0, label_smoothing=0.1, gap_margin=1.0):.3f}")
      0.693
    """
    softening = {"label_smoothing": label_smoothing, "gap_margin": gap_margin}
    _, kept, _ = cleared(scores, rewards, where)
    gap = kept[:, None] - kept[None, :]

    def loss(better: Array, worse: Array) -> Array:
        return softened(beta * (better - worse), gap, **softening)

    among = None if gap_range is None else (gap >= gap_range[0]) & (gap < gap_range[1])
    return _over_preferences(loss, scores, rewards, where, among=among)


def rpo(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike, weight: ArrayLike) -> Array:
    """Logistic loss of the difference that also pulls the better variant up, over all pairs with a better variant i.

        mean over r_i > r_j of softplus(-beta (D_i - D_j)) - weight D_i

    A difference alone can grow while the policy leaves both variants.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0; large is sharp.
      weight: float32[], eta, at least 0.

    Returns:
      float32[].

    References:
      Liu et al., Provably Mitigating Overoptimization in RLHF (RPO), arXiv:2405.16436.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.rpo(scores, rewards, every, beta=1.0, weight=0.1):.3f}")
      0.263
    """
    return _over_preferences(
        lambda better, worse: jax.nn.softplus(beta * (worse - better)) - weight * better, scores, rewards, where
    )


def hinge(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> Array:
    """Hinge loss of the difference, over all pairs with a better variant i.

        mean over r_i > r_j of max(0, 1 - beta (D_i - D_j))

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0; 1 / beta is the margin.

    Returns:
      float32[].

    References:
      Zhao et al., SLiC-HF, arXiv:2305.10425, with the margin at 1 and beta as the scale.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> float(lx.losses.hinge(scores, rewards, every, beta=0.5))
      0.5
    """
    return _over_preferences(lambda better, worse: jax.nn.relu(1 - beta * (better - worse)), scores, rewards, where)


def ipo(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> Array:
    """Squared distance of the difference from a margin, over all pairs with a better variant i.

        mean over r_i > r_j of (D_i - D_j - 1 / (2 beta))^2

    Unlike a logistic loss it does not push a preference that is never contradicted to infinity.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0.

    Returns:
      float32[].

    References:
      Azar et al., A General Theoretical Paradigm, arXiv:2310.12036, Eq. 17.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> float(lx.losses.ipo(scores, rewards, every, beta=1.0))
      0.25
    """
    margin = 0.5 / jnp.asarray(beta)
    return _over_preferences(lambda better, worse: jnp.square(better - worse - margin), scores, rewards, where)


def cpl(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, alpha: ArrayLike, bias: ArrayLike) -> Array:
    """Contrastive preference learning, over all pairs with a better variant i.

        mean over r_i > r_j of -log(exp(alpha D_i) / (exp(alpha D_i) + exp(bias alpha D_j)))

    Args:
      scores: float32[N]; the paper has no reference policy, whose scores are then 0.
      rewards: float32[N].
      where: bool[N].
      alpha: float32[], above 0, temperature of the regret.
      bias: float32[], lambda in (0, 1]: below 1 it weighs the worse variant less, which is conservative.

    Returns:
      float32[].

    References:
      Hejna et al., Contrastive Preference Learning, arXiv:2310.13639 (the conservative form).

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, rewards, every = jnp.array([0.5, -0.5]), jnp.array([1.0, 0.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.cpl(scores, rewards, every, alpha=1.0, bias=0.5):.3f}")
      0.387
    """
    return _over_preferences(
        lambda better, worse: jax.nn.softplus(alpha * (bias * worse - better)), scores, rewards, where
    )


def _over_preferences(
    loss: Callable[[Array, Array], Array],
    scores: ArrayLike,
    rewards: ArrayLike,
    where: ArrayLike,
    *,
    among: Array | None = None,
) -> Array:
    """Mean of `loss(better score, worse score)` over the pairs of different rewards, `among` some bool[N, N] or all."""
    scores, rewards, where = cleared(scores, rewards, where)
    won = where[:, None] & where[None, :] & (rewards[:, None] > rewards[None, :])
    won = won if among is None else won & among
    return or_nan(masked_mean(loss(scores[:, None], scores[None, :]), won), scores, rewards)
