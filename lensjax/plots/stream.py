"""What a session's working contexts were worth along a stream, beside those of its rivals, and what they cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensjax.plots.style import (
    COLORS,
    FAINT,
    INK,
    LEGEND,
    dress,
    new_figure,
    noise_width,
    own_look,
    running_mean,
    write,
)


@dataclass(frozen=True)
class StreamQuality:
    """The losses of several policies on one stream, for `stream_quality`."""

    title: str
    cursors: np.ndarray
    """int[N]: tokens before each horizon that was scored, rising."""
    losses: Mapping[str, np.ndarray]
    """float[N] by policy: nats per token on each horizon."""
    differences: Mapping[str, tuple[float, float, float]]
    """Of every policy but one, the reference: its mean loss minus the reference's, and a 95 % interval of that."""

    def __post_init__(self) -> None:
        shapes = {name: np.shape(values) for name, values in self.losses.items()} | {"cursors": self.cursors.shape}
        if len(set(shapes.values())) != 1 or self.cursors.ndim != 1:
            raise ValueError(f"expected cursors and losses [N] of one length, got {shapes}")
        if len(self.losses.keys() - self.differences.keys()) != 1 or self.differences.keys() - self.losses.keys():
            raise ValueError(
                "expected a difference for every policy but the reference, got those of "
                f"{', '.join(self.differences)} for losses of {', '.join(self.losses)}"
            )

    @property
    def reference(self) -> str:
        """The policy that the others are compared with."""
        (name,) = self.losses.keys() - self.differences.keys()
        return name


@own_look()
def stream_quality(quality: StreamQuality, path: str | Path) -> Figure:
    """Draws nats per token along the stream; under it how far each policy is from the reference, there and on average.

    Args:
      quality: the losses. Curves are running means over about a twentieth of the stream.
      path: where to write; the ending sets the format.

    Returns:
      The figure that was written.
    """
    styles, width = _styles(quality), noise_width(len(quality.cursors))
    own = quality.losses[quality.reference]
    figure = new_figure(13, 7.5)
    figure.suptitle(quality.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1))
    along = figure.add_subplot(grid[0, :])
    for name, losses in quality.losses.items():
        along.plot(quality.cursors, running_mean(losses, width=width), label=name, **styles[name])
    mean_of = f"running mean of {width} horizons" if width > 1 else "each horizon"
    title = f"Loss along the stream (lower is better; {mean_of})"
    dress(along, title, "tokens read", "nats per token", pad=22)
    legend = along.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(styles), fontsize=9, **LEGEND)
    for text in legend.get_texts():
        text.set_parse_math(False)
    apart = figure.add_subplot(grid[1, 0], sharex=along)
    for name in quality.differences:
        apart.plot(quality.cursors, running_mean(quality.losses[name] - own, width=width), **styles[name])
    apart.axhline(0, **styles[quality.reference])
    dress(apart, f"Minus {quality.reference}", "tokens read", "nats per token")
    along.xaxis.set_major_formatter("{x:,.0f}")
    _draw_means(figure.add_subplot(grid[1, 1]), quality, styles)
    write(figure, path)
    return figure


def _styles(quality: StreamQuality) -> dict[str, dict[str, Any]]:
    """The reference bold and in blue, all others thin."""
    others = {
        name: {"color": COLORS[1 + place % (len(COLORS) - 1)], "linewidth": 1.3, "zorder": 3}
        for place, name in enumerate(quality.differences)
    }
    return {quality.reference: {"color": COLORS[0], "linewidth": 2, "zorder": 4}, **others}


def _draw_means(ax: Axes, quality: StreamQuality, styles: Mapping[str, dict[str, Any]]) -> None:
    """One row a policy: the mean difference and its interval, drawn and as numbers."""
    for row, (name, (mean, low, high)) in enumerate(quality.differences.items()):
        color = styles[name]["color"]
        ax.axhline(row, color=FAINT, linewidth=0.8, zorder=0)
        ax.plot([low, high], [row, row], color=color, linewidth=2.4)
        ax.plot(mean, row, "o", color=color, markersize=7)
    ax.axvline(0, **styles[quality.reference])
    dress(
        ax,
        f"Minus {quality.reference}, mean and 95 % interval",
        f"nats per token (right of the line: {quality.reference} is better)",
        "",
    )
    ax.grid(visible=False)
    labels = [
        f"{name}\n{mean:+.4f} [{low:+.4f}, {high:+.4f}]" for name, (mean, low, high) in quality.differences.items()
    ]
    ax.set_yticks(range(len(labels)), labels=labels, parse_math=False)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(5))


@dataclass(frozen=True)
class StreamCost:
    """What reading a stream cost, for `stream_cost`."""

    title: str
    tokens: np.ndarray
    """int[N]: tokens read at the end of each piece of the stream, rising."""
    microseconds: Mapping[str, np.ndarray]
    """float[N] by clock: of one token of each piece."""
    bytes: Mapping[str, np.ndarray]
    """float[N] by place: memory at the end of each piece; NaN where it is not known."""


@own_look()
def stream_cost(cost: StreamCost, path: str | Path) -> Figure:
    """Draws microseconds a token along the stream, and under it the memory that is taken, on a logarithmic scale.

    Args:
      cost: time and memory of consecutive pieces of the stream.
      path: where to write; the ending sets the format.

    Returns:
      The figure that was written.
    """
    figure = new_figure(11, 6.5)
    figure.suptitle(cost.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    time, memory = figure.subplots(2, 1, sharex=True)
    for ax, curves in ((time, cost.microseconds), (memory, {k: v / 2**20 for k, v in cost.bytes.items()})):
        for color, (name, values) in zip(COLORS, curves.items(), strict=False):
            ax.plot(cost.tokens, values, color=color, label=name)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curves), fontsize=9, **LEGEND)
    dress(time, "Time of a token (lower is better)", "", "microseconds", pad=22)
    dress(memory, "Memory", "tokens read", "MiB", pad=22)
    time.set_ylim(bottom=0)
    memory.set_yscale("log")
    memory.xaxis.set_major_formatter("{x:,.0f}")
    write(figure, path)
    return figure
