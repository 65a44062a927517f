"""The suite of `lensjax.runs.data.suite` on a run's models: every policy, every task, every budget.

    python -m experiments.evaluate runs/smol --suite --sequences 32

Models of text read the tasks as text, through their tokenizer; models of task `suite` read them in word form. The
history is as long as in training, and the horizon as the longest answer.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax import Array
from rich.console import Console

from experiments import dealing
from experiments.quality import Row
from lensjax import _settings
from lensjax._numerics import may_be_nan
from lensjax._settings import require, shown
from lensjax.evaluation import questions, rivals
from lensjax.evaluation.compare import FULL
from lensjax.evaluation.questions import Answered
from lensjax.evaluation.statistics import estimate
from lensjax.models import Models, Params
from lensjax.plots import answers
from lensjax.runs.config import Config
from lensjax.runs.data import suite as puzzles
from lensjax.runs.data.suite.source import stacked
from lensjax.runs.data.suite.windows import Form, Text, Words, fill
from lensjax.runs.data.tokenizers import read_tokenizer
from lensjax.runs.engine import devices
from lensjax.training.recipe import Recipe

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Suite:
    """The tasks in windows of one shape."""

    config: Config
    """The run's, with the suite's window and horizon."""
    tasks: dict[str, list[Batch]]
    """Batches by task."""
    left_out: dict[str, str]
    """Why, by the name of each task that does not fit."""


def prepare(
    config: Config, chosen: Collection[str] = tuple(puzzles.TASKS), *, sequences: int, batch_size: int, seed: int
) -> Suite:
    """Draws the questions of tasks, in windows of the whole suite: a task has the same rows alone and among others.

    Args:
      config: the run's.
      chosen: the tasks.
      sequences: questions a task, a multiple of `batch_size`.
      batch_size: questions measured at a time.
      seed: decides them.

    Raises:
      ValueError: a task is none of the suite or comes twice, the run reads neither text nor the suite's words, or no
        task fits its history.
    """
    known = bool(chosen) and len(set(chosen)) == len(chosen) and set(chosen) <= set(puzzles.TASKS)
    require(known, f"tasks must be different ones of {', '.join(puzzles.TASKS)}, got {shown(chosen)}")
    form, history = _form(config), config.context.history
    drawn = {task: puzzles.draw(task, sequences, seed=seed) for task in puzzles.TASKS}
    horizon = max(len(form.answer(puzzle.answer)) for some in drawn.values() for puzzle, _ in some)
    tasks, left_out = {}, {}
    for task in chosen:
        try:
            examples = [
                fill(puzzle, form, rng, history=history, horizon=horizon, name=task) for puzzle, rng in drawn[task]
            ]
        except ValueError as error:
            left_out[task] = str(error)
            continue
        parts = [examples[i : i + batch_size] for i in range(0, sequences, batch_size)]
        tasks[task] = [stacked(part, config.context.block_size) for part in parts]
    require(bool(tasks), f"no task of the suite fits this run: {'; '.join(left_out.values())}")
    changes = {"context.window": history + horizon, "context.horizon": horizon}
    return Suite(_settings.replace(config, **changes), tasks, left_out)


def evaluate(
    suite: Suite, models: Models, params: dict[str, Params], lengths: dict[int, int], *, draws: int, console: Console
) -> list[Row]:
    """Measures every task at every budget, and prints a table for each budget.

    Args:
      suite: the questions.
      models: the run's.
      params: their parameters.
      lengths: entries by budget.
      draws: contexts of each random policy.
      console: where tables and progress go.

    Returns:
      A row a task, budget and policy.
    """
    for task, why in suite.left_out.items():
        console.out(f"left out: {task}: {why}", highlight=False)
    mesh, rows = devices.make_mesh({}), list[Row]()
    for ratio, length in lengths.items():
        measure = dealing.on_each(_compiled(suite.config.recipe, models, length, draws), mesh)
        keyed = [_with_keys(index, batch) for own in suite.tasks.values() for index, batch in enumerate(own)]
        title = f"suite, {length} entries"
        found = dealing.over_batches(measure, keyed, params, mesh=mesh, console=console, title=title)
        at_budget: list[Row] = []
        for task, own in zip(suite.tasks, _parts(found, len(suite.tasks)), strict=True):
            at_budget += _rows(suite.config, task, own, ratio=ratio, length=length)
        print_table(console, at_budget, ratio=ratio, length=length, history=suite.config.context.history)
        rows += at_budget
    return rows


def print_table(console: Console, rows: list[Row], *, ratio: int, length: int, history: int) -> None:
    """Two tables at one budget, plain lines: the answer's loss, and the share of answers that the model would write."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    policies = sorted({row["policy"] for row in rows}, key=rivals.order)
    cells = {(row["policy"], row["task"]): row for row in rows}
    for column, title in (("nll", "nats a token of the answer"), ("match", "share of answers written exactly")):
        console.out(f"\n{title} at {ratio}x, {length} of {history} entries, {rows[0]['questions']} questions a task")
        heads = [task.split("_") for task in tasks]
        for part in range(2):
            names = [head[part] if part < len(head) else "" for head in heads]
            console.out(" " * 17 + "".join(name.rjust(10) for name in names), highlight=False)
        for policy in policies:
            numbers = (f"{cells[policy, task][column]:.3f}".rjust(10) for task in tasks)
            console.out(policy.ljust(17) + "".join(numbers), highlight=False)


