"""`config.json` of any content, given as a preset: refused, or a run with exactly these settings."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

from experiments import train
from lensjax.runs.config import Config
from lensjax.runs.store import config_file
from tests.fuzz.runner import Case, Outcome
from tests.runs import TINY, cheap_programs

VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 5, 31, 2**17, 2**20, 2**31 - 1, 2**31, 2**63, 10**400, 0.5, 1e-45, 1e38, 1e308, 5.5, -0.0),
    *(
        math.nan,
        math.inf,
        True,
        False,
        None,
        "",
        "0",
        "recall",
        "text",
        "base",
        "mean",
        "../x",
        "é☃",
        "a\0b",
        "x" * 300,
    ),
    *([], [1], ["lens"], ["lens", "lens"], ["gist", "base"], {}, {"a": 1}, [[]]),
)
BROKEN = (
    "",
    "{",
    "null",
    "[]",
    "5",
    '{"format": 2,}',
    '{"format": 2} x',
    "\ufeff{}",
    "[" * 9999,
    '{"format": 3}',
    "\0",
)


def fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values of all fields that are no sections, by their dotted names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        found |= fields(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def numbers(config: Any) -> dict[str, Any]:
    """What is no text: paths may be written otherwise."""
    return {name: value for name, value in fields(config).items() if not isinstance(value, str)}


class _Configurations:
    name = "configurations"

    def make(self, rng: random.Random, folder: Path) -> Case:
        raw = json.loads(config_file.to_json(TINY))
        raw["output_dir"] = str(folder / "run")
        changes = {}
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            name = rng.choice([name for name in fields(TINY) if name != "output_dir"])
            *sections, last = name.split(".")
            inner = raw
            for section in sections:
                inner = inner[section]
            changed = f"{last}_" if rng.random() < 0.05 else last
            inner[changed] = changes[".".join((*sections, changed))] = drawn(last, inner.get(last), rng)
        text = rng.choice(BROKEN) if rng.random() < 0.05 else json.dumps(raw)
        file = folder / "preset.json"
        file.write_text(text)
        shown = f"{file.name} of {changes}"[:400] if len(text) > 20 else repr(text)
        return Case(shown, lambda: _train(file), leaves=folder / "run", expects=(raw, changes))

    def check(self, outcome: Outcome) -> str:
        raw, changes = outcome.case.expects
        stored = config_file.load(outcome.folder / "run" / "config.json", Config)
        if numbers(stored) != numbers(config_file.from_json(json.dumps(raw), Config)):
            return f"config.json is not what was asked for: {changes}"
        summary = json.loads((outcome.folder / "run" / "summary.json").read_text())
        return "" if summary["seed"] == stored.seed else "the summary is of another seed"


def drawn(name: str, value: Any, rng: random.Random) -> Any:
    """A value for a field, but no number of steps that would be a long run, as it was asked for."""
    while True:
        other = nearby(value, rng)
        if not (name.endswith("steps") and type(other) in (int, float) and 31 < other < 2**31):
            return other


def nearby(value: Any, rng: random.Random) -> Any:
    """Something else altogether, or a number a little away."""
    if type(value) is bool and rng.random() < 0.6:
        return not value
    if type(value) in (int, float) and rng.random() < 0.6:
        return rng.choice((value + 1, value + 2, value - 1, value * 2, -value, value / 2, str(value)))
    return rng.choice(VALUES)


def _train(preset: Path) -> None:
    with cheap_programs():
        train.main([str(preset)])


KIND = _Configurations()
