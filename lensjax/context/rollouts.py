"""Stochastic rollouts: random cuts of one history, all of exactly one length.

A cut is drawn from the top level down. First *how many* blocks of each level it shows, then *which* ones, by random
priorities among the blocks that no higher choice covers. Any number of collapses between 0 and the number of blocks
can be reached (a cut is a downward-closed set of collapsed blocks), so bounds on each level's count are all it takes
to land exactly on the target: no rejection, no loop over spans, and a cost that does not depend on the target.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext


def collapses_for_length(length: ArrayLike, geometry: Geometry) -> Array:
    """Collapses that bring a history to the longest reachable length that is at most `length`.

    Args:
      length: int32[...], entries wanted; may be traced.
      geometry: the history.

    Returns:
      int32[...], at most `geometry.max_collapses`: below the shortest length the shortest one is taken, so check
      static lengths with `Geometry.length`, which raises.
    """
    saved = jnp.maximum(geometry.history - jnp.asarray(length, jnp.int32), 0)
    step = geometry.saving
    return jnp.minimum((saved + step - 1) // step, geometry.max_collapses)


def length_for_collapses(collapses: ArrayLike, geometry: Geometry) -> Array:
    """Entries of a cut with that many collapses, int32[...]."""
    return geometry.history - jnp.asarray(collapses, jnp.int32) * geometry.saving


def level_counts(collapses: ArrayLike, optional: list[Array], geometry: Geometry) -> list[Array]:
    """How many blocks a cut shows at each level, within the bounds that make its length exact.

    A block shown at level l stands for s_l = 1 + K + ... + K**(l-1) collapses. From the top level down, with R
    collapses left and F blocks free below level l, its count lies between max(0, R - F) (fewer could not be made up
    below) and min(R // s_l, free blocks of level l).

    Args:
      collapses: int32[], collapses of the cut u, 0..`geometry.max_collapses`.
      optional: bool[blocks(l)] for each level 2..L: each step above the minimum, and whether it is taken.
      geometry: the history.

    Returns:
      int32[] for each level 1..L, level 1 first.
    """
    size, top = geometry.block_size, geometry.max_lod
    remaining = jnp.asarray(collapses, jnp.int32)
    free = [jnp.asarray(geometry.blocks(lod), jnp.int32) for lod in range(1, top + 1)]
    counts: list[Array] = []
    for lod in range(top, 1, -1):
        worth = (size**lod - 1) // (size - 1)
        below = sum(free[: lod - 1], jnp.zeros((), jnp.int32))
        least = jnp.maximum(remaining - below, 0)
        most = jnp.minimum(remaining // worth, free[lod - 1])
        steps = jnp.arange(geometry.blocks(lod))
        count = least + jnp.sum(optional[lod - 2] & (steps < most - least), dtype=jnp.int32)
        remaining = remaining - count * worth
        free = [free[i] - count * size ** (lod - 1 - i) for i in range(lod - 1)]
        counts.append(count)
    counts.append(remaining)
    return counts[::-1]


def cut_from_priorities(counts: list[Array], priorities: list[Array], geometry: Geometry) -> Array:
    """The cut that shows the given number of blocks at each level, those of highest priority first.

    Args:
      counts: int32[] for each level 1..L, as `level_counts` gives them.
      priorities: float[blocks(l)] for each level 1..L; ties go to the older block.
      geometry: the history.

    Returns:
      int32[C], the level at which each token is shown.
    """
    size, history = geometry.block_size, geometry.history
    cut = jnp.zeros(history, jnp.int32)
    covered = jnp.arange(geometry.blocks(geometry.max_lod)) < geometry.sink_blocks
    for lod in range(geometry.max_lod, 0, -1):
        blocks = geometry.blocks(lod)
        priority = jnp.where(covered, -jnp.inf, priorities[lod - 1])
        order = jnp.argsort(-priority, stable=True)
        rank = jnp.zeros(blocks, jnp.int32).at[order].set(jnp.arange(blocks, dtype=jnp.int32))
        chosen = (rank < counts[lod - 1]) & ~covered
        tokens = jnp.repeat(chosen, size**lod)
        cut = cut.at[: tokens.shape[0]].max(jnp.where(tokens, lod, 0))
        if lod > 1:
            children = jnp.repeat(covered | chosen, size)
            covered = jnp.zeros(geometry.blocks(lod - 1), bool).at[: children.shape[0]].set(children)
    return cut


def sample_cut(key: Array, collapses: ArrayLike, high_lod_share: ArrayLike, geometry: Geometry) -> Array:
    """Draws one cut with exactly `collapses` collapses.

    Args:
      key: PRNG key, consumed.
      collapses: int32[], 0..`geometry.max_collapses`.
      high_lod_share: float32[], probability in [0, 1] of each optional block of level 2 and above; every cut of the
        length can occur when it is strictly in between.
      geometry: the history.

    Returns:
      int32[C], the level at which each token is shown.
    """
    return _cut_from_noise(_noise(key, geometry), collapses, high_lod_share, geometry)


def sample_rollouts(
    key: Array,
    length: ArrayLike,
    high_lod_share: ArrayLike,
    *,
    rollouts: int,
    geometry: Geometry,
    capacity: int,
) -> tuple[WorkingContext, Array]:
    """Draws N random working contexts of exactly one length that keep the same recent tail.

    Duplicates are masked, not drawn again. Where fewer than two distinct ones remain, the last is replaced by an
    *aggressive* one, which takes the highest levels it can and prefers blocks that the others leave in full; it stays
    masked where even that is the same cut.

    Args:
      key: PRNG key, consumed.
      length: int32[], entries wanted, rounded down to a reachable length; may be traced.
      high_lod_share: float32[], see `sample_cut`.
      rollouts: N, static.
      geometry: the history.
      capacity: static number of entries W, at least the length.

    Returns:
      A `WorkingContext` with a leading axis N, and bool[N]: which of them differ from all before them.

    Example:
      >>> import functools, jax, lensjax as lx
      >>> geometry = lx.Geometry(history=16, block_size=2, max_lod=2, recent_tokens=2)
      >>> draw = jax.jit(functools.partial(lx.sample_rollouts, rollouts=3, geometry=geometry, capacity=12))
      >>> variants, distinct = draw(jax.random.key(0), 12, 0.5)
      >>> variants.length.tolist(), distinct.shape
      ([12, 12, 12], (3,))
    """
    collapses = collapses_for_length(length, geometry)
    noise = _noise(key, geometry, rollouts)
    cuts = jax.vmap(lambda row: _cut_from_noise(row, collapses, high_lod_share, geometry))(noise)
    if rollouts > 1:
        too_few = jnp.sum(is_distinct(cuts)) < 2
        aggressive = _aggressive_cut(noise[-1], cuts[0], collapses, geometry)
        cuts = cuts.at[-1].set(jnp.where(too_few, aggressive, cuts[-1]))
    to_context = jax.vmap(lambda cut: contexts.from_cut(cut, geometry, capacity=capacity))
    return to_context(cuts), is_distinct(cuts)


def sample_of_any_length(key: Array, high_lod_share: ArrayLike, *, geometry: Geometry, capacity: int) -> WorkingContext:
    """Draws a random working context whose length is log-uniform, so that all ratios of compression come equally often.

    Args:
      key: PRNG key, consumed.
      high_lod_share: float32[], see `sample_cut`.
      geometry: the history.
      capacity: static number of entries W, the greatest length; the least is `geometry.shortest`.

    Returns:
      A `WorkingContext`.

    Example:
      >>> import jax, lensjax as lx
      >>> from lensjax.context.rollouts import sample_of_any_length
      >>> geometry = lx.Geometry(history=16, block_size=2, max_lod=1, recent_tokens=2)
      >>> context = sample_of_any_length(jax.random.key(0), 0.0, geometry=geometry, capacity=12)
      >>> 9 <= int(context.length) <= 12
      True
    """
    length_key, cut_key = jax.random.split(key)
    bounds = jnp.log(jnp.asarray([geometry.shortest, capacity + 1], jnp.float32))
    length = jnp.exp(jax.random.uniform(length_key, (), minval=bounds[0], maxval=bounds[1])).astype(jnp.int32)
    drawn, _ = sample_rollouts(cut_key, length, high_lod_share, rollouts=1, geometry=geometry, capacity=capacity)
    return jax.tree.map(lambda leaf: leaf[0], drawn)


def _noise(key: Array, geometry: Geometry, *batch: int) -> Array:
    """All randomness of a cut in one draw: float32[*batch, 2, blocks of all levels], for counts and for priorities."""
    return jax.random.uniform(key, (*batch, 2, geometry.nodes))


def _by_level(row: Array, geometry: Geometry) -> list[Array]:
    """Splits a row with one number for each block into one array for each level."""
    sizes = np.cumsum([geometry.blocks(lod) for lod in range(1, geometry.max_lod)])
    return jnp.split(row, sizes)


def _cut_from_noise(noise: Array, collapses: ArrayLike, high_lod_share: ArrayLike, geometry: Geometry) -> Array:
    optional = [level < high_lod_share for level in _by_level(noise[0], geometry)[1:]]
    counts = level_counts(collapses, optional, geometry)
    return cut_from_priorities(counts, _by_level(noise[1], geometry), geometry)


def _aggressive_cut(noise: Array, other: Array, collapses: Array, geometry: Geometry) -> Array:
    """As many high-level blocks as the length allows, where `other` shows most detail."""
    everything = [jnp.ones(geometry.blocks(lod), bool) for lod in range(2, geometry.max_lod + 1)]
    priorities = [
        level - _block_max(other, geometry, lod) for lod, level in enumerate(_by_level(noise[1], geometry), start=1)
    ]
    return cut_from_priorities(level_counts(collapses, everything, geometry), priorities, geometry)


def _block_max(cut: Array, geometry: Geometry, lod: int) -> Array:
    span = geometry.block_size**lod
    blocks = geometry.blocks(lod)
    return cut[: blocks * span].reshape(blocks, span).max(axis=1).astype(jnp.float32)


def is_distinct(cuts: Array) -> Array:
    """bool[N]: whether a row differs from every row before it."""
    same = jnp.all(cuts[:, None, :] == cuts[None, :, :], axis=-1)
    return ~jnp.any(jnp.tril(same, k=-1), axis=1)
