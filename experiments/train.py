"""Pretrains a base model (or takes one), trains LensNet by a teacher, preferences and its own edits, and measures it.

    python -m experiments.train demo                              text that quotes itself
    python -m experiments.train stdlib                            the standard library of this Python
    python -m experiments.train recall --seed 1                   the task with known answers
    python -m experiments.train --data.task text --data.path 'notes/**/*.md' --output-dir runs/notes
    python -m experiments.train --resume runs/notes               go on with an interrupted run
    python -m experiments.train recall --start-from runs/a --seed 2     start from the models of another run
    python -m experiments.train recall --start-from runs/a --steps 0 --online.steps 200     by its own edits alone

Several processes, started with the same words, train together where `JAX_COORDINATOR_ADDRESS` asks for it (BUILD.md).

The first argument names a file of `experiments/presets/` (or is the path of such a file, or of a run's
`config.json`); flags change single fields. Everything that a run makes is in its own folder.
"""

import importlib.util
import traceback
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from experiments import command
from lensjax._settings import shown
from lensjax.runs.config import Config
from lensjax.runs.fit import fit
from lensjax.runs.store import config_file, paths

Kind = TypeVar("Kind")

PRESETS = Path(__file__).parent / "presets"


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    command.execute(arguments, parse, run)


def parse(words: list[str]) -> tuple[Config, bool]:
    """Reads the command line: a config, and whether it is that of a run to go on with."""
    return command.parse(words, Config(), load_preset=load_preset, description=__doc__)


def run(config: Config, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """One whole run; returns what `summary.json` holds."""
    return fit(config, resume=resume, console=console).summary


def load_preset(name: str) -> Config:
    """The config of a name in `experiments/presets/`, of a Python file with `CONFIG`, or of a JSON file."""
    is_file = Path(name).suffix in (".py", ".json")
    path = paths.absolute(name, name="the config") if is_file else PRESETS / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.py")))
        raise FileNotFoundError(f"no config {path}; name a file, or one of: {known}")
    if path.suffix == ".json":
        return config_file.load(path, Config)
    return load_object(path, "CONFIG", Config)


def load_object(path: Path, name: str, kind: type[Kind]) -> Kind:
    """What a Python file, which is run for it, defines under a name.

    Raises:
      ValueError: it fails, naming its line; or it defines nothing of that kind.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{_place(path, error)}: {type(error).__name__}: {message}") from error
    value = getattr(module, name, None)
    if not isinstance(value, kind):
        raise ValueError(f"{path} must define {name}, a {kind.__module__}.{kind.__qualname__}; got {shown(value)}")
    return value


def _place(path: Path, error: BaseException) -> str:
    """The line of a file that an exception passed through last, or that is no Python."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}:{lines[-1]}" if lines else str(path)


if __name__ == "__main__":
    main()
