"""The tasks of a run: rules or ARC-1, to train on and held out."""

import hashlib

import grain
import numpy as np

from experiments.rlan import arc, grids, rules
from experiments.rlan.config import RlanConfig
from lensjax.runs.data.splits import SPLITS, Split

EVALUATION_SEED = 2026
"""Of held-out rules' grids."""

Task = dict[str, np.ndarray]
"""`support` int32[N, 2, S, S], `query` int32[Q, 2, S, S]; those held out also `size` int32[Q, 2]."""


def training(config: RlanConfig) -> grain.MapDataset:
    """Tasks without end."""
    if config.tasks == "arc":
        return arc.training(config.arc, seed=config.seed)
    return rules.dataset(config.rules, "train", seed=config.seed)


def held_out(config: RlanConfig, split: Split, *, count: int) -> list[Task]:
    """Always the same tasks of a split, each with the size of every answer, by `grids.answer_size`.

    Args:
      config: the run's.
      split: `validation` or `test`.
      count: how many rules; of ARC all tasks that fit.
    """
    if config.tasks == "arc":
        tasks = arc.held_out(config.arc, split)
    else:
        source = rules.RuleSource(config.rules, split, EVALUATION_SEED)
        tasks = [source[i] for i in range(count)]
    return [task | {"size": _sizes(task)} for task in tasks]


def digest(config: RlanConfig) -> str | None:
    """SHA-256 of ARC-1 as it is installed; None of rules, which the configuration makes."""
    if config.tasks != "arc":
        return None
    return hashlib.sha256(repr({split: arc.load()[split] for split in SPLITS}).encode()).hexdigest()


def stacked(tasks: list[Task]) -> Task:
    """A batch of tasks."""
    return {name: np.stack([task[name] for task in tasks]) for name in tasks[0]}


def _sizes(task: Task) -> np.ndarray:
    return np.asarray([grids.answer_size(task["support"], source) for source, _ in task["query"]], np.int32)
