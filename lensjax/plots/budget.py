"""How good each policy is at each budget."""

import itertools
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lensjax.plots.style import COLORS, INK, LEGEND, MUTED, Row, dress, finite_or_nan, new_figure, own_look, write

_FULL, _OWN, _HINDSIGHT = "full", "lensnet", "hindsight"
_OWN_COLORS = (COLORS[5], COLORS[0])
_OTHER_COLORS = (INK, *COLORS[1:5], "#882255", "#999933", "#332288")
_MARKERS = "osD^vPX<>ph"


class _QualityPanel(NamedTuple):
    column: str
    title: str
    unit: str
    limits: tuple[float, float] = (-math.inf, math.inf)
    """Values beyond are drawn at the limit."""


_QUALITY_PANELS = (
    _QualityPanel("nll", "Held-out loss (lower is better)", "nats per token"),
    _QualityPanel("gap_closed_oracle", "Gap closed", "share of the way from recency (0) to oracle (1)", (-0.5, 1.25)),
    _QualityPanel("hit_rate", "Hit rate", "share of sequences whose answer is shown in full"),
)
_LOW, _HIGH = "nll_ci_low", "nll_ci_high"
_NUMBERS = (*(panel.column for panel in _QUALITY_PANELS), _LOW, _HIGH)


