"""From scores to working contexts: which blocks of a window to show in full under a budget."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.lengths import CutGeometry
from lensjax.rollouts import collapses_for_length, cut_from_priorities, level_counts


def coarse_cut(geometry: CutGeometry) -> Array:
    """The cold start: every block of LOD 1 before the protected tail collapsed, nothing higher; int32[T]."""
    covered = geometry.blocks(1) * geometry.block_size
    return (jnp.arange(geometry.window) < covered).astype(jnp.int32)


def cut_from_block_scores(scores: ArrayLike, length: ArrayLike, geometry: CutGeometry) -> Array:
    """The cut of one length that shows the highest-scored blocks in full.

    Blocks are collapsed in the order of rising score, to LOD 1 while that suffices; where the length asks for more,
    the parents with the lowest mean score go to the levels above.

    Args:
      scores: float32[blocks(1)], wish for detail of each LOD-1 block, oldest first.
      length: int32[], entries wanted, rounded down to a reachable length; may be traced.
      geometry: the window.

    Returns:
      int32[T], the level at which each token is shown.
    """
    scores = jnp.asarray(scores)
    priorities = []
    for lod in range(1, geometry.max_lod + 1):
        members = geometry.block_size ** (lod - 1)
        blocks = geometry.blocks(lod)
        priorities.append(-scores[: blocks * members].reshape(blocks, members).mean(axis=1))
    collapses = collapses_for_length(length, geometry)
    nothing = [jnp.zeros(geometry.blocks(lod), bool) for lod in range(2, geometry.max_lod + 1)]
    counts = level_counts(collapses, nothing, geometry)
    return cut_from_priorities(counts, priorities, geometry)
