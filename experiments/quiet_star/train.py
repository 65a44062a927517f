"""Bakes a small language model on traces, trains its thoughts by REINFORCE, and measures them on held-out questions.

    python -m experiments.quiet_star.train --output-dir runs/quiet_star/0
    python -m experiments.quiet_star.train arithmetic --seed 1 --output-dir runs/quiet_star/arithmetic-1
    python -m experiments.quiet_star.train --resume runs/quiet_star/0
    python -m experiments.quiet_star.train --start-from runs/quiet_star/0 --rl.shuffle-rewards --output-dir runs/b

The last one is the control: rewards go to the wrong thoughts.

The first argument names a task; flags change single fields. Everything that a run makes is in its own folder.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from rich.console import Console

from experiments import command
from experiments.quiet_star import bake, measure, pictures, reinforce, tasks
from experiments.quiet_star.bake import Batch
from experiments.quiet_star.config import QuietStarConfig
from experiments.quiet_star.model import ThoughtModel
from lensjax._settings import require
from lensjax.evaluation import held_out
from lensjax.models import Params
from lensjax.plots import style
from lensjax.runs.data import batches as data
from lensjax.runs.data.splits import Split
from lensjax.runs.engine import devices, loop, memory, numerics
from lensjax.runs.folder import Claim, open_run, require_unused
from lensjax.runs.store import checkpoint, config_file, identity, paths, run_folder
from lensjax.runs.store import log as run_logging
from lensjax.runs.store.log import RunLogger
from lensjax.training.optim import moving
from lensjax.training.steps.update import Learner

BAKE, RL = "bake", "rl"
STEPS = {BAKE: "bake.steps", RL: "rl.episodes"}
EVALUATION_SEED = 2026
HEADLINE = ("accuracy_without", "accuracy_sampled", "accuracy_greedy", "accuracy_foreign", "rl/anti_theater_all_passed")
"""Held-out metrics to show while it trains."""
PRESETS = {
    "pointer": QuietStarConfig(),
    "arithmetic": QuietStarConfig(task=tasks.TaskConfig("arithmetic")),
}

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


def build_model(config: QuietStarConfig) -> ThoughtModel:
    """Builds the model of a configuration; call it once, outside `jax.jit`."""
    task = tasks.task_of(config.task)
    return ThoughtModel(config.model, task.vocab_size, task.prompt_length, task.thought_length)


@numerics.fixed()
def run(config: QuietStarConfig, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """One whole run; returns what `summary.json` holds."""
    started = time.perf_counter()
    console = console or Console(quiet=not devices.is_first())
    config = paths.resolved(config)
    if resume:
        require_unused(config.output_dir)
    model, mesh = build_model(config), devices.make_mesh({"batch_size": config.batch_size})
    _require_room(config, model, mesh)
    start = load_start(config, model, own=Path(config.output_dir) if resume else None)
    batches = held_out_questions(config, mesh)
    report = evaluator(config, model, batches)
    with open_run(
        config, STEPS, resume=resume, console=console, weights=lambda: identity.digest({"lm": start} if start else {})
    ) as (folder, logger, claim):
        job = _Job(config, model, report, mesh, folder, logger, console, claim)
        baked, bake_seconds = (start, 0.0) if start else _bake(job, batches)
        summary: dict[str, Any] = {f"baked_{name}": value for name, value in report(baked, "test").items()}
        rl_seconds = 0.0
        if config.rl.episodes:
            learned, rl_seconds = _reinforce(job, baked)
            summary |= report(learned, "test")
        about: dict[str, Any] = {
            "task": config.task.name,
            "split": "test",
            "questions": config.batch_size * config.eval_batches,
            "seed": config.seed,
            "shuffle_rewards": config.rl.shuffle_rewards,
            "bake_seconds": round(bake_seconds, 1),
            "rl_seconds": round(rl_seconds, 1),
        }
        summary = about | run_logging.with_undefined(summary) | {"seconds": round(time.perf_counter() - started, 1)}
        claim.require()
        devices.in_first(lambda: run_folder.write_summary(folder, summary))
        devices.in_first(lambda: _draw(folder, summary["task"], logger))
    for name, value in summary.items():
        console.out(f"  {name:<40}{value:>9.3f}" if isinstance(value, float) else f"  {name:<40}{value!s:>9}")
    return summary


def _require_room(config: QuietStarConfig, model: ThoughtModel, mesh: Mesh) -> None:
    """Checks that memory holds both phases, before anything is read or written."""
    static: dict[str, Any] = {"config": config, "model": model}
    shapes = {name: (config.batch_size, *shape) for name, shape in config.example_shapes.items()}
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    key = jax.random.key(0)
    baking = jax.eval_shape(functools.partial(bake.init_state, **static), key)
    steps: dict[str, tuple[Any, Callable[..., Any]]] = {BAKE: (baking, bake.bake_step)}
    if config.rl.episodes:
        start = functools.partial(reinforce.init_state, key, config=config)
        steps[RL] = (jax.eval_shape(lambda baked: start(baked=baked), baking.params["lm"]), reinforce.rl_step)
    for name, (state, step) in steps.items():
        memory.require_room(
            state,
            batch,
            {},
            phase=name,
            activations=functools.partial(memory.largest_product, functools.partial(step, **static), state, batch),
            held_out=2 * config.eval_batches * memory.size(batch),
            devices=mesh.size,
            split=config.shard_parameters,
            advice="the sizes of model, rl.value_hidden, rl.thoughts, batch_size or eval_batches",
        )


@dataclass(frozen=True)
class _Job:
    """What both phases of a run share."""

    config: QuietStarConfig
    model: ThoughtModel
    report: Report
    mesh: Mesh
    folder: Path
    logger: RunLogger
    console: Console
    claim: Claim

    def run(self, phase: loop.Phase, state: Any, *, seed: int) -> tuple[Params, float]:
        """One phase on the questions of a seed: the language model after it, and its seconds."""
        after, seconds = loop.run_phase(
            phase,
            state,
            questions(self.config, seed),
            frozen={},
            run_dir=self.folder,
            config=self.config,
            mesh=self.mesh,
            logger=self.logger,
            console=self.console,
            claim=self.claim,
        )
        return after.params["lm"], seconds


def _bake(job: _Job, batches: Callable[[Split], list[Batch]]) -> tuple[Params, float]:
    config, model = job.config, job.model
    loss = jax.jit(lambda params, batch: bake.bake_loss(params, batch, model=model)[0])

    def evaluate(state: Learner) -> dict[str, float]:
        params = state.params["lm"]
        losses = held_out.mean_over_batches({"loss": loss(params, batch)} for batch in batches("validation"))
        return losses | job.report(params, "validation")

    phase = loop.Phase(
        name=BAKE,
        steps=config.bake.steps,
        batch_size=config.batch_size,
        step=lambda state, batch, _: bake.bake_step(state, batch, config=config, model=model),
        evaluate=evaluate,
        headline=HEADLINE,
        monitor="loss",
    )
    state = bake.init_state(stream(config, 0), config=config, model=model)
    return job.run(phase, state, seed=2 * config.seed)


def _reinforce(job: _Job, baked: Params) -> tuple[Params, float]:
    config, model = job.config, job.model

    def evaluate(state: reinforce.RLState) -> dict[str, float]:
        # Stopping looks for the lowest value.
        missed = -float(moving.window_mean(state.recent))
        return job.report(state.params["lm"], "validation") | {"rl/missed_reward_100": missed}

    phase = loop.Phase(
        name=RL,
        steps=config.rl.episodes,
        batch_size=config.batch_size,
        step=lambda state, batch, _: reinforce.rl_step(state, batch, config=config, model=model),
        evaluate=evaluate,
        headline=HEADLINE,
        monitor="rl/missed_reward_100",
    )
    state = reinforce.init_state(stream(config, 1), config=config, baked=baked)
    return job.run(phase, state, seed=2 * config.seed + 1)


def stream(config: QuietStarConfig, number: int) -> Array:
    """The PRNG key of one of a run's phases."""
    return jax.random.fold_in(jax.random.key(config.seed), number)