def draw(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """The share of answers written exactly: a panel a budget, a row a policy, a column a task."""
    answers.exact_matches(rows, path, order=rivals.order, title=title)


def _form(config: Config) -> Form:
    if config.data.task == "suite":
        return Words()
    require(
        config.data.is_text,
        "--suite needs a run whose models read text (data.task text or stdlib) or the suite's words (data.task suite), "
        f"got {config.data.task!r}",
    )
    return Text(read_tokenizer(config.data.tokenizer))


@functools.cache
def _compiled(recipe: Recipe, models: Models, length: int, draws: int) -> Callable[..., dict[str, Answered]]:
    def one(params: dict[str, Params], tokens: Array, answers: Array, scored: Array, key: Array) -> dict[str, Answered]:
        return questions.measure(
            models, params, tokens, answers, scored, key, length=length, draws=draws, recipe=recipe
        )

    # One question after the other: each has its dozens of contexts to fill the machine with.
    return may_be_nan(jax.jit(lambda params, *batch: jax.lax.map(lambda row: one(params, *row), batch)))


def _with_keys(index: int, batch: Batch) -> tuple[np.ndarray | Array, ...]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), len(batch["tokens"]))
    return batch["tokens"], batch["answers"], batch["scored"], keys


def _parts(found: dict[str, Answered], count: int) -> list[dict[str, Answered]]:
    """What was measured of tasks one after the other, each with as many questions, by task."""
    leaves, tree = jax.tree.flatten(found)
    return [jax.tree.unflatten(tree, own) for own in zip(*(np.split(leaf, count) for leaf in leaves), strict=True)]


def _rows(config: Config, task: str, found: dict[str, Answered], *, ratio: int, length: int) -> list[Row]:
    history, horizon = config.context.history, config.context.horizon
    seen = rivals.lens_rows(config.lens, config.geometry, length)
    rows: list[Row] = []
    for name in sorted(found, key=rivals.order):
        one = found[name]
        if not np.isfinite(one.nll).all():
            raise FloatingPointError(f"the loss of {name} on {task} at {ratio}x is not finite: the model is broken")
        row: Row = {
            "task": task,
            "policy": name,
            "information": rivals.information(name),
            "reads": rivals.reads(name, history=history, horizon=horizon, rows=seen),
            "budget_ratio": 1 if name == FULL else ratio,
            "against_budget": ratio,
            "entries": {FULL: history, questions.EMPTY: config.context.recent_tokens}.get(name, length),
            "seed": config.seed,
            "questions": len(one.nll),
            "hit_rate": float(one.hit.mean()),
        }
        for column, values in (
            *(("nll", one.nll), ("match", one.match)),
            ("minus_recency", one.nll - found["recency"].nll),
        ):
            mean = estimate(values)
            row |= {column: mean.mean, f"{column}_ci_low": mean.interval[0], f"{column}_ci_high": mean.interval[1]}
        rows.append(row)
    return rows
