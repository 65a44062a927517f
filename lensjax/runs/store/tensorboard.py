"""TensorBoard: the metrics of `metrics.jsonl` under the same names in `tensorboard/<phase>`, with histograms."""

import time
from pathlib import Path

import numpy as np
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

from lensjax.runs.store import files
from lensjax.runs.store.sinks import Histograms, Metrics, defined
from lensjax.training.metrics import HISTOGRAMS

_BOARDS, _EVENTS = "tensorboard", "events.out.tfevents."


class TensorBoard:
    """Event files of a run, one for each phase and start.

    Args:
      run_dir: the run's folder.
      resume: phase and step of the restored checkpoint: what earlier files say of later ones is hidden, since it will
        be written again. None for a new run.
      phases: the phases that a run of this kind has, in their order.
    """

    def __init__(self, run_dir: Path, *, resume: tuple[str, int] | None, phases: tuple[str, ...]) -> None:
        self._folder, self._resume, self._phases = run_dir / _BOARDS, resume, phases
        self._boards: dict[str, RecordWriter] = {}

    def write(self, phase: str, step: int, metrics: Metrics, histograms: Histograms) -> None:
        """See `Sink`."""
        with files.naming(self._folder):
            self._board(phase).write(_event(step, metrics, histograms).SerializeToString())

    def show(self, picture: Path) -> None:
        """Nothing: it stands beside the pictures in the run's folder."""

    def flush(self) -> None:
        """Writes to the disk."""
        with files.naming(self._folder):
            for board in self._boards.values():
                board.flush()

    def close(self) -> None:
        """Closes the files."""
        with files.naming(self._folder):
            for board in self._boards.values():
                board.close()

    def _board(self, phase: str) -> RecordWriter:
        if phase not in self._boards:
            folder = self._folder / phase
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


def _event(step: int, metrics: Metrics, histograms: Histograms) -> Event:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in defined(metrics).items()]
    values += [
        Summary.Value(tag=name, histo=_histogram(HISTOGRAMS[name], counts)) for name, counts in histograms.items()
    ]
    return Event(wall_time=time.time(), step=step, summary=Summary(value=values))


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
