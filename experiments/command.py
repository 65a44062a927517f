"""What the command lines of all training scripts share: a preset with flags, `--resume`, errors, and the run's folder.

python -m experiments.<script> [preset] [--flag value ...]
python -m experiments.<script> --resume runs/folder
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from experiments.process import advising, errors_end
from lensjax.runs.engine import devices
from lensjax.runs.store import config_file, run_folder
from lensjax.runs.store.run_folder import RunConfig

Settings = TypeVar("Settings", bound=RunConfig)
Arguments = TypeVar("Arguments")


def program(
    act: Callable[[Arguments], object], kind: type[Arguments], words: list[str] | None, *, description: str | None
) -> None:
    """A whole program: reads its flags and acts; whatever goes wrong ends the process with one line.

    Args:
      act: what it does.
      kind: the dataclass of its flags.
      words: the command line; None for that of the process.
      description: shown by `--help`.
    """
    with errors_end():
        arguments = tyro.cli(kind, args=words, description=description)
        devices.find()
        act(arguments)


def execute(
    arguments: list[str] | None, parse: Callable[[list[str]], tuple[Settings, bool]], run: Callable[..., object]
) -> None:
    """Parses and runs; whatever goes wrong ends the process with one line.

    Args:
      arguments: the command line; None for that of the process.
      parse: to a config, and whether it is that of a run to go on with.
      run: called with the config, and `resume` by name.
    """
    with errors_end():
        config, resume = parse(sys.argv[1:] if arguments is None else list(arguments))
        devices.join()
        devices.find()
        with advising(lambda: _way_on(config.output_dir)):
            run(config, resume=resume)


def _way_on(output_dir: str) -> str:
    """How to go on with a run, once its folder is there."""
    return f"go on with --resume {output_dir}" if Path(output_dir, "config.json").is_file() else ""


def parse(
    words: list[str], default: Settings, *, load_preset: Callable[[str], Settings], description: str | None
) -> tuple[Settings, bool]:
    """Reads a command line.

    Args:
      words: a preset's name, if anything, and flags; or `--resume` and a run folder.
      default: the config without a preset.
      load_preset: the config of a name.
      description: shown by `--help`.

    Returns:
      A config, and whether it is that of a run to go on with.

    Raises:
      ValueError: `--resume` has not one folder, or the preset or a stored value is not valid.
      FileNotFoundError: there is no run in that folder.
    """
    kind = type(default)
    if "--resume" in words:
        if len(words) != 2 or words[0] != "--resume":
            raise ValueError(f"--resume takes a run folder and nothing else, got: {' '.join(words)}")
        change: Callable[..., Settings] = dataclasses.replace
        return change(config_file.load(run_folder.config_path(words[1]), kind), output_dir=words[1]), True
    if words and not words[0].startswith("-"):
        default, words = load_preset(words[0]), words[1:]
    return tyro.cli(kind, default=default, args=words, description=description), False


def check_free(folder: Path, *, resume: bool) -> None:
    """Checks that a folder for several runs may be written to.

    Raises:
      FileExistsError: something is in it, and it is not to be gone on with.
    """
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise FileExistsError(f"{folder} is not empty: choose another --output-dir, or pass --resume to finish it")
