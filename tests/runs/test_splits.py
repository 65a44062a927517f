"""Which file belongs to which split, and which files there are."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from lensjax.runs.config import Config
from lensjax.runs.data import batches, splits
from lensjax.runs.data import corpus as data
from lensjax.runs.data.splits import SPLITS
from lensjax.runs.data.task import DataConfig
from tests.corpora import text_config, write_numbered


@pytest.fixture
def corpus(tmp_path):
    return write_numbered(tmp_path)


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
    iterator = batches.make_iterator(config, "train", seed=0, batch_size=16)
    trained = {int(token) for _ in range(100) for token in next(iterator)["tokens"].flat}
    held_out = {
        int(token)
        for split in ("validation", "test")
        for batch in batches.make_iterator(config, split, seed=0, batch_size=1)
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
    (batch,) = batches.fixed_batches(text_config(tmp_path, window=256), "train", batch_size=1, count=1, seed=0)
    np.testing.assert_array_equal(batch["tokens"], [np.arange(256)])


def test_standard_library():
    files = {split: data.corpus_files(DataConfig(), split) for split in SPLITS}
    assert all(len(files[split]) > 10 for split in SPLITS)
    every = set().union(*files.values())
    assert {"dataclasses.py", "argparse.py"} <= {path.name for path in every}
    assert all(path.suffix == ".py" for path in every)
    assert not any({"site-packages", "dist-packages"} & set(path.parts) for path in every)
    batch = next(batches.make_iterator(Config(), "validation", seed=0, batch_size=3))
    packed = b"\0".join(path.read_bytes() for path in files["validation"])
    assert bytes(batch["tokens"].astype(np.uint8)) == packed[:768]
