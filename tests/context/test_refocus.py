"""Whole refocus steps, many of them, and how much they change."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from lensjax.context import allocator, refocus
from lensjax.context.allocator import FocusConfig
from tests import reference
from tests.context.situations import (
    BRISK,
    DEEP,
    EXTREME,
    FLAT,
    GREEDY,
    HAND,
    OMITTING,
    PICKY,
    SAMPLED,
    WIDE,
    assert_same_state,
    by_node,
    compiled_refocus,
    each,
    legal_cuts,
    row_of,
    state_of,
)
from tests.small import jit


def assert_is_cut(context, length, held=None):
    """A legal cut of the tokens held, of exactly that length."""
    entries = reference.entries_of(context)
    assert len(entries) == length
    assert tuple(entries) in legal_cuts(DEEP, held)


@examples(max_examples=60)
@given(
    settings=st.sampled_from([GREEDY, PICKY, SAMPLED]),
    scores=st.lists(
        st.sampled_from(EXTREME.tolist()) | st.floats(width=32), min_size=DEEP.history, max_size=DEEP.history
    ),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_scores_give_a_legal_context_of_the_length(settings, scores, seed):
    rng = np.random.default_rng(seed)
    cut = legal_cuts(DEEP)[rng.integers(len(legal_cuts(DEEP)))]
    state = row_of(state_of([cut], DEEP, rng.integers(0, 3, len(reference.nodes(DEEP)))), 0)
    for length in rng.integers(DEEP.shortest, DEEP.history + 1, 3):
        arguments = np.float32(scores), np.int32(length), np.int32(DEEP.history), jax.random.key(seed)
        state, _, _, context = compiled_refocus(DEEP, settings)(state, *arguments)
        assert_is_cut(context, length)


# Whole steps.


@each
def test_refocus_equals_the_reference_over_many_steps(geometry):
    rng = np.random.default_rng(12)
    for _ in range(8):
        held = int(rng.integers(0, geometry.history + 1))
        state = row_of(state_of([[]], geometry), 0)
        slow = reference.Allocator([(token, 0) for token in range(held)], geometry, {})
        for _ in range(8):
            length = int(rng.integers(0, held + 1))
            # Means over 3 and 9 tokens are exact, and there are ties.
            scores = (9 * rng.integers(-3, 4, geometry.history) / 32).astype(np.float32)
            arguments = state, scores, np.int32(length), np.int32(held), jax.random.key(0)
            state, info, pooled, _ = compiled_refocus(geometry, BRISK)(*arguments)
            slow.fit(by_node(pooled, geometry), length, held=held, cooldown=BRISK.cooldown)
            swaps = slow.swap(by_node(pooled, geometry), BRISK, held=held)
            assert_same_state(state, slow, geometry)
            assert info.swaps == len(swaps)
            more = int(rng.integers(0, geometry.history - held + 1)) // 2
            slow.entries |= {(token, 0) for token in range(held, held + more)}
            held += more


def test_the_budget_is_met_whatever_the_thresholds():
    never = FocusConfig(expand_threshold=1.5, collapse_threshold=-1.5)
    state = row_of(state_of([legal_cuts(DEEP)[100]], DEEP), 0)
    scores = np.linspace(-1, 1, DEEP.history, dtype=np.float32)
    for length in DEEP.shortest, DEEP.history, 12:
        arguments = np.int32(length), np.int32(DEEP.history), jax.random.key(0)
        state, info, _, context = compiled_refocus(DEEP, never)(state, scores, *arguments)
        assert context.length == length
        assert info.swaps == 0


@examples(max_examples=40)
@given(
    settings=st.sampled_from([GREEDY, PICKY, SAMPLED]),
    first=st.integers(1, DEEP.history),
    steps=st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1), st.booleans()), min_size=1, max_size=6),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_sequence_of_steps_gives_legal_contexts_of_the_length(settings, first, steps, seed):
    rng, held = np.random.default_rng(seed), first
    state = row_of(state_of([[]], DEEP), 0)
    for more, depth, is_coarse in steps:
        held = min(held + more, DEEP.history)
        filled = dataclasses.replace(DEEP, history=max(held, DEEP.recent_tokens))
        shortest = min(filled.shortest, held)
        length = held - round(depth * (held - shortest))
        scores = rng.uniform(-1, 1, DEEP.history).astype(np.float32)
        scores = np.round(2 * scores) / 2 if is_coarse else scores
        key = jax.random.key(rng.integers(2**31))
        step = compiled_refocus(DEEP, settings)
        state, _, _, context = step(state, scores, np.int32(length), np.int32(held), key)
        assert_is_cut(context, length, held)


@jax.jit
def taste(context, weight):
    """A policy that never comes to rest: a hash of each entry and of the whole context, in [-1, 1]."""
    whole = jnp.sum(context.start * context.lod, dtype=jnp.int32)
    return (weight * (7 * context.start + 13 * context.lod + whole) % 101).astype(jnp.float32) / 50 - 1


@functools.cache
def compiled_iterate(settings):
    def iterate(state, weight, length, key):
        score = functools.partial(taste, weight=weight)
        shape = {"steps": 5, "capacity": DEEP.history}
        return refocus.iterate(state, score, length, DEEP, settings=settings, key=key, **shape)

    return iterate


def test_iterate_is_a_loop_of_refocus():
    step, iterate = compiled_refocus(DEEP, BRISK), jit(compiled_iterate(BRISK))
    key, lengths = jax.random.key(0), [np.int32(length) for length in (12, 10, 14)]
    start = row_of(state_of([legal_cuts(DEEP)[17]], DEEP), 0)
    weight = np.int32(37)
    for length in lengths:
        last, made = iterate(start, weight, length, key)
        state, listed = start, [legal_cuts(DEEP)[17]]
        for _ in range(5):
            context = reference.context_of(listed[-1], window=DEEP.history, capacity=DEEP.history)
            state, _, _, context = step(state, np.asarray(taste(context, weight)), length, np.int32(18), key)
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
        even = {"score_fn": lambda context: jnp.zeros(FLAT.history), "length": 12, "geometry": FLAT}
        return refocus.iterate(start, **even, steps=100, capacity=FLAT.history, settings=settings, key=key)[1]

    one, again, other = (reference.unstack(walk(jax.random.key(seed))) for seed in (0, 0, 1))
    assert one == again != other
    after = {}
    for here, there in itertools.pairwise(tuple(map(tuple, one))):
        after.setdefault(here, set()).add(there)
    # One noise for all steps would lead from one context to the same next one always.
    assert max(len(contexts) for contexts in after.values()) > 2


def test_swap_rate_by_hand():
    before = [(0, 1), (2, 1), *((token, 0) for token in range(4, 10))]
    swapped = [(0, 0), (1, 0), (2, 1), (4, 1), *((token, 0) for token in range(6, 10))]
    merged = [(0, 2), *before[2:]]
    rate = jit(functools.partial(refocus.swap_rate, geometry=HAND))
    first, *later = (reference.context_of(cut, window=10, capacity=9) for cut in (before, swapped, merged))
    assert [float(rate(first, after)) for after in later] == [3 / 8, np.float32(1 / 7)]


def test_with_omission_the_swap_rate_is_of_what_the_base_model_reads():
    before = [*((token, 0) for token in range(3)), (3, 1), (6, 1), *((token, 0) for token in range(9, 26))]
    after = [*((token, 0) for token in range(6)), (6, 1), (9, 1), *((token, 0) for token in range(12, 26))]
    one, other = (reference.context_of(cut, window=26, capacity=26) for cut in (before, after))
    rate = jit(functools.partial(refocus.swap_rate, geometry=OMITTING))
    assert float(rate(one, other)) == np.float32(3 / 20)


def test_a_cold_start_may_begin_at_recency():
    settings = FocusConfig(start="recency", steps=2, max_edits=1, cooldown=0)
    shape = {"capacity": OMITTING.history, "settings": settings}
    # A policy that likes what is old.
    walk = jit(lambda length: refocus.cold_start(lambda one: -one.start / 26, length, OMITTING, **shape))
    first, *later = reference.unstack(walk(np.int32(14)))
    assert reference.read(first, OMITTING) == [(token, 0) for token in [*range(3), *range(15, 26)]]
    for step, entries in enumerate(later, start=1):
        kept = [token for token, _ in reference.read(entries, OMITTING)]
        assert kept == [*range(3 + 3 * step), *range(15, 21 - 3 * step), *range(21, 26)]


def test_swap_rate_is_the_share_of_new_entries():
    legal = legal_cuts(WIDE)
    batch = [reference.context_of(cut, window=WIDE.history, capacity=WIDE.history) for cut in legal]
    batch = jax.tree.map(lambda *rows: np.stack(rows), *batch)
    rate = functools.partial(refocus.swap_rate, geometry=WIDE)
    found = jit(jax.vmap(jax.vmap(rate, in_axes=(None, 0)), in_axes=(0, None)))(batch, batch)
    expected = [[len(set(after) - set(before)) / len(after) for after in legal] for before in legal]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not np.diag(found).any()
