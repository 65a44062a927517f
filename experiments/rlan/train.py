"""Meta-trains a grid model whose weights a hypernetwork adapts to each task, and measures it on held-out tasks.

    python -m experiments.rlan.train --output-dir runs/rlan/0
    python -m experiments.rlan.train rlan_stable --seed 1 --output-dir runs/rlan/published-1
    python -m experiments.rlan.train objects --output-dir runs/rlan/objects-0
    python -m experiments.rlan.train arc --output-dir runs/rlan/arc
    python -m experiments.rlan.train --resume runs/rlan/0

The first argument names a preset of `experiments/rlan/config.py`; flags change single fields. Everything that a run
makes is in its own folder.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from experiments import command
from experiments.rlan import arc, grids, meta, pictures, tasks
from experiments.rlan.config import PRESETS, RlanConfig
from experiments.rlan.meta import Batch, RlanModels
from experiments.rlan.tasks import Task
from lensjax.evaluation import held_out
from lensjax.models import Params, hyperlora
from lensjax.plots import style
from lensjax.runs.data import batches as data
from lensjax.runs.data.splits import Split
from lensjax.runs.engine import devices, loop, memory, numerics
from lensjax.runs.folder import open_run, require_unused
from lensjax.runs.store import paths, run_folder
from lensjax.runs.store.log import RunLogger
from lensjax.training.steps.update import Learner

PHASE = "meta"
STEPS = {PHASE: "steps"}
HEADLINE = ("nll", "exact", "exact_copy", "exact_table", "loo_accuracy", "lora_diversity")
"""Held-out metrics to show while it trains."""
SHOWN_TASKS = 6
TRIES = (1, 2, 3)
"""k of pass@k."""


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    command.execute(arguments, parse, run)


def parse(words: list[str]) -> tuple[RlanConfig, bool]:
    """Reads the command line: a config, and whether it is that of a run to go on with."""
    return command.parse(words, RlanConfig(), load_preset=load_preset, description=__doc__)


def load_preset(name: str) -> RlanConfig:
    """The config of a name."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]


