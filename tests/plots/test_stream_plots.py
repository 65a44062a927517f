import math

import numpy as np
import pytest

from lensjax.plots import stream as stream_plots
from lensjax.plots import style
from lensjax.plots.stream import StreamCost, StreamQuality

STEPS = 100
CURSORS = 32 * np.arange(10, 10 + STEPS)
LOSSES = {
    "session": np.linspace(2, 3, STEPS),
    "a$_$b": np.linspace(2, 3, STEPS) + 0.5,
    "whole": np.linspace(2, 3, STEPS) - 0.25,
}
DIFFERENCES = {"a$_$b": (0.5, 0.4, 0.7), "whole": (-0.25, -0.26, -0.24)}


def quality(**changes):
    return StreamQuality(
        **{"title": "x$_$y", "cursors": CURSORS, "losses": LOSSES, "differences": DIFFERENCES} | changes
    )


def data_of(line):
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def test_losses_stand_above_and_how_far_they_are_from_the_reference_below(tmp_path):
    figure = stream_plots.stream_quality(quality(), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG") and figure.get_suptitle() == "x$_$y"
    along, apart, means = figure.axes
    width = style.noise_width(STEPS)
    assert width > 1 and f"running mean of {width} horizons" in along.get_title(loc="left")
    labels = [text.get_text() for text in along.get_legend().get_texts()]
    assert labels == list(LOSSES)
    for line, losses in zip(along.lines, LOSSES.values(), strict=True):
        x, y = data_of(line)
        np.testing.assert_array_equal(x, CURSORS)
        np.testing.assert_allclose(y, style.running_mean(losses, width=width))
    for line, expected in zip(apart.lines, (0.5, -0.25, 0), strict=True):
        np.testing.assert_allclose(data_of(line)[1], expected, atol=1e-12)
    assert apart.get_title(loc="left") == "Minus session" and apart.get_xlim() == along.get_xlim()
    labels = [text.get_text() for text in means.get_yticklabels()]
    assert labels == ["a$_$b\n+0.5000 [+0.4000, +0.7000]", "whole\n-0.2500 [-0.2600, -0.2400]"]
    bars = [line for line in means.lines if len(line.get_xdata()) == 2 and line.get_linewidth() > 1]
    for row, (mean, low, high) in enumerate(DIFFERENCES.values()):
        assert any(data_of(line)[0].tolist() == [low, high] and set(data_of(line)[1]) == {row} for line in bars)
        assert any(
            data_of(line) == (np.array([mean]), np.array([row])) for line in means.lines if line.get_marker() == "o"
        )


def test_a_policy_has_one_colour_everywhere(tmp_path):
    figure = stream_plots.stream_quality(quality(), tmp_path / "quality.png")
    along, apart, means = figure.axes
    colors = dict(zip(LOSSES, [line.get_color() for line in along.lines], strict=True))
    assert len(set(colors.values())) == 3
    assert [line.get_color() for line in apart.lines] == [colors["a$_$b"], colors["whole"], colors["session"]]
    dots = [line.get_color() for line in means.lines if line.get_marker() == "o"]
    assert dots == [colors["a$_$b"], colors["whole"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cursors": CURSORS[1:]}, r"cursors and losses \[N\] of one length, got .*'cursors': \(99,\)"),
        ({"losses": LOSSES | {"whole": np.ones((STEPS, 1))}}, r"'whole': \(100, 1\)"),
        ({"differences": {"whole": (0, 0, 0)}}, "a difference for every policy but the reference, got those of whole"),
        (
            {"differences": DIFFERENCES | {"session": (0, 0, 0)}},
            "got those of a.*, whole, session for losses of session",
        ),
        ({"differences": {"whole": (0, 0, 0), "other": (math.nan, 0, 0)}}, "got those of whole, other"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        quality(**changes)


def test_time_and_memory_along_a_stream(tmp_path):
    tokens = np.arange(1, 6) * 100.0
    cost = StreamCost(
        "x$_$y", tokens, {"a": tokens / 10, "b": tokens / 20}, {"c": tokens * 2**20, "d": tokens * np.nan}
    )
    figure = stream_plots.stream_cost(cost, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG") and figure.get_suptitle() == "x$_$y"
    time, memory = figure.axes
    for ax, expected in ((time, {"a": tokens / 10, "b": tokens / 20}), (memory, {"c": tokens, "d": tokens * np.nan})):
        assert {line.get_label(): data_of(line)[1].tolist() for line in ax.lines}.keys() == expected.keys()
        for line in ax.lines:
            np.testing.assert_array_equal(data_of(line), (tokens, expected[line.get_label()]))
    assert time.get_ylim()[0] == 0 and memory.get_yscale() == "log"
