"""Generation, and what a session refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from lensjax import _settings
from lensjax.session import Session
from tests.session.streams import assert_same, read_at_once, session_of
from tests.small import SMALL, VOCABULARY


def test_what_is_generated_is_read():
    session, (_, state, _) = session_of("plain"), read_at_once("plain")
    after, tokens = session.generate(state, 7, jax.random.key(3))
    assert tokens.shape == (7,) and tokens.dtype == np.int32 and after.read == state.read + 7
    assert_same(after, session.append(state, tokens)[0])
    again = session.generate(state, 7, jax.random.key(3))
    np.testing.assert_array_equal(again[1], tokens)
    assert (session.generate(state, 7, jax.random.key(4))[1] != tokens).any()


def test_temperature_zero_takes_the_likeliest_token():
    session, (_, state, _) = session_of("plain"), read_at_once("plain")
    tokens = session.generate(state, 4, jax.random.key(3), temperature=0)[1]
    for token in tokens:
        assert token == int(np.argmax(session.predict(state)))
        state, _ = session.append(state, [token])
    nearly = session.generate(read_at_once("plain")[1], 4, jax.random.key(5), temperature=1e-4)[1]
    np.testing.assert_array_equal(nearly, tokens)


def test_nothing_is_generated_if_nothing_is_wanted():
    session = session_of("plain")
    for state in (session.init(), read_at_once("plain")[1]):
        after, tokens = session.generate(state, 0, jax.random.key(0))
        assert after is state and tokens.shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            [1, VOCABULARY, -1],
            f"token {VOCABULARY} at place 1 is outside the vocabulary: expected 0 to {VOCABULARY - 1}",
        ),
        ([-1], "token -1 at place 0"),
        ([3] * 20 + [2**40], f"token {2**40} at place 20"),
        ([0.5], r"one sequence of integers, got float64\[1\]"),
        ([True], r"one sequence of integers, got bool\[1\]"),
        ([[1, 2]], r"one sequence of integers, got int64\[1, 2\]"),
        (3, r"one sequence of integers, got int64\[\]"),
    ],
)
def test_tokens_that_cannot_be_read_are_refused_before_any_is(tokens, message):
    session, state = session_of("plain"), read_at_once("plain")[0][0][0]
    with pytest.raises(ValueError, match=message):
        session.append(state, tokens, on_refocus=lambda *step: pytest.fail("tokens were read"))


def test_a_session_that_has_read_nothing_predicts_nothing():
    session = session_of("plain")
    for ask in (session.predict, lambda state: session.generate(state, 1, jax.random.key(0))):
        with pytest.raises(ValueError, match=r"nothing was read yet.*append at least one token"):
            ask(session.init())


@pytest.mark.parametrize(("count", "temperature"), [(-1, 1.0), (1, -0.5), (1, float("nan")), (1, float("inf"))])
def test_generation_arguments_out_of_range_are_refused(count, temperature):
    session, state = session_of("plain"), read_at_once("plain")[1]
    with pytest.raises(ValueError, match=f"at least 0 and finite, got {count} and {temperature}"):
        session.generate(state, count, jax.random.key(0), temperature=temperature)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # 32 tokens fit into 14 entries, but 31 of them do not.
        (
            {"hyper.context_end": 0.45},
            r"session\.budget .* a history of 32 tokens, at least 15 entries, got 14: raise it",
        ),
        # 8 recent tokens, and one of a block that is not whole.
        (
            {"context.max_lod": 1, "context.omit": True, "hyper.context_end": 0.25},
            r"session\.budget .* a history of 32 tokens, at least 9 entries, got 8: raise it",
        ),
        (
            {"context.max_lod": 5, "context.window": 40},
            r"session\.geometry\.history must hold the 32 tokens that are forgotten at once .* got 36: raise",
        ),
        (
            {"context.horizon": 24, "context.window": 48, "hyper.context_end": 0.6},
            r"must hold the 24 tokens .* got 24: raise it, or lower max_lod or session\.interval",
        ),
    ],
)
def test_a_budget_or_history_that_some_stream_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _ = _settings.replace(SMALL, **changes).session


def test_a_base_model_without_a_cache_is_refused():
    class Cacheless:
        vocab_size, dim = VOCABULARY, SMALL.base.dim
        init = embed = logits = None

    models = dataclasses.replace(SMALL.build_models(), base=Cacheless())
    with pytest.raises(ValueError, match=r"models\.base must have init_cache, extend and truncate .*Cacheless"):
        Session(models, {}, SMALL.session)
