"""The working context: one cut of the tree, as a fixed number of entries in time order.

Two views of the same thing are used. `WorkingContext` lists the entries, which is what models read. A *cut* is
int32[T], the level of detail at which each token is shown (`MISSING` where it is not), which is what comparing,
sampling and drawing are easy on. `from_cut` and `to_cut` go between them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import tree as trees
from lensjax.context.tree import TreeState

MISSING = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkingContext:
    """Entries in time order, padding last."""

    start: Array
    """int32[W]: first token covered; the window's length at padding, so that starts stay sorted."""
    lod: Array
    """int32[W]: level of detail; 0 at padding."""
    valid: Array
    """bool[W]: False at padding."""

    @property
    def length(self) -> Array:
        """int32[...]: number of valid entries."""
        return self.valid.sum(axis=-1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entries:
    """A working context as models read it; every array is zero at padding."""

    embeddings: Array
    """float[W, D]."""
    blocks: Array
    """float[W, D]: of a token the gist of its block, of whatever has no gist yet or is one itself its own embedding."""
    positions: Array
    """float32[W]: centre of the span, in tokens from the start of the window."""
    lods: Array
    """int32[W]."""
    spans: Array
    """float32[W]: tokens covered, K**lod."""
    distances: Array
    """float32[W]: tokens from the centre of the span to the last token."""
    valid: Array
    """bool[W]."""


def baseline(length: ArrayLike, *, window: int, capacity: int) -> WorkingContext:
    """The tail-preserving baseline: the last `length` tokens of the window in full.

    Args:
      length: int32[], entries wanted, at most `capacity`; may be traced.
      window: tokens in the window T.
      capacity: static number of entries W.

    Returns:
      A `WorkingContext` that covers [T - length, T).
    """
    index = jnp.arange(capacity, dtype=jnp.int32)
    length = jnp.asarray(length, jnp.int32)
    valid = index < length
    start = jnp.where(valid, window - length + index, window)
    return WorkingContext(start, jnp.zeros_like(index), valid)


def from_cut(cut: ArrayLike, *, block_size: int, capacity: int) -> WorkingContext:
    """Lists the entries of a cut.

    Args:
      cut: int32[T], level at which each token is shown, `MISSING` where it is not. Each level holds whole, aligned
        blocks, as every cut of a tree does.
      block_size: children per gist K.
      capacity: static number of entries W; entries beyond it are lost, so it must be at least the cut's length.

    Returns:
      The `WorkingContext`.
    """
    cut = jnp.asarray(cut, jnp.int32)
    window = cut.shape[0]
    tokens = jnp.arange(window, dtype=jnp.int32)
    is_start = (cut >= 0) & (tokens % block_size ** jnp.maximum(cut, 0) == 0)
    (start,) = jnp.nonzero(is_start, size=capacity, fill_value=window)
    start = start.astype(jnp.int32)
    valid = start < window
    lod = jnp.where(valid, jnp.take(cut, start, mode="clip"), 0)
    return WorkingContext(start, lod, valid)


def to_cut(context: WorkingContext, *, window: int) -> Array:
    """The level at which each token is shown.

    Args:
      context: entries in time order that cover one range up to the window's end.
      window: tokens in the window T.

    Returns:
      int32[T], `MISSING` for tokens before the first entry.
    """
    tokens = jnp.arange(window, dtype=jnp.int32)
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
    """
    valid = context.valid
    width = spans(context, block_size=tree.block_size).astype(jnp.float32)
    positions = jnp.where(valid, context.start.astype(jnp.float32) + (width - 1) / 2, 0.0)
    distances = jnp.where(valid, (tree.length - 1).astype(jnp.float32) - positions, 0.0)
    embeddings = trees.lookup(tree, context.start, context.lod)
    block = context.start // tree.block_size * tree.block_size
    has_gist = (context.lod == 0) & (block + tree.block_size <= tree.length)
    blocks = jnp.where(has_gist[:, None], trees.lookup(tree, block, jnp.ones_like(block)), embeddings)
    return Entries(
        embeddings=jnp.where(valid[:, None], embeddings, 0),
        blocks=jnp.where(valid[:, None], blocks, 0),
        positions=positions,
        lods=context.lod,
        spans=width,
        distances=distances,
        valid=valid,
    )


def invariants(
    context: WorkingContext,
    *,
    window: int,
    block_size: int,
    length: ArrayLike,
    recent_tokens: int,
    first_token: ArrayLike = 0,
) -> dict[str, Array]:
    """The four invariants of a working context, for tests and debugging; works under `jit` and `vmap`.

    Args:
      context: the entries.
      window: tokens in the window T.
      block_size: children per gist K.
      length: int32[], valid entries that there must be.
      recent_tokens: tail tokens that must be at LOD 0.
      first_token: int32[], where the first entry must start: 0 for a rollout, T - length for the baseline.

    Returns:
      bool[] by name: `alignment` (every start is a multiple of its span), `contiguity` (each entry starts where the
      one before it ends, from `first_token` up to T), `budget` (exactly `length` valid entries, padding last),
      `tail` (the last `recent_tokens` tokens are at LOD 0).
    """
    valid, start = context.valid, context.start
    width = spans(context, block_size=block_size)
    end = start + width
    index = jnp.arange(valid.shape[0])
    count = context.length
    expected_start = jnp.concatenate([jnp.asarray(first_token, start.dtype)[None], end[:-1]])
    last_end = jnp.take(end, count - 1, mode="clip")
    in_tail = valid & (end > window - recent_tokens)
    return {
        "alignment": jnp.all(~valid | (start % jnp.maximum(width, 1) == 0)),
        "contiguity": jnp.all(~valid | (start == expected_start)) & (last_end == window),
        "budget": (count == length) & jnp.all(valid == (index < count)),
        "tail": jnp.all(~in_tail | (context.lod == 0)),
    }
