"""Every field of every configuration by itself: what it may not be is refused, and numbers of numpy are Python's."""

import dataclasses
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quiet_star.config import QuietStarConfig
from experiments.rlan.config import RlanConfig
from lensjax import _settings
from lensjax._settings import Bound
from lensjax.runs.config import Config
from lensjax.runs.store import config_file

every_kind = pytest.mark.parametrize("kind", [Config, RlanConfig, QuietStarConfig])
HUGE = 10**400


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a configuration that is no section."""

    name: str
    kind: type
    bound: Bound
    choices: tuple
    is_optional: bool
    is_tuple: bool


def fields_of(section, path=""):
    hints = typing.get_type_hints(type(section), include_extras=True)
    for item in dataclasses.fields(section):
        value, hint = getattr(section, item.name), hints[item.name]
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{path}{item.name}.")
        else:
            yield field_of(f"{path}{item.name}", hint)


def field_of(name, hint):
    is_optional = types.NoneType in typing.get_args(hint)
    if is_optional:
        hint = typing.get_args(hint)[0]
    is_tuple = typing.get_origin(hint) is tuple
    if is_tuple:
        hint = typing.get_args(hint)[0]
    bound = hint.__metadata__[0] if typing.get_origin(hint) is Annotated else None
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    kind = str if choices else typing.get_args(hint)[0] if bound else hint
    return Field(name, kind, bound, choices, is_optional, is_tuple)


def beyond(end, excluded, direction, kind):
    if math.isinf(end):
        return []
    return [kind(end) if excluded else end + direction if kind is int else math.nextafter(end, direction * math.inf)]


def bad_values(field):
    """What it may not be, as JSON can say it too."""
    if field.is_tuple:
        return ["lens", [1], ["unknown"], {}, None]
    values = [[], {}, ["a"]] if field.is_optional else [[], {}, None, ["a"]]
    if field.choices:
        return [*values, "unknown", 1, True]
    if field.kind is str:
        return [*values, 1, True, "a\0b", "a\udce9"]
    if field.kind is bool:
        return [*values, 0, 1, "true", 1.0]
    bound, values = field.bound, [*values, "1", "", True, HUGE, -HUGE]
    values += beyond(bound.low, bound.low_excluded, -1, field.kind)
    values += beyond(bound.high, bound.high_excluded, +1, field.kind)
    return [*values, *([1.5, 2**31] if field.kind is int else [1e39, -1e39, HUGE])]


def refusal(change):
    with pytest.raises(ValueError) as error:
        change()
    return str(error.value)


def as_json(name, value):
    *sections, last = name.split(".")
    raw = {last: value}
    for section in reversed(sections):
        raw = {section: raw}
    return json.dumps({"format": config_file.FORMAT, **raw})


def from_python(value):
    return tuple(value) if value in ([1], ["unknown"]) else value


@every_kind
def test_d5_1_every_field_refuses_what_it_may_not_be(kind):
    """From code and from a file alike: one line, with the field's path, what it must be, and the value."""
    config, seen = kind(), 0
    for field in fields_of(config):
        for value in bad_values(field):
            message = refusal(lambda: _settings.replace(config, **{field.name: from_python(value)}))  # noqa: B023
            assert re.match(rf"{re.escape(field.name)} must be .+, got .+", message), message
            assert "\n" not in message and len(message) < 500
            written = refusal(lambda: config_file.from_json(as_json(field.name, value), kind, source="x.json"))  # noqa: B023
            assert re.match(rf"x\.json: {re.escape(field.name)} must be .+, got .+", written), written
            seen += 1
    assert seen > 200


@every_kind
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 1e-46], ids=str)
def test_d17_1_every_number_is_finite_as_float32(kind, value):
    for field in fields_of(kind()):
        if field.kind is float:
            if value == 1e-46 and field.bound.holds(0.0):
                continue
            message = refusal(lambda: _settings.replace(kind(), **{field.name: value}))  # noqa: B023
            assert message.startswith(f"{field.name} must be "), message
            assert message.endswith(f", got {value!r}")


