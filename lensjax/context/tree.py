"""The history as a tree: tokens at the leaves (LOD 0), above every K neighbouring nodes one gist."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

# [n, K, D] children of n blocks -> [n, D] gists.
GistFn = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TreeState:
    """All nodes of a history with room for C tokens, of which the first `length` are there.

    A block has a gist once all of its K**l tokens are there; rows of blocks that are not complete are zero.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> mean = lambda children: children.mean(axis=1)
      >>> history = lx.tree.build(jnp.ones((5, 3)), mean, block_size=2, max_lod=2)
      >>> [level.shape for level in history.levels]
      [(5, 3), (2, 3), (1, 3)]
    """

    levels: tuple[Array, ...]
    """levels[l] is [C // K**l, D], l = 0..L."""
    length: Array
    """int32[]: tokens held."""
    block_size: int = field(metadata={"static": True})
    states: tuple[Array, ...] = ()
    """What a policy knows of the tokens besides, [C // K**l, F] at each level, above the tokens a mean over the block;
    empty where it knows nothing more (see `models.decision.with_states`)."""

    @property
    def capacity(self) -> int:
        """Tokens that there is room for (C)."""
        return self.levels[0].shape[0]

    @property
    def max_lod(self) -> int:
        """Highest level of detail (L)."""
        return len(self.levels) - 1


def init(*, capacity: int, dim: int, block_size: int, max_lod: int, dtype: jnp.dtype | type = jnp.float32) -> TreeState:
    """An empty tree.

    Args:
      capacity: tokens that there is room for.
      dim: embedding width D.
      block_size: children per gist K, at least 2.
      max_lod: highest level L, at least 1.
      dtype: of the embeddings.

    Returns:
      A `TreeState` of length 0.

    Raises:
      ValueError: a size is out of range.

    Example:
      >>> import lensjax as lx
      >>> history = lx.tree.init(capacity=8, dim=3, block_size=2, max_lod=1)
      >>> int(history.length), history.capacity
      (0, 8)
    """
    _check_sizes(block_size, max_lod)
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 token, got {capacity}")
    levels = tuple(jnp.zeros((capacity // block_size**lod, dim), dtype) for lod in range(max_lod + 1))
    return TreeState(levels, jnp.zeros((), jnp.int32), block_size)


def build(leaves: ArrayLike, gist_fn: GistFn, *, block_size: int, max_lod: int) -> TreeState:
    """Builds every level over a full history of leaf embeddings.

    Args:
      leaves: float[C, D], the token embeddings.
      gist_fn: maps the children [n, K, D] of n blocks to their gists [n, D].
      block_size: children per gist K.
      max_lod: highest level L; levels without a complete block are empty.

    Returns:
      A `TreeState` of capacity and length C.

    Raises:
      ValueError: a size is out of range.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> mean = lambda children: children.mean(axis=1)
      >>> history = lx.tree.build(jnp.array([[1.0], [3.0], [5.0]]), mean, block_size=2, max_lod=1)
      >>> history.levels[1].tolist()
      [[2.0]]
    """
    _check_sizes(block_size, max_lod)
    level = jnp.asarray(leaves)
    tokens, dim = level.shape
    levels = [level]
    for _ in range(max_lod):
        blocks = level.shape[0] // block_size
        level = gist_fn(level[: blocks * block_size].reshape(blocks, block_size, dim)).astype(level.dtype)
        levels.append(level)
    return TreeState(tuple(levels), jnp.full((), tokens, jnp.int32), block_size)


def append(tree: TreeState, leaves: ArrayLike, gist_fn: GistFn, *, count: ArrayLike | None = None) -> TreeState:
    """Appends tokens; only the right edge of each level is computed and written.

    Args:
      tree: the history so far.
      leaves: float[n, D], embeddings of the new tokens.
      gist_fn: maps the children [m, K, D] of m blocks to their gists [m, D].
      count: int32[], how many of the n rows are real (the rest is padding); None for all.

    Returns:
      The longer tree. Its arrays equal those of `build` on all tokens at once.

    Raises:
      ValueError: `count` is not in [0, n], or the tree cannot hold so many more. Checked where these are concrete;
        under `jit` it is the caller's duty, tokens past the capacity are dropped and the length says how many are held.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> mean = lambda children: children.mean(axis=1)
      >>> history = lx.tree.append(lx.tree.init(capacity=4, dim=1, block_size=2, max_lod=1), jnp.ones((3, 1)), mean)
      >>> int(history.length), history.levels[1].tolist()
      (3, [[1.0], [0.0]])
    """
    leaves = jnp.asarray(leaves)
    rows = leaves.shape[0]
    count = jnp.asarray(rows if count is None else count, jnp.int32)
    if not isinstance(count, jax.core.Tracer) and not 0 <= int(count) <= rows:
        raise ValueError(f"count must be between 0 and the {rows} leaves given, got {int(count)}")
    wanted = tree.length + count
    if not isinstance(wanted, jax.core.Tracer) and int(wanted) > tree.capacity:
        raise ValueError(
            f"the tree holds {int(tree.length)} of {tree.capacity} tokens and cannot take {int(count)} more: "
            "start it with a larger capacity"
        )
    length = jnp.minimum(wanted, tree.capacity)
    offsets = jnp.arange(rows, dtype=jnp.int32)
    targets = jnp.where(offsets < count, tree.length + offsets, tree.capacity)
    levels = [tree.levels[0].at[targets].set(leaves.astype(tree.levels[0].dtype), mode="drop")]
    for lod in range(1, tree.max_lod + 1):
        levels.append(_extend_level(tree, levels[-1], lod, length, rows, gist_fn))
    return TreeState(tuple(levels), length, tree.block_size)


def _extend_level(tree: TreeState, children: Array, lod: int, length: Array, new_tokens: int, gist_fn: GistFn) -> Array:
    """Writes the gists of the blocks of one level that the new tokens completed."""
    level, span, size = tree.levels[lod], tree.block_size**lod, tree.block_size
    # The unfinished block and then one more for every span of new tokens: no more can have been completed.
    candidates = min(new_tokens // span + 1, level.shape[0])
    if candidates == 0:
        return level
    blocks = tree.length // span + jnp.arange(candidates, dtype=jnp.int32)
    child_rows = blocks[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None, :]
    gists = gist_fn(jnp.take(children, child_rows, axis=0, mode="clip"))
    is_complete = (blocks + 1) * span <= length
    targets = jnp.where(is_complete, blocks, level.shape[0])
    return level.at[targets].set(gists.astype(level.dtype), mode="drop")


def lookup(tree: TreeState, start: ArrayLike, lod: ArrayLike) -> Array:
    """The embeddings of nodes.

    Args:
      tree: the history.
      start: int32[...], first token that each node covers, a multiple of K**lod.
      lod: int32[...], level of each node, 0..L.

    Returns:
      float[..., D]. Only complete blocks have an embedding; asking for others is the caller's mistake.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> mean = lambda children: children.mean(axis=1)
      >>> history = lx.tree.build(jnp.array([[1.0], [3.0], [5.0]]), mean, block_size=2, max_lod=1)
      >>> lx.tree.lookup(history, jnp.array([0, 2]), jnp.array([1, 0])).tolist()
      [[2.0], [5.0]]
    """
    start, lod = jnp.asarray(start), jnp.asarray(lod)
    # One table and one gather for all levels; under vmap over variants the table is shared.
    table = jnp.concatenate(tree.levels, axis=0)
    sizes = [level.shape[0] for level in tree.levels]
    offsets = jnp.asarray([sum(sizes[:i]) for i in range(len(sizes))], jnp.int32)
    spans = jnp.asarray([tree.block_size**i for i in range(len(sizes))], jnp.int32)
    return jnp.take(table, offsets[lod] + start // spans[lod], axis=0, mode="clip")


def lookup_states(tree: TreeState, start: ArrayLike, *, before: int) -> Array:
    """What is known besides of the block of LOD 1 that holds each token, and of the blocks before it.

    Args:
      tree: the history, with states.
      start: int32[...], tokens.
      before: static number of blocks before that one.

    Returns:
      float[..., (1 + before) * F], the nearest first; 0 where there is no complete block.

    Example:
      >>> import dataclasses, jax.numpy as jnp, lensjax as lx
      >>> mean = lambda children: children.mean(axis=1)
      >>> history = lx.tree.build(jnp.ones((4, 1)), mean, block_size=2, max_lod=1)
      >>> states = (jnp.array([[1.0], [3.0], [5.0], [5.0]]), jnp.array([[2.0], [5.0]]))
      >>> history = dataclasses.replace(history, states=states)
      >>> lx.tree.lookup_states(history, jnp.array([0, 3]), before=1).tolist()
      [[2.0, 0.0], [5.0, 2.0]]
    """
    block = jnp.subtract.outer(jnp.asarray(start) // tree.block_size, jnp.arange(1 + before))
    is_there = (block >= 0) & ((block + 1) * tree.block_size <= tree.length)
    found = jnp.take(tree.states[1], jnp.maximum(block, 0), axis=0, mode="clip")
    return jnp.where(is_there[..., None], found, 0).reshape(*block.shape[:-1], -1)


def _check_sizes(block_size: int, max_lod: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 children per gist, got {block_size}")
    if max_lod < 1:
        raise ValueError(f"max_lod must be at least 1, got {max_lod}")
