"""Curves of runs that learn to think: reward, entropy, and the accuracy with and without thoughts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lensjax.plots.style import COLORS, LEGEND, MUTED, dress, new_figure, noise_width, own_look, running_mean, write
from lensjax.runs.store.log import Row

_ACCURACIES = {
    "accuracy_sampled": "own thoughts",
    "accuracy_without": "none",
    "accuracy_random": "random",
    "accuracy_foreign": "another prompt's",
}


@own_look()
def training(runs: Mapping[str, Sequence[Sequence[Row]]], path: str | Path, *, title: str = "") -> Figure:
    """Draws how runs went: reward, entropy of the thoughts, and for each arm the held-out accuracies.

    Args:
      runs: by the name of an arm, the rows of each of its runs (`lensjax.runs.store.log.read_rows`); thin lines are
        runs, bold ones their means, as far as the shortest run goes.
      path: where to write; the ending sets the format.
      title: above all.

    Returns:
      The figure.

    Raises:
      ValueError: there is no run, or one has not trained its thoughts.
    """
    if not runs or not all(_points(rows, "rl/reward") for arm in runs.values() for rows in arm):
        raise ValueError(f"expected one run or more that trained by REINFORCE, got arms {', '.join(runs) or 'none'}")
    figure = new_figure(4.4 * (2 + len(runs)), 3.4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False)
    axes = figure.subplots(1, 2 + len(runs))
    for ax, name, label, unit in (
        (axes[0], "rl/reward", "Reward of a thought", "nats"),
        (axes[1], "rl/entropy", "Entropy of a thought token", "nats"),
    ):
        for color, (arm, of_runs) in zip(COLORS, runs.items(), strict=False):
            _draw(ax, [_points(rows, name) for rows in of_runs], color, arm, is_noisy=True)
        _finish(ax, label, unit)
    for ax, (arm, of_runs) in zip(axes[2:], runs.items(), strict=True):
        for color, (name, label) in zip(COLORS, _ACCURACIES.items(), strict=False):
            _draw(ax, [_points(rows, f"eval/{name}") for rows in of_runs], color, label, is_noisy=False)
        _finish(ax, f"Held-out accuracy, {arm}", "share of questions")
        ax.set_ylim(0, 1.03)
    write(figure, path)
    return figure


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """A metric by episode; what was measured of the baked model, where the run baked it, stands at 0."""
    baked = [row for row in rows if row["phase"] == "bake" and name in row]
    start: list[tuple[float, float]] = [(0.0, min(baked, key=lambda row: row["eval/loss"])[name])] if baked else []
    return start + [(row["step"], row[name]) for row in rows if row["phase"] == "rl" and name in row]


def _draw(ax: Axes, runs: Sequence[Sequence[tuple[float, float]]], color: str, label: str, *, is_noisy: bool) -> None:
    # Early stopping may have ended some before others.
    shortest = min(len(points) for points in runs)
    curves = np.asarray([points[:shortest] for points in runs], float)
    steps, values = curves[0, :, 0], curves[:, :, 1]
    if is_noisy:
        values = np.stack([running_mean(row, width=noise_width(values.shape[1])) for row in values])
    for row in values:
        ax.plot(steps, row, color=color, linewidth=0.7, alpha=0.35)
    ax.plot(steps, values.mean(axis=0), color=color, linewidth=1.8, label=label, marker="" if is_noisy else "o", ms=3.5)


def _finish(ax: Axes, title: str, unit: str) -> None:
    dress(ax, title, "episode", unit, pad=20)
    ax.axhline(0, color=MUTED, linewidth=0.9, linestyle=":", zorder=1)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=7, **LEGEND)
    ax.set_xlim(left=0)
