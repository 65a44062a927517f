"""The look that all pictures share: figures, colours, axes, and what is done to noisy or undefined numbers.

Figures are objects of their own: matplotlib's global state stays as it was, and the user's style does not matter.
"""

import functools
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lensjax.training.metrics import UNDEFINED

Row = Mapping[str, Any]
"""Metrics by name, with `phase` and `step`; or a line of a table, by column."""
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
own_look = functools.partial(matplotlib.style.context, "default")
"""Inside it (or in a function that is decorated by it) matplotlib's settings are those of nobody's `matplotlibrc`."""


@contextmanager
def attempt(path: Path) -> Iterator[Path]:
    """Inside it, a picture that cannot be drawn is one warning: what it shows is worth more, and written before it."""
    try:
        yield path
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"warning: no picture {path}: {reason or type(error).__name__}", file=sys.stderr)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches that lays itself out."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))


def write(figure: Figure, path: str | Path) -> None:
    """Writes a figure, whole or not at all; the ending sets the format. What the font cannot draw is a box."""
    path = Path(path)
    hidden = path.with_name(f".tmp-{path.name}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
            figure.savefig(hidden, format=path.suffix[1:] or "png", dpi=_DPI)
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def dress(ax: Axes, title: str, x: str, y: str, *, pad: float = 6) -> None:
    """Names axes, with room for `pad` points under the title, and keeps them in the background."""
    ax.set_title(title, loc="left", pad=pad, fontsize=10, fontweight="bold", color=INK, parse_math=False)
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


def legible(text: str) -> str:
    """A text on one line, with a box for what the font cannot draw."""
    font = get_font(findfont(FontProperties()))
    on_a_line = text.replace("\n", "\u21b5").replace("\t", "\u21e5")  # arrows, as on the keys
    return "".join(char if char.isprintable() and font.get_char_index(ord(char)) else "\u25a1" for char in on_a_line)


def noise_width(count: int) -> int:
    """Points that the running mean of a noisy curve takes in: an odd number, 1 for short curves."""
    return 1 + 2 * (count // 40)


def running_mean(values: np.ndarray, *, width: int) -> np.ndarray:
    """Centred mean over an odd number of points, fewer at the ends; gaps stay gaps."""
    known = np.isfinite(values)
    totals = np.convolve(np.where(known, values, 0.0), np.ones(width), "same")
    counts = np.convolve(known, np.ones(width), "same")
    return np.where(known, totals / np.maximum(counts, 1), math.nan)


def finite_or_nan(value: Any) -> float:
    """A number of a row; NaN where it is undefined, empty or not finite."""
    number = math.nan if value in (UNDEFINED, "") else float(value)
    return number if math.isfinite(number) else math.nan
