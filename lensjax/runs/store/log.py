"""Metrics of a run: `metrics.jsonl`, by which it goes on, and the same names for its other sinks (see `sinks`).

`RunLogger.log` keeps arrays where they are; `flush` fetches everything that waits in one transfer and writes
it, so the device runs on undisturbed in between. No other thread writes: what `flush` wrote survives a kill.
"""

import json
import math
import os
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from lensjax.runs.store import files
from lensjax.runs.store.boards import open_boards
from lensjax.runs.store.sinks import Histograms, LoggingConfig, Mark, Metrics, Sink
from lensjax.training.metrics import HISTOGRAMS, MAY_BE_UNDEFINED, UNDEFINED

Row = dict[str, Any]

_FILE = "metrics.jsonl"


class RunLogger:
    """Writes the metrics of one run; use it in a `with` statement.

    A row is `{"phase": ..., "step": ..., name: value, ...}`. Values that are undefined are `"n/a"`, and
    missing on boards. Other values that are not finite are the strings "nan", "inf" and "-inf" in the
    file (JSON has no such numbers) and floats in the rows which `flush` returns, where `check_finite` finds
    them. Histograms (see `HISTOGRAMS`) are no part of a row.

    Args:
      run_dir: the run's folder; None to write nothing, as in all but the first of several processes.
      resume: phase and step of the restored checkpoint: later rows are dropped, since they will be written again. None
        for a new run.
      phases: the phases that a run of this kind has, in their order.
      logging: which sinks there are beside the file.
      values: the configuration by dotted names, for boards that show it.

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
        logging: LoggingConfig = LoggingConfig(),  # noqa: B008 - it is frozen
        values: Metrics | None = None,
    ) -> None:
        self._phases = phases
        self._pending: list[tuple[str, int, dict[str, ArrayLike]]] = []
        self._lines: _Lines | None = None
        self._sinks: list[Sink] = []
        if run_dir is not None:
            self._lines = _Lines(Path(run_dir), resume, phases)
            boards = open_boards(
                logging, Path(run_dir), resume=resume, phases=phases, values=values or {}, known=self._lines.known
            )
            self._sinks = [*boards, self._lines]  # the file comes last: what is in it has been sent

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
        for row, metrics in zip(rows, fetched, strict=True):
            phase, step, *_ = row.values()
            if self.is_written(phase, step):
                continue
            numbers = {name: row[name] for name in row if name not in ("phase", "step")}
            histograms = {name: metrics[name] for name in metrics if name in HISTOGRAMS}
            for sink in self._sinks:
                sink.write(phase, step, numbers, histograms)
        for sink in self._sinks:
            sink.flush()
        return rows

    def show(self, picture: Path) -> None:
        """Shows a picture on the boards; one that refuses it costs a warning, as the file is in the run's folder."""
        for sink in self._sinks:
            try:
                sink.show(picture)
            except Exception as error:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                print(f"warning: {picture} is not on {type(sink).__name__}: {reason}", file=sys.stderr)

    def sync(self) -> None:
        """Returns when all that was written is on the disk, where a checkpoint that follows it may count on it."""
        if self._lines is not None:
            self._lines.sync()

    def written(self, phase: str) -> list[int]:
        """How many rows of a phase the file holds, those of earlier starts included, and their checksum (CRC-32)."""
        return [0, 0] if self._lines is None else list(self._lines.written.get(phase, (0, 0)))

    def is_written(self, phase: str, step: int) -> bool:
        """Whether the file of a run that goes on holds rows of a step already, which are then not written again.

        A phase is trained again where its own checkpoints are lost, and those of a later phase are not.
        """
        return self._lines is not None and step <= self._lines.last.get(phase, 0)

    def close(self) -> None:
        """Writes what is queued and closes the files."""
        try:
            self.flush()
        finally:
            for sink in self._sinks:
                sink.close()

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Lines:
    """The sink that a run goes on by: `metrics.jsonl`, a row a line."""

    def __init__(self, run_dir: Path, resume: tuple[str, int] | None, phases: tuple[str, ...]) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = self._path = run_dir / _FILE
        # By phase, the number of rows and their checksum.
        self.written: dict[str, tuple[int, int]] = {}
        # Rows that earlier starts have written, those that are dropped now included.
        self.known: set[Mark] = set()
        if resume is not None:
            _checked_phase(resume[0], phases)
            self.known = {_mark(row) for _, row in _parsed_lines(path)}
            for line, row in _rewind(path, resume, phases):
                self._count(row["phase"], line)
        elif path.exists() and path.stat().st_size:
            raise ValueError(f"{path} holds the metrics of another run; resume that one, or choose another folder")
        # By phase, the last step that the file holds at the start.
        self.last = {} if resume is None else {row["phase"]: row["step"] for _, row in _parsed_lines(path)}
        self._file = path.open("a", encoding="utf-8")

    def write(self, phase: str, step: int, metrics: Metrics, histograms: Histograms) -> None:
        line = json.dumps(_to_json({"phase": phase, "step": step, **metrics}), allow_nan=False) + "\n"
        with files.naming(self._path):
            self._file.write(line)
        self._count(phase, line)

    def show(self, picture: Path) -> None:
        """Nothing: the file holds numbers alone."""

    def flush(self) -> None:
        with files.naming(self._path):
            self._file.flush()

    def sync(self) -> None:
        with files.naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with files.naming(self._path):
            self._file.close()

    def _count(self, phase: str, line: str) -> None:
        count, checksum = self.written.get(phase, (0, 0))
        self.written[phase] = count + 1, zlib.crc32(line.encode(), checksum)


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


def _mark(row: Row) -> Mark:
    return row["phase"], row["step"], frozenset(row.keys() - {"phase", "step"})


def _to_json(row: Row) -> Row:
    return {name: str(value) if _is_fault(value) else value for name, value in row.items()}


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
