"""Logs that were damaged, cut, or cannot be written: what is said of them."""

import functools
import os

import pytest

from lensjax.runs.config import PHASES
from lensjax.runs.store import log
from lensjax.runs.store.log import read_rows

RunLogger = functools.partial(log.RunLogger, phases=PHASES)


def write(run_dir, phase, steps, **resume):
    with RunLogger(run_dir, **resume) as logger:
        for step in steps:
            logger.log(phase, step, {"loss": 1 / step})


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("5", "no row"),
        ("[]", "no row"),
        ("null", "no row"),
        ("{}", "no row"),
        ('{"phase": "lens"}', "no row"),
        ('{"phase": ["lens"], "step": 1}', "no row"),
        ('{"phase": "lens", "step": 1.5}', "no row"),
        ('{"phase": "lens", "step": true}', "no row"),
        ('{"phase": "lens", "step": -1}', "no row"),
        ('{"phase": "x", "step": 1}', r"no row \(its phase 'x' is none of pretrain, gists, distill, lens, online\)"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"phase": "lens", "step": ' + "9" * 5_000 + "}", "not JSON"),
    ],
)
def test_d10_1_d10_2_d10_3_a_line_that_is_no_row_is_named(tmp_path, line, fault):
    write(tmp_path, "lens", range(1, 4))
    path = tmp_path / "metrics.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, line + "\n", *others]))
    before = path.read_bytes()
    message = rf"metrics\.jsonl is damaged: line 2 is {fault}.*; delete that line$"
    with pytest.raises(ValueError, match=message):
        RunLogger(tmp_path, resume=("lens", 1))
    assert path.read_bytes() == before
    if "'x'" not in fault:  # which phases there are is not known there
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path)


def test_d13_1_a_start_after_a_deletion_overwrites_no_events(tmp_path):
    for first in (1, 3):
        write(tmp_path, "lens", range(first, first + 2), resume=("lens", first - 1))
    folder = tmp_path / "tensorboard" / "lens"
    (folder / "events.out.tfevents.000000").unlink()
    (folder / "events.out.tfevents.of-another-program").touch()
    before = (folder / "events.out.tfevents.000001").read_bytes()
    write(tmp_path, "lens", range(5, 7), resume=("lens", 4))
    assert (folder / "events.out.tfevents.000001").read_bytes() == before
    assert (folder / "events.out.tfevents.000002").is_file() and len(list(folder.iterdir())) == 3


def test_e3_rows_are_counted_and_on_the_disk_when_they_are_synced(tmp_path, monkeypatch):
    write(tmp_path, "pretrain", range(1, 4))
    synced, fsync = [], os.fsync
    with RunLogger(tmp_path, resume=("pretrain", 2)) as logger:
        assert (logger.written("pretrain")[0], logger.written("lens")) == (2, [0, 0])
        logger.log("lens", 1, {"loss": 1.0})
        logger.flush()
        monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino) or fsync(number))
        logger.sync()
        assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino] and logger.written("lens")[0] == 1
    with RunLogger(None) as logger:
        logger.log("lens", 1, {"loss": 1.0})
        logger.sync()
        assert logger.written("lens") == [0, 0]


def test_e8_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with RunLogger(tmp_path) as logger, pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        logger.sync()
