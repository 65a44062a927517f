import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from lensjax.context import allocator, nodes
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusState
from lensjax.context.geometry import CutGeometry
from lensjax.context.working import MISSING
from lensjax.runs.config import FocusConfig
from tests import reference
from tests.small import jit

# Blocks without a parent, levels with one block, windows and tails that are no multiples of a block.
DEEP = CutGeometry(window=18, block_size=2, max_lod=3, recent_tokens=3)
WIDE = CutGeometry(window=23, block_size=3, max_lod=2, recent_tokens=4)
# 4 blocks in 2 parents before the tail, and 6 blocks without any.
HAND = CutGeometry(window=10, block_size=2, max_lod=2, recent_tokens=2)
FLAT = CutGeometry(window=15, block_size=2, max_lod=1, recent_tokens=3)
both = pytest.mark.parametrize("geometry", [DEEP, WIDE], ids=str)

GREEDY = FocusConfig(cooldown=2)
FEW = FocusConfig(max_edits=1, cooldown=0)
PICKY = FocusConfig(max_edits=3, expand_threshold=0.25, collapse_threshold=0.0)
BRISK = FocusConfig(max_edits=2)
SAMPLED = FocusConfig(temperature=0.5, top_k=3)
ROWS = 256
EXTREME = np.asarray([np.nan, np.inf, -np.inf, 1e38, -1e38, np.finfo(np.float32).max, 0.5, -0.5, 0], np.float32)


class Cases(NamedTuple):
    """Random situations of an allocator: as entries, and as the batch of arrays that says the same."""

    entries: list
    state: FocusState
    scores: np.ndarray
    held: np.ndarray


@functools.cache
def legal_cuts(geometry):
    return reference.legal_cuts(geometry)


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
    held = rng.integers(0, geometry.window + 1, rows) if partly else np.full(rows, geometry.window)
    shapes = [dataclasses.replace(geometry, window=int(tokens)) for tokens in held]
    entries = [legal_cuts(shape)[rng.integers(len(legal_cuts(shape)))] for shape in shapes]
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
        held = np.full(len(scores), geometry.window, np.int32) if held is None else held
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
    return jit(jax.vmap(lambda state: allocator.to_context(state, geometry, capacity=geometry.window)))


def listed(states, geometry):
    """The entries of each of a batch of states."""
    return [tuple(entries) for entries in reference.unstack(compiled_contexts(geometry)(states))]


@functools.cache
def compiled_refocus(geometry, settings):
    """One step: the next state, what the swaps did, the scores of nodes, the next context and its invariants."""

    @jit
    def refocus(state, scores, length, held, key):
        context = allocator.to_context(state, geometry, capacity=geometry.window, tokens=held)
        pooled = nodes.pool_scores(scores, context, geometry)
        options = {"settings": settings, "tokens": held, "key": key if settings.temperature else None}
        after, info = allocator.refocus(state, scores, context, length, geometry, **options)
        context = allocator.to_context(after, geometry, capacity=geometry.window, tokens=held)
        shape = {"window": held, "block_size": geometry.block_size, "recent_tokens": geometry.recent_tokens}
        return after, info, pooled, context, contexts.invariants(context, length=length, **shape)

    return refocus


# Where the nodes are; cuts, states and contexts.


def test_nodes_by_hand():
    # 11 tokens before the tail: 5 blocks of 2, 2 of 4, 1 of 8.
    table = nodes.table(CutGeometry(window=14, block_size=2, max_lod=3, recent_tokens=3))
    assert table.lod.tolist() == [1, 1, 1, 1, 1, 2, 2, 3]
    assert table.start.tolist() == [0, 2, 4, 6, 8, 0, 4, 0]
    assert table.end.tolist() == [2, 4, 6, 8, 10, 4, 8, 8]
    assert table.parent.tolist() == [5, 5, 6, 6, 8, 7, 7, 8]


@both
def test_cuts_and_states_are_two_views_of_one_thing(geometry):
    assert list(zip(*nodes.table(geometry)[1::-1], strict=True)) == reference.nodes(geometry)
    legal = legal_cuts(geometry)
    assert len(legal) > 80
    cuts = np.asarray([reference.cut_of(cut, geometry.window, geometry.block_size) for cut in legal], np.int32)

    @jit
    @jax.vmap
    def there_and_back(cut):
        state = allocator.from_cut(cut, geometry)
        context = allocator.to_context(state, geometry, capacity=geometry.window)
        return state, allocator.to_cut(state, geometry), context

    states, back, context = there_and_back(cuts)
    np.testing.assert_array_equal(states.collapsed, state_of(legal, geometry).collapsed)
    assert not states.cooling.any()
    np.testing.assert_array_equal(back, cuts)
    assert [tuple(entries) for entries in reference.unstack(context)] == legal


