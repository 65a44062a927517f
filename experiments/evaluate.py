"""Quality at a fixed budget: every policy on the same held-out sequences, at exactly the same number of entries.

    python -m experiments.evaluate runs/recall-long
    python -m experiments.evaluate runs/a runs/b runs/c --merged runs/three-seeds

Leaves `evaluation.csv`, `evaluation.json` and `evaluation.png` in each run's folder: one row a policy and budget. With
several runs, `--merged` also writes all of their rows into one table and one picture.

The row of LensNet's last step also says whether its focus is theatre (`lensjax.evaluation.faithfulness`): how far its entries are from
those of recency, what is lost without it or with another sequence's, whether its scores tell good rollouts from bad.
"""

import csv
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from rich.console import Console
from rich.progress import Progress

from experiments import command
from experiments.train import EVALUATION_SEED, load_params
from lensjax.evaluation import compare, faithfulness, rivals
from lensjax.evaluation.compare import FOREIGN, FULL, FocusEvidence, Measured
from lensjax.evaluation.faithfulness import Evidence, TheatreConfig
from lensjax.evaluation.statistics import estimate
from lensjax.models import Models, Params, build_models
from lensjax.models.decision import split
from lensjax.plots import curves
from lensjax.runs import config as configs
from lensjax.runs.config import Config, FocusConfig
from lensjax.runs.data import batches as data
from lensjax.runs.store import folder as run_folder

