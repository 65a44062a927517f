"""Metrics on disk: `metrics.jsonl`, and the same names for TensorBoard under `tensorboard/<phase>`, with histograms.

`RunLogger.log` keeps arrays where they are; `flush` fetches everything that waits in one transfer and writes
it, so the device runs on undisturbed in between. No other thread writes: what `flush` wrote survives a kill.
"""

import json
import math
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

from lensjax.runs.store import files
from lensjax.training.metrics import HISTOGRAMS, MAY_BE_UNDEFINED, UNDEFINED

Row = dict[str, Any]

_FILE, _BOARDS, _EVENTS = "metrics.jsonl", "tensorboard", "events.out.tfevents."


class RunLogger:
    """Writes the metrics of one run; use it in a `with` statement.

    A row is `{"phase": ..., "step": ..., name: value, ...}`. Values that are undefined are `"n/a"`, and
    missing in TensorBoard. Other values that are not finite are the strings "nan", "inf" and "-inf" in the
    file (JSON has no such numbers) and floats in the rows which `flush` returns, where `check_finite` finds
    them. Histograms (see `HISTOGRAMS`) are no part of a row.

    Args:
      run_dir: the run's folder; None to write nothing, as in all but the first of several processes.
      resume: phase and step of the restored checkpoint: later rows are dropped, and hidden in TensorBoard,
        since they will be written again. None for a new run.
      phases: the phases that a run of this kind has, in their order.

    Raises:
      ValueError: a new run finds metrics in the folder, the phase is unknown, or a line before the last one is no row
        of such a run (a torn last line is what a kill leaves: it is dropped).
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        *,
        resume: tuple[str, int] | None = None,
        phases: tuple[str, ...],
    ) -> None:
        self._phases = phases
        self._pending: list[tuple[str, int, dict[str, ArrayLike]]] = []
        self._files = None if run_dir is None else _Files(Path(run_dir), resume, phases)

    def log(self, phase: str, step: int, metrics: Mapping[str, ArrayLike]) -> None:
        """Queues one row; nothing is fetched or written before `flush`.

        Args:
          phase: one of the run's phases.
          step: steps of that phase which the metrics describe.
          metrics: scalars by name, and counts of histograms, on the device or on the host.

        Raises:
          ValueError: the phase is unknown, or a metric has another shape than its name says, or the name of another
            column.
        """
        _checked_phase(phase, self._phases)
        for name, value in metrics.items():
            if name in ("phase", "step"):
                raise ValueError(f"a metric cannot be named {name!r}: it is a column of its own")
            bins = len(HISTOGRAMS[name]) - 1 if name in HISTOGRAMS else None
            if np.shape(value) != (() if bins is None else (bins,)):
                wanted = "be a scalar" if bins is None else f"have {bins} bins"
                raise ValueError(f"metric {name} must {wanted}, got shape {np.shape(value)}")
        self._pending.append((phase, step, dict(metrics)))

    def flush(self) -> list[Row]:
        """Fetches and writes all queued rows, in order, and returns them."""
        pending, self._pending = self._pending, []
        fetched = jax.device_get([metrics for _, _, metrics in pending])
        rows: list[Row] = [
            {"phase": phase, "step": step}
            | with_undefined({name: metrics[name] for name in metrics if name not in HISTOGRAMS})
            for (phase, step, _), metrics in zip(pending, fetched, strict=True)
        ]
        new = [place for place, row in enumerate(rows) if not self.is_written(row["phase"], row["step"])]
        if self._files is not None:
            histograms = [{name: m[name] for name in m if name in HISTOGRAMS} for m in fetched]
            self._files.write([rows[place] for place in new], [histograms[place] for place in new])
        return rows

    def sync(self) -> None:
        """Returns when all that was written is on the disk, where a checkpoint that follows it may count on it."""
        if self._files is not None:
            self._files.sync()

    def written(self, phase: str) -> list[int]:
        """How many rows of a phase the file holds, those of earlier starts included, and their checksum (CRC-32)."""
        return [0, 0] if self._files is None else list(self._files.written.get(phase, (0, 0)))

    def is_written(self, phase: str, step: int) -> bool:
        """Whether the file of a run that goes on holds rows of a step already, which are then not written again.

        A phase is trained again where its own checkpoints are lost, and those of a later phase are not.
        """
        return self._files is not None and step <= self._files.last.get(phase, 0)

    def close(self) -> None:
        """Writes what is queued and closes the files."""
        try:
            self.flush()
        finally:
            if self._files is not None:
                self._files.close()

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Files:
    """The files that a run's rows go to."""

    def __init__(self, run_dir: Path, resume: tuple[str, int] | None, phases: tuple[str, ...]) -> None:
        self._run_dir, self._phases = run_dir, phases
        run_dir.mkdir(parents=True, exist_ok=True)
        path = self._path = run_dir / _FILE
        # By phase, the number of rows and their checksum.
        self.written: dict[str, tuple[int, int]] = {}
        if resume is not None:
            _checked_phase(resume[0], phases)
            for line, row in _rewind(path, resume, phases):
                self._count(row["phase"], line)
        elif path.exists() and path.stat().st_size:
            raise ValueError(f"{path} holds the metrics of another run; resume that one, or choose another folder")
        self._resume = resume
        # By phase, the last step that the file holds at the start.
        self.last = {} if resume is None else {row["phase"]: row["step"] for _, row in _parsed_lines(path)}
        self._boards: dict[str, RecordWriter] = {}
        self._file = path.open("a", encoding="utf-8")

    def write(self, rows: list[Row], histograms: list[dict[str, np.ndarray]]) -> None:
        lines = [json.dumps(_to_json(row), allow_nan=False) + "\n" for row in rows]
        with files.naming(self._path):
            self._file.write("".join(lines))
            self._file.flush()
        for row, line in zip(rows, lines, strict=True):
            self._count(row["phase"], line)
        with files.naming(self._run_dir / _BOARDS):
            for row, counts in zip(rows, histograms, strict=True):
                self._board(row["phase"]).write(_event(row, counts).SerializeToString())
            for board in self._boards.values():
                board.flush()

    def sync(self) -> None:
        with files.naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with files.naming(self._path):
            self._file.close()
        with files.naming(self._run_dir / _BOARDS):
            for board in self._boards.values():
                board.close()

    def _count(self, phase: str, line: str) -> None:
        count, checksum = self.written.get(phase, (0, 0))
        self.written[phase] = count + 1, zlib.crc32(line.encode(), checksum)

    def _board(self, phase: str) -> RecordWriter:
        if phase not in self._boards:
            folder = self._run_dir / _BOARDS / phase
            folder.mkdir(parents=True, exist_ok=True)
            board = RecordWriter(str(folder / f"{_EVENTS}{_next_number(folder):06d}"))
            board.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            if self._resume is not None and phase in self._phases[self._phases.index(self._resume[0]) :]:
                # Hides what earlier files say about this step and later ones.
                first = self._resume[1] + 1 if phase == self._resume[0] else 0
                start = SessionLog(status=SessionLog.START)
                board.write(Event(wall_time=time.time(), step=first, session_log=start).SerializeToString())
            self._boards[phase] = board
        return self._boards[phase]