def questions(config: QuietStarConfig, seed: int) -> Any:
    """The training questions of a seed, batch after batch."""
    share = (jax.process_index(), jax.process_count())
    return data.iterate(tasks.dataset(config.task, "train", seed=seed), batch_size=config.batch_size, share=share)


def held_out_questions(config: QuietStarConfig, mesh: Mesh) -> Callable[[Split], list[Batch]]:
    """The questions of a split, the same ones for all seeds."""
    share = (jax.process_index(), jax.process_count())

    @functools.cache
    def batches(split: Split) -> list[Batch]:
        dataset = tasks.dataset(config.task, split, seed=EVALUATION_SEED)
        rows = data.iterate(dataset, batch_size=config.batch_size, share=share)
        return [
            {name: devices.share_out(array, mesh) for name, array in next(rows).items()}
            for _ in range(config.eval_batches)
        ]

    return batches


def evaluator(config: QuietStarConfig, model: ThoughtModel, batches: Callable[[Split], list[Batch]]) -> Report:
    """Held-out measurements of a model, always with the same randomness; compiled once for all splits."""
    step = jax.jit(functools.partial(measure.answer_batch, config=config, model=model))
    keys = [jax.random.fold_in(jax.random.key(EVALUATION_SEED), i) for i in range(config.eval_batches)]

    def report(params: Params, split: Split) -> dict[str, float]:
        answers = [devices.to_host(step(params, batch, key)) for batch, key in zip(batches(split), keys, strict=True)]
        return measure.report(answers, config)

    return report


def load_start(config: QuietStarConfig, model: ThoughtModel, *, own: Path | None = None) -> Params | None:
    """The baked model of the run that `config.start_from` names; None without one.

    Args:
      config: the run's.
      model: of its configuration.
      own: the run's folder, to go on with it: its checkpoints hold the baked model, and the other run need not be.

    Raises:
      FileNotFoundError: there is no run in that folder.
      ValueError: it is of another task or model, or has not baked one yet.
    """
    if config.start_from is None:
        return None
    like = jax.eval_shape(model.init, jax.random.key(0))
    if own is not None and (newest := checkpoint.latest_step(run_folder.checkpoint_dir(own, RL))) is not None:
        return checkpoint.restore_subtree(run_folder.checkpoint_dir(own, RL), newest, like, path=("reference",))
    folder = Path(config.start_from)
    try:
        stored = config_file.load(run_folder.config_path(folder), QuietStarConfig)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"start_from: {error}") from error
    for name in ("task", "model"):
        theirs, ours = getattr(stored, name), getattr(config, name)
        require(theirs == ours, f"{name} of start_from {folder} is {theirs}, this run has {ours}: use the same")
    directory = run_folder.checkpoint_dir(folder, BAKE)
    step = loop.kept_step(directory)
    if step is None:
        raise ValueError(f"{folder} has no checkpoint of a baked model: let it finish its baking first")
    return checkpoint.restore_subtree(directory, step, like, path=("params", "lm"))


def _draw(folder: Path, title: str, logger: RunLogger) -> None:
    with style.attempt(folder / "training.png") as path:
        rows = run_logging.read_rows(folder)
        if any(row["phase"] == RL for row in rows):
            pictures.training({"this run": [rows]}, path, title=title)
            logger.show(path)


if __name__ == "__main__":
    main()
