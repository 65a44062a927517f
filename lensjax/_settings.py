"""Settings: frozen dataclasses whose fields declare what they may be.

    @settings("focus")
    class FocusConfig:
        steps: PositiveInt = 4
        temperature: NonNegative = 0.0
        order: Literal["best", "random"] = "best"

What a field may be stands in its annotation: a type, a `Bound` of it, or a `Literal`. Every field is held to it,
whatever its neighbours are and wherever the value comes from; numbers of numpy become those of Python. Devices compute
in float32 and int32, so a number must be one of these too. Messages name the field's full path, as a command line and a
`config.json` do.
"""

import dataclasses
import functools
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Kind = TypeVar("Kind")

INT32 = 2**31 - 1
"""The largest whole number that a field may hold."""
_FLOAT32_MAX, _FLOAT32_TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
SHOWN = 200
"""Characters of a value that a message shows."""


@dataclass(frozen=True)
class Bound:
    """An interval of finite numbers; ends may be excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_excluded: bool = False
    high_excluded: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is inside; NaN and infinity never are."""
        above = value > self.low if self.low_excluded else value >= self.low
        below = value < self.high if self.high_excluded else value <= self.high
        return above and below and math.isfinite(value)

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
Seed = Annotated[int, Bound(0, 2**31, high_excluded=True)]
Width = Annotated[int, Bound(1, 2**20)]
"""Numbers side by side: features, heads, a vocabulary."""
Layers = Annotated[int, Bound(1, 128)]
BatchSize = Annotated[int, Bound(1, 2**16)]
Repeats = Annotated[int, Bound(1, 1024)]
"""Of what is done again and again within one step."""
BatchCount = Annotated[int, Bound(1, 2**16)]
"""Held-out batches, which are in memory while a run lasts."""
Variants = Annotated[int, Bound(1, 1024)]
"""Of one sequence; they are compared pair by pair."""


def require(ok: bool, message: str) -> None:
    """Raises `ValueError` with the message where a value is not one that works."""
    if not ok:
        raise ValueError(message)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(path: str = "", *, is_pytree: bool = False) -> Callable[[type[Kind]], type[Kind]]:
    """Makes a frozen dataclass that checks its fields, and then what its method `_check` says of several together.

    Args:
      path: where its fields stand in a configuration, for messages; "" at the top.
      is_pytree: whether the fields are data of jax transformations. They may then be arrays, whose values are checked
        where they are known; what transformations themselves put there is not looked at. A section of settings that
        are none holds numbers alone.

    Raises:
      ValueError: by the class, of a value that is none of its field.
    """

    def decorate(cls: type[Kind]) -> type[Kind]:
        def check(self: Any) -> None:
            for name, hint in _hints(cls).items():  # type: ignore[arg-type]
                value = getattr(self, name)
                try:
                    fitted = _array(hint, value) if is_pytree and _is_array(value) else _fitted(hint, value)
                except _Unfit as problem:
                    full = f"{path}{'.' if path else ''}{name}"
                    raise ValueError(f"{full} must be {problem}, got {shown(value)}") from None
                if fitted is not value:
                    object.__setattr__(self, name, fitted)
            if hasattr(self, "_check"):
                self._check()

        cls.__post_init__ = check  # type: ignore[attr-defined]
        made = dataclass(frozen=True)(cls)
        if is_pytree:
            _register(made)
        return made

    return decorate


def shown(value: Any) -> str:
    """A value in one short line of a message."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class _Unfit(Exception):
    """Says what a value must be."""


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Every field's annotation."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def _fitted(hint: Any, value: Any) -> Any:
    """A value as a field of that annotation holds it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in args:
            return None
        (inner,) = (one for one in args if one is not types.NoneType)
        if typing.get_origin(inner) is Literal:
            inner = Literal[(*typing.get_args(inner), None)]
        return _fitted(inner, value)
    if origin is tuple:
        if not isinstance(value, tuple):
            raise _Unfit(f"a tuple, each {_words(args[0])}")
        fitted = tuple(_fitted(args[0], one) for one in value)
        return value if all(map(operator.is_, fitted, value)) else fitted
    if origin is Literal:
        text = str(value) if isinstance(value, np.str_) else value
        if not any(type(text) is type(choice) and text == choice for choice in args):
            raise _Unfit(_words(hint))
        return text
    kind = args[0] if origin is Annotated else hint
    if origin is Annotated and kind not in (int, float):
        return _fitted(kind, value)
    if kind in (int, float):
        return _number(hint, value)
    if kind is bool and isinstance(value, bool | np.bool_):
        return bool(value)
    if kind is str and isinstance(value, str | os.PathLike):
        return _text(value)
    if kind is Path and isinstance(value, str | os.PathLike):
        return value if isinstance(value, Path) and _text(value) else Path(_text(value))
    if kind not in (bool, str) and isinstance(value, kind):
        return _plain(value) if dataclasses.is_dataclass(value) else value
    raise _Unfit(_words(hint))


