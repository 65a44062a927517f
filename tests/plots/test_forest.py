import itertools
import math

import numpy as np
import pytest

from lensjax.evaluation.effects import Effect
from lensjax.plots import effects as forests
from lensjax.plots.effects import forest
from tests.plots.pictures import is_png, panels


def effect(knob, value, difference, half=0.01, *, p=1.0, seeds=3, diverged=0):
    low, high = (None, None) if half is None else (difference - half, difference + half)
    mean = 2 + difference
    return Effect(knob, value, seeds, mean, low, high, difference, low, high, p, p, diverged, {})


DEFAULT = effect("default", "", 0.0, None, p=None)
FOUND = [
    DEFAULT,
    effect("far", "pair", 0.5, p=0.001),
    effect("rate", "0.1", 0.04, p=0.001),
    effect("rate", "1e-05", -0.03, p=0.01, diverged=1),
    effect("$^$", "b$_$", -0.02, half=0.015),
    effect("$^$", "a", 0.01, half=0.4),
    effect("rate", "0.02", 0.005, half=None, p=None, seeds=1, diverged=2),
    effect("rate", "9", math.nan, half=None, p=None, seeds=0, diverged=3),
]
VALUES = {"far": "entry", "rate": 1e-3, "$^$": "c", "near": 4, "a": 0.5}
NEAR = [effect("near", str(place), 0.02) for place in range(4)]


def marks(ax):
    """(row, value, colour, is filled) of each point."""
    points = [line for line in ax.lines if line.get_marker() == "o"]
    return {
        (*line.get_ydata(), *line.get_xdata(), line.get_color(), line.get_markerfacecolor() != "white")
        for line in points
    }


def bars(ax):
    return [segment[:, 0].tolist() for bar in ax.collections for segment in bar.get_segments()]


def triangles(ax):
    return [(line.get_marker(), *line.get_xdata()) for line in ax.lines if line.get_marker() in ("<", ">")]


def ticks(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_every_setting_stands_in_the_row_of_its_value(tmp_path):
    figure = forest(FOUND, tmp_path / "forest.png", default=VALUES, title="a$_$b")
    assert is_png(tmp_path / "forest.png")
    assert figure.get_suptitle() == "a$_$b"
    shown = panels(figure)
    assert list(shown) == ["far (default entry)", "rate (default 0.001)", "$^$ (default c)"]
    _, rate, words = shown.values()
    assert ticks(rate) == ["1e-05 (1 diverged)", "0.02 (2 diverged)", "0.1", "9 (3 diverged)"]
    assert marks(rate) == {
        (0, -0.03, forests.LOWER, True),
        (1, 0.005, forests.NEITHER, False),
        (2, 0.04, forests.HIGHER, True),
    }
    assert bars(rate) == [pytest.approx(ends) for ends in ([-0.04, -0.02], [0.005, 0.005], [0.03, 0.05])]
    assert [text.get_text() for text in rate.texts] == ["no seed to compare"] and rate.texts[0].xy == (0, 3)
    assert ticks(words) == ["b$_$", "a"]
    for ax, rows in zip(shown.values(), (1, 4, 2), strict=True):
        assert ax.get_ylim() == (rows - 0.5, -0.5)
        assert [0, 0] in [list(line.get_xdata()) for line in ax.lines]


def test_all_panels_share_an_axis_that_no_outlier_stretches(tmp_path):
    far, rate, words, _ = forest([*FOUND, *NEAR], tmp_path / "forest.png", default=VALUES).axes
    left, right = far.get_xlim()
    assert rate.get_xlim() == words.get_xlim() == (left, right)
    assert left < -0.04 < 0.05 < right < 0.1
    # The difference itself is beyond: no point, but its number.
    assert marks(far) == set() and triangles(far) == [(">", right)] and far.texts[0].get_text() == "+0.500"
    # The difference is within, its interval is not.
    assert (1, 0.01, forests.NEITHER, True) in marks(words) and words.texts[:] == []
    assert triangles(words) == [("<", left), (">", right)] and bars(words)[1] == [left, right]
    assert triangles(rate) == []


def test_legend_names_the_colours_that_are_there(tmp_path):
    (legend,) = forest(FOUND, tmp_path / "forest.png", default=VALUES).legends
    names = {text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.get_lines(), strict=True)}
    assert names == {
        "lower NLL, p < 0.05 (Holm)": forests.LOWER,
        "higher NLL, p < 0.05 (Holm)": forests.HIGHER,
        "not distinguishable from zero": forests.NEITHER,
    }
    (legend,) = forest(FOUND[:3], tmp_path / "forest.png", default=VALUES).legends
    assert [text.get_text() for text in legend.texts] == ["higher NLL, p < 0.05 (Holm)"]


def test_no_text_lies_on_other_text(tmp_path):
    values = {f"hyper.knob_{i} + hyper.other_{i}": range(1 + i % 4) for i in range(10)}
    found = [effect(knob, f"{value}.5", 0.01 * value, diverged=value % 2) for knob in values for value in values[knob]]
    default = VALUES | {f"hyper.{name}_{i}": 0.25 for i in range(10) for name in ("knob", "other")}
    effects = [DEFAULT, *found, *FOUND[1:]]
    figure = forest(effects, tmp_path / "forest.png", default=default, title="a sweep of many knobs")
    figure.draw_without_rendering()
    texts = [figure._suptitle, *figure.legends[0].texts]
    for ax in figure.axes:
        axis_labels = ax.get_xticklabels() if ax.get_xlabel() else []
        texts += [ax.title, ax._left_title, ax.xaxis.label, *ax.texts, *ax.get_yticklabels(), *axis_labels]
    left, right = figure.axes[0].get_xlim()
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in texts
        if text.get_text() and (text not in axis_labels or left <= text.get_position()[0] <= right)
    ]
    assert len(boxes) > 45
    for (one, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (one, other)
    for one, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, one
    starts = {round(ax.get_position().x0, 2) for ax in figure.axes}
    assert len(starts) == 2


@pytest.mark.parametrize("effects", [[DEFAULT], [DEFAULT, FOUND[-1]]])
def test_sweeps_without_a_difference_are_refused(tmp_path, effects):
    with pytest.raises(ValueError, match="no setting beside the default has seeds to compare"):
        forest(effects, tmp_path / "forest.png", default=VALUES)
    assert not (tmp_path / "forest.png").exists()


def test_settings_that_change_nothing_are_drawn(tmp_path):
    (ax,) = forest([DEFAULT, effect("a", "1", 0.0, half=0.0)], tmp_path / "forest.svg", default=VALUES).axes
    assert marks(ax) == {(0, 0.0, forests.NEITHER, True)}
    assert np.subtract(*ax.get_xlim()) < 0
