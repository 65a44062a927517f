"""Maps of what is shown: by the variants of one sequence, and by a session along a stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lensjax.context.working import MISSING
from lensjax.plots.style import (
    COLORS,
    FAINT,
    INK,
    LEGEND,
    MUTED,
    dress,
    legible,
    new_figure,
    noise_width,
    own_look,
    running_mean,
    soften,
    write,
)


@dataclass(frozen=True)
class VariantMap:
    """What the variants of one sequence show, for `lod_maps`."""

    title: str
    cuts: np.ndarray
    """int[V, T]: level at which each token is shown, -1 where it is not."""
    scores: np.ndarray
    """float[V, T]: policy score of the entry that shows each token, NaN where it is not shown."""
    nll: np.ndarray
    """float[V]: nats per token on the horizon."""
    labels: Sequence[str]
    """Names of the V rows."""
    recent_tokens: int
    """Last tokens of the history, which every variant holds in full."""
    block_size: int
    """Children per gist K."""
    answer: Sequence[tuple[int, int]] = ()
    """First token, and the one after the last, of each span known to be worth detail."""
    omit: bool = False
    """Whether the model reads nothing of what is not in full."""
    text: tuple[str, str] = ("", "")
    """What stands before and behind the cursor, in words."""

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
    "{rest}.\n"
    "To the right is the model's loss on the tokens behind the cursor, given that context; lower is better."
)
_SCORE_COLORS = "PuOr_r"


_REST = {
    False: "the rest as gists (low, light)",
    True: "nothing of the rest,\nof which LensNet alone sees gists (low, light)",
}


@own_look()
def lod_maps(maps: Sequence[VariantMap], path: str | Path) -> Figure:
    """Draws for each sequence, one row a variant, what is shown in full and what as gists along the timeline.

    Taller and darker means more detail. Under it runs the policy's score of the same entry, left out on the
    query, which no edit may touch. The lowest loss is in bold.

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
    figure = new_figure(12, sum(heights) + _EXPLANATION_HEIGHT)
    figure.suptitle(_EXPLANATION.format(rest=_REST[maps[0].omit]), x=0.01, ha="left", fontsize=10, color=MUTED)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(1, 0.15))
    colors = _lod_colors(max(int(one.cuts.max()) for one in maps))
    for place, one in enumerate(maps):
        timeline = figure.add_subplot(grid[place, 0])
        _draw_timeline(timeline, one, colors)
        _draw_losses(figure.add_subplot(grid[place, 1], sharey=timeline), one)
    _draw_legend(figure.add_subplot(grid[-1, :]), colors, maps)
    write(figure, path)
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
    _note_above(ax, (tail + window) / 2, "query", "#8a6d1f")
    for first, end in one.answer:
        frame = Rectangle((first, -0.12), end - first, rows + 0.06, fill=False, color=_ANSWER, linewidth=1.4)
        frame.set_clip_on(False)
        ax.add_patch(frame)
        _note_above(ax, (first + end) / 2, "answer", _ANSWER)
    ax.set(xlim=(0, window), ylim=(rows - 0.1, -0.15))
    ax.set_title(_budget_title(one), loc="left", pad=18, fontsize=11, fontweight="bold", color=INK, parse_math=False)
    ax.set_yticks(np.arange(rows) + _ROW_CENTRE, labels=one.labels, parse_math=False)
    note = f"   at the cursor:  {' | '.join(map(legible, one.text))}" if any(one.text) else ""
    ax.set_xlabel(f"token (oldest to newest){note}", fontsize=8, color=MUTED, parse_math=False)
    soften(ax, "top", "right", "left")
    ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
    for label, best in zip(ax.get_yticklabels(), one.nll == one.nll.min(), strict=True):
        label.set_fontweight("bold" if best else "normal")


