"""Curves of a training run, panel by panel."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lensjax.plots.style import (
    COLORS,
    LEGEND,
    MUTED,
    Row,
    dress,
    finite_or_nan,
    new_figure,
    noise_width,
    own_look,
    running_mean,
    write,
)


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
    _Panel("Distillation: divergence from the teacher", "nats", {"distill/loss": "train"}, is_noisy=True),
    _Panel(
        "Blocks that LensNet and its teacher share",
        "share of the budget",
        {"distill/distill/top_agreement": "train"},
        is_noisy=True,
    ),
    _loss_panel("distill", "Distillation: held-out loss at the budget"),
    _hit_panel("distill", "Distillation: held-out hit rate"),
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
        {"distill/lr": "distillation", "lens/lr": "preferences", "online/lr": "own edits"},
        references={"pretrain/lr": "pretraining"},
    ),
)


@own_look()
def training_curves(rows: Sequence[Row], path: str | Path) -> Figure:
    """Draws the curves of a run; panels without data are left out.

    Args:
      rows: as returned by `lensjax.runs.store.log.read_rows`. Values that are undefined or not finite become gaps.
      path: where to write; the ending sets the format.

    Returns:
      The figure that was written.

    Raises:
      ValueError: no row holds a metric that is drawn.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name in row.keys() - {"phase", "step"}:
            points.setdefault(f"{row['phase']}/{name}", []).append((row["step"], finite_or_nan(row[name])))
    panels = [(panel, series) for panel in _PANELS if (series := _series_of(panel, points))]
    if not panels:
        raise ValueError(f"none of {len(rows)} rows holds a metric to draw: expected rows of a run's metrics.jsonl")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(4.6 * columns, 3.1 * lines)
    for place, (panel, series) in enumerate(panels, start=1):
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
    series: dict[str, _Series] = {}
    for pattern, label in (panel.curves | panel.references).items():
        for key in fnmatch.filter(sorted(points), pattern):
            steps, values = np.array(points[key], float).T
            if key not in series and np.isfinite(values).any():
                own_label = label or key.rpartition("/")[2].removesuffix("_loss")
                series[key] = _Series(own_label, steps, values, "/eval/" in key, pattern in panel.references)
    return list(series.values())


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
