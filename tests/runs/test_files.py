import errno
import os
import stat
from pathlib import Path

import pytest

from lensjax.runs.store import files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a [1].json"
    files.write_text(path, "é\r\nfirst")
    files.write_text(str(path), "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()
    assert os.listdir(tmp_path) == [path.name]


def test_what_was_there_stays_where_the_disk_is_full_and_the_error_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_text(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*summary\.json"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_the_text_is_on_the_disk_before_it_takes_its_name_and_the_name_is_before_it_returns(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("rename"), replace(self, target))[1])
    files.write_text(tmp_path / "a", "text")
    assert order == ["file", "rename", "folder"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
