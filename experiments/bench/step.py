"""How long a training step takes, and how much of it the mathematics cannot do without.

    python -m experiments.bench.step                                   the two shapes for a CPU
    python -m experiments.bench.step --shapes large --json bench.json  the one for an accelerator
    python -m experiments.bench.step --shapes small --profile traces   and a trace for TensorBoard or Perfetto

The *floor* of a shape is one program of nothing but model passes: the base model forward on the entries of all variants
with logits at the horizon, LensNet forward and backward on the same entries, the anchor's LensNet forward where its
weight is not 0, and GistNet on all blocks. Everything else (trees, rollouts, gathering entries, pairs, targets, losses,
optimizer, metrics) is what `step_over_floor` holds above 1. All programs take turns in one process, so that a slow
moment of the machine falls on all of them. Utilisation is the floor's arithmetic (`experiments.bench.cost`) over the
time of a step, as a share of what one large matrix product reaches in the same process; the roofline is the time that
arithmetic and memory traffic allow, by that product and by one large array read and written.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import command
from experiments.bench import programs
from experiments.bench.cost import step_cost
from experiments.bench.programs import Compiles, Program, Step, turns
from experiments.bench.shapes import SHAPES, Shape
from experiments.tables import write_json
from lensjax._settings import PositiveInt, settings
from lensjax.runs.config import Config


@settings()
class Arguments:
    """What to measure."""

    shapes: tuple[Shape, ...] = ("small", "medium")
    repetitions: PositiveInt = 20
    """Turns that every program takes after one to warm up."""
    json: Path | None = None
    """Where to write one object a shape."""
    profile: Path | None = None
    """Folder for a trace of three steps of each shape."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(bench, Arguments, words, description=__doc__)


def bench(arguments: Arguments) -> list[dict[str, Any]]:
    """Measures every shape, and returns what `--json` writes."""
    if arguments.json is not None and arguments.json.exists():
        raise FileExistsError(f"{arguments.json} exists: name another file")
    console = Console()
    reports = [measure(name, SHAPES[name], arguments=arguments, console=console) for name in arguments.shapes]
    if arguments.json is not None:
        write_json(reports, arguments.json)
    return reports


def measure(name: str, config: Config, *, arguments: Arguments, console: Console) -> dict[str, Any]:
    """One shape: times in milliseconds, medians over the repetitions."""
    models = config.build_models()
    with Compiles() as compiles:
        step = Step(config, models)
        whole: dict[str, Program] = {
            "step": step,
            "floor": programs.floor(step),
            "product": programs.product(config),
            "copy": programs.copy(),
        }
        timed = whole | programs.parts(step)
        jax.block_until_ready([program() for program in timed.values()])
        before = compiles.count
        times = turns(timed, arguments.repetitions, console)
        recompiles = compiles.count - before
    if arguments.profile is not None:
        with jax.profiler.trace(str(arguments.profile / name)):
            jax.block_until_ready([step() for _ in range(3)])
    medians = {part: float(np.median(values)) for part, values in times.items()}
    cost = step_cost(config)
    peak = 2e3 * programs.product_rows() ** 3 / medians["product"]
    bandwidth = 2e3 * programs.COPIED_BYTES / medians["copy"]
    roofline = sum(
        part.seconds(flops_per_second=peak, bytes_per_second=bandwidth)
        for part in (cost.base, cost.lens, cost.anchor, cost.gist)
    )
    report = {
        "shape": name,
        "device": jax.devices()[0].device_kind,
        "repetitions": arguments.repetitions,
        "entries": config.capacity,
        "variants": config.batch_size * (config.context.rollouts + 1),
        "floor_ms": medians["floor"],
        "step_ms": medians["step"],
        "step_over_floor": medians["step"] / medians["floor"],
        "step_over_floor_quartiles": np.percentile(np.divide(times["step"], times["floor"]), [25, 75]).tolist(),
        "lens_losses_share": medians["objective"] / medians["step"],
        "parts_ms": {part: value for part, value in medians.items() if part not in whole},
        "flops": cost.total.flops,
        "traffic_bytes": cost.total.traffic,
        "peak_flops_per_second": peak,
        "peak_bytes_per_second": bandwidth,
        "utilisation": 1e3 * cost.total.flops / medians["step"] / peak,
        "step_over_roofline": medians["step"] / (1e3 * roofline),
        "variants_per_second": config.batch_size * (config.context.rollouts + 1) / medians["step"] * 1e3,
        "tokens_per_second": config.batch_size * config.context.window / medians["step"] * 1e3,
        "peak_bytes": step.peak_bytes,
        "compile_seconds": step.compile_seconds,
        "compiles": step.compiles + recompiles,
    }
    _print(console, report, times)
    return report


def _print(console: Console, report: dict[str, Any], times: dict[str, list[float]]) -> None:
    title = f"{report['shape']}: {report['variants']} variants of {report['entries']} entries, {report['device']}"
    table = Table("part", "ms, median", "quartiles", "of the step", title=title)
    for part, values in times.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        table.add_row(part, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}", f"{middle / report['step_ms']:.3f}")
    console.print(table)
    console.out(
        f"step / floor {report['step_over_floor']:.3f}, utilisation {report['utilisation']:.2f} of "
        f"{report['peak_flops_per_second'] / 1e9:.0f} GFLOP/s, step / roofline {report['step_over_roofline']:.1f} with "
        f"{report['peak_bytes_per_second'] / 1e9:.0f} GB/s, peak {report['peak_bytes'] / 2**20:.0f} MiB, "
        f"compiles {report['compiles']}, {report['compile_seconds']:.0f} s",
        highlight=False,
    )


if __name__ == "__main__":
    main()
