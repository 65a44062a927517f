"""What a run has come to: its configuration, its models and their parameters."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from lensjax._settings import require
from lensjax.models import Models, Params, hyperlora, lora
from lensjax.runs.config import PHASES, Config
from lensjax.session import Session
from lensjax.training.recipe import Part

PARTS: tuple[Part, ...] = ("base", "gist", "lens")
"""What every run has parameters of."""

Places = dict[str, tuple[Path, int, tuple[str, ...]]]
"""By part: directory and step of a checkpoint, and the place in its tree."""


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
    params: dict[str, Params] = field(repr=False)
    """Parameters of `base`, `gist` and `lens`, and of `hypernet` where it was trained."""
    summary: dict[str, Any]
    """What `summary.json` holds: the test metrics; empty while the run is not finished."""
    folder: Path | None = None
    """Where it is on disk."""

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
    """Loads the models of a run (extra `train`), or of an export (extra `hf`).

    Args:
      folder: a run's folder, of `fit` or of `python -m experiments.train`, or one of `export`.

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
      FileNotFoundError: ...runs/nowhere holds no run (config.json is missing): name the folder of a run
    """
    try:
        from lensjax.runs.store import config_file, paths, run_folder
    except ModuleNotFoundError as error:
        raise ImportError(f"lx.load needs {error.name}: pip install 'lensjax[train]'") from error
    folder = paths.absolute(folder, name="folder")
    config = config_file.load(run_folder.config_path(folder), Config)
    models = config.build_models()
    parts: tuple[Part, ...] = (*PARTS, "hypernet") if "hypernet" in config.trainable else PARTS
    params = load_params(folder, config, models, parts)
    return Trained(config, models, params, run_folder.read_summary(folder), folder)


def load_params(
    folder: Path, config: Config, models: Models, parts: Sequence[Part], *, warn: bool = True, adapted: bool = True
) -> dict[str, Params]:
    """Parameters that a run has come to: of its newest checkpoint, or with patience of its best.

    Each part is where it was trained last; what the run never trained is beside that, in `checkpoints/frozen` or where
    `checkpoint.path` says.

    Args:
      folder: the run's.
      config: the run's.
      models: of its configuration.
      parts: names of the models.
      warn: log which checkpoints are damaged; the one before such a one is read.
      adapted: change the base model by what was learned of it beside GistNet (`gists.lora_rank`).

    Returns:
      Parameters by part.

    Raises:
      FileNotFoundError: the checkpoint of the base model is not where the run's `checkpoint.path` says.
      ValueError: there is no checkpoint, or none that is whole; LensNet is asked for and was not trained yet; or the
        weights at `checkpoint.path` are not those that the run was started on.
    """
    from lensjax.runs.store import tensors

    if tensors.file_of(folder, "lens").is_file():
        return _exported(folder, config, models, parts)
    from lensjax.runs import pretrained
    from lensjax.runs.store import checkpoint

    held, damages = _held(folder, trainable=config.trainable, warn=warn)
    if damages and not {*held, *(["base"] if config.checkpoint.path else [])} >= set(parts):
        raise damages[0]
    for name in parts:  # what is missing is told before anything is read
        what = "LensNet" if name == "lens" else name
        if name == "base":
            require(
                name in held or config.checkpoint.path is not None,
                f"{folder} has no checkpoint: let it finish its pretraining first",
            )
        else:
            require(
                name in held,
                f"{folder} has no checkpoint of {what}: let it train first (--resume {folder}, or steps above 0)",
            )
    params: dict[str, Params] = {}
    for name in parts:
        if name in held:
            directory, step, path = held[name]
            params[name] = checkpoint.restore_subtree(directory, step, _shapes(config, models, name), path=path)
        else:
            params[name] = pretrained.load_base(config)
    if adapted and "base" in params and "lora" in held:
        directory, step, path = held["lora"]
        fresh = functools.partial(lora.init, jax.random.key(0), rank=config.gists.lora_rank)
        deltas = checkpoint.restore_subtree(directory, step, jax.eval_shape(fresh, params["base"]), path=path)
        params["base"] = hyperlora.adapt(params["base"], deltas)
    return params


def _shapes(config: Config, models: Models, name: str) -> Params:
    """Parameters of a part as shapes."""
    model: Any = config.build_hypernet(models) if name == "hypernet" else getattr(models, name)
    params: Params = jax.eval_shape(model.init, jax.random.key(0))
    return params


def _exported(folder: Path, config: Config, models: Models, parts: Sequence[Part]) -> dict[str, Params]:
    """Parameters of an export, which holds all that is not at `checkpoint.path`."""
    from lensjax.runs import pretrained
    from lensjax.runs.store import tensors

    params: dict[str, Params] = {}
    for name in parts:
        path = tensors.file_of(folder, name)
        if name == "base" and config.checkpoint.path is not None and not path.is_file():
            params[name] = pretrained.load_base(config)
            continue
        require(path.is_file(), f"{path} is missing: export the run again, or fetch all of its files")
        params[name] = tensors.read(path, _shapes(config, models, name))
    return params


def _held(folder: Path, *, trainable: Sequence[str] = (), warn: bool = False) -> tuple[Places, list[ValueError]]:
    """By part, which checkpoint in a run's folder holds it: its directory, step, and place in the tree.

    Of a phase whose newest checkpoints are damaged an earlier one counts, unless later phases have been trained on what
    the damaged ones held. The second value says what is damaged and has none in its place.
    """
    from lensjax.runs.engine import recovery
    from lensjax.runs.store import checkpoint, run_folder

    frozen = [(name, run_folder.frozen_dir(folder, name)) for name in PARTS]
    phases = [(name, run_folder.checkpoint_dir(folder, name)) for name in PHASES]
    found = [recovery.newest(directory) for _, directory in (*frozen, *phases)]
    held: Places = {}
    lost: dict[str, ValueError] = {}
    for number, ((name, directory), one) in enumerate(zip((*frozen, *phases), found, strict=True)):
        if warn:
            one.warn()
        is_phase = number >= len(frozen)
        trained = {"pretrain": ("base", "gist"), "gists": ("gist",), "lens": trainable}.get(name, ("lens",))
        parts = set(trained) if is_phase else {name}
        if is_phase and one.kept is not None:
            parts = checkpoint.parts(directory, one.kept, path=("params",))
        if one.damages and any(later.step is not None for later in found[number + 1 :]):
            lost |= dict.fromkeys(parts, one.damages[0])
        elif one.kept is not None:
            if is_phase and "base" in parts:
                held.pop("lora", None)  # the base model was trained on with it
            held |= {part: (directory, one.kept, ("params", part) if is_phase else ()) for part in parts}
            lost = {part: damage for part, damage in lost.items() if part not in parts}
    damages = [*lost.values(), *(one.damages[0] for one in found if one.damages and one.step is None)]
    return {part: place for part, place in held.items() if part not in lost}, damages


def keep_frozen(
    folder: Path, config: Config, frozen: Mapping[str, Params], *, identity: Mapping[str, Any] | None = None
) -> None:
    """Writes parts that a phase reads and does not train, unless a checkpoint in the run's folder holds them already.

    The base model of `checkpoint.path` is not written: the run keeps its digest.
    """
    from lensjax.runs.engine import devices
    from lensjax.runs.store import checkpoint, run_folder

    held = {*_held(folder)[0], *(["base"] if _reads_base_from_file(config) else [])}
    for name, params in frozen.items():
        # All processes write or none: a file that the first has written is no reason for another to leave it out.
        if devices.largest(int(name not in held)):
            checkpoint.save(run_folder.frozen_dir(folder, name), 0, params, identity=identity)


def digest(config: Config, start: Mapping[str, Params] | None) -> str | None:
    """Of the parameters that a run begins with, but for those that `checkpoint.sha256` is of; None without any."""
    from lensjax.runs.store import identity

    is_known = _reads_base_from_file(config)
    return identity.digest({name: part for name, part in (start or {}).items() if name != "base" or not is_known})


def _reads_base_from_file(config: Config) -> bool:
    """Whether the base model is that of `checkpoint.path`, and not one that `start_from` made of it."""
    from lensjax.runs.store import tensors

    if config.checkpoint.path is None or config.start_from is None:
        return config.checkpoint.path is not None
    source = Path(config.start_from)
    held = {"base", "lora"} & _held(source)[0].keys()
    return not held and not tensors.file_of(source, "base").is_file()


def load_start(config: Config, models: Models, *, own: Path | None = None) -> dict[str, Params] | None:
    """What a run begins with that it has not trained; None where it pretrains a base model of its own.

    Args:
      config: the run's, resolved (`lensjax.runs.pretrained`).
      models: of its configuration.
      own: the run's folder, to go on with it: what that holds is taken from there, and the other run need not be.

    Returns:
      Parameters by part: of `base` and `gist` by `base_run`, of `lens` too by `start_from`, of `base` by `checkpoint`.

    Raises:
      FileNotFoundError: there is no run in that folder, or no checkpoint in its place.
      ValueError: its models have another shape, it has no checkpoint of them, or the weights are other ones.
    """
    from lensjax.runs import pretrained
    from lensjax.runs.store import config_file, run_folder

    if config.pretrains:
        return None
    parts: tuple[Part, ...] = PARTS if config.start_from is not None else ("base", "gist")
    if own is not None and _held(own)[0].keys() | ({"base"} if config.checkpoint.path else set()) >= set(parts):
        # The run's start will say what is damaged, and its first phase begins with the base model as it was.
        return load_params(own, config, models, parts, warn=False, adapted=False)
    key = "base_run" if config.start_from is None else "start_from"
    source = getattr(config, key)
    if source is None:
        return {"base": pretrained.load_base(config)}
    folder = Path(source)
    try:
        stored = config_file.load(run_folder.config_path(folder), Config)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from error
    same: list[tuple[str, object, object]] = [
        ("checkpoint.sha256", stored.checkpoint.sha256, config.checkpoint.sha256),
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
    # The weights may have moved since that run was made: this one knows where they are.
    return load_params(folder, replace(stored, checkpoint=config.checkpoint), models, parts)
