import functools
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.runs.config import Config, ContextConfig, DataConfig
from lensjax.runs.data import batches as data
from lensjax.runs.data import recall, splits

SPLITS = ("train", "validation", "test")
RECALL = ContextConfig(window=64, block_size=8, horizon=6, recent_tokens=2)


def text_config(path, *, window=32, max_files=None) -> Config:
    context = ContextConfig(window=window, block_size=4, horizon=3, recent_tokens=1)
    return Config(context=context, data=DataConfig(task="text", path=str(path), max_files=max_files))


def recall_config(**kwargs) -> Config:
    return Config(context=RECALL, data=DataConfig(task="recall", **kwargs))


@pytest.fixture
def corpus(tmp_path) -> Path:
    """200 files; file i holds 100 bytes of value i + 1, so that a byte says which file it is from."""
    for i in range(200):
        path = tmp_path / f"{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([1 + i]) * 100)
    return tmp_path


# The split


def test_split_is_a_fixed_function_of_the_name():
    names = ("a.txt", "pkg/b.py", "os.py", "json/decoder.py", "82.txt", "14.txt")
    ends = {"train": 0.9, "validation": 0.95, "test": 1.0}
    for name in names:
        position = int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256
        assert splits.split_of(name) == next(split for split, end in ends.items() if position < end)
    golden = {"os.py": "train", "82.txt": "validation", "14.txt": "test"}
    assert {name: splits.split_of(name) for name in golden} == golden


def test_split_shares():
    counts = Counter(splits.split_of(f"{i}.txt") for i in range(20_000))
    for split, share in zip(SPLITS, (0.9, 0.05, 0.05), strict=True):
        assert abs(counts[split] / 20_000 - share) < 5 * (share * (1 - share) / 20_000) ** 0.5


def test_each_file_is_in_one_split_whatever_else_there_is_unlike_it(corpus):
    config = text_config(corpus).data
    before = {split: data.corpus_files(config, split) for split in SPLITS}
    assert sum(map(len, before.values())) == len(set().union(*before.values())) == 200
    for path in before["train"][::2]:
        path.unlink()
    (corpus / "new.txt").write_text("new")
    for split in SPLITS:
        after = data.corpus_files(config, split)
        assert [path for path in after if path in before[split]] == [p for p in before[split] if p.exists()]


def test_copies_and_near_copies_of_a_file_are_in_its_split(tmp_path):
    text = "".join(f"This is line {i} of a long text.\n" for i in range(9))
    for i in range(200):
        copy = text if i % 2 else text + f"Only copy {i} has this last line."
        (tmp_path / f"{i}.txt").write_text(copy if i < 100 else f"Text {i} is like no other text." * 3)
    found = {split: [path.name for path in data.corpus_files(text_config(tmp_path).data, split)] for split in SPLITS}
    copies = {split: {name for name in names if int(name[:-4]) < 100} for split, names in found.items()}
    assert copies == {split: {f"{i}.txt" for i in range(100)} if split == "test" else set() for split in SPLITS}
    assert splits.split_of("0.txt") == "test"  # the first of them in the order of names
    others = {name: split for split, names in found.items() for name in names if int(name[:-4]) >= 100}
    assert len(others) == 100 and all(splits.split_of(name) == split for name, split in others.items())


def test_a_changed_file_is_read_again(tmp_path):
    # Two names of different splits: alone each is in its own, as copies both are in that of the first.
    for name, text in (("0.txt", "Something that nobody else says."), ("82.txt", "Something else altogether, here.")):
        (tmp_path / name).write_text(text)
    config = text_config(tmp_path).data
    assert [path.name for path in data.corpus_files(config, "validation")] == ["82.txt"]
    (tmp_path / "82.txt").write_bytes((tmp_path / "0.txt").read_bytes())
    assert data.corpus_files(config, "validation") == []
    assert len(data.corpus_files(config, "test")) == 2


