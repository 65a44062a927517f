"""A run's folder: who made it, with what, and whether a resumed run is still the same one."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from lensjax._version import __version__
from lensjax.runs.store import config_file, files, identity, lock, paths

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_CONFIG, _ENVIRONMENT, SUMMARY = "config.json", "environment.json", "summary.json"
_BEFORE_A_RUN = frozenset({lock.FILE, _ENVIRONMENT, f".tmp-{_CONFIG}", f".tmp-{_ENVIRONMENT}"})
"""What an attempt may leave that never began."""
_EACH_START = frozenset({"time", "command", "seed"})
"""What is new at each start, or the configuration's to say."""


class RunConfig(Protocol):
    """What makes a run one: its folder and its seed."""

    @property
    def output_dir(self) -> str: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


def create_run(output_dir: str | Path, config: RunConfig) -> Path:
    """Makes the folder of a new run, with `config.json`, which makes it one, and then `environment.json`.

    Raises:
      FileExistsError: the folder is there already, and not empty, or is no folder.
    """
    folder = require_free(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / _CONFIG, config_file.to_json(config))
    files.write_text(folder / _ENVIRONMENT, json.dumps([environment(config)], indent=2) + "\n")
    return folder


def require_free(output_dir: str | Path) -> Path:
    """The folder, in which a run can begin: it is not there, or empty but for what is left of one that never began.

    Raises:
      FileExistsError: it is not free.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder: choose another --output-dir")
    if folder.is_dir() and not {path.name for path in folder.iterdir()} <= _BEFORE_A_RUN:
        fix = "choose another --output-dir"
        fix += f", or go on with that run by --resume {folder}" if has_begun(folder) else ""
        raise FileExistsError(f"{folder} is not empty: {fix}")
    return folder


def has_begun(output_dir: str | Path) -> bool:
    """Whether there is a run in a folder, which then can be gone on with."""
    return (Path(output_dir) / _CONFIG).is_file()


def open_run(output_dir: str | Path, config: RunConfig) -> Path:
    """Opens the folder of a run to resume it with the configuration that it was started with.

    The folder itself may have moved, and so may the weights of its base model, which a digest tells: neither
    `output_dir` nor `checkpoint.path` is compared.

    Raises:
      FileNotFoundError: there is no run in the folder.
      ValueError: the configurations differ; names each key, with both values.
    """
    folder = Path(output_dir)
    stored = identity.flat(paths.resolved(config_file.load(config_path(folder), type(config))))
    given = identity.flat(paths.resolved(config))
    differences = [
        f"{key} is {stored[key]!r} in the run and {given[key]!r} now"
        for key in given
        if key not in ("output_dir", "checkpoint.path") and stored[key] != given[key]
    ]
    if differences:
        raise ValueError(
            f"cannot resume {folder} with another configuration: {'; '.join(differences)}. "
            "Pass the run's own values, or start a new run"
        )
    return folder


def config_path(run_dir: str | Path) -> Path:
    """The file that holds a run's configuration.

    Raises:
      FileNotFoundError: there is no run in the folder.
    """
    path = Path(run_dir) / _CONFIG
    if not path.is_file():
        left = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        is_cut_short = bool(left) and left <= _BEFORE_A_RUN
        fix = "it never began; start it without --resume" if is_cut_short else "name the folder of a run"
        around = (path.parent.parent / _ENVIRONMENT, *sorted(path.parent.glob(f"*/{_ENVIRONMENT}")))
        fix += next((f", such as {one.parent}" for one in around if one.is_file()), "")
        raise FileNotFoundError(f"{run_dir} holds no run ({_CONFIG} is missing): {fix}")
    return path


def checkpoint_dir(run_dir: Path, phase: str) -> Path:
    """Where a phase's checkpoints are."""
    return run_dir / "checkpoints" / phase


def frozen_dir(run_dir: Path, part: str) -> Path:
    """Where the parameters of a part are that no phase has trained: written once, as step 0."""
    return run_dir / "checkpoints" / "frozen" / part


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Writes `summary.json`: the run is finished.

    Raises:
      FloatingPointError: a number is not finite; nothing is written.
    """
    faults = [f"{name} = {x}" for name, x in summary.items() if isinstance(x, float) and not math.isfinite(x)]
    if faults:
        raise FloatingPointError(
            f"the {summary['split']} split gives {', '.join(faults)}: the run has no summary; "
            f"its checkpoints are in {run_dir / 'checkpoints'}"
        )
    files.write_text(run_dir / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """What `summary.json` holds; empty while the run is not finished, and where the file is torn."""
    try:
        summary = json.loads((Path(run_dir) / SUMMARY).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def add_environment(run_dir: str | Path, config: RunConfig) -> list[str]:
    """Adds an entry to `environment.json`, which has one a start.

    Returns:
      What differs from the start before, each with both values.
    """
    path, entry = Path(run_dir) / _ENVIRONMENT, environment(config)
    before = _entries(path)
    files.write_text(path, json.dumps([*before, entry], indent=2) + "\n")
    if not before:
        return []
    was, now = _named(before[-1]), _named(entry)
    return [
        f"{name} is {now.get(name, 'unset')} now and was {was.get(name, 'unset')}"
        for name in sorted(was.keys() | now.keys())
        if name not in _EACH_START and was.get(name) != now.get(name)
    ]


def _entries(path: Path) -> list[dict[str, Any]]:
    """Of `environment.json`; none where it is missing or damaged, which stops no run."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    is_whole = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    return entries if is_whole else []


def _named(entry: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in entry.items():
        named |= _named(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return named


def environment(config: RunConfig) -> dict[str, Any]:
    """Describes what a run depends on beside its configuration; all of it is JSON."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "seed": config.seed,
        "git": _git_state(),
        "python": platform.python_version(),
        "packages": {"lensjax": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("JAX_", "XLA_"))},
    }


def _git_state() -> dict[str, Any] | None:
    """Returns the commit of this file, and whether tracked files differ from it; None outside git."""
    # An installed copy may lie inside another project's repository, whose commit says nothing about this code.
    if (
        _git("ls-files", "--error-unmatch", Path(__file__).name) is None
        or (commit := _git("rev-parse", "HEAD")) is None
    ):
        return None
    return {"commit": commit, "is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