@every_kind
def test_d5_4_numbers_of_numpy_become_those_of_python(kind):
    """They are written as JSON, and read back equal."""
    config, changes = kind(), {}
    for field in fields_of(config):
        value = value_of(config, field.name)
        if type(value) is bool:
            changes[field.name] = np.bool_(value)
        elif type(value) is int:
            changes[field.name] = np.int64(value)
        elif type(value) is float:
            changes[field.name] = np.float64(value)
        elif type(value) is str:
            changes[field.name] = np.str_(value)
    changed = _settings.replace(config, **changes)
    assert changed == config and hash(changed) == hash(config)
    assert len(changes) > 30
    for name in changes:
        assert type(value_of(changed, name)) is type(value_of(config, name)), name
    assert config_file.from_json(config_file.to_json(changed), kind) == config


@pytest.mark.parametrize("number", [np.int32(7), np.uint8(7), np.array(7), jnp.int32(7)], ids=repr)
def test_d5_4_whole_numbers_of_every_kind(number):
    assert type(_settings.replace(Config(), seed=number).seed) is int


@pytest.mark.parametrize("number", [np.float32(0.5), np.float16(0.5), jnp.bfloat16(0.5), np.array(0.5), jnp.array(0.5)])
def test_d5_4_numbers_of_every_kind(number):
    margin = _settings.replace(Config(), **{"hyper.margin": number}).hyper.margin
    assert type(margin) is float and margin == 0.5


def test_d5_4_a_path_is_text():
    assert _settings.replace(Config(), output_dir=Path("runs/a")).output_dir == "runs/a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5.5}, "steps must be a whole number at least 0, got 5.5"),
        ({"steps": "5"}, "steps must be a whole number at least 0, got '5'"),
        ({"steps": np.float32(5)}, "steps must be a whole number at least 0, got np.float32(5.0)"),
        ({"steps": np.arange(3)}, "steps must be a whole number at least 0, got array([0, 1, 2])"),
        ({"steps": 3_000_000_000}, "steps must be at most 2147483647, got 3000000000"),
        ({"trainable": ["lens"]}, "trainable must be a tuple, each one of base, gist, lens, hypernet, got ['lens']"),
        ({"data.max_files": 0}, "data.max_files must be at least 1, got 0"),
        ({"base": None}, "base must be a BaseConfig, got None"),
        ({"hyper.margin": np.ones(2)}, "hyper must be a Hyperparameters of numbers"),
        ({"hyper.margin": 10**5000}, "hyper.margin must be finite and at least 0, got a int of very many digits"),
    ],
)
def test_d5_7_values_of_other_types(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _settings.replace(Config(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain.rollout_weight": math.inf}, "pretrain.rollout_weight must be finite and at least 0, got inf"),
        ({"hyper.rank_weight": 1e308}, "hyper.rank_weight must be finite and at least 0 as float32, got 1e+308"),
        ({"hyper.temperature": 1e-50}, "hyper.temperature must be above 0 as float32, got 1e-50"),
        ({"hyper.adv_norm_beta": 1 - 1e-9}, "hyper.adv_norm_beta must be in [0, 1) as float32, got 0.999999999"),
        ({"optimizer.clip_norm": math.inf}, "optimizer.clip_norm must be finite and above 0, got inf"),
        ({"focus.expand_threshold": -math.inf}, "focus.expand_threshold must be a finite number, got -inf"),
    ],
)
def test_d17_3_what_counts_is_float32(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _settings.replace(Config(), **changes)


@every_kind
def test_every_number_has_a_bound(kind):
    for field in fields_of(kind()):
        if field.kind in (int, float):
            assert isinstance(field.bound, Bound), field.name


@every_kind
def test_every_field_takes_the_ends_that_its_bound_has(kind):
    """By itself: rules over several fields may refuse it, but never by the bound's words."""
    config = kind()
    for field in fields_of(config):
        if field.bound is None:
            continue
        ends = [(field.bound.low, field.bound.low_excluded), (field.bound.high, field.bound.high_excluded)]
        for end, excluded in ends:
            if excluded or math.isinf(end):
                continue
            try:
                _settings.replace(config, **{field.name: field.kind(end)})
            except ValueError as error:
                assert f"{field.name} must be {field.bound}" not in str(error), field.name


def value_of(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config
