"""The logistic loss of a difference, for preferences that may be wrong and for those that are stronger than others."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def softened(
    difference: ArrayLike,
    gap: ArrayLike,
    *,
    label_smoothing: ArrayLike | None,
    gap_margin: ArrayLike | None,
) -> Array:
    """Logistic loss of each difference that a preference asks for.

        (1 - label_smoothing) softplus(-y) + label_smoothing softplus(y),    y = difference - gap_margin gap

    Args:
      difference: float32[...], what should be large.
      gap: float32[...], how strong each preference is, at least 0.
      label_smoothing: float32[], epsilon in [0, 1/2), the probability that a preference is the wrong way round; None as
        0, with nothing computed for it.
      gap_margin: float32[], at least 0, of the margin that a gap of 1 asks for; None as 0, likewise.

    Returns:
      float32[...].

    References:
      Mitchell, A note on DPO with noisy preferences and relationship to IPO (2023), for the smoothing (conservative
      DPO). Amini et al., Direct Preference Optimization with an Offset, arXiv:2402.10571, for the margin by strength,
      and Touvron et al., Llama 2, arXiv:2307.09288, for the same in a reward model, where it is a number for each of
      four ratings. Here it is linear in the gap, which is measured: ODPO leaves the scaling open. That both are of one
      difference, the margin taken off first, is a choice made here.
    """
    difference = jnp.asarray(difference)
    if gap_margin is not None:
        difference = difference - jnp.asarray(gap_margin) * jnp.asarray(gap)
    loss = jax.nn.softplus(-difference)
    if label_smoothing is None:
        return loss
    share = jnp.asarray(label_smoothing)
    return (1 - share) * loss + share * jax.nn.softplus(difference)