def test_tokens_that_are_not_there_yet_are_missing():
    state = row_of(state_of([[(0, 1)]], HAND), 0)
    cut = jit(lambda held: allocator.to_cut(state, HAND, tokens=held))(np.int32(6))
    assert cut.tolist() == [1, 1, 0, 0, 0, 0, *[MISSING] * 4]
    context = jit(lambda held: allocator.to_context(state, HAND, capacity=8, tokens=held))(np.int32(6))
    assert reference.entries_of(context) == [(0, 1), (2, 0), (3, 0), (4, 0), (5, 0)]


# The cold start.


def uniform(lengths, geometry):
    """The entries of a cold start of each length."""
    states = jit(jax.vmap(lambda length: allocator.uniform(length, geometry)))(np.asarray(lengths, np.int32))
    return listed(states, geometry)


@both
def test_the_cold_start_is_legal_exact_and_of_no_more_levels_than_needed(geometry):
    def levels(entries):
        return reference.level_counts(entries, geometry.max_lod)[:-1]

    lengths = range(geometry.shortest - 3, geometry.window + 3)
    wanted = [geometry.length(max(length, geometry.shortest)) for length in lengths]
    found = uniform(lengths, geometry)
    assert set(found) <= set(legal_cuts(geometry))
    assert [len(entries) for entries in found] == wanted
    assert set(wanted) == reference.reachable_lengths(geometry)
    for entries in found:
        assert levels(entries) == min(levels(cut) for cut in legal_cuts(geometry) if len(cut) == len(entries))


def test_the_cold_start_uses_two_neighbouring_levels_where_that_works_out():
    geometry = CutGeometry(window=18, block_size=2, max_lod=3, recent_tokens=2)
    for entries in uniform(range(geometry.shortest, geometry.window + 1), geometry):
        levels = {lod for start, lod in entries if start < 16}
        assert max(levels) - min(levels) <= 1


