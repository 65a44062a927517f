"""Settings: what a field may be stands in its annotation, and a value that is not so is refused."""

import math
import re
from dataclasses import FrozenInstanceError
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensjax._settings import (
    Bound,
    Count,
    Decay,
    Positive,
    PositiveInt,
    Share,
    above,
    at_least,
    replace,
    require,
    settings,
)


@settings("inner")
class Inner:
    size: PositiveInt = 2
    rate: Positive = 0.5
    most: Count | None = None
    kind: Literal["a", "b"] = "a"
    kinds: tuple[Literal["x", "y"], ...] = ("x",)
    maybe: Literal["p", "q"] | None = None
    widths: tuple[Share, ...] = (0.5,)
    limit: Annotated[float, Bound()] = 9.0
    label: str = "anything"


@settings()
class Outer:
    seed: Annotated[int, Bound(0, 4, high_excluded=True)] = 0
    inner: Inner = Inner()
    steps: Count = 3

    def _check(self) -> None:
        require(self.steps != self.seed, f"steps must differ from seed {self.seed}, got {self.steps}")


@settings("longer")
class Longer(Outer):
    decay: Decay = 0.9

    def _check(self) -> None:
        super()._check()
        require(self.decay != 0.5, "longer.decay must not be 0.5")


BOUNDS = st.builds(
    lambda low, width, low_excluded, high_excluded: Bound(
        low, low + width, low_excluded=low_excluded, high_excluded=high_excluded
    ),
    st.integers(-3, 3) | st.just(-math.inf),
    st.integers(1, 3) | st.just(math.inf),
    st.booleans(),
    st.booleans(),
).filter(lambda bound: not math.isnan(bound.high))


@given(bound=BOUNDS, value=st.integers(-8, 8) | st.floats())
def test_a_bound_is_an_interval(bound, value):
    inside = bound.low < value < bound.high
    inside |= value == bound.low and not bound.low_excluded
    inside |= value == bound.high and not bound.high_excluded
    assert bound.holds(value) == (inside and math.isfinite(value))


def test_bounds_in_words():
    assert str(at_least(2)) == "at least 2"
    assert str(above(1)) == "above 1"
    assert str(Bound(0, 1)) == "in [0, 1]"
    assert str(Bound(0, 1, low_excluded=True, high_excluded=True)) == "in (0, 1)"
    assert str(Bound()) == "a number"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "inner.size must be at least 1, got 0"),
        ({"rate": 0.0}, "inner.rate must be above 0, got 0.0"),
        ({"rate": math.inf}, "inner.rate must be finite and above 0, got inf"),
        ({"rate": math.nan}, "inner.rate must be finite and above 0, got nan"),
        ({"most": -1}, "inner.most must be at least 0, got -1"),
        ({"kind": "c"}, "inner.kind must be one of a, b, got 'c'"),
        ({"kind": None}, "inner.kind must be one of a, b, got None"),
        ({"kinds": ("x", "z")}, "inner.kinds must be one of x, y, got ('x', 'z')"),
        ({"maybe": "r"}, "inner.maybe must be one of p, q, None, got 'r'"),
        ({"widths": (0.5, 1.5)}, "inner.widths must be in [0, 1], got (0.5, 1.5)"),
        ({"limit": math.nan}, "inner.limit must be a finite number, got nan"),
        ({"limit": -math.inf}, "inner.limit must be a finite number, got -inf"),
    ],
)
def test_a_bad_value_is_refused_with_its_path_its_bound_and_itself(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Inner(**values)


def test_good_values_pass():
    good = Inner(size=1, rate=1e-9, most=0, kind="b", kinds=(), maybe="q", widths=(0.0, 1.0), limit=-9)
    assert (good.size, good.most, good.maybe, good.limit) == (1, 0, "q", -9.0)
    assert Inner() == Inner() and hash(Inner()) == hash(Inner()) and Inner(size=3) != Inner()
    with pytest.raises(FrozenInstanceError):
        good.size = 5


def test_fields_at_the_top_have_no_section_in_their_path():
    with pytest.raises(ValueError, match=r"^seed must be in \[0, 4\), got 4$"):
        Outer(seed=4)


def test_rules_over_several_fields_come_after_the_bounds():
    with pytest.raises(ValueError, match=r"^steps must differ from seed 3, got 3$"):
        Outer(seed=3)
    with pytest.raises(ValueError, match=r"^seed must be in \[0, 4\), got -1$"):
        Outer(seed=-1, steps=-1)


def test_what_is_inherited_is_checked_too():
    assert Longer().steps == 3
    for values, message in (
        ({"decay": 1.0}, r"longer\.decay must be in \[0, 1\), got 1\.0"),
        ({"seed": 9}, r"longer\.seed must be in \[0, 4\), got 9"),
        ({"steps": 0}, "steps must differ from seed 0, got 0"),
        ({"decay": 0.5}, r"longer\.decay must not be 0\.5"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            Longer(**values)


def test_arrays_and_placeholders_pass():
    """Inside of jax transformations the fields of a pytree are arrays, tracers, or objects that stand for them."""

    @settings("data", is_pytree=True)
    class Data:
        rate: Positive = 1.0
        share: Share = 0.5

    stacked = jax.tree.map(lambda value: jnp.full(2, -value), Data())
    assert stacked.rate.tolist() == [-1, -1]
    turned = jax.jit(jax.vmap(lambda data: replace(data, rate=-data.rate)))(stacked)
    assert turned.rate.tolist() == [1, 1]
    assert jax.tree.structure(Data()).unflatten([object(), None]).share is None


def test_replace_takes_dotted_names():
    changed = replace(Outer(), **{"seed": 1, "inner.rate": 2.0, "inner.most": 7})
    assert changed == Outer(seed=1, inner=Inner(rate=2.0, most=7))
    assert replace(Outer(), **{"inner": Inner(size=5), "inner.rate": 2.0}).inner == Inner(size=5, rate=2.0)
    assert Outer() == Outer(inner=Inner())


@pytest.mark.parametrize("name", ["sede", "inner.ratio", "outer.rate", "inner.rate.end"])
def test_replace_refuses_unknown_names(name):
    with pytest.raises(ValueError, match=f"unknown config key {re.escape(name)}"):
        replace(Outer(), **{name: 1})


def test_replace_refuses_bad_values():
    with pytest.raises(ValueError, match=r"^inner\.size must be at least 1, got -1$"):
        replace(Outer(), **{"inner.size": -1})
