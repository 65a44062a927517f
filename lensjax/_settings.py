"""Settings: frozen dataclasses whose fields declare what they may be.

    @settings("focus")
    class FocusConfig:
        steps: PositiveInt = 4
        temperature: NonNegative = 0.0
        order: Literal["best", "random"] = "best"

What a field may be stands in its annotation: a `Bound` or a `Literal`. Messages name the field's full path, as a
command line and a `config.json` do.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Bound:
    """An interval of numbers; ends may be excluded, and infinity is unless `finite` is False."""

    low: float = -math.inf
    high: float = math.inf
    low_excluded: bool = False
    high_excluded: bool = False
    finite: bool = True

    def holds(self, value: float) -> bool:
        """Whether a number is inside; NaN never is."""
        above = value > self.low if self.low_excluded else value >= self.low
        below = value < self.high if self.high_excluded else value <= self.high
        return above and below and (math.isfinite(value) or not self.finite)

    def __str__(self) -> str:
        if self.low > -math.inf and self.high < math.inf:
            return f"in {'(' if self.low_excluded else '['}{self.low}, {self.high}{')' if self.high_excluded else ']'}"
        if self.low > -math.inf:
            return f"{'above' if self.low_excluded else 'at least'} {self.low}"
        return "a number"


def at_least(low: float) -> Bound:
    """Finite numbers from `low` on."""
    return Bound(low)


def above(low: float) -> Bound:
    """Finite numbers greater than `low`."""
    return Bound(low, low_excluded=True)


PositiveInt = Annotated[int, at_least(1)]
Count = Annotated[int, at_least(0)]
Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, at_least(0)]
Share = Annotated[float, Bound(0, 1)]
Decay = Annotated[float, Bound(0, 1, high_excluded=True)]


def require(ok: bool, message: str) -> None:
    """Raises `ValueError` with the message where a value is not one that works."""
    if not ok:
        raise ValueError(message)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(path: str = "") -> Callable[[type[Kind]], type[Kind]]:
    """Makes a frozen dataclass that checks its fields, and then what its method `_check` says of several together.

    Args:
      path: where its fields stand in a configuration, for messages; "" at the top.
    """

    def decorate(cls: type[Kind]) -> type[Kind]:
        def check(self: Any) -> None:
            for name, allowed in _allowed(cls).items():  # type: ignore[arg-type]
                value = getattr(self, name)
                if problem := _problem(allowed, value):
                    raise ValueError(f"{path}{'.' if path else ''}{name} must be {problem}, got {value!r}")
            if hasattr(self, "_check"):
                self._check()

        cls.__post_init__ = check  # type: ignore[attr-defined]
        return dataclass(frozen=True)(cls)

    return decorate


@functools.cache
def _allowed(cls: type) -> dict[str, Any]:
    """What each field's annotation allows: a `Bound`, or a tuple of choices."""
    hints = typing.get_type_hints(cls, include_extras=True)
    allowed = {item.name: _allowed_by(hints[item.name]) for item in dataclasses.fields(cls)}
    return {name: one for name, one in allowed.items() if one is not None}


def _allowed_by(hint: Any) -> Any:
    """The `Bound` or the choices inside an annotation, through `| None` and `tuple[..., ...]`."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        bounds = [extra for extra in hint.__metadata__ if isinstance(extra, Bound)]
        return bounds[0] if bounds else None
    parts = typing.get_args(hint)
    inside = next((allowed for part in parts if (allowed := _allowed_by(part)) is not None), None)
    return (*inside, None) if isinstance(inside, tuple) and types.NoneType in parts else inside


def _problem(allowed: Any, value: Any) -> str:
    """What a value should be; "" where it is fine.

    Only numbers are held to a bound: inside jax transformations a field may be an array or a placeholder.
    """
    if isinstance(allowed, Bound):
        values = value if isinstance(value, tuple) else (value,)
        numbers = [one for one in values if isinstance(one, int | float)]
        finite = "finite and " * (allowed.finite and not all(map(math.isfinite, numbers)))
        return "" if all(allowed.holds(one) for one in numbers) else f"{finite}{allowed}"
    values = value if isinstance(value, tuple) else (value,)
    return "" if all(one in allowed for one in values) else f"one of {', '.join(map(str, allowed))}"


def replace(config: Kind, **changes: Any) -> Kind:
    """`dataclasses.replace` with dotted names: `replace(config, **{"hyper.temperature": 2.0, "seed": 1})`.

    Raises:
      ValueError: a name is unknown, or the changed config is not valid.
    """
    return _replaced(config, changes, path="")


def _replaced(config: Kind, changes: dict[str, Any], *, path: str) -> Kind:
    known = {item.name for item in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        require(head in known, f"unknown config key {path}{name}")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = value
    for head, inner in nested.items():
        flat[head] = _replaced(flat.get(head, getattr(config, head)), inner, path=f"{path}{head}.")
    change: Callable[..., Kind] = dataclasses.replace
    return change(config, **flat)
