"""Reads a long stream through a session: what are its working contexts worth, are they legal, and what do they cost?

    python -m experiments.studies.stream --run runs/stdlib --tokens 100000 --output-dir runs/stream
    python -m experiments.studies.stream --tokens 10000000 --output-dir runs/stream-fresh       models as initialised

Text runs read the files of their test split one after another, recall runs random tokens in which earlier blocks come
again. Every context is checked, and every token's cost taken. Of a run, `summary.json` and `quality.csv` also compare
the session with others on the same stream: a sliding window of as many tokens in full as the session has entries, the
session with other scores than LensNet's (by age; random), and the whole history in full, which has no budget. Intervals
are paired, over consecutive stretches of the stream. Models as they are initialised say nothing of quality; their
contexts reach back to the first of 16 million tokens.

`--until 25` stops after so many percent of the stream and leaves the session, `--resume` goes on with it in a process of
its own. Each row of `metrics.jsonl` has a SHA-256 of the losses and of all that the session has on the device, so that
two ways to read one stream can be compared to the bit.

Leaves these, a row of `metrics.jsonl` for each percent of the stream, `cost.png`, `quality.png`, and a map of what was
shown in the first refocus steps, `stream_start.png`.
"""

import hashlib
import itertools
import json
import mmap
import resource
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

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
from lensjax._settings import Bound, PositiveInt, Seed, settings
from lensjax.models.base_lm import BaseConfig
from lensjax.models.lensnet import LensConfig
from lensjax.plots import style
from lensjax.plots.maps import stream_map
from lensjax.plots.stream import StreamCost, stream_cost
from lensjax.runs import sessions
from lensjax.runs.config import Config
from lensjax.runs.data import corpus as data
from lensjax.runs.data.task import DataConfig
from lensjax.runs.engine.progress import has_bars
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file, run_folder
from lensjax.session import Session, SessionState
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig

FRESH = Config(
    base=BaseConfig(dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=64),
    lens=LensConfig(dim=32, layers=1, heads=4, mlp_dim=64),
    context=ContextConfig(window=544, block_size=8, max_lod=7, horizon=32, recent_tokens=8),
    hyper=Hyperparameters(context_start=0.5, context_end=0.25),
    data=DataConfig(task="recall"),
)
FRESH_HISTORY = 2**24
"""Tokens that contexts of 128 entries of these can cover, and more than are read."""
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
    history: PositiveInt | None = None
    """Tokens that a decision can reach; None for as many as in training, with fresh models for the whole stream."""
    until: Annotated[int, Bound(1, 100)] = 100
    """Percent of the stream after which to stop and to leave the session, for `resume`."""
    resume: bool = False
    """Whether to go on with what is in the output folder; all else must be as it was. Neither is for `run`."""
    seed: Seed = 0
    """Of the recall stream, of random scores, of an allocator that samples, and of fresh models."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(stream, Arguments, words, description=__doc__)


def stream(arguments: Arguments) -> dict[str, Any]:
    """Reads the whole stream, and returns what `summary.json` holds; nothing where it is stopped before.

    Raises:
      ValueError: an argument is bad (nothing is written), or a context is not legal (all but the comparison is).
      FloatingPointError: a loss is not finite; likewise.
    """
    config, session, tokens = _prepare(arguments)
    console, folder = Console(), arguments.output_dir
    if arguments.resume:
        session, state, rows = _stopped(arguments, session, tokens)
    else:
        run_folder.create_run(folder, config)
        state, rows = session.init(arguments.seed), []
    console.out(f"run folder {folder}, {jax.default_backend()}, seed {arguments.seed}", highlight=False)
    watch = Watch(session, steps=state.read // session.config.interval)
    models_of = "fresh models" if arguments.run is None else f"{config.data.task}, seed {config.seed}"
    name = f"{models_of}: {arguments.tokens:,} tokens read through {config.budget} entries"
    left = range(len(rows) + 1, arguments.until + 1)
    with (
        (folder / "metrics.jsonl").open("a") as file,
        Progress(console=console, transient=True, disable=not has_bars(console)) as progress,
    ):
        for percent in progress.track(left):
            state, row = _read(session, state, tokens, watch, percent)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    if not arguments.resume:
        with style.attempt(folder / "stream_start.png") as path:
            stream_map(watch.map_of_first_steps(f"{name}: the first refocus steps"), path)
    if arguments.until < PERCENT[-1]:
        place = sessions.save(session, state, folder / f"session-{arguments.until}")
        console.out(f"stopped at token {state.read:,}: the session is in {place}", highlight=False)
        return {}
    summary = _summary(arguments, config, session, rows)
    write_json(summary, folder / "summary.json")
    with style.attempt(folder / "cost.png") as path:
        stream_cost(_cost(name, rows), path)
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
        if arguments.resume or arguments.until < PERCENT[-1]:
            raise ValueError("until and resume are for fresh models, whose session is not compared: leave out run")
    if arguments.tokens < needed:
        raise ValueError(
            f"tokens must be at least {needed}, so that each percent of the stream holds an interval of {interval}, "
            f"and what is behind the first history of a run {STRETCHES}, got {arguments.tokens}: raise it or lower "
            "interval"
        )
    folder = arguments.output_dir
    if not arguments.resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: choose another --output-dir")
    # The history stays what LensNet was trained on, whatever the interval.
    shape = {"context.horizon": interval, "context.window": stored.context.history + interval}
    config = _settings.replace(stored, seed=arguments.seed, output_dir=str(folder), **shape)
    history = arguments.history or (FRESH_HISTORY if arguments.run is None else config.geometry.history)
    reach = replace(config.session, geometry=replace(config.geometry, history=history))
    tokens = stream_tokens(config, arguments.tokens)
    models = config.build_models()
    if arguments.run is None:
        keys = jax.random.split(jax.random.key(arguments.seed), 3)
        fresh = (models.base.init(keys[0]), models.gist.init(keys[1]), models.lens.init(keys[2]))
        params = dict(zip(("base", "gist", "lens"), fresh, strict=True))
    else:
        params = load_params(arguments.run, stored, models, ("base", "gist", "lens"))
    return config, Session(models, params, reach), tokens


def _stopped(arguments: Arguments, session: Session, tokens: np.ndarray) -> tuple[Session, SessionState, list[Row]]:
    """The session that was left in the output folder, all that it remembers, and the rows so far."""
    folder = arguments.output_dir
    left = [int(path.name.removeprefix("session-")) for path in folder.glob("session-*")]
    if not left:
        raise FileNotFoundError(f"{folder} holds no session to resume: read until some percent of the stream first")
    loaded, state = sessions.load(folder / f"session-{max(left)}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    history = state.history
    is_same = rows[-1]["tokens_read"] == state.read == _ends(len(tokens), session.config.interval)[len(rows) - 1]
    is_same &= np.array_equal(
        history.tokens.between(history.forgotten, state.read), tokens[history.forgotten : state.read]
    )
    if not is_same or loaded.config != session.config or loaded.models != session.models:
        raise ValueError(f"{folder} holds the session of another stream: give the arguments that it was begun with")
    return loaded, state, rows


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


def _ends(tokens: int, interval: int) -> list[int]:
    """Tokens before the end of each percent of the stream; all but the last end with an interval."""
    ends = [tokens // interval * percent // 100 * interval for percent in PERCENT]
    return [*ends[:-1], tokens]


def _read(
    session: Session, state: SessionState, tokens: np.ndarray, watch: Watch, percent: int
) -> tuple[SessionState, Row]:
    """Reads a percent of the stream; its row."""
    start, end = state.read, _ends(len(tokens), session.config.interval)[percent - 1]
    started, cpu_started = time.perf_counter(), time.process_time()
    state, losses = session.append(state, tokens[start:end], on_refocus=watch.look)
    jax.block_until_ready(state.view)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return state, {
        "percent": percent,
        "tokens_read": end,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "microseconds_per_token": 1e6 * seconds / (end - start),
        "nll": _number(losses.mean()),
        "losses_not_finite": int(np.sum(~np.isfinite(losses))),
        **watch.collect(losses),
        "entries": int(state.view.cached),
        "device_bytes": _device_bytes(),
        "history_bytes": state.history.nbytes,
        "process_bytes": _process_bytes(),
        "sha256": _digest(state, losses),
    }


def _digest(state: SessionState, losses: np.ndarray) -> str:
    """Of the losses of some tokens, and of all that is on the device behind them."""
    digest = hashlib.sha256(losses.tobytes())
    for leaf in jax.tree.leaves(replace(state.view, key=jax.random.key_data(state.view.key))):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


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


def _summary(arguments: Arguments, config: Config, session: Session, rows: list[Row]) -> Row:
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
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _cost(title: str, rows: list[Row]) -> StreamCost:
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


def _print_summary(console: Console, summary: Row) -> None:
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
