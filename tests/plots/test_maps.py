import math

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from lensjax.plots import maps
from tests.plots.pictures import is_png, panels

# Variants of a sequence

CUTS = np.array([[-1, -1, -1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 0, 0, 1, 1, 0, 0]])
SCORES = np.where(CUTS == -1, math.nan, np.linspace(-1, 1, 30).reshape(3, 10))


def variant_map(**changes):
    fields = {
        "title": "a$_$b",  # a file name; as a formula it would be an error
        "cuts": CUTS,
        "scores": SCORES,
        "nll": np.array([2.5, 2.0, 2.25], np.float32),
        "labels": ["baseline", "rollout 1", "$^$pick"],
        "recent_tokens": 2,
        "block_size": 2,
    }
    return maps.VariantMap(**fields | changes)


def bars(ax):
    """(row, first token, width, height in strips, colour) of each bar."""
    found = [(bar, bar.get_bbox()) for container in ax.containers for bar in container]
    return {
        (math.floor(box.y0), round(box.x0), round(box.width), round(-box.height / maps._STRIP, 3), bar.get_facecolor())
        for bar, box in found
    }


def test_map_shows_each_entry_where_it_is(tmp_path):
    figure = maps.lod_maps([variant_map(answer=[(0, 2), (4, 6)])], tmp_path / "maps.png")
    assert is_png(tmp_path / "maps.png")
    timeline, losses, legend = figure.axes
    full, gist, gist_of_gists = (tuple(color) for color in maps._lod_colors(2))
    absent = to_rgba(maps._NOT_SHOWN["facecolor"])
    assert bars(timeline) == {
        (0, 0, 3, 1.0, absent),
        (0, 3, 7, 1.0, full),
        (1, 0, 2, 0.667, gist),
        (1, 2, 2, 0.667, gist),
        (1, 4, 6, 1.0, full),
        (2, 0, 4, 0.333, gist_of_gists),
        (2, 4, 2, 1.0, full),
        (2, 6, 2, 0.667, gist),
        (2, 8, 2, 1.0, full),
    }
    for strip, scores in zip(timeline.collections, SCORES, strict=True):
        np.testing.assert_array_equal(strip.get_array().filled(math.nan), scores[None, :8])
        assert strip.get_clim() == (-1, 1)
    assert timeline.get_title(loc="left") == "a$_$b: 10 tokens in 6 to 8 entries (1.2x)"
    notes = sorted((text.get_text(), text.xy[0]) for text in timeline.texts)
    assert notes == [("answer", 1.0), ("answer", 5.0), ("query", 9.0)]
    weights = {label.get_text(): label.get_fontweight() for label in timeline.get_yticklabels()}
    assert weights == {"baseline": "normal", "rollout 1": "bold", "$^$pick": "normal"}
    numbers = {text.get_text(): text.get_fontweight() for text in losses.texts}
    assert numbers == {"2.500": "normal", "2.000": "bold", "2.250": "normal"}
    dots = [line.get_xdata()[0] for line in losses.lines if line.get_marker() == "o"]
    assert dots == [2.5, 2.0, 2.25]
    names = [text.get_text() for text in legend.get_legend().get_texts()]
    assert names == ["LOD 0: token in full", "LOD 1: gist of 2 tokens", "LOD 2: gist of 4 tokens", "not shown"]


def test_a_map_says_what_stands_at_the_cursor(tmp_path):
    timeline, _, _ = maps.lod_maps([variant_map(text=("$a$\n\té", "日|b\0"))], tmp_path / "maps.png").axes
    box, cursor = "\u25a1", " | "
    assert timeline.get_xlabel().endswith(f"at the cursor:  $a$\u21b5\u21e5é{cursor}{box}|b{box}")
    timeline, _, _ = maps.lod_maps([variant_map()], tmp_path / "maps.png").axes
    assert timeline.get_xlabel() == "token (oldest to newest)"


def test_levels_are_told_apart_by_lightness():
    luminance = maps._lod_colors(4)[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0.08).all()


