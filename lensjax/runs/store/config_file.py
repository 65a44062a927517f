"""`config.json`: any configuration as JSON, both ways."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from lensjax._settings import require

Kind = TypeVar("Kind")

FORMAT = 2
"""Of the files that this version writes, under the key "format"."""


def to_json(config: Any) -> str:
    """Writes a config as JSON text; `from_json` reads it back equal."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2) + "\n"


def load(path: str | Path, kind: type[Kind]) -> Kind:
    """Reads the config file of a kind: any frozen dataclass whose sections are dataclasses. Errors name the file.

    Raises:
      ValueError: see `from_json`.
    """
    return from_json(Path(path).read_text(encoding="utf-8", errors="replace"), kind, source=str(path))


def from_json(text: str, kind: type[Kind], *, source: str = "config") -> Kind:
    """Reads a config from JSON text. Missing keys take their defaults.

    Args:
      text: of `to_json`.
      kind: the class of the config.
      source: what errors call the text.

    Returns:
      The config.

    Raises:
      ValueError: the text is not a JSON object or of another format, a key is unknown, or a value has the wrong type
        or range.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    require(isinstance(raw, dict), f"{source}: expected an object with keys of {kind.__name__}, got {raw!r}")
    written = raw.pop("format", None)
    require(
        written == FORMAT,
        f"{source} has format {written}, and this version of lensjax reads format {FORMAT}: use the version that "
        "environment.json beside it names, or run it again",
    )
    config: Kind = _build(kind, raw, where=source)
    return config


def _build(cls: type, raw: Any, *, where: str) -> Any:
    require(isinstance(raw, dict), f"{where}: expected an object with keys of {cls.__name__}, got {raw!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(raw) - set(hints))
    require(
        not unknown,
        f"{where}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}; known keys: {', '.join(sorted(hints))}",
    )
    values = {
        name: _build(hints[name], value, where=f"{where}.{name}")
        if dataclasses.is_dataclass(hints[name])
        else _checked_type(hints[name], value, where=f"{where}.{name}")
        for name, value in raw.items()
    }
    return cls(**values)


def _checked_type(hint: Any, value: Any, *, where: str) -> Any:
    """JSON has no tuples and writes whole floats as integers; everything else must match the annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _checked_type(args[0], value, where=where)
    if origin is Literal:
        return value  # its choices are checked with the field
    if origin is tuple:
        is_list = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        require(is_list, f"{where}: expected a list of names, got {value!r}")
        return tuple(value)
    accepted: tuple[type, ...] = tuple(args) if origin in (typing.Union, types.UnionType) else (hint,)
    if float in accepted and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_stray_bool = isinstance(value, bool) and bool not in accepted
    name = " or ".join("null" if one is type(None) else one.__name__ for one in accepted)
    require(isinstance(value, accepted) and not is_stray_bool, f"{where}: expected {name}, got {value!r}")
    return value
