"""Files of token ids: made once, checked, mapped; windows of them, which resume to the bit."""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lensjax.runs import fit, results
from lensjax.runs.config import Config
from lensjax.runs.data import batches, corpus, token_files
from lensjax.runs.data.task import DataConfig
from lensjax.runs.data.tokenizers import Bytes, read_tokenizer
from tests.corpora import text_config
from tests.vocabularies import write_small

WORKS = {"train": ("iliad", "walden"), "validation": ("emma",), "test": ("ulysses",)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path, model):
    """Works of several chapters each, in folders by split; nothing stands in them twice."""
    random = np.random.default_rng(0)
    for split, works in WORKS.items():
        for work in works:
            folder = tmp_path / "texts" / split / work
            folder.mkdir(parents=True)
            for chapter in range(3):
                letters = random.choice([*"abcdefghij "], 1000 + 7 * chapter)
                (folder / f"{chapter}.txt").write_text("".join(letters))
    (tmp_path / "texts" / "README").write_text("not read")
    base = text_config(tmp_path / "texts")
    data = replace(base.data, tokenizer=str(model), split_by="folder", cache=str(tmp_path / "cache"))
    return replace(base, data=data, base=replace(base.base, vocab_size=512))


def made(config, split="train"):
    row = corpus.token_row(config, split)
    (folder,) = (path.parent for path in config_cache(config).glob("*/tokens.bin"))
    return row, folder


def config_cache(config):
    return Path(config.data.cache)


def test_documents_stand_one_behind_the_other_with_their_separator(config, model):
    tokenizer = read_tokenizer(model)
    row, folder = made(config)
    documents = np.split(row, np.flatnonzero(row == tokenizer.end_of_text) + 1)
    texts = [path.read_text() for path in corpus.corpus_files(config.data, "train")]
    assert [tokenizer.decode(ids[:-1]) for ids in documents[:-1]] == texts and len(documents[-1]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["tokens"], manifest["documents"], manifest["dtype"]) == (len(row), 6, "uint16")
    assert row.dtype == np.uint16 and not row.flags.writeable


def test_a_file_is_made_once_for_what_is_in_the_texts(config, model, monkeypatch):
    row, folder = made(config)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    paths = corpus.corpus_files(config.data, "train")
    for path in paths:
        os.utime(path, (1, 1))
    tokenizer = read_tokenizer(model)
    np.testing.assert_array_equal(token_files.open_tokens(paths, tokenizer, config.data.cache), row)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not list(config_cache(config).glob(".*"))  # nothing half made
    paths[0].write_text("other")
    assert len(token_files.open_tokens(paths, tokenizer, config.data.cache)) < len(row)
    token_files.open_tokens(paths[::-1], tokenizer, config.data.cache)
    token_files.open_tokens(paths, Bytes(), config.data.cache)
    assert len(list(config_cache(config).iterdir())) == 4


def damage_bin(folder):
    path = folder / "tokens.bin"
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)


def rewrite(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "one bit": (damage_bin, r"tokens\.bin \(data\.cache\) has SHA-256 .* was written: delete .* made again"),
    "short": (lambda folder: os.truncate(folder / "tokens.bin", 100), "has SHA-256"),
    "gone": (lambda folder: (folder / "tokens.bin").unlink(), r"\(data\.cache\) is damaged .*delete"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "is damaged"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 30), "is damaged"),
    "other count": (lambda folder: rewrite(folder, tokens=5), "is damaged .tokens.bin is not of 5 uint16"),
    "count of text": (lambda folder: rewrite(folder, tokens="5"), "is damaged"),
    "other type": (lambda folder: rewrite(folder, dtype="float64"), "is damaged"),
    "other manifest": (lambda folder: (folder / "manifest.json").write_text('{"tokens": 3}'), "is damaged .'dtype'"),
}


