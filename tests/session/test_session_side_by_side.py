"""Several streams side by side: what each of them gets is what it gets alone."""

import functools

import jax
import numpy as np
import pytest

from lensjax.runs import sessions
from lensjax.session import Session
from tests.session.streams import assert_close, assert_same, session_of
from tests.small import VOCABULARY

COUNT = 4
"""Dealt over two devices."""
TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, (COUNT, 75))


@functools.cache
def side_by_side(name):
    one = session_of(name)
    return Session(one.models, one.params, one.config, streams=COUNT)


def of_stream(state, index):
    return jax.tree.map(lambda leaf: leaf[index], state.view)


# One that forgets, and of which the allocator draws; one whose policy reads all that is held.
@pytest.mark.parametrize("name", ["sampled", pytest.param("states", marks=pytest.mark.slow)])
def test_each_stream_is_read_as_it_is_alone(name):
    session, alone, reports = side_by_side(name), session_of(name), []
    state, losses = session.append(session.init(7), TOKENS[:, :41], on_refocus=lambda *step: reports.append(step[1]))
    state, more = session.append(state, TOKENS[:, 41:], on_refocus=lambda *step: reports.append(step[1]))
    losses = np.concatenate([losses, more], axis=1)
    assert state.read == TOKENS.shape[1] and state.history.forgotten > 0
    for index, tokens in enumerate(TOKENS):
        seen = []
        wanted, wanted_losses = alone.append(
            alone.init(7 + index), tokens, on_refocus=lambda *step, seen=seen: seen.append(step[1])
        )
        view = of_stream(state, index)
        assert_close(losses[index], wanted_losses)
        assert_same(view.context, wanted.context)
        assert_close(session.predict(state)[index], alone.predict(wanted))
        assert [int(report.swaps[index]) for report in reports] == [int(report.swaps) for report in seen]
        np.testing.assert_array_equal(state.history.held_tokens[index], wanted.history.held_tokens[0])
        assert_close(view.embeddings, np.asarray(wanted.view.embeddings))
    assert len({str(of_stream(state, index).context.start) for index in range(COUNT)}) == COUNT


def test_streams_are_gone_on_with_each_by_itself():
    session, alone = side_by_side("sampled"), session_of("sampled")
    state, _ = session.append(session.init(), TOKENS)
    longer, tokens = session.generate(state, 3, jax.random.key(0), temperature=0)
    assert tokens.shape == (COUNT, 3) and longer.read == state.read + 3
    for index, stream in enumerate(TOKENS):
        own, _ = alone.append(alone.init(index), stream)
        np.testing.assert_array_equal(tokens[index], alone.generate(own, 3, jax.random.key(0), temperature=0)[1])
    drawn = session.generate(state, 4, jax.random.key(1))[1]
    assert drawn.shape == (COUNT, 4) and len(np.unique(drawn)) > 1
    assert session.append(state, np.zeros((COUNT, 0), int))[1].shape == (COUNT, 0)


def test_streams_are_saved_together(tmp_path):
    session = side_by_side("sampled")
    state, _ = session.append(session.init(), TOKENS[:, :50])
    again, loaded = sessions.load(sessions.save(session, state, tmp_path / "saved"))
    assert again.streams == COUNT
    (state, losses), (loaded, again_losses) = (
        one.append(of, TOKENS[:, 50:]) for one, of in ((session, state), (again, loaded))
    )
    assert_same((state.view, losses), (loaded.view, again_losses))


def test_tokens_are_those_of_all_streams():
    session = side_by_side("sampled")
    with pytest.raises(ValueError, match=r"integers \[4, n\], got int64\[75\]"):
        session.append(session.init(), TOKENS[0])
    wrong = TOKENS.copy()
    wrong[1, 4] = VOCABULARY
    with pytest.raises(ValueError, match=r"token 16 at place 4 of stream 1 is outside"):
        session.append(session.init(), wrong)
    with pytest.raises(ValueError, match=r"streams must be at least 1, or None .*got 0"):
        Session(session.models, session.params, session.config, streams=0)
