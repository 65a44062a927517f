"""Fields of a configuration that are set to any Python object: refused by name, or kept by `config.json`."""

import contextlib
import dataclasses
import math
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from experiments.process import errors_end
from lensjax._settings import replace
from lensjax.runs.config import Config
from lensjax.runs.store import config_file
from tests.fuzz.runner import Case, Outcome
from tests.runs import TINY

VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 5, 2**31 - 1, 2**31, 2**63, 10**400, 0.0, -0.0, 0.5, 1.0, 1e-45, 1e38, 1e39, 1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, True, False, None, "", "0", "nan", "recall", "\udce9", "x" * 5000, b"1", 1j),
    *((), (1,), ("lens",), ["lens"], {}, {"a": 1}, object(), int, Path("x"), Decimal("0.1"), range(3)),
    *(np.float32(0.5), np.float64("nan"), np.int64(3), np.int8(-1), np.bool_(True), np.arange(2), np.zeros(())),
)


def fields(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields, and of the sections."""
    names = []
    for field in dataclasses.fields(config):
        names.append(prefix + field.name)
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            names += fields(value, f"{prefix}{field.name}.")
    return names


class _Values:
    name = "values"

    def make(self, rng: random.Random, folder: Path) -> Case:
        changes = {rng.choice(fields(TINY)): rng.choice(VALUES) for _ in range(rng.choice((1, 1, 1, 2, 3)))}
        return Case(f"replace(TINY, **{changes!r})"[:400], lambda: _use(changes), leaves=folder, expects=changes)

    def check(self, outcome: Outcome) -> str:
        return ""


def _use(changes: dict[str, Any]) -> None:
    with errors_end():
        try:
            config = replace(TINY, **changes)
        except ValueError as error:
            named = any(name.rpartition(".")[2] in str(error) for name in changes)
            if not named:
                raise AssertionError(f"names none of {list(changes)}: {error}") from error
            raise
        text = config_file.to_json(config)
        assert config_file.from_json(text, Config) == config, "config.json gives another configuration"
        assert "Infinity" not in text and "NaN" not in text, "config.json is no JSON"
        with contextlib.suppress(ValueError):  # what the models say of their sizes is their own affair
            config.build_models()


KIND = _Values()
