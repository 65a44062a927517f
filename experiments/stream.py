"""Reads a long stream through a session: is every working context legal, and does the cost stay the same?

    python experiments/stream.py --run runs/recall-long --tokens 1000000 --output-dir runs/stream
    python experiments/stream.py --tokens 100000 --output-dir runs/stream-fresh       models that nobody has trained

Text runs read the files of their test split one after another, recall runs random tokens in which earlier blocks come
again. Every context is checked. Leaves `summary.json`, a row of `metrics.jsonl` for each percent of the stream, and
two maps of what was looked at: `stream.png` of all of it, `stream_start.png` of its first refocus steps.
"""

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
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from jax.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress

from experiments import command
from experiments.train import load_params
from lensjax import config as configs
from lensjax import context as contexts
from lensjax import data, run_folder
from lensjax.config import BaseConfig, Config, ContextConfig, DataConfig, Hyperparameters, LensConfig
from lensjax.context import MISSING
from lensjax.maps import StreamMap, stream_map
from lensjax.models import build_models
from lensjax.session import Refocus, Session, SessionState

FRESH = Config(
    base=BaseConfig(dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=64),
    lens=LensConfig(dim=32, layers=1, heads=4, mlp_dim=64),
    context=ContextConfig(window=512, block_size=4, max_lod=3, horizon=32, recent_tokens=33),
    hyper=Hyperparameters(context_start=0.5, context_end=0.25),
    data=DataConfig(task="recall"),
)
PERCENT = range(1, 101)
# Refocus steps in the two pictures, at most.
EVEN_STEPS, FIRST_STEPS = 600, 150
Row = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    """What to read, and with which models."""

    run: Path | None = None
    """Run folder whose models read; None takes small ones as they are initialised, to see what reading costs."""
    tokens: int = 1_000_000
    output_dir: Path = Path("runs/stream")
    interval: int = 32
    """Tokens between two refocus steps, in place of the run's horizon."""
    seed: int = 0
    """Of the recall stream, of an allocator that samples, and of fresh models."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    arguments = tyro.cli(Arguments, args=words, description=__doc__)
    with command.errors_end():
        stream(arguments)


def stream(arguments: Arguments) -> dict[str, Any]:
    """Reads the whole stream, and returns what `summary.json` holds.

    Raises:
      ValueError: an argument is bad (nothing is written), or a context is not legal (everything is).
      FloatingPointError: a loss is not finite; everything is written.
    """
    session, tokens = _prepare(arguments)
    folder, console = run_folder.create_run(arguments.output_dir, session.config), Console()
    console.out(f"run folder {folder}, {jax.default_backend()}, seed {arguments.seed}", highlight=False)
    watch, rows = _Watch(session, arguments.tokens), []
    with (
        (folder / "metrics.jsonl").open("w") as file,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        for row in progress.track(_read(session, tokens, watch, arguments), total=len(PERCENT)):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    summary = _summary(arguments, session, watch, rows)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    name = f"{arguments.run or 'fresh models'}: {arguments.tokens:,} tokens read through {session.budget} entries"
    for steps, file_name in ((watch.even_steps, "stream.png"), (watch.first_steps, "stream_start.png")):
        stream_map(watch.map_of(steps, f"{name}, {len(steps):,} of {watch.steps:,} refocus steps"), folder / file_name)
    _print_summary(console, folder, summary)
    _raise_faults(folder, summary)
    return summary


def _prepare(arguments: Arguments) -> tuple[Session, Iterator[int]]:
    """The session and the endless stream that it is to read; all that can be wrong is found here."""
    if arguments.interval < 1:
        raise ValueError(f"interval must be at least 1 token, got {arguments.interval}")
    if arguments.tokens < len(PERCENT) * arguments.interval:
        raise ValueError(
            f"tokens must be at least {len(PERCENT) * arguments.interval}, so that each percent of the stream holds an "
            f"interval of {arguments.interval}, got {arguments.tokens}: raise it or lower interval"
        )
    folder = arguments.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: choose another --output-dir")
    stored = FRESH if arguments.run is None else configs.load(run_folder.config_file(arguments.run))
    config = configs.replace(
        stored,
        seed=arguments.seed,
        output_dir=str(folder),
        **{
            "context.horizon": arguments.interval,
            "context.recent_tokens": max(stored.context.recent_tokens, arguments.interval + 1),
        },
    )
    models = build_models(config)
    if arguments.run is None:
        keys = jax.random.split(jax.random.key(arguments.seed), 3)
        fresh = (models.base.init(keys[0]), models.gist.init(keys[1]), models.lens.init(keys[2]))
        params = dict(zip(("base", "gist", "lens"), fresh, strict=True))
    else:
        params = load_params(arguments.run, models, ("base", "gist", "lens"))
    return Session(models, params, config), itertools.chain.from_iterable(token_pieces(config))


def token_pieces(config: Config) -> Iterator[Any]:
    """An endless stream in pieces: files of the test split for text, blocks for recall, or sequences of another task.

    Raises:
      ValueError: there is no text.
    """
    if config.data.task == "recall":
        return _recall_blocks(config)
    if not config.data.is_text:
        sequences = data.make_iterator(config, "test", seed=config.seed, batch_size=1)
        return (sequence["tokens"][0] for sequence in sequences)
    files = data.corpus_files(config.data, "test")
    if not files:
        raise ValueError("the test split holds no file: add files, or raise data.max_files of the run")
    return (path.read_bytes() + data.SEPARATOR for path in itertools.cycle(files))


def _recall_blocks(config: Config) -> Iterator[list[int]]:
    """Random blocks; every other one, on average, repeats one that the session may still hold."""
    random, size = np.random.default_rng(config.seed), config.context.block_size
    earlier: deque[list[int]] = deque(maxlen=config.context.window // size)
    while True:
        if earlier and random.random() < 0.5:
            block = earlier[random.integers(len(earlier))]
        else:
            block = random.integers(config.base.vocab_size, size=size).tolist()
        earlier.append(block)
        yield block


def _read(session: Session, tokens: Iterator[int], watch: "_Watch", arguments: Arguments) -> Iterator[Row]:
    """Reads the stream, and gives a row for each percent of it; all but the last are whole intervals."""
    ends = [watch.steps * percent // 100 * session.interval for percent in PERCENT]
    ends[-1] = arguments.tokens
    state, start = session.init(arguments.seed), 0
    for percent, end in zip(PERCENT, ends, strict=True):
        chunk = np.fromiter(itertools.islice(tokens, end - start), np.int32, end - start)
        started = time.perf_counter()
        state, losses = session.append(state, chunk, on_refocus=watch.look)
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


class _Watch:
    """Checks every refocus step, and remembers those that will be drawn."""

    def __init__(self, session: Session, tokens: int) -> None:
        self.session, self.steps = session, tokens // session.interval
        self.even_steps = np.unique(np.linspace(1, self.steps, EVEN_STEPS).astype(int))
        self.first_steps = np.arange(1, min(self.steps, FIRST_STEPS) + 1)
        self._wanted = {*self.even_steps.tolist(), *self.first_steps.tolist()}
        self._check = jax.jit(self._checked)
        self._tally = _no_tally()
        self._step, self._fetched = 0, 0
        self._frames: dict[int, Any] = {}
        self._losses: list[np.ndarray] = []

    def look(self, state: SessionState, report: Refocus) -> None:
        """Called after every refocus step; fetches nothing, so that the device is not waited for."""
        self._step += 1
        seen = {"context": state.context, "held": state.tree.length, "cached": state.cache.length}
        self._tally = self._check(self._tally, seen, report, self._step)
        if self._step in self._wanted:
            frame = seen | {"first": state.forgotten, "swap_rate": report.swap_rate}
            self._frames[self._step] = jax.tree.map(jnp.copy, frame)

    def collect(self, losses: np.ndarray) -> Row:
        """What was found since the last call; `losses` are those of the tokens read since then."""
        tally, self._tally = jax.device_get(self._tally), _no_tally()
        for step in self._frames:
            if step > self._fetched:
                self._frames[step] = self._frame(step, jax.device_get(self._frames[step]))
        self._fetched = self._step
        steps, interval = int(tally["refocus_steps"]), self.session.interval
        self._losses.append(losses[: steps * interval].reshape(steps, interval).mean(axis=1))
        swap_rate = float(tally.pop("swap_rate")) / steps
        return {name: int(value) for name, value in tally.items()} | {"swap_rate": swap_rate}

    def map_of(self, steps: np.ndarray, title: str) -> StreamMap:
        """The frames of some refocus steps."""
        frames = [self._frames[step] for step in steps.tolist()]
        losses = np.split(np.concatenate(self._losses)[: steps[-1]], steps[:-1])
        return StreamMap(
            title=title,
            cursors=steps * self.session.interval,
            first=np.array([first for first, _, _ in frames]),
            cuts=np.stack([cut for _, cut, _ in frames]),
            swap_rate=np.array([swap_rate for _, _, swap_rate in frames]),
            nll=np.array([since_the_one_before.mean() for since_the_one_before in losses]),
            max_lod=self.session.geometry.max_lod,
            block_size=self.session.geometry.block_size,
        )

    def _frame(self, step: int, seen: Row) -> tuple[int, np.ndarray, float]:
        """First token, cut int8[T] and swap rate of one step."""
        lods = seen["context"].lod[seen["context"].valid]
        cut = np.repeat(lods, self.session.geometry.block_size**lods)
        padded = np.pad(cut, (0, self.session.geometry.window - len(cut)), constant_values=MISSING)
        return int(seen["first"]), padded.astype(np.int8), float(seen["swap_rate"])

    def _checked(self, tally: dict[str, Array], seen: Row, report: Refocus, step: Array) -> dict[str, Array]:
        geometry, held = self.session.geometry, seen["held"]
        over, saved = held - (self.session.budget - self.session.interval), geometry.block_size - 1
        # The longest that a cut can be and leave room for the next interval.
        length = held - jnp.maximum(-(-over // saved), 0) * saved
        holds = contexts.invariants(
            seen["context"],
            window=held,
            block_size=geometry.block_size,
            length=length,
            recent_tokens=geometry.recent_tokens,
        )
        holds["cache"] = seen["cached"] == length
        is_legal = functools.reduce(jnp.logical_and, holds.values())
        found: dict[str, ArrayLike] = {f"broke_{name}": ~ok for name, ok in holds.items()}
        found |= {"refocus_steps": 1, "swaps": report.swaps, "swap_rate": report.swap_rate, "illegal_steps": ~is_legal}
        found["first_illegal_step"] = jnp.where(is_legal | (tally["first_illegal_step"] > 0), 0, step)
        return {name: total + jnp.asarray(found[name], total.dtype) for name, total in tally.items()}


def _no_tally() -> dict[str, Array]:
    broke = [f"broke_{name}" for name in ("alignment", "contiguity", "budget", "tail", "cache")]
    names = ["refocus_steps", "illegal_steps", "first_illegal_step", *broke, "swaps"]
    return {name: jnp.zeros((), jnp.int32) for name in names} | {"swap_rate": jnp.zeros(())}


def _summary(arguments: Arguments, session: Session, watch: _Watch, rows: list[Row]) -> Row:
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
        "window": session.geometry.window,
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


def _print_summary(console: Console, folder: Path, summary: Row) -> None:
    for name in ("refocus_steps", "illegal_steps", "losses_not_finite", "seconds", "tokens_per_second"):
        console.out(f"  {name:<32}{summary[name]:>12,}", highlight=False)
    for name in ("microseconds_per_token_early", "microseconds_per_token_late", "late_over_early"):
        console.out(f"  {name:<32}{summary[name]:>12.3f}", highlight=False)
    device = list(summary["device_bytes"].values())
    console.out(f"  {'device_bytes':<32}{min(device):>12,} to {max(device):,}", highlight=False)
    console.out(f"pictures and metrics are in {folder}", highlight=False)


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