def test_the_cold_start_spreads_detail_evenly():
    geometry = CutGeometry(window=84, block_size=2, max_lod=1, recent_tokens=4)
    for length, entries in zip(range(44, 85), uniform(range(44, 85), geometry), strict=True):
        gists = [start // 2 for start, lod in entries if lod == 1]
        in_full = sorted(set(range(40)) - set(gists))
        assert len(gists) == 84 - length
        for kind, most in (gists, 2), (in_full, 3):
            longest_stretch_without = max(np.diff([-1, *kind, 40]))
            assert longest_stretch_without < most * 41 / (len(kind) + 1)


# Scores of nodes.


def test_node_scores_by_hand():
    context = reference.context_of([(0, 2), (4, 0), (5, 0), (6, 1), (8, 0), (9, 0)], window=10, capacity=8)
    scores = np.asarray([0.5, 0.25, 0.75, -0.5, 0.9, 0.9, np.nan, np.nan], np.float32)
    found = by_node(jit(lambda row: nodes.pool_scores(row, context, HAND))(scores), HAND)
    assert found.pop((0, 2)) == found.pop((0, 1)) == found.pop((2, 1)) == 0.5  # a gist, and what is inside of it
    assert found == {(4, 1): 0.5, (6, 1): -0.5, (4, 2): 0.0}


@both
def test_node_scores_equal_the_reference(geometry):
    legal = legal_cuts(geometry)
    rng = np.random.default_rng(1)
    capacity = geometry.window + 2
    batch = [reference.context_of(cut, window=geometry.window, capacity=capacity) for cut in legal]
    batch = jax.tree.map(lambda *rows: np.stack(rows), *batch)
    scores = rng.uniform(-1, 1, batch.start.shape).astype(np.float32)
    pool = jit(jax.vmap(lambda row, context: nodes.pool_scores(row, context, geometry)))
    expected = [
        [reference.node_score(node, cut, row[: len(cut)], geometry.block_size) for node in reference.nodes(geometry)]
        for cut, row in zip(legal, scores, strict=True)
    ]
    np.testing.assert_allclose(pool(np.where(batch.valid, scores, np.nan), batch), expected, atol=1e-6)


@pytest.mark.parametrize("block_size", [3, 8])
def test_equal_scores_stay_equal_to_the_bit(block_size):
    geometry = CutGeometry(window=2 * block_size**2 + 2, block_size=block_size, max_lod=2, recent_tokens=2)
    values = np.linspace(-1, 1, 64, dtype=np.float32)
    rows = np.repeat(values[:, None], geometry.window, axis=1)  # given whole: XLA would know a constant's mean
    pooled = jit(jax.vmap(lambda row: nodes.pool_tokens(row, geometry)))(rows)
    np.testing.assert_array_equal(pooled, np.broadcast_to(values[:, None], pooled.shape))


# What the budget demands.


@both
def test_fit_reaches_every_length_from_every_start_as_the_reference_does(geometry):
    lengths = range(geometry.shortest - 2, geometry.window + 3)
    pairs = list(itertools.product(legal_cuts(geometry), lengths))
    cases = random_cases(geometry, seed=2, rows=len(pairs))
    starts, wanted = zip(*pairs, strict=True)
    cases = cases._replace(entries=starts, state=state_of(starts, geometry, cases.state.cooling))
    wanted = np.asarray(wanted, np.int32)
    found = jax.device_get(compiled_fit(geometry)(cases.state, cases.scores, wanted, np.int32(2), cases.held))
    for index, length in enumerate(wanted.tolist()):
        slow = slow_allocator(cases, index, geometry)
        slow.fit(by_node(cases.scores[index], geometry), length, held=geometry.window, cooldown=2)
        assert len(slow.entries) == geometry.length(max(length, geometry.shortest))
        assert_same_state(row_of(found, index), slow, geometry)


@both
def test_fit_of_a_partly_filled_window_equals_the_reference(geometry):
    cases = random_cases(geometry, seed=3, partly=True)
    rng = np.random.default_rng(4)
    wanted = rng.integers(0, cases.held + 3).astype(np.int32)
    found = jax.device_get(compiled_fit(geometry)(cases.state, cases.scores, wanted, np.int32(0), cases.held))
    for index, (length, held) in enumerate(zip(wanted.tolist(), cases.held.tolist(), strict=True)):
        slow = slow_allocator(cases, index, geometry)
        slow.fit(by_node(cases.scores[index], geometry), length, held=held, cooldown=0)
        assert_same_state(row_of(found, index), slow, geometry)
        cut = tuple(sorted(slow.entries))
        assert cut in legal_cuts(dataclasses.replace(geometry, window=held))


def test_fit_edits_what_cools_only_after_all_else():
    scores = np.asarray([-1.0, 0.5, 1.0, 0.75, 0.0, 0.0], np.float32)
    cooling = np.asarray([1, 0, 0, 3, 0, 0], np.int32)
    full, coarse = [False] * 6, [True] * 4 + [False] * 2
    state = FocusState(np.asarray([full, full, full, coarse, coarse]), np.tile(cooling, (5, 1)))
    lengths, held = np.asarray([9, 8, 7, 7, 8], np.int32), np.full(5, HAND.window, np.int32)
    found = compiled_fit(HAND)(state, np.tile(scores, (5, 1)), lengths, np.int32(0), held)
    assert found.collapsed[:, :4].astype(int).tolist() == [
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 1, 0, 1],
        [1, 0, 0, 1],
    ]
    assert not found.collapsed[:, 4:].any()


# What the policy asks for.


@both
@pytest.mark.parametrize("settings", [GREEDY, FEW, PICKY], ids=["greedy", "few", "picky"])
def test_swaps_equal_the_reference(geometry, settings):
    cases = random_cases(geometry, seed=5, partly=True)
    after, info = jax.device_get(compiled_swap(geometry, settings)(cases.state, cases.scores, cases.held))
    counts = set()
    for index, held in enumerate(cases.held.tolist()):
        slow = slow_allocator(cases, index, geometry)
        swaps = slow.swap(by_node(cases.scores[index], geometry), settings, held=held)
        assert_same_state(row_of(after, index), slow, geometry)
        done = row_of(info, index)
        assert done.swaps == len(swaps)
        assert marked(done.expanded, geometry) == {gist for gist, _ in swaps}
        assert marked(done.collapsed, geometry) == {block for _, block in swaps}
        counts.add(len(swaps))
    assert {0, 1} <= counts and max(counts) >= min(2, settings.max_edits)


