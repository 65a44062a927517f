"""Curves: how a run went, and how good each policy is at each budget. Also the look that all pictures share.

Only this module, `maps` and `stream_plots` draw. Their functions build a `Figure` of their own and leave matplotlib's
global state alone.
"""

import fnmatch
import itertools
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lensjax.runs.store.log import UNDEFINED, Row

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, FAINT = "#222222", "#777777", "#dddddd"
LEGEND: dict[str, Any] = {
    "frameon": False,
    "handlelength": 1.3,
    "handletextpad": 0.5,
    "columnspacing": 1.0,
    "borderpad": 0,
}
_DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches that lays itself out."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))


def write(figure: Figure, path: str | Path) -> None:
    """Writes a figure; the ending sets the format."""
    figure.savefig(path, dpi=_DPI)


def dress(ax: Axes, title: str, x: str, y: str, *, pad: float = 6) -> None:
    """Names axes, with room for `pad` points under the title, and keeps them in the background."""
    ax.set_title(title, loc="left", pad=pad, fontsize=10, fontweight="bold", color=INK)
    ax.set_xlabel(x, fontsize=8, color=MUTED)
    ax.set_ylabel(y, fontsize=8, color=MUTED)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    soften(ax, "top", "right")


def soften(ax: Axes, *hidden_spines: str) -> None:
    """Moves axes and ticks into the background."""
    ax.set_axisbelow(True)
    ax.spines[list(hidden_spines)].set_visible(False)
    ax.spines[:].set_color(MUTED)
    ax.tick_params(colors=MUTED, labelsize=8)


