import functools
import json
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lensjax.runs.config import PHASES
from lensjax.runs.store import log
from lensjax.runs.store.log import check_finite, read_rows
from lensjax.training.metrics import HISTOGRAMS, MAY_BE_UNDEFINED, UNDEFINED

RunLogger = functools.partial(log.RunLogger, phases=PHASES)


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def board(run_dir: Path, phase: str) -> dict[tuple[str, int], float]:
    """What TensorBoard shows of a phase, by its rules: files by name; a START event hides its step and later ones."""
    shown: dict[tuple[str, int], float] = {}
    for path in sorted((run_dir / "tensorboard" / phase).iterdir()):
        assert "tfevents" in path.name
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 12 + size + 4  # length, its checksum, the event, its checksum
            if event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                is_histogram = value.HasField("histo")
                shown[value.tag, event.step] = value.histo if is_histogram else value.simple_value
    return shown


def expected_board(run_dir: Path, phase: str) -> dict[tuple[str, int], float]:
    return {
        (name, row["step"]): pytest.approx(value)
        for row in read_rows(run_dir)
        for name, value in row.items()
        if row["phase"] == phase and name not in ("phase", "step") and value != UNDEFINED
    }


def write(run_dir: Path, phase: str, steps: range, *, resume: tuple[str, int] | None = None) -> None:
    with RunLogger(run_dir, resume=resume) as logger:
        for step in steps:
            logger.log(phase, step, {"loss": jnp.float32(1 / step), "lr": 0.1})


# Rows


def test_rows_by_hand(tmp_path):
    with RunLogger(tmp_path / "run") as logger:
        logger.log("pretrain", 1, {"loss": jnp.float32(0.5), "lr": 1e-3, "count": jnp.int32(4)})
        logger.log("lens", 1, {"mc/preference_corr_mean": jnp.float32(jnp.nan), "loss": np.float32(2.0)})
        logger.log("lens", 2, {"mc/preference_corr_mean": jnp.float32(-0.5), "half": jnp.bfloat16(1.5)})
        assert lines(tmp_path / "run") == []
        rows = logger.flush()
        assert logger.flush() == []
    expected = [
        {"phase": "pretrain", "step": 1, "loss": 0.5, "lr": 1e-3, "count": 4},
        {"phase": "lens", "step": 1, "mc/preference_corr_mean": "n/a", "loss": 2.0},
        {"phase": "lens", "step": 2, "mc/preference_corr_mean": -0.5, "half": 1.5},
    ]
    assert rows == read_rows(tmp_path / "run") == [json.loads(line) for line in lines(tmp_path / "run")] == expected
    assert board(tmp_path / "run", "pretrain") == {
        ("loss", 1): 0.5,
        ("lr", 1): pytest.approx(1e-3),
        ("count", 1): 4,
    }
    assert board(tmp_path / "run", "lens") == {
        ("loss", 1): 2.0,
        ("mc/preference_corr_mean", 2): -0.5,
        ("half", 2): 1.5,
    }


def test_histograms_are_in_tensorboard_alone(tmp_path):
    (name,) = HISTOGRAMS
    edges = HISTOGRAMS[name]
    counts = np.zeros(len(edges) - 1, np.float32)
    counts[[0, 20, -1]] = 1, 3, 2
    with RunLogger(tmp_path) as logger:
        logger.log("lens", 1, {"loss": jnp.float32(0.5), name: jnp.asarray(counts)})
        assert logger.flush() == [{"phase": "lens", "step": 1, "loss": 0.5}]
    assert read_rows(tmp_path) == [{"phase": "lens", "step": 1, "loss": 0.5}]
    shown = board(tmp_path, "lens")
    assert set(shown) == {("loss", 1), (name, 1)}
    histogram = shown[name, 1]
    assert (list(histogram.bucket), histogram.num) == (counts.tolist(), 6)
    assert list(histogram.bucket_limit) == edges[1:].tolist() and histogram.min == edges[0] == -histogram.max
    assert histogram.bucket_limit[20] == 0
    with RunLogger(None) as logger, pytest.raises(ValueError, match=rf"{name} must have 42 bins, got shape \(3,\)"):
        logger.log("lens", 1, {name: jnp.ones(3)})