@both
@pytest.mark.parametrize("settings", [GREEDY, FEW, PICKY, SAMPLED], ids=["greedy", "few", "picky", "sampled"])
def test_swaps_keep_the_budget_the_thresholds_and_the_limit(geometry, settings):
    cases = random_cases(geometry, seed=6)
    after, info = jax.device_get(compiled_swap(geometry, settings)(cases.state, cases.scores))
    before, edited = cases.state.collapsed, info.expanded | info.collapsed
    np.testing.assert_array_equal(after.collapsed.sum(axis=1), before.sum(axis=1))
    # A node is edited at most once, or the two lists would not explain what has changed.
    np.testing.assert_array_equal(before & ~after.collapsed, info.expanded)
    np.testing.assert_array_equal(after.collapsed & ~before, info.collapsed)
    np.testing.assert_array_equal(info.expanded.sum(axis=1), info.swaps)
    np.testing.assert_array_equal(info.collapsed.sum(axis=1), info.swaps)
    assert 0 < info.swaps.max() <= settings.max_edits
    assert not (edited & (cases.state.cooling > 0)).any()
    assert (cases.scores[info.expanded] >= settings.expand_threshold).all()
    assert (cases.scores[info.collapsed] <= settings.collapse_threshold).all()
    assert set(listed(after, geometry)) <= set(legal_cuts(geometry))


@both
def test_the_gain_of_each_swap_exceeds_its_cost(geometry):
    cases = random_cases(geometry, seed=7)
    _, info = jax.device_get(compiled_swap(geometry, GREEDY)(cases.state, cases.scores))
    # Gains fall and costs rise from swap to swap, so that the last one tells about all.
    least_gain = np.where(info.expanded, cases.scores, np.inf).min(axis=1)
    highest_cost = np.where(info.collapsed, cases.scores, -np.inf).max(axis=1)
    assert (least_gain > highest_cost).all()
    flat = np.full_like(cases.scores, 0.3)
    assert not compiled_swap(geometry, GREEDY)(cases.state, flat)[1].swaps.any()


@pytest.mark.parametrize("none", [{"expand_threshold": 1.5}, {"collapse_threshold": -1.5}], ids=str)
def test_thresholds_that_nothing_meets_leave_the_context_alone(none):
    cases = random_cases(DEEP, seed=8)
    after, info = compiled_swap(DEEP, FocusConfig(**none))(cases.state, cases.scores)
    np.testing.assert_array_equal(after.collapsed, cases.state.collapsed)
    np.testing.assert_array_equal(after.cooling, np.maximum(cases.state.cooling - 1, 0))
    assert not info.swaps.any() and not info.expanded.any() and not info.collapsed.any()


def test_swaps_by_hand():
    tail = [(8, 0), (9, 0)]
    start = [(0, 1), (2, 1), (4, 0), (5, 0), (6, 0), (7, 0), *tail]
    scores = {(0, 1): 0.5, (2, 1): 0.75, (4, 1): -0.5, (6, 1): 0.6}
    one = [(0, 1), (2, 0), (3, 0), (4, 1), (6, 0), (7, 0), *tail]  # the second swap would lose: 0.5 for 0.6
    assert swap_once(start, scores, HAND, GREEDY) == one
    two = [(token, 0) for token in range(4)] + [(4, 1), (6, 1), *tail]
    assert swap_once(start, scores | {(6, 1): 0.4}, HAND, GREEDY) == two
    assert swap_once(start, scores | {(6, 1): 0.4}, HAND, FEW) == one
    assert swap_once(start, scores | {(6, 1): 0.5}, HAND, GREEDY) == one  # a tie is no gain
    other = [(0, 0), (1, 0), (2, 1), (4, 1), (6, 0), (7, 0), *tail]
    assert swap_once(start, scores, HAND, FEW, cooling=[0, 1, 0, 0, 0, 0]) == other


def test_what_a_swap_made_is_left_alone_in_its_step():
    geometry = CutGeometry(window=18, block_size=2, max_lod=2, recent_tokens=2)
    end = [(token, 0) for token in range(8, 18)]
    start = [(0, 2), (4, 1), (6, 0), (7, 0), *end]
    # Next in line would be the gist (0, 1) that the first swap shows, and the block (4, 2) that it completes.
    scores = {(0, 2): 1.0, (0, 1): 1.0, (2, 1): 1.0, (4, 1): -0.5, (6, 1): -1.0, (4, 2): -1.0}
    after = [(0, 1), (2, 1), (4, 1), (6, 1), *end]
    assert swap_once(start, scores, geometry, FocusConfig(cooldown=0)) == after
    later = [(0, 0), (1, 0), (2, 1), (4, 2), *end]
    assert swap_once(after, scores, geometry, FEW) == later