@pytest.mark.parametrize(("harm", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_said_and_never_mended_in_silence(config, model, harm, message):
    _, folder = made(config)
    harm(folder)
    left = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        token_files.open_tokens(corpus.corpus_files(config.data, "train"), read_tokenizer(model), config.data.cache)
    assert {path: path.read_bytes() for path in folder.iterdir()} == left


def test_e8_a_cache_that_is_no_folder_is_named(config, tmp_path):
    (tmp_path / "file").write_text("text")
    for cache in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"data\.cache '.*file.*' is no folder to write to .*: name another one"):
            token_files.open_tokens(corpus.corpus_files(config.data, "train"), Bytes(), tmp_path / cache)


def test_what_fails_half_way_leaves_nothing(config, tmp_path):
    class Failing(Bytes):
        def encode(self, text, *, special=False):
            raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space"):
        token_files.open_tokens(corpus.corpus_files(config.data, "train"), Failing(), tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_large_vocabularies_take_four_bytes_and_bad_utf_8_shows(config, tmp_path):
    class Large(Bytes):
        vocab_size = 100_000
        digest = "large"

        def encode(self, text, *, special=False):
            return super().encode(text) + 70_000

    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    row = token_files.open_tokens([tmp_path / "bad.txt"], Large(), tmp_path / "cache")
    assert row.dtype == np.uint32 and row.tolist() == [70_000 + byte for byte in "a\ufffd".encode()] + [0]


def test_works_stay_together_and_splits_share_no_document(config, model):
    files = {split: corpus.corpus_files(config.data, split) for split in WORKS}
    assert {split: {path.parent.name for path in paths} for split, paths in files.items()} == {
        split: {*works} for split, works in WORKS.items()
    }
    assert sum(map(len, files.values())) == 12  # not README
    texts = {split: read_tokenizer(model).decode(corpus.token_row(config, split)) for split in WORKS}
    for split, paths in files.items():
        for path in paths:
            assert [one for one, text in texts.items() if path.read_text() in text] == [split]


def test_windows_of_training_cover_the_text_and_begin_anywhere(config):
    row, length = corpus.token_row(config, "train"), config.context.window
    count = len(row) // length
    places = {}
    for at in range(len(row) - length + 1):
        places.setdefault(row[at : at + length].tobytes(), at)
    iterator = batches.make_iterator(config, "train", seed=0, batch_size=1)
    epochs = [[next(iterator)["tokens"][0] for _ in range(count)] for _ in range(3)]
    found = [[places[window.astype(row.dtype).tobytes()] for window in epoch] for epoch in epochs]
    for begins in found:  # one window from each stretch
        assert Counter(begin // length for begin in begins) == Counter(range(count))
    assert len({tuple(sorted(begins)) for begins in found}) == 3
    assert len({begin % length for begins in found for begin in begins}) > length // 2


def test_held_out_windows_are_always_the_same(config):
    row, length = corpus.token_row(config, "validation"), config.context.window
    rows = [batch["tokens"][0] for batch in batches.make_iterator(config, "validation", seed=4, batch_size=1)]
    np.testing.assert_array_equal(np.concatenate(rows), row[: len(row) // length * length])
    draw = {"batch_size": 2, "count": 3, "seed": 1}
    first, again = (batches.fixed_batches(config, "test", **draw) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"], strict=True)


@pytest.mark.parametrize("quote", [0, 1])
def test_position_restores_to_the_bit(config, quote):
    config = replace(config, data=replace(config.data, quote=quote))
    make = lambda share=(0, 1): batches.make_iterator(config, "train", seed=3, batch_size=16, share=share)  # noqa: E731
    iterator, states, rows = make(), [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(iterator.get_state())))
        rows.append(next(iterator)["tokens"])
    for at in (0, 1, 17, 39):
        resumed = make()
        resumed.set_state(states[at])
        for expected in rows[at:]:
            np.testing.assert_array_equal(next(resumed)["tokens"], expected, strict=True)
    parts = [make((process, 2)) for process in range(2)]
    np.testing.assert_array_equal(np.concatenate([next(part)["tokens"] for part in parts]), rows[0])


# Bad input


def test_a_vocabulary_that_the_model_lacks_is_refused_before_anything_is_made(config):
    short = replace(config, base=replace(config.base, vocab_size=256))
    with pytest.raises(
        ValueError, match=r"base\.vocab_size must be at least \d+, the vocabulary of data\.tokenizer '.*"
    ):
        batches.make_iterator(short, "train", seed=0, batch_size=1)
    assert not config_cache(config).exists()


def test_too_little_text_is_refused(config):
    wide = replace(config, context=replace(config.context, window=40_000))
    with pytest.raises(
        ValueError, match=r"'test' holds \d+ tokens in 3 of \d+ files.*takes 40000\. The folders train, valid"
    ):
        batches.make_iterator(wide, "test", seed=0, batch_size=1)
    empty = replace(config, data=replace(config.data, path=f"{config.data.path}/train"))
    with pytest.raises(ValueError, match=r"no file with text in it under .*\{train,validation,test\}"):
        batches.make_iterator(empty, "train", seed=0, batch_size=1)


BAD_SETTINGS = {
    "recall": ({"task": "recall", "tokenizer": "a.json"}, r"data\.tokenizer is of text: .*, got 'recall'"),
    "stdlib": ({"split_by": "folder"}, r"data\.split_by folder is of a folder of text: .*, got 'stdlib'"),
    "rule": ({"split_by": "work"}, r"data\.split_by must be one of file, folder, got 'work'"),
    "cache": ({"cache": ""}, r"data\.cache must name a folder"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


# What it is for


@pytest.mark.parametrize("reads", ["bytes", "tokens"])
def test_maps_show_the_text_at_the_cursor(config, model, reads):
    if reads == "bytes":
        config = replace(config, data=replace(config.data, tokenizer=None))
    config = replace(config, context=replace(config.context, window=100))
    text = "".join(np.random.default_rng(1).choice([*"abcdefghij "], 400))
    ids = read_tokenizer(config.data.tokenizer).encode(text)[:100]
    before, behind = results._at_cursor(config, ids)
    assert len(before) == results.SHOWN_TEXT and 3 <= len(behind) < 20
    assert read_tokenizer(config.data.tokenizer).decode(ids).endswith(before + behind)


@pytest.mark.slow
def test_a_run_on_tokens_is_stored_and_loads_without_its_tokenizer(config, model, tmp_path):
    from lensjax.runs.load import load
    from tests.runs import tiny_config

    base = replace(tiny_config(tmp_path / "run").base, vocab_size=config.base.vocab_size)
    trained = fit.fit(tiny_config(tmp_path / "run", data=config.data, base=base), console=Console(quiet=True))
    assert np.isfinite(trained.summary["nll_policy"])
    gone = tmp_path / "run" / "config.json"
    gone.write_text(gone.read_text().replace(str(model), str(tmp_path / "gone")))
    loaded = load(tmp_path / "run")
    assert loaded.config.data.tokenizer == str(tmp_path / "gone") and loaded.session()


# What it costs


def test_bytes_need_no_tokenizer_and_load_none(config):
    code = (
        "import sys; from tests.corpora import text_config; from lensjax.runs.data import batches;"
        f"next(batches.make_iterator(text_config({config.data.path!r}), 'train', seed=0, batch_size=2));"
        "print({'tokenizers', 'gguf'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"


def test_a_stored_run_needs_no_tokenizer_to_build_its_models():
    config = Config(data=DataConfig(task="text", path="gone", tokenizer="gone.gguf"))
    assert config.build_models()


def test_a_file_is_not_read_into_memory(tmp_path):
    folder, count = tmp_path / "key", 2**25
    folder.mkdir()
    np.arange(count, dtype=np.uint32).astype(np.uint16).tofile(folder / "tokens.bin")
    checksum = hashlib.sha256((folder / "tokens.bin").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"tokens": count, "dtype": "uint16", "sha256": checksum}))
    tracemalloc.start()
    row = token_files.read(folder)
    assert [row[i : i + 1024].tolist()[1] for i in range(0, count, 2**16)] == [1] * 2**9
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21 < row.nbytes / 16