def test_order_is_by_hash_and_max_files_takes_the_first(corpus):
    files = data.corpus_files(text_config(corpus).data, "train")
    digests = [hashlib.sha256(path.relative_to(corpus).as_posix().encode()).digest() for path in files]
    assert digests == sorted(digests)
    assert data.corpus_files(text_config(corpus, max_files=3).data, "train") == files[:3]


def test_no_held_out_byte_is_ever_trained_on(corpus):
    config = text_config(corpus)
    iterator = data.make_iterator(config, "train", seed=0, batch_size=16)
    trained = {int(token) for _ in range(100) for token in next(iterator)["tokens"].flat}
    held_out = {
        int(token)
        for split in ("validation", "test")
        for batch in data.make_iterator(config, split, seed=0, batch_size=1)
        for token in batch["tokens"].flat
    }
    assert len(trained) > 150 and len(held_out) > 10
    assert trained & held_out <= {0}


def test_a_moved_corpus_has_the_same_splits(corpus, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "corpus"
    corpus.rename(moved)
    for split in SPLITS:
        names = [path.relative_to(moved).as_posix() for path in data.corpus_files(text_config(moved).data, split)]
        assert names and all(splits.split_of(name) == split for name in names)


# Files


def test_folder_glob_and_single_file(corpus):
    (corpus / "empty.txt").touch()
    (corpus / ".hidden").write_text("hidden")
    (corpus / ".git").mkdir()
    (corpus / ".git" / "x.txt").write_text("hidden")
    for split in SPLITS:
        by_folder = data.corpus_files(text_config(corpus).data, split)
        assert by_folder == data.corpus_files(text_config(corpus / "**" / "*.txt").data, split)
        assert all(".hidden" not in str(path) and ".git" not in path.parts for path in by_folder)
        assert all(path.name != "empty.txt" for path in by_folder)
        ones = data.corpus_files(text_config(corpus / "1" / "*").data, split)
        assert all(path.parent.name == "1" for path in ones)
    single = corpus / "1" / "1.txt"
    found = {split: data.corpus_files(text_config(single).data, split) for split in SPLITS}
    assert found == {split: [single] if splits.split_of("1.txt") == split else [] for split in SPLITS}


def test_any_bytes_are_text(tmp_path):
    (tmp_path / "os.py").write_bytes(bytes(range(256)))
    (batch,) = data.fixed_batches(text_config(tmp_path, window=256), "train", batch_size=1, count=1, seed=0)
    np.testing.assert_array_equal(batch["tokens"], [np.arange(256)])


def test_standard_library():
    files = {split: data.corpus_files(DataConfig(), split) for split in SPLITS}
    assert all(len(files[split]) > 10 for split in SPLITS)
    every = set().union(*files.values())
    assert {"dataclasses.py", "argparse.py"} <= {path.name for path in every}
    assert all(path.suffix == ".py" for path in every)
    assert not any({"site-packages", "dist-packages"} & set(path.parts) for path in every)
    batch = next(data.make_iterator(Config(), "validation", seed=0, batch_size=3))
    packed = b"\0".join(path.read_bytes() for path in files["validation"])
    assert bytes(batch["tokens"].astype(np.uint8)) == packed[:768]


# Windows and batches


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


# Recall


@settings(max_examples=60)
@given(
    size=st.integers(2, 8),
    blocks=st.integers(3, 12),
    recent_blocks=st.floats(0.0, 1.0),
    vocab=st.sampled_from([16, 300]),
    index=st.integers(0, 2**40),
    split=st.sampled_from(SPLITS),
    draw=st.data(),
)
def test_recall_invariants(size, blocks, recent_blocks, vocab, index, split, draw):
    query, window = draw.draw(st.integers(1, size - 1)), size * blocks
    recent = max(query, int(size * recent_blocks))
    context = ContextConfig(window=window, block_size=size, horizon=size - query, recent_tokens=recent)
    example = recall.RecallSource(context, vocab, split, seed=1, query=query)[index]
    tokens, (answer,) = example["tokens"], example["answers"]
    assert tokens.shape == (window,) and tokens.dtype == np.int32
    assert answer.shape == () and answer.dtype == np.int32
    assert tokens.min() >= 0 and tokens.max() < vocab
    np.testing.assert_array_equal(tokens[answer : answer + size], tokens[-size:])
    assert answer % size == 0 and answer + size <= context.history - recent
    earlier = tokens[:-size].reshape(-1, size)
    # The query, which is what stands of the tail block before the cursor, names one block.
    shown = tokens[: context.history][-query:]
    assert [size * i for i, block in enumerate(earlier) if (block[:query] == shown).all()] == [answer]
    if vocab >= window - size:
        assert len(np.unique(earlier)) == earlier.size


def test_answers_are_uniform_over_the_candidates():
    context = ContextConfig(window=64, block_size=8, horizon=6, recent_tokens=17)
    candidates, count = context.geometry.blocks(1), 3000
    assert candidates == 5  # the cursor is at 58: blocks 0 to 4 end at or before token 58 - 17 = 41
    source = recall.RecallSource(context, 256, "train", seed=0, query=2)
    found = Counter(int(source[i]["answers"][0]) for i in range(count))
    assert sorted(found) == [0, 8, 16, 24, 32]
    assert all(abs(n - count / 5) < 5 * (count * 0.2 * 0.8) ** 0.5 for n in found.values())


def test_every_block_before_the_tail_is_a_candidate_when_only_the_query_stays_in_full():
    source = recall.RecallSource(RECALL, 256, "train", seed=0, query=2)
    assert {int(source[i]["answers"][0]) for i in range(200)} == set(range(0, 56, 8))


def test_recall_example_depends_on_seed_split_and_index_alone():
    def tokens(*, seed=0, split="train", index=0, pool=None):
        return recall.RecallSource(RECALL, 256, split, seed, 2, pool)[index]["tokens"]

    source = recall.RecallSource(RECALL, 256, "train", seed=0, query=2)
    backwards = [source[i]["tokens"] for i in (2, 1, 0)]
    np.testing.assert_array_equal(backwards[::-1], [tokens(index=i) for i in range(3)])
    batch = next(data.make_iterator(recall_config(), "train", seed=0, batch_size=3))
    np.testing.assert_array_equal(batch["tokens"], backwards[::-1])
    variants = [tokens(), tokens(seed=1), tokens(split="validation"), tokens(split="test"), tokens(index=1)]
    assert len({row.tobytes() for row in variants}) == 5
    # numpy may change what a generator draws; whoever compares runs across versions should know.
    assert tokens()[:4].tolist() == [89, 91, 245, 54]


def test_recall_pretraining_repeats_a_small_pool():
    config = recall_config(recall_pool=3)
    batch = next(data.make_iterator(config, "train", seed=0, batch_size=50, pretraining=True))
    assert set(batch) == {"tokens"}
    pools = [np.unique(row.reshape(-1, 8), axis=0) for row in batch["tokens"]]
    assert max(map(len, pools)) == 3  # 8 blocks from 3: some sequence shows them all
    assert all(len(np.unique(pool)) == pool.size for pool in pools)
    assert len({pool.tobytes() for pool in pools}) == 50
    orders = {tuple(np.unique(row.reshape(-1, 8), axis=0, return_inverse=True)[1].flat) for row in batch["tokens"]}
    assert len(orders) > 40


def test_blocks_differ_in_their_first_tokens_even_where_tokens_must_come_twice():
    blocks = recall._distinct_blocks(np.random.default_rng(0), 16, 3, 2, 4)  # all of the 4**2 prefixes there are
    assert len(np.unique(blocks[:, :2], axis=0)) == 16


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
        "'train' holds 100 bytes in 1 files, and one window takes 128.*add files",
    ),
    "empty split": (iterator_over("some", split="validation"), "'validation' holds 0 bytes in 0 files.*window"),
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
