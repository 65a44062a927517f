"""Pictures of a run: training curves, and maps of what each variant shows. The only module that draws.

Both functions build a `Figure` of their own and leave matplotlib's global state alone.
"""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

from lensjax.context import MISSING
from lensjax.logging import UNDEFINED, Row

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _MUTED, _FAINT = "#222222", "#777777", "#dddddd"
_LEGEND: dict[str, Any] = {
    "frameon": False,
    "handlelength": 1.3,
    "handletextpad": 0.5,
    "columnspacing": 1.0,
    "borderpad": 0,
}
_DPI = 150


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)


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
    _Panel(
        "Held-out loss at the budget (lower is better)",
        "nats per token",
        {
            "lens/eval/nll_policy": "LensNet",
            "lens/eval/nll_baseline": "recency",
            "lens/eval/nll_rollout_mean": "random",
            "lens/eval/nll_rollout_best": "best random",
        },
        references={"lens/eval/nll_oracle": "oracle"},
    ),
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
    _Panel(
        "Held-out hit rate",
        "share of sequences",
        {"lens/eval/hit_rate": "top-scored block is the answer"},
        references={"lens/eval/hit_rate_chance": "chance"},
    ),
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
    _Panel("Length of a working context", "entries", {"lens/context_length": "curriculum"}),
    _Panel("Learning rate", "", {"lens/lr": "LensNet"}, references={"pretrain/lr": "pretraining"}),
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
    figure = Figure(figsize=(4.6 * columns, 3.1 * lines), layout=_layout())
    for place, (panel, series) in enumerate(found, start=1):
        _draw_panel(figure.add_subplot(lines, columns, place), panel, series)
    figure.savefig(path, dpi=_DPI)
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
    number = math.nan if value == UNDEFINED else float(value)
    return number if math.isfinite(number) else math.nan


def _draw_panel(ax: Axes, panel: _Panel, series: list[_Series]) -> None:
    colors = iter(_COLORS * len(series))
    step_label = "step"
    for one in series:
        color = _MUTED if one.is_reference else next(colors)
        style: dict[str, Any] = {"color": color, "linestyle": "--" if one.is_reference else "-"}
        values = one.values
        if panel.is_noisy and not one.is_held_out and (width := 1 + 2 * (len(values) // 40)) > 1:
            ax.plot(one.steps, values, linewidth=0.7, alpha=0.3, **style)
            values = _running_mean(values, width=width)
            step_label = "step (bold: running mean)"
        marker = "o" if one.is_held_out or len(values) == 1 else ""
        ax.plot(one.steps, values, linewidth=1.8, marker=marker, markersize=3.5, label=one.label, **style)
    if panel.level is not None:
        ax.axhline(panel.level, color=_MUTED, linewidth=0.9, linestyle=":", zorder=1)
    ax.set_title(panel.title, loc="left", pad=20, fontsize=10, fontweight="bold", color=_INK)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), fontsize=8, **_LEGEND)
    ax.set_xlim(left=0)
    ax.set_xlabel(step_label, fontsize=8, color=_MUTED)
    ax.set_ylabel(panel.unit, fontsize=8, color=_MUTED)
    ax.grid(axis="y", color=_FAINT, linewidth=0.6)
    _soften(ax, "top", "right")


def _soften(ax: Axes, *hidden_spines: str) -> None:
    """Moves axes and ticks into the background."""
    ax.set_axisbelow(True)
    ax.spines[list(hidden_spines)].set_visible(False)
    ax.spines[:].set_color(_MUTED)
    ax.tick_params(colors=_MUTED, labelsize=8)


def _running_mean(values: np.ndarray, *, width: int) -> np.ndarray:
    """Centred mean over an odd number of points, fewer at the ends; gaps stay gaps."""
    known = np.isfinite(values)
    totals = np.convolve(np.where(known, values, 0.0), np.ones(width), "same")
    counts = np.convolve(known, np.ones(width), "same")
    return np.where(known, totals / np.maximum(counts, 1), math.nan)


