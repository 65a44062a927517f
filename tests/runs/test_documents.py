"""Documents in rows: which split each is in, their token files, and runs on them that go on where they stopped."""

import json
import random
import tracemalloc
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import pytest

from lensjax._settings import replace
from lensjax.runs.data import batches, corpus, documents, formats
from lensjax.runs.data.splits import SPLITS, split_of
from lensjax.runs.data.task import DataConfig
from tests.corpora import text_config
from tests.formats import NEEDS_ARROW, WRITERS, write_jsonl
from tests.runs import Killed
from tests.toy_run import CONFIG, Run, start_and_interrupt

WORDS = ["".join(random.Random(i).choices("etaoinshrdlu", k=2 + i % 7)) for i in range(500)]


def prose(seed: int, words: int = 20) -> str:
    """Words that no other seed has in this order."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


ROWS = [{"id": f"doc-{i}", "text": prose(i)} for i in range(120)]


def settings(folder: Path, **changes):
    """A configuration of text in `corpus`, whose ids are in `id`."""
    config = text_config(folder / "corpus")
    return replace(config, data=changed(config.data, cache=str(folder / "cache"), **{"id_column": "id", **changes}))


def written(folder: Path, rows=ROWS, kind="jsonl") -> Path:
    if kind in NEEDS_ARROW:
        pytest.importorskip("pyarrow", reason="pyarrow (extra data) is not installed")
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    WRITERS[kind](folder / "corpus", rows)
    return folder


def texts(config) -> dict[str, list[str]]:
    """The documents of each split, as they stand in its token file."""
    return {split: bytes(corpus.token_row(config, split)).decode().split("\0")[:-1] for split in SPLITS}


# Splits


@pytest.mark.parametrize("kind", WRITERS)
def test_the_hash_of_an_id_says_the_split_whatever_the_format(tmp_path, kind):
    config = settings(written(tmp_path, kind=kind))
    expected = {split: [row["text"] for row in ROWS if split_of(row["id"]) == split] for split in SPLITS}
    assert texts(config) == expected and all(expected.values())
    assert corpus.token_row(config, "train").dtype == np.uint8


def test_rows_may_move_between_files_where_they_have_ids(tmp_path):
    before = texts(settings(written(tmp_path / "a")))
    for i, rows in enumerate((ROWS[70:], ROWS[:70])):
        write_jsonl(written(tmp_path / "b", ROWS[:0]) / "corpus", rows[::-1])
        (tmp_path / "b/corpus/rows.jsonl").rename(tmp_path / f"b/corpus/{i}.jsonl")
    after = texts(settings(tmp_path / "b"))
    assert {split: sorted(before[split]) for split in SPLITS} == {split: sorted(after[split]) for split in SPLITS}


def test_without_ids_the_file_and_the_row_say_it(tmp_path):
    (tmp_path / "corpus/sub").mkdir(parents=True)
    write_jsonl(tmp_path / "corpus/sub", ROWS)
    (tmp_path / "corpus/notes.txt").write_text("One file that is a document.")
    (tmp_path / "corpus/empty.jsonl.gz").write_bytes(b"")
    named = {f"sub/rows.jsonl#{i + 1}": row["text"] for i, row in enumerate(ROWS)}
    named = {"notes.txt": "One file that is a document."} | named
    expected = {split: [text for name, text in named.items() if split_of(name) == split] for split in SPLITS}
    assert texts(settings(tmp_path, id_column=None)) == expected


def test_what_is_nearly_the_same_is_in_one_split_that_of_the_smallest_id(tmp_path):
    copies = {0: "test", 7: "validation", 30: "train"}
    rows, expected = list(ROWS), {}
    for place, split in copies.items():
        smallest = next(f"a-{place}-{i}" for i in range(1000) if split_of(f"a-{place}-{i}") == split)
        text = prose(1000 + place, 60)
        family = [text, text, text.upper(), text + " end", text.replace(" ", "\n")]
        rows += [{"id": f"copy-{place}-{i}", "text": one} for i, one in enumerate(family)]
        rows.append({"id": smallest, "text": f"so {text}"})
        expected[split] = [*family, f"so {text}"]
    found = texts(settings(written(tmp_path, random.Random(1).sample(rows, len(rows)))))
    for split, family in expected.items():
        assert set(family) <= set(found[split])
        assert not any(set(family) & set(found[other]) for other in SPLITS if other != split)
    alone = {split: {row["text"] for row in ROWS if split_of(row["id"]) == split} for split in SPLITS}
    assert all(alone[split] <= set(found[split]) for split in SPLITS)


def test_few_documents_are_the_first_by_their_hash(tmp_path):
    whole, few = (texts(settings(written(tmp_path), max_files=most)) for most in (None, 3))
    ids = {row["text"]: row["id"] for row in ROWS}
    for split in SPLITS:
        first = sorted(whole[split], key=lambda text: corpus.digest(ids[text]))[:3]
        assert sorted(few[split]) == sorted(first)


def test_folders_may_say_the_split(tmp_path):
    for split, rows in zip(SPLITS, (ROWS[:80], ROWS[80:100], ROWS[100:]), strict=True):
        (tmp_path / "corpus" / split).mkdir(parents=True)
        write_jsonl(tmp_path / "corpus" / split, rows)
    (tmp_path / "corpus/README").write_text("not read")
    config = settings(tmp_path, split_by="folder")
    assert texts(config)["validation"] == [row["text"] for row in ROWS[80:100]]
    write_jsonl(tmp_path / "corpus/test", [*ROWS[100:], {"id": "again", "text": ROWS[3]["text"] + "\n"}])
    with pytest.raises(ValueError, match=r"folder: 'again' in test and 'doc-3' in train are the same text, or nearly"):
        texts(config)


# Token files


def test_files_of_tokens_are_made_once_and_the_rows_not_read_again(tmp_path, monkeypatch):
    config = settings(written(tmp_path))
    before = texts(config), batches.digest(config)
    corpus._mapped_rows.cache_clear()
    monkeypatch.setattr(formats, "documents", lambda *args, **kwargs: pytest.fail("a row is read"))
    assert (texts(config), batches.digest(config)) == before
    (made,) = (tmp_path / "cache").iterdir()
    assert made.name in {
        documents.key([("rows.jsonl", corpus._sha256(tmp_path / "corpus/rows.jsonl", None))], *rest)
        for rest in [(config.data, corpus.read_tokenizer(None))]
    }
    corpus._mapped_rows.cache_clear()
    content = (made / "validation/tokens.bin").read_bytes()
    (made / "validation/tokens.bin").write_bytes(b"?" + content[1:])
    with pytest.raises(
        ValueError, match=r"tokens\.bin \(data\.cache\) has SHA-256 .*: delete .*/validation to have it"
    ):
        texts(config)


@pytest.mark.parametrize("change", [{"id_column": None}, {"text_column": "id"}, {"max_files": 5}])
def test_other_settings_and_other_rows_are_other_data(tmp_path, change):
    config = settings(written(tmp_path))
    digests = {batches.digest(config), batches.digest(settings(tmp_path, **change))}
    written(tmp_path, ROWS[1:])
    digests.add(batches.digest(config))
    assert len(digests) == 3


def test_what_fails_half_way_leaves_nothing(tmp_path):
    config = settings(written(tmp_path, [*ROWS, {"id": 1, "text": None}]))
    with pytest.raises(ValueError, match=r"row 121 of '.*rows.jsonl' has null for 'text'"):
        texts(config)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_corpus_is_never_whole_in_memory(tmp_path):
    size, count = 100_000, 200
    random_text = random.Random(0).randbytes(size).hex()
    rows = ({"id": i, "text": random_text[i:] + random_text[:i]} for i in range(0, 2 * count, 2))
    with (written(tmp_path, []) / "corpus/rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    tracemalloc.start()
    row = corpus.token_row(settings(tmp_path), "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(corpus.token_row(settings(tmp_path), split)) for split in SPLITS) == count * (2 * size + 1)
    assert peak < count * 2 * size / 3, f"{peak:,} bytes, of which {row.nbytes:,} are mapped"


def test_too_little_text_is_refused(tmp_path):
    config = settings(written(tmp_path, ROWS[:3]))
    with pytest.raises(
        ValueError, match=r"holds \d+ tokens in the rows of 1 files, and one window takes 32\. Whole docu"
    ):
        for split in SPLITS:
            batches.make_iterator(config, split, seed=0, batch_size=1)


def test_bad_settings_are_refused():
    with pytest.raises(
        ValueError, match=r"data\.text_column and data\.id_column are read only where data\.task is text"
    ):
        DataConfig(task="stdlib", text_column="body")
    for name in ("text_column", "id_column"):
        with pytest.raises(ValueError, match=rf"data\.{name} must name a column"):
            DataConfig(task="text", path="a", **{name: ""})


# The place in the data


def small_files(folder: Path) -> Path:
    """10,000 files in 100 folders."""
    for i in range(10_000):
        path = folder / "corpus" / f"{i % 100:02d}" / f"{i}.txt"
        if i < 100:
            path.parent.mkdir(parents=True)
        path.write_text(f"{i} {prose(i, 10)}")
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset", pytest.param("files", marks=pytest.mark.slow)])
def test_a_run_goes_on_at_the_very_window_where_it_was_killed(tmp_path, monkeypatch, kind):
    data = settings(small_files(tmp_path) if kind == "files" else written(tmp_path, kind=kind)).data
    config = replace(CONFIG, data=data, **{"base.vocab_size": 256})
    whole, cut = Run(tmp_path / "whole", monkeypatch, config), Run(tmp_path / "cut", monkeypatch, config)
    whole.start()

    def kill():
        raise Killed

    with pytest.raises(Killed):
        start_and_interrupt(cut, "batch", kill, set(range(5)))
    for cache in (corpus._mapped_rows, corpus._packed, corpus._families):
        cache.cache_clear()  # as in a process that knows nothing of the data
    cut.start()
    assert cut.result() == whole.result()  # a digest of all tokens in their order, and the place in the data


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("seed", [0, 1])
def test_position_restores_to_the_bit(tmp_path, kind, seed):
    config = settings(written(tmp_path, kind=kind))

    def iterator():
        return batches.make_iterator(config, "train", seed=seed, batch_size=3)

    first = iterator()
    length = 2 + len(corpus.token_row(config, "train")) // 32 // 3  # into the second epoch
    every = [first.get_state() | {"tokens": next(first)["tokens"].tolist()} for _ in range(length)]
    for place in (0, 1, length // 2, length - 2):
        corpus._mapped_rows.cache_clear()
        again = iterator()
        again.set_state({name: value for name, value in every[place].items() if name != "tokens"})
        assert [next(again)["tokens"].tolist() for _ in every[place:]] == [one["tokens"] for one in every[place:]]
