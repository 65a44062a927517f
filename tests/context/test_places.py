"""The allocator on the rows of a context: what it does is what the allocator on all nodes does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import allocator, nodes, places
from lensjax.context.allocator import FocusConfig
from lensjax.context.geometry import Geometry
from tests.context.situations import EXTREME
from tests.small import jit

STREAMS, INTERVAL = 64, 12
DEEP = Geometry(history=96, block_size=2, max_lod=4, recent_tokens=3)
WIDE = Geometry(history=300, block_size=4, max_lod=3, recent_tokens=5)
# Thirds are rounded as XLA sees fit: scores without ties only.
ODD = Geometry(history=150, block_size=3, max_lod=3, recent_tokens=1)
OMITTING = Geometry(history=90, block_size=4, max_lod=1, recent_tokens=3, omit=True)
SINKING = Geometry(history=90, block_size=4, max_lod=1, recent_tokens=3, omit=True, sink_blocks=2)
CASES = [
    (DEEP, 24, FocusConfig(cooldown=2)),
    (WIDE, 40, FocusConfig(cooldown=0, max_edits=3, expand_threshold=-0.25, collapse_threshold=0.5, margin=0.125)),
    (ODD, 30, FocusConfig(cooldown=3)),
    (OMITTING, 40, FocusConfig(cooldown=1)),
    (SINKING, 40, FocusConfig(cooldown=1)),
]


def many(one):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (STREAMS, *leaf.shape)), one)


def scores_of(random, shape, geometry):
    """Some extreme, and many alike."""
    scores = random.uniform(-1, 1, shape)
    if geometry.block_size == 3:
        return scores.astype(np.float32)
    scores[::2] = np.round(4 * scores[::2]) / 4
    return np.where(random.random(shape) < 0.02, random.choice(EXTREME, shape), np.round(512 * scores) / 512).astype(
        "f"
    )


def cooling_of(cooling, geometry, settings):
    """int32[..., N] as the allocator on all nodes has it."""
    table, count = nodes.table(geometry), 0
    for age in range(settings.cooldown):
        start, lod = cooling.start[:, age, None], cooling.lod[:, age, None]
        is_there = np.any((table.start[:, None] == start) & (table.lod[:, None] == lod), axis=-1)
        count = np.maximum(count, np.where(is_there, settings.cooldown - age, 0))
    return count


@pytest.mark.parametrize(("geometry", "budget", "settings"), CASES, ids=["deep", "wide", "odd", "omitting", "sinking"])
def test_streams_are_focused_as_by_the_allocator_on_all_nodes(geometry, budget, settings):
    capacity, size = budget + INTERVAL, geometry.block_size**geometry.max_lod

    @jit
    @jax.vmap
    def by_nodes(state, scores, length, held):
        context = allocator.to_context(state, geometry, capacity=capacity, tokens=held)
        after, info = allocator.edit(state, scores, context, length, geometry, settings=settings, tokens=held)
        return after, context, allocator.to_context(after, geometry, capacity=capacity, tokens=held), info.swaps

    @jit
    @jax.vmap
    def by_rows(context, cooling, scores, length, held):
        return places.edit(context, cooling, scores, length, geometry, settings=settings, tokens=held)

    drop = jit(jax.vmap(lambda state: allocator.drop_oldest(state, size, geometry)))
    drop_rows = jit(jax.vmap(lambda context, cooling: places.drop_oldest(context, cooling, size, geometry)))
    random, held, swaps = np.random.default_rng(0), np.zeros(STREAMS, np.int32), 0
    state = many(allocator.uniform(geometry.history, geometry))
    context, cooling = None, many(places.nothing_cools(geometry.rows(capacity), geometry, settings=settings))
    for step in range(16):
        new = random.integers(0, INTERVAL + 1, STREAMS)
        if step == 12:  # of the longest histories
            state, held = drop(state), held - size
            context, cooling = drop_rows(context, cooling)
            dropped, held = context, np.maximum(held, 0)
            rows = by_nodes(state, np.zeros(dropped.start.shape, "f"), held, held)[1]
            jax.tree.map(np.testing.assert_array_equal, dropped, rows)
        held = np.minimum(held + new, geometry.history).astype(np.int32)
        scores = scores_of(random, (STREAMS, geometry.rows(capacity)), geometry)
        length = random.integers(budget - 6, budget + 1, STREAMS).astype(np.int32)
        state, before, after, count = jax.device_get(by_nodes(state, scores, length, held))
        context, cooling, swapped = jax.device_get(by_rows(before, cooling, scores, length, held))
        jax.tree.map(np.testing.assert_array_equal, (context, swapped), (after, count))
        np.testing.assert_array_equal(
            cooling_of(cooling, geometry, settings), np.broadcast_to(state.cooling, state.collapsed.shape)
        )
        swaps += count.sum()
    assert swaps > 2 * STREAMS and context.lod.max() == geometry.max_lod
