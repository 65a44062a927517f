"""Reads a long stream through a session: what are its working contexts worth, are they legal, and what do they cost?

    python -m experiments.studies.stream --run runs/stdlib --tokens 100000 --output-dir runs/stream
    python -m experiments.studies.stream --tokens 1000000 --output-dir runs/stream-fresh        models as initialised

Text runs read the files of their test split one after another, recall runs random tokens in which earlier blocks come
again. Every context is checked, and every token's cost taken. Of a run, `summary.json` and `quality.csv` also compare
the session with others on the same stream: a sliding window of as many tokens in full as the session has entries, the
session with other scores than LensNet's (by age; random), and the whole history in full, which has no budget. Intervals
are paired, over consecutive stretches of the stream. Models as they are initialised say nothing of quality.

Leaves these, a row of `metrics.jsonl` for each percent of the stream, `quality.png`, and a map of what was shown in the
first refocus steps, `stream_start.png`.
"""

import itertools
import json
import mmap
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments import command
from experiments.studies import stream_rivals
from experiments.studies.stream_rivals import STRETCHES
from experiments.studies.stream_watch import Watch
from experiments.tables import write_json
from lensjax import _settings
from lensjax._settings import PositiveInt, Seed, settings
from lensjax.models.base_lm import BaseConfig
from lensjax.models.lensnet import LensConfig
from lensjax.plots import style
from lensjax.plots.maps import stream_map
from lensjax.runs.config import Config
from lensjax.runs.data import corpus as data
from lensjax.runs.data.task import DataConfig
from lensjax.runs.engine.progress import has_bars
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file, run_folder
from lensjax.session import Session
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig

FRESH = Config(
    base=BaseConfig(dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=64),
    lens=LensConfig(dim=32, layers=1, heads=4, mlp_dim=64),
    context=ContextConfig(window=544, block_size=4, max_lod=3, horizon=32, recent_tokens=8),
    hyper=Hyperparameters(context_start=0.5, context_end=0.25),
    data=DataConfig(task="recall"),
)
PERCENT = range(1, 101)
Row = dict[str, Any]


@settings()
class Arguments:
    """What to read, and with which models."""

    run: Path | None = None
    """Run folder whose models read; None takes small ones as they are initialised, to see what reading costs."""
    tokens: PositiveInt = 100_000
    output_dir: Path = Path("runs/stream")
    interval: PositiveInt | None = None
    """Tokens between two refocus steps; None for the run's horizon, which is how LensNet was trained."""
    seed: Seed = 0
    """Of the recall stream, of random scores, of an allocator that samples, and of fresh models."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(stream, Arguments, words, description=__doc__)


def stream(arguments: Arguments) -> dict[str, Any]:
    """Reads the whole stream, and returns what `summary.json` holds.

    Raises:
      ValueError: an argument is bad (nothing is written), or a context is not legal (all but the comparison is).
      FloatingPointError: a loss is not finite; likewise.
    """
    config, session, tokens = _prepare(arguments)
    folder, console = run_folder.create_run(arguments.output_dir, config), Console()
    console.out(f"run folder {folder}, {jax.default_backend()}, seed {arguments.seed}", highlight=False)
    watch, rows = Watch(session), []
    models_of = "fresh models" if arguments.run is None else f"{config.data.task}, seed {config.seed}"
    name = f"{models_of}: {arguments.tokens:,} tokens read through {config.budget} entries"
    with (
        (folder / "metrics.jsonl").open("w") as file,
        Progress(console=console, transient=True, disable=not has_bars(console)) as progress,
    ):
        for row in progress.track(_read(session, tokens, watch, arguments), total=len(PERCENT)):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    summary = _summary(arguments, config, rows)
    write_json(summary, folder / "summary.json")
    with style.attempt(folder / "stream_start.png") as path:
        stream_map(watch.map_of_first_steps(f"{name}: the first refocus steps"), path)
    _print_summary(console, summary)
    _raise_faults(folder, summary)
    if arguments.run is not None:
        console.out("measuring the others on the same stream", highlight=False)
        summary["quality"] = stream_rivals.compare(config, session, tokens, watch, name, folder)
        write_json(summary, folder / "summary.json")
        stream_rivals.print_table(console, summary["quality"])
    console.out(f"pictures and metrics are in {folder}", highlight=False)
    return summary


def _prepare(arguments: Arguments) -> tuple[Config, Session, np.ndarray]:
    """The run's configuration, its session, and the stream to read; all that can be wrong is found here."""
    stored = FRESH if arguments.run is None else config_file.load(run_folder.config_path(arguments.run), Config)
    interval = stored.context.horizon if arguments.interval is None else arguments.interval
    needed = len(PERCENT) * interval
    if arguments.run is not None:
        needed = max(needed, stored.context.history + (STRETCHES + 1) * interval)
    if arguments.tokens < needed:
        raise ValueError(
            f"tokens must be at least {needed}, so that each percent of the stream holds an interval of {interval}, "
            f"and what is behind the first history of a run {STRETCHES}, got {arguments.tokens}: raise it or lower "
            "interval"
        )
    folder = arguments.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: choose another --output-dir")
    # The history stays what LensNet was trained on, whatever the interval.
    shape = {"context.horizon": interval, "context.window": stored.context.history + interval}
    config = _settings.replace(stored, seed=arguments.seed, output_dir=str(folder), **shape)
    tokens = stream_tokens(config, arguments.tokens)
    models = config.build_models()
    if arguments.run is None:
        keys = jax.random.split(jax.random.key(arguments.seed), 3)
        fresh = (models.base.init(keys[0]), models.gist.init(keys[1]), models.lens.init(keys[2]))
        params = dict(zip(("base", "gist", "lens"), fresh, strict=True))
    else:
        params = load_params(arguments.run, stored, models, ("base", "gist", "lens"))
    return config, Session(models, params, config.session), tokens


