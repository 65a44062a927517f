"""`config.json`: any configuration as JSON, both ways."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, TypeVar

from lensjax._settings import require, shown

Kind = TypeVar("Kind")

FORMAT = 2
"""Of the files that this version writes, under the key "format"."""


def to_json(config: Any) -> str:
    """Writes a config as JSON text; `from_json` reads it back equal."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2, allow_nan=False) + "\n"


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
      ValueError: the text is not a JSON object or of another format, a key is unknown or comes twice, or a value has
        the wrong type or range.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    require(isinstance(raw, dict), f"{source}: expected an object with keys of {kind.__name__}, got {shown(raw)}")
    written = raw.pop("format", None)
    require(
        type(written) is int and written == FORMAT,
        f"{source} has format {shown(written)}, and this version of lensjax reads format {FORMAT}: use the version "
        "that environment.json beside it names, or run it again",
    )
    try:
        config: Kind = _build(kind, raw)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"the key {twice} comes twice in one object")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _build(cls: type, raw: Any, *, path: str = "") -> Any:
    """The config of a class; its settings check the values."""
    where = path.removesuffix(".")
    require(isinstance(raw, dict), f"{where} must be an object with keys of {cls.__name__}, got {shown(raw)}")
    hints = typing.get_type_hints(cls)
    unknown = [f"{path}{name}" for name in sorted(set(raw) - set(hints))]
    known = ", ".join(sorted(hints))
    require(not unknown, f"unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}; known keys: {known}")
    return cls(
        **{
            name: _build(hints[name], value, path=f"{path}{name}.")
            if dataclasses.is_dataclass(hints[name])
            else _value(hints[name], value)
            for name, value in raw.items()
        }
    )


def _value(hint: Any, value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) and typing.get_origin(hint) is tuple else value