def test_the_parent_of_what_is_expanded_is_not_collapsed_for_it():
    start = [(0, 1), (2, 1), (4, 0), (5, 0), (6, 0), (7, 0), (8, 0), (9, 0)]
    scores = {(0, 1): 1.0, (0, 2): -1.0, (4, 1): 0.5, (6, 1): 0.25}
    after = [(0, 0), (1, 0), (2, 1), (4, 0), (5, 0), (6, 1), (8, 0), (9, 0)]
    assert swap_once(start, scores, HAND, GREEDY) == after


@pytest.mark.parametrize("cooldown", [0, 1, 3])
def test_an_edit_can_be_reversed_once_it_has_cooled_and_no_sooner(cooldown):
    # Two blocks, and a policy that always wants the other one.
    geometry = CutGeometry(window=6, block_size=2, max_lod=1, recent_tokens=2)
    swap = compiled_swap(geometry, FocusConfig(cooldown=cooldown))
    state, swapped = FocusState(np.asarray([[True, False]]), np.zeros((1, 2), np.int32)), []
    for _ in range(9):
        state, info = swap(state, np.where(state.collapsed, 1, -1).astype(np.float32))
        swapped.append(int(info.swaps[0]))
    assert swapped == [int(step % (cooldown + 1) == 0) for step in range(9)]


@both
def test_over_many_steps_no_node_is_edited_while_it_cools(geometry):
    rng, cooldown = np.random.default_rng(9), GREEDY.cooldown
    cases = random_cases(geometry, seed=9)
    state, waits = cases.state, set()
    last = np.where(state.cooling > 0, state.cooling - cooldown - 1, -100)
    for step in range(10):
        state, info = compiled_swap(geometry, GREEDY)(state, random_scores(rng, last.shape))
        edited = np.asarray(info.expanded | info.collapsed)
        waits |= set((step - last)[edited].tolist())
        last = np.where(edited, step, last)
    assert min(waits) == cooldown + 1


def test_where_nothing_can_be_edited_nothing_is():
    cases = random_cases(DEEP, seed=10)
    rng = np.random.default_rng(10)
    in_full = [[(token, 0) for token in range(DEEP.window)]] * ROWS
    shortest = [min(legal_cuts(DEEP), key=len)] * ROWS
    # As many tokens as the protected tail and a part of the first block.
    few = np.full(ROWS, DEEP.recent_tokens + 1, np.int32)
    for cuts, held in (in_full, few), (in_full, None), (shortest, None):
        state = state_of(cuts, DEEP)
        after, info = compiled_swap(DEEP, GREEDY)(state, cases.scores, held)
        np.testing.assert_array_equal(after.collapsed, state.collapsed)
        assert not info.swaps.any() and not after.cooling.any()
    lengths = rng.integers(0, DEEP.window, ROWS).astype(np.int32)
    after = compiled_fit(DEEP)(state_of(in_full, DEEP), cases.scores, lengths, np.int32(1), few)
    assert not after.collapsed.any() and not after.cooling.any()


# Sampled swaps.

# Of 6 blocks, 4 compete; the last two pay for any of them, whatever the noise.
COMPETING = np.asarray([0.5, -0.25, 0.125, 0.75])
DRAWS = 8192


def draw(settings, *, expand, seed=0):
    """Which of the competing nodes are edited in each of many draws, bool[DRAWS, 4]."""
    payer = -1e5 if expand else 1e5
    scores = np.asarray([*COMPETING, payer, payer], np.float32)
    state = FocusState(np.asarray([expand] * 4 + [not expand] * 2), np.zeros(6, np.int32))
    state, scores = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (DRAWS, 6)), (state, scores))
    _, info = jax.device_get(compiled_swap(FLAT, settings)(state, scores, key=jax.random.key(seed)))
    assert (info.swaps == min(settings.max_edits, 2)).all()
    return (info.expanded if expand else info.collapsed)[:, :4]


