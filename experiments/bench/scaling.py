"""How the time of a training step, and of a session's token, grows with one size at a time.

    python -m experiments.bench.scaling                       into runs/scaling, about 6 minutes on 2 cores
    python -m experiments.bench.scaling --series rollouts window --output-dir runs/two

Each series changes one size of a small shape: rollouts N, entries W, window T, block size K, levels L, width D; and,
for a session that reads a stream, the history that it holds. About 240 entries are seen where W is not what changes.
The points of a series take turns in one process. Beside each measured time the picture shows what the operations on
paper (`experiments.bench.cost`) make of the middle one. Leaves `scaling.csv` and `scaling.png`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from rich.console import Console

from experiments import command
from experiments.bench import programs
from experiments.bench.cost import step_cost
from experiments.bench.programs import Program
from experiments.tables import write_csv
from lensjax import _settings
from lensjax._settings import PositiveInt, settings
from lensjax.models.base_lm import BaseConfig
from lensjax.plots import style
from lensjax.runs.config import Config
from lensjax.runs.store import run_folder
from lensjax.session import Session
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.scoring import ContextConfig

SHAPE = Config(
    batch_size=2,
    base=BaseConfig(dim=128, layers=4, heads=4, kv_heads=2, mlp_dim=384),
    context=ContextConfig(window=512, block_size=8, max_lod=2, horizon=32, recent_tokens=8, rollouts=4),
    hyper=Hyperparameters(context_start=0.5, context_end=0.5, kl_weight=0.1),
    optimizer=OptimizerConfig(warmup_steps=0),
)
"""What each series changes in one place: 240 entries of a history of 480 tokens."""
HISTORY = _settings.replace(SHAPE, **{"context.max_lod": 3, "context.recent_tokens": 40})
SESSION_TOKENS = 512


@dataclass(frozen=True)
class Series:
    """One size that grows."""

    title: str
    values: tuple[int, ...]
    config: Callable[[int], Config]
    is_session: bool = False
    """Whether a session reads a stream, rather than LensNet being trained."""


def _entries(value: int, window: int = SHAPE.context.window) -> dict[str, Any]:
    fraction = value / (window - SHAPE.context.horizon)
    return {"hyper.context_start": fraction, "hyper.context_end": fraction}


def _history(window: int) -> Config:
    return _settings.replace(HISTORY, **{"context.window": window}, **_entries(240, window))


SERIES = {
    "rollouts": Series("rollouts N", (1, 2, 4, 8, 16), lambda n: _settings.replace(SHAPE, **{"context.rollouts": n})),
    "entries": Series("entries W", (120, 180, 240, 360, 480), lambda w: _settings.replace(SHAPE, **_entries(w))),
    "window": Series(
        "window T",
        (512, 1024, 2048, 4096),
        lambda t: _settings.replace(SHAPE, **{"context.window": t}, **_entries(240, t)),
    ),
    "block_size": Series(
        "block size K", (4, 8, 16, 32), lambda k: _settings.replace(SHAPE, **{"context.block_size": k})
    ),
    "levels": Series(
        "levels L (K 4)",
        (1, 2, 3),
        lambda lod: _settings.replace(SHAPE, **{"context.block_size": 4, "context.max_lod": lod}),
    ),
    "width": Series(
        "width D",
        (64, 128, 256, 384),
        lambda d: _settings.replace(
            SHAPE, base=BaseConfig(dim=d, layers=4, heads=d // 32, kv_heads=d // 64, mlp_dim=3 * d)
        ),
    ),
    "history": Series("history of a session", (1024, 4096, 16384, 65536), _history, is_session=True),
}


@settings()
class Arguments:
    """What to measure."""

    series: tuple[str, ...] = tuple(SERIES)
    repetitions: PositiveInt = 7
    """Turns that every point of a series takes after one to warm up."""
    output_dir: Path = Path("runs/scaling")


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(scaling, Arguments, words, description=__doc__)


def scaling(arguments: Arguments) -> list[dict[str, Any]]:
    """Measures all series; returns the rows of `scaling.csv`."""
    if unknown := set(arguments.series) - set(SERIES):
        raise ValueError(f"series may be {', '.join(SERIES)}, got {', '.join(sorted(unknown))}")
    folder, console = run_folder.create_run(arguments.output_dir, SHAPE), Console()
    rows = []
    for name in arguments.series:
        rows += measure(name, SERIES[name], arguments.repetitions, console)
        for row in rows[-len(SERIES[name].values) :]:
            console.out(f"{name:>12} {row['value']:>8}  {row['milliseconds']:10.3f} ms", highlight=False)
    write_csv(rows, folder / "scaling.csv")
    with style.attempt(folder / "scaling.png") as path:
        draw(rows, path)
    console.out(f"{folder / 'scaling.csv'} and its picture are written", highlight=False)
    return rows


def measure(name: str, series: Series, repetitions: int, console: Console) -> list[dict[str, Any]]:
    """Median and quartiles of every point, in milliseconds of a training step or of a session's token."""
    configs = {value: series.config(value) for value in series.values}
    make = _session if series.is_session else _step
    points = {str(value): make(config) for value, config in configs.items()}
    jax.block_until_ready([program() for program in points.values()])
    times = programs.turns(points, repetitions, console)
    unit = SESSION_TOKENS if series.is_session else 1
    rows = []
    for value, config in configs.items():
        low, middle, high = np.percentile(times[str(value)], [25, 50, 75]) / unit
        cost = step_cost(config).total
        rows.append(
            {
                "series": name,
                "value": value,
                "milliseconds": middle,
                "lower_quartile": low,
                "upper_quartile": high,
                "entries": config.capacity,
                "flops": None if series.is_session else cost.flops,
                "traffic_bytes": None if series.is_session else cost.traffic,
            }
        )
    return rows