def _words(hint: Any) -> str:
    """What fits an annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is Annotated:
        return f"{_words(args[0])} {_bound(hint)}".removesuffix(" a number")
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text"}.get(
        hint
    ) or f"a {hint.__name__}"


def _bound(hint: Any) -> Bound:
    extras = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
    return next((extra for extra in extras if isinstance(extra, Bound)), Bound())


def _number(hint: Any, value: Any) -> int | float:
    """A number as Python's own, within its bound."""
    bound, is_whole = _bound(hint), int in (hint, *typing.get_args(hint)[:1])
    dtype = getattr(value, "dtype", None)
    is_number = isinstance(value, numbers.Real) if dtype is None else np.ndim(value) == 0 and _is_numeric(dtype)
    try:
        if isinstance(value, bool) or not is_number:
            raise TypeError
        number = operator.index(value) if is_whole else float(value)
    except OverflowError:
        raise _Unfit(_finite(bound)) from None
    except TypeError:  # a tracer's value is not known
        raise _Unfit(_words(hint)) from None
    if isinstance(number, int):
        if number > INT32:
            raise _Unfit(f"at most {min(INT32, bound.high)}")
        if not bound.holds(number):
            raise _Unfit(str(bound))
        return number
    if not bound.holds(number):
        raise _Unfit(str(bound) if math.isfinite(number) else _finite(bound))
    if not bound.holds(_as_float32(number)):
        raise _Unfit(f"{bound if math.isfinite(_as_float32(number)) else _finite(bound)} as float32")
    return value if type(value) is float else number


def _finite(bound: Bound) -> str:
    return "a finite number" if bound == Bound() else f"finite and {bound}"


def _as_float32(number: float) -> float:
    """What a device makes of a number: too large is infinite, too small is 0."""
    if abs(number) > _FLOAT32_MAX:
        return math.copysign(math.inf, number)
    return 0.0 if abs(number) < _FLOAT32_TINY else float(np.float32(number))


def _text(value: Any) -> str:
    text = os.fspath(value)
    if not isinstance(text, str) or "\0" in text or not _is_utf8(text):
        raise _Unfit("text that UTF-8 can write, without NUL")
    return text if type(text) is str else str(text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _is_numeric(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating))


def _array(hint: Any, value: Any) -> Any:
    """An array in the place of a number, checked where its values are known."""
    if not _is_numeric(value.dtype):
        raise _Unfit(_words(hint))
    if not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True):
        for one in np.asarray(value, np.float64).ravel().tolist():
            _number(Annotated[float, _bound(hint)], one)
    return value


def _plain(section: Any) -> Any:
    """A section whose fields are numbers, not arrays of them: it is compared, hashed and written."""
    arrays = {name: value for name in vars(section) if _is_array(value := getattr(section, name))}
    if not arrays:
        return section
    if any(isinstance(value, jax.core.Tracer) or value.ndim for value in arrays.values()):
        raise _Unfit(f"a {type(section).__name__} of numbers")
    return dataclasses.replace(section, **{name: value.item() for name, value in arrays.items()})


def _register(cls: type) -> None:
    """Makes a pytree of it, which transformations put together again without a check."""
    names = [item.name for item in dataclasses.fields(cls)]

    def flatten(one: Any) -> tuple[list[Any], None]:
        return [getattr(one, name) for name in names], None

    def flatten_with_keys(one: Any) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(one, name)) for name in names], None

    def unflatten(_: None, values: Any) -> Any:
        one: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(one, name, value)
        return one

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


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