@dataclass(frozen=True)
class VariantMap:
    """What the variants of one sequence show, for `lod_maps`."""

    title: str
    cuts: np.ndarray
    """int[V, T]: level at which each token is shown, -1 where it is not."""
    scores: np.ndarray
    """float[V, T]: policy score of the entry that shows each token, NaN where it is not shown."""
    nll: np.ndarray
    """float[V]: nats per token on the tail."""
    labels: Sequence[str]
    """Names of the V rows."""
    recent_tokens: int
    """Tail tokens that every variant holds in full."""
    block_size: int
    """Children per gist K."""
    answer: tuple[int, int] | None = None
    """First token, and the one after the last, of a span known to be worth detail."""

    def __post_init__(self) -> None:
        shapes = {name: np.shape(getattr(self, name)) for name in ("cuts", "scores", "nll", "labels")}
        if len(shapes["cuts"]) != 2 or shapes["scores"] != shapes["cuts"] or shapes["nll"] != shapes["labels"]:
            raise ValueError(f"expected cuts and scores [V, T], nll and labels [V], got {shapes}")
        if shapes["cuts"][0] != len(self.labels):
            raise ValueError(f"expected one label for each of {shapes['cuts'][0]} rows, got {list(self.labels)}")


# Inches, then fractions of a row.
_ROW_HEIGHT, _AROUND_ROWS, _LEGEND_HEIGHT, _EXPLANATION_HEIGHT = 0.36, 1.15, 0.7, 0.55
_STRIP, _SCORE_TOP, _SCORE_BOTTOM, _ROW_CENTRE = 0.60, 0.66, 0.82, 0.40
_SHOWN: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.6}
_NOT_SHOWN: dict[str, Any] = {"facecolor": "#f4f4f4", "edgecolor": "#c4c4c4", "hatch": "////", "linewidth": 0}
_TAIL, _ANSWER = "#f6efdc", "#B0005A"
_EXPLANATION = (
    "Each row is one working context, all that the model reads of a text: parts of it in full (tall, dark), "
    "the rest as gists (low, light).\n"
    "To the right is the model's loss on the text's last tokens, given that context; lower is better."
)
_SCORE_COLORS = "PuOr_r"


def lod_maps(maps: Sequence[VariantMap], path: str | Path) -> Figure:
    """Draws for each sequence, one row a variant, what is shown in full and what as gists along the timeline.

    Taller and darker means more detail. Under it runs the policy's score of the same entry, left out on the
    protected tail, which no edit may touch. The lowest loss is in bold.

    Args:
      maps: one per sequence, of one block size; rows are drawn in the order given.
      path: where to write; the ending sets the format.

    Returns:
      The figure that was written.

    Raises:
      ValueError: there is no map, or block sizes differ.
    """
    if len({one.block_size for one in maps}) != 1:
        raise ValueError(f"expected maps of one block size, got {[one.block_size for one in maps]}")
    heights = [*(_AROUND_ROWS + _ROW_HEIGHT * len(one.labels) for one in maps), _LEGEND_HEIGHT]
    figure = Figure(figsize=(12, sum(heights) + _EXPLANATION_HEIGHT), layout=_layout())
    figure.suptitle(_EXPLANATION, x=0.01, ha="left", fontsize=10, color=_MUTED)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(1, 0.15))
    colors = _lod_colors(max(int(one.cuts.max()) for one in maps))
    for place, one in enumerate(maps):
        timeline = figure.add_subplot(grid[place, 0])
        _draw_timeline(timeline, one, colors)
        _draw_losses(figure.add_subplot(grid[place, 1], sharey=timeline), one)
    _draw_legend(figure.add_subplot(grid[-1, :]), colors, maps)
    figure.savefig(path, dpi=_DPI)
    return figure


def _lod_colors(max_lod: int) -> np.ndarray:
    """Dark to light with rising level; float[L + 1, 4]."""
    return matplotlib.colormaps["Blues"](np.linspace(0.95, 0.35, max_lod + 1))


