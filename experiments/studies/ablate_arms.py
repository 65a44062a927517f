"""The arms of `experiments.studies.ablate`: trained and measured together in one program, a file for each."""

import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from lensjax._numerics import may_be_nan
from lensjax.evaluation import compare, held_out
from lensjax.models import Models, Params
from lensjax.runs import sweep
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.engine import devices
from lensjax.runs.engine.progress import has_bars
from lensjax.runs.fit import EVALUATION_SEED, LENS_STREAM, stream
from lensjax.runs.store import config_file, files
from lensjax.runs.sweep import Setting, SweepState
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.metrics import Metrics
from lensjax.training.recipe import Recipe

DRAWS, ROUNDS = 8, 1
"""Of the search that bounds the gap: random contexts among its starts, and rounds."""


@dataclass(frozen=True)
class Arm:
    """One setting and one seed."""

    setting: Setting
    config: Config
    is_trained: bool = True
    """False for the control: LensNet as training would find it."""

    @property
    def name(self) -> str:
        """Names the arm's file; the same for the same config."""
        digest = hashlib.sha256(config_file.to_json(self.config).encode()).hexdigest()[:16]
        return digest if self.is_trained else f"{digest}-untrained"

    def file(self, folder: Path) -> Path:
        """Where a sweep's folder has what the arm has come to."""
        return folder / "arms" / f"{self.name}.json"


def train(
    arms: Sequence[Arm], params: dict[str, Params], folder: Path, *, at_once: int | None, console: Console
) -> None:
    """Trains and measures some arms in one program, and writes one file for each.

    Args:
      arms: of one `sweep.structure`; all are trained, or none.
      params: parameters of `base` and `gist`, which they share.
      folder: the sweep's.
      at_once: arms computed together; None computes one after the other.
      console: is told how long it took.
    """
    began = time.perf_counter()
    configs = [arm.config for arm in arms]
    shared, recipe = sweep.structure(configs[0]), sweep.program(configs)
    # With too few arms the last one is trained more than once: no process may be without any.
    count = jax.device_count() if jax.process_count() > 1 else min(len(arms), jax.device_count())
    program = _Program.of(shared, recipe, count=count, at_once=at_once)
    seeds = list(dict.fromkeys(config.seed for config in configs))
    keys = {seed: stream(replace(shared, seed=seed), LENS_STREAM) for seed in seeds}
    parts = sweep.split(configs, program.mesh.size)
    states = [
        sweep.init([configs[i] for i in part], keys, recipe=recipe, models=program.models, params=params)[0]
        for part in parts
    ]
    frozen = devices.place({name: params[name] for name in ("base", "gist")}, program.mesh, split=False)
    start = sweep.stack(states, program.mesh)
    steps = shared.steps if arms[0].is_trained else 0
    state, finite = _steps(program, start, frozen, seeds, config=shared, steps=steps, console=console)
    evaluation = jax.random.key(EVALUATION_SEED)
    reports = [
        devices.to_host(program.evaluate(state, batch, jax.random.fold_in(evaluation, index), frozen))
        for index, batch in enumerate(_held_out(shared))
    ]
    slots = list(itertools.chain(*parts))
    results: dict[Path, str] = {}
    for index, arm in enumerate(arms):
        slot = slots.index(index)
        own = [{name: values.reshape(-1)[slot] for name, values in report.items()} for report in reports]
        losses = [float(report["nll_policy"]) for report in own]
        diverged = not (finite.reshape(-1)[slot] and np.isfinite(losses).all())
        result = {
            "setting": arm.setting,
            "seed": arm.config.seed,
            "diverged": diverged,
            "metrics": _strict(held_out.mean_over_batches(own)),
            "nll_by_batch": None if diverged else losses,
        }
        results[arm.file(folder)] = json.dumps(result, indent=2) + "\n"
    devices.in_first(lambda: _write(results))
    console.out(f"{len(arms)} arms in {time.perf_counter() - began:.0f} seconds, one program", highlight=False)