CHECK_COLUMNS = (
    *(f"anti_theater_{one.name}" for one in fields(Evidence)),
    *("anti_theater_all_passed", "changed_edits"),
)
"""Empty in all rows but that of LensNet's last step."""
COLUMNS = (
    *("task", "policy", "information", "budget_ratio", "entries", "seed", "nll", "nll_ci_low", "nll_ci_high"),
    *("gap_closed_oracle", "gap_closed_full", "hit_rate", "swap_rate"),
    *CHECK_COLUMNS,
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; each has its own table."""
    merged: Path | None = None
    """Where the tables of all runs go together, without ending: PATH.csv and PATH.png."""
    name: str = "evaluation"
    """Of the files in the run's folder; those that are there already are not overwritten."""
    budgets: tuple[int, ...] = (2, 4, 8, 16)
    """History over entries: 4 means a quarter of the history, rounded down to a length that some cut has."""
    window: int | None = None
    """Tokens in the windows to measure on; None as in training. They may be longer than those trained on."""
    split: Literal["test", "validation"] = "test"
    """Choose settings on validation, report test."""
    sequences: int = 256
    draws: int = 8
    """Contexts of each random policy, and N of the best of N."""
    oracle_rounds: int = 2
    """Rounds of the greedy search for the oracle."""
    batch_size: int = 8
    """Sequences measured at a time; each is also shown as the focus on the one before it would have it."""
    focus: FocusConfig | None = None
    """How the allocator acts; None as the run's config says."""
    theatre: TheatreConfig = field(default_factory=TheatreConfig)
    """What LensNet's focus must be above, to be no theatre. Ablation and counterfactual are in nats per token: at 0.02,
    2 % of perplexity, they ask for more than nothing, where focus has 0.1 nats (code) or several (recall) to give."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    arguments = tyro.cli(Arguments, args=words, description=__doc__)
    with command.errors_end():
        evaluate(arguments)


def evaluate(arguments: Arguments) -> list[Row]:
    """Measures every run and returns the rows of all tables; everything is checked before the first is measured."""
    if not arguments.runs:
        raise ValueError("name one or more run folders")
    for number in ("sequences", "draws", "batch_size"):
        if getattr(arguments, number) < 1:
            raise ValueError(f"{number} must be at least 1, got {getattr(arguments, number)}")
    if arguments.batch_size < 2:
        raise ValueError("batch_size must be at least 2, for the focus on another sequence of the batch, got 1")
    if arguments.sequences % arguments.batch_size:
        raise ValueError(
            f"sequences must be a multiple of batch_size {arguments.batch_size}, got {arguments.sequences}"
        )
    outputs = [run / f"{arguments.name}{ending}" for run in arguments.runs for ending in (".csv", ".json", ".png")]
    if arguments.merged is not None:
        outputs += [arguments.merged.with_suffix(ending) for ending in (".csv", ".png")]
    if there := [str(path) for path in outputs if path.exists()]:
        raise FileExistsError(f"{there[0]} exists: pass another --name or --merged, or move it away")
    jobs = [_prepare(run, arguments) for run in arguments.runs]
    console, rows = Console(), []
    for job in jobs:
        rows += _evaluate_run(job, arguments, console)
    if arguments.merged is not None:
        arguments.merged.parent.mkdir(parents=True, exist_ok=True)
        write_csv(rows, arguments.merged.with_suffix(".csv"))
        _draw(rows, arguments.merged.with_suffix(".png"))
    return rows


@dataclass(frozen=True)
class _Job:
    """A run, loaded and checked."""

    folder: Path
    config: Config
    models: Models
    params: dict[str, Params]
    batches: list[dict[str, np.ndarray]]
    lengths: dict[int, int]
    """Entries by budget."""


def _prepare(run: Path, arguments: Arguments) -> _Job:
    stored = configs.load(run_folder.config_file(run))
    changes: dict[str, Any] = {} if arguments.window is None else {"context.window": arguments.window}
    changes |= {} if arguments.focus is None else {"focus": arguments.focus}
    config = configs.replace(stored, **changes)
    models, geometry = build_models(config), config.context.geometry
    if any(ratio < 1 for ratio in arguments.budgets) or len(set(arguments.budgets)) < len(arguments.budgets):
        raise ValueError(f"budgets must be different ratios of at least 1, got {arguments.budgets}")
    lengths = {ratio: geometry.length(geometry.window // ratio, name=f"budget {ratio}x") for ratio in arguments.budgets}
    count = arguments.sequences // arguments.batch_size
    batches = data.fixed_batches(
        config, arguments.split, batch_size=arguments.batch_size, count=count, seed=EVALUATION_SEED
    )
    return _Job(run, config, models, load_params(run, models, ("base", "gist", "lens")), batches, lengths)


def _evaluate_run(job: _Job, arguments: Arguments, console: Console) -> list[Row]:
    """Measures one run, and writes its table and picture."""
    started = time.perf_counter()
    full = _measure_all(job, arguments, None, console)
    rows: list[Row] = []
    details: list[Row] = []
    checks: list[Row] = []
    for ratio, length in job.lengths.items():
        found = _measure_all(job, arguments, length, console)
        evidence = _measure_focus(job, arguments, length, console)
        found |= full | {FOREIGN: evidence.foreign}
        _require_whole(job, ratio, length, found)
        check = _check(job, arguments, ratio, found, evidence)
        found_rows, found_details = _rows(job, arguments, ratio, length, found, check)
        rows, details, checks = rows + found_rows, details + found_details, [*checks, check]
        _print_table(console, job, ratio, length, found_details)
        _print_check(console, check)
    report = {
        "run": str(job.folder),
        "split": arguments.split,
        "window": job.config.context.window,
        "window_in_training": configs.load(run_folder.config_file(job.folder)).context.window,
        "sequences": arguments.sequences,
        "draws": arguments.draws,
        "oracle_rounds": arguments.oracle_rounds,
        "focus": asdict(job.config.focus),
        "environment": run_folder.environment(job.config),
        "seconds": round(time.perf_counter() - started, 1),
        "rows": details,
        "anti_theater": checks,
    }
    write_csv(rows, job.folder / f"{arguments.name}.csv")
    (job.folder / f"{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    _draw(rows, job.folder / f"{arguments.name}.png", title=str(job.folder))
    console.out(f"table, intervals and picture are in {job.folder}/{arguments.name}.*", highlight=False)
    return rows


def _measure_all(job: _Job, arguments: Arguments, length: int | None, console: Console) -> dict[str, Measured]:
    """All policies at one length, or the full context alone; arrays [sequences]."""
    measure = _compiled(_static(job.config), job.models, length, arguments.draws, arguments.oracle_rounds)
    return _over_batches(job, measure, length, f"{length or 'full'} entries", console)


def _measure_focus(job: _Job, arguments: Arguments, length: int, console: Console) -> FocusEvidence:
    """LensNet's focus at one length beside another sequence's; arrays [sequences]."""
    measure = _compiled_focus(_static(job.config), job.models, length, arguments.draws)
    return _over_batches(job, measure, length, f"{length} entries, another's focus", console)


def _static(config: Config) -> Config:
    """Runs that differ in nothing that is compiled share one program."""
    return replace(config, output_dir="-", seed=0, base_run=None, init=None)


def _over_batches(job: _Job, measure: Callable[..., Any], length: int | None, title: str, console: Console) -> Any:
    key = jax.random.fold_in(jax.random.key(EVALUATION_SEED), length or 0)
    found = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for index, batch in enumerate(progress.track(job.batches, description=title)):
            keys = jax.random.split(jax.random.fold_in(key, index), len(batch["tokens"]))
            found.append(jax.device_get(measure(job.params, batch["tokens"], batch.get("answers"), keys)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


@functools.cache
def _compiled(config: Config, models: Models, length: int | None, draws: int, rounds: int) -> Callable[..., Any]:
    def one(params: dict[str, Params], tokens: Array, answers: Array | None, key: Array) -> dict[str, Measured]:
        if length is None:
            return {FULL: compare.measure_full(models, params, tokens, answers, config=config)}
        return compare.measure(
            models, params, tokens, answers, key, length=length, draws=draws, oracle_rounds=rounds, config=config
        )

    # One sequence after the other: each has its dozens of contexts to fill the machine with.
    return jax.jit(lambda params, *batch: jax.lax.map(lambda row: one(params, *row), batch))


@functools.cache
def _compiled_focus(config: Config, models: Models, length: int, draws: int) -> Callable[..., FocusEvidence]:
    def all_rows(params: dict[str, Params], tokens: Array, answers: Array | None, keys: Array) -> FocusEvidence:
        focused = functools.partial(compare.focused, models, params, length=length, config=config)
        histories = split(tokens, horizon=config.context.horizon).history
        measure = functools.partial(compare.measure_focus, models, params, length=length, draws=draws, config=config)
        own = jax.lax.map(lambda row: focused(*row), (histories, keys))
        foreign = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), own)
        return jax.lax.map(lambda row: measure(*row), (tokens, answers, keys, own, foreign))

    return jax.jit(all_rows)


def _require_whole(job: _Job, ratio: int, length: int, found: dict[str, Measured]) -> None:
    """Every policy kept to the budget, and the model has a loss for it."""
    for name, one in found.items():
        entries = job.config.context.history if name == FULL else length
        if not (one.entries == entries).all():
            raise ValueError(
                f"{name} made contexts of {one.entries.min()} to {one.entries.max()} entries, not {entries}"
            )
        if not np.isfinite(one.nll).all():
            raise FloatingPointError(f"the loss of {name} at {ratio}x is not finite: {job.folder} holds a broken model")


def _check(job: _Job, arguments: Arguments, ratio: int, found: dict[str, Measured], evidence: FocusEvidence) -> Row:
    """The check against theatre at one budget, with intervals and what passed."""
    name = f"lensnet_{job.config.focus.steps}"
    own, recency, foreign = (np.asarray(found[one].nll) for one in (name, "recency", FOREIGN))
    divergences, correlations = np.asarray(evidence.divergence), np.asarray(evidence.correlation)
    correlations = correlations[~np.isnan(correlations)]
    measured = Evidence(
        divergence=jnp.mean(divergences),
        ablation=faithfulness.gain(-own, -recency),
        # Undefined only where no sequence has one.
        correlation=jnp.mean(correlations) if correlations.size else jnp.full((), jnp.nan),
        counterfactual=faithfulness.gain(-own, -foreign),
    )
    intervals = {
        "divergence": estimate(divergences).interval,
        "ablation": estimate(recency - own).interval,
        "correlation": estimate(correlations).interval if correlations.size > 1 else None,
        "counterfactual": estimate(foreign - own).interval,
    }
    values = faithfulness.metrics(measured, arguments.theatre, prefix="")
    return {
        "policy": name,
        "budget_ratio": ratio,
        **{name: _number(float(value)) for name, value in values.items()},
        "changed_edits": float(evidence.changed_edits.mean()),
        "correlation_defined_share": correlations.size / own.size,
        "intervals": intervals,
        "thresholds": asdict(arguments.theatre),
        "passed": {name: bool(value) for name, value in faithfulness.passed(measured, arguments.theatre).items()},
    }


def _rows(
    job: _Job, arguments: Arguments, ratio: int, length: int, found: dict[str, Measured], check: Row
) -> tuple[list[Row], list[Row]]:
    """Rows of the table at one budget, and the same with all intervals."""
    mean = {name: float(one.nll.mean()) for name, one in found.items()}
    rows: list[Row] = []
    details: list[Row] = []
    for name in sorted(found, key=rivals.order):
        one = found[name]
        entries = job.config.context.history if name == FULL else length
        losses = np.asarray(one.nll)
        low, high = estimate(losses).interval
        row = {
            "task": job.config.data.task,
            "policy": name,
            "information": rivals.information(name),
            "budget_ratio": 1 if name == FULL else ratio,
            "entries": entries,
            "seed": job.config.seed,
            "nll": mean[name],
            "nll_ci_low": low,
            "nll_ci_high": high,
            "gap_closed_oracle": compare.gap_closed(mean[name], mean["recency"], mean["oracle"]),
            "gap_closed_full": compare.gap_closed(mean[name], mean["recency"], mean[FULL]),
            "hit_rate": float(one.hit.mean()),
            "swap_rate": float(one.swap_rate.mean()),
        }
        row |= {column: check[column] if name == check["policy"] else None for column in CHECK_COLUMNS}
        detail = {column: _number(value) for column, value in row.items()}
        detail |= {"against_budget": ratio, "residency": _number(float(one.residency.mean()))}
        for other in ("recency", "random", "recent_random", "oracle"):
            difference = estimate(losses - np.asarray(found[other].nll))
            detail[f"minus_{other}"] = [difference.mean, *difference.interval]
        # In the table, what is not defined stays empty; in JSON it is null.
        row = {column: "" if detail[column] is None else detail[column] for column in COLUMNS}
        rows, details = [*rows, row], [*details, detail]
    # The full context is one row of the whole table, however many budgets there are.
    keep_full = ratio == arguments.budgets[0]
    return [row for row in rows if row["policy"] != FULL or keep_full], details


def _draw(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Policies alone: another sequence's focus is a control."""
    curves.quality_at_budget([row for row in rows if row["policy"] != FOREIGN], path, title=title)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes a table; its columns are the keys of the rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def _print_table(console: Console, job: _Job, ratio: int, length: int, rows: Sequence[Row]) -> None:
    """Plain lines, so that a log of any width holds them."""
    history, task = job.config.context.history, job.config.data.task
    console.out(f"\n{task} at {ratio}x, {length} of {history} entries, seed {job.config.seed}", highlight=False)
    heads = ("policy", "nll", "minus recency [95 %]", "minus random [95 %]", "gap", "full", "hit", "swaps", "stay")
    widths = (16, 7, 26, 26, 7, 7, 7, 7, 7)
    lines = [heads]
    for row in rows:
        differences = ("{:+.3f} [{:+.3f}, {:+.3f}]".format(*row[f"minus_{other}"]) for other in ("recency", "random"))
        shares = ("gap_closed_oracle", "gap_closed_full", "hit_rate", "swap_rate", "residency")
        numbers = ("" if row[name] is None else f"{row[name]:.2f}" for name in shares)
        lines.append((row["policy"], f"{row['nll']:.3f}", *differences, *numbers))
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        console.out(line[0].ljust(widths[0]) + "".join(cells), highlight=False)


def _print_check(console: Console, check: Row) -> None:
    """Each measurement, what it must be above, and whether it is."""
    console.out(f"\nanti-theatre of {check['policy']}: {_verdict(check['passed']['all_passed'])}", highlight=False)
    for name, threshold in check["thresholds"].items():
        value, interval = check[f"anti_theater_{name}"], check["intervals"][name]
        measured = "n/a" if value is None else f"{value:.3f}"
        if interval is not None:
            measured += " [{:.3f}, {:.3f}]".format(*interval)
        verdict = _verdict(check["passed"][name])
        console.out(f"{name:<16}{measured:>24}   above {threshold:g}: {verdict}", highlight=False)
    changed = f"{check['changed_edits']:.2f} of the edits are changed by the focus on another sequence"
    console.out(changed, highlight=False)


def _verdict(passed: bool) -> str:
    return "passed" if passed else "failed"


if __name__ == "__main__":
    main()
