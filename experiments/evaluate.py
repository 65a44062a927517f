"""Quality at a fixed budget: every policy on the same held-out sequences, at exactly the same number of entries.

    python -m experiments.evaluate runs/recall-long
    python -m experiments.evaluate runs/a runs/b runs/c --merged runs/three-seeds
    python -m experiments.evaluate runs/smol --suite

Leaves `evaluation.csv`, `evaluation.json` and `evaluation.png` in each run's folder: one row a policy and budget. With
several runs, `--merged` also writes all of their rows into one table and one picture. All devices share the
batches, those of several processes too. With `--suite` the tasks of `experiments.suite` take the place of held-out
data, and the files are `evaluation-suite.*`.

The row of LensNet's last step also says whether its focus is faithful (`lensjax.evaluation.faithfulness`): how far its
entries are from those of recency, what is lost without it or with another sequence's, whether its scores tell good
rollouts from bad.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from rich.console import Console

from experiments import command, dealing, quality
from experiments import suite as suites
from experiments.quality import Row
from experiments.suite import Suite
from experiments.tables import write_csv, write_json
from lensjax import _settings
from lensjax._numerics import may_be_nan
from lensjax._settings import Bound, PositiveInt, Variants, require, settings
from lensjax.context.allocator import FocusConfig
from lensjax.evaluation import compare
from lensjax.evaluation.compare import FOREIGN, FULL, Comparison, Measured
from lensjax.evaluation.faithfulness import FaithfulnessConfig
from lensjax.models import Models, Params
from lensjax.plots import style
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.data.suite import TASKS
from lensjax.runs.engine import devices
from lensjax.runs.fit import EVALUATION_SEED
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file, run_folder
from lensjax.training.recipe import Recipe

_LONGEST_NAME = 240
"""Bytes: with an ending, and what a name begins with while the file is written, no more than 255."""


@settings()
class Arguments:
    """What to measure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; each has its own table."""
    merged: Path | None = None
    """Where the tables of all runs go together, without ending: PATH.csv and PATH.png."""
    name: str = "evaluation"
    """Of the files in the run's folder; those of an evaluation that came to its end are not overwritten."""
    suite: bool = False
    """Measure on the suite of questions with known answers."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Of the suite."""
    budgets: tuple[PositiveInt, ...] = (2, 4)
    """History over entries: 4 means a quarter of the history, rounded down to a length that some cut has."""
    window: PositiveInt | None = None
    """Tokens in the windows to measure on; None as in training. They may be longer than those trained on."""
    split: Literal["test", "validation"] = "test"
    """Choose settings on validation, report test."""
    sequences: Annotated[int, Bound(1, 2**20)] = 256
    draws: Variants = 8
    """Contexts of each random policy, and N of the best of N."""
    oracle_rounds: Annotated[int, Bound(0, 1024)] = 2
    """Rounds of the greedy search for the oracle."""
    batch_size: Annotated[int, Bound(2, 2**16)] = 8
    """Sequences measured at a time; each is also shown as the focus on the one before it would have it."""
    focus: FocusConfig | None = None
    """How the allocator acts; None as the run's config says."""
    faithfulness: FaithfulnessConfig = field(default_factory=FaithfulnessConfig)
    """What LensNet's focus must be above. Ablation and counterfactual are in nats per token: at 0.02, 2 % of
    perplexity, they ask for more than nothing, where focus has 0.1 nats (code) or several (recall) to give."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(evaluate, Arguments, words, description=__doc__, several=True)


def evaluate(arguments: Arguments) -> list[Row]:
    """Measures every run and returns the rows of all tables; everything is checked before the first is measured."""
    require(bool(arguments.runs), "name one or more run folders")
    _require_meaning(arguments)
    require(bool(arguments.budgets), "name one or more budgets, such as --budgets 2 4: none came")
    require(
        arguments.sequences % arguments.batch_size == 0,
        f"sequences must be a multiple of batch_size {arguments.batch_size}, got {arguments.sequences}",
    )
    name, draw = arguments.name, quality.draw
    if arguments.suite:
        name, draw = f"{name}-suite", suites.draw
    outputs = [_Output(run, name, "--name", draw) for run in arguments.runs]
    merged = None
    if arguments.merged is not None:
        name = arguments.merged.name.removesuffix(".csv")
        merged = _Output(arguments.merged.parent, name, "--merged", draw, endings=(".csv", ".png"))
    for one in [*outputs, *([] if merged is None else [merged])]:
        one.check_free()
    jobs = [_prepare(run, arguments) for run in arguments.runs]
    console, rows = Console(quiet=not devices.is_first()), []
    for job, output in zip(jobs, outputs, strict=True):
        rows += (_evaluate_suite if arguments.suite else _evaluate_run)(job, arguments, output, console)
    if merged is not None:
        devices.in_first(functools.partial(merged.write, rows))
    return rows


def _require_meaning(arguments: Arguments) -> None:
    """The suite has its own questions, no search on the loss and no check of the focus; held-out data have no tasks."""
    usual, others = Arguments(runs=()), ("split", "oracle_rounds", "faithfulness")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name) != getattr(usual, name)]
    require(
        not (arguments.suite and given),
        f"--suite takes no {', '.join(given)}: leave it out, or measure held-out data without --suite",
    )
    require(
        arguments.suite or arguments.tasks == usual.tasks,
        "--tasks are those of the suite: leave it out, or add --suite",
    )


@dataclass(frozen=True)
class _Output:
    """The files of an evaluation, and a hidden one beside them as long as they are not all there."""

    folder: Path
    name: str
    flag: str
    """Which names it."""
    draw: Callable[..., None]
    endings: tuple[str, ...] = (".csv", ".json", ".png")

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.name}{ending}"

    @property
    def _unfinished(self) -> Path:
        return self.folder / f".{self.name}.unfinished"

    def check_free(self) -> None:
        """Raises where the name is none of a file, or where an evaluation that came to its end has it."""
        is_name = self.name not in ("", ".", "..") and not {"/", "\\"} & set(self.name)
        if not is_name or len(os.fsencode(self.name)) > _LONGEST_NAME:
            raise ValueError(
                f"{self.flag} must end in the name of a file without folders, of at most {_LONGEST_NAME} bytes, "
                f"got {self.name!r}"
            )
        there = [path for path in map(self.path, self.endings) if path.exists()]
        if there and not self._unfinished.exists():
            raise FileExistsError(f"{there[0]} exists: pass another {self.flag}, or move it away")

    def write(self, rows: list[Row], report: Row | None = None, *, title: str = "") -> None:
        """The table, the report and, last, the picture."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._unfinished.touch()
        write_csv(rows, self.path(".csv"))
        if report is not None:
            write_json(report, self.path(".json"))
        with style.attempt(self.path(".png")) as path:
            self.draw(rows, path, title=title)
        self._unfinished.unlink()


