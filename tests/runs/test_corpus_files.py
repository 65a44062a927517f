"""Which files a corpus has: each real one once, none of the program's own, and what cannot be read said."""

import inspect
import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest

from lensjax._settings import replace
from lensjax.runs.data import batches, splits
from lensjax.runs.data import corpus as data
from lensjax.runs.data.files import find
from lensjax.runs.data.splits import SPLITS
from lensjax.runs.data.task import DataConfig
from lensjax.runs.store import config_file
from tests.corpora import text_config
from tests.runs import TINY, write_corpus


def files(path: object) -> list[Path]:
    """Those of all splits, of which no two may hold the same real file."""
    config = DataConfig(task="text", path=str(path))
    found = [file for split in SPLITS for file in data.corpus_files(config, split)]
    assert len({file.resolve() for file in found}) == len(found)
    return found


def names(path: object) -> list[str]:
    return sorted(file.name for file in files(path))


def refuses(path: object, *words: str) -> None:
    """One line, which names the setting and its value."""
    with pytest.raises(ValueError) as error:
        files(path)
    message = str(error.value)
    assert "\n" not in message and "data.path" in message and repr(str(path)) in message
    assert all(word in message for word in words), message


@pytest.fixture
def notes(tmp_path):
    return write_corpus(tmp_path / "notes")


TEN = 10


@pytest.mark.parametrize(
    ("link", "to"),
    [("loop", "."), ("sub/back", ".."), ("sub/up", "../.."), ("there", "sub"), ("sub/a/b/loop", "../../..")],
)
@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/**/*.txt", "*/*/*.txt", "**/*/*.txt", "**"])
def test_d3_1_links_to_folders_are_not_followed(notes, link, to, pattern):
    (notes / "sub/a/b").mkdir(parents=True)
    (notes / "sub/extra.txt").write_text("This is one more.")
    before = names(notes / pattern) if pattern not in ("*/*/*.txt",) else []
    (notes / link).symlink_to(to)
    assert (names(notes / pattern) if before else before) == before
    assert len(before) in (0, 1, TEN + 1)


def test_d3_2_held_out_files_are_disjoint_however_many_links_there_are(notes):
    (notes / "sub").mkdir()
    (notes / "sub/back").symlink_to("..")
    (notes / "loop").symlink_to(notes)
    assert len(files(notes / "**/*.txt")) == len(files(notes)) == TEN


def test_d3_3_a_file_with_two_names_is_one_file_and_goes_by_the_first_that_is_no_link(notes, tmp_path):
    real = notes / "middle.txt"
    real.write_text("This one has several names.")
    (notes / "a.txt").symlink_to("middle.txt")
    (notes / "z.txt").hardlink_to(real)
    outside = tmp_path / "outside.txt"
    outside.write_text("This one is elsewhere.")
    for name in ("2nd.txt", "1st.txt"):
        (notes / name).symlink_to(outside)
    found = names(notes)
    assert len(found) == TEN + 2 and {"middle.txt", "1st.txt"} <= set(found)


def test_e4_a_glob_over_two_links_to_the_folder_itself_ends(notes):
    for name in "stuv":
        (notes / name).symlink_to(".")
    for pattern in ("**/*.txt", "**/**/*.txt", "**/*/**/*.txt", "**/**/**/**/**/**"):
        assert len(files(notes / pattern)) == TEN if "/*/" not in pattern else True


def test_folders_may_be_deeper_than_functions_may_call_themselves(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 200)
    deep.mkdir(parents=True)
    (deep / "x.txt").write_text("far down")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert find(str(tmp_path)).files == find(f"{tmp_path}/**/*.txt").files == [deep / "x.txt"]
    finally:
        sys.setrecursionlimit(limit)


def test_names_mean_the_same_in_either_normal_form(tmp_path):
    forms = {form: unicodedata.normalize(form, "été à Nîmes.txt") for form in ("NFC", "NFD")}
    for form, name in forms.items():
        (tmp_path / form).mkdir()
        (tmp_path / form / name).write_text("Il a plu.")
        expected = {
            split: [tmp_path / form / name] if splits.split_of(forms["NFC"]) == split else [] for split in SPLITS
        }
        assert {
            split: data.corpus_files(DataConfig(task="text", path=str(tmp_path / form)), split) for split in SPLITS
        } == expected
        for pattern in forms.values():
            assert names(tmp_path / form / f"{pattern[:3]}*") == [name]
    assert len({batches.digest(text_config(tmp_path / form)) for form in forms}) == 1
    # Two files that differ in nothing else are two, in one split.
    (tmp_path / "NFC" / forms["NFD"]).write_text("Il fait beau.")
    assert len(files(tmp_path / "NFC")) == 2
    found = [data.corpus_files(DataConfig(task="text", path=str(tmp_path / "NFC")), split) for split in SPLITS]
    assert sorted(map(len, found)) == [0, 0, 2]


def run_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_file.to_json(replace(TINY, output_dir=str(folder))))
    (folder / "metrics.jsonl").write_text('{"phase": "lens", "step": 1}\n' * 50)
    return folder


def test_d2_2_what_the_program_wrote_is_no_text(notes):
    run_folder(notes / "runs/a")
    (notes / "runs/sweep/arms").mkdir(parents=True)
    (notes / "runs/sweep/environment.json").write_text(json.dumps([{"packages": {"lensjax": "0.1.0"}}]))
    (notes / "runs/sweep/arms.csv").write_text("arm,nll\n" * 100)
    (notes / "tokens/0a1b").mkdir(parents=True)
    for name in ("tokens.bin", "manifest.json"):
        (notes / "tokens/0a1b" / name).write_bytes(b"{}" * 100)
    assert len(files(notes)) == len(files(notes / "**/*")) == TEN
    (notes / "log.txt").symlink_to("runs/a/metrics.jsonl")
    assert len(files(notes)) == TEN
    # A stranger's config.json is text.
    (notes / "config.json").write_text('{"format": 2, "model_type": "llama"}')
    assert len(files(notes)) == TEN + 1