def softmax(values):
    return np.exp(values) / np.exp(values).sum()


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "collapse"])
def test_the_first_draw_follows_the_softmax_of_the_scores(expand):
    found = draw(FocusConfig(max_edits=1, temperature=0.5), expand=expand).mean(axis=0)
    expected = softmax((COMPETING if expand else -COMPETING) / 0.5)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_two_draws_are_without_replacement():
    found = draw(FocusConfig(max_edits=2, temperature=0.5), expand=True)
    p = softmax(COMPETING / 0.5)
    for a, b in itertools.combinations(range(4), 2):
        either_order = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        assert abs((found[:, a] & found[:, b]).mean() - either_order) < 0.02


def test_draws_come_from_the_best_candidates_only():
    hot = {"max_edits": 1, "temperature": 100.0}
    found = draw(FocusConfig(top_k=2, **hot), expand=True).mean(axis=0)
    np.testing.assert_allclose(found, [0.5, 0, 0, 0.5], atol=0.02)
    found = draw(FocusConfig(top_k=2, **hot), expand=False).mean(axis=0)
    np.testing.assert_allclose(found, [0, 0.5, 0.5, 0], atol=0.02)
    found = draw(FocusConfig(expand_threshold=0.5, **hot), expand=True).mean(axis=0)
    np.testing.assert_allclose(found, [0.5, 0, 0, 0.5], atol=0.02)


def test_the_same_key_makes_the_same_swaps():
    settings = FocusConfig(max_edits=1, temperature=0.5)
    np.testing.assert_array_equal(draw(settings, expand=True), draw(settings, expand=True))
    assert (draw(settings, expand=True) != draw(settings, expand=True, seed=1)).any()


@both
def test_a_low_temperature_is_greedy(geometry):
    cases = random_cases(geometry, seed=11)
    ranks = np.tile(np.linspace(-1, 1, cases.scores.shape[1], dtype=np.float32), (ROWS, 1))
    distinct = np.random.default_rng(11).permuted(ranks, axis=1)
    greedy = compiled_swap(geometry, GREEDY)(cases.state, distinct)
    cold = compiled_swap(geometry, dataclasses.replace(GREEDY, temperature=1e-6))(cases.state, distinct)
    jax.tree.map(np.testing.assert_array_equal, greedy, cold)


def test_sampling_without_a_key_is_an_error():
    state, scores = row_of(state_of([[(0, 1)]], HAND), 0), np.zeros(6, np.float32)
    with pytest.raises(ValueError, match=r"temperature 0\.5 .*key"):
        jax.eval_shape(lambda one: allocator.swap(one, scores, HAND, settings=SAMPLED), state)


# Scores that are not finite, or nearly not.


@both
def test_means_of_extreme_scores_are_in_range(geometry):
    size, most = geometry.block_size, np.finfo(np.float32).max
    blocks = [[most] * size, [-most, most, *[0.0] * (size - 2)], [-np.inf, *[1.0] * (size - 1)]]
    blocks += [[np.inf, *[-np.inf] * (size - 1)], [np.nan, *[np.inf] * (size - 1)]]
    tokens = np.zeros(geometry.window, np.float32)
    tokens[: 5 * size] = np.ravel(blocks)
    found = np.asarray(jit(lambda row: nodes.pool_tokens(row, geometry))(tokens))
    np.testing.assert_array_equal(found[:5], np.asarray([most, 0, -np.inf, np.inf, np.nan], np.float32))
    above = nodes.by_level(found, geometry)[1]
    assert above[0] == (np.float32(most) / 2 if size == 2 else -np.inf)
    assert above[1] == np.inf if size == 2 else np.isnan(above[1])


@both
@pytest.mark.parametrize("settings", [GREEDY, PICKY], ids=["greedy", "picky"])
def test_extreme_scores_have_their_place_in_the_order(geometry, settings):
    cases, rng = random_cases(geometry, seed=13), np.random.default_rng(13)
    scores = rng.choice(EXTREME, cases.scores.shape)
    lengths = rng.integers(geometry.shortest, geometry.window + 1, ROWS).astype(np.int32)
    fitted = jax.device_get(compiled_fit(geometry)(cases.state, scores, lengths, np.int32(1), cases.held))
    swapped, _ = jax.device_get(compiled_swap(geometry, settings)(cases.state, scores))
    # Python compares infinities as it should.
    scores = np.where(np.isnan(scores), -np.inf, scores)
    for index, length in enumerate(lengths.tolist()):
        by_hand = by_node(scores[index], geometry)
        slow = slow_allocator(cases, index, geometry)
        slow.fit(by_hand, length, held=geometry.window, cooldown=1)
        assert_same_state(row_of(fitted, index), slow, geometry)
        slow = slow_allocator(cases, index, geometry)
        slow.swap(by_hand, settings, held=geometry.window)
        assert_same_state(row_of(swapped, index), slow, geometry)


