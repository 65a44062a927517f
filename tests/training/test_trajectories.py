"""Trajectories through a stream: what is held, what may be looked at, and what is measured at the end."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.context.working import in_full
from lensjax.models.decision import build_tree, split
from lensjax.training import nll
from lensjax.training.steps import trajectories
from lensjax.training.steps.supo import SupoConfig
from tests.small import SMALL, jit

# Ten statements of two tokens, a question of two, an answer of two.
CONFIG = _settings.replace(
    SMALL,
    **{
        "context.window": 24,
        "context.horizon": 2,
        "context.recent_tokens": 2,
        "context.max_lod": 1,
        "context.omit": True,
        "hyper.context_start": 0.5,
        "hyper.context_end": 0.5,
        "hyper.high_lod_share": 0.0,
    },
)
GEOMETRY, BLOCKS = CONFIG.geometry, 10
SETTINGS = SupoConfig(window=4, refocus_steps=4, draws=3, temperature=0.5)


@functools.cache
def models():
    return CONFIG.build_models()


@functools.cache
def params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    parts = {"base": models().base, "gist": models().gist, "lens": models().lens}
    return {name: model.init(key) for (name, model), key in zip(parts.items(), keys, strict=True)}


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 16, CONFIG.context.window), jnp.int32)


@functools.cache
def player(reward="late", drawn=True):
    settings, parts = replace(SETTINGS, reward=reward), params()

    def play(tokens, key):
        window = split(tokens, horizon=2)
        return trajectories.run(models(), parts, window, key if drawn else None, GEOMETRY, settings=settings)

    return jit(play)


def played(seed=0, **kwargs):
    return player(**kwargs)(tokens(), jax.random.key(seed))


@pytest.mark.parametrize("drawn", [True, False])
def test_a_context_is_full_until_all_is_read_and_what_was_dropped_is_gone(drawn):
    for seed in range(5):
        one = jax.device_get(played(seed, drawn=drawn))
        np.testing.assert_array_equal(one.held[0], np.arange(BLOCKS) < 4)
        for t in range(4):
            dropped = [block for block in one.dropped[t] if block < BLOCKS]
            assert one.read[t + 1] == one.read[t] + len(dropped) and len(set(dropped)) == len(dropped)
            assert one.held[t][dropped].all() and not one.held[t + 1][dropped].any()
            new = np.arange(one.read[t], one.read[t + 1])
            assert one.held[t + 1][new].all() and not one.held[t + 1][one.read[t + 1] :].any()
        assert (one.held.sum(1) == 4).all()
        assert not (~one.held[:-1] & one.held[1:] & (np.arange(BLOCKS)[None] < one.read[:-1, None])).any()
        np.testing.assert_array_equal(one.taken, one.read[:-1] < BLOCKS)
        assert one.has_ended == (one.read[-1] == BLOCKS)


def test_without_draws_the_stream_is_read_as_fast_as_it_may():
    one = played(drawn=False)
    assert one.read.tolist() == [4, 7, 10, 10, 10] and one.taken.tolist() == [True, True, False, False]
    assert bool(one.has_ended)


def test_some_are_overlong():
    ended = [bool(played(seed).has_ended) for seed in range(12)]
    assert any(ended) and not all(ended)


def test_the_loss_is_that_of_the_tokens_held_and_the_question():
    """By the base model's loss of a context that is written down token by token."""
    one = played(3, reward="steps")
    window = split(tokens(), horizon=2)
    embeddings = models().base.embed(params()["base"], window.history)
    for held, found in zip(np.asarray(one.held), one.nll, strict=True):
        shown = [token for token in range(20) if held[token // 2]] + [20, 21]
        entries = in_full(embeddings[np.asarray(shown)], jnp.asarray(shown))
        expected = nll.token_nll(models().base, params()["base"], entries, window.horizon).mean()
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(played(3).nll[0]) == pytest.approx(float(one.nll[-1]), rel=1e-6)


@pytest.mark.parametrize("drawn", [True, False])
def test_a_decision_depends_on_nothing_that_is_read_later_or_was_dropped(drawn):
    """Neither the tokens that come after a step, nor the question, nor the answer change what it drops."""
    before = tokens()
    one = jax.device_get(player(drawn=drawn)(before, jax.random.key(1)))
    for t in range(4):
        later = before.at[int(one.read[t]) * 2 :].set((before[int(one.read[t]) * 2 :] + 5) % 16)
        other = jax.device_get(player(drawn=drawn)(later, jax.random.key(1)))
        np.testing.assert_array_equal(other.dropped[: t + 1], one.dropped[: t + 1])
    # The last decision sees what is held and no more: all else may be another text.
    last = int(np.sum(one.taken)) - 1
    known = np.repeat(one.held[last], 2)
    tree = build_tree(models(), params(), split(before, horizon=2).history, GEOMETRY)
    gone = jnp.where(jnp.asarray(np.append(known, [False] * 4)), before, (before + 5) % 16)
    other = build_tree(models(), params(), split(gone, horizon=2).history, GEOMETRY)
    judge = functools.partial(trajectories.log_prob, models(), params()["lens"], geometry=GEOMETRY, settings=SETTINGS)
    ours, theirs = (judge(each, one)[0] for each in (tree, other))
    np.testing.assert_array_equal(ours[last], theirs[last])
    assert drawn is False or (ours[:last] != theirs[:last]).any()


def test_what_was_drawn_is_as_probable_as_it_says():
    """By the frequency of the first step's draws; steps after the end have nothing to say."""
    window = split(tokens(), horizon=2)
    keys = jax.random.split(jax.random.key(5), 600)
    text = tokens()
    many = jit(jax.vmap(lambda key: player().__wrapped__(text, key)))(keys)
    tree = trajectories.stream(models(), params(), window, GEOMETRY)
    judge = functools.partial(trajectories.log_prob, models(), params()["lens"], tree)
    log_probs, entropies = jit(jax.vmap(functools.partial(judge, geometry=GEOMETRY, settings=SETTINGS)))(many)
    first = np.asarray(many.dropped[:, 0])
    rows, index, counts = np.unique(first, axis=0, return_index=True, return_counts=True)
    assert len(rows) > 10
    for place, count in zip(index, counts, strict=True):
        assert count / 600 == pytest.approx(float(np.exp(log_probs[place, 0])), abs=0.06)
    over = ~np.asarray(many.taken)
    assert over.any() and not np.asarray(log_probs)[over].any() and not np.asarray(entropies)[over].any()


BAD = {
    "fits": ({"window": 10}, "supo.window must be below the 10 blocks of the stream, .* got 10"),
    "ends": ({"refocus_steps": 1, "draws": 5}, "supo.refocus_steps times supo.draws must be at least 6, .* 1 times 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_streams_that_cannot_be_read_are_refused(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        trajectories.check(GEOMETRY, replace(SETTINGS, **changes))


def test_blocks_and_question_make_up_the_history():
    with pytest.raises(ValueError, match=r"Geometry.history must be whole blocks of one level before the 3 recent"):
        trajectories.check(replace(GEOMETRY, recent_tokens=3), SETTINGS)


def test_a_policy_that_reads_the_whole_stream_is_refused():
    reading = _settings.replace(CONFIG, **{"lens.reads": "attention"}).build_models()
    window = split(tokens(), horizon=2)
    with pytest.raises(ValueError, match=r"lens.reads must be nothing where what was dropped is gone, got attention"):
        trajectories.run(reading, params(), window, None, GEOMETRY, settings=SETTINGS)


def test_a_policy_sees_the_tokens_held_and_their_age_since_the_last_one_read():
    held, read = jnp.asarray(np.isin(np.arange(BLOCKS), [0, 2, 5, 6])), jnp.asarray(7, jnp.int32)
    tree = trajectories.stream(models(), params(), split(tokens(), horizon=2), GEOMETRY)
    seen = []

    def score(context, entries):
        seen.append(context.start.tolist())
        assert bool(entries.valid.all()) and entries.lods.tolist() == [0] * 8
        return entries.distances

    found = trajectories._scores(score, tree, held, read, GEOMETRY, SETTINGS.window)
    assert seen == [[0, 1, 4, 5, 10, 11, 12, 13]]
    # Of 14 tokens read the last one is 0 old; a block has the mean of its two.
    assert found[np.asarray([0, 2, 5, 6])].tolist() == [12.5, 8.5, 2.5, 0.5]
