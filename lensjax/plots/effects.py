"""A forest plot of a sweep: what every setting changes, with its interval, knob by knob."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lensjax.evaluation.effects import DEFAULT, JOINT, Effect
from lensjax.evaluation.statistics import LEVEL
from lensjax.plots.style import COLORS, FAINT, INK, LEGEND, MUTED, dress, new_figure, own_look, write

LOWER, HIGHER, NEITHER = COLORS[0], COLORS[1], "#a0a0a0"
# Inches: a row, the title of a panel with its gaps, what stands above and below all panels, the width of a column.
_ROW, _AROUND_ROWS, _AROUND_PANELS, _WIDTH = 0.2, 0.45, 1.1, 4.5
_NOTE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8}


class _Panel(NamedTuple):
    title: str
    rows: list[Effect]


@own_look()
def forest(effects: Sequence[Effect], path: str | Path, *, default: Mapping[str, Any], title: str = "") -> Figure:
    """Draws what each setting adds to the held-out loss of the default, with its 95 % interval; left of 0 is better.

    One panel a knob, down the first column and then the second, in the order in which knobs come. All share one axis;
    what would squeeze the others ends in an open triangle at its edge, beside the difference where that is beyond too.

    Args:
      effects: as returned by `effects.effects`.
      path: where to write; the ending sets the format.
      default: values that the default has in the fields that settings change.
      title: stands above the panels.

    Returns:
      The figure that was written.

    Raises:
      ValueError: no setting beside the default has seeds to compare.
    """
    settings = [one for one in effects if one.knob != DEFAULT]
    if not any(one.seeds for one in settings):
        raise ValueError(f"no setting beside the default has seeds to compare: {[one.name for one in effects]}")
    knobs = dict.fromkeys(one.knob for one in settings)
    columns = _columns([_Panel(_title(knob, default), _rows(settings, knob)) for knob in knobs])
    heights = [_height(column) for column in columns]
    figure = new_figure(_WIDTH * len(columns), max(heights) + _AROUND_PANELS)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    limits = _limits(settings)
    outer = figure.add_gridspec(1, len(columns))
    for place, (column, height) in enumerate(zip(columns, heights, strict=True)):
        # The layout adds titles and gaps; what stays empty keeps the rows of both columns equally high.
        ratios = [*(len(panel.rows) for panel in column), (max(heights) - height) / _ROW + 1e-3]
        inner = outer[place].subgridspec(len(ratios), 1, height_ratios=ratios)
        for row, panel in enumerate(column):
            _draw_panel(figure.add_subplot(inner[row]), panel, limits, is_last=panel is column[-1])
    figure.legend(handles=_handles(settings), loc="outside lower center", ncols=3, fontsize=8, **LEGEND)
    write(figure, path)
    return figure


def _title(knob: str, default: Mapping[str, Any]) -> str:
    return f"{knob} (default {', '.join(str(default[name]) for name in knob.split(JOINT))})"


def _rows(settings: Sequence[Effect], knob: str) -> list[Effect]:
    """The settings of one knob: by value where all values are numbers, else as they come."""
    rows = [one for one in settings if one.knob == knob]
    try:
        return sorted(rows, key=lambda one: float(one.value))
    except ValueError:
        return rows


def _columns(panels: list[_Panel]) -> list[list[_Panel]]:
    """One column of few panels, else two of about one height."""
    if len(panels) < 4:
        return [panels]
    splits = [[panels[:place], panels[place:]] for place in range(1, len(panels))]
    return min(splits, key=lambda columns: max(map(_height, columns)))


def _height(column: Sequence[_Panel]) -> float:
    return sum(_AROUND_ROWS + _ROW * len(panel.rows) for panel in column)


def _limits(settings: Sequence[Effect]) -> tuple[float, float]:
    """Ends of the axis: around all intervals but those that reach several times as far as most."""
    ends = np.array([_ends(one) for one in settings if one.seeds])
    reach = np.abs(ends).max(axis=1)
    kept = ends[reach <= 3 * np.quantile(reach, 0.75)]
    low, high = kept.min(initial=0), kept.max(initial=0)
    margin = 0.06 * (high - low) or 1e-3
    return float(low - margin), float(high + margin)


def _ends(one: Effect) -> tuple[float, float]:
    """The interval of the difference; the difference itself where it has none."""
    if one.difference_low is None or one.difference_high is None:
        return one.difference, one.difference
    return one.difference_low, one.difference_high


def _draw_panel(ax: Axes, panel: _Panel, limits: tuple[float, float], *, is_last: bool) -> None:
    ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for row, one in enumerate(panel.rows):
        if one.seeds:
            _draw_row(ax, row, one, limits)
        else:
            ax.annotate("no seed to compare", (0, row), (5, 0), color=MUTED, **_NOTE)
    dress(ax, "", "difference in NLL to the default, nats per token" if is_last else "", "")
    # Long labels leave less than the width of a column for what stands above the axis.
    ax.set_title(textwrap.fill(panel.title, 40), loc="left", pad=4, fontsize=9, fontweight="bold", parse_math=False)
    ax.grid(visible=False, axis="y")
    ax.grid(axis="x", color=FAINT, linewidth=0.6)
    ax.spines[:].set_visible(False)
    ax.set(xlim=limits, ylim=(len(panel.rows) - 0.5, -0.5))
    ax.locator_params(axis="x", nbins=6)
    ax.set_yticks(range(len(panel.rows)), labels=[_label(one) for one in panel.rows], parse_math=False)
    ax.tick_params(length=0, labelbottom=is_last)
    ax.tick_params(axis="y", labelcolor=INK)


def _label(one: Effect) -> str:
    return f"{one.value} ({one.diverged} diverged)" if one.diverged else one.value


def _draw_row(ax: Axes, row: int, one: Effect, limits: tuple[float, float]) -> None:
    color = _color(one)
    low, high = _ends(one)
    left, right = limits
    ax.hlines(row, max(low, left), min(high, right), color=color, linewidth=1.8)
    for is_beyond, edge, marker in ((low < left, left, "<"), (high > right, right, ">")):
        if is_beyond:
            ax.plot(edge, row, marker, color=color, markersize=6, markerfacecolor="white", clip_on=False)
    if left <= one.difference <= right:
        fill = color if one.p is not None else "white"
        ax.plot(one.difference, row, "o", color=color, markersize=5, markerfacecolor=fill)
    else:
        edge, side, align = (left, 8, "left") if one.difference < left else (right, -8, "right")
        ax.annotate(f"{one.difference:+.3f}", (edge, row), (side, 0), ha=align, color=color, **_NOTE)


def _color(one: Effect) -> str:
    if not one.is_distinguishable:
        return NEITHER
    return LOWER if one.difference < 0 else HIGHER


def _handles(settings: Sequence[Effect]) -> list[Line2D]:
    """What the colours say, of those that are there."""
    colors = {
        LOWER: f"lower NLL, p < {LEVEL} (Holm)",
        HIGHER: f"higher NLL, p < {LEVEL} (Holm)",
        NEITHER: "not distinguishable from zero",
    }
    used = {_color(one) for one in settings}
    return [
        Line2D([], [], color=color, marker="o", markersize=5, linewidth=1.8, label=label)
        for color, label in colors.items()
        if color in used
    ]