@numerics.fixed()
def run(config: RlanConfig, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """One whole run; returns what `summary.json` holds."""
    started = time.perf_counter()
    console = console or Console(quiet=not devices.is_first())
    config = paths.resolved(config)
    if resume:
        require_unused(config.output_dir)
    models, mesh = meta.build_models(config), devices.make_mesh({"batch_size": config.batch_size})
    _require_room(config, models, mesh)
    share = (jax.process_index(), jax.process_count())
    training = data.iterate(tasks.training(config), batch_size=config.batch_size, share=share)
    measure = evaluator(config, models, mesh)
    test = tasks.held_out(config, "test", count=config.vote_batches * config.batch_size)
    digest = tasks.digest(config)
    with open_run(config, STEPS, resume=resume, console=console, data=digest) as (folder, logger, claim):
        phase = loop.Phase(
            name=PHASE,
            steps=config.steps,
            batch_size=config.batch_size,
            step=lambda state, batch, _: meta.meta_step(state, batch, config=config, models=models),
            evaluate=lambda state: measure(state, "validation"),
            headline=HEADLINE,
            monitor="nll",
        )
        state = meta.init_state(jax.random.key(config.seed), config=config, models=models)
        state, seconds = loop.run_phase(
            phase,
            state,
            training,
            frozen={},
            run_dir=folder,
            config=config,
            mesh=mesh,
            logger=logger,
            console=console,
            claim=claim,
        )
        report = measure(state, "test") | by_family(config, functools.partial(measure, state))
        params = devices.to_host(state.params)
        summary = {"split": "test", "seed": config.seed, "steps": int(state.step)}
        summary |= {"training_seconds": round(seconds, 1)} | report | votes(config, models, params, test)
        if config.tasks == "arc":
            summary |= over_all(summary, arc.coverage(config.arc))
        summary["seconds"] = round(time.perf_counter() - started, 1)
        claim.require()
        devices.in_first(lambda: run_folder.write_summary(folder, summary))
        devices.in_first(lambda: _draw(folder, shown_tasks(models, params, test[:SHOWN_TASKS]), logger))
    for name, value in summary.items():
        console.out(f"  {name:<32}{value:>9.3f}" if isinstance(value, float) else f"  {name:<32}{value:>9}")
    return summary


def _require_room(config: RlanConfig, models: RlanModels, mesh: Mesh) -> None:
    """Checks that memory holds the run, before anything is read or written."""
    shapes = {name: (config.batch_size, *shape) for name, shape in config.example_shapes.items()}
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    start = functools.partial(meta.init_state, config=config, models=models)
    state = jax.eval_shape(start, jax.random.key(0))
    step = functools.partial(meta.meta_step, config=config, models=models)
    memory.require_room(
        state,
        batch,
        {},
        phase=PHASE,
        activations=functools.partial(memory.largest_product, step, state, batch),
        held_out=2 * config.eval_batches * memory.size(batch) if config.tasks == "rules" else 0,
        devices=mesh.size,
        split=config.shard_parameters,
        advice=f"grid.dim, hyperlora.rank, batch_size, eval_batches or the sizes of {config.tasks}",
    )


def evaluator(config: RlanConfig, models: RlanModels, mesh: Mesh) -> Callable[[Learner, str], dict[str, float]]:
    """Held-out metrics of a state, always on the same tasks of a split, or of one family's test rules, by its name.

    Compiled once for each shape of a batch. All devices measure all tasks, of which there may be any number.
    """
    step = jax.jit(functools.partial(meta.eval_step, models=models))

    def batches(config: RlanConfig, split: Split) -> list[Batch]:
        rows = tasks.held_out(config, split, count=config.eval_batches * config.batch_size)
        size = len(rows) if config.tasks == "arc" else config.batch_size
        stacked = (tasks.stacked(rows[i : i + size]) for i in range(0, len(rows), size))
        return [devices.place(jax.tree.map(jnp.asarray, batch), mesh, split=False) for batch in stacked]

    splits = {"validation": batches(config, "validation"), "test": batches(config, "test")}
    for family in config.balanced_families:
        splits[family] = batches(replace(config, rules=replace(config.rules, families=(family,))), "test")
    return lambda state, name: held_out.mean_over_batches(step(state.params, batch) for batch in splits[name])


def by_family(config: RlanConfig, measure: Callable[[str], dict[str, float]]) -> dict[str, float]:
    """The scores of each family's test rules as `family/score`; foreign deltas are those of the same family."""
    return {
        f"{family}/{name}": value
        for family in config.balanced_families
        for name, value in measure(family).items()
        if name.startswith(("exact", "pixel"))
    }


def votes(config: RlanConfig, models: RlanModels, params: dict[str, Params], held_out: list[Task]) -> dict[str, float]:
    """Pass@k of all queries of held-out tasks after voting over views, beside what single views score.

    Each is the mean over the tasks of that over their queries. The size of an answer comes from the examples; where no
    rule gives one, all is wrong.
    """
    permutations = jnp.asarray(grids.colour_permutations(tasks.EVALUATION_SEED, config.vote_permutations))
    one = functools.partial(meta.view_predictions, models, permutations=permutations, take_best_step=config.best_step)
    queries = [
        (i, task["support"], pair, size)
        for i, task in enumerate(held_out)
        for pair, size in zip(task["query"], task["size"], strict=True)
        if (pair[0] != grids.PADDING).any()
    ]
    owners, support, pairs, sizes = (np.stack(column) for column in zip(*queries, strict=True))
    predict = jax.jit(lambda params, *queries: jax.lax.map(lambda query: one(params, *query), queries))
    views, answers = np.asarray(predict(params, support, pairs[:, 0], sizes)), pairs[:, 1]
    singles = (views == answers[:, None]).all(axis=(2, 3))
    scores = {"exact_first_view": singles[:, 0], "exact_mean_view": singles.mean(axis=1)}
    voted = list(zip(map(grids.vote, views), answers, strict=True))
    for tries in TRIES:
        scores[f"pass@{tries}"] = np.asarray([grids.passes(ranked, answer, tries) for ranked, answer in voted])
    counts = np.bincount(owners)
    return {name: float(np.mean(np.bincount(owners, weights=values) / counts)) for name, values in scores.items()}


def over_all(summary: dict[str, Any], coverage: dict[str, int | float]) -> dict[str, int | float]:
    """What a summary of the tasks that fit says of all: those which do not are not solved."""
    share = coverage["tasks_that_fit"] / coverage["tasks"]
    scores = (
        "exact",
        "exact_zeroed",
        "exact_foreign",
        "exact_copy",
        "exact_table",
        *(f"pass@{tries}" for tries in TRIES),
    )
    return coverage | {f"{name}_of_all": share * summary[name] for name in scores}


def shown_tasks(models: RlanModels, params: dict[str, Params], rows: list[Task]) -> list[dict[str, np.ndarray]]:
    """A few tasks, the first input of each answered with their deltas, without any, and with those of the next task."""

    def answered(params: dict[str, Params], support: jax.Array, inputs: jax.Array) -> jax.Array:
        deltas = jax.vmap(lambda task: meta.task_deltas(models, params, task))(support)
        arms = (deltas, hyperlora.zeroed(deltas), jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), deltas))
        solve = jax.vmap(lambda delta, grid: jnp.argmax(meta.answers(models, params, delta, grid), axis=-1))
        return jnp.stack([solve(arm, inputs) for arm in arms], axis=1)

    batch = tasks.stacked(rows)
    predicted = np.asarray(jax.jit(answered)(params, batch["support"], batch["query"][:, 0, 0]))
    where = np.asarray([grids.inside(row["size"][0], predicted.shape[-1]) for row in rows])
    return [
        {"support": row["support"], "query": row["query"][0]}
        | {
            name: np.where(content, grid, grids.PADDING)
            for name, grid in zip(("HyperLoRA", "no deltas", "foreign"), answers, strict=True)
        }
        for row, content, answers in zip(rows, where, predicted, strict=True)
    ]


def _draw(folder: Path, shown: list[dict[str, np.ndarray]], logger: RunLogger) -> None:
    with style.attempt(folder / "predictions.png") as path:
        pictures.predictions(shown, path, title="Held-out tasks, last step, one view")
        logger.show(path)


if __name__ == "__main__":
    main()