def _shown_spans(cut: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """First tokens and widths: each gist by itself, neighbouring tokens of LOD 0, or not shown, together."""
    starts_gist = (cut > 0) & (np.arange(len(cut)) % block_size ** np.maximum(cut, 0) == 0)
    starts = np.flatnonzero(starts_gist | np.append(True, cut[1:] != cut[:-1]))
    return starts, np.diff(starts, append=len(cut))


def _draw_timeline(ax: Axes, one: VariantMap, colors: np.ndarray) -> None:
    rows, window = one.cuts.shape
    tail = window - one.recent_tokens
    for row, (cut, scores) in enumerate(zip(one.cuts, one.scores, strict=True)):
        starts, widths = _shown_spans(cut, one.block_size)
        lods = cut[starts]
        shown = lods != MISSING
        base, height = row + _STRIP, -_STRIP * (1 - lods / len(colors))
        ax.bar(starts[shown], height[shown], widths[shown], base, color=colors[lods[shown]], **_SHOWN)
        ax.bar(starts[~shown], -_STRIP, widths[~shown], base, align="edge", **_NOT_SHOWN)
        strip = np.ma.masked_invalid(scores[None, :tail])
        edges = np.arange(tail + 1), np.array([row + _SCORE_TOP, row + _SCORE_BOTTOM])
        ax.pcolormesh(*edges, strip, cmap=_SCORE_COLORS, vmin=-1, vmax=1)
    ax.axvspan(tail, window, color=_TAIL, zorder=0)
    _note_above(ax, (tail + window) / 2, "protected tail", "#8a6d1f")
    if one.answer is not None:
        first, end = one.answer
        frame = Rectangle((first, -0.12), end - first, rows + 0.06, fill=False, color=_ANSWER, linewidth=1.4)
        frame.set_clip_on(False)
        ax.add_patch(frame)
        _note_above(ax, (first + end) / 2, "answer", _ANSWER)
    ax.set(xlim=(0, window), ylim=(rows - 0.1, -0.15))
    ax.set_title(_budget_title(one), loc="left", pad=18, fontsize=11, fontweight="bold", color=_INK, parse_math=False)
    ax.set_yticks(np.arange(rows) + _ROW_CENTRE, labels=one.labels, parse_math=False)
    ax.set_xlabel("token (oldest to newest)", fontsize=8, color=_MUTED)
    _soften(ax, "top", "right", "left")
    ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=_INK)
    for label, best in zip(ax.get_yticklabels(), one.nll == one.nll.min(), strict=True):
        label.set_fontweight("bold" if best else "normal")


def _note_above(ax: Axes, x: float, text: str, color: str) -> None:
    ax.annotate(text, (x, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="center", fontsize=8, color=color)


def _budget_title(one: VariantMap) -> str:
    window = one.cuts.shape[1]
    counts = {round(float(np.sum(1.0 / one.block_size ** row[row != MISSING]))) for row in one.cuts}
    entries = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{one.title}: {window} tokens in {entries} entries ({window / max(counts):.1f}x)"


def _draw_losses(ax: Axes, one: VariantMap) -> None:
    """A dot and the number for each row; right of the timeline, on its rows."""
    best = one.nll == one.nll.min()
    for row, (value, bold) in enumerate(zip(one.nll, best, strict=True)):
        y, weight = row + _ROW_CENTRE, "bold" if bold else "normal"
        ax.axhline(y, color=_FAINT, linewidth=0.8, zorder=0)
        ax.plot(value, y, "o", color=_COLORS[0] if bold else _MUTED, markersize=6)
        ax.text(1.05, y, f"{value:.3f}", transform=ax.get_yaxis_transform(), va="center", fontsize=9, weight=weight)
    ax.margins(x=0.12)
    ax.set_title("loss on the tail", loc="left", fontsize=8, color=_MUTED)
    ax.tick_params(left=False, labelleft=False)
    ax.set_xlabel("nats per token", fontsize=8, color=_MUTED)
    _soften(ax, "top", "right", "left")


def _draw_legend(ax: Axes, colors: np.ndarray, maps: Sequence[VariantMap]) -> None:
    size = maps[0].block_size
    names = ["LOD 0: token in full", *(f"LOD {lod}: gist of {size**lod} tokens" for lod in range(1, len(colors)))]
    patches = [Patch(facecolor=color, label=name) for color, name in zip(colors, names, strict=True)]
    if any((one.cuts == MISSING).any() for one in maps):
        patches.append(Patch(label="not shown", **_NOT_SHOWN))
    ax.axis("off")
    ax.legend(handles=patches, loc="center left", ncols=min(len(patches), 4), fontsize=9, **_LEGEND)
    scale = ScalarMappable(Normalize(-1, 1), _SCORE_COLORS)
    bar = ax.figure.colorbar(scale, cax=ax.inset_axes((0.76, 0.62, 0.2, 0.22)), orientation="horizontal")
    bar.set_ticks([-1, 0, 1], labels=["-1 collapse", "0", "+1 expand"], fontsize=8)
    bar.set_label("LensNet's score", fontsize=9)
    bar.outline.set_visible(False)