def test_maps_of_several_windows_share_one_picture(tmp_path):
    small = variant_map(cuts=CUTS[:2, 2:], scores=SCORES[:2, 2:], nll=np.ones(2), labels=["a", "b"])
    figure = maps.lod_maps([variant_map(), small], tmp_path / "maps.svg")
    assert "<svg" in (tmp_path / "maps.svg").read_text()
    assert [ax.get_xlim()[1] for ax in figure.axes if ax.get_title(loc="left").startswith("a$_$b")] == [10, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuts": CUTS[0]}, r"expected cuts and scores \[V, T\]"),
        ({"scores": SCORES[:, 1:]}, r"'scores': \(3, 9\)"),
        ({"nll": np.ones(2)}, r"nll and labels \[V\]"),
        ({"nll": np.ones(2), "labels": ["a", "b"]}, "one label for each of 3 rows"),
    ],
)
def test_maps_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        variant_map(**changes)


def test_maps_of_none_or_several_block_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"maps of one block size, got \[\]"):
        maps.lod_maps([], tmp_path / "maps.png")
    with pytest.raises(ValueError, match=r"maps of one block size, got \[2, 4\]"):
        maps.lod_maps([variant_map(), variant_map(block_size=4)], tmp_path / "maps.png")


# A stream

NOT = -1
STREAM = {
    "title": "a$_$b",
    "cursors": np.array([4, 6, 8]),
    "first": np.array([0, 0, 4]),
    "cuts": np.array([[1, 1, 0, 0, NOT, NOT], [2, 2, 2, 2, 0, 0], [1, 1, 0, 0, NOT, NOT]], np.int8),
    "swap_rate": np.array([math.nan, 0.5, 0.25]),
    "nll": np.array([3.0, 2.0, 2.5]),
    "max_lod": 2,
    "block_size": 2,
}


def stream_of(**changes):
    return maps.StreamMap(**STREAM | changes)


def cells(ax):
    (image,) = ax.images
    return image.get_array().filled(NOT).tolist()


def test_stream_shows_each_token_where_it_is_and_how_far_back_it_was(tmp_path):
    figure = maps.stream_map(stream_of(), tmp_path / "stream.png")
    assert is_png(tmp_path / "stream.png")
    assert figure.get_suptitle() == "a$_$b"
    ahead, behind = figure.axes[:2]
    assert cells(ahead) == [
        [1, 1, 0, 0, NOT, NOT, NOT, NOT],
        [2, 2, 2, 2, 0, 0, NOT, NOT],
        [NOT, NOT, NOT, NOT, 1, 1, 0, 0],
    ]
    # The newest token is number 0, drawn rightmost.
    assert cells(behind) == [[0, 0, 1, 1, NOT, NOT], [0, 0, 2, 2, 2, 2], [0, 0, 1, 1, NOT, NOT]]
    assert (ahead.get_xlim(), behind.get_xlim()) == ((0, 8), (6, 0))
    assert ahead.images[0].get_extent() == [0, 8, 3, 0] and ahead.get_ylim() == behind.get_ylim() == (3, 0)
    ticks = zip(ahead.get_yticks(), ahead.get_yticklabels(), strict=True)
    assert {place: label.get_text() for place, label in ticks} == {0.5: "0: 4", 1.5: "1: 6", 2.5: "2: 8"}
    for image in (*ahead.images, *behind.images):
        assert image.to_rgba(np.arange(3), norm=True).tolist() == maps._lod_colors(2).tolist()
        assert image.to_rgba(np.ma.masked_all(1)).tolist() == [[0, 0, 0, 0]]
    notes = figure.axes[-1]
    names = [text.get_text() for text in notes.get_legend().get_texts()]
    assert names == ["LOD 0: token in full", "LOD 1: gist of 2 tokens", "LOD 2: gist of 4 tokens", "not shown"]
    assert notes.texts[0].get_text().endswith("1 x 1 on the left, 1 x 1 on the right.")


