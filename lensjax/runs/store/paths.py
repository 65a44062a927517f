"""Paths of a configuration, which mean the same everywhere: `~` is a home, and all are stored absolute."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lensjax import _settings
from lensjax._settings import require

Kind = TypeVar("Kind")

NAMES = (
    *("output_dir", "base_run", "start_from", "checkpoint.path"),
    *("data.path", "data.tokenizer", "data.cache"),
)
"""The fields that hold one, in the configurations that have them."""


def absolute(path: str | Path, *, name: str = "path") -> Path:
    """The path of the same place from anywhere.

    Args:
      path: absolute, relative to the working folder, or from a home (`~`, `~user`) on.
      name: the field that it stands in, for errors.

    Raises:
      ValueError: there is no such user, or the path is empty.

    Example:
      >>> from pathlib import Path
      >>> from lensjax.runs.store.paths import absolute
      >>> absolute("/runs/a")
      PosixPath('/runs/a')
      >>> absolute("~/runs") == Path.home() / "runs"
      True
    """
    require(bool(str(path)), f"{name} must name a file or folder, got an empty string")
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise ValueError(
            f"{name} is {str(path)!r}, and {user} is no user's home: write the folder out, or ./{user} for a folder of "
            "that name"
        ) from error


def resolved(config: Kind) -> Kind:
    """A config whose paths are absolute.

    Raises:
      ValueError: see `absolute`; names the field.
    """
    paths = {name: _value(config, name) for name in NAMES}
    changes = {name: str(absolute(path, name=name)) for name, path in paths.items() if path is not None}
    return _settings.replace(config, **changes)


def last_names(config: Any, names: Sequence[str] = NAMES) -> dict[str, str]:
    """What is last in each path of a config that has one, by field: where it lies on this machine is left out."""
    values = {name: _value(config, name) for name in names}
    return {name: Path(value).name for name, value in values.items() if value is not None}


def from_home(arguments: Kind) -> Kind:
    """The flags of a program, whose paths may begin with `~`; relative ones stay so.

    Raises:
      ValueError: see `absolute`; names the flag.
    """

    def expanded(value: Any, name: str) -> Any:
        if isinstance(value, tuple):
            return tuple(expanded(one, name) for one in value)
        return absolute(value, name=name) if isinstance(value, Path) and str(value).startswith("~") else value

    fields = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(arguments)}  # type: ignore[arg-type]
    change: Callable[..., Kind] = dataclasses.replace
    return change(arguments, **{name: expanded(value, name) for name, value in fields.items()})


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part, None)
    return config
