"""The working context: one cut of the tree, as a fixed number of entries in time order.

Two views of the same thing are used. `WorkingContext` lists the entries, which is what models read. A *cut* is
int32[C], the level of detail at which each token is shown (`MISSING` where it is not), which is what comparing,
sampling and drawing are easy on. `from_cut` and `to_cut` go between them.

A policy sees every row of a context, and the base model its entries, `read`. Only with omission is that not the same:
there the base model reads the tokens alone, and the gists are the policy's map of what it could have read.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import tree as trees
from lensjax.context.geometry import Geometry
from lensjax.context.tree import TreeState

MISSING = -1
BLOCKS_BEFORE = 4
"""Blocks before its own that an entry's states tell of: what resembles the query stands before what is needed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkingContext:
    """Rows in time order, padding last; R of them, which with omission is more than the W entries of the base model.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> valid = jnp.array([True, True, True, False])
      >>> context = lx.WorkingContext(start=jnp.array([0, 2, 3, 4]), lod=jnp.array([1, 0, 0, 0]), valid=valid)
      >>> int(context.length)
      3
    """

    start: Array
    """int32[R]: first token covered; the history's length at padding, so that starts stay sorted."""
    lod: Array
    """int32[R]: level of detail; 0 at padding."""
    valid: Array
    """bool[R]: False at padding."""

    @property
    def length(self) -> Array:
        """int32[...]: number of valid rows."""
        return self.valid.sum(axis=-1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entries:
    """A working context as models read it; every array is zero at padding.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> mean = lambda children: children.mean(axis=1)
      >>> history = lx.tree.build(jnp.array([[1.0], [3.0], [5.0], [7.0]]), mean, block_size=2, max_lod=1)
      >>> geometry = lx.Geometry(history=4, block_size=2, max_lod=1, recent_tokens=1)
      >>> entries = lx.materialise(history, lx.from_cut([1, 1, 0, 0], geometry, capacity=3))
      >>> entries.positions.tolist(), entries.spans.tolist(), entries.distances.tolist()
      ([0.5, 2.0, 3.0], [2.0, 1.0, 1.0], [2.5, 1.0, 0.0])
    """

    embeddings: Array
    """float[W, D]."""
    blocks: Array
    """float[W, D]: of a token the gist of its block, of whatever has no gist yet or is one itself its own embedding."""
    positions: Array
    """float32[W]: centre of the span, in tokens from the start of the history."""
    lods: Array
    """int32[W]."""
    spans: Array
    """float32[W]: tokens covered, K**lod."""
    distances: Array
    """float32[W]: tokens from the centre of the span to the last token."""
    valid: Array
    """bool[W]."""
    states: Array | None = None
    """float[W, 5 F]: what is known besides of its block and the four before it; None where no policy reads it."""


def recency(length: ArrayLike, geometry: Geometry, *, capacity: int) -> WorkingContext:
    """The last `length` tokens of the history in full: the baseline that every policy is held against.

    Args:
      length: int32[], entries wanted, at most `capacity`; may be traced.
      geometry: the history.
      capacity: static number of entries W.

    Returns:
      A `WorkingContext` that covers [C - length, C), with omission of `geometry.rows(capacity)` rows: first a map of
      the whole blocks before these. Sinks count: with them the last tokens are fewer.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> lx.recency(3, geometry, capacity=4).start.tolist()
      [5, 6, 7, 8]
    """
    length = jnp.asarray(length, jnp.int32)
    if geometry.omit:
        sinks, tokens = jnp.minimum(geometry.head, length), jnp.arange(geometry.history, dtype=jnp.int32)
        first = geometry.history - (length - sinks)
        is_mapped = tokens < first // geometry.block_size * geometry.block_size
        cut = jnp.where((tokens < sinks) | (tokens >= first), 0, jnp.where(is_mapped, 1, MISSING))
        return from_cut(cut, geometry, capacity=capacity)
    index = jnp.arange(capacity, dtype=jnp.int32)
    valid = index < length
    start = jnp.where(valid, geometry.history - length + index, geometry.history)
    return WorkingContext(start, jnp.zeros_like(index), valid)


def from_cut(cut: ArrayLike, geometry: Geometry, *, capacity: int) -> WorkingContext:
    """Lists the entries of a cut.

    Args:
      cut: int32[C], level at which each token is shown, `MISSING` where it is not. Each level holds whole, aligned
        blocks, as every cut of a tree does.
      geometry: the history.
      capacity: static number of entries W; what is beyond `geometry.rows(W)` rows is lost, so it must be at least the
        cut's length.

    Returns:
      The `WorkingContext`.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=5, block_size=2, max_lod=1, recent_tokens=1)
      >>> context = lx.from_cut([1, 1, 0, 0, 0], geometry, capacity=4)
      >>> context.start.tolist(), context.lod.tolist()
      ([0, 2, 3, 4], [1, 0, 0, 0])
    """
    cut = jnp.asarray(cut, jnp.int32)
    history = cut.shape[0]
    tokens = jnp.arange(history, dtype=jnp.int32)
    is_start = (cut >= 0) & (tokens % geometry.block_size ** jnp.maximum(cut, 0) == 0)
    (start,) = jnp.nonzero(is_start, size=geometry.rows(capacity), fill_value=history)
    start = start.astype(jnp.int32)
    valid = start < history
    lod = jnp.where(valid, jnp.take(cut, start, mode="clip"), 0)
    return WorkingContext(start, lod, valid)


def read(context: WorkingContext, geometry: Geometry) -> WorkingContext:
    """What the base model reads of a context: all of it, or with omission the tokens in full and no gist.

    Args:
      context: R rows.
      geometry: the history.

    Returns:
      A `WorkingContext` of `geometry.capacity(R)` entries, with gaps where something is omitted.

    Example:
      >>> import lensjax as lx
      >>> from lensjax.context.working import read
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2, omit=True)
      >>> context = lx.from_cut([1, 1, 0, 0, 1, 1, 0, 0], geometry, capacity=4)
      >>> context.start.tolist(), read(context, geometry).start.tolist()
      ([0, 2, 3, 4, 6, 7, 8], [2, 3, 6, 7])
    """
    if not geometry.omit:
        return context
    is_read = is_entry(context, geometry)
    capacity = geometry.capacity(is_read.shape[0])
    (index,) = jnp.nonzero(is_read, size=capacity, fill_value=is_read.shape[0])
    start = jnp.take(context.start, index, mode="fill", fill_value=geometry.history)
    return WorkingContext(start, jnp.zeros_like(start), index < is_read.shape[0])


def is_entry(context: WorkingContext, geometry: Geometry) -> Array:
    """bool[..., R]: rows that the base model reads, which are those that the budget counts."""
    return context.valid & (context.lod == 0) if geometry.omit else context.valid


def entry_count(context: WorkingContext, geometry: Geometry) -> Array:
    """int32[...]: how many entries the base model reads."""
    return is_entry(context, geometry).sum(axis=-1, dtype=jnp.int32)


def to_cut(context: WorkingContext, geometry: Geometry) -> Array:
    """The level at which each token is shown.

    Args:
      context: entries in time order that cover one range up to the history's end.
      geometry: the history.

    Returns:
      int32[C], `MISSING` for tokens before the first entry.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=5, block_size=2, max_lod=1, recent_tokens=1)
      >>> lx.to_cut(lx.recency(2, geometry, capacity=2), geometry).tolist()
      [-1, -1, -1, 0, 0]
    """
    tokens = jnp.arange(geometry.history, dtype=jnp.int32)
    # The entry that covers a token is the last one that starts at or before it; padding starts at T.
    entry = jnp.searchsorted(context.start, tokens, side="right").astype(jnp.int32) - 1
    return jnp.where(entry >= 0, jnp.take(context.lod, entry, mode="clip"), MISSING)


def spans(context: WorkingContext, *, block_size: int) -> Array:
    """int32[W]: tokens that each entry covers, K**lod; 0 at padding."""
    return jnp.where(context.valid, block_size**context.lod, 0)


def materialise(tree: TreeState, context: WorkingContext) -> Entries:
    """Gathers what models read about a working context.

    Args:
      tree: the history; its last token is the cursor.
      context: W entries of it.

    Returns:
      `Entries` of W rows, zero at padding.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> mean = lambda children: children.mean(axis=1)
      >>> history = lx.tree.build(jnp.array([[1.0], [3.0], [5.0], [7.0]]), mean, block_size=2, max_lod=1)
      >>> geometry = lx.Geometry(history=4, block_size=2, max_lod=1, recent_tokens=1)
      >>> entries = lx.materialise(history, lx.from_cut([1, 1, 0, 0], geometry, capacity=4))
      >>> entries.embeddings[:, 0].tolist(), entries.valid.tolist()
      ([2.0, 5.0, 7.0, 0.0], [True, True, True, False])
    """
    embeddings = trees.lookup(tree, context.start, context.lod)
    block = context.start // tree.block_size * tree.block_size
    has_gist = (context.lod == 0) & (block + tree.block_size <= tree.length)
    blocks = jnp.where(has_gist[:, None], trees.lookup(tree, block, jnp.ones_like(block)), embeddings)
    states = trees.lookup_states(tree, context.start, before=BLOCKS_BEFORE) if tree.states else None
    return entries(context, embeddings, blocks, tree.length, block_size=tree.block_size, states=states)


def entries(
    context: WorkingContext,
    embeddings: Array,
    blocks: Array,
    held: ArrayLike,
    *,
    block_size: int,
    origin: ArrayLike = 0,
    states: Array | None = None,
) -> Entries:
    """What models read about a context whose rows are at hand.

    Args:
      context: W entries.
      embeddings: float[W, D].
      blocks: float[W, D], see `Entries`.
      held: int32[], tokens of the history; the last one is the cursor.
      block_size: children per gist K.
      origin: int32[], the token from which positions count.
      states: float[W, 5 F], see `Entries`.

    Returns:
      `Entries` of W rows, zero at padding.
    """
    valid = context.valid
    width = spans(context, block_size=block_size).astype(jnp.float32)
    positions = jnp.where(valid, (context.start - origin).astype(jnp.float32) + (width - 1) / 2, 0.0)
    last = (jnp.asarray(held, jnp.int32) - 1 - origin).astype(jnp.float32)
    return Entries(
        embeddings=jnp.where(valid[:, None], embeddings, 0),
        blocks=jnp.where(valid[:, None], blocks, 0),
        positions=positions,
        lods=context.lod,
        spans=width,
        distances=jnp.where(valid, last - positions, 0.0),
        valid=valid,
        states=None if states is None else jnp.where(valid[:, None], states, 0),
    )


def in_full(embeddings: ArrayLike, positions: ArrayLike) -> Entries:
    """Tokens in full, as models read them.

    Args:
      embeddings: float[S, D].
      positions: [S], in tokens from the start of the history.

    Returns:
      `Entries` of S rows; distances are to the last of them.
    """
    embeddings = jnp.asarray(embeddings)
    positions = jnp.asarray(positions, jnp.float32)
    count = positions.shape[0]
    return Entries(
        embeddings=embeddings,
        blocks=embeddings,
        positions=positions,
        lods=jnp.zeros(count, jnp.int32),
        spans=jnp.ones(count, jnp.float32),
        distances=positions[-1:] - positions,
        valid=jnp.ones(count, bool),
    )


def invariants(
    context: WorkingContext,
    geometry: Geometry,
    *,
    length: ArrayLike,
    first_token: ArrayLike = 0,
    tokens: ArrayLike | None = None,
) -> dict[str, Array]:
    """The four invariants of a working context, for tests and debugging; works under `jit` and `vmap`.

    Args:
      context: the entries.
      geometry: the history.
      length: int32[], entries that there must be.
      first_token: int32[], where the first entry must start: 0 for a rollout, C - length for recency.
      tokens: int32[], tokens that the history holds so far; None for all of it.

    Returns:
      bool[] by name: `alignment` (every start is a multiple of its span), `contiguity` (each entry starts where the
      one before it ends, from `first_token` up to C), `budget` (exactly `length` entries, padding last),
      `tail` (the sinks and the last `recent_tokens` tokens are at LOD 0).
    """
    valid, start = context.valid, context.start
    held = geometry.history if tokens is None else tokens
    width = spans(context, block_size=geometry.block_size)
    end = start + width
    index = jnp.arange(valid.shape[0])
    count = context.length
    expected_start = jnp.concatenate([jnp.asarray(first_token, start.dtype)[None], end[:-1]])
    last_end = jnp.take(end, count - 1, mode="clip")
    is_kept = valid & ((start < geometry.head) | (end > held - geometry.recent_tokens))
    return {
        "alignment": jnp.all(~valid | (start % jnp.maximum(width, 1) == 0)),
        "contiguity": jnp.all(~valid | (start == expected_start)) & (last_end == held),
        "budget": (entry_count(context, geometry) == length) & jnp.all(valid == (index < count)),
        "tail": jnp.all(~is_kept | (context.lod == 0)),
    }
