"""The allocator on the rows of a context: what it does is what the allocator on all nodes does."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import allocator, nodes, places
from lensjax.context.allocator import FocusConfig, FocusState
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext
from tests.context.situations import EXTREME
from tests.small import jit

STREAMS, INTERVAL = 64, 12
DEEP = Geometry(history=62, block_size=2, max_lod=5, recent_tokens=3)
WIDE = Geometry(history=150, block_size=3, max_lod=3, recent_tokens=1)
OMITTING = Geometry(history=90, block_size=4, max_lod=1, recent_tokens=3, omit=True)
GREEDY = FocusConfig(cooldown=2)
CAREFUL = FocusConfig(cooldown=0, max_edits=2, expand_threshold=-0.25, collapse_threshold=0.5, margin=0.125)
CASES = {"deep": (DEEP, 24, GREEDY), "wide": (WIDE, 30, CAREFUL), "omitting": (OMITTING, 40, FocusConfig())}


def many(one):
    return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (STREAMS, *leaf.shape)), one)


def random_scores(random, shape, geometry):
    """Some extreme, and many alike; of blocks of three neither, whose means are rounded as XLA sees fit."""
    scores = random.uniform(-1, 1, shape)
    if geometry.block_size == 3:
        return scores.astype(np.float32)
    scores[::2] = np.round(4 * scores[::2]) / 4
    is_extreme = random.random(shape) < 0.02
    return np.where(is_extreme, random.choice(EXTREME, shape), np.round(512 * scores) / 512).astype(np.float32)


def cooling_of(cooling, geometry, settings):
    """int32[..., N], as the allocator on all nodes has it."""
    table = nodes.table(geometry)
    steps = np.zeros((len(cooling.lod), len(table.lod)), np.int32)
    for age in reversed(range(settings.cooldown)):
        is_start = table.start[None, :, None] == cooling.start[:, age, None]
        is_edited = np.any(is_start & (table.lod[None, :, None] == cooling.lod[:, age, None]), axis=-1)
        steps = np.where(is_edited, settings.cooldown - age, steps)
    return steps


@functools.cache
def walked(name):
    """Random streams that grow: of every step what both allocators made of it, and in the end what is held."""
    geometry, budget, settings = CASES[name]
    capacity = budget + INTERVAL

    @jit
    @jax.vmap
    def by_nodes(state, scores, length, held):
        context = allocator.to_context(state, geometry, capacity=capacity, tokens=held)
        after, info = allocator.edit(state, scores, context, length, geometry, settings=settings, tokens=held)
        return context, after, allocator.to_context(after, geometry, capacity=capacity, tokens=held), info.swaps

    @jit
    @jax.vmap
    def by_rows(context, cooling, scores, length, held):
        return places.edit(context, cooling, scores, length, geometry, settings=settings, tokens=held)

    random, held, steps = np.random.default_rng(0), np.zeros(STREAMS, np.int32), []
    shape = (STREAMS, geometry.rows(capacity))
    in_full = np.zeros((STREAMS, geometry.max_collapses), np.int32)
    state = FocusState(in_full > 0, in_full)
    cooling = many(jax.device_get(places.nothing_cools(shape[1], geometry, settings=settings)))
    for _ in range(14):
        held = np.minimum(held + random.integers(0, INTERVAL + 1, STREAMS), geometry.history).astype(np.int32)
        length = random.integers(budget - 6, budget + 1, STREAMS).astype(np.int32)
        scores = random_scores(random, shape, geometry)
        context, state, wanted, wanted_swaps = jax.device_get(by_nodes(state, scores, length, held))
        inputs = (context, cooling, scores, length)
        after, cooling, swaps = jax.device_get(by_rows(*inputs, held))
        steps.append(((wanted, wanted_swaps, state), (after, swaps, cooling), inputs))
    return steps, held


@pytest.mark.parametrize("name", CASES)
def test_growing_histories_are_focused_as_by_the_allocator_on_all_nodes(name):
    geometry, _, settings = CASES[name]
    steps, held = walked(name)
    for (wanted, wanted_swaps, state), (after, swaps, cooling), _ in steps:
        jax.tree.map(np.testing.assert_array_equal, after, wanted)
        np.testing.assert_array_equal(swaps, wanted_swaps)
        np.testing.assert_array_equal(cooling_of(cooling, geometry, settings), state.cooling)
    assert sum(swaps.sum() for _, (_, swaps, _), _ in steps) > 2 * STREAMS
    assert after.lod.max() >= min(geometry.max_lod, 3) and held.max() > geometry.block_size**geometry.max_lod


@pytest.mark.parametrize("name", ["deep", "omitting"])
def test_what_is_forgotten_is_gone_as_from_all_nodes(name):
    geometry, budget, settings = CASES[name]
    steps, held = walked(name)
    gone = geometry.block_size**geometry.max_lod
    (_, _, state), (context, _, cooling), _ = jax.tree.map(lambda leaf: leaf[held > gone], steps[-1])
    drop = jit(jax.vmap(lambda *both: places.drop_oldest(*both, gone, geometry)))
    after, cooling = jax.device_get(drop(context, cooling))

    @jit
    @jax.vmap
    def by_nodes(state, held):
        state = allocator.drop_oldest(state, gone, geometry)
        return state, allocator.to_context(state, geometry, capacity=budget + INTERVAL, tokens=held)

    state, wanted = jax.device_get(by_nodes(state, held[held > gone] - gone))
    jax.tree.map(np.testing.assert_array_equal, after, wanted)
    np.testing.assert_array_equal(cooling_of(cooling, geometry, settings), state.cooling)
    assert (held > gone).any() and (after.length < context.length).all()


def test_nine_million_tokens_before_it_all_change_nothing():
    """Nine gists of a million tokens, which nothing asks to expand: what is behind them is edited as without them."""
    blocks, ahead = 9, 9 * 2**20
    geometry, (_, _, settings) = dataclasses.replace(DEEP, history=2**24, max_lod=20), CASES["deep"]
    steps, held = walked("deep")
    _, (after, swaps, _), (context, cooling, scores, length) = steps[-1]

    def behind(first, rows):
        return np.concatenate([np.broadcast_to(first, (STREAMS, blocks)).astype(rows.dtype), rows], axis=1)

    def moved(context):
        start = np.where(context.valid, context.start + ahead, geometry.history)
        gists = np.arange(blocks) * 2**20
        return WorkingContext(behind(gists, start), behind(20, context.lod), behind(True, context.valid))

    most = places.nothing_cools(blocks + context.start.shape[1], geometry, settings=settings).lod.shape[1]
    room = [(0, 0), (0, 0), (0, most - cooling.lod.shape[2])]
    cooling = places.Cooling(np.pad(cooling.start + ahead, room), np.pad(cooling.lod, room))
    edit = functools.partial(places.edit, geometry=geometry, settings=settings)
    run = jit(jax.vmap(lambda *inputs, held: edit(*inputs, tokens=held)))
    found = run(moved(context), cooling, behind(-2, scores), length + blocks, held=held + ahead)
    jax.tree.map(np.testing.assert_array_equal, (found[0], found[2]), (moved(after), swaps))


def test_nothing_is_as_long_as_the_history():
    def program(history):
        geometry = Geometry(history=history, block_size=8, max_lod=7, recent_tokens=4)
        rows = np.zeros(160, np.int32)
        context = WorkingContext(rows, rows, rows > 0)
        cooling = places.nothing_cools(160, geometry, settings=GREEDY)
        edit = functools.partial(places.edit, geometry=geometry, settings=GREEDY)
        return str(jax.make_jaxpr(edit)(context, cooling, rows.astype(np.float32), np.int32(128), tokens=np.int32(9)))

    short, long = program(1000), program(12_345_678)
    assert long == re.sub(r"\b1000\b", "12345678", short)
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\[([0-9,]+)\]", long)]
    assert 160 * 8 <= max(sizes) < 160 * 200  # scores of blocks; what cools


# Of 6 blocks, 4 compete; the last two pay for any of them, whatever the noise.
FLAT = Geometry(history=15, block_size=2, max_lod=1, recent_tokens=3)
COMPETING = np.asarray([0.5, -0.25, 0.125, 0.75])
DRAWS = 8192


@functools.cache
def sampled(settings, *, expand):
    """How often each of the competing nodes is edited in a step, [4]."""
    gists = [(2 * block, 1) for block in range(6) if (block < 4) == expand]
    tokens = [(token, 0) for token in range(15) if (token // 2 * 2, 1) not in gists]
    entries = sorted(gists + tokens)
    payer = -1e5 if expand else 1e5
    of = [*COMPETING, payer, payer, 0, 0]
    start, lod = (np.asarray(column, np.int32) for column in zip(*entries, strict=True))
    context = WorkingContext(start, lod, np.ones(len(start), bool))
    scores = np.asarray([of[token // 2] for token in start], np.float32)
    none = places.nothing_cools(len(start), FLAT, settings=settings)

    @jit
    @jax.vmap
    def draw(key):
        options = {"settings": settings, "tokens": 15, "key": key}
        after, _, swaps = places.edit(context, none, scores, len(start), FLAT, **options)
        wanted = (after.start[:, None] == 2 * jnp.arange(4)[None]) & (after.lod == 1)[:, None]
        return jnp.any(wanted, axis=0) != expand, swaps

    edited, swaps = jax.device_get(draw(jax.random.split(jax.random.key(0), DRAWS)))
    assert (swaps == settings.max_edits).all()
    return edited.mean(axis=0)


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "collapse"])
def test_swaps_are_sampled_by_the_softmax_of_the_scores(expand):
    found = sampled(FocusConfig(max_edits=1, temperature=0.5), expand=expand)
    weights = np.exp((COMPETING if expand else -COMPETING) / 0.5)
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.02)


def test_sampling_without_a_key_is_an_error():
    settings, rows = FocusConfig(temperature=0.5), np.zeros(8, np.int32)
    none = places.nothing_cools(8, FLAT, settings=settings)
    edit = functools.partial(places.edit, length=8, geometry=FLAT, settings=settings, tokens=0)
    with pytest.raises(ValueError, match=r"temperature 0\.5 .*key"):
        jax.eval_shape(edit, WorkingContext(rows, rows, rows > 0), none, np.zeros(8, np.float32))
