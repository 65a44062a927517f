"""What a step should take on an accelerator, from arithmetic and data sheets. Nothing is run.

    python -m experiments.bench.roofline
    python -m experiments.bench.roofline --csv runs/roofline.csv

The floor is the larger of operations at the device's peak and bytes at that of its memory (`experiments.bench.cost`),
once with attention weights that go through memory and once with a fused kernel.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import command
from experiments.bench.cost import step_cost
from experiments.bench.shapes import SHAPES
from experiments.tables import write_csv
from lensjax._settings import settings
from lensjax.runs.config import Config


@dataclass(frozen=True)
class Device:
    """What a data sheet says of one accelerator."""

    name: str
    flops_per_second: float
    """Of products in bfloat16, without sparsity."""
    bytes_per_second: float
    memory: float
    """Bytes."""


DEVICES = {
    "h100": Device("H100 SXM", 989e12, 3.35e12, 80e9),
    "a100": Device("A100 SXM, 80 GB", 312e12, 2.039e12, 80e9),
    "v5e": Device("TPU v5e", 197e12, 819e9, 16e9),
}
"""References: data sheets of NVIDIA H100 and A100; Google Cloud, TPU v5e, system architecture."""


@settings()
class Arguments:
    """What to print."""

    csv: Path | None = None
    """Where to write the table."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(show, Arguments, words, description=__doc__)


def show(arguments: Arguments) -> list[dict[str, Any]]:
    """Prints a row for each shape and device, and returns the rows."""
    if arguments.csv is not None and arguments.csv.exists():
        raise FileExistsError(f"{arguments.csv} exists: name another file")
    rows = [
        {"shape": name, "device": device.name, **floors(config, device)}
        for name, config in SHAPES.items()
        if config.dtype == "bfloat16"
        for device in DEVICES.values()
    ]
    table = Table(*(name.replace("_", " ") for name in rows[0]), title="on paper, not run")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if arguments.csv is not None:
        write_csv(rows, arguments.csv)
    return rows


def floors(config: Config, device: Device) -> dict[str, Any]:
    """The least time of a training step on a device, in milliseconds, and what it is bound by.

    Returns:
      `gflops`, `plain_ms` and `fused_ms` (without and with a fused attention kernel), `bound` (of the latter:
      operations or bytes), `most` (the largest share of the peak that plain attention can reach), `tokens_per_second`
      (of the fused floor).
    """
    plain, fused = step_cost(config).total, step_cost(config, fused_attention=True).total
    peak = {"flops_per_second": device.flops_per_second, "bytes_per_second": device.bytes_per_second}
    seconds, computing = fused.seconds(**peak), fused.flops / device.flops_per_second
    return {
        "gflops": plain.flops / 1e9,
        "plain_ms": 1e3 * plain.seconds(**peak),
        "fused_ms": 1e3 * seconds,
        "bound": "operations" if computing == seconds else "bytes",
        "most_plain": computing / plain.seconds(**peak),
        "tokens_per_second": config.batch_size * config.context.window / seconds,
    }


if __name__ == "__main__":
    main()