def test_strips_under_the_stream_share_its_axis(tmp_path):
    figure = maps.stream_map(stream_of(), tmp_path / "stream.svg")
    shown = panels(figure)
    entries, swaps, loss = (ax for title, ax in shown.items() if title.startswith(("Entries", "Swap", "Loss")))
    assert entries.get_xlim() == swaps.get_xlim() == loss.get_xlim() == figure.axes[0].get_xlim()
    # 2 tokens in full everywhere; on top of them one gist of LOD 1, one of LOD 2, and one of LOD 1.
    outlines = [{tuple(point) for point in area.get_paths()[0].vertices} for area in entries.collections]
    assert outlines == [
        {(4, 0), (6, 0), (8, 0), (4, 2), (6, 2), (8, 2)},
        {(4, 2), (6, 2), (8, 2), (4, 3), (8, 3)},
        {(4, 3), (6, 2), (8, 3), (6, 3)},
    ]
    assert [area.get_facecolor()[0].tolist() for area in entries.collections] == maps._lod_colors(2).tolist()
    (swap_line,), (loss_line,) = swaps.lines, loss.lines
    np.testing.assert_array_equal(swap_line.get_xydata(), [[4, math.nan], [6, 0.5], [8, 0.25]])
    np.testing.assert_array_equal(loss_line.get_xydata(), [[4, 3.0], [6, 2.0], [8, 2.5]])


def test_long_streams_show_the_finest_level_of_each_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "_CELLS", (3, 2))
    figure = maps.stream_map(stream_of(), tmp_path / "stream.png")
    ahead, behind = figure.axes[:2]
    # Cells of 3 tokens and 2 steps of the picture above, then of 2 tokens and 2 steps.
    assert cells(ahead) == [[0, 0, NOT], [NOT, 1, 0]]
    assert cells(behind) == [[0, 1, 2], [0, 1, NOT]]
    assert ahead.images[0].get_extent() == [0, 9, 4, 0] and ahead.get_xlim() == (0, 8) and ahead.get_ylim() == (3, 0)
    assert figure.axes[-1].texts[0].get_text().endswith("3 x 2 on the left, 2 x 2 on the right.")


def test_a_million_tokens_in_two_thousand_steps_make_a_small_picture(tmp_path):
    steps, reach = 2000, 512
    cursors = 500 * np.arange(1, steps + 1)
    cuts = np.zeros((steps, reach), np.int8)
    first = np.maximum(cursors - reach, 0)
    cuts[0, 500:] = NOT
    long = stream_of(
        cursors=cursors, first=first, cuts=cuts, swap_rate=np.arange(steps) % 2, nll=np.full(steps, math.nan)
    )
    figure = maps.stream_map(long, tmp_path / "stream.png")
    ahead, behind = (np.array(cells(ax)) for ax in figure.axes[:2])
    assert ahead.shape[0] <= 800 and behind.shape[0] <= 800 and ahead.shape[1] <= 1500 and behind.shape[1] <= 1500
    assert (behind == 0).all() and (np.sum(ahead == 0, axis=1) <= 3).all() and (ahead == 0).any(axis=0).all()
    raw, mean = panels(figure)["Swap rate"].lines
    assert raw.get_ydata().tolist() == [0, 1] * (steps // 2)
    np.testing.assert_allclose(mean.get_ydata(), 0.5, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuts": STREAM["cuts"][0]}, r"expected cuts \[F, C\] and the others \[F\]"),
        ({"nll": np.ones(2)}, r"'nll': \(2,\)"),
        ({"first": np.zeros((3, 1), int)}, r"'first': \(3, 1\)"),
        ({name: value[:1] for name, value in STREAM.items() if np.ndim(value)}, "at least two steps F"),
        ({"max_lod": 1}, "cuts from -1 to max_lod 1, got -1 to 2"),
        ({"cuts": STREAM["cuts"] - 1}, "cuts from -1 to max_lod 2, got -2 to 1"),
        ({"cursors": np.array([4, 6, 6])}, "cursors that rise at every step"),
        ({"first": np.array([0, 0, 5])}, "expected step 2 to show tokens .* got first 5 and cursor 8"),
        ({"first": np.array([0, -1, 4])}, "expected step 1 .* got first -1 and cursor 6"),
        ({"first": np.array([4, 0, 4])}, "expected step 0 .* got first 4 and cursor 4"),
    ],
)
def test_streams_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stream_of(**changes)