def test_d2_3_a_run_is_no_corpus(tmp_path):
    folder = run_folder(tmp_path / "runs/a")
    (folder / "more").mkdir()
    for path in (folder, folder / "metrics.jsonl", folder / "more", folder / "*.jsonl"):
        refuses(path, "which a run has written: name a folder of text")
    refuses(tmp_path / "runs", "no file with text", "folders of runs are no text", "runs/a")
    (tmp_path / "link").symlink_to(folder)
    refuses(tmp_path / "link", "which a run has written")


def test_d16_1_a_folder_that_cannot_be_read_is_named(notes, monkeypatch):
    (notes / "sub").mkdir()
    (notes / "sub/x.txt").write_text("This is one more.")
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for path in (notes, notes / "**/*.txt", notes / "sub"):
        refuses(path, "notes/sub", "Permission denied", "make it readable")
    assert len(files(notes / "*.txt")) == TEN


def test_d16_2_a_file_that_cannot_be_read_is_named(notes, monkeypatch):
    (notes / "x.txt").write_text("This is one more.")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "x.txt")
    for path in (notes, notes / "x.txt"):
        refuses(path, "notes/x.txt", "Permission denied", "make it readable")


def test_d16_3_a_link_to_nothing_in_a_corpus_is_named(notes):
    (notes / "x.txt").symlink_to("gone.txt")
    refuses(notes, "x.txt", "a link to 'gone.txt', where nothing is")


def test_m3_a_name_that_is_there_is_no_pattern(tmp_path, monkeypatch):
    write_corpus(tmp_path / "notes [2024]")
    (tmp_path / "notes [2024]/a[1]").mkdir()
    (tmp_path / "notes [2024]/a[1]/b*.txt").write_text("This is one more.")
    assert len(files(tmp_path / "notes [2024]/**/*.txt")) == len(files(tmp_path / "notes [2024]")) == TEN + 1
    for path in ("a[1]/*", "a[1]/b*.txt", "a[1]", "a[[]1]/*", "a?1]/b[*]*"):
        assert names(tmp_path / "notes [2024]" / path) == ["b*.txt"]
    monkeypatch.chdir(tmp_path)
    assert len(files("notes [2024]/*.txt")) == TEN
    refuses("notes [2025]/*.txt", "no file with text in it under .")


def test_m4_what_is_neither_file_nor_folder_is_said_to_be_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "file").write_text("text")
    for path in ("/dev/zero", tmp_path / "pipe"):
        refuses(path, "neither a file nor a folder", "device, a pipe")
    refuses(tmp_path / "link", "is a link to 'gone', where nothing is")
    refuses(tmp_path / "round", "symbolic links")
    refuses(tmp_path / "file/*.txt", "is a file; expected a folder")
    refuses(tmp_path / "gone/*.txt", "does not exist", "gone' is missing")
    refuses(tmp_path / "gone\nline", "does not exist")
    refuses(tmp_path / ("x" * 300), "File name too long")
    refuses("a\0b", "NUL")
    refuses(tmp_path / "*/../file", "..")


def test_a_pipe_in_a_corpus_is_not_waited_for(notes):
    os.mkfifo(notes / "pipe.txt")
    assert len(files(notes)) == TEN


def test_m7_a_folder_of_links_to_folders_is_said_to_be_one(tmp_path):
    write_corpus(tmp_path / "real")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/real").symlink_to("../real")
    refuses(tmp_path / "links", "links to folders are not followed", "links/real")
    # The folder that is named itself may be a link.
    assert len(files(tmp_path / "links/real")) == TEN


def test_d8_5_a_user_that_is_not_there():
    refuses("~nosuchuser/x", "~nosuchuser is no user's home")


def test_hidden_files_are_read_where_a_pattern_names_them(notes):
    (notes / ".drafts").mkdir()
    (notes / ".drafts/.x.txt").write_text("one")
    (notes / ".drafts/y.txt").write_text("two")
    assert len(files(notes / "**/*.txt")) == len(files(notes)) == TEN
    assert names(notes / ".drafts/*") == names(notes / ".d*/*.txt") == names(notes / "**/.drafts/*") == ["y.txt"]
    assert names(notes / "**/.drafts/.*") == [".x.txt"]


def test_m8_a_batch_larger_than_the_text_to_train_on_is_refused(tmp_path):
    (tmp_path / "os.py").write_text("one window of 32 bytes, not more than that")
    config = text_config(tmp_path)
    assert len(next(batches.make_iterator(config, "train", seed=0, batch_size=1))["tokens"]) == 1
    with pytest.raises(ValueError, match="'train' holds 1 windows of 32 tokens, and 2 are needed; lower batch_size"):
        batches.make_iterator(config, "train", seed=0, batch_size=2)


def test_a_corpus_larger_than_memory_is_refused_at_once(notes):
    with (notes / "huge.txt").open("wb") as file:
        file.truncate(2**42)  # a hole, which takes no room
    refuses(notes, "4,096", "GiB of text", "of memory: name fewer files")


def test_too_little_text_says_how_many_files_are_alike(tmp_path):
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text(f"note {index}\nbuy milk, which is a line that all of them have\n")
    config = replace(TINY, data=DataConfig(task="text", path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"holds 0 tokens in 0 of 20 files, in 1 families of alike ones, and one"):
        for split in SPLITS:
            batches.fixed_batches(config, split, batch_size=1, count=1, seed=0)