@dataclass(frozen=True)
class _Job:
    """A run, loaded and checked."""

    folder: Path
    config: Config
    models: Models
    params: dict[str, Params]
    data: list[dict[str, np.ndarray]] | Suite
    """Held-out batches, or the suite's."""
    lengths: dict[int, int]
    """Entries by budget."""


def _prepare(run: Path, arguments: Arguments) -> _Job:
    stored = config_file.load(run_folder.config_path(run), Config)
    changes: dict[str, Any] = {} if arguments.window is None else {"context.window": arguments.window}
    changes |= {} if arguments.focus is None else {"focus": arguments.focus}
    config = _settings.replace(stored, **changes)
    models, geometry = config.build_models(), config.context.geometry
    if any(ratio < 1 for ratio in arguments.budgets) or len(set(arguments.budgets)) < len(arguments.budgets):
        raise ValueError(f"budgets must be different ratios of at least 1, got {arguments.budgets}")
    lengths = {
        ratio: geometry.length(geometry.history // ratio, name=f"budget {ratio}x") for ratio in arguments.budgets
    }
    sequences, batch_size = arguments.sequences, arguments.batch_size
    found: list[dict[str, np.ndarray]] | Suite
    if arguments.suite:
        tasks = arguments.tasks
        found = suites.prepare(config, tasks, sequences=sequences, batch_size=batch_size, seed=EVALUATION_SEED)
    else:
        count = sequences // batch_size
        found = data.fixed_batches(config, arguments.split, batch_size=batch_size, count=count, seed=EVALUATION_SEED)
    params = load_params(run, config, models, ("base", "gist", "lens"))
    return _Job(run, config, models, params, found, lengths)


def _evaluate_suite(job: _Job, arguments: Arguments, output: _Output, console: Console) -> list[Row]:
    """Measures one run on the suite, and writes its table and picture."""
    assert isinstance(job.data, Suite)
    started = time.perf_counter()
    rows = suites.evaluate(job.data, job.models, job.params, job.lengths, draws=arguments.draws, console=console)
    report = {**_origin(job, arguments, started), "left_out": job.data.left_out, "rows": rows}
    title = f"{job.config.data.task}, seed {job.config.seed}"
    devices.in_first(lambda: output.write(rows, report, title=title))
    console.out(f"table, intervals and picture are in {job.folder}/{output.name}.*", highlight=False)
    return rows


def _origin(job: _Job, arguments: Arguments, started: float) -> Row:
    """How rows were measured."""
    return {
        "run": str(job.folder),
        "sequences": arguments.sequences,
        "draws": arguments.draws,
        "focus": asdict(job.config.focus),
        "environment": run_folder.environment(job.config),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _evaluate_run(job: _Job, arguments: Arguments, output: _Output, console: Console) -> list[Row]:
    """Measures one run, and writes its table and picture."""
    started = time.perf_counter()
    rows: list[Row] = []
    details: list[Row] = []
    checks: list[Row] = []
    for ratio, length in job.lengths.items():
        found, foreign, changed = _measure(job, arguments, length, console)
        measured = {**found.policies, FOREIGN: foreign}
        _require_whole(job, ratio, length, measured)
        check = quality.check_focus(job.config, arguments.faithfulness, measured, found, changed, ratio=ratio)
        at_budget = quality.details(job.config, measured, check, ratio=ratio, length=length)
        rows += quality.table(at_budget, with_full=ratio == arguments.budgets[0])
        details, checks = details + at_budget, [*checks, check]
        quality.print_table(console, job.config, at_budget, ratio=ratio, length=length)
        quality.print_check(console, check)
    report = {
        **_origin(job, arguments, started),
        "split": arguments.split,
        "window": job.config.context.window,
        "window_in_training": config_file.load(run_folder.config_path(job.folder), Config).context.window,
        "oracle_rounds": arguments.oracle_rounds,
        "rows": details,
        "anti_theater": checks,
    }
    title = f"{job.config.data.task}, seed {job.config.seed}"
    devices.in_first(lambda: output.write(rows, report, title=title))
    console.out(f"table, intervals and picture are in {job.folder}/{arguments.name}.*", highlight=False)
    return rows


def _measure(job: _Job, arguments: Arguments, length: int, console: Console) -> tuple[Comparison, Measured, np.ndarray]:
    """All policies at one length, and LensNet's focus beside another sequence's; arrays [sequences].

    Each device, of whatever process, measures whole batches by itself; all processes get all that was measured.
    """
    recipe, models, mesh = job.config.recipe, job.models, devices.make_mesh({})
    measure = dealing.on_each(compiled_measure(recipe, models, length, arguments.draws, arguments.oracle_rounds), mesh)
    measure_foreign = dealing.on_each(_compiled_foreign(recipe, models, length), mesh)
    key = jax.random.fold_in(jax.random.key(EVALUATION_SEED), length)
    assert not isinstance(job.data, Suite)
    rows = [
        (
            (batch["tokens"], batch.get("answers")),
            jax.random.split(jax.random.fold_in(key, place), arguments.batch_size),
        )
        for place, batch in enumerate(job.data)
    ]

    def both(dealt: Any, params: dict[str, Params]) -> tuple[Comparison, Measured, Array]:
        sequences, streams = dealt
        found = measure((*sequences, streams), params)
        return (found, *measure_foreign((*sequences, found), params))

    measured: tuple[Comparison, Measured, np.ndarray] = dealing.over_batches(
        both, rows, job.params, mesh=mesh, console=console, title=f"{length} entries"
    )
    return measured


@functools.cache
def compiled_measure(recipe: Recipe, models: Models, length: int, draws: int, rounds: int) -> Callable[..., Comparison]:
    """`compare.measure` of a batch; compiled once for equal arguments.

    Args:
      recipe: shapes, and how the allocator acts.
      models: the models.
      length: entries of every context.
      draws: contexts of each random policy.
      rounds: of the greedy search for the oracle.

    Returns:
      A function of parameters, tokens int32[B, T], answers int32[B, A] or None, and keys [B].
    """

    def one(params: dict[str, Params], tokens: Array, answers: Array | None, key: Array) -> Comparison:
        return compare.measure(
            models, params, tokens, answers, key, length=length, draws=draws, oracle_rounds=rounds, recipe=recipe
        )

    # One sequence after the other: each has its dozens of contexts to fill the machine with.
    return may_be_nan(jax.jit(lambda params, *batch: jax.lax.map(lambda row: one(params, *row), batch)))


@functools.cache
def _compiled_foreign(recipe: Recipe, models: Models, length: int) -> Callable[..., tuple[Measured, Array]]:
    """`compare.measure_foreign` of a batch, each sequence with the focus on the one before it."""

    def all_rows(
        params: dict[str, Params], tokens: Array, answers: Array | None, found: Comparison
    ) -> tuple[Measured, Array]:
        measure = functools.partial(compare.measure_foreign, models, params, length=length, recipe=recipe)
        foreign = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), found.focus)
        return jax.lax.map(lambda row: measure(*row), (tokens, answers, found, foreign))

    return may_be_nan(jax.jit(all_rows))


def _require_whole(job: _Job, ratio: int, length: int, measured: dict[str, Measured]) -> None:
    """Every policy kept to the budget, and the model has a loss for it."""
    for name, one in measured.items():
        entries = job.config.context.history if name == FULL else length
        if not (one.entries == entries).all():
            raise ValueError(
                f"{name} made contexts of {one.entries.min()} to {one.entries.max()} entries, not {entries}"
            )
        if not np.isfinite(one.nll).all():
            raise FloatingPointError(f"the loss of {name} at {ratio}x is not finite: {job.folder} holds a broken model")


if __name__ == "__main__":
    main()