@examples(max_examples=60)
@given(
    settings=st.sampled_from([GREEDY, PICKY, SAMPLED]),
    scores=st.lists(
        st.sampled_from(EXTREME.tolist()) | st.floats(width=32), min_size=DEEP.window, max_size=DEEP.window
    ),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_scores_give_a_legal_context_of_the_length(settings, scores, seed):
    rng = np.random.default_rng(seed)
    cut = legal_cuts(DEEP)[rng.integers(len(legal_cuts(DEEP)))]
    state = row_of(state_of([cut], DEEP, rng.integers(0, 3, len(reference.nodes(DEEP)))), 0)
    for length in rng.integers(DEEP.shortest, DEEP.window + 1, 3):
        arguments = np.float32(scores), np.int32(length), np.int32(DEEP.window), jax.random.key(seed)
        state, _, _, context, holds = compiled_refocus(DEEP, settings)(state, *arguments)
        assert all(holds.values()), holds
        assert len(reference.entries_of(context)) == length


# Whole steps.


@both
def test_refocus_equals_the_reference_over_many_steps(geometry):
    rng = np.random.default_rng(12)
    for _ in range(8):
        held = int(rng.integers(0, geometry.window + 1))
        state = row_of(state_of([[]], geometry), 0)
        slow = reference.Allocator([(token, 0) for token in range(held)], geometry, {})
        for _ in range(8):
            length = int(rng.integers(0, held + 1))
            # Means over 3 and 9 tokens are exact, and there are ties.
            scores = (9 * rng.integers(-3, 4, geometry.window) / 32).astype(np.float32)
            arguments = state, scores, np.int32(length), np.int32(held), jax.random.key(0)
            state, info, pooled, _, _ = compiled_refocus(geometry, BRISK)(*arguments)
            slow.fit(by_node(pooled, geometry), length, held=held, cooldown=BRISK.cooldown)
            swaps = slow.swap(by_node(pooled, geometry), BRISK, held=held)
            assert_same_state(state, slow, geometry)
            assert info.swaps == len(swaps)
            more = int(rng.integers(0, geometry.window - held + 1)) // 2
            slow.entries |= {(token, 0) for token in range(held, held + more)}
            held += more


def test_the_budget_is_met_whatever_the_thresholds():
    never = FocusConfig(expand_threshold=1.5, collapse_threshold=-1.5)
    state = row_of(state_of([legal_cuts(DEEP)[100]], DEEP), 0)
    scores = np.linspace(-1, 1, DEEP.window, dtype=np.float32)
    for length in DEEP.shortest, DEEP.window, 12:
        arguments = np.int32(length), np.int32(DEEP.window), jax.random.key(0)
        state, info, _, context, _ = compiled_refocus(DEEP, never)(state, scores, *arguments)
        assert context.length == length
        assert info.swaps == 0


@examples(max_examples=40)
@given(
    settings=st.sampled_from([GREEDY, PICKY, SAMPLED]),
    first=st.integers(1, DEEP.window),
    steps=st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1), st.booleans()), min_size=1, max_size=6),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_sequence_of_steps_holds_the_invariants_and_the_length(settings, first, steps, seed):
    rng, held = np.random.default_rng(seed), first
    state = row_of(state_of([[]], DEEP), 0)
    for more, depth, is_coarse in steps:
        held = min(held + more, DEEP.window)
        filled = dataclasses.replace(DEEP, window=max(held, DEEP.recent_tokens))
        shortest = min(filled.shortest, held)
        length = held - round(depth * (held - shortest))
        scores = rng.uniform(-1, 1, DEEP.window).astype(np.float32)
        scores = np.round(2 * scores) / 2 if is_coarse else scores
        key = jax.random.key(rng.integers(2**31))
        step = compiled_refocus(DEEP, settings)
        state, _, _, context, holds = step(state, scores, np.int32(length), np.int32(held), key)
        assert {name for name, is_held in holds.items() if not is_held} == set()
        assert len(reference.entries_of(context)) == length


# Several steps.


@jax.jit
def taste(context, weight):
    """A policy that never comes to rest: a hash of each entry and of the whole context, in [-1, 1]."""
    whole = jnp.sum(context.start * context.lod, dtype=jnp.int32)
    return (weight * (7 * context.start + 13 * context.lod + whole) % 101).astype(jnp.float32) / 50 - 1


