"""What several streams side by side take, beside one: an interval's tokens read, and the decision behind them.

    python -m experiments.bench.streams                   64 streams of the small models of `lx.BaseConfig()`
    python -m experiments.bench.streams --dim 32 --layers 1

Both sessions take turns in one process. Says what they take on the clock and of all cores, the least and the middle of
all turns: on a machine that others use, the least is what it takes alone.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lensjax as lx
from experiments import command
from experiments.bench.programs import Compiles
from lensjax._settings import Layers, PositiveInt, Width, settings


@settings()
class Arguments:
    """What to measure."""

    streams: PositiveInt = 64
    dim: Width = 64
    """Of the base model and of LensNet."""
    layers: Layers = 2
    """Of each."""
    entries: PositiveInt = 128
    interval: PositiveInt = 32
    repetitions: PositiveInt = 20


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(measure, Arguments, words, description=__doc__)


def measure(arguments: Arguments) -> dict[str, float]:
    """Milliseconds of a step of both, and the ratios."""
    console = Console()
    shape: dict[str, Any] = {"dim": arguments.dim, "layers": arguments.layers, "mlp_dim": 3 * arguments.dim}
    models = lx.build_models(lx.BaseConfig(**shape), lx.GistConfig(), lx.LensConfig(**shape), block_size=8, max_lod=5)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {name: getattr(models, name).init(key) for name, key in zip(("base", "gist", "lens"), keys, strict=True)}
    geometry = lx.Geometry(history=2**20, block_size=8, max_lod=5, recent_tokens=8)
    config = lx.SessionConfig(geometry, budget=arguments.entries, interval=arguments.interval)
    steps = [_step(lx.Session(models, params, config, streams=count)) for count in (None, arguments.streams)]
    with Compiles() as compiles:
        times = np.asarray([[step() for step in steps] for _ in range(arguments.repetitions)])
    if compiles.count:
        raise ValueError(f"{compiles.count} programs were compiled while they were measured")
    found: dict[str, float] = {}
    for name, (clock, cores) in {"least": times.min(axis=0).T, "middle": np.median(times, axis=0).T}.items():
        for of, (one, many) in {"clock": clock, "cores": cores}.items():
            found[f"{name}_{of}"] = many / one
            console.out(
                f"  {name:<7} {of}: one {one:7.2f} ms, {arguments.streams} {many:8.2f} ms, {many / one:5.1f} times",
                highlight=False,
            )
    return found


def _step(session: lx.Session) -> Callable[[], tuple[float, float]]:
    """Reads an interval of random tokens; milliseconds on the clock and of all cores."""
    axis, random = () if session.streams is None else (session.streams,), np.random.default_rng(0)
    vocabulary, interval = session.models.base.vocab_size, session.config.interval
    state, _ = session.append(
        session.init(), random.integers(0, vocabulary, (*axis, session.config.capacity + interval))
    )

    def step() -> tuple[float, float]:
        nonlocal state
        tokens = random.integers(0, vocabulary, (*axis, interval))
        began, used = time.perf_counter(), time.process_time()
        state, _ = session.append(state, tokens)
        jax.block_until_ready(state.view)
        return 1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - used)

    return step


if __name__ == "__main__":
    # Each core of a CPU becomes a device, with streams of its own: one step of one device keeps one core busy.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    main()