def _next_number(folder: Path) -> int:
    """Above those of all event files in a folder.

    TensorBoard reads them in the order of their names; with the usual time stamp, two starts in one second would share
    a file, and with their count a start after a deletion.
    """
    endings = (path.name.removeprefix(_EVENTS) for path in folder.glob(f"{_EVENTS}*"))
    return max((int(ending) for ending in endings if ending.isdecimal()), default=-1) + 1


def read_rows(run_dir: str | Path) -> list[Row]:
    """Reads the rows of a run; a torn last line is left out.

    Raises:
      ValueError: a line before the last one is no row.
    """
    return [row for _, row in _parsed_lines(Path(run_dir) / _FILE)]


def check_finite(rows: Iterable[Row], *, advice: str) -> None:
    """Stops a run whose metrics are not finite.

    Args:
      rows: as returned by `RunLogger.flush`.
      advice: ends the message; says where the last good checkpoint is.

    Raises:
      FloatingPointError: names the first step with such a value, and all such metrics of that step.
    """
    for row in rows:
        faults = [f"{name} = {value}" for name, value in row.items() if _is_fault(value)]
        if faults:
            raise FloatingPointError(f"phase {row['phase']}, step {row['step']}: {', '.join(faults)}; {advice}")


def with_undefined(report: Mapping[str, Any]) -> Row:
    """A report whose values that may be undefined, and are, are `"n/a"`."""
    return {name: _to_number(name, value) for name, value in report.items()}


def _checked_phase(phase: str, phases: tuple[str, ...]) -> None:
    if phase not in phases:
        raise ValueError(f"phase must be one of {', '.join(phases)}, got {phase!r}")


def _to_number(name: str, value: Any) -> Any:
    number = np.asarray(value).item()
    is_undefined = name.endswith(MAY_BE_UNDEFINED) and math.isnan(number)
    return UNDEFINED if is_undefined else number


def _is_fault(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _to_json(row: Row) -> Row:
    return {name: str(value) if _is_fault(value) else value for name, value in row.items()}


def _event(row: Row, histograms: Mapping[str, np.ndarray]) -> Event:
    values = [
        Summary.Value(tag=name, simple_value=value)
        for name, value in row.items()
        if name not in ("phase", "step") and value != UNDEFINED
    ]
    values += [
        Summary.Value(tag=name, histo=_histogram(HISTOGRAMS[name], counts)) for name, counts in histograms.items()
    ]
    return Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))


def _histogram(edges: np.ndarray, counts: np.ndarray) -> HistogramProto:
    """What TensorBoard draws: bins by their upper edges; of the values it knows the bins alone."""
    middles = (edges[1:] + edges[:-1]) / 2
    return HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=counts.sum(),
        sum=counts @ middles,
        sum_squares=counts @ middles**2,
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )


def _parsed_lines(path: Path) -> list[tuple[str, Row]]:
    """Pairs each complete line with its row."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    *lines, _ = text.split("\n")  # behind the last line that was ended there is nothing, or a torn one
    return [(f"{line}\n", _parsed(line, f"{path} is damaged: line {place}")) for place, line in enumerate(lines, 1)]


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of numbers without end
        raise ValueError(f"{where} is not JSON ({error}); delete that line") from error
    has_place = isinstance(row, dict) and isinstance(row.get("phase"), str) and type(row.get("step")) is int
    if not has_place or row["step"] < 0:
        raise ValueError(f"{where} is no row (expected an object with a phase and a step); delete that line")
    return row


def _rewind(path: Path, last: tuple[str, int], phases: tuple[str, ...]) -> list[tuple[str, Row]]:
    """Drops the rows after a phase and step, and returns the others, each behind its line.

    A kill leaves the old file or the new one.
    """
    parsed, end = _parsed_lines(path), (phases.index(last[0]), last[1])
    for place, (_, row) in enumerate(parsed, 1):
        if row["phase"] not in phases:
            raise ValueError(
                f"{path} is damaged: line {place} is no row (its phase {row['phase']!r} is none of "
                f"{', '.join(phases)}); delete that line"
            )
    kept = [(line, row) for line, row in parsed if (phases.index(row["phase"]), row["step"]) <= end]
    files.write_text(path, "".join(line for line, _ in kept))
    return kept
