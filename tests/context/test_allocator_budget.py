"""The contexts of one length: the cold start, and the edits that a budget demands."""

import itertools

import jax
import numpy as np
import pytest

from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig, FocusState
from lensjax.context.geometry import Geometry
from tests import reference
from tests.context.situations import (
    HAND,
    OMITTING,
    assert_same_state,
    by_node,
    compiled_fit,
    each,
    legal_cuts,
    listed,
    random_cases,
    row_of,
    slow_allocator,
    state_of,
)
from tests.small import jit


def uniform(lengths, geometry):
    """The entries of a cold start of each length."""
    states = jit(jax.vmap(lambda length: allocator.uniform(length, geometry)))(np.asarray(lengths, np.int32))
    return listed(states, geometry)


@each
def test_the_cold_start_is_legal_exact_and_of_no_more_levels_than_needed(geometry):
    def levels(entries):
        return reference.level_counts(entries, geometry.max_lod)[:-1]

    lengths = range(geometry.shortest - 3, geometry.history + 3)
    wanted = [geometry.length(max(length, geometry.shortest)) for length in lengths]
    found = uniform(lengths, geometry)
    assert set(found) <= set(legal_cuts(geometry))
    assert [len(reference.read(entries, geometry)) for entries in found] == wanted
    assert set(wanted) == reference.reachable_lengths(geometry)
    for entries in found:
        alike = [cut for cut in legal_cuts(geometry) if len(cut) == len(entries)]
        assert levels(entries) == min(levels(cut) for cut in alike)


def test_the_cold_start_uses_two_neighbouring_levels_where_that_works_out():
    geometry = Geometry(history=18, block_size=2, max_lod=3, recent_tokens=2)
    for entries in uniform(range(geometry.shortest, geometry.history + 1), geometry):
        levels = {lod for start, lod in entries if start < 16}
        assert max(levels) - min(levels) <= 1


def test_a_start_is_uniform_or_the_last_tokens_where_the_others_may_be_left_out():
    lengths = np.arange(OMITTING.shortest - 2, OMITTING.history + 3, dtype=np.int32)
    found = {
        name: listed(
            jit(jax.vmap(lambda n, name=name: allocator.start(n, OMITTING, settings=FocusConfig(start=name))))(lengths),
            OMITTING,
        )
        for name in ("uniform", "recency")
    }
    assert found["uniform"] == uniform(lengths, OMITTING)
    for length, entries in zip(lengths.tolist(), found["recency"], strict=True):
        wanted = OMITTING.length(max(length, OMITTING.shortest))
        last = [(token, 0) for token in range(29 - wanted, 26)]
        assert reference.read(entries, OMITTING) == [(0, 0), (1, 0), (2, 0), *last]
        recency = contexts.recency(wanted, OMITTING, capacity=OMITTING.history)
        assert entries == tuple(reference.entries_of(recency))
    with pytest.raises(ValueError, match=r"recency needs context\.omit"):
        allocator.start(20, HAND, settings=FocusConfig(start="recency"))


def test_the_cold_start_spreads_detail_evenly():
    geometry = Geometry(history=84, block_size=2, max_lod=1, recent_tokens=4)
    for length, entries in zip(range(44, 85), uniform(range(44, 85), geometry), strict=True):
        gists = [start // 2 for start, lod in entries if lod == 1]
        in_full = sorted(set(range(40)) - set(gists))
        assert len(gists) == 84 - length
        for kind, most in (gists, 2), (in_full, 3):
            longest_stretch_without = max(np.diff([-1, *kind, 40]))
            assert longest_stretch_without < most * 41 / (len(kind) + 1)


@each
def test_fit_reaches_every_length_from_every_start_as_the_reference_does(geometry):
    lengths = range(geometry.shortest - 2, geometry.history + 3)
    pairs = list(itertools.product(legal_cuts(geometry), lengths))
    cases = random_cases(geometry, seed=2, rows=len(pairs))
    starts, wanted = zip(*pairs, strict=True)
    cases = cases._replace(entries=starts, state=state_of(starts, geometry, cases.state.cooling))
    wanted = np.asarray(wanted, np.int32)
    found = jax.device_get(compiled_fit(geometry)(cases.state, cases.scores, wanted, np.int32(2), cases.held))
    for index, length in enumerate(wanted.tolist()):
        slow = slow_allocator(cases, index, geometry)
        slow.fit(by_node(cases.scores[index], geometry), length, held=geometry.history, cooldown=2)
        assert slow.length() == geometry.length(max(length, geometry.shortest))
        assert_same_state(row_of(found, index), slow, geometry)


@each
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
        assert cut in legal_cuts(geometry, held)


def test_fit_edits_what_cools_only_after_all_else():
    scores = np.asarray([-1.0, 0.5, 1.0, 0.75, 0.0, 0.0], np.float32)
    cooling = np.asarray([1, 0, 0, 3, 0, 0], np.int32)
    full, coarse = [False] * 6, [True] * 4 + [False] * 2
    state = FocusState(np.asarray([full, full, full, coarse, coarse]), np.tile(cooling, (5, 1)))
    lengths, held = np.asarray([9, 8, 7, 7, 8], np.int32), np.full(5, HAND.history, np.int32)
    found = compiled_fit(HAND)(state, np.tile(scores, (5, 1)), lengths, np.int32(0), held)
    assert found.collapsed[:, :4].astype(int).tolist() == [
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 1, 0, 1],
        [1, 0, 0, 1],
    ]
    assert not found.collapsed[:, 4:].any()
