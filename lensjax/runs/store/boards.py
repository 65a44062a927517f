"""The boards of a run: TensorBoard, Weights & Biases and MLflow, all of them sinks of its metrics.

`boards.json` in the run's folder has the name that each of the last two gave to the run, so that `--resume` goes on
with the same one there. What they have they keep: rows that a run writes again after an interruption, equal to the bit,
are sent once.

Where they are, their own variables say: `WANDB_MODE` (`offline` writes below the run's folder, for `wandb sync`),
`MLFLOW_TRACKING_URI` (without it, the file `mlflow.db` in the run's folder, with pictures in `mlartifacts`).
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from lensjax.runs.store import files
from lensjax.runs.store.sinks import Histograms, LoggingConfig, Mark, Metrics, Sink, defined
from lensjax.runs.store.tensorboard import TensorBoard
from lensjax.training.metrics import HISTOGRAMS

FILE = "boards.json"
_MOST_METRICS, _MOST_PARAMS, _LONGEST = 1000, 100, 500
"""Of one message to MLflow."""


def open_boards(
    config: LoggingConfig,
    folder: Path,
    *,
    resume: tuple[str, int] | None,
    phases: tuple[str, ...],
    values: Metrics,
    known: Collection[Mark],
) -> list[Sink]:
    """Opens the boards of a run.

    Args:
      config: which.
      folder: the run's.
      resume: phase and step that it goes on from; None for a new run.
      phases: all that it has, in their order.
      values: its configuration by dotted names.
      known: rows that earlier starts have sent.
    """
    opened: list[Sink] = []
    for kind in config.sinks:
        if kind == "tensorboard":
            opened.append(TensorBoard(folder, resume=resume, phases=phases))
        elif kind == "wandb":
            opened.append(WandB(folder, project=config.project, values=values, phases=phases, known=known))
        else:
            opened.append(MLflow(folder, project=config.project, values=values, known=known))
    return opened


class WandB:
    """A run of Weights & Biases (extra `wandb`).

    Metrics stand under `<phase>/<name>`, over the step of that phase, pictures under `pictures/<name>`.

    Args:
      folder: the run's, whose name the board shows.
      project: of the board.
      values: the configuration by dotted names.
      phases: all that the run has.
      known: rows that earlier starts have sent.
    """

    def __init__(
        self, folder: Path, *, project: str, values: Metrics, phases: tuple[str, ...], known: Collection[Mark]
    ) -> None:
        import wandb

        id, is_new = _id(folder, "wandb", lambda: uuid.uuid4().hex[:12])
        self._known = frozenset() if is_new else frozenset(known)
        self._wandb = wandb
        quiet = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=project,
            id=id,
            name=folder.name,
            dir=str(folder),
            config=dict(values),
            resume=None if is_new else "allow",
            settings=quiet,
        )
        for phase in phases:
            self._run.define_metric(f"{phase}/step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def write(self, phase: str, step: int, metrics: Metrics, histograms: Histograms) -> None:
        """See `Sink`."""
        if (phase, step, frozenset(metrics)) in self._known:
            return
        bins = {
            f"{phase}/{name}": self._wandb.Histogram(np_histogram=(counts, HISTOGRAMS[name]))
            for name, counts in histograms.items()
        }
        self._run.log({**defined(metrics, f"{phase}/"), **bins, f"{phase}/step": step})

    def show(self, picture: Path) -> None:
        """See `Sink`."""
        self._run.log({f"pictures/{picture.stem}": self._wandb.Image(str(picture))})

    def flush(self) -> None:
        """Nothing waits: a process of its own sends."""

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class MLflow:
    """A run of MLflow (extra `mlflow`), which has no histograms of this kind.

    Metrics stand under `<phase>/<name>`, at the step of that phase; pictures are artifacts.

    Args:
      folder: the run's, whose name the board shows.
      project: the experiment.
      values: the configuration by dotted names.
      known: rows that earlier starts have sent.
    """

    def __init__(self, folder: Path, *, project: str, values: Metrics, known: Collection[Mark]) -> None:
        from mlflow import MlflowClient, entities

        self._entities = entities
        self._waiting: list[object] = []
        given, own = os.environ.get("MLFLOW_TRACKING_URI"), folder.absolute()
        self._client = MlflowClient(tracking_uri=given or f"sqlite:///{own / 'mlflow.db'}")
        artifacts = None if given else (own / "mlartifacts").as_uri()  # else they would be below the working directory

        def create() -> str:
            found = self._client.get_experiment_by_name(project)
            experiment = self._client.create_experiment(project, artifacts) if found is None else found.experiment_id
            return str(self._client.create_run(experiment, run_name=folder.name).info.run_id)

        self._run, is_new = _id(folder, "mlflow", create)
        self._known = frozenset() if is_new else frozenset(known)
        if is_new:
            params = [entities.Param(name, str(value)[:_LONGEST]) for name, value in values.items()]
            for first in range(0, len(params), _MOST_PARAMS):
                self._client.log_batch(self._run, params=params[first : first + _MOST_PARAMS])
        else:
            self._client.update_run(self._run, status="RUNNING")

    def write(self, phase: str, step: int, metrics: Metrics, histograms: Histograms) -> None:
        """See `Sink`."""
        if (phase, step, frozenset(metrics)) in self._known:
            return
        now = int(1000 * time.time())
        self._waiting += [
            self._entities.Metric(name, float(value), now, step)
            for name, value in defined(metrics, f"{phase}/").items()
        ]

    def show(self, picture: Path) -> None:
        """See `Sink`."""
        self._client.log_artifact(self._run, str(picture))

    def flush(self) -> None:
        """Sends what waits."""
        waiting, self._waiting = self._waiting, []
        for first in range(0, len(waiting), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=waiting[first : first + _MOST_METRICS])

    def close(self) -> None:
        """Sends what waits, and says that it was all."""
        self.flush()
        self._client.set_terminated(self._run)


def _id(folder: Path, board: str, make: Callable[[], str]) -> tuple[str, bool]:
    """The name of a run on a board, and whether it is new there."""
    path = folder / FILE
    try:
        names = json.loads(path.read_bytes())
    except FileNotFoundError:
        names = {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to begin a new run on each board") from error
    if board in names:
        return str(names[board]), False
    names[board] = make()
    files.write_text(path, json.dumps(names, indent=2) + "\n")
    return names[board], True
