"""Where the metrics of a run go beside `metrics.jsonl`, by which it goes on: boards, for people who look.

class Sink(Protocol):
    def write(self, phase, step, metrics, histograms): ...
    def show(self, picture): ...
    def flush(self): ...
    def close(self): ...
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lensjax._settings import require, settings
from lensjax.training.metrics import UNDEFINED

Kind = Literal["tensorboard", "wandb", "mlflow"]
Metrics = Mapping[str, Any]
Histograms = Mapping[str, np.ndarray]
Mark = tuple[str, int, frozenset[str]]
"""What tells rows apart: phase, step and the names of the metrics."""


class Sink(Protocol):
    """Takes metrics, in the order in which they are written; `metrics.jsonl` is one, too."""

    def write(self, phase: str, step: int, metrics: Metrics, histograms: Histograms) -> None:
        """Takes what is known of one step.

        Args:
          phase: of the run.
          step: of that phase.
          metrics: numbers by name; `"n/a"` where one is undefined.
          histograms: counts by name, of the bins of `lensjax.training.metrics.HISTOGRAMS`.
        """

    def show(self, picture: Path) -> None:
        """Takes a picture of the run, a PNG file in its folder; does nothing where there is no place for one."""

    def flush(self) -> None:
        """Sends what was written."""

    def close(self) -> None:
        """The run, or this start of it, is over."""


@settings("logging")
class LoggingConfig:
    """Where metrics go.

    Example:
      >>> from lensjax.runs.store.sinks import LoggingConfig
      >>> LoggingConfig(sinks=("tensorboard", "tensorboard"))
      Traceback (most recent call last):
      ValueError: logging.sinks names one twice: tensorboard, tensorboard
    """

    sinks: tuple[Kind, ...] = ("tensorboard",)
    """Boards beside `metrics.jsonl`; wandb and mlflow are extras of these names."""
    project: str = "lensjax"
    """Project of Weights & Biases, and experiment of MLflow."""

    def _check(self) -> None:
        require(len(set(self.sinks)) == len(self.sinks), f"logging.sinks names one twice: {', '.join(self.sinks)}")
        require(bool(self.project), "logging.project must be a name, got an empty string")


def require_installed(config: LoggingConfig) -> None:
    """Looks, before anything is written, whether the packages of all sinks are there.

    Raises:
      ImportError: names the extra of one that is not.
    """
    for kind, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
        if kind in config.sinks and find_spec(package) is None:
            raise ImportError(f"logging.sinks names {kind}, which is not installed: pip install 'lensjax[{kind}]'")


def defined(metrics: Metrics, prefix: str = "") -> dict[str, float]:
    """Numbers alone, their names behind a prefix."""
    return {f"{prefix}{name}": value for name, value in metrics.items() if value != UNDEFINED}
