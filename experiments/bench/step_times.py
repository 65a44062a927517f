"""What a training step takes with each objective, and on the policy's own edits, beside one with span targets.

    python -m experiments.bench.step_times                        the recall preset, into the terminal
    python -m experiments.bench.step_times --csv runs/times.csv

All programs take turns in one process, so that a slow moment of the machine falls on all of them.
"""

import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import command
from experiments.bench.programs import Program, turns
from experiments.tables import write_csv
from experiments.train import load_preset
from lensjax import _settings
from lensjax._settings import BatchSize, PositiveInt, settings
from lensjax.runs.config import Config
from lensjax.training.steps import online, preference
from lensjax.training.steps.train_state import init_train_state
from lensjax.training.terms.inputs import ObjectiveConfig

OBJECTIVES: tuple[str, ...] = typing.get_args(typing.get_type_hints(ObjectiveConfig)["name"])
REFERENCE, OWN_EDITS = "spans", "own edits"


@settings()
class Arguments:
    """What to measure."""

    preset: str = "recall"
    """Name or path of the config that all steps have but for the objective."""
    batch_size: BatchSize = 16
    repetitions: PositiveInt = 15
    """Turns that every program takes after one to warm up."""
    csv: Path | None = None
    """Where to write the table."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(measure, Arguments, words, description=__doc__)


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """Medians of all programs, and of the ratios to span targets turn by turn, with quartiles."""
    if arguments.csv is not None and arguments.csv.exists():
        raise FileExistsError(f"{arguments.csv} exists: name another file")
    preset = _settings.replace(load_preset(arguments.preset), batch_size=arguments.batch_size)
    console = Console()
    programs: dict[str, Program] = {}
    for name in (*OBJECTIVES, OWN_EDITS):
        changes = {"online.steps": preset.steps} if name == OWN_EDITS else {"objective.name": name}
        programs[name] = _step(_settings.replace(preset, **changes))
        jax.block_until_ready(programs[name]())
    times = turns(programs, arguments.repetitions, console)
    rows: list[dict[str, Any]] = []
    for name, values in times.items():
        ratios = np.divide(values, times[REFERENCE])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        rows.append({"objective": name, "step_ms": float(np.median(values)), "ratio": middle, "q25": low, "q75": high})
        console.out(
            f"  {name:<16}{rows[-1]['step_ms']:9.1f} ms  {middle:.2f} ({low:.2f} to {high:.2f})", highlight=False
        )
    if arguments.csv is not None:
        write_csv(rows, arguments.csv)
    return rows


def _step(config: Config) -> Program:
    """A compiled step on random tokens; on own edits where the config has them."""
    models, recipe, key = config.build_models(), config.recipe, jax.random.key(0)
    state: Any
    state, frozen = init_train_state(key, recipe=recipe, models=models)
    step: Callable[..., Any] = preference.train_step
    if config.online.steps:
        params = {**frozen, **state.params}
        state, frozen = online.init_online_state(
            key, recipe=recipe, settings=config.online, models=models, params=params
        )
        step = functools.partial(online.online_step, settings=config.online)
    tokens = jax.random.randint(key, (config.batch_size, config.context.window), 0, config.base.vocab_size, jnp.int32)
    compiled = jax.jit(functools.partial(step, recipe=recipe, models=models))
    return lambda: compiled(state, {"tokens": tokens}, frozen)


if __name__ == "__main__":
    main()
