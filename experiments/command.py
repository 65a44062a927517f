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
from lensjax.runs.engine import devices, peers, programs
from lensjax.runs.store import config_file, paths, run_folder
from lensjax.runs.store.run_folder import RunConfig

Settings = TypeVar("Settings", bound=RunConfig)
Arguments = TypeVar("Arguments")

_ALONE = "error: another process of this run has ended: see its own line"


def program(
    act: Callable[[Arguments], object],
    kind: type[Arguments],
    words: list[str] | None,
    *,
    description: str | None,
    several: bool = False,
) -> None:
    """A whole program: reads its flags and acts; whatever goes wrong ends the process with one line.

    Args:
      act: what it does.
      kind: the dataclass of its flags.
      words: the command line; None for that of the process.
      description: shown by `--help`.
      several: whether several processes can share its work.
    """
    with errors_end():
        arguments = paths.from_home(tyro.cli(kind, args=words, description=description))
        if several:
            devices.join()
        elif devices.is_asked_to_join():
            raise ValueError("this program runs in one process: unset JAX_COORDINATOR_ADDRESS, and start it once")
        _begin()
        peers.watch(lambda: _ALONE)
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
        config = paths.resolved(config)
        devices.join()
        _begin()
        peers.watch(lambda: "; ".join(filter(None, (_ALONE, _way_on(config.output_dir)))))
        with advising(lambda: _way_on(config.output_dir)):
            run(config, resume=resume)


def _begin() -> None:
    """Looks for devices, and for programs that are compiled already."""
    devices.find()
    if (trouble := programs.keep()) is not None and devices.is_first():
        print(trouble, file=sys.stderr)


def _way_on(output_dir: str) -> str:
    """How to go on with a run, once its folder is there."""
    return f"go on with --resume {output_dir}" if Path(output_dir, "config.json").is_file() else ""


def parse(
    words: list[str], default: Settings, *, load_preset: Callable[[str], Settings], description: str | None
) -> tuple[Settings, bool]:
    """Reads a command line.

    Args:
      words: a preset's name, if anything, and flags; or `--resume` and a run folder, with or without `=`.
      default: the config without a preset.
      load_preset: the config of a name.
      description: shown by `--help`.

    Returns:
      A config, and whether it is that of a run to go on with.

    Raises:
      ValueError: `--resume` has not one folder, a preset is not the first word, or it or a stored value is not valid.
      FileNotFoundError: there is no run in that folder.
    """
    kind = type(default)
    if (folder := _resumed(words)) is not None:
        change: Callable[..., Settings] = dataclasses.replace
        return change(config_file.load(run_folder.config_path(folder), kind), output_dir=str(folder)), True
    if words and not words[0].startswith("-"):
        default, words = load_preset(words[0]), words[1:]
    config, strays = tyro.cli(kind, default=default, args=words, description=description, return_unknown_args=True)
    if not strays:
        return config, False
    if not any(stray.startswith("-") for stray in strays):
        raise ValueError(f"{strays[0]} is no flag: a preset comes first, and alone; flags follow it")
    return tyro.cli(kind, default=default, args=words, description=description), False


def _resumed(words: list[str]) -> Path | None:
    """The run folder that `--resume` names, or whose `config.json` it names; None without that flag."""
    flags = [word for word in words if word.partition("=")[0] == "--resume"]
    if not flags:
        return None
    match words:
        case ["--resume", name] if name != "--resume":
            pass
        case [word] if "=" in word:
            name = word.partition("=")[2]
        case _:
            raise ValueError(f"--resume takes a run folder and nothing else, got: {' '.join(words)}")
    path = paths.absolute(name, name="--resume")
    return path.parent if path.name == "config.json" else path


def check_free(folder: Path, *, resume: bool) -> None:
    """Checks that a folder for several runs may be written to.

    Raises:
      FileExistsError: it is a file, or something is in it, and it is not to be gone on with.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder: choose another --output-dir")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise FileExistsError(f"{folder} is not empty: choose another --output-dir, or pass --resume to finish it")
