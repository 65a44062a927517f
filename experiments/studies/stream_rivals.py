"""A session's rivals on the stream that it has read: what they cost, and how far apart they are.

A sliding window of as many tokens in full as the session has entries; sessions with other scores than LensNet's; the
whole history in full, which has no budget.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.studies.stream_watch import Watch
from experiments.tables import write_csv
from lensjax.evaluation import rivals, streams
from lensjax.evaluation.statistics import estimate
from lensjax.plots import style
from lensjax.plots.stream import StreamQuality, stream_quality
from lensjax.runs.config import Config
from lensjax.session import Session

# Consecutive pieces of the stream, over which the intervals of a comparison are.
STRETCHES = 20
ENDS = ("", "_low", "_high")
SESSION, SLIDING, WHOLE = "session", "sliding_window", "whole_window"
POLICIES = {"collapse_oldest": streams.collapse_oldest, "random_scores": streams.random_scores}
Row = dict[str, Any]


def compare(config: Config, session: Session, tokens: np.ndarray, watch: Watch, title: str, folder: Path) -> list[Row]:
    """Measures the rivals where a session decides with a full history behind it; writes table and picture.

    Args:
      config: the run's, whose session it is.
      session: the session.
      tokens: int32[S], the stream.
      watch: of the session that has read it.
      title: of the picture.
      folder: for `quality.csv` and `quality.png`.

    Returns:
      `quality_rows`.
    """
    history, interval = config.context.history, config.context.horizon
    # Step s ends interval s and decides what the next is read with. As many of these for each stretch.
    steps = np.arange(-(-history // interval), len(watch.losses))
    steps = steps[len(steps) % STRETCHES :]
    cursors, entries = interval * steps, watch.entries[steps - 1]
    each = {SESSION: watch.token_losses[steps]}
    each[SLIDING] = _of_windows(config, session, tokens, cursors, entries)
    for name, policy in POLICIES.items():
        rival = Session(session.models, session.params, session.config, policy=policy)
        read = rival.append(rival.init(config.seed), tokens[: cursors[-1] + interval])[1]
        each[name] = read.reshape(-1, interval)[steps]
    each[WHOLE] = _of_windows(config, session, tokens, cursors, np.full_like(entries, history))
    find = functools.partial(
        streams.key_tokens_of, session.models, budget=session.config.budget, context=config.context
    )
    is_key = np.asarray(jax.jit(find)(session.params, tokens, cursors.astype(np.int32)))
    shown = {name: history if name == WHOLE else float(entries.mean()) for name in each}
    # A session decides over its entries and the interval that it has read since.
    rows_read = rivals.lens_rows(config.lens, config.geometry, round(float(entries.mean()))) + interval
    reads = {name: rivals.reads(name, history=history, horizon=interval, rows=rows_read) for name in each}
    rows = quality_rows(each, is_key, shown, reads)
    losses = {name: values.mean(axis=1) for name, values in each.items()}
    write_csv(rows, folder / "quality.csv")
    apart = {row["policy"]: tuple(row[f"minus_{SESSION}{end}"] for end in ENDS) for row in rows[1:]}
    with style.attempt(folder / "quality.png") as path:
        stream_quality(StreamQuality(title, cursors, losses, apart), path)
    return rows


def _of_windows(
    config: Config, session: Session, tokens: np.ndarray, cursors: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Of the last tokens before each cursor in full."""
    context, capacity = config.context, int(lengths.max())
    measure = functools.partial(streams.window_token_nll, session.models, capacity=capacity, context=context)
    return np.asarray(jax.jit(measure)(session.params, tokens, cursors.astype(np.int32), lengths.astype(np.int32)))


def quality_rows(
    losses: dict[str, np.ndarray], is_key: np.ndarray, entries: dict[str, float], reads: dict[str, int]
) -> list[Row]:
    """The table: a row for each policy.

    Args:
      losses: float[N, H] by policy, nats of each token of the same horizons in their order; N a multiple of
        `STRETCHES`.
      is_key: bool[N, H], the key tokens of these.
      entries: mean entries of each policy's contexts.
      reads: vectors that each policy looks at for one decision.

    Returns:
      Rows; what a policy minus itself would be is None.
    """
    losses = {name: values.astype(float) for name, values in losses.items()}
    every = np.ones_like(is_key)
    stretches = {name: _by_stretch(values, every) for name, values in losses.items()}
    key_stretches = {name: _by_stretch(values, is_key) for name, values in losses.items()}
    rows = []
    for name, own in stretches.items():
        row: Row = {
            "policy": name,
            "information": rivals.information(name),
            "reads": reads[name],
            "entries": entries[name],
        }
        row["nats"] = float(losses[name].mean())
        for other in (SESSION, SLIDING):
            row |= _difference(f"minus_{other}", own, stretches[other], is_same=name == other)
        row["key_nats"] = float(losses[name][is_key].mean()) if is_key.any() else None
        row |= _difference(f"key_minus_{SLIDING}", key_stretches[name], key_stretches[SLIDING], is_same=name == SLIDING)
        rows.append(row | {"key_tokens": int(is_key.sum()), "stretches": STRETCHES})
    return rows


def _by_stretch(losses: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean over the tokens of each stretch that count, float[STRETCHES]; NaN where none does."""
    total, count = (values.reshape(STRETCHES, -1).sum(axis=1) for values in (losses * where, where))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _difference(name: str, own: np.ndarray, other: np.ndarray, *, is_same: bool) -> Row:
    """Mean of a difference and its interval over the stretches that have one; None where there is nothing to say."""
    cells: tuple[float | None, ...] = (None,) * 3
    both = own - other
    if not is_same and np.isfinite(both).sum() > 1:
        difference = estimate(both[np.isfinite(both)])
        cells = difference.mean, *difference.interval
    return {f"{name}{end}": value for end, value in zip(ENDS, cells, strict=True)}


def print_table(console: Console, rows: list[Row]) -> None:
    """The same in lines for a terminal."""
    columns = ("nats", "minus session, 95 % interval", "minus sliding window", "on key tokens minus sliding window")
    console.out(f"  {'':<18}{columns[0]:>7}  {columns[1]:<30}  {columns[2]:<30}  {columns[3]}", highlight=False)
    for row in rows:
        cells = []
        for name in (f"minus_{SESSION}", f"minus_{SLIDING}", f"key_minus_{SLIDING}"):
            mean, low, high = (row[f"{name}{end}"] for end in ENDS)
            cells.append("" if mean is None else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        console.out(
            f"  {row['policy']:<18}{row['nats']:>7.4f}  {cells[0]:<30}  {cells[1]:<30}  {cells[2]}".rstrip(),
            highlight=False,
        )
