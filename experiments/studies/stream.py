"""Reads a long stream through a session: what are its working contexts worth, are they legal, and what do they cost?

    python -m experiments.studies.stream --run runs/stdlib --tokens 100000 --output-dir runs/stream
    python -m experiments.studies.stream --tokens 1000000 --output-dir runs/stream-fresh       models that nobody has trained

Text runs read the files of their test split one after another, recall runs random tokens in which earlier blocks come
again. Every context is checked, and every token's cost taken. Of a run, `summary.json` and `quality.csv` also compare
the session with others on the same stream: a sliding window of as many tokens in full as the session has entries, the
session with other scores than LensNet's (by age; random), and the whole history in full, which has no budget. Intervals
are paired, over consecutive stretches of the stream. Models as they are initialised say nothing of quality.

Leaves these, a row of `metrics.jsonl` for each percent of the stream, `quality.png`, and a map of what was shown in the
first refocus steps, `stream_start.png`.
"""

import csv
import functools
import itertools
import json
import mmap
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from experiments import command
from experiments.studies.stream_watch import Watch
from experiments.train import load_params
from lensjax.evaluation import rivals, streams
from lensjax.evaluation.statistics import estimate
from lensjax.models import build_models
from lensjax.plots.maps import stream_map
from lensjax.plots.stream import StreamQuality, stream_quality
from lensjax.runs import config as configs
from lensjax.runs.config import BaseConfig, Config, ContextConfig, DataConfig, Hyperparameters, LensConfig
from lensjax.runs.data import batches as data
from lensjax.runs.store import folder as run_folder
from lensjax.session import Session

