import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.evaluation import streams
from lensjax.session import Session
from lensjax.training import nll
from tests.small import SMALL, VOCABULARY, jit

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
    session.append(session.init(seed), stream, on_refocus=lambda state, _: states.append(jax.tree.map(jnp.copy, state)))
    return states


def shown(states):
    return [(np.array(state.context.start), np.array(state.context.lod)) for state in states]


def test_the_oldest_collapse_first_and_furthest():
    states = read(streams.collapse_oldest)
    for state in states:
        lods = np.array(state.context.lod)[: int(state.context.length)]
        assert (np.diff(lods) <= 0).all(), (int(state.read), lods)
    assert any(set(lod.tolist()) == {0, 1, 2} for _, lod in shown(states))
    # Whatever the tokens are.
    np.testing.assert_array_equal(shown(states), shown(read(streams.collapse_oldest, STREAM[::-1])))


def test_scores_by_age_reach_from_the_oldest_token_to_the_newest():
    session = session_of(streams.collapse_oldest)
    state, _ = session.append(session.init(), STREAM[:11])
    scores = np.array(streams.collapse_oldest({}, state))
    np.testing.assert_allclose(scores[:11], np.linspace(-1, 1, 11), atol=1e-6)
    assert scores.shape == (20,) and not scores[11:].any()
    state = read(streams.collapse_oldest)[-1]
    scores, length = np.array(streams.collapse_oldest({}, state)), int(state.context.length)
    # Its first entry is a gist of tokens 0 to 3 of the 32 that are held.
    assert (
        scores[0] == pytest.approx(2 * 1.5 / 31 - 1)
        and scores[length - 1] == 1
        and (np.diff(scores[:length]) > 0).all()
    )


def test_random_scores_are_drawn_anew_at_every_step_and_from_the_seed():
    states = read(streams.random_scores)
    drawn = np.array([streams.random_scores({}, state) for state in states])
    assert len(np.unique(drawn)) > 0.99 * drawn.size and -1 <= drawn.min() < -0.9 and 0.9 < drawn.max() < 1
    assert abs(drawn.mean()) < 0.1
    same, other = read(streams.random_scores), read(streams.random_scores, seed=1)
    np.testing.assert_array_equal(shown(same), shown(states))
    assert any((one != two).any() for (one, _), (two, _) in zip(shown(states), shown(other), strict=True))


@functools.cache
def measure(capacity):
    models, _ = models_and_params()
    return jit(functools.partial(streams.window_nll, models, capacity=capacity, context=SMALL.context))


def losses_of(tokens, cursors, lengths, capacity):
    arrays = (np.asarray(values, np.int32) for values in (tokens, cursors, lengths))
    return np.array(measure(capacity)(models_and_params()[1], *arrays))


def test_windows_are_read_as_sequences_of_their_own():
    models, params = models_and_params()
    history, horizon = SMALL.context.history, SMALL.context.horizon
    whole = jit(functools.partial(nll.sequence_nll, models.base))
    cursors, lengths = [32, 40, 86, 60], [32, 14, 14, 1]
    found = losses_of(STREAM, cursors, lengths, history)
    for cursor, length, loss in zip(cursors, lengths, found, strict=True):
        tokens = jnp.asarray(STREAM[cursor - length : cursor + horizon], jnp.int32)
        assert loss == pytest.approx(float(whole(params["base"], tokens)[-horizon:].mean()), rel=2e-5)
    np.testing.assert_allclose(losses_of(STREAM, cursors[1:], lengths[1:], 14), found[1:], rtol=2e-5)


def test_what_is_outside_of_a_window_and_its_horizon_changes_nothing():
    first, cursor, place = 36, 50, np.arange(len(STREAM))
    end, changed = cursor + SMALL.context.horizon, (STREAM + 1) % VOCABULARY
    places, lengths = [cursor] * 3, [cursor - first] * 3  # of which there are as many in the test above

    def loss(where):
        return losses_of(np.where(where, changed, STREAM), places, lengths, 14)[0]

    assert loss((place < first) | (place >= end)) == loss(place < 0)
    for own in (first, cursor - 1, end - 1):
        assert loss(place == own) != loss(place < 0)