def _write(texts: Mapping[Path, str]) -> None:
    for file, text in texts.items():
        files.write_text(file, text)


def bounds(config: Config, params: dict[str, Params]) -> tuple[float, float]:
    """Loss of recency, and of the greedy search, on the held-out batches of an arm."""
    share = Hyperparameters().high_lod_share
    models, recipe = config.build_models(), replace(config.recipe, hyper=replace(config.hyper, high_lod_share=share))

    def one(row: tuple[Array, Array | None, Array]) -> tuple[Array, Array]:
        tokens, answers, key = row
        return compare.bounds(
            models,
            params,
            tokens,
            answers,
            key,
            length=recipe.budget,
            draws=DRAWS,
            oracle_rounds=ROUNDS,
            recipe=recipe,
        )

    measure = jax.jit(lambda *rows: jax.lax.map(one, rows))
    losses = []
    for index, batch in enumerate(_held_out(config)):
        key = jax.random.fold_in(jax.random.key(EVALUATION_SEED), index)
        keys = jax.random.split(key, len(batch["tokens"]))
        losses.append(jax.device_get(measure(batch["tokens"], batch.get("answers"), keys)))
    recency, oracle = (float(np.mean([pair[i] for pair in losses])) for i in (0, 1))
    return recency, oracle


@dataclass(frozen=True)
class _Program:
    """What is compiled for some arms; the chunks of one size share it."""

    models: Models
    mesh: Mesh
    step: Callable[..., tuple[SweepState, Metrics]]
    evaluate: Callable[..., Metrics]

    @classmethod
    @functools.cache
    def of(cls, config: Config, recipe: Recipe, *, count: int, at_once: int | None) -> "_Program":
        models, mesh = config.build_models(), Mesh(jax.devices()[:count], (devices.AXIS,))
        static: dict[str, Any] = {"recipe": recipe, "models": models, "at_once": at_once}
        step = devices.on_each(functools.partial(sweep.step, **static), mesh)
        evaluate = devices.on_each(functools.partial(sweep.evaluate, **static), mesh)
        return cls(models, mesh, may_be_nan(jax.jit(step, donate_argnums=0)), may_be_nan(jax.jit(evaluate)))


def _steps(
    program: _Program,
    state: SweepState,
    frozen: dict[str, Params],
    seeds: Sequence[int],
    *,
    config: Config,
    steps: int,
    console: Console,
) -> tuple[SweepState, np.ndarray]:
    """All training steps, if any; and for each arm, bool[devices, arms of each], whether all losses were finite."""
    batches = [
        data.make_iterator(config, "train", seed=2 * seed + LENS_STREAM, batch_size=config.batch_size) for seed in seeds
    ]
    finite: list[Array] = []
    with Progress(console=console, transient=True, disable=not has_bars(console)) as progress:
        for _ in progress.track(range(steps), description=f"{state.draw.size} arms"):
            batch = {"tokens": np.stack([next(one)["tokens"] for one in batches])}
            state, report = program.step(state, devices.place(batch, program.mesh, split=False), frozen)
            if finite:
                finite[-1].block_until_ready()  # one step in flight: the bar tells the truth, no device waits
            finite.append(jnp.isfinite(report["loss"] + report["grad_norm"]))
    seen: list[Any] = [np.ones(state.draw.shape, bool), *devices.to_host(finite)]
    return state, np.all(seen, axis=0)


def _held_out(config: Config) -> list[data.Batch]:
    # What a sweep finds may change a default: the test split stays unseen.
    return data.fixed_batches(
        config, "validation", batch_size=config.batch_size, count=config.eval_batches, seed=EVALUATION_SEED
    )


def _strict(report: Mapping[str, float]) -> dict[str, float | None]:
    """Undefined values as null."""
    return {name: value if math.isfinite(value) else None for name, value in report.items()}
