"""Windows of text, and batches of any data."""

import functools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.data import recall, splits
from tests.corpora import RECALL, recall_config, text_config, write_numbered


@pytest.fixture
def corpus(tmp_path):
    return write_numbered(tmp_path)


def test_windows_pack_files_with_a_separator(tmp_path):
    names = sorted((f"{i}.py" for i in range(12) if splits.split_of(f"{i}.py") == "train"), key=splits.digest)[:3]
    for name, byte in zip(names, b"abc", strict=True):
        (tmp_path / name).write_bytes(bytes([byte]) * 5)
    config = text_config(tmp_path, window=8)
    # aaaaa 0 bbbbb 0 ccccc: 17 bytes, two windows of 8; one byte is left out.
    batch = next(data.make_iterator(config, "train", seed=0, batch_size=2))
    rows = {bytes(row.astype(np.uint8)) for row in batch["tokens"]}
    assert rows == {b"aaaaa\0bb", b"bbb\0cccc"}
    assert batch["tokens"].dtype == np.int32 and set(batch) == {"tokens"}


def epochs(config, *, seed, count):
    """Windows of `count` epochs, in order; one window a batch."""
    windows = data._windows(config, "train")
    iterator = data.make_iterator(config, "train", seed=seed, batch_size=1)
    return [[next(iterator)["tokens"].tobytes() for _ in range(len(windows))] for _ in range(count)]


def test_train_shuffles_anew_each_epoch_and_each_seed(corpus):
    config = text_config(corpus)
    every = Counter(window.astype(np.int32).tobytes() for window in data._windows(config, "train"))
    first, second = epochs(config, seed=0, count=2)
    other, other_second = epochs(config, seed=1, count=2)
    assert Counter(first) == Counter(second) == Counter(other) == every
    orders = [first, second, other, other_second]
    # In particular, no epoch of one seed is another epoch of its neighbour.
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_held_out_iterator_passes_once_in_file_order(corpus):
    config = text_config(corpus)
    windows = data._windows(config, "validation")
    batches = list(data.make_iterator(config, "validation", seed=5, batch_size=4))
    assert len(batches) == len(windows) // 4
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in batches]), windows[: 4 * len(batches)])


@pytest.mark.parametrize("pretraining", [False, True])
@pytest.mark.parametrize("task", ["text", "recall"])
def test_position_restores_to_the_bit(corpus, task, pretraining):
    config = text_config(corpus) if task == "text" else recall_config()

    def make():
        return data.make_iterator(config, "train", seed=3, batch_size=48, pretraining=pretraining)

    iterator, states, batches = make(), [], []
    for _ in range(30):  # the text has about 560 windows: two epochs
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    assert len({batch["tokens"].tobytes() for batch in batches}) == 30
    for at in (0, 1, 11, 29):
        resumed = make()
        resumed.set_state(states[at])
        for expected in batches[at:]:
            batch = next(resumed)
            assert batch.keys() == expected.keys()
            for name in batch:
                np.testing.assert_array_equal(batch[name], expected[name], strict=True)


@pytest.mark.parametrize("task", ["text", "recall"])
def test_processes_share_the_rows_of_the_batches_of_one(corpus, task):
    config = text_config(corpus) if task == "text" else recall_config()

    train = functools.partial(data.make_iterator, config, "train", seed=3, batch_size=48)
    fixed = functools.partial(data.fixed_batches, config, "validation", seed=3, batch_size=4, count=3)
    for make in (train, fixed):
        whole, *parts = (iter(make(share=of)) for of in ((0, 1), (0, 2), (1, 2)))
        for _ in range(3):
            expected, *rows = (next(batches) for batches in (whole, *parts))
            for name in expected:
                np.testing.assert_array_equal(np.concatenate([part[name] for part in rows]), expected[name])
    # The position of one process is that of any number of them.
    one, two = train(), train(share=(1, 2))
    for _ in range(5):
        next(two)
    one.set_state(two.get_state())
    np.testing.assert_array_equal(next(one)["tokens"][24:], next(two)["tokens"])


def test_all_processes_pass_a_held_out_split_in_as_many_batches(corpus):
    config = text_config(corpus)
    size = 2 * (len(data._windows(config, "validation")) // 3)  # half a batch is left: enough for one process alone
    for process in range(2):
        batches = data.make_iterator(config, "validation", seed=5, batch_size=size, share=(process, 2))
        assert len(list(batches)) == 1


@pytest.mark.parametrize("config", [Config(), recall_config()], ids=["stdlib", "recall"])
def test_fixed_batches_are_fixed_and_hold_no_window_twice(config):
    def draw(seed):
        return data.fixed_batches(config, "validation", batch_size=4, count=5, seed=seed)

    first, again, other = draw(0), draw(0), draw(1)
    for batch, same in zip(first, again, strict=True):
        assert batch["tokens"].shape == (4, config.context.window) and batch["tokens"].dtype == np.int32
        assert batch.keys() == same.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], same[name], strict=True)
    assert len({row.tobytes() for batch in first for row in batch["tokens"]}) == 20
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


# Bad input


def recall_source(vocab=256, split="train", query=2, **kwargs):
    return lambda tmp_path: recall.RecallSource(replace(RECALL, **kwargs), vocab, split, 0, query)


def iterator_over(path, split="train", **kwargs):
    return lambda tmp_path: data.make_iterator(text_config(tmp_path / path, **kwargs), split, seed=0, batch_size=500)


BAD_INPUT = {
    "missing": (iterator_over("nowhere"), "nowhere' does not exist"),
    "empty folder": (iterator_over("void"), "no file with text in it under .*void"),
    "glob without match": (iterator_over("some/*.md"), "no file with text in it under .*some"),
    "small split": (
        iterator_over("some", window=128),
        "'train' holds 100 tokens in 1 of 1 files, and one window takes 128.*add files",
    ),
    "empty split": (iterator_over("some", split="validation"), "'validation' holds 0 tokens in 0 of .* files.*window"),
    "small held-out split": (
        iterator_over("valid", split="validation"),
        "holds 3 windows of 32 tokens, and 500 are needed; lower batch_size",
    ),
    "text split": (iterator_over("some", split="dev"), "train, validation, test, got 'dev'"),
    "recall split": (recall_source(split="dev"), "train, validation, test, got 'dev'"),
    "window": (recall_source(window=60), "multiple of block_size 8, got 60"),
    "query": (recall_source(query=8), "data.query must be between 1 and context.block_size - 1 = 7, got 8"),
    "no query": (recall_source(query=0), "data.query must be between 1 and .* = 7, got 0"),
    "horizon": (recall_source(horizon=7), "data.query 2 .*: context.horizon must be block_size - query = 6, got 7"),
    "recent tokens": (recall_source(recent_tokens=1), "context.recent_tokens must be at least 2, got 1"),
    "vocabulary": (recall_source(vocab=2), "7 blocks that differ in their first 2 tokens.*vocabulary of 2"),
}


@pytest.mark.parametrize(("call", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused(tmp_path, call, message):
    for folder, name, size in (("void", "empty", 0), ("some", "os.py", 100), ("valid", "82.txt", 100)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"x" * size)
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_too_large_a_fixed_evaluation_set_is_refused(corpus):
    windows = len(data._windows(text_config(corpus), "test"))
    draw = {"batch_size": 1, "seed": 0}
    assert len(data.fixed_batches(text_config(corpus), "test", count=windows, **draw)) == windows
    with pytest.raises(ValueError, match=f"holds {windows} windows .* {windows + 1} are needed; lower batch_size"):
        data.fixed_batches(text_config(corpus), "test", count=windows + 1, **draw)
