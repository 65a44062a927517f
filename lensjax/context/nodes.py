"""The nodes of a history that an edit can act on: where they are, their scores, and which edits are legal.

All nodes of the levels 1..L that lie before the protected tail stand in one array, level 1 first, N in all. A context
is one flag a node, bool[N]: is this block collapsed? Blocks are collapsed from below upwards, so the flags say it all:
a token's level of detail is the number of its ancestors that are collapsed.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext


class Nodes(NamedTuple):
    """Where the N nodes are, as constants."""

    lod: np.ndarray
    """int32[N]."""
    start: np.ndarray
    """int32[N]: first token covered."""
    end: np.ndarray
    """int32[N]: the token after the last one covered."""
    parent: np.ndarray
    """int32[N]: index of the parent, N where that one may not be collapsed."""


@functools.cache
def table(geometry: Geometry) -> Nodes:
    """The nodes of a history that may be collapsed, level 1 first."""
    counts = [geometry.blocks(lod) for lod in range(1, geometry.max_lod + 1)]
    lod = np.repeat(np.arange(1, geometry.max_lod + 1), counts)
    index = np.concatenate([np.arange(count) for count in counts])
    span = geometry.block_size**lod
    above = np.append(counts[1:], 0)[lod - 1]
    parent = np.cumsum(counts)[lod - 1] + index // geometry.block_size
    parent = np.where(index // geometry.block_size < above, parent, len(lod))
    return Nodes(*(a.astype(np.int32) for a in (lod, index * span, (index + 1) * span, parent)))


def pool_scores(scores: ArrayLike, context: WorkingContext, geometry: Geometry) -> Array:
    """A score for every node from those of a context's entries.

    A shown gist has its own; a block has the mean of its members, weighted by the tokens they cover; what is inside a
    shown gist has the gist's.

    Args:
      scores: float32[W], the policy's.
      context: W entries, from the history's first token on.
      geometry: the history.

    Returns:
      float32[N].
    """
    tokens = jnp.arange(geometry.history, dtype=jnp.int32)
    entry = jnp.searchsorted(context.start, tokens, side="right").astype(jnp.int32) - 1
    return pool_tokens(jnp.take(jnp.asarray(scores), entry, mode="clip"), geometry)


def pool_tokens(values: ArrayLike, geometry: Geometry) -> Array:
    """Mean over the tokens of each node: float32[C] to float32[N].

    Where a token of it has +inf, a node has +inf; else, where one has -inf, -inf; and NaN wherever one has NaN.
    """
    level, size, means = jnp.asarray(values), geometry.block_size, []
    for lod in range(1, geometry.max_lod + 1):
        blocks = geometry.blocks(lod)
        level = mean_of(level[: blocks * size].reshape(blocks, size))
        means.append(level)
    return jnp.concatenate(means)


def mean_of(members: Array) -> Array:
    """Mean over the K members of each block, float32[n, K] to float32[n]; infinities and NaN as in `pool_tokens`."""
    # A power of two, which rounds nothing: so small that no sum of K differences overflows.
    scale = 0.5 ** (members.shape[1].bit_length() + 1)
    small = members * scale
    # As a difference from the first: rounding must not tell apart equal scores, or ties would be swapped.
    mean = (small[:, 0] + (small - small[:, :1]).mean(axis=1)) / scale
    low, high = members.min(axis=1), members.max(axis=1)
    extreme = jnp.where(high == jnp.inf, high, low)
    # Asked for by name: the least and the greatest of several numbers at once are not NaN wherever one of them is.
    extreme = jnp.where(jnp.isnan(members).any(axis=1), jnp.nan, extreme)
    return jnp.where(jnp.isfinite(extreme), mean, extreme)


def of_blocks(values: ArrayLike, geometry: Geometry) -> Array:
    """The value of its block at each token, 0 outside of the blocks of level 1: [blocks] to [C].

    `pool_tokens` gives it back.
    """
    covered = jnp.repeat(jnp.asarray(values), geometry.block_size)
    return jnp.pad(covered, (0, geometry.history - covered.shape[0]))


def by_level(values: Array, geometry: Geometry) -> list[Array]:
    """Splits [N] into one array for each level 1..L."""
    sizes = np.cumsum([geometry.blocks(lod) for lod in range(1, geometry.max_lod)])
    return jnp.split(values, sizes)


def eligible(geometry: Geometry, tokens: ArrayLike | None) -> Array:
    """bool[N]: nodes behind the sinks and wholly before the protected tail of the tokens held so far."""
    held = geometry.history if tokens is None else tokens
    nodes = table(geometry)
    before_tail = jnp.asarray(nodes.end) <= jnp.asarray(held) - geometry.recent_tokens
    return before_tail & jnp.asarray(nodes.start >= geometry.head)


def shown(collapsed: Array, geometry: Geometry) -> Array:
    """bool[N]: nodes that are entries of the context."""
    parent_is = collapsed.at[table(geometry).parent].get(mode="fill", fill_value=False)
    return collapsed & ~parent_is


def collapsible(collapsed: Array, among: Array, geometry: Geometry) -> Array:
    """bool[N]: blocks, `among` some, that are not collapsed and whose K children are all entries of the context."""
    levels = by_level(collapsed, geometry)
    ready = [jnp.ones_like(levels[0])]
    for lod in range(2, geometry.max_lod + 1):
        blocks = geometry.blocks(lod)
        children = levels[lod - 2][: blocks * geometry.block_size]
        ready.append(jnp.all(children.reshape(blocks, geometry.block_size), axis=1))
    return jnp.concatenate(ready) & ~collapsed & among


def drop_oldest(values: Array, tokens: int, geometry: Geometry) -> Array:
    """[N] of a history that has lost its first tokens, a multiple of K**L: all move to the front, zeros come behind."""
    levels = []
    for lod, level in enumerate(by_level(values, geometry), start=1):
        gone = min(tokens // geometry.block_size**lod, level.shape[0])
        levels.append(jnp.concatenate([level[gone:], jnp.zeros_like(level[:gone])]))
    return jnp.concatenate(levels)


def ordered(scores: ArrayLike) -> Array:
    """Scores that can all be compared."""
    scores = jnp.asarray(scores)
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def argmax(values: Array, where: Array) -> Array:
    """Index of the largest value among some, the first of equals; N, which no node has, if there is none."""
    largest = jnp.max(jnp.where(where, values, -jnp.inf))
    # The largest may itself be -inf, which all that is left out has as well.
    return jnp.where(jnp.any(where), jnp.argmax(where & (values == largest)), values.shape[0])


def argmin(values: Array, where: Array) -> Array:
    """As `argmax`, of the smallest value."""
    return argmax(-values, where)
