"""What the loss itself says of each span, as a regulariser of preferences between whole variants."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean


def attribution_loss(
    scores: ArrayLike, attributions: ArrayLike, where: ArrayLike, *, weights: ArrayLike = 1.0
) -> Array:
    """Scores drawn to the side to which each span was seen to matter, by how much it did.

        -sum_j m_j w_j r_j s_j / sum_j m_j w_j,    r_j = sigmoid(A_j) - 1/2

    A preference says that one variant is better and leaves open which of its spans made it so. The reward r of a span
    is bounded: no span, however much it mattered, outweighs the preference.

    Args:
      scores: float32[M], the policy's, of entries.
      attributions: float32[M], A: positive where detail was worth its place, negative where it was not, in the unit of
        the advantages (`preferences.span_advantages`, times the sign of the level). No gradient reaches them.
      where: bool[M], entries m_j that have one.
      weights: float32[M] or float32[], w_j at least 0, say the tokens that each entry covers.

    Returns:
      float32[], in [-1/2, 1/2] for scores in [-1, 1].

    References:
      Zhou et al., T-REG, arXiv:2412.02685, of which the abstract is followed: self-generated rewards of tokens
      regularise the preference loss, so that it spreads the reward of a sequence over its tokens. There a language
      model rates its own tokens under contrasting prompts; here a span's rating is what the measured variants say of
      it, and that it enters by its sigmoid and linearly in the score is a choice made here.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, attributions, every = jnp.array([0.5, 0.5]), jnp.array([2.0, -1.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.attribution_loss(scores, attributions, every):.3f}")
      -0.037
    """
    where = jnp.asarray(where)
    scores = jnp.where(where, scores, 0.0)
    rewards = jnp.where(where, jax.nn.sigmoid(jnp.where(where, jax.lax.stop_gradient(attributions), 0.0)) - 0.5, 0.0)
    weights = jnp.where(where, weights, 0.0)
    share = weights / jnp.maximum(masked_mean(weights, where), 1e-30)
    return -masked_mean(share * rewards * scores, where)
