"""A run in two stages: which pairs each learns from, and when the second begins.

Mixed preference optimisation learns from pairs that are easy to tell apart first, and then from the others, with the
policy of the first stage as what it is held to (`objective.anchor stage`). Variants that the policy draws itself make
the second stage the on-policy one of the paper, whose objective is PPO; here it stays that of the run.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context.geometry import ROUNDING


def second_stage(boundary: ArrayLike, steps: int) -> Array:
    """The first step of the second stage, int32[].

    Args:
      boundary: float32[] in [0, 1], share of the run that the first stage takes; 0 leaves it out, 1 the second one.
      steps: static length of the run.

    Example:
      >>> from lensjax.training import stages
      >>> [int(stages.second_stage(share, steps=10)) for share in (0.0, 0.25, 0.5, 1.0)]
      [0, 3, 5, 10]
    """
    # A share of a number that should be whole may come out a rounding error above it.
    return jnp.ceil(jnp.asarray(boundary, jnp.float32) * steps - ROUNDING).astype(jnp.int32)


def easy_gap(gaps: ArrayLike, where: ArrayLike, *, quantile: ArrayLike) -> Array:
    """The smallest gap of a pair that is easy: the quantile of the gaps at hand, which is one of them.

        gaps in rising order, the one at index ceil(quantile n) of n

    Args:
      gaps: float32[...], of pairs, at least 0.
      where: bool[...], pairs that count.
      quantile: float32[] in [0, 1]: 0 makes all pairs easy, 1 none.

    Returns:
      float32[]; infinity where no pair is easy.

    References:
      Gou and Nguyen, Mixed Preference Optimization, arXiv:2403.19443, of which the abstract is followed: pairs of a
      large gap of reward are the easy ones, those of a small gap the difficult ones. A quantile within the batch, in
      the place of a data set that is split once, is a choice made here.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.training import stages
      >>> gaps, every = jnp.array([0.5, 2.0, 1.0, 4.0]), jnp.ones(4, bool)
      >>> [float(stages.easy_gap(gaps, every, quantile=share)) for share in (0.0, 0.5, 1.0)]
      [0.5, 2.0, inf]
    """
    where = jnp.asarray(where).ravel()
    ascending = jnp.sort(jnp.where(where, jnp.asarray(gaps).ravel(), jnp.inf))
    count = jnp.sum(where, dtype=jnp.int32)
    below = jnp.ceil(jnp.asarray(quantile, jnp.float32) * count.astype(jnp.float32) - 1e-4).astype(jnp.int32)
    return jnp.where(below < count, jnp.take(ascending, below, mode="clip"), jnp.inf)


def gap_range(easy: ArrayLike, is_second: ArrayLike) -> tuple[Array, Array]:
    """Which pairs a stage learns from: of at least an easy gap in the first one, of a smaller one in the second.

    Args:
      easy: float32[], of `easy_gap`.
      is_second: bool[].

    Returns:
      float32[] each: the smallest gap that counts, and the smallest that no longer does.

    Example:
      >>> from lensjax.training import stages
      >>> [float(end) for end in stages.gap_range(1.5, is_second=True)]
      [0.0, 1.5]
    """
    easy, is_second = jnp.asarray(easy, jnp.float32), jnp.asarray(is_second)
    return jnp.where(is_second, 0.0, easy), jnp.where(is_second, easy, jnp.inf)