def stream_tokens(config: Config, count: int) -> np.ndarray:
    """The first tokens of a task's stream, int32[count].

    Raises:
      ValueError: the test split is shorter, or the task has no stream.
    """
    if config.data.task == "recall":
        return np.fromiter(itertools.chain.from_iterable(_recall_blocks(config)), np.int32, count)
    if not config.data.is_text:
        raise ValueError(
            f"data.task {config.data.task!r} is of windows that have nothing to do with each other, and no stream: "
            "expected a run on text or on recall"
        )
    row = data.token_row(config, "test")
    if len(row) < count:
        raise ValueError(
            f"tokens must be at most {len(row)}, those of the test split, none of which is read twice, got {count}: "
            "lower it, add files, or raise data.max_files of the run"
        )
    return row[:count].astype(np.int32)


def _recall_blocks(config: Config) -> Iterator[list[int]]:
    """Random blocks without end; every other one, on average, repeats one that the session may still hold."""
    random, size = np.random.default_rng(config.seed), config.context.block_size
    earlier: deque[list[int]] = deque(maxlen=config.context.history // size)
    while True:
        if earlier and random.random() < 0.5:
            block = earlier[random.integers(len(earlier))]
        else:
            block = random.integers(config.base.vocab_size, size=size).tolist()
        earlier.append(block)
        yield block


def _read(session: Session, tokens: np.ndarray, watch: Watch, arguments: Arguments) -> Iterator[Row]:
    """Reads the stream, and gives a row for each percent of it; all but the last are whole intervals."""
    interval = session.config.interval
    steps = len(tokens) // interval
    ends = [steps * percent // 100 * interval for percent in PERCENT]
    ends[-1] = len(tokens)
    state, start = session.init(arguments.seed), 0
    for percent, end in zip(PERCENT, ends, strict=True):
        started = time.perf_counter()
        state, losses = session.append(state, tokens[start:end], on_refocus=watch.look)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
        yield {
            "percent": percent,
            "tokens_read": end,
            "seconds": seconds,
            "microseconds_per_token": 1e6 * seconds / (end - start),
            "nll": _number(losses.mean()),
            "losses_not_finite": int(np.sum(~np.isfinite(losses))),
            **watch.collect(losses),
            "device_bytes": _device_bytes(),
            "process_bytes": _process_bytes(),
        }
        start = end


def _device_bytes() -> int:
    """Memory of all arrays on the devices."""
    buffers = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    # On a CPU an array that was fetched is listed twice, with one buffer.
    return sum({buffer.unsafe_buffer_pointer(): buffer.nbytes for buffer in buffers}.values())


def _process_bytes() -> int | None:
    """Memory that this process has; None where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * mmap.PAGESIZE if path.exists() else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _summary(arguments: Arguments, config: Config, rows: list[Row]) -> Row:
    def total(name: str) -> int:
        return sum(row[name] for row in rows)

    def microseconds(first: int, last: int) -> float:
        """Of one token, in the percents from `first` to `last`."""
        start = rows[first - 2]["tokens_read"] if first > 1 else 0
        return 1e6 * sum(row["seconds"] for row in rows[first - 1 : last]) / (rows[last - 1]["tokens_read"] - start)

    sampled = [row for row in rows if row["percent"] == 1 or row["percent"] % 10 == 0]
    early, late = microseconds(2, 10), microseconds(91, 100)
    return {
        "run": None if arguments.run is None else str(arguments.run),
        "task": config.data.task,
        "tokens": arguments.tokens,
        "seed": arguments.seed,
        "interval": config.context.horizon,
        "history": config.context.history,
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
        "tokens_per_second": round(1e6 / microseconds(2, 100)),
        "microseconds_per_token_early": early,
        "microseconds_per_token_late": late,
        "late_over_early": late / early,
        "device_bytes": {f"{row['percent']} %": row["device_bytes"] for row in sampled},
        "process_bytes": {f"{row['percent']} %": row["process_bytes"] for row in sampled},
    }


def _mean(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if None in values else float(np.mean(values))


def _print_summary(console: Console, summary: Row) -> None:
    for name in ("refocus_steps", "illegal_steps", "losses_not_finite", "seconds", "tokens_per_second"):
        console.out(f"  {name:<32}{summary[name]:>12,}", highlight=False)
    for name in ("microseconds_per_token_early", "microseconds_per_token_late", "late_over_early"):
        console.out(f"  {name:<32}{summary[name]:>12.3f}", highlight=False)
    device = list(summary["device_bytes"].values())
    console.out(f"  {'device_bytes':<32}{min(device):>12,} to {max(device):,}", highlight=False)


def _raise_faults(folder: Path, summary: Row) -> None:
    """Raises if a check failed anywhere in the stream."""
    if summary["illegal_steps"]:
        step = summary["first_illegal_step"]
        raise ValueError(
            f"{summary['illegal_steps']} of {summary['refocus_steps']} working contexts are not legal, first at "
            f"refocus step {step} (token {step * summary['interval']}): {', '.join(summary['broken_invariants'])}; "
            f"see {folder}"
        )
    if summary["losses_not_finite"]:
        raise FloatingPointError(f"{summary['losses_not_finite']} losses are not finite: the models are broken")


if __name__ == "__main__":
    main()
