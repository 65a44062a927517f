"""What a run has come to: its configuration, its models and their parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from lensjax._settings import require
from lensjax.models import Models, Params
from lensjax.runs.config import PHASES, Config
from lensjax.session import Session
from lensjax.training.recipe import Part


@dataclass(frozen=True)
class Trained:
    """A trained run in memory.

    Example:
      >>> import lensjax as lx
      >>> config = lx.Config()
      >>> trained = lx.Trained(config, config.build_models(), params={}, summary={})
      >>> trained.session(budget=120).config.budget
      120
    """

    config: Config
    models: Models
    params: dict[str, Params]
    """Parameters of `base`, `gist` and `lens`, and of `hypernet` where it was trained."""
    summary: dict[str, Any]
    """What `summary.json` holds: the test metrics; empty while the run is not finished."""

    def session(self, **changes: Any) -> Session:
        """A stream reader whose decisions are those of training.

        Args:
          changes: fields of its `SessionConfig` that shall be others, such as `budget`.

        Returns:
          `Session`.

        Raises:
          ValueError: the changed configuration is not valid.
        """
        return Session(self.models, self.params, replace(self.config.session, **changes))


def load(folder: str | Path) -> Trained:
    """Loads the models of a run (extra `train`).

    Args:
      folder: a run's folder, of `fit` or of `python -m experiments.train`.

    Returns:
      `Trained`: of its newest checkpoint, or with patience of its best.

    Raises:
      FileNotFoundError: there is no run in the folder.
      ValueError: it has not trained LensNet yet, or a file of it is damaged or of another format.
      ImportError: the extra is not installed.

    Example:
      >>> import lensjax as lx
      >>> lx.load("runs/nowhere")
      Traceback (most recent call last):
      FileNotFoundError: runs/nowhere holds no run (config.json is missing): name the folder of a run
    """
    try:
        from lensjax.runs.store import config_file, run_folder
    except ModuleNotFoundError as error:
        raise ImportError(f"lx.load needs {error.name}: pip install 'lensjax[train]'") from error
    config = config_file.load(run_folder.config_path(folder), Config)
    models = config.build_models()
    parts: tuple[Part, ...] = ("base", "gist", "lens")
    if "hypernet" in config.trainable:
        parts = (*parts, "hypernet")
    params = load_params(Path(folder), config, models, parts)
    return Trained(config, models, params, run_folder.read_summary(folder))


def load_params(folder: Path, config: Config, models: Models, parts: Sequence[Part]) -> dict[str, Params]:
    """Parameters that a run has come to: of its newest checkpoint, or with patience of its best.

    Args:
      folder: the run's.
      config: the run's.
      models: of its configuration.
      parts: names of the models.

    Returns:
      Parameters by part.

    Raises:
      ValueError: there is no checkpoint, or LensNet is asked for and was not trained yet.
    """
    from lensjax.runs.engine import loop
    from lensjax.runs.store import checkpoint, run_folder

    phase, _ = run_folder.restore_point(folder, PHASES)
    directory = run_folder.checkpoint_dir(folder, phase)
    step = loop.kept_step(directory)
    if step is None:
        raise ValueError(f"{folder} has no checkpoint: let it finish its pretraining first")
    if "lens" in parts and phase == "pretrain":
        raise ValueError(f"{folder} has no checkpoint of LensNet: let it train first (steps above 0)")
    params: dict[str, Params] = {}
    for name in parts:
        model: Any = config.build_hypernet(models) if name == "hypernet" else getattr(models, name)
        like = jax.eval_shape(model.init, jax.random.key(0))
        params[name] = checkpoint.restore_subtree(directory, step, like, path=("params", name))
    return params


def load_start(config: Config, models: Models) -> dict[str, Params] | None:
    """What the run that `base_run` or `start_from` names gives this one; None where neither does.

    Raises:
      FileNotFoundError: there is no run in that folder.
      ValueError: its models have another shape, or it has no checkpoint of them.
    """
    from lensjax.runs.store import config_file, run_folder

    key = "base_run" if config.start_from is None else "start_from"
    source = getattr(config, key)
    if source is None:
        return None
    folder = Path(source)
    stored = config_file.load(run_folder.config_path(folder), Config)
    same = [
        ("base", stored.base, config.base),
        ("gist", stored.gist, config.gist),
        ("context.block_size", stored.context.block_size, config.context.block_size),
    ]
    if key == "start_from":
        same += [
            ("lens", stored.lens, config.lens),
            ("context.max_lod", stored.context.max_lod, config.context.max_lod),
        ]
    for name, theirs, ours in same:
        require(theirs == ours, f"{name} of {key} {folder} is {theirs}, this run has {ours}: use the same")
    parts: tuple[Part, ...] = ("base", "gist") if key == "base_run" else ("base", "gist", "lens")
    return load_params(folder, stored, models, parts)