def _step(config: Config) -> Program:
    return programs.Step(config, config.build_models())


def _session(config: Config) -> Program:
    """Reads some tokens in a session that is past its budget already; shapes do not change as it fills further."""
    models = config.build_models()
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"base": models.base.init(keys[0]), "gist": models.gist.init(keys[1]), "lens": models.lens.init(keys[2])}
    session, random = Session(models, params, config.session), np.random.default_rng(0)
    state, _ = session.append(session.init(), random.integers(config.base.vocab_size, size=2 * config.budget))
    tokens = random.integers(config.base.vocab_size, size=SESSION_TOKENS)
    return functools.partial(session.append, state, tokens)


@style.own_look()
def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each series, both axes logarithmic."""
    names = list(dict.fromkeys(row["series"] for row in rows))
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    figure = style.new_figure(3.0 * columns, 2.6 * lines)
    axes = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    for ax, name in zip(axes, names, strict=False):
        _draw_series(ax, SERIES[name], [row for row in rows if row["series"] == name])
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    style.write(figure, path)


def _draw_series(ax: Axes, series: Series, rows: list[dict[str, Any]]) -> None:
    values, middle = ([row[key] for row in rows] for key in ("value", "milliseconds"))
    spread = [
        [row["milliseconds"] - row["lower_quartile"] for row in rows],
        [row["upper_quartile"] - row["milliseconds"] for row in rows],
    ]
    if series.is_session:
        paper, label = [middle[0]] * len(rows), "as if the history were free"
    else:
        centre = len(rows) // 2
        paper = [row["flops"] / rows[centre]["flops"] * middle[centre] for row in rows]
        label = "operations on paper"
    look: dict[str, Any] = {"color": style.COLORS[0], "marker": "o", "markersize": 4, "linewidth": 1.4}
    ax.plot(values, paper, "--", color=style.MUTED, linewidth=1, label=label)
    ax.errorbar(values, middle, spread, label="measured", **look)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.minorticks_off()
    ax.set_ylim(0.5 * min(*middle, *paper), 2 * max(*middle, *paper))
    style.dress(ax, series.title, "", "ms a token" if series.is_session else "ms a step")
    ax.legend(fontsize=7, **style.LEGEND)


if __name__ == "__main__":
    main()
