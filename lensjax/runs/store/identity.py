"""Which run it is: a flat configuration, and digests of its data and of the weights that it began with.

Every checkpoint holds it, and `--resume` compares. Some changes leave a run the same one; the rest is refused.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lensjax.runs.store import paths

Identity = dict[str, Any]
"""JSON: `config` by dotted names, `data` and `weights`."""
RHYTHM = ("logging_steps", "save_steps", "shard_parameters", "attention", "logging.sinks", "logging.project")
"""When and where a run writes, where it keeps its numbers, and what multiplies them: none of it is part of what it is.
"""
_WHAT = {"data": "the data", "weights": "the weights of the models that the run began with"}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Maps dotted names to the values of a config and its sections."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        values |= flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return values


def of(config: Any, *, data: str | None, weights: str | None) -> Identity:
    """The identity of a run.

    Args:
      config: the run's.
      data: digest of its data; None where the config says it all.
      weights: of `digest`, or None for a run that begins with nothing.
    """
    identity: Identity = json.loads(json.dumps({"config": flat(config), "data": data, "weights": weights}))
    return identity


def digest(params: Mapping[str, Any]) -> str | None:
    """SHA-256 of parameters by their names, shapes, types and bits; None of none.

    Example:
      >>> import numpy as np
      >>> from lensjax.runs.store.identity import digest
      >>> digest({"base": np.zeros(2)}) == digest({"base": np.zeros((2, 1))}), digest({})
      (False, None)
    """
    if not params:
        return None
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params)):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def compare(stored: Identity, now: Identity, *, phase: str, steps: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What is no longer as it was.

    Args:
      stored: of a checkpoint.
      now: of the run that is to go on from it.
      phase: the checkpoint's.
      steps: all phases in their order, each with the setting that says its number of steps.

    Returns:
      Changes that the run can go on with, and those that would make it another one; each names key and both values.

    Example:
      >>> from lensjax.runs.store.identity import compare
      >>> before, after = ({"config": {"seed": seed, "steps": 5 + seed}} for seed in (0, 1))
      >>> compare(before, after, phase="lens", steps={"lens": "steps"})
      (['steps is 6 now and was 5'], ['seed is 1 now and was 0'])
    """
    was, is_ = stored["config"], now["config"]
    over = list(steps.values())[: list(steps).index(phase)]
    allowed: list[str] = []
    refused: list[str] = []
    for key in (key for key in is_ if key in was and is_[key] != was[key]):
        change = f"{key} is {_text(is_[key])} now and was {_text(was[key])}"
        if key in steps.values():
            grows = isinstance(was[key], int) and is_[key] > was[key]
            reason = " (that phase is over, and later ones began with what it came to)" if key in over else ""
            (allowed if grows and not reason else refused).append(change + reason)
        elif key in paths.NAMES or key in RHYTHM or (key == "eval_steps" and is_.get("stopping.patience") is None):
            allowed.append(change)
        else:
            refused.append(change)
    for key, what in _WHAT.items():
        if stored.get(key) != now.get(key):
            refused.append(f"{what} are others (SHA-256 {_text(now.get(key))} now and {_text(stored.get(key))} before)")
    return allowed, refused


def different(stored: Identity, now: Identity) -> list[str]:
    """What makes another run of it, whatever its number of steps; each names key and both values."""
    _, refused = compare(stored, now, phase="all", steps={"all": ""})
    return refused


def _text(value: Any) -> str:
    return "null" if value is None else str(value) if isinstance(value, str) else json.dumps(value)
