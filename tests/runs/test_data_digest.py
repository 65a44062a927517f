"""What tells whether the data of a run are those of another."""

import os
import shutil

import pytest

from lensjax.runs.data import batches, splits
from lensjax.runs.data import tokenizers as tokens
from tests.corpora import recall_config, text_config, write_numbered


def test_it_is_that_of_the_content_wherever_it_lies_and_whenever_it_was_touched(tmp_path):
    config = text_config(write_numbered(tmp_path / "a"))
    before = batches.digest(config)
    assert len(before) == 64 and set(before) <= set("0123456789abcdef")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b").rglob("*.txt"):
        os.utime(path, (0, 0))
    assert batches.digest(text_config(tmp_path / "b")) == before


@pytest.mark.parametrize("change", ["content", "name", "new", "gone"])
def test_d4_7_any_change_of_the_files_that_are_read_shows(tmp_path, change):
    config = text_config(write_numbered(tmp_path))
    before, path = batches.digest(config), tmp_path / "1" / "1.txt"
    if change == "content":
        status = path.stat()
        path.write_bytes(b"z" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "name":
        path.rename(path.with_name("one.txt"))
    elif change == "new":
        (tmp_path / "new.txt").write_text("new")
    else:
        path.unlink()
    assert batches.digest(config) != before


def test_files_that_are_not_read_do_not_matter(tmp_path):
    config = text_config(write_numbered(tmp_path), max_files=3)
    before = batches.digest(config)
    last = max(tmp_path.rglob("*.txt"), key=lambda path: splits.digest(path.relative_to(tmp_path).as_posix()))
    last.write_bytes(b"something else")
    assert batches.digest(config) == before


def test_tasks_tokenizers_and_quotes_differ(tmp_path, monkeypatch):
    config = text_config(write_numbered(tmp_path))
    found = {batches.digest(config), batches.digest(recall_config()), batches.digest(recall_config(query=3))}
    assert len(found) == 2  # settings are compared as such
    monkeypatch.setattr(tokens.Bytes, "digest", "other")
    assert batches.digest(config) not in found
    monkeypatch.setitem(batches._VERSIONS, "recall", 2)
    assert batches.digest(recall_config()) not in found
