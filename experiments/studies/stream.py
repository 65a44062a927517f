"""Reads a long stream through a session: what are its working contexts worth, are they legal, and what do they cost?

    python -m experiments.studies.stream --run runs/stdlib --tokens 100000 --output-dir runs/stream
    python -m experiments.studies.stream --tokens 10000000 --output-dir runs/stream-fresh       models as initialised

Text runs read the files of their test split one after another, recall runs random tokens in which earlier blocks come
again. Every context is checked, and every token's cost taken. Of a run, `summary.json` and `quality.csv` also compare
the session with others on the same stream: a sliding window of as many tokens in full as the session has entries, the
session with other scores than LensNet's (by age; random), and the whole history in full, which has no budget. Intervals
are paired, over consecutive stretches of the stream. Models as they are initialised say nothing of quality; their
contexts reach back to the first of 16 million tokens.

`--until 25` stops after so many percent of the stream and leaves the session, `--resume` goes on with it in another
process. Each row of `metrics.jsonl` has a SHA-256 of the losses and of all that the session has on the device, so that
two ways to read one stream can be compared to the bit.

Leaves these, a row of `metrics.jsonl` for each percent of the stream, `cost.png`, `quality.png`, and a map of what was
shown in the first refocus steps, `stream_start.png`.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments import command
from experiments.studies import stream_cost, stream_rivals
from experiments.studies.stream_rivals import STRETCHES
from experiments.studies.stream_watch import Watch
from experiments.tables import write_json
from lensjax import _settings
from lensjax._settings import Bound, PositiveInt, Seed, settings
from lensjax.models.base_lm import BaseConfig
from lensjax.models.lensnet import LensConfig
from lensjax.plots import style
from lensjax.plots.maps import stream_map
from lensjax.plots.stream import stream_cost as draw_cost
from lensjax.runs import sessions
from lensjax.runs.config import Config
from lensjax.runs.data import corpus as data
from lensjax.runs.data.task import DataConfig
from lensjax.runs.engine.progress import has_bars
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file, lock, run_folder
from lensjax.session import Session, SessionState
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig

FRESH = Config(
    base=BaseConfig(dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=64),
    lens=LensConfig(dim=32, layers=1, heads=4, mlp_dim=64),
    # Contexts of 127 entries, the most below 128 that a cut has, cover all of 16 million tokens.
    context=ContextConfig(window=2**24 + 32, block_size=8, max_lod=7, horizon=32, recent_tokens=8),
    hyper=Hyperparameters(context_start=128 / 2**24, context_end=128 / 2**24),
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
    history: PositiveInt | None = None
    """Tokens that a decision can reach; None for as many as in training, with fresh models for 16 million."""
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
      BlockingIOError: another process reads a stream into this folder.
    """
    config, session, tokens = _prepare(arguments)
    if not arguments.resume:
        run_folder.create_run(arguments.output_dir, config)
    with lock.holding(arguments.output_dir):
        return _read_on(arguments, config, session, tokens)


def _read_on(arguments: Arguments, config: Config, session: Session, tokens: np.ndarray) -> dict[str, Any]:
    """Reads from where the stream is to where it stops, in a folder that is in the hands of this process."""
    console, folder = Console(), arguments.output_dir
    if arguments.resume:
        session, state, rows = _stopped(arguments, session, tokens)
    else:
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
    summary = stream_cost.summarise(arguments, config, session, rows)
    write_json(summary, folder / "summary.json")
    with style.attempt(folder / "cost.png") as path:
        draw_cost(stream_cost.curves(name, rows), path)
    stream_cost.print_summary(console, summary)
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
    if arguments.resume:
        _left(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: choose another --output-dir")
    # The history stays what LensNet was trained on, whatever the interval.
    shape = {"context.horizon": interval, "context.window": stored.context.history + interval}
    config = _settings.replace(stored, seed=arguments.seed, output_dir=str(folder), **shape)
    history = arguments.history or config.geometry.history
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
    folder, left = arguments.output_dir, _left(arguments.output_dir)
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


def _left(folder: Path) -> list[int]:
    """Percents of the stream at which a session was left."""
    left = [int(path.name.removeprefix("session-")) for path in folder.glob("session-*")]
    if not left:
        raise FileNotFoundError(f"{folder} holds no session to resume: read until some percent of the stream first")
    return left


def stream_tokens(config: Config, count: int) -> np.ndarray:
    """The first tokens of a task's stream, int32[count].

    Raises:
      ValueError: the test split is shorter, or the task has no stream.
    """
    if config.data.task == "recall":
        return _recall_stream(config, count)
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


def _recall_stream(config: Config, count: int) -> np.ndarray:
    """Random blocks; every other one, on average, repeats one that the session may still hold."""
    random, size = np.random.default_rng(config.seed), config.context.block_size
    blocks = random.integers(config.base.vocab_size, size=(-(-count // size), size), dtype=np.int32)
    place = np.arange(len(blocks))
    earlier = place - 1 - (random.random(len(blocks)) * np.minimum(place, config.context.history // size)).astype(int)
    for one in np.flatnonzero((random.random(len(blocks)) < 0.5) & (place > 0)):
        blocks[one] = blocks[earlier[one]]
    return blocks.ravel()[:count]


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
        "nll": stream_cost.number(losses.mean()),
        "losses_not_finite": int(np.sum(~np.isfinite(losses))),
        **watch.collect(losses),
        "entries": int(state.view.cached),
        "device_bytes": stream_cost.device_bytes(),
        "history_bytes": state.history.nbytes,
        "process_bytes": stream_cost.process_bytes(),
        "sha256": stream_cost.digest(state, losses),
    }


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
