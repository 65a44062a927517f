"""Random situations of an allocator, for the reference and as arrays, and what is compiled for them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from lensjax.context import allocator, nodes
from lensjax.context.allocator import FocusConfig, FocusState
from lensjax.context.geometry import Geometry
from tests import reference
from tests.small import jit

# Blocks without a parent, levels with one block, windows and tails that are no multiples of a block.
DEEP = Geometry(history=18, block_size=2, max_lod=3, recent_tokens=3)
WIDE = Geometry(history=23, block_size=3, max_lod=2, recent_tokens=4)
# 4 blocks in 2 parents before the tail, and 6 blocks without any.
HAND = Geometry(history=10, block_size=2, max_lod=2, recent_tokens=2)
FLAT = Geometry(history=15, block_size=2, max_lod=1, recent_tokens=3)
# Six blocks that the base model may read or not, behind one that it always reads.
OMITTING = Geometry(history=26, block_size=3, max_lod=1, recent_tokens=4, omit=True, sink_blocks=1)
both = pytest.mark.parametrize("geometry", [DEEP, WIDE], ids=str)
each = pytest.mark.parametrize("geometry", [DEEP, WIDE, OMITTING], ids=str)

GREEDY = FocusConfig(cooldown=2)
FEW = FocusConfig(max_edits=1, cooldown=0)
PICKY = FocusConfig(max_edits=3, expand_threshold=0.25, collapse_threshold=0.0)
CAREFUL = FocusConfig(margin=0.25, max_edits=3)
BRISK = FocusConfig(max_edits=2)
SAMPLED = FocusConfig(temperature=0.5)
ROWS = 256
EXTREME = np.asarray([np.nan, np.inf, -np.inf, 1e38, -1e38, np.finfo(np.float32).max, 0.5, -0.5, 0], np.float32)


class Cases(NamedTuple):
    """Random situations of an allocator: as entries, and as the batch of arrays that says the same."""

    entries: list
    state: FocusState
    scores: np.ndarray
    held: np.ndarray


@functools.cache
def legal_cuts(geometry, held=None):
    """Every cut of the first `held` tokens, None for all."""
    if held == 0:
        return [()]
    return reference.legal_cuts(geometry if held is None else dataclasses.replace(geometry, history=held))


def flags(entries, geometry):
    """Nodes that are an entry or inside of one."""
    shown = [(reference.covered(entry, geometry.block_size), entry[1]) for entry in entries]
    return [any(start in span and lod <= top for span, top in shown) for start, lod in reference.nodes(geometry)]


def state_of(cuts, geometry, cooling=0):
    collapsed = np.asarray([flags(entries, geometry) for entries in cuts])
    return FocusState(collapsed, np.broadcast_to(np.asarray(cooling, np.int32), collapsed.shape))


def random_scores(rng, shape):
    """Exact in float32; in every other row with many ties."""
    scores = rng.integers(-512, 513, shape) / 512
    scores[::2] = np.round(4 * scores[::2]) / 4
    return scores.astype(np.float32)


def random_cases(geometry, seed, rows=ROWS, *, partly=False):
    rng = np.random.default_rng(seed)
    held = rng.integers(0, geometry.history + 1, rows) if partly else np.full(rows, geometry.history)
    cuts = [legal_cuts(geometry, tokens) for tokens in held.tolist()]
    entries = [legal[rng.integers(len(legal))] for legal in cuts]
    shape = (rows, len(reference.nodes(geometry)))
    cooling = rng.integers(0, 3, shape) * (rng.random(shape) < 0.3)
    return Cases(entries, state_of(entries, geometry, cooling), random_scores(rng, shape), held.astype(np.int32))


def row_of(state, index):
    return jax.tree.map(lambda leaf: leaf[index], state)


def slow_allocator(cases, index, geometry):
    cooling = zip(reference.nodes(geometry), np.asarray(cases.state.cooling)[index].tolist(), strict=True)
    return reference.Allocator(cases.entries[index], geometry, dict(cooling))


def by_node(values, geometry):
    return dict(zip(reference.nodes(geometry), np.asarray(values).tolist(), strict=True))


def marked(values, geometry):
    """The nodes whose flag is set."""
    return {node for node, flag in by_node(values, geometry).items() if flag}


def assert_same_state(state, slow, geometry):
    assert np.asarray(state.collapsed).tolist() == flags(slow.entries, geometry)
    assert by_node(state.cooling, geometry) == {node: slow.cooling(node) for node in reference.nodes(geometry)}


@functools.cache
def compiled_fit(geometry):
    def fit(state, scores, length, cooldown, held):
        return allocator.fit(state, scores, length, geometry, cooldown=cooldown, tokens=held)

    return jit(jax.vmap(fit, in_axes=(0, 0, 0, None, 0)))


@functools.cache
def compiled_swap(geometry, settings):
    def swap(state, scores, held, key):
        return allocator.swap(state, scores, geometry, settings=settings, tokens=held, key=key)

    run = jit(jax.vmap(swap))

    def all_rows(state, scores, held=None, key=None):
        held = np.full(len(scores), geometry.history, np.int32) if held is None else held
        key = jax.random.key(0) if key is None else key
        return run(state, scores, held, jax.random.split(key, len(scores)))

    return all_rows


def swap_once(entries, scores, geometry, settings, cooling=0):
    """One swap step of one context: the entries after it. Nodes that have no score in the dict have 0."""
    state = state_of([entries], geometry, cooling)
    values = np.asarray([[scores.get(node, 0.0) for node in reference.nodes(geometry)]], np.float32)
    after, _ = compiled_swap(geometry, settings)(state, values)
    return list(listed(after, geometry)[0])


@functools.cache
def compiled_contexts(geometry):
    return jit(jax.vmap(lambda state: allocator.to_context(state, geometry, capacity=geometry.history)))


def listed(states, geometry):
    """The entries of each of a batch of states."""
    return [tuple(entries) for entries in reference.unstack(compiled_contexts(geometry)(states))]


@functools.cache
def compiled_refocus(geometry, settings):
    """One step: the next state, what the swaps did, the scores of nodes, and the next context."""

    @jit
    def refocus(state, scores, length, held, key):
        context = allocator.to_context(state, geometry, capacity=geometry.history, tokens=held)
        pooled = nodes.pool_scores(scores, context, geometry)
        options = {"settings": settings, "tokens": held, "key": key if settings.temperature else None}
        after, info = allocator.edit(state, scores, context, length, geometry, **options)
        context = allocator.to_context(after, geometry, capacity=geometry.history, tokens=held)
        return after, info, pooled, context

    return refocus
