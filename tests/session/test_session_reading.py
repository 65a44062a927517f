"""A session reads the same however the stream is split, and holds and predicts what it should."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.context import working as contexts
from lensjax.models import decision
from lensjax.training import nll
from tests.session.streams import (
    CASES,
    STREAM,
    assert_close,
    assert_same,
    contents,
    expected_length,
    keep_in,
    read_at_once,
    read_of,
    reread,
    session_of,
    tree_of,
)
from tests.small import VOCABULARY, jit


@pytest.mark.parametrize(
    "name",
    ["plain", "states", *(pytest.param(name, marks=pytest.mark.slow) for name in ("other", "sampled", "omission"))],
)
@settings(max_examples=6)
@given(counts=st.lists(st.one_of(st.integers(0, 2), st.integers(0, 30)), min_size=2, max_size=25))
def test_any_split_gives_the_same_session_to_the_bit(name, counts):
    session, (steps, whole, expected) = session_of(name), read_at_once(name)
    state, losses, seen, place = session.init(), [], [], 0
    for count in [*counts, len(STREAM)]:
        chunk = STREAM[place : place + count]
        state, chunk_losses = session.append(state, chunk, on_refocus=keep_in(seen))
        assert chunk_losses.shape == chunk.shape and chunk_losses.dtype == np.float32
        assert len(read_of(session, state)) == int(state.view.cached) <= session.config.capacity
        losses.append(chunk_losses)
        place += len(chunk)
        assert state.read == place
    np.testing.assert_array_equal(np.concatenate(losses), expected)
    assert_same(state, whole)
    assert_same(seen, steps)


def test_an_empty_append_changes_nothing():
    session = session_of("plain")
    _, state, _ = read_at_once("plain")
    for nothing in ([], np.zeros(0, np.int64)):
        after, losses = session.append(state, nothing)
        assert_same(after, state)
        assert losses.shape == (0,)


def test_refocus_steps_come_at_fixed_places_of_the_stream():
    for name in CASES:
        session, (steps, _, _) = session_of(name), read_at_once(name)
        places = [state.read for state, _ in steps]
        assert places == list(range(session.config.interval, len(STREAM) + 1, session.config.interval))


def test_earlier_states_stay_valid():
    session = session_of("plain")
    before, _ = session.append(session.init(), STREAM[:38])
    copy = [np.array(array) for array in contents(before)]
    first = session.append(before, STREAM[38:50])
    session.append(before, STREAM[:20])
    session.generate(before, 2, jax.random.key(0))
    for array, was in zip(contents(before), copy, strict=True):
        np.testing.assert_array_equal(array, was)
    assert_same(session.append(before, STREAM[38:50]), first)


@pytest.mark.parametrize("name", CASES)
def test_every_refocus_step_leaves_a_legal_context_of_exactly_the_length_that_was_asked_for(name):
    session, (steps, _, _) = session_of(name), read_at_once(name)
    for state, _ in steps:
        held, length = state.history.held, expected_length(session, state.history.held)
        found = contexts.invariants(state.context, session.config.geometry, length=length, tokens=held)
        assert all(found.values()), (state.read, found)
        assert len(read_of(session, state)) == length <= session.config.budget
        assert int(state.view.cached) == int(state.view.cache.length) == length
        assert held <= session.config.geometry.history
    in_full = [state for state, _ in steps if state.read <= session.config.budget]
    assert in_full and all(not np.any(state.context.lod) for state in in_full)
    assert any(state.history.forgotten for state, _ in steps)
    deepest = max(int(state.context.lod.max()) for state, _ in steps)
    assert deepest == session.config.geometry.max_lod


entries_of_view = jit(lambda view: view.entries)


@pytest.mark.parametrize("name", ["plain", "other", "no edits", "omission", "states", "attention"])
def test_the_tree_is_that_of_the_tokens_held(name):
    steps, last, _ = read_at_once(name)
    for state in [*(state for state, _ in steps), last]:
        built, *_, expected_entries = reread(name, state)
        held = state.history.held
        assert state.history.forgotten % session_of(name).config.forgotten_at_once == 0
        for lod, (rows, expected) in enumerate(zip(tree_of(name, state).levels, built.levels, strict=True)):
            complete = held // built.block_size**lod
            assert_close(rows[:complete], expected[:complete])
            assert not np.any(rows[complete:])
        # And what the policy sees is that of the rows.
        jax.tree.map(assert_close, entries_of_view(state.view), expected_entries)


@pytest.mark.parametrize("name", ["plain", "other", "no edits", "omission", "states", "attention"])
def test_predictions_are_those_of_the_base_model_on_the_whole_context(name):
    """So is all that the cache keeps, at every refocus step and in between."""
    session, state = session_of(name), session_of(name).init()
    kept = []
    for place in range(0, len(STREAM), 3):
        state, _ = session.append(state, STREAM[place : place + 3], on_refocus=lambda *step: kept.append(step[1].kept))
        _, logits, _, fresh, _ = reread(name, state)
        assert_close(session.predict(state), logits)
        length = len(read_of(session, state))
        assert int(state.view.cached) == int(state.view.cache.length) == length
        assert_close(state.view.cache.inputs[:length], fresh.inputs[:length])
        assert_close(state.view.cache.keys[:, :length], fresh.keys[:, :length])
        assert_close(state.view.cache.values[:, :length], fresh.values[:, :length])
    assert max(kept) > 0


@pytest.mark.parametrize("name", ["plain", "other", "no edits", "omission", "states", "attention"])
def test_losses_are_those_of_training_behind_the_same_context(name):
    session, (steps, _, losses) = session_of(name), read_at_once(name)
    for state, _ in steps[:-1]:
        read = state.read
        horizon = STREAM[read : read + session.config.interval]
        assert_close(losses[read : read + session.config.interval], reread(name, state, horizon)[2])


@pytest.mark.parametrize("name", ["plain", "states"])
def test_losses_are_those_of_a_training_window(name):
    """From where the history is full on: its tokens and the horizon are a window, and the loss is the variant's."""
    session, (steps, _, losses) = session_of(name), read_at_once(name)
    models, params, config = session.models, session.params, CASES[name]

    def measure(tokens, context):
        window = decision.split(tokens, horizon=config.context.horizon)
        tree = decision.build_tree(models, params, window.history, config.geometry)
        variants = jax.tree.map(lambda leaf: leaf[None], context)
        return nll.variant_nll(models.base, params["base"], tree, variants, window.horizon, config.geometry)[0][0]

    measure, seen = jit(measure), 0
    for state, _ in steps[:-1]:
        first, read = state.history.forgotten, state.read
        if read - first == config.context.history:
            window = STREAM[first : first + config.context.window].astype(np.int32)
            assert_close(losses[read : read + session.config.interval].mean(), measure(window, state.context))
            seen += 1
    assert seen > 5


def test_the_first_token_is_predicted_by_nothing():
    for name in CASES:
        assert read_at_once(name)[2][0] == pytest.approx(np.log(VOCABULARY))


@pytest.mark.parametrize("name", ["plain", "states", "attention"])
def test_neither_memory_nor_programs_grow_with_the_stream(name, compiles):
    session, (steps, _, _) = session_of(name), read_at_once(name)
    shapes = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state.view) for state, _ in [(session.init(), None), *steps]
    ]
    assert all(shape == shapes[0] for shape in shapes)
    with compiles() as names:
        session.append(session.append(session.init(), STREAM)[0], STREAM[:7])
    assert names == []
