"""What tests of pictures look at."""

from pathlib import Path

import numpy as np


def panels(figure):
    """Axes by title."""
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def labelled_lines(ax):
    """Lines by label; those without one (faint values, levels) are left out."""
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def points(ax):
    """Points of each labelled line."""
    return {label: np.stack(line.get_data(), axis=1).tolist() for label, line in labelled_lines(ax).items()}


def is_png(path: Path) -> bool:
    """Whether a picture is in the file."""
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2_000