def noise_width(count: int) -> int:
    """Points that the running mean of a noisy curve takes in: an odd number, 1 for short curves."""
    return 1 + 2 * (count // 40)


def running_mean(values: np.ndarray, *, width: int) -> np.ndarray:
    """Centred mean over an odd number of points, fewer at the ends; gaps stay gaps."""
    known = np.isfinite(values)
    totals = np.convolve(np.where(known, values, 0.0), np.ones(width), "same")
    counts = np.convolve(known, np.ones(width), "same")
    return np.where(known, totals / np.maximum(counts, 1), math.nan)


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    curves: dict[str, str]
    """Label by "phase/metric", where a * matches several and their own names label them."""
    references: dict[str, str] = field(default_factory=dict)
    """As `curves`, drawn as grey dashes."""
    level: float | None = None
    """Where a thin line marks what knowing nothing would give."""
    is_noisy: bool = False
    """Draw a running mean on top of training metrics."""


def _loss_panel(phase: str, title: str) -> _Panel:
    names = {"nll_policy": "LensNet", "nll_baseline": "recency", "nll_rollout_mean": "random"}
    names |= {"nll_rollout_best": "best random"}
    return _Panel(
        title,
        "nats per token",
        {f"{phase}/eval/{name}": label for name, label in names.items()},
        references={f"{phase}/eval/nll_oracle": "oracle"},
    )


def _hit_panel(phase: str, title: str) -> _Panel:
    return _Panel(
        title,
        "share of sequences",
        {f"{phase}/eval/hit_rate": "the answer is shown in full"},
        references={f"{phase}/eval/hit_rate_random": "random rollouts"},
    )


_PANELS = (
    _Panel(
        "Pretraining loss",
        "nats per token",
        {"pretrain/token_loss": "train", "pretrain/eval/nll_full": "held out", "pretrain/rollout_loss": "rollouts"},
        is_noisy=True,
    ),
    _Panel(
        "LensNet loss and its terms before weights",
        "loss",
        {"lens/mc/lens_loss": "total", "lens/mc/*_loss": ""},
        is_noisy=True,
    ),
    _loss_panel("lens", "Held-out loss at the budget (lower is better)"),
    _Panel(
        "Held-out agreement with measured preferences",
        "share of pairs",
        {"lens/eval/mc/preference_agreement": "LensNet"},
        references={"lens/eval/mc/preference_agreement_lod_only": "a policy that sees the LOD only"},
        level=0.5,
    ),
    _Panel(
        "Held-out correlation of policy value and reward",
        "correlation",
        {"lens/eval/mc/preference_corr_mean": "mean over sequences"},
        level=0.0,
    ),
    _hit_panel("lens", "Held-out hit rate"),
    _Panel(
        "Score range",
        "score, in [-1, 1]",
        {"lens/mc/policy_score_abs_mean": "mean |score|", "lens/mc/policy_score_std_mean": "std in a context"},
        is_noisy=True,
    ),
    _Panel(
        "Loss of the rollouts minus that of recency",
        "nats per token",
        {"lens/mc/adv_delta_mean": "mean", "lens/mc/adv_delta_std": "std", "lens/mc/adv_delta_p95": "95th percentile"},
        level=0.0,
        is_noisy=True,
    ),
    _Panel(
        "Own edits: reward of an episode",
        "nats per token",
        {"online/rl/reward": "of the step", "online/rl/avg_reward_100": "mean of 100 steps"},
        level=0.0,
    ),
    _loss_panel("online", "Own edits: held-out loss at the budget"),
    _hit_panel("online", "Own edits: held-out hit rate"),
    _Panel("Own edits: entropy of a refocus step", "nats", {"online/rl/entropy": "policy"}, is_noisy=True),
    _Panel("Length of a working context", "entries", {"lens/context_length": "curriculum"}),
    _Panel(
        "Learning rate",
        "",
        {"lens/lr": "preferences", "online/lr": "own edits"},
        references={"pretrain/lr": "pretraining"},
    ),
)


def training_curves(rows: Sequence[Row], path: str | Path) -> Figure:
    """Draws the curves of a run; panels without data are left out.

    Args:
      rows: as returned by `logging.read_rows`. Values that are undefined or not finite become gaps.
      path: where to write; the ending sets the format.

    Returns:
      The figure that was written.

    Raises:
      ValueError: no row holds a metric that is drawn.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name in row.keys() - {"phase", "step"}:
            points.setdefault(f"{row['phase']}/{name}", []).append((row["step"], _finite_or_nan(row[name])))
    found = [(panel, series) for panel in _PANELS if (series := _series_of(panel, points))]
    if not found:
        raise ValueError(f"none of {len(rows)} rows holds a metric to draw: expected rows of a run's metrics.jsonl")
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    figure = new_figure(4.6 * columns, 3.1 * lines)
    for place, (panel, series) in enumerate(found, start=1):
        _draw_panel(figure.add_subplot(lines, columns, place), panel, series)
    write(figure, path)
    return figure


class _Series(NamedTuple):
    label: str
    steps: np.ndarray
    values: np.ndarray
    is_held_out: bool
    is_reference: bool


def _series_of(panel: _Panel, points: dict[str, list[tuple[float, float]]]) -> list[_Series]:
    """The curves of a panel that hold a finite value, each metric once."""
    found: dict[str, _Series] = {}
    for pattern, label in (panel.curves | panel.references).items():
        for key in fnmatch.filter(sorted(points), pattern):
            steps, values = np.array(points[key], float).T
            if key not in found and np.isfinite(values).any():
                own_label = label or key.rpartition("/")[2].removesuffix("_loss")
                found[key] = _Series(own_label, steps, values, "/eval/" in key, pattern in panel.references)
    return list(found.values())


def _finite_or_nan(value: Any) -> float:
    number = math.nan if value in (UNDEFINED, "") else float(value)
    return number if math.isfinite(number) else math.nan


def _draw_panel(ax: Axes, panel: _Panel, series: list[_Series]) -> None:
    colors = iter(COLORS * len(series))
    step_label = "step"
    for one in series:
        color = MUTED if one.is_reference else next(colors)
        style: dict[str, Any] = {"color": color, "linestyle": "--" if one.is_reference else "-"}
        values = one.values
        if panel.is_noisy and not one.is_held_out and (width := noise_width(len(values))) > 1:
            ax.plot(one.steps, values, linewidth=0.7, alpha=0.3, **style)
            values = running_mean(values, width=width)
            step_label = "step (bold: running mean)"
        marker = "o" if one.is_held_out or len(values) == 1 else ""
        ax.plot(one.steps, values, linewidth=1.8, marker=marker, markersize=3.5, label=one.label, **style)
    if panel.level is not None:
        ax.axhline(panel.level, color=MUTED, linewidth=0.9, linestyle=":", zorder=1)
    dress(ax, panel.title, step_label, panel.unit, pad=20)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), fontsize=8, **LEGEND)
    ax.set_xlim(left=0)


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
    found: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        has_budget = row["policy"] != _FULL
        if has_budget and not all(_finite_or_nan(row[name]) > 0 for name in ("entries", "budget_ratio")):
            raise ValueError(f"expected entries and budget_ratio above 0 in all rows but those of {_FULL!r}, got {row}")
        entries = float(row["entries"]) if has_budget else math.inf
        found.setdefault(row["policy"], {}).setdefault(entries, []).append(row)
    if found.keys() == {_FULL}:
        raise ValueError(f"expected rows of policies with a budget, got only rows of {_FULL!r}")
    styles = _policy_styles({row["policy"]: row["information"] for row in rows})
    curves = []
    for policy, by_budget in found.items():
        budgets = sorted(by_budget)
        values = {name: np.array([_over_seeds(by_budget[one], name) for one in budgets]) for name in _NUMBERS}
        if np.isnan(values["nll"]).any():
            raise ValueError(f"expected a number as nll, got none of policy {policy} at one of {budgets} entries")
        curves.append(_BudgetCurve(np.array(budgets), values, styles[policy]))
    return curves


def _over_seeds(rows: Iterable[Row], column: str) -> float:
    values = [value for row in rows if math.isfinite(value := _finite_or_nan(row[column]))]
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