@own_look()
def quality_at_budget(rows: Sequence[Row], path: str | Path, *, title: str = "") -> Figure:
    """Draws what each policy makes of each budget: loss, share of the gap closed, hit rate.

    Points are means over seeds; bars reach from the lowest end of the seeds' intervals to the highest. Points of one
    budget stand side by side. Panels that no row defines are left out.

    Args:
      rows: of one task, each of a policy, budget and seed, with the columns `task`, `policy`, `information` (causal or
        hindsight), `entries` (the budget), `budget_ratio` (tokens per entry), `nll`, `nll_ci_low` and `nll_ci_high`
        (nats per token), `gap_closed_oracle` and `hit_rate`; others are not read. Numbers may be strings, empty where
        they are not defined. The policy "full" has no budget and becomes a line across; those named "lensnet..." stand
        out; what knows the horizon is dotted, and last in the legend.
      path: where to write; the ending sets the format.
      title: stands above the panels.

    Returns:
      The figure that was written.

    Raises:
      ValueError: there are no rows or not all columns, several tasks, or a policy without a budget or a loss.
    """
    curves = _budget_curves(rows)
    ticks = {float(row["entries"]): float(row["budget_ratio"]) for row in rows if row["policy"] != _FULL}
    panels = [panel for panel in _QUALITY_PANELS if any(np.isfinite(one.values[panel.column]).any() for one in curves)]
    figure = new_figure(1.6 + 4.6 * len(panels), 4.8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    for place, panel in enumerate(panels, start=1):
        ax = figure.add_subplot(1, len(panels), place)
        _draw_quality(ax, panel, curves, ticks)
    # From worst to best where they differ most, and apart from them what no policy could choose.
    lines = [line for line in figure.axes[0].get_lines() if not str(line.get_label()).startswith("_")]
    handles = sorted(lines, key=lambda line: (line.get_linestyle() == ":", -np.asarray(line.get_ydata())[0]))
    legend = figure.legend(handles=handles, loc="outside right center", fontsize=9, labelspacing=0.9, **LEGEND)
    for text in legend.get_texts():
        text.set(fontweight="bold" if text.get_text().startswith(_OWN) else "normal", parse_math=False)
    write(figure, path)
    return figure


class _BudgetCurve(NamedTuple):
    entries: np.ndarray
    """float[N], rising; infinity for no budget."""
    values: dict[str, np.ndarray]
    """float[N] by column, NaN where it is not defined."""
    style: dict[str, Any]


def _budget_curves(rows: Sequence[Row]) -> list[_BudgetCurve]:
    """One for each policy, in the order in which they come."""
    columns = ("task", "policy", "information", "entries", "budget_ratio", *_NUMBERS)
    missing = [name for name in columns if any(row.get(name) is None for row in rows)]
    if missing or not rows:
        raise ValueError(
            f"{len(rows)} rows, in which {', '.join(missing or columns)} are missing: expected a results table"
        )
    if len(tasks := {row["task"] for row in rows}) > 1:
        raise ValueError(f"expected rows of one task, got those of {', '.join(sorted(tasks))}: draw each by itself")
    by_policy: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        has_budget = row["policy"] != _FULL
        if has_budget and not all(finite_or_nan(row[name]) > 0 for name in ("entries", "budget_ratio")):
            raise ValueError(f"expected entries and budget_ratio above 0 in all rows but those of {_FULL!r}, got {row}")
        entries = float(row["entries"]) if has_budget else math.inf
        by_policy.setdefault(row["policy"], {}).setdefault(entries, []).append(row)
    if by_policy.keys() == {_FULL}:
        raise ValueError(f"expected rows of policies with a budget, got only rows of {_FULL!r}")
    styles = _policy_styles({row["policy"]: row["information"] for row in rows})
    curves = []
    for policy, by_budget in by_policy.items():
        budgets = sorted(by_budget)
        values = {name: np.array([_over_seeds(by_budget[one], name) for one in budgets]) for name in _NUMBERS}
        if np.isnan(values["nll"]).any():
            raise ValueError(f"expected a number as nll, got none of policy {policy} at one of {budgets} entries")
        curves.append(_BudgetCurve(np.array(budgets), values, styles[policy]))
    return curves


def _over_seeds(rows: Iterable[Row], column: str) -> float:
    values = [value for row in rows if math.isfinite(value := finite_or_nan(row[column]))]
    reduce = {_LOW: min, _HIGH: max}.get(column, statistics.fmean)
    return reduce(values) if values else math.nan


def _policy_styles(information: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Grey references, dotted where they know the horizon; LensNet bold and in blue, all others thin."""
    own, others, markers = (itertools.cycle(some) for some in (_OWN_COLORS, _OTHER_COLORS, _MARKERS))
    styles: dict[str, dict[str, Any]] = {}
    for policy in sorted(information, key=lambda name: not name.startswith(_OWN)):
        label = policy
        if policy == _FULL:
            style = {"color": MUTED, "linestyle": "--", "linewidth": 1.6, "zorder": 2}
        elif information[policy] == _HINDSIGHT:
            label = f"{policy.removesuffix('_hindsight')} in hindsight"
            style = {"color": MUTED, "linestyle": ":", "marker": next(markers), "linewidth": 1.4, "markersize": 5}
            style["zorder"] = 2
        elif policy.startswith(_OWN):
            style = {"color": next(own), "marker": next(markers), "linewidth": 2.6, "markersize": 7, "zorder": 4}
        else:
            style = {"color": next(others), "marker": next(markers), "linewidth": 1.1, "markersize": 5, "zorder": 3}
        styles[policy] = {"label": label} | style
    return styles


def _draw_quality(ax: Axes, panel: _QualityPanel, curves: Sequence[_BudgetCurve], ticks: Mapping[float, float]) -> None:
    beyond = []
    spacing = min(np.diff(np.log2(sorted(ticks))), default=1.0)
    for curve, dodge in zip(curves, np.linspace(-0.2, 0.2, len(curves)) * spacing, strict=True):
        values, style = curve.values[panel.column], curve.style
        drawn = np.clip(values, *panel.limits)
        if np.isinf(curve.entries).any():
            ax.axhline(drawn[0], **style)
            continue
        x = curve.entries * 2**dodge
        ax.plot(x, drawn, **style)
        if panel.column == "nll":
            bars = {name: style[name] for name in ("color", "linewidth", "zorder")}
            ax.vlines(x, curve.values[_LOW], curve.values[_HIGH], alpha=0.6, **bars)
        for marker, is_beyond in (("v", values < drawn), ("^", values > drawn)):
            if is_beyond.any():
                ax.plot(x[is_beyond], drawn[is_beyond], marker, color=style["color"], markersize=10, fillstyle="none")
                worst = values[is_beyond][np.argmax(np.abs(values[is_beyond]))]
                beyond.append(f"{style['label']} (to {worst:.2f})")
    label = "budget: entries, and tokens per entry" + (" (bars: confidence intervals)" if panel.column == "nll" else "")
    if beyond:
        label += "\n" + textwrap.fill(f"beyond the edge (open triangles): {', '.join(beyond)}", width=66)
    dress(ax, panel.title, label, panel.unit)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ticks), labels=[f"{entries:g}\n{ratio:g}x" for entries, ratio in ticks.items()])
    ax.minorticks_off()
