"""What LensNet learns from: preferences, a teacher, or both, by what it sees and where it starts.

    python -m experiments.studies.signals --base-run runs/demo-base --output-dir runs/signals

Every cell of {preferences, distilled, both} x {entries, map, map and states, map and attention} x {uniform, recency}
trains as many steps of as many sequences on one base model, all windows fresh. A step of preferences reads N + 1
contexts and the horizon for each sequence, one of the teacher a window twice and a short one: `rollouts` makes both
nearly as many tokens, and the table says how many. Of the learning rates each cell takes the one that is best on
validation for its first seed, and all seeds are then measured on the test split. Writes `signals.csv`, a row a cell and
seed, and prints the table.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table

from experiments import command
from experiments.tables import write_csv
from experiments.train import load_preset
from lensjax import _settings
from lensjax._numerics import may_be_nan
from lensjax._settings import BatchSize, Bound, Positive, PositiveInt, Seed, Variants, settings
from lensjax.evaluation import compare, rivals
from lensjax.evaluation.statistics import estimate
from lensjax.models import Models, Params
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.fit import EVALUATION_SEED, LENS_STREAM, stream
from lensjax.runs.load import load_start
from lensjax.training.steps import distill, preference
from lensjax.training.steps.train_state import init_train_state

Method = Literal["preferences", "distilled", "both"]
View = Literal["entries", "map", "map and states", "map and attention"]
Start = Literal["uniform", "recency"]
METHODS: tuple[Method, ...] = ("preferences", "distilled", "both")
VIEWS: dict[View, dict[str, Any]] = {
    "entries": {"lens.map": False, "lens.reads": "nothing"},
    "map": {"lens.reads": "nothing"},
    "map and states": {"lens.reads": "states"},
    "map and attention": {"lens.reads": "attention"},
}
STARTS: dict[Start, dict[str, Any]] = {
    "uniform": {"focus.start": "uniform", "lens.recency": False},
    "recency": {"focus.start": "recency", "lens.recency": True},
}
Batches = Iterator[dict[str, np.ndarray]]
Row = dict[str, Any]


@settings()
class Arguments:
    """The grid."""

    base_run: str
    """Run whose base model all cells share."""
    output_dir: Path = Path("runs/signals")
    preset: str = "demo"
    steps: PositiveInt = 50
    """Training steps of every cell; `both` takes half of them for each stage."""
    batch_size: BatchSize = 8
    rollouts: Variants = 6
    seeds: tuple[Seed, ...] = (0, 1, 2)
    learning_rates: tuple[Positive, ...] = (1e-3, 3e-3)
    sequences: Annotated[int, Bound(1, 2**20)] = 256
    """Held-out windows, on each of validation and test."""
    views: tuple[View, ...] = ("entries", "map", "map and states", "map and attention")
    starts: tuple[Start, ...] = ("uniform", "recency")


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(run, Arguments, words, description=__doc__)


def run(arguments: Arguments) -> list[Row]:
    """The whole grid; returns the rows of `signals.csv`."""
    console, rows = Console(), list[Row]()
    command.check_free(arguments.output_dir, resume=False)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for view, start, method in itertools.product(arguments.views, arguments.starts, METHODS):
        began = time.perf_counter()
        cell = {"signal": method, "view": view, "start": start}
        rows += [cell | row for row in run_cell(arguments, method, VIEWS[view] | STARTS[start])]
        write_csv(rows, arguments.output_dir / "signals.csv")
        console.out(f"{method}, {view}, {start}: {time.perf_counter() - began:.0f} s", highlight=False)
    print_table(console, rows)
    return rows


def run_cell(arguments: Arguments, method: Method, changes: Row) -> list[Row]:
    """One cell: all seeds at all rates, and the test split at the best rate; a row a seed."""
    config = cell_config(arguments, method, changes)
    models = config.build_models()
    base = load_start(config, models)
    assert base is not None  # a run is named
    measure = measurer(config, models)
    held_out = {split: fixed(config, arguments, split) for split in ("validation", "test")}
    first, *others = arguments.seeds

    def trained(seed: int, rate: float) -> Params:
        return train(replace(config, seed=seed), models, base, rate=rate)

    tried = {rate: trained(first, rate) for rate in arguments.learning_rates}
    found = {
        rate: float(measure({**base, "lens": lens}, held_out["validation"])["lensnet"].mean())
        for rate, lens in tried.items()
    }
    best = min(found, key=lambda rate: found[rate])
    lenses = {first: tried[best]} | {seed: trained(seed, best) for seed in others}
    rows = []
    for seed in arguments.seeds:
        losses = measure({**base, "lens": lenses[seed]}, held_out["test"])
        difference = estimate(losses["lensnet"] - losses["recency"])
        low, high = difference.interval
        rows.append(
            {"reads": rivals.lens_rows(config.lens, config.geometry, config.budget)}
            | {"seed": seed, "learning_rate": best, "steps": arguments.steps, "sequences": arguments.sequences}
            | {"tokens_preferences": tokens_read(config)[0], "tokens_distilled": tokens_read(config)[1]}
            | {"nll": float(losses["lensnet"].mean()), "nll_recency": float(losses["recency"].mean())}
            | {"minus_recency": difference.mean, "minus_recency_low": low, "minus_recency_high": high}
            | {"hit_rate": float(np.mean(losses["hit"])), "validation_nll": found[best]}
        )
    return rows


def cell_config(arguments: Arguments, method: Method, changes: Row) -> Config:
    """The preset with what the cell changes."""
    steps, half = arguments.steps, arguments.steps // 2
    stages = {"preferences": (0, steps), "distilled": (steps, 0), "both": (half, steps - half)}
    distilled, preferred = stages[method]
    shared = {"base_run": arguments.base_run, "batch_size": arguments.batch_size, "steps": preferred}
    shared |= {"distill.steps": distilled, "context.rollouts": arguments.rollouts}
    return _settings.replace(load_preset(arguments.preset), **(shared | changes))


def tokens_read(config: Config) -> tuple[int, int]:
    """Tokens that the base model reads a sequence and step, for preferences and for the teacher."""
    behind = config.context.horizon - 1
    return (
        (config.context.rollouts + 1) * (config.budget + behind),
        2 * (config.context.history + behind) + config.short + behind,
    )


def train(config: Config, models: Models, base: dict[str, Params], *, rate: float) -> Params:
    """LensNet after both stages of a config, each of which may be empty."""
    settings, recipe = replace(config.distill, learning_rate=rate), config.recipe
    key, batches = stream(config, LENS_STREAM), _batches(config)
    started = replace(recipe, hyper=replace(recipe.hyper, learning_rate=rate))
    state, frozen = init_train_state(key, recipe=started, models=models, params=base)
    if settings.steps:
        learner, _ = distill.init_distill_state(key, recipe=recipe, params={**frozen, **state.params})
        step = compiled(distill.distill_step, recipe=recipe, settings=settings, models=models)
        for _ in range(settings.steps):
            learner, _ = step(learner, next(batches), frozen)
        state = replace(state, params=learner.params)
    for _ in range(config.steps):
        state, _ = compiled(preference.train_step, recipe=recipe, models=models)(state, next(batches), frozen)
    return jax.tree.map(np.asarray, state.params["lens"])


@functools.cache
def compiled(step: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """A training step, compiled once for all seeds, and where the rate is data for all rates."""
    return may_be_nan(jax.jit(functools.partial(step, **static), donate_argnums=0))


def _batches(config: Config) -> Batches:
    seed = 2 * config.seed + LENS_STREAM
    return data.make_iterator(config, "train", seed=seed, batch_size=config.batch_size)


def fixed(config: Config, arguments: Arguments, split: Any) -> list[dict[str, np.ndarray]]:
    """The held-out windows, the same for all cells."""
    count = arguments.sequences // arguments.batch_size
    return data.fixed_batches(config, split, batch_size=arguments.batch_size, count=count, seed=EVALUATION_SEED)


def measurer(config: Config, models: Models) -> Callable[..., dict[str, np.ndarray]]:
    """A function of parameters and batches: losses of LensNet's picks and of recency, and hits; [sequences] each."""
    key = jax.random.key(EVALUATION_SEED)

    @may_be_nan
    @jax.jit
    def one_batch(params: dict[str, Params], batch: dict[str, Array]) -> dict[str, Array]:
        def one(tokens: Array, answers: Array | None) -> dict[str, Array]:
            return compare.measure_pick(models, params, tokens, answers, key, recipe=config.recipe)

        return jax.vmap(one)(batch["tokens"], batch.get("answers"))

    def all_batches(params: dict[str, Params], batches: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        reports = [jax.device_get(one_batch(params, batch)) for batch in batches]
        return {name: np.concatenate([report[name] for report in reports]) for name in reports[0]}

    return all_batches


def print_table(console: Console, rows: list[Row]) -> None:
    """Mean and range over seeds of LensNet minus recency, cell by cell."""
    table = Table(title="LensNet minus recency, nats per token on the test split, mean (range) over seeds")
    for title in ("view", "start", *METHODS):
        table.add_column(title)
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        cells.setdefault((row["view"], row["start"]), {}).setdefault(row["signal"], []).append(row["minus_recency"])
    for (view, start), by_signal in cells.items():
        texts = [
            f"{np.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"
            for values in (by_signal.get(method, [np.nan]) for method in METHODS)
        ]
        table.add_row(view, start, *texts)
    console.print(table)


if __name__ == "__main__":
    main()