class Fetched:
    """A scalar that counts how often its value is asked for."""

    shape = ()

    def __init__(self):
        self.count = 0

    def __array__(self, dtype=None, copy=None):
        self.count += 1
        return np.asarray(0.25, np.float32)


def test_log_fetches_nothing_before_flush(tmp_path):
    value = Fetched()
    with RunLogger(tmp_path) as logger:
        logger.log("lens", 1, {"loss": value})
        assert value.count == 0
        assert logger.flush() == [{"phase": "lens", "step": 1, "loss": 0.25}]
        assert value.count == 1


def test_flush_makes_one_transfer(tmp_path, monkeypatch):
    calls, device_get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: calls.append(tree) or device_get(tree))
    with RunLogger(tmp_path) as logger:
        for step in range(5):
            logger.log("lens", step, {"a": jnp.float32(1), "b": jnp.float32(2)})
        logger.flush()
        assert len(calls) == 1 and len(jax.tree.leaves(calls)) == 10


def test_log_keeps_the_values_of_its_call(tmp_path):
    metrics = {"loss": 1.0}
    with RunLogger(tmp_path) as logger:
        logger.log("lens", 1, metrics)
        metrics["loss"] = 2.0
    assert read_rows(tmp_path)[0]["loss"] == 1.0


def test_an_error_in_the_run_loses_no_row(tmp_path):
    with pytest.raises(KeyError), RunLogger(tmp_path) as logger:
        logger.log("lens", 1, {"loss": 1.0})
        raise KeyError
    assert read_rows(tmp_path) == [{"phase": "lens", "step": 1, "loss": 1.0}]
    assert board(tmp_path, "lens") == {("loss", 1): 1.0}


def test_flushed_rows_are_on_disk_before_close(tmp_path):
    with RunLogger(tmp_path) as logger:
        logger.log("lens", 1, {"loss": 1.0})
        logger.flush()
        assert len(lines(tmp_path)) == 1
        assert board(tmp_path, "lens") == {("loss", 1): 1.0}


# Values that are not finite


def test_undefined_is_never_a_fault_and_other_nans_always_are(tmp_path):
    undefined = {name: jnp.float32(jnp.nan) for name in MAY_BE_UNDEFINED}
    undefined |= {f"eval/{name}": value for name, value in undefined.items()}
    with RunLogger(tmp_path) as logger:
        logger.log("lens", 6, undefined | {"loss": jnp.float32(1.0)})
        logger.log("lens", 7, {"loss": jnp.float32(jnp.nan), "kl": jnp.float32(-jnp.inf), "lr": 0.1})
        rows = logger.flush()
    assert all(rows[0][name] == "n/a" for name in undefined)
    check_finite(rows[:1], advice="")
    with pytest.raises(FloatingPointError) as error:
        check_finite(rows, advice="the last good checkpoint is lens/5")
    message = "phase lens, step 7: kl = -inf, loss = nan; the last good checkpoint is lens/5"
    assert str(error.value) == message

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = [json.loads(line, parse_constant=refuse) for line in lines(tmp_path)]
    assert stored[1] == {"phase": "lens", "step": 7, "kl": "-inf", "loss": "nan", "lr": 0.1}
    assert set(board(tmp_path, "lens")) == {("loss", 6), ("loss", 7), ("kl", 7), ("lr", 7)}


# Resume


def test_resumed_file_equals_the_uninterrupted_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        write(run, "pretrain", range(1, 5))
        write(run, "gists", range(1, 3), resume=("pretrain", 4))
        write(run, "distill", range(1, 4), resume=("gists", 2))
    write(whole, "lens", range(1, 9), resume=("distill", 3))
    write(cut, "lens", range(1, 7), resume=("distill", 3))
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "lens", "step": 7, "lo')  # a kill in the middle of a write
    write(cut, "lens", range(4, 9), resume=("lens", 3))
    for run in (whole, cut):
        write(run, "online", range(1, 3), resume=("lens", 8))
    assert lines(cut) == lines(whole) and len(lines(cut)) == 19
    for phase in PHASES:
        assert board(cut, phase) == board(whole, phase) == expected_board(whole, phase)


