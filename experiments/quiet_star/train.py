"""Bakes a small language model on traces, trains its thoughts by REINFORCE, and measures them on held-out questions.

    python experiments/quiet_star/train.py --output-dir runs/quiet_star/0
    python experiments/quiet_star/train.py arithmetic --seed 1 --output-dir runs/quiet_star/arithmetic-1
    python experiments/quiet_star/train.py --resume runs/quiet_star/0
    python experiments/quiet_star/train.py --init runs/quiet_star/0 --rl.shuffle-rewards --output-dir runs/quiet_star/shuffled-0

The first argument names a task; flags change single fields. Everything that a run makes is in its own folder.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from experiments import command
from experiments.quiet_star import bake, measure, pictures, reinforce, tasks
from experiments.quiet_star.bake import Batch
from experiments.quiet_star.config import QuietStarConfig
from experiments.quiet_star.model import ThoughtModel
from lensjax import checkpoint, data, devices, loop, run_folder, stability
from lensjax import config as configs
from lensjax import logging as run_logging
from lensjax.data import Split
from lensjax.models import Params

BAKE, RL = PHASES = ("bake", "rl")
EVALUATION_SEED = 2026
HEADLINE = ("accuracy_without", "accuracy_sampled", "accuracy_greedy", "accuracy_foreign", "rl/anti_theater_all_passed")
"""Held-out metrics to show while it trains."""

Report = Callable[[Params, Split], dict[str, float]]


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    command.execute(arguments, parse, run)


def parse(words: list[str]) -> tuple[QuietStarConfig, bool]:
    """Reads the command line: a config, and whether it is that of a run to go on with."""
    return command.parse(words, QuietStarConfig(), load_preset=load_preset, description=__doc__)


def load_preset(name: str) -> QuietStarConfig:
    """The config of a task."""
    if name not in PRESETS:
        raise ValueError(f"no task {name}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]


PRESETS = {
    "pointer": QuietStarConfig(),
    "arithmetic": QuietStarConfig(task=tasks.TaskConfig("arithmetic")),
}


def build_model(config: QuietStarConfig) -> ThoughtModel:
    """Builds the model of a configuration; call it once, outside `jax.jit`."""
    task = tasks.task_of(config.task)
    return ThoughtModel(config.model, task.vocab_size, task.prompt_length, task.thought_length)


def run(config: QuietStarConfig, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """One whole run; returns what `summary.json` holds."""
    started = time.perf_counter()
    console = console or Console(quiet=not devices.is_first())
    model, mesh = build_model(config), devices.make_mesh({"batch_size": config.batch_size})
    taken = load_baked(config, model)
    bake_key, rl_key = (jax.random.fold_in(jax.random.key(config.seed), i) for i in range(2))
    measured = evaluator(config, model, mesh)
    with command.open_run(config, PHASES, resume=resume, console=console) as (folder, logger):
        surroundings = {"run_dir": folder, "config": config, "mesh": mesh, "logger": logger, "console": console}
        if taken is None:
            phase = loop.Phase(
                name=BAKE,
                steps=config.bake.steps,
                batch_size=config.batch_size,
                step=functools.partial(bake.bake_step, config=config, model=model),
                evaluate=lambda state: measured(state.params["lm"], "validation"),
                headline=HEADLINE,
                monitor="nll_sampled",
            )
            baking = bake.init_state(bake_key, config=config, model=model)
            baking, bake_seconds = loop.run_phase(phase, baking, questions(config, 2 * config.seed), **surroundings)
            taken = baking.params["lm"]
        else:
            bake_seconds = 0.0
        summary = {f"baked_{name}": value for name, value in measured(taken, "test").items()}
        seconds = bake_seconds
        if config.rl.episodes:
            phase = loop.Phase(
                name=RL,
                steps=config.rl.episodes,
                batch_size=config.batch_size,
                step=functools.partial(reinforce.rl_step, config=config, model=model),
                evaluate=lambda state: _judged(state, measured(state.params["lm"], "validation")),
                headline=HEADLINE,
                monitor="rl/missed_reward_100",
            )
            learning = reinforce.init_state(rl_key, config=config, baked=taken)
            learning, rl_seconds = loop.run_phase(
                phase, learning, questions(config, 2 * config.seed + 1), **surroundings
            )
            seconds += rl_seconds
            summary |= measured(learning.params["lm"], "test")
    settings = {
        "task": config.task.name,
        "split": "test",
        "questions": config.batch_size * config.eval_batches,
        "seed": config.seed,
        "shuffle_rewards": config.rl.shuffle_rewards,
        "bake_seconds": round(bake_seconds, 1),
        "training_seconds": round(seconds, 1),
    }
    summary = settings | summary | {"seconds": round(time.perf_counter() - started, 1)}
    devices.in_first(lambda: _write_results(folder, summary))
    for name, value in summary.items():
        console.out(f"  {name:<40}{value:>9.3f}" if isinstance(value, float) else f"  {name:<40}{value!s:>9}")
    return summary


def questions(config: QuietStarConfig, seed: int) -> Any:
    """The training questions of a seed, batch after batch."""
    share = (jax.process_index(), jax.process_count())
    return data.iterate(tasks.dataset(config.task, "train", seed=seed), batch_size=config.batch_size, share=share)


def evaluator(config: QuietStarConfig, model: ThoughtModel, mesh: Mesh) -> Report:
    """Held-out measurements of a model, always on the same questions of a split; compiled once for all splits."""
    step = jax.jit(functools.partial(measure.answer_batch, config=config, model=model))
    share = (jax.process_index(), jax.process_count())
    keys = [jax.random.fold_in(jax.random.key(EVALUATION_SEED), i) for i in range(config.eval_batches)]

    @functools.cache
    def batches(split: Split) -> list[Batch]:
        rows = data.iterate(
            tasks.dataset(config.task, split, seed=EVALUATION_SEED), batch_size=config.batch_size, share=share
        )
        return [
            {name: devices.share_out(array, mesh) for name, array in next(rows).items()}
            for _ in range(config.eval_batches)
        ]

    def measured(params: Params, split: Split) -> dict[str, float]:
        found = [devices.to_host(step(params, batch, key)) for batch, key in zip(batches(split), keys, strict=True)]
        return measure.report(found, config)

    return measured


def load_baked(config: QuietStarConfig, model: ThoughtModel) -> Params | None:
    """The baked model of the run that `config.init` names; None without one.

    Raises:
      FileNotFoundError: there is no run in that folder.
      ValueError: it is of another task or model, or has not baked one yet.
    """
    if config.init is None:
        return None
    folder = Path(config.init)
    stored = configs.load_as(run_folder.config_file(folder), QuietStarConfig)
    for name in ("task", "model"):
        theirs, ours = getattr(stored, name), getattr(config, name)
        if theirs != ours:
            raise ValueError(f"{name} of init {folder} is {theirs}, this run has {ours}: use the same")
    directory = loop.checkpoint_dir(folder, BAKE)
    step = loop.kept_step(directory)
    if step is None:
        raise ValueError(f"{folder} has no checkpoint of a baked model: let it finish its baking first")
    like = jax.eval_shape(model.init, jax.random.key(0))
    return checkpoint.restore_subtree(directory, step, like, path=("params", "lm"))


def _judged(state: reinforce.RLState, report: dict[str, float]) -> dict[str, float]:
    """Held-out measurements, and what stopping looks at: as a loss, for lower is better."""
    return report | {"rl/missed_reward_100": -float(stability.window_mean(state.recent))}


def _write_results(folder: Path, summary: dict[str, Any]) -> None:
    pictures.training(run_logging.read_rows(folder), folder / "training.png")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
