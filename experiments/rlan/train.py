"""Meta-trains a grid model whose weights a hypernetwork adapts to each task, and measures it on held-out rules.

    python experiments/rlan/train.py --output-dir runs/rlan/0
    python experiments/rlan/train.py rlan_stable --seed 1 --output-dir runs/rlan/published-1
    python experiments/rlan/train.py --resume runs/rlan/0

The first argument names a preset of `lensjax.hyperlora`; flags change single fields. Everything that a run makes is in
its own folder.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from experiments import command
from experiments.rlan import grids, meta, pictures, rules
from experiments.rlan.config import RlanConfig
from experiments.rlan.meta import Batch, MetaState, RlanModels
from experiments.rlan.model import zeroed
from lensjax import data, devices, evaluation, loop
from lensjax.hyperlora import PRESETS
from lensjax.models import Params

PHASE = "meta"
EVALUATION_SEED = 2026
HEADLINE = ("nll", "exact", "exact_copy", "loo_accuracy", "lora_diversity")
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
    return RlanConfig(hyperlora=PRESETS[name])


def run(config: RlanConfig, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """One whole run; returns what `summary.json` holds."""
    started = time.perf_counter()
    console = console or Console(quiet=not devices.is_first())
    models, mesh = meta.build_models(config), devices.make_mesh({"batch_size": config.batch_size})
    share = (jax.process_index(), jax.process_count())
    training = data.iterate(
        rules.dataset(config.rules, "train", seed=config.seed), batch_size=config.batch_size, share=share
    )
    measure = evaluator(config, models, mesh)
    with command.open_run(config, (PHASE,), resume=resume, console=console) as (folder, logger):
        phase = loop.Phase(
            name=PHASE,
            steps=config.steps,
            batch_size=config.batch_size,
            step=functools.partial(meta.meta_step, config=config, models=models),
            evaluate=lambda state: measure(state, "validation"),
            headline=HEADLINE,
            monitor="nll",
        )
        state = meta.init_state(jax.random.key(config.seed), config=config, models=models)
        state, seconds = loop.run_phase(
            phase, state, training, run_dir=folder, config=config, mesh=mesh, logger=logger, console=console
        )
        report = measure(state, "test")
    params = devices.to_host(state.params)
    summary = {"split": "test", "seed": config.seed, "steps": int(state.step), "training_seconds": round(seconds, 1)}
    summary |= report | votes(config, models, params, "test")
    summary["seconds"] = round(time.perf_counter() - started, 1)
    devices.in_first(lambda: _write_results(folder, summary, shown_tasks(config, models, params)))
    for name, value in summary.items():
        console.out(f"  {name:<32}{value:>9.3f}" if isinstance(value, float) else f"  {name:<32}{value:>9}")
    return summary


def evaluator(
    config: RlanConfig, models: RlanModels, mesh: Mesh
) -> Callable[[MetaState, rules.Split], dict[str, float]]:
    """Held-out metrics of a state, always on the same tasks of a split; compiled once for all splits."""
    step = jax.jit(functools.partial(meta.eval_step, models=models))
    share = (jax.process_index(), jax.process_count())

    @functools.cache
    def batches(split: rules.Split) -> list[Batch]:
        tasks = rules.dataset(config.rules, split, seed=EVALUATION_SEED)
        rows = data.iterate(tasks, batch_size=config.batch_size, share=share)
        return [
            {name: devices.share_out(array, mesh) for name, array in next(rows).items()}
            for _ in range(config.eval_batches)
        ]

    return lambda state, split: evaluation.mean_over_batches(step(state.params, batch) for batch in batches(split))


def votes(config: RlanConfig, models: RlanModels, params: dict[str, Params], split: rules.Split) -> dict[str, float]:
    """Pass@k of all queries of held-out tasks after voting over views, beside what single views score.

    The size of an answer comes from the examples (`grids.output_size`); where no rule gives one, all is wrong.
    """
    permutations = jnp.asarray(grids.colour_permutations(EVALUATION_SEED, config.vote_permutations))
    one = functools.partial(meta.view_predictions, models, permutations=permutations, take_best_step=config.best_step)
    predict = jax.jit(lambda params, *tasks: jax.lax.map(lambda task: one(params, *task), tasks))
    tasks = rules.RuleSource(config.rules, split, EVALUATION_SEED)
    found: list[list[bool]] = []
    singles: list[np.ndarray] = []
    for batch in range(config.vote_batches):
        rows = [tasks[batch * config.batch_size + i] for i in range(config.batch_size)]
        asked = [(row["support"], pair) for row in rows for pair in row["query"] if (pair[0] != grids.PADDING).any()]
        sizes = np.asarray([answer_size(support, pair[0]) for support, pair in asked], np.int32)
        support, inputs = np.stack([support for support, _ in asked]), np.stack([pair[0] for _, pair in asked])
        views = np.asarray(predict(params, support, inputs, sizes))
        for predicted, (_, pair) in zip(views, asked, strict=True):
            ranked = grids.vote(predicted)
            found.append([grids.passes(ranked, pair[1], tries) for tries in TRIES])
            singles.append((predicted == pair[1]).all(axis=(1, 2)))
    passed = np.mean(found, axis=0)
    return {
        "exact_first_view": float(np.mean(singles, axis=0)[0]),
        "exact_mean_view": float(np.mean(singles)),
        **{f"pass@{tries}": float(share) for tries, share in zip(TRIES, passed, strict=True)},
    }


def shown_tasks(config: RlanConfig, models: RlanModels, params: dict[str, Params]) -> list[dict[str, np.ndarray]]:
    """A few test tasks, answered with their deltas, without any, and with those of the next task."""
    tasks = rules.RuleSource(config.rules, "test", EVALUATION_SEED)
    rows = [tasks[i] for i in range(SHOWN_TASKS)]

    def answered(params: dict[str, Params], support: jax.Array, inputs: jax.Array) -> jax.Array:
        deltas = jax.vmap(lambda task: meta.task_deltas(models, params, task))(support)
        arms = (deltas, zeroed(deltas), jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), deltas))
        solve = jax.vmap(lambda delta, grid: jnp.argmax(meta.answers(models, params, delta, grid), axis=-1))
        return jnp.stack([solve(arm, inputs) for arm in arms], axis=1)

    support, inputs = np.stack([row["support"] for row in rows]), np.stack([row["query"][0, 0] for row in rows])
    found = np.asarray(jax.jit(answered)(params, support, inputs))
    return [
        {"support": row["support"], "query": row["query"][0]}
        | {
            name: np.where(_content(row["support"], row["query"][0, 0]), grid, grids.PADDING)
            for name, grid in zip(("HyperLoRA", "no deltas", "foreign"), answers, strict=True)
        }
        for row, answers in zip(rows, found, strict=True)
    ]


def _content(support: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return np.asarray(grids.inside(np.asarray(answer_size(support, grid), np.int32), len(grid)))


def _write_results(folder: Path, summary: dict[str, Any], tasks: list[dict[str, np.ndarray]]) -> None:
    pictures.predictions(tasks, folder / "predictions.png", title="Held-out rules, last step, one view")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def answer_size(support: np.ndarray, grid: np.ndarray) -> grids.Size:
    """The size of an answer by the rule, or 0 x 0, which no answer has, where no rule fits."""
    pairs = [tuple(map(grids.size_of, pair)) for pair in support if (pair[0] != grids.PADDING).any()]
    return grids.output_size([(source, target) for source, target in pairs], grids.size_of(grid)) or (0, 0)


if __name__ == "__main__":
    main()
