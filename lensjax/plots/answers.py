"""Questions with known answers: which policy lets the model answer which task."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lensjax.plots.style import INK, dress, new_figure, own_look, write

_ROW, _COLUMN, _NAMES, _ABOVE = 0.26, 0.75, 1.8, 1.7  # inches


@own_look()
def exact_matches(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    order: Callable[[str], Any],
    title: str = "",
) -> Figure:
    """Draws the share of answers that the model would write exactly: a panel a budget, a row a policy, a column a task.

    Args:
      rows: with `task`, `policy`, `against_budget` and `match`; one a task, policy and budget.
      path: where to write; the ending sets the format.
      order: key to sort policies by.
      title: stands above the panels.

    Returns:
      The figure that was written.

    Raises:
      ValueError: there is no row.
    """
    if not rows:
        raise ValueError("exact_matches needs one or more rows, got none")
    budgets, tasks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("against_budget", "task"))
    policies = sorted({row["policy"] for row in rows}, key=order)
    match = {(row["against_budget"], row["policy"], row["task"]): row["match"] for row in rows}
    width, height = _NAMES + _COLUMN * len(tasks), _ABOVE + _ROW * len(policies)
    figure = new_figure(width, height * len(budgets))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    for axes, budget in zip(figure.subplots(len(budgets), 1, squeeze=False)[:, 0], budgets, strict=True):
        cells = np.array([[match.get((budget, one, task), np.nan) for task in tasks] for one in policies])
        axes.imshow(cells, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        for (row, column), value in np.ndenumerate(cells):
            if np.isfinite(value):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=INK)
        axes.set_xticks(range(len(tasks)), [task.replace("_", "\n") for task in tasks], fontsize=8)
        axes.set_yticks(range(len(policies)), policies, fontsize=8)
        dress(axes, f"{budget}x: share of answers written exactly", "", "")
        axes.grid(visible=False)
    write(figure, path)
    return figure
