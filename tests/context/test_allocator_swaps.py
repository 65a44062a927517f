"""Swaps: what the policy asks for."""

import jax
import numpy as np
import pytest

from lensjax.context.allocator import FocusConfig, FocusState
from lensjax.context.geometry import Geometry
from tests.context.situations import (
    CAREFUL,
    DEEP,
    EXTREME,
    FEW,
    GREEDY,
    HAND,
    PICKY,
    ROWS,
    SAMPLED,
    assert_same_state,
    by_node,
    compiled_fit,
    compiled_swap,
    each,
    legal_cuts,
    listed,
    marked,
    random_cases,
    random_scores,
    row_of,
    slow_allocator,
    state_of,
    swap_once,
)


@each
@pytest.mark.parametrize("settings", [GREEDY, FEW, PICKY, CAREFUL], ids=["greedy", "few", "picky", "careful"])
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


@each
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


@each
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


def test_a_swap_promises_more_than_the_margin():
    tail = [(8, 0), (9, 0)]
    start = [(0, 1), (2, 1), (4, 0), (5, 0), (6, 0), (7, 0), *tail]
    scores = {(0, 1): 0.5, (2, 1): 0.75, (4, 1): -0.5, (6, 1): 0.25}
    one = [(0, 1), (2, 0), (3, 0), (4, 1), (6, 0), (7, 0), *tail]
    two = [(token, 0) for token in range(4)] + [(4, 1), (6, 1), *tail]
    for margin, after in ((0.0, two), (0.125, two), (0.25, one), (1.125, one), (1.25, start), (2.0, start)):
        assert swap_once(start, scores, HAND, FocusConfig(margin=margin)) == after


def test_what_a_swap_made_is_left_alone_in_its_step():
    geometry = Geometry(history=18, block_size=2, max_lod=2, recent_tokens=2)
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
    geometry = Geometry(history=6, block_size=2, max_lod=1, recent_tokens=2)
    swap = compiled_swap(geometry, FocusConfig(cooldown=cooldown))
    state, swapped = FocusState(np.asarray([[True, False]]), np.zeros((1, 2), np.int32)), []
    for _ in range(9):
        state, info = swap(state, np.where(state.collapsed, 1, -1).astype(np.float32))
        swapped.append(int(info.swaps[0]))
    assert swapped == [int(step % (cooldown + 1) == 0) for step in range(9)]


@each
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
    in_full = [[(token, 0) for token in range(DEEP.history)]] * ROWS
    shortest = [min(legal_cuts(DEEP), key=len)] * ROWS
    # As many tokens as the protected tail and a part of the first block.
    few = np.full(ROWS, DEEP.recent_tokens + 1, np.int32)
    for cuts, held in (in_full, few), (in_full, None), (shortest, None):
        state = state_of(cuts, DEEP)
        after, info = compiled_swap(DEEP, GREEDY)(state, cases.scores, held)
        np.testing.assert_array_equal(after.collapsed, state.collapsed)
        assert not info.swaps.any() and not after.cooling.any()
    lengths = rng.integers(0, DEEP.history, ROWS).astype(np.int32)
    after = compiled_fit(DEEP)(state_of(in_full, DEEP), cases.scores, lengths, np.int32(1), few)
    assert not after.collapsed.any() and not after.cooling.any()


@each
@pytest.mark.parametrize("settings", [GREEDY, PICKY], ids=["greedy", "picky"])
def test_extreme_scores_have_their_place_in_the_order(geometry, settings):
    cases, rng = random_cases(geometry, seed=13), np.random.default_rng(13)
    scores = rng.choice(EXTREME, cases.scores.shape)
    lengths = rng.integers(geometry.shortest, geometry.history + 1, ROWS).astype(np.int32)
    fitted = jax.device_get(compiled_fit(geometry)(cases.state, scores, lengths, np.int32(1), cases.held))
    swapped, _ = jax.device_get(compiled_swap(geometry, settings)(cases.state, scores))
    # Python compares infinities as it should.
    scores = np.where(np.isnan(scores), -np.inf, scores)
    for index, length in enumerate(lengths.tolist()):
        by_hand = by_node(scores[index], geometry)
        slow = slow_allocator(cases, index, geometry)
        slow.fit(by_hand, length, held=geometry.history, cooldown=1)
        assert_same_state(row_of(fitted, index), slow, geometry)
        slow = slow_allocator(cases, index, geometry)
        slow.swap(by_hand, settings, held=geometry.history)
        assert_same_state(row_of(swapped, index), slow, geometry)
