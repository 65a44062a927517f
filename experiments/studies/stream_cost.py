"""What it costs to read a stream through a session: time and memory, piece by piece."""

import hashlib
import mmap
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lensjax.plots.stream import StreamCost
from lensjax.runs.config import Config
from lensjax.session import Session, SessionState

Row = dict[str, Any]


def digest(state: SessionState, losses: np.ndarray) -> str:
    """Of the losses of some tokens, and of all that is on the device behind them."""
    digest = hashlib.sha256(losses.tobytes())
    for leaf in jax.tree.leaves(replace(state.view, key=jax.random.key_data(state.view.key))):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def device_bytes() -> int:
    """Memory of all arrays on the devices."""
    buffers = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    # On a CPU an array that was fetched is listed twice, with one buffer.
    return sum({buffer.unsafe_buffer_pointer(): buffer.nbytes for buffer in buffers}.values())


def process_bytes() -> int | None:
    """Memory that this process has; None where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * mmap.PAGESIZE if path.exists() else None


def number(value: float) -> float | None:
    """As JSON has it: None where it is not finite."""
    return float(value) if np.isfinite(value) else None


def summarise(arguments: Any, config: Config, session: Session, rows: list[Row]) -> Row:
    """What `summary.json` holds of the rows of a stream."""

    def total(name: str) -> int:
        return sum(row[name] for row in rows)

    def microseconds(name: str, first: int, last: int) -> float:
        """Of one token, in the percents from `first` to `last`."""
        start = rows[first - 2]["tokens_read"] if first > 1 else 0
        return 1e6 * sum(row[name] for row in rows[first - 1 : last]) / (rows[last - 1]["tokens_read"] - start)

    sampled = [row for row in rows if row["percent"] == 1 or row["percent"] % 10 == 0]
    early, late = microseconds("seconds", 2, 10), microseconds("seconds", 91, 100)
    cpu_early, cpu_late = microseconds("cpu_seconds", 2, 10), microseconds("cpu_seconds", 91, 100)
    return {
        "run": None if arguments.run is None else str(arguments.run),
        "task": config.data.task,
        "tokens": arguments.tokens,
        "seed": arguments.seed,
        "interval": config.context.horizon,
        "history": session.config.geometry.history,
        "entries": config.budget,
        "refocus_steps": total("refocus_steps"),
        "illegal_steps": total("illegal_steps"),
        "first_illegal_step": next((row["first_illegal_step"] for row in rows if row["first_illegal_step"]), None),
        "broken_invariants": [
            name.removeprefix("broke_") for name in rows[0] if name.startswith("broke_") and total(name)
        ],
        "losses_not_finite": total("losses_not_finite"),
        "nll_by_tenth": [_mean(rows[tenth : tenth + 10], "nll") for tenth in range(0, 100, 10)],
        "swap_rate": _mean(rows, "swap_rate"),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "tokens_per_second": round(1e6 / microseconds("seconds", 2, 100)),
        "microseconds_per_token_early": early,
        "microseconds_per_token_late": late,
        "late_over_early": late / early,
        "cpu_microseconds_per_token_early": cpu_early,
        "cpu_microseconds_per_token_late": cpu_late,
        "cpu_late_over_early": cpu_late / cpu_early,
        "microseconds_by_tenth": [microseconds("seconds", tenth - 9, tenth) for tenth in range(10, 101, 10)],
        "cpu_microseconds_by_tenth": [microseconds("cpu_seconds", tenth - 9, tenth) for tenth in range(10, 101, 10)],
        **{
            name: {f"{row['percent']} %": row[name] for row in sampled}
            for name in ("device_bytes", "history_bytes", "process_bytes")
        },
        # The system keeps the peak by rough counts: what was measured may be a little above it.
        "peak_process_bytes": max(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, *(row["process_bytes"] for row in sampled)
        ),
    }


def curves(title: str, rows: list[Row]) -> StreamCost:
    """What is drawn of the rows of a stream."""

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if row[name] is None else row[name] for row in rows], float)

    counts = np.diff(column("tokens_read"), prepend=0)
    return StreamCost(
        title=title,
        tokens=column("tokens_read"),
        microseconds={
            "on the clock": 1e6 * column("seconds") / counts,
            "of all cores": 1e6 * column("cpu_seconds") / counts,
        },
        bytes={
            "process": column("process_bytes"),
            "history on the host": column("history_bytes"),
            "arrays on the device": column("device_bytes"),
        },
    )


def _mean(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if None in values else float(np.mean(values))


def print_summary(console: Console, summary: Row) -> None:
    """The same in lines for a terminal."""
    for name in ("refocus_steps", "illegal_steps", "losses_not_finite", "seconds", "tokens_per_second"):
        console.out(f"  {name:<34}{summary[name]:>12,}", highlight=False)
    for kind in ("", "cpu_"):
        for name in ("microseconds_per_token_early", "microseconds_per_token_late", "late_over_early"):
            console.out(f"  {kind + name:<34}{summary[kind + name]:>12.3f}", highlight=False)
    for name in ("microseconds_by_tenth", "cpu_microseconds_by_tenth"):
        console.out(f"  {name:<34}{' '.join(f'{one:.1f}' for one in summary[name])}", highlight=False)
    for name in ("device_bytes", "history_bytes", "process_bytes"):
        sampled = [one for one in summary[name].values() if one is not None]
        console.out(f"  {name:<34}{min(sampled, default=0):>12,} to {max(sampled, default=0):,}", highlight=False)
    console.out(f"  {'peak_process_bytes':<34}{summary['peak_process_bytes']:>12,}", highlight=False)
