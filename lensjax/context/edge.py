"""The right edge of a tree: all that the gists of later tokens depend on, however long the history before it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context.tree import GistFn

Edge = tuple[Array, ...]
"""[K, D] of each level 0..L-1: the nodes of it that have no parent yet, in order, zeros behind them."""


class Grown(NamedTuple):
    """What new tokens have made of an edge."""

    edge: Edge
    gists: Edge
    """[n // K**l + 1, D] of each level 1..L: the gists of the blocks that are complete now and were not before, in
    order (`completed` says how many); what is behind them means nothing."""


def init(*, dim: int, block_size: int, max_lod: int) -> Edge:
    """The edge of an empty history."""
    return tuple(jnp.zeros((block_size, dim)) for _ in range(max_lod))


def append(edge: Edge, held: ArrayLike, leaves: ArrayLike, gist_fn: GistFn, *, count: ArrayLike) -> Grown:
    """Appends tokens to a history of which only the edge is at hand; the gists are those of `tree.append`.

    Args:
      edge: of the history so far.
      held: int32[], tokens of it.
      leaves: float[n, D], embeddings of the new tokens.
      gist_fn: maps the children [m, K, D] of m blocks to their gists [m, D], each by itself.
      count: int32[], how many of the n rows are real; the rest is padding.

    Returns:
      The next edge, and the new gists.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.context import edge
      >>> mean = lambda children: children.mean(axis=1)
      >>> empty = edge.init(dim=1, block_size=2, max_lod=1)
      >>> grown = edge.append(empty, 0, jnp.array([[1.0], [3.0], [5.0]]), mean, count=3)
      >>> grown.gists[0][:, 0].tolist()[:1], grown.edge[0].tolist()
      ([2.0], [[5.0], [0.0]])
    """
    held, new = jnp.asarray(held, jnp.int32), jnp.asarray(leaves)
    tokens, size = new.shape[0], edge[0].shape[0]
    edges, gists, added = [], [], jnp.asarray(count, jnp.int32)
    for lod, children in enumerate(edge):
        blocks = tokens // size ** (lod + 1) + 1
        waiting = held // size**lod % size
        offsets = jnp.arange(new.shape[0], dtype=jnp.int32)
        room = jnp.concatenate([children, jnp.zeros((blocks * size, new.shape[1]), children.dtype)])
        slots = jnp.where(offsets < added, waiting + offsets, room.shape[0])
        room = room.at[slots].set(new.astype(room.dtype), mode="drop")
        waiting = waiting + added
        new = gist_fn(room[: blocks * size].reshape(blocks, size, -1)).astype(room.dtype)
        added = waiting // size
        edges.append(jax.lax.dynamic_slice_in_dim(room, added * size, size))
        gists.append(new)
    return Grown(tuple(edges), tuple(gists))


def completed(held: int, count: int, *, block_size: int, max_lod: int) -> list[int]:
    """How many blocks of each level 1..L so many new tokens complete.

    Example:
      >>> from lensjax.context import edge
      >>> edge.completed(3, 5, block_size=2, max_lod=3)
      [3, 2, 1]
    """
    spans = [block_size**lod for lod in range(1, max_lod + 1)]
    return [(held + count) // span - held // span for span in spans]