def test_resume_drops_later_rows_and_later_phases(tmp_path):
    write(tmp_path, "pretrain", range(1, 5))
    write(tmp_path, "lens", range(1, 5), resume=("pretrain", 4))
    write(tmp_path, "pretrain", range(3, 4), resume=("pretrain", 2))
    assert [(row["phase"], row["step"]) for row in read_rows(tmp_path)] == [("pretrain", s) for s in (1, 2, 3)]
    assert board(tmp_path, "pretrain") == expected_board(tmp_path, "pretrain")
    write(tmp_path, "lens", range(1, 2), resume=("pretrain", 3))
    assert board(tmp_path, "lens") == expected_board(tmp_path, "lens")
    assert [key[1] for key in board(tmp_path, "lens")] == [1, 1]


def test_resume_of_a_later_phase_keeps_the_earlier_one(tmp_path):
    write(tmp_path, "pretrain", range(1, 9))
    before = lines(tmp_path)
    with RunLogger(tmp_path, resume=("lens", 0)) as logger:
        logger.log("pretrain", 9, {"loss": 1.0})
    assert lines(tmp_path)[:-1] == before
    assert len(board(tmp_path, "pretrain")) == 8 * 2 + 1


def test_resume_without_any_row(tmp_path):
    write(tmp_path, "lens", range(1, 3), resume=("pretrain", 0))
    assert len(read_rows(tmp_path)) == 2


def test_two_starts_share_no_event_file(tmp_path):
    for first in (1, 3, 5):
        write(tmp_path, "lens", range(first, first + 2), resume=("lens", first - 1))
    assert len(list((tmp_path / "tensorboard" / "lens").iterdir())) == 3
    assert len(board(tmp_path, "lens")) == 6 * 2


def test_a_rewind_cut_short_leaves_the_old_rows(tmp_path, monkeypatch):
    write(tmp_path, "lens", range(1, 5))
    before = lines(tmp_path)

    def fail(*args):
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        RunLogger(tmp_path, resume=("lens", 2))
    assert lines(tmp_path) == before


# Bad input


def test_bad_metrics_are_refused(tmp_path):
    with RunLogger(tmp_path) as logger:
        with pytest.raises(
            ValueError, match="phase must be one of pretrain, gists, distill, lens, online, got 'train'"
        ):
            logger.log("train", 1, {})
        with pytest.raises(ValueError, match=r"metric mc/lod_loss must be a scalar, got shape \(3,\)"):
            logger.log("lens", 1, {"mc/lod_loss": jnp.ones(3)})
        with pytest.raises(ValueError, match="cannot be named 'step'"):
            logger.log("lens", 1, {"step": 1})
        assert logger.flush() == []


def test_bad_starts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="phase must be one of pretrain, gists, distill, lens, online, got 'x'"):
        RunLogger(tmp_path, resume=("x", 1))
    write(tmp_path, "lens", range(1, 3))
    with pytest.raises(ValueError, match="holds the metrics of another run"):
        RunLogger(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"phase": "lens", "step": 1}\n{"phase"\n{"phase": "lens", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: line 2 is not JSON .*delete that line"):
        RunLogger(tmp_path, resume=("lens", 3))
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_rows(tmp_path)


def test_a_run_of_another_kind_has_phases_of_its_own(tmp_path):
    with RunLogger(tmp_path, phases=("meta",)) as logger:
        logger.log("meta", 1, {"loss": 1.0})
        logger.log("meta", 2, {"loss": 0.5})
        with pytest.raises(ValueError, match="phase must be one of meta, got 'lens'"):
            logger.log("lens", 1, {"loss": 1.0})
    with RunLogger(tmp_path, phases=("meta",), resume=("meta", 1)) as logger:
        logger.log("meta", 2, {"loss": 0.25})
    assert [(row["phase"], row["step"], row["loss"]) for row in read_rows(tmp_path)] == [
        ("meta", 1, 1.0),
        ("meta", 2, 0.25),
    ]