@functools.cache
def compiled_iterate(settings):
    def iterate(state, weight, length, key):
        score = functools.partial(taste, weight=weight)
        shape = {"steps": 5, "capacity": DEEP.window}
        return allocator.iterate(state, score, length, DEEP, settings=settings, key=key, **shape)

    return iterate


def test_iterate_is_a_loop_of_refocus_and_compiles_once_for_all_lengths(compiles):
    step, iterate = compiled_refocus(DEEP, BRISK), jit(compiled_iterate(BRISK))
    key, lengths = jax.random.key(0), [np.int32(length) for length in (12, 10, 14)]
    start = row_of(state_of([legal_cuts(DEEP)[17]], DEEP), 0)
    weight = np.int32(37)
    with compiles() as names:
        found = [iterate(start, weight, length, key) for length in lengths]
    assert len(names) == 1
    for length, (last, made) in zip(lengths, found, strict=True):
        state, listed = start, [legal_cuts(DEEP)[17]]
        for _ in range(5):
            context = reference.context_of(listed[-1], window=DEEP.window, capacity=DEEP.window)
            state, _, _, context, _ = step(state, np.asarray(taste(context, weight)), length, np.int32(18), key)
            listed.append(tuple(reference.entries_of(context)))
        assert [tuple(entries) for entries in reference.unstack(made)] == listed
        assert len(set(listed)) > 2
        assert made.length.tolist() == [len(listed[0]), *[length] * 5]
        np.testing.assert_array_equal(last.collapsed, state.collapsed)
        np.testing.assert_array_equal(last.cooling, state.cooling)


def test_iterate_under_vmap_is_a_loop():
    iterate, rows = compiled_iterate(BRISK), 6
    starts, weights = state_of(legal_cuts(DEEP)[::40][:rows], DEEP), np.arange(31, 31 + rows, dtype=np.int32)
    keys, lengths = jax.random.split(jax.random.key(0), rows), np.arange(8, 8 + rows, dtype=np.int32)
    batched = jit(jax.vmap(iterate))(starts, weights, lengths, keys)
    single = jit(iterate)
    for row in range(rows):
        one = single(row_of(starts, row), weights[row], lengths[row], keys[row])
        jax.tree.map(np.testing.assert_array_equal, row_of(batched, row), one)


def test_each_sampled_step_draws_anew_and_the_same_key_draws_the_same():
    # A policy that likes all entries as well: only the draws decide.
    settings = FocusConfig(max_edits=1, temperature=1.0, cooldown=0)

    @jit
    def walk(key):
        start = allocator.uniform(12, FLAT)
        even = {"policy": lambda context: jnp.zeros(FLAT.window), "length": 12, "geometry": FLAT}
        return allocator.iterate(start, **even, steps=100, capacity=FLAT.window, settings=settings, key=key)[1]

    one, again, other = (reference.unstack(walk(jax.random.key(seed))) for seed in (0, 0, 1))
    assert one == again != other
    after = {}
    for here, there in itertools.pairwise(tuple(map(tuple, one))):
        after.setdefault(here, set()).add(there)
    # One noise for all steps would lead from one context to the same next one always.
    assert max(len(contexts) for contexts in after.values()) > 2


# How much changes.


def test_swap_rate_by_hand():
    before = [(0, 1), (2, 1), *((token, 0) for token in range(4, 10))]
    swapped = [(0, 0), (1, 0), (2, 1), (4, 1), *((token, 0) for token in range(6, 10))]
    merged = [(0, 2), *before[2:]]
    rate = jit(functools.partial(allocator.swap_rate, window=10))
    first, *later = (reference.context_of(cut, window=10, capacity=9) for cut in (before, swapped, merged))
    assert [float(rate(first, after)) for after in later] == [3 / 8, np.float32(1 / 7)]


def test_swap_rate_is_the_share_of_new_entries():
    legal = legal_cuts(WIDE)
    batch = [reference.context_of(cut, window=WIDE.window, capacity=WIDE.window) for cut in legal]
    batch = jax.tree.map(lambda *rows: np.stack(rows), *batch)
    rate = functools.partial(allocator.swap_rate, window=WIDE.window)
    found = jit(jax.vmap(jax.vmap(rate, in_axes=(None, 0)), in_axes=(0, None)))(batch, batch)
    expected = [[len(set(after) - set(before)) / len(after) for after in legal] for before in legal]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not np.diag(found).any()
