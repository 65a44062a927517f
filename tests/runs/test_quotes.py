"""Text that quotes itself: the horizon goes on with a passage that was begun again before the cursor."""

import dataclasses
import json

import numpy as np
import pytest

from lensjax import _settings
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.data.quotes import Quotes
from lensjax.training.scoring import ContextConfig
from tests.corpora import text_config, write_numbered

# A history of 47 bytes: eleven blocks of 4, the last two of which hold bytes of the protected tail of 8.
CONTEXT = ContextConfig(window=52, block_size=4, horizon=5, recent_tokens=8)
QUOTE, LENGTH = 6, 11
TEXT = {"tokens": np.arange(52, dtype=np.int32)}


def quoted(seed, pretraining=False, **changes):
    context = dataclasses.replace(CONTEXT, **changes)
    return Quotes(context, QUOTE, pretraining)(TEXT, np.random.default_rng(seed))


def test_the_horizon_repeats_a_passage_that_stands_in_the_blocks_before_the_tail():
    sources = set()
    for seed in range(300):
        tokens = quoted(seed)["tokens"]
        np.testing.assert_array_equal(tokens[: 47 - QUOTE], np.arange(47 - QUOTE))
        source = int(tokens[47 - QUOTE])
        # Six bytes before the cursor, and five behind it.
        np.testing.assert_array_equal(tokens[47 - QUOTE :], np.arange(source, source + LENGTH))
        sources.add(source)
        assert tokens.dtype == np.int32
    # The tail begins at byte 39, in the block of bytes 36 to 39: passages end before that block.
    assert sources == set(range(36 - LENGTH + 1))
    assert TEXT["tokens"].tolist() == list(range(52)), "what it is given stays as it is"


