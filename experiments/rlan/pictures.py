"""Pictures of tasks: the examples, the question, the answer, and what a model makes of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from experiments.rlan.grids import PADDING, size_of
from lensjax.plots.style import INK, MUTED, new_figure, own_look, write

COLORS = ListedColormap(
    ["#1d1d1d", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00", "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25"]
)
"""Colours 0 to 9, as they are usually drawn in this field."""


@own_look()
def predictions(rows: Sequence[Mapping[str, np.ndarray]], path: str | Path, *, title: str = "") -> Figure:
    """Draws tasks, one a row.

    Args:
      rows: for each task `support` int32[N, 2, S, S], `query` int32[2, S, S], and further grids int32[S, S] by the name
        of who answered; cells of theirs that are wrong are dotted.
      path: where to write; the ending sets the format.
      title: above all.

    Returns:
      The figure.

    Raises:
      ValueError: there is no task, or they do not have the same number of grids.
    """
    panels = [_panels(row) for row in rows]
    if not panels or len({len(row) for row in panels}) != 1:
        raise ValueError(f"expected one task or more, of equally many grids, got {[len(row) for row in panels]}")
    figure = new_figure(0.95 * len(panels[0]), 1.15 * len(panels) + 0.5)
    figure.suptitle(title, fontsize=10, fontweight="bold", color=INK)
    axes = figure.subplots(len(panels), len(panels[0]), squeeze=False)
    for row, (task, line) in enumerate(zip(rows, panels, strict=True)):
        for ax, (name, grid, is_answer) in zip(axes[row], line, strict=True):
            _draw(ax, grid, task["query"][1] if is_answer else None)
            ax.set_title(name, fontsize=7, color=MUTED)
    write(figure, path)
    return figure


def _panels(row: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray, bool]]:
    """Name and grid of each panel, and whether it is somebody's answer."""
    examples = [
        (f"{kind} {i + 1}", grid, False)
        for i, pair in enumerate(row["support"])
        for kind, grid in zip(("input", "output"), pair, strict=True)
    ]
    query = [("question", row["query"][0], False), ("answer", row["query"][1], False)]
    return examples + query + [(name, row[name], True) for name in row if name not in ("support", "query")]


def _draw(ax: Axes, grid: np.ndarray, answer: np.ndarray | None) -> None:
    rows, columns = size_of(grid)
    ax.set_axis_off()
    if not rows:
        return
    shown = grid[:rows, :columns]
    ax.imshow(np.ma.masked_equal(shown, PADDING), cmap=COLORS, vmin=0, vmax=9, interpolation="nearest")
    if answer is None:
        return
    wrong = np.argwhere(shown != answer[:rows, :columns])
    ax.scatter(wrong[:, 1], wrong[:, 0], s=14, facecolors="white", edgecolors="black", linewidths=0.8)
