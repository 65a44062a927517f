import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.evaluation import streams
from lensjax.session import Session
from lensjax.training import nll
from lensjax.training.key_tokens import KeyConfig
from tests.small import SMALL, VOCABULARY, jit

HISTORY, HORIZON = SMALL.context.history, SMALL.context.horizon
STREAM = np.random.default_rng(0).integers(0, VOCABULARY, 90)


@functools.cache
def models_and_params():
    models, random = SMALL.build_models(), np.random.default_rng(1)
    shapes = {part: jax.eval_shape(getattr(models, part).init, jax.random.key(0)) for part in ("base", "gist")}
    return models, jax.tree.map(
        lambda leaf: 0.4 * random.normal(size=leaf.shape).astype("f") + (leaf.ndim == 1), shapes
    )


@functools.cache
def session_of(policy):
    return Session(*models_and_params(), SMALL.session, policy=policy)


def read(policy, stream=STREAM, seed=0):
    """States after all refocus steps."""
    session, states = session_of(policy), []
    session.append(session.init(seed), stream, on_refocus=lambda state, _: states.append(state))
    return states


def shown(states):
    return [(np.array(state.context.start), np.array(state.context.lod)) for state in states]


def test_the_oldest_collapse_first_and_furthest():
    states = read(streams.collapse_oldest)
    for state in states:
        lods = np.array(state.context.lod)[: int(state.context.length)]
        assert (np.diff(lods) <= 0).all(), (state.read, lods)
    assert any(set(lod.tolist()) == {0, 1, 2} for _, lod in shown(states))
    # Whatever the tokens are.
    np.testing.assert_array_equal(shown(states), shown(read(streams.collapse_oldest, STREAM[::-1])))


def test_scores_by_age_reach_from_the_oldest_token_to_the_newest():
    session = session_of(streams.collapse_oldest)
    state, _ = session.append(session.init(), STREAM[:11])
    scores = np.array(streams.collapse_oldest({}, state.view))
    np.testing.assert_allclose(scores[:11], np.linspace(-1, 1, 11), atol=1e-6)
    assert scores.shape == (20,) and not scores[11:].any()
    state = read(streams.collapse_oldest)[-1]
    scores, length = np.array(streams.collapse_oldest({}, state.view)), int(state.context.length)
    # Its first entry is a gist of tokens 0 to 3 of the 32 that are held.
    assert (
        scores[0] == pytest.approx(2 * 1.5 / 31 - 1)
        and scores[length - 1] == 1
        and (np.diff(scores[:length]) > 0).all()
    )


def test_random_scores_are_drawn_anew_at_every_step_and_from_the_seed():
    states = read(streams.random_scores)
    drawn = np.array([streams.random_scores({}, state.view) for state in states])
    assert len(np.unique(drawn)) > 0.99 * drawn.size and -1 <= drawn.min() < -0.9 and 0.9 < drawn.max() < 1
    assert abs(drawn.mean()) < 0.1
    same, other = read(streams.random_scores), read(streams.random_scores, seed=1)
    np.testing.assert_array_equal(shown(same), shown(states))
    assert any((one != two).any() for (one, _), (two, _) in zip(shown(states), shown(other), strict=True))


@functools.cache
def measure(capacity):
    models, _ = models_and_params()
    return jit(functools.partial(streams.window_token_nll, models, capacity=capacity, context=SMALL.context))


def losses_of(tokens, cursors, lengths, capacity):
    arrays = (np.asarray(values, np.int32) for values in (tokens, cursors, lengths))
    return np.array(measure(capacity)(models_and_params()[1], *arrays))


@functools.cache
def whole():
    return jit(functools.partial(nll.sequence_nll, models_and_params()[0].base))


def horizon_after(cursor, length):
    """Losses of the horizon, read as the end of a sequence that begins with the window."""
    tokens = jnp.asarray(STREAM[cursor - length : cursor + HORIZON], jnp.int32)
    return np.array(whole()(models_and_params()[1]["base"], tokens)[-HORIZON:])


def test_windows_are_read_as_sequences_of_their_own():
    cursors, lengths = [32, 40, 86, 60], [32, 14, 14, 1]
    found = losses_of(STREAM, cursors, lengths, HISTORY)
    expected = [horizon_after(cursor, length) for cursor, length in zip(cursors, lengths, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=5e-5)
    np.testing.assert_allclose(losses_of(STREAM, cursors[1:], lengths[1:], 14), found[1:], rtol=2e-5)


def test_what_is_outside_of_a_window_and_its_horizon_changes_nothing():
    first, cursor, place = 36, 50, np.arange(len(STREAM))
    end, changed = cursor + HORIZON, (STREAM + 1) % VOCABULARY
    places, lengths = [cursor] * 3, [cursor - first] * 3  # of which there are as many in the test above

    def losses(where):
        return losses_of(np.where(where, changed, STREAM), places, lengths, 14)[0]

    own = losses(place < 0)
    np.testing.assert_array_equal(losses((place < first) | (place >= end)), own)
    for seen in (first, cursor - 1):
        assert (losses(place == seen) != own).all()
    assert (losses(place == end - 1) != own).tolist() == [False] * (HORIZON - 1) + [True]


def test_key_tokens_are_those_that_less_than_a_window_of_the_budget_does_not_help():
    models, params = models_and_params()
    # At least as well with all 32 tokens as with 8, half of the budget.
    settings = KeyConfig(alpha=0.0, beta=-3.0)
    context, cursors = dataclasses.replace(SMALL.context, key=settings), np.arange(32, 87, 6)
    find = jit(functools.partial(streams.key_tokens_of, models, budget=16, context=context))
    found = np.array(find(params, STREAM.astype(np.int32), cursors.astype(np.int32)))
    long, short = (np.array([horizon_after(cursor, length) for cursor in cursors]) for length in (HISTORY, 8))
    assert np.abs(short - long).min() > 1e-3 and np.abs(long - 3).min() > 1e-3  # none is a matter of rounding
    np.testing.assert_array_equal(found, (short > long) & (long < 3))
    assert 0 < found.sum() < (short > long).sum() < found.size
