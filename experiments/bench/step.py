"""How long a training step takes, and how much of it the mathematics cannot do without.

    python -m experiments.bench.step                                   the two shapes for a CPU
    python -m experiments.bench.step --shapes large --json bench.json  the one for an accelerator
    python -m experiments.bench.step --shapes large --peak h100        held against a data sheet
    python -m experiments.bench.step --shapes small --profile traces   and a trace for TensorBoard or Perfetto

The *floor* of a shape is one program of nothing but model passes: the base model forward on the entries of all variants
with logits at the horizon, LensNet forward and backward on the same entries, the anchor's LensNet forward where its
weight is not 0, and GistNet on all blocks. Everything else (trees, rollouts, gathering entries, pairs, targets, losses,
optimizer, metrics) is what `step_over_floor` holds above 1. All programs take turns in one process, so that a slow
moment of the machine falls on all of them.

The *roofline* is the time that arithmetic and memory traffic allow (`experiments.bench.cost`): the larger of operations
at the device's peak and bytes at that of its memory. `--peak auto` measures both on this device in the same process, by
one large matrix product in each of bfloat16 and float32 and one large array read and written; a name takes them from a
data sheet (`experiments.bench.roofline`). Utilisation is a step's operations by its time, as a share of the peak.
"""

from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import command
from experiments.bench import programs
from experiments.bench.cost import step_cost
from experiments.bench.programs import Compiles, Program, Step, turns
from experiments.bench.roofline import DEVICES
from experiments.bench.shapes import SHAPES, Shape
from experiments.tables import write_json
from lensjax._settings import PositiveInt, settings
from lensjax.runs.config import Config

DTYPES = ("bfloat16", "float32")


@settings()
class Arguments:
    """What to measure."""

    shapes: tuple[Shape, ...] = ("small", "medium")
    peak: Literal["auto", "h100", "a100", "v5e"] = "auto"
    """What a step is held against: what this device is measured to do, or a data sheet."""
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
        }
        device = {f"product {dtype}": programs.product(dtype) for dtype in DTYPES} | {"copy": programs.copy()}
        timed = whole | device | programs.parts(step)
        jax.block_until_ready([program() for program in timed.values()])
        before = compiles.count
        times = turns(timed, arguments.repetitions, console)
        recompiles = compiles.count - before
    if arguments.profile is not None:
        with jax.profiler.trace(str(arguments.profile / name)):
            jax.block_until_ready([step() for _ in range(3)])
    medians = {part: float(np.median(values)) for part, values in times.items()}
    attention = config.choose_attention().kernel
    cost = step_cost(config, fused_attention=attention != "xla").total
    products = {dtype: 2e3 * programs.product_rows() ** 3 / medians[f"product {dtype}"] for dtype in DTYPES}
    peak, bandwidth = products[config.dtype], 2e3 * programs.COPIED_BYTES / medians["copy"]
    if arguments.peak != "auto":
        sheet = DEVICES[arguments.peak]
        peak, bandwidth = sheet.flops_per_second, sheet.bytes_per_second
    roofline = cost.seconds(flops_per_second=peak, bytes_per_second=bandwidth)
    report = {
        "shape": name,
        "device": jax.devices()[0].device_kind,
        "attention": attention,
        "peak": arguments.peak,
        "repetitions": arguments.repetitions,
        "entries": config.capacity,
        "variants": config.batch_size * (config.context.rollouts + 1),
        "floor_ms": medians["floor"],
        "step_ms": medians["step"],
        "step_over_floor": medians["step"] / medians["floor"],
        "step_over_floor_quartiles": np.percentile(np.divide(times["step"], times["floor"]), [25, 75]).tolist(),
        "lens_losses_share": medians["objective"] / medians["step"],
        "parts_ms": {part: value for part, value in medians.items() if part not in whole | device},
        "flops": cost.flops,
        "traffic_bytes": cost.traffic,
        "products_flops_per_second": products,
        "peak_flops_per_second": peak,
        "peak_bytes_per_second": bandwidth,
        "utilisation": 1e3 * cost.flops / medians["step"] / peak,
        "roofline_ms": 1e3 * roofline,
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
    products = ", ".join(f"{each / 1e9:.0f} in {dtype}" for dtype, each in report["products_flops_per_second"].items())
    for line in (
        f"large products: {products} GFLOP/s; attention {report['attention']}",
        f"peak {report['peak']}: {report['peak_flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"{report['peak_bytes_per_second'] / 1e9:.0f} GB/s; roofline {report['roofline_ms']:.2f} ms",
        f"step / floor {report['step_over_floor']:.3f}, step / roofline {report['step_over_roofline']:.1f}, "
        f"utilisation {report['utilisation']:.2f}",
        f"memory {report['peak_bytes'] / 2**20:.0f} MiB, compiles {report['compiles']}, "
        f"{report['compile_seconds']:.0f} s",
    ):
        console.out(line, highlight=False)


if __name__ == "__main__":
    main()
