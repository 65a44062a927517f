"""Pictures of a run: training curves, and maps of what each variant shows. The only module that draws.

Both functions build a `Figure` of their own and leave matplotlib's global state alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lensjax.context import MISSING
from lensjax.logging import UNDEFINED, Row

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _MUTED, _FAINT = "#222222", "#777777", "#dddddd"
_DPI = 150


class _Curve(NamedTuple):
    phase: str
    name: str
    """Metric, or a pattern that stands for several."""
    label: str
    is_reference: bool = False


class _Panel(NamedTuple):
    title: str
    unit: str
    curves: tuple[_Curve, ...]
    level: float | None = None
    """Where a thin line marks "no better than nothing"."""
    is_noisy: bool = False
    """Draw a running mean on top of the values."""


_PANELS = (
    _Panel(
        "Pretraining loss",
        "nats per token",
        (
            _Curve("pretrain", "token_loss", "training"),
            _Curve("pretrain", "eval/nll_full", "held out"),
            _Curve("pretrain", "rollout_loss", "training, on rollouts"),
        ),
        is_noisy=True,
    ),
    _Panel(
        "LensNet loss and its terms before weights",
        "loss",
        (_Curve("lens", "mc/lens_loss", "total"), _Curve("lens", "mc/*_loss", "")),
        is_noisy=True,
    ),
    _Panel(
        "Held-out loss at the budget (lower is better)",
        "nats per token",
        (
            _Curve("lens", "eval/nll_policy", "LensNet's pick"),
            _Curve("lens", "eval/nll_baseline", "recency"),
            _Curve("lens", "eval/nll_rollout_mean", "random"),
            _Curve("lens", "eval/nll_rollout_best", "best random"),
            _Curve("lens", "eval/nll_oracle", "oracle", is_reference=True),
        ),
    ),
    _Panel(
        "Held-out agreement with measured preferences",
        "share of pairs",
        (
            _Curve("lens", "eval/mc/preference_agreement", "LensNet"),
            _Curve("lens", "eval/mc/preference_agreement_lod_only", "sees the LOD only", is_reference=True),
        ),
        level=0.5,
    ),
    _Panel(
        "Held-out correlation of policy value and reward",
        "correlation",
        (_Curve("lens", "eval/mc/preference_corr_mean", "mean over sequences"),),
        level=0.0,
    ),
    _Panel(
        "Held-out hit rate",
        "share of sequences",
        (
            _Curve("lens", "eval/hit_rate", "top-scored block is the answer"),
            _Curve("lens", "eval/hit_rate_chance", "chance", is_reference=True),
        ),
    ),
    _Panel(
        "Score range",
        "score, in [-1, 1]",
        (
            _Curve("lens", "mc/policy_score_abs_mean", "mean |score|"),
            _Curve("lens", "mc/policy_score_std_mean", "std in a context"),
        ),
        is_noisy=True,
    ),
    _Panel(
        "Advantage of the rollouts (negative: better than recency)",
        "nats per token",
        (
            _Curve("lens", "mc/adv_delta_mean", "mean"),
            _Curve("lens", "mc/adv_delta_std", "std"),
            _Curve("lens", "mc/adv_delta_p95", "95th percentile"),
        ),
        level=0.0,
        is_noisy=True,
    ),
    _Panel("Length of a working context", "entries", (_Curve("lens", "context_length", ""),)),
    _Panel(
        "Learning rate", "", (_Curve("lens", "lr", "LensNet"), _Curve("pretrain", "lr", "pretraining", True))
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
    found = [(panel, series) for panel in _PANELS if (series := _series_of(panel, rows))]
    if not found:
        raise ValueError(f"none of {len(rows)} rows holds a metric to draw: expected rows of a run's metrics.jsonl")
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * lines), layout="constrained")
    for place, (panel, series) in enumerate(found, start=1):
        ax = figure.add_subplot(lines, columns, place)
        _draw_panel(ax, panel, series)
        ax.set_xlabel("step", color=_MUTED)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    figure.savefig(path, dpi=_DPI)
    return figure


class _Series(NamedTuple):
    label: str
    steps: np.ndarray
    values: np.ndarray
    is_held_out: bool
    is_reference: bool


def _series_of(panel: _Panel, rows: Sequence[Row]) -> list[_Series]:
    """The curves of a panel that hold at least one finite value, each metric once."""
    found: dict[tuple[str, str], _Series] = {}
    for curve in panel.curves:
        own = [row for row in rows if row["phase"] == curve.phase]
        names = dict.fromkeys(name for row in own for name in row if fnmatchcase(name, curve.name))
        for name in names:
            points = [(row["step"], _finite_or_nan(row[name])) for row in own if name in row]
            steps, values = np.array(points, float).T
            if (curve.phase, name) not in found and np.isfinite(values).any():
                label = curve.label or name.removeprefix("mc/").removesuffix("_loss").replace("_", " ")
                is_held_out = name.startswith("eval/")
                found[curve.phase, name] = _Series(label, steps, values, is_held_out, curve.is_reference)
    return list(found.values())


def _finite_or_nan(value: Any) -> float:
    number = math.nan if value == UNDEFINED else float(value)
    return number if math.isfinite(number) else math.nan


def _draw_panel(ax: Axes, panel: _Panel, series: list[_Series]) -> None:
    if panel.level is not None:
        ax.axhline(panel.level, color=_MUTED, linewidth=0.9, linestyle=":")
    colors = iter(_COLORS * len(series))
    for one in series:
        color = _MUTED if one.is_reference else next(colors)
        smooth = panel.is_noisy and not one.is_held_out
        values = _running_mean(one.values, width=1 + 2 * (len(one.values) // 40)) if smooth else one.values
        if smooth:
            ax.plot(one.steps, one.values, color=color, linewidth=0.7, alpha=0.3)
        ax.plot(
            one.steps,
            values,
            color=color,
            linewidth=1.8,
            linestyle="--" if one.is_reference else "-",
            marker="o" if one.is_held_out or len(one.steps) == 1 else "",
            markersize=3.5,
            label=one.label,
        )
    ax.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    ax.set_ylabel(panel.unit, color=_MUTED)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color=_FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(colors=_MUTED, labelsize=8)
    if len(series) > 1 or series[0].is_held_out:
        ax.legend(frameon=False, fontsize=8, labelcolor=_INK)


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
_ROW_HEIGHT, _AROUND_ROWS, _LEGEND_HEIGHT = 0.36, 1.05, 0.6
_STRIP, _SCORE_TOP, _SCORE_BOTTOM = 0.60, 0.66, 0.82
_NOT_SHOWN = {"facecolor": "#f4f4f4", "edgecolor": "#c4c4c4", "hatch": "////", "linewidth": 0}
_TAIL, _ANSWER = "#f6efdc", "#B0005A"
_SCORES = ScalarMappable(Normalize(-1, 1), "PuOr_r")


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
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
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
        ax.bar(
            starts[shown],
            height[shown],
            widths[shown],
            base,
            align="edge",
            color=colors[lods[shown]],
            edgecolor="white",
            linewidth=0.6,
        )
        ax.bar(starts[~shown], -_STRIP, widths[~shown], base, align="edge", **_NOT_SHOWN)
        strip = np.ma.masked_invalid(scores[None, :tail])
        edges = np.arange(tail + 1), np.array([row + _SCORE_TOP, row + _SCORE_BOTTOM])
        ax.pcolormesh(*edges, strip, cmap=_SCORES.cmap, norm=_SCORES.norm)
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
    ax.set_yticks(np.arange(rows) + _STRIP / 2 + 0.1, labels=one.labels, fontsize=9, color=_INK, parse_math=False)
    ax.set_xlabel("token (oldest to newest)", fontsize=8, color=_MUTED)
    ax.tick_params(axis="x", colors=_MUTED, labelsize=8)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(_MUTED)
    for label, best in zip(ax.get_yticklabels(), one.nll == one.nll.min(), strict=True):
        label.set_fontweight("bold" if best else "normal")


def _note_above(ax: Axes, x: float, text: str, color: str) -> None:
    ax.annotate(
        text, (x, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="center", fontsize=8, color=color
    )


def _budget_title(one: VariantMap) -> str:
    counts = {round(float(np.sum(1.0 / one.block_size ** row[row != MISSING]))) for row in one.cuts}
    entries = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{one.title}: {one.cuts.shape[1]} tokens, {entries} entries in every row"


def _draw_losses(ax: Axes, one: VariantMap) -> None:
    """A dot and the number for each row; right of the timeline, on its rows."""
    best = one.nll == one.nll.min()
    for row, (value, bold) in enumerate(zip(one.nll, best, strict=True)):
        y = row + _STRIP / 2 + 0.1
        ax.axhline(y, color=_FAINT, linewidth=0.8, zorder=0)
        ax.plot(value, y, "o", color=_COLORS[0] if bold else _MUTED, markersize=6)
        ax.annotate(
            f"{value:.3f}",
            (1, y),
            (6, 0),
            ("axes fraction", "data"),
            "offset points",
            va="center",
            fontsize=9,
            color=_INK,
            fontweight="bold" if bold else "normal",
        )
    ax.margins(x=0.12)
    ax.set_title("loss on the tail", loc="left", fontsize=8, color=_MUTED)
    ax.tick_params(left=False, labelleft=False, labelsize=8, colors=_MUTED)
    ax.set_xlabel("nats per token", fontsize=8, color=_MUTED)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(_MUTED)


def _draw_legend(ax: Axes, colors: np.ndarray, maps: Sequence[VariantMap]) -> None:
    size = maps[0].block_size
    names = ["LOD 0: token in full", *(f"LOD {lod}: gist of {size**lod} tokens" for lod in range(1, len(colors)))]
    patches = [Patch(facecolor=color, label=name) for color, name in zip(colors, names, strict=True)]
    if any((one.cuts == MISSING).any() for one in maps):
        patches.append(Patch(label="not shown", **_NOT_SHOWN))
    ax.axis("off")
    ax.legend(handles=patches, loc="center left", ncols=len(patches), frameon=False, fontsize=9)
    bar = ax.figure.colorbar(_SCORES, cax=ax.inset_axes((0.74, 0.62, 0.24, 0.22)), orientation="horizontal")
    bar.set_ticks([-1, 0, 1], labels=["-1 collapse", "0", "+1 expand"], fontsize=8)
    bar.set_label("LensNet's score", fontsize=9)
    bar.outline.set_visible(False)