def test_answers_are_the_blocks_that_hold_what_the_horizon_repeats():
    seen = set()
    for seed in range(300):
        made = quoted(seed)
        begin = int(made["tokens"][47])
        needed = sorted({byte // 4 * 4 for byte in range(begin, begin + 5)})
        assert made["answers"].dtype == np.int32 and made["answers"].shape == (2,)
        assert sorted(set(made["answers"].tolist())) == needed
        seen.add(len(needed))
    assert seen == {2}
    shorter = dataclasses.replace(CONTEXT, horizon=3, window=50)
    counts = set()
    for seed in range(100):
        made = Quotes(shorter, QUOTE)(TEXT | {"tokens": np.arange(50, dtype=np.int32)}, np.random.default_rng(seed))
        begin = int(made["tokens"][47])
        assert set(made["answers"].tolist()) == {byte // 4 * 4 for byte in range(begin, begin + 3)}
        counts.add(len(set(made["answers"].tolist())))
    assert counts == {1, 2}, "a passage in one block names it twice"


def test_a_quote_is_a_function_of_the_window_and_the_generator():
    for pretraining in (False, True):
        one, again, other = (quoted(seed, pretraining)["tokens"] for seed in (0, 0, 1))
        np.testing.assert_array_equal(one, again)
        assert (one != other).any()


def test_pretraining_quotes_all_over_a_window():
    begins = []
    for seed in range(200):
        made = quoted(seed, pretraining=True)
        assert made.keys() == {"tokens"}
        tokens = made["tokens"]
        places = np.flatnonzero(tokens != np.arange(52))
        begins.append(int(places[0]))
        # Two quotes of eleven: where bytes are not those that were there, they are earlier ones.
        assert (tokens[places] < places).all() and LENGTH <= len(places) <= 2 * LENGTH
    assert min(begins) == LENGTH and max(begins) > 47 - LENGTH, "not at the cursor alone"


@pytest.fixture
def corpus(tmp_path):
    return write_numbered(tmp_path)


def quoting(corpus, **changes):
    config = text_config(corpus)
    return _settings.replace(
        config, **{"context.recent_tokens": 4, "context.horizon": 3, "data.quote": 4, "context.window": 43} | changes
    )


@pytest.mark.parametrize("pretraining", [False, True])
def test_a_position_restores_to_the_bit_and_windows_are_quoted_anew(corpus, pretraining):
    config = quoting(corpus)

    def make(seed=3):
        return data.make_iterator(config, "train", seed=seed, batch_size=48, pretraining=pretraining)

    iterator, states, batches = make(), [], []
    for _ in range(22):  # two epochs
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for at in (0, 9, 21):
        resumed = make()
        resumed.set_state(states[at])
        for expected in batches[at:]:
            batch = next(resumed)
            assert batch.keys() == expected.keys() == ({"tokens"} if pretraining else {"tokens", "answers"})
            for name in batch:
                np.testing.assert_array_equal(batch[name], expected[name], strict=True)
    assert any((next(make(4))["tokens"] != batches[0]["tokens"]).any(axis=1))


def test_held_out_windows_are_quoted_and_the_same_in_every_run(corpus):
    config = quoting(corpus)
    first, again, other = (
        data.fixed_batches(config, "validation", batch_size=4, count=2, seed=seed) for seed in (0, 0, 1)
    )
    for one, same in zip(first, again, strict=True):
        for name in ("tokens", "answers"):
            np.testing.assert_array_equal(one[name], same[name], strict=True)
        for row, blocks in zip(one["tokens"], one["answers"], strict=True):
            # History 40, horizon 3: the last three bytes are those of a block that is named.
            places = [at for at in range(33) if row[at : at + 3].tolist() == row[40:].tolist()]
            assert any({(at + i) // 4 * 4 for i in range(3)} == set(blocks.tolist()) for at in places)
    assert (first[0]["answers"] != other[0]["answers"]).any() or (first[0]["tokens"] != other[0]["tokens"]).any()
    in_order = next(data.make_iterator(config, "validation", seed=0, batch_size=4))
    assert in_order.keys() == {"tokens", "answers"}
    plain = next(data.make_iterator(quoting(corpus, **{"data.quote": 0}), "validation", seed=0, batch_size=4))
    assert plain.keys() == {"tokens"}
    np.testing.assert_array_equal(plain["tokens"][:, :36], in_order["tokens"][:, :36])


@pytest.mark.parametrize("seeds", [(0, 1)])
def test_another_seed_quotes_other_passages_of_the_same_windows(corpus, seeds):
    config = quoting(corpus)
    one, other = (next(data.make_iterator(config, "validation", seed=seed, batch_size=16)) for seed in seeds)
    np.testing.assert_array_equal(one["tokens"][:, :36], other["tokens"][:, :36])
    assert (one["answers"] != other["answers"]).any()


def test_processes_share_the_quotes_of_one(corpus):
    config = quoting(corpus)
    whole, *parts = (
        data.make_iterator(config, "train", seed=3, batch_size=8, share=share) for share in ((0, 1), (0, 2), (1, 2))
    )
    for _ in range(3):
        expected, *rows = (next(batches) for batches in (whole, *parts))
        for name in expected:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in rows]), expected[name])


def test_quotes_that_do_not_fit_are_refused(corpus):
    with pytest.raises(ValueError, match=r"data\.quote 6 tokens .* context\.recent_tokens must be at least 6, got 5"):
        Quotes(dataclasses.replace(CONTEXT, recent_tokens=5), 6)
    with pytest.raises(ValueError, match=r"data\.quote 6 tokens and context\.horizon 5 .* context\.window 24"):
        Quotes(dataclasses.replace(CONTEXT, window=24), 6)
    # It fits to the byte: a history of 19 has two blocks before the tail of 8, and a passage 8 bytes.
    least = ContextConfig(window=21, block_size=4, horizon=2, recent_tokens=8)
    made = Quotes(least, 6)({"tokens": np.arange(21, dtype=np.int32)}, np.random.default_rng(0))
    assert made["tokens"][13:].tolist() == list(range(8))
    with pytest.raises(ValueError, match=r"raise context\.window 20, or lower one of these"):
        Quotes(dataclasses.replace(least, window=20, horizon=3), 6)
    for task in ("recall", "tracking"):
        with pytest.raises(ValueError, match=rf"data\.quote is of text: set data\.task .*, got '{task}'"):
            _settings.replace(Config(), **{"data.task": task, "data.quote": 4})
    with pytest.raises(ValueError, match=r"data\.quote must be at least 0"):
        _settings.replace(Config(), **{"data.quote": -1})
    with pytest.raises(ValueError, match=r"context\.recent_tokens must be at least 4, got 1"):
        data.make_iterator(quoting(corpus, **{"context.recent_tokens": 1}), "train", seed=0, batch_size=4)