FRESH = Config(
    base=BaseConfig(dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=64),
    lens=LensConfig(dim=32, layers=1, heads=4, mlp_dim=64),
    context=ContextConfig(window=544, block_size=4, max_lod=3, horizon=32, recent_tokens=8),
    hyper=Hyperparameters(context_start=0.5, context_end=0.25),
    data=DataConfig(task="recall"),
)
PERCENT = range(1, 101)
# Consecutive pieces of the stream, over which the intervals of a comparison are.
STRETCHES = 20
ENDS = ("", "_low", "_high")
SESSION, SLIDING, WHOLE = "session", "sliding_window", "whole_window"
POLICIES = {"collapse_oldest": streams.collapse_oldest, "random_scores": streams.random_scores}
Row = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    """What to read, and with which models."""

    run: Path | None = None
    """Run folder whose models read; None takes small ones as they are initialised, to see what reading costs."""
    tokens: int = 100_000
    output_dir: Path = Path("runs/stream")
    interval: int | None = None
    """Tokens between two refocus steps; None for the run's horizon, which is how LensNet was trained."""
    seed: int = 0
    """Of the recall stream, of random scores, of an allocator that samples, and of fresh models."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    arguments = tyro.cli(Arguments, args=words, description=__doc__)
    with command.errors_end():
        stream(arguments)


def stream(arguments: Arguments) -> dict[str, Any]:
    """Reads the whole stream, and returns what `summary.json` holds.

    Raises:
      ValueError: an argument is bad (nothing is written), or a context is not legal (all but the comparison is).
      FloatingPointError: a loss is not finite; likewise.
    """
    session, tokens = _prepare(arguments)
    folder, console = run_folder.create_run(arguments.output_dir, session.config), Console()
    console.out(f"run folder {folder}, {jax.default_backend()}, seed {arguments.seed}", highlight=False)
    watch, rows = Watch(session), []
    name = f"{arguments.run or 'fresh models'}: {arguments.tokens:,} tokens read through {session.budget} entries"
    with (
        (folder / "metrics.jsonl").open("w") as file,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        for row in progress.track(_read(session, tokens, watch, arguments), total=len(PERCENT)):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    summary = _summary(arguments, session, rows)
    _write_summary(folder, summary)
    stream_map(watch.map_of_first_steps(f"{name}: the first refocus steps"), folder / "stream_start.png")
    _print_summary(console, summary)
    _raise_faults(folder, summary)
    if arguments.run is not None:
        console.out("measuring the others on the same stream", highlight=False)
        summary["quality"] = _compare(session, tokens, watch, name, folder)
        _write_summary(folder, summary)
        _print_quality(console, summary["quality"])
    console.out(f"pictures and metrics are in {folder}", highlight=False)
    return summary


def _prepare(arguments: Arguments) -> tuple[Session, np.ndarray]:
    """The session and the stream that it is to read; all that can be wrong is found here."""
    stored = FRESH if arguments.run is None else configs.load(run_folder.config_file(arguments.run))
    interval = stored.context.horizon if arguments.interval is None else arguments.interval
    if interval < 1:
        raise ValueError(f"interval must be at least 1 token, got {interval}")
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
    config = configs.replace(stored, seed=arguments.seed, output_dir=str(folder), **shape)
    tokens = stream_tokens(config, arguments.tokens)
    models = build_models(config)
    if arguments.run is None:
        keys = jax.random.split(jax.random.key(arguments.seed), 3)
        fresh = (models.base.init(keys[0]), models.gist.init(keys[1]), models.lens.init(keys[2]))
        params = dict(zip(("base", "gist", "lens"), fresh, strict=True))
    else:
        params = load_params(arguments.run, models, ("base", "gist", "lens"))
    return Session(models, params, config), tokens


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
    text = data.SEPARATOR.join(path.read_bytes() for path in data.corpus_files(config.data, "test"))
    if len(text) < count:
        raise ValueError(
            f"tokens must be at most {len(text)}, the bytes of the test split, none of which is read twice, got "
            f"{count}: lower it, add files, or raise data.max_files of the run"
        )
    return np.frombuffer(text, np.uint8, count).astype(np.int32)


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
    steps = len(tokens) // session.interval
    ends = [steps * percent // 100 * session.interval for percent in PERCENT]
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


def _compare(session: Session, tokens: np.ndarray, watch: Watch, title: str, folder: Path) -> list[Row]:
    """Measures the session's rivals where it decides with a full history behind it; writes table and picture."""
    history, interval = session.geometry.window, session.interval
    # Step s ends interval s and decides what the next is read with. As many of these for each stretch.
    steps = np.arange(-(-history // interval), len(watch.losses))
    steps = steps[len(steps) % STRETCHES :]
    cursors, entries = interval * steps, watch.entries[steps - 1]
    losses = {SESSION: watch.losses[steps]}
    losses[SLIDING] = _of_windows(session, tokens, cursors, entries)
    for name, policy in POLICIES.items():
        rival = Session(session.models, session.params, session.config, policy=policy)
        read = rival.append(rival.init(session.config.seed), tokens[: cursors[-1] + interval])[1]
        losses[name] = read.reshape(-1, interval).mean(axis=1)[steps]
    losses[WHOLE] = _of_windows(session, tokens, cursors, np.full_like(entries, history))
    rows = quality_rows(losses, {name: history if name == WHOLE else float(entries.mean()) for name in losses})
    with (folder / "quality.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    apart = {row["policy"]: tuple(row[f"minus_{SESSION}{end}"] for end in ENDS) for row in rows[1:]}
    stream_quality(StreamQuality(title, cursors, losses, apart), folder / "quality.png")
    return rows


def _of_windows(session: Session, tokens: np.ndarray, cursors: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Of the last tokens before each cursor in full."""
    measure = functools.partial(
        streams.window_losses, session.models, capacity=int(lengths.max()), config=session.config
    )
    return np.asarray(jax.jit(measure)(session.params, tokens, cursors.astype(np.int32), lengths.astype(np.int32)))


def quality_rows(losses: dict[str, np.ndarray], entries: dict[str, float]) -> list[Row]:
    """The table: a row for each policy.

    Args:
      losses: float[N] by policy, nats per token on the same horizons in their order; N a multiple of `STRETCHES`.
      entries: mean entries of each policy's contexts.

    Returns:
      Rows; what a policy minus itself would be is None.
    """
    stretches = {name: values.astype(float).reshape(STRETCHES, -1).mean(axis=1) for name, values in losses.items()}
    rows = []
    for name, own in stretches.items():
        row: Row = {"policy": name, "information": rivals.information(name), "entries": entries[name]}
        row["nats"] = float(own.mean())
        for other in (SESSION, SLIDING):
            found: tuple[float | None, ...] = (None,) * 3
            if name != other:
                difference = estimate(own - stretches[other])
                found = difference.mean, *difference.interval
            row |= {f"minus_{other}{end}": value for end, value in zip(ENDS, found, strict=True)}
        rows.append(row | {"stretches": STRETCHES})
    return rows


def _write_summary(folder: Path, summary: Row) -> None:
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _summary(arguments: Arguments, session: Session, rows: list[Row]) -> Row:
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
        "task": session.config.data.task,
        "tokens": arguments.tokens,
        "seed": arguments.seed,
        "interval": session.interval,
        "history": session.geometry.window,
        "entries": session.budget,
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


def _print_quality(console: Console, rows: list[Row]) -> None:
    columns = ("nats", "minus session, 95 % interval", "minus sliding window, 95 % interval")
    console.out(f"  {'':<18}{columns[0]:>7}  {columns[1]:<30}  {columns[2]}", highlight=False)
    for row in rows:
        cells = []
        for other in (SESSION, SLIDING):
            mean, low, high = (row[f"minus_{other}{end}"] for end in ENDS)
            cells.append("" if mean is None else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        console.out(f"  {row['policy']:<18}{row['nats']:>7.4f}  {cells[0]:<30}  {cells[1]}".rstrip(), highlight=False)


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