def _note_above(ax: Axes, x: float, text: str, color: str) -> None:
    ax.annotate(text, (x, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="center", fontsize=8, color=color)


def _budget_title(one: VariantMap) -> str:
    window = one.cuts.shape[1]
    read = [row[row == 0] if one.omit else row[row != MISSING] for row in one.cuts]
    counts = {round(float(np.sum(1.0 / one.block_size**row))) for row in read}
    entries = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{one.title}: {window} tokens in {entries} entries ({window / max(counts):.1f}x)"


def _draw_losses(ax: Axes, one: VariantMap) -> None:
    """A dot and the number for each row; right of the timeline, on its rows."""
    best = one.nll == one.nll.min()
    for row, (value, bold) in enumerate(zip(one.nll, best, strict=True)):
        y, weight = row + _ROW_CENTRE, "bold" if bold else "normal"
        ax.axhline(y, color=FAINT, linewidth=0.8, zorder=0)
        ax.plot(value, y, "o", color=COLORS[0] if bold else MUTED, markersize=6)
        ax.text(1.05, y, f"{value:.3f}", transform=ax.get_yaxis_transform(), va="center", fontsize=9, weight=weight)
    ax.margins(x=0.12)
    ax.set_title("loss on the horizon", loc="left", fontsize=8, color=MUTED)
    ax.tick_params(left=False, labelleft=False)
    ax.set_xlabel("nats per token", fontsize=8, color=MUTED)
    soften(ax, "top", "right", "left")


def _lod_patches(colors: np.ndarray, block_size: int) -> list[Patch]:
    """What a legend says of each level."""
    names = ["LOD 0: token in full", *(f"LOD {lod}: gist of {block_size**lod} tokens" for lod in range(1, len(colors)))]
    return [Patch(facecolor=color, label=name) for color, name in zip(colors, names, strict=True)]


def _draw_legend(ax: Axes, colors: np.ndarray, maps: Sequence[VariantMap]) -> None:
    patches = _lod_patches(colors, maps[0].block_size)
    if any((one.cuts == MISSING).any() for one in maps):
        patches.append(Patch(label="not shown", **_NOT_SHOWN))
    ax.axis("off")
    ax.legend(handles=patches, loc="center left", ncols=min(len(patches), 4), fontsize=9, **LEGEND)
    scale = ScalarMappable(Normalize(-1, 1), _SCORE_COLORS)
    bar = ax.figure.colorbar(scale, cax=ax.inset_axes((0.76, 0.62, 0.2, 0.22)), orientation="horizontal")
    bar.set_ticks([-1, 0, 1], labels=["-1 collapse", "0", "+1 expand"], fontsize=8)
    bar.set_label("LensNet's score", fontsize=9)
    bar.outline.set_visible(False)


@dataclass(frozen=True)
class StreamMap:
    """What a session looked at while it read a stream, for `stream_map`."""

    title: str
    cursors: np.ndarray
    """int[F]: tokens read at each refocus step, rising."""
    first: np.ndarray
    """int[F]: first token that the context still covers."""
    cuts: np.ndarray
    """int[F, C]: level at which each token from `first` on is shown, -1 where it is not."""
    swap_rate: np.ndarray
    """float[F]: share of the entries that the step replaced; NaN where it is not defined."""
    nll: np.ndarray
    """float[F]: nats per token on what was read since the step before; NaN where it is not defined."""
    max_lod: int
    """Highest level L."""
    block_size: int
    """Children per gist K."""

    def __post_init__(self) -> None:
        shapes = {name: np.shape(getattr(self, name)) for name in ("cuts", "cursors", "first", "swap_rate", "nll")}
        steps = shapes["cuts"][:1]
        if len(shapes["cuts"]) != 2 or steps < (2,) or any(shapes[name] != steps for name in [*shapes][1:]):
            raise ValueError(f"expected cuts [F, C] and the others [F] of at least two steps F, got {shapes}")
        low, high = self.cuts.min(initial=0), self.cuts.max(initial=0)
        if low < MISSING or high > self.max_lod:
            raise ValueError(f"expected cuts from {MISSING} to max_lod {self.max_lod}, got {low} to {high}")
        if np.any(np.diff(self.cursors) <= 0):
            raise ValueError(f"expected cursors that rise at every step, got {self.cursors}")
        for step, (first, cursor, cut) in enumerate(zip(self.first, self.cursors, self.cuts, strict=True)):
            if not 0 <= first < cursor or np.any(cut[cursor - first :] != MISSING):
                raise ValueError(
                    f"expected step {step} to show tokens from first on and before the cursor only, "
                    f"0 <= first < cursor, got first {first} and cursor {cursor}"
                )


# Most cells of an image, across and down: no more than it has pixels, or some would not be seen.
_CELLS = (800, 500)
_STREAM_EXPLANATION = (
    "Each row of the maps is one working context, all that the model sees of the stream\n"
    "after a refocus step. On the left it is where its tokens are in the stream; on the\n"
    "right the same rows are moved so that their newest tokens meet.\n\n"
    "A cell has the colour of the finest level of detail in it. Cells, in tokens by steps:\n"
    "{left:,} x {steps:,} on the left, {right:,} x {steps:,} on the right."
)


@own_look()
def stream_map(stream: StreamMap, path: str | Path) -> Figure:
    """Draws what a session looked at as it read a stream; under it entries by level, swap rate and loss.

    A long stream is drawn in cells of several tokens and steps, each in the colour of the finest level in it.

    Args:
      stream: what was looked at.
      path: where to write; the ending sets the format.

    Returns:
      The figure that was written.
    """
    figure = new_figure(14, 9.5)
    figure.suptitle(stream.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    grid = figure.add_gridspec(4, 2, height_ratios=(5, 1.3, 1, 1))
    colors = _lod_colors(stream.max_lod)
    ahead = figure.add_subplot(grid[0, 0])
    left, steps = _draw_finest(ahead, stream, stream.first, 1, int(stream.cursors[-1]), colors)
    dress(ahead, "What is looked at", "position in the stream, in tokens", "refocus step: tokens read")
    behind = figure.add_subplot(grid[0, 1], sharey=ahead)
    reach = stream.cursors - stream.first
    right, _ = _draw_finest(behind, stream, reach - 1, -1, int(reach.max()), colors)
    dress(behind, "Seen from the cursor", "tokens behind the cursor", "")
    behind.invert_xaxis()
    behind.tick_params(labelleft=False)
    strips = [figure.add_subplot(grid[row, 0], sharex=ahead) for row in (1, 2, 3)]
    strips[0].stackplot(stream.cursors, _entries_by_level(stream), colors=colors)
    dress(strips[0], "Entries by level of detail", "", "entries")
    _draw_strip(strips[1], stream.cursors, stream.swap_rate)
    dress(strips[1], "Swap rate", "", "share of entries")
    _draw_strip(strips[2], stream.cursors, stream.nll)
    dress(strips[2], "Loss on the tokens read since the step before", "tokens read", "nats per token")
    notes = figure.add_subplot(grid[1:, 1])
    notes.axis("off")
    patches = [*_lod_patches(colors, stream.block_size), Patch(facecolor="white", edgecolor=MUTED, label="not shown")]
    notes.legend(handles=patches, loc="upper left", ncols=2, fontsize=9, **LEGEND)
    explanation = _STREAM_EXPLANATION.format(left=left, right=right, steps=steps)
    notes.text(0, 0.72, explanation, va="top", fontsize=9, color=MUTED, transform=notes.transAxes)
    write(figure, path)
    return figure


def _draw_finest(
    ax: Axes, stream: StreamMap, origins: np.ndarray, direction: int, extent: int, colors: np.ndarray
) -> tuple[int, int]:
    """One row a step, whose first token is drawn at its origin; returns the tokens and steps of a cell."""
    tokens, steps = -(-extent // _CELLS[0]), -(-len(stream.cuts) // _CELLS[1])
    nothing = stream.max_lod + 1
    image = np.full((-(-len(stream.cuts) // steps), -(-extent // tokens)), nothing, stream.cuts.dtype)
    # Row by row: all of them at once would be a copy of the cuts and more.
    for step, (origin, cut) in enumerate(zip(origins, stream.cuts, strict=True)):
        (shown,) = np.nonzero(cut != MISSING)
        np.minimum.at(image[step // steps], (origin + direction * shown) // tokens, cut[shown])
    ax.imshow(
        np.ma.masked_equal(image, nothing),
        cmap=ListedColormap(colors),
        vmin=-0.5,
        vmax=stream.max_lod + 0.5,
        extent=(0, image.shape[1] * tokens, image.shape[0] * steps, 0),
        aspect="auto",
        interpolation="nearest",
        zorder=1,  # the grid is at 0.5
    )
    ax.set(xlim=(0, extent), ylim=(len(stream.cuts), 0))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    labelled = np.unique(np.linspace(0, len(stream.cuts) - 1, 9).astype(int))
    ax.set_yticks(labelled + 0.5, labels=[f"{step}: {stream.cursors[step]:,}" for step in labelled])
    return tokens, steps


def _entries_by_level(stream: StreamMap) -> np.ndarray:
    """float[L + 1, F]: a gist counts once, however many tokens it covers."""
    tokens = [np.bincount(cut[cut != MISSING], minlength=stream.max_lod + 1) for cut in stream.cuts]
    return (np.array(tokens) / stream.block_size ** np.arange(stream.max_lod + 1)).T


def _draw_strip(ax: Axes, cursors: np.ndarray, values: np.ndarray) -> None:
    if (width := noise_width(len(values))) > 1:
        ax.plot(cursors, values, linewidth=0.7, alpha=0.3, color=COLORS[0])
        values = running_mean(values, width=width)
    ax.plot(cursors, values, linewidth=1.6, color=COLORS[0], marker="" if width > 1 else "o", markersize=3.5)
