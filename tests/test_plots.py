import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from lensjax import plots


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr(plots, "_DPI", 40)


def panels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def curves(ax):
    """Points by label; lines without one (faint values, levels) are left out."""
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    return {line.get_label(): np.stack(line.get_data(), axis=1).tolist() for line in lines}


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2_000


# Training curves


def test_curves_hold_the_values_and_gaps_of_the_rows(tmp_path):
    rows = [
        {"phase": "pretrain", "step": 5, "token_loss": 5.0, "lr": 0.1},
        {"phase": "lens", "step": 5, "mc/lens_loss": 0.5, "mc/rank_loss": 0.25, "mc/lod_loss/0": 9.0},
        {"phase": "lens", "step": 10, "mc/lens_loss": "nan", "mc/rank_loss": 0.5, "perf/steps_per_second": 3.0},
        {"phase": "lens", "step": 10, "eval/mc/preference_agreement": 0.75, "eval/mc/preference_corr_mean": "n/a"},
        {"phase": "lens", "step": 15, "mc/lens_loss": "-inf", "eval/nll_oracle": 1.5, "eval/nll_baseline": 2.0},
        {"phase": "lens", "step": 20, "mc/lens_loss": 0.25, "eval/nll_oracle": "n/a", "eval/nll_baseline": 2},
    ]
    shown = panels(plots.training_curves(rows, tmp_path / "curves.png"))
    assert is_png(tmp_path / "curves.png")
    assert list(shown) == [
        "Pretraining loss",
        "LensNet loss and its terms before weights",
        "Held-out loss at the budget (lower is better)",
        "Held-out agreement with measured preferences",
        "Learning rate",
    ]
    pretraining, terms, held_out, agreement, rate = shown.values()
    gap = pytest.approx(math.nan, nan_ok=True)
    assert curves(pretraining) == {"train": [[5, 5.0]]}
    assert curves(terms) == {"total": [[5, 0.5], [10, gap], [15, gap], [20, 0.25]], "rank": [[5, 0.25], [10, 0.5]]}
    assert curves(held_out) == {"recency": [[15, 2.0], [20, 2.0]], "oracle": [[15, 1.5], [20, gap]]}
    assert curves(agreement) == {"LensNet": [[10, 0.75]]}
    assert [0.5, 0.5] in [list(line.get_ydata()) for line in agreement.lines]
    assert curves(rate) == {"pretraining": [[5, 0.1]]}


def test_noisy_training_metrics_get_a_running_mean_and_others_do_not(tmp_path):
    rows = [
        {"phase": "lens", "step": step, "mc/lens_loss": float(step % 2), "lr": float(step % 2)} for step in range(1, 41)
    ]
    loss, rate = plots.training_curves(rows, tmp_path / "curves.png").axes
    raw, mean = (line.get_ydata() for line in loss.lines)
    assert raw.tolist() == rate.lines[0].get_ydata().tolist() == [1.0, 0.0] * 20
    assert mean.tolist() == pytest.approx([1 / 2, *([2 / 3, 1 / 3] * 19), 1 / 2])


def test_running_mean_by_hand():
    values = np.array([1.0, 3.0, math.nan, 5.0, 0.0])
    mean = plots._running_mean(values, width=3)
    assert mean.tolist() == pytest.approx([2.0, 2.0, math.nan, 2.5, 2.5], nan_ok=True)


def test_rows_without_a_known_metric_are_refused(tmp_path):
    rows = [{"phase": "lens", "step": 1, "perf/steps_per_second": 1.0, "eval/mc/preference_corr_mean": "n/a"}]
    with pytest.raises(ValueError, match="none of 1 rows holds a metric to draw"):
        plots.training_curves(rows, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


# Maps

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
    return plots.VariantMap(**fields | changes)


def bars(ax):
    """(row, first token, width, height in strips, colour) of each bar."""
    found = [(bar, bar.get_bbox()) for container in ax.containers for bar in container]
    return {
        (math.floor(box.y0), round(box.x0), round(box.width), round(-box.height / plots._STRIP, 3), bar.get_facecolor())
        for bar, box in found
    }


def test_map_shows_each_entry_where_it_is(tmp_path):
    figure = plots.lod_maps([variant_map(answer=(4, 6))], tmp_path / "maps.png")
    assert is_png(tmp_path / "maps.png")
    timeline, losses, legend = figure.axes
    full, gist, gist_of_gists = (tuple(color) for color in plots._lod_colors(2))
    absent = to_rgba(plots._NOT_SHOWN["facecolor"])
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
    notes = {text.get_text(): text.xy[0] for text in timeline.texts}
    assert notes == {"protected tail": 9.0, "answer": 5.0}
    weights = {label.get_text(): label.get_fontweight() for label in timeline.get_yticklabels()}
    assert weights == {"baseline": "normal", "rollout 1": "bold", "$^$pick": "normal"}
    numbers = {text.get_text(): text.get_fontweight() for text in losses.texts}
    assert numbers == {"2.500": "normal", "2.000": "bold", "2.250": "normal"}
    dots = [line.get_xdata()[0] for line in losses.lines if line.get_marker() == "o"]
    assert dots == [2.5, 2.0, 2.25]
    names = [text.get_text() for text in legend.get_legend().get_texts()]
    assert names == ["LOD 0: token in full", "LOD 1: gist of 2 tokens", "LOD 2: gist of 4 tokens", "not shown"]


def test_levels_are_told_apart_by_lightness():
    luminance = plots._lod_colors(4)[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0.08).all()


def test_maps_of_several_windows_share_one_picture(tmp_path):
    small = variant_map(cuts=CUTS[:2, 2:], scores=SCORES[:2, 2:], nll=np.ones(2), labels=["a", "b"])
    figure = plots.lod_maps([variant_map(), small], tmp_path / "maps.svg")
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
        plots.lod_maps([], tmp_path / "maps.png")
    with pytest.raises(ValueError, match=r"maps of one block size, got \[2, 4\]"):
        plots.lod_maps([variant_map(), variant_map(block_size=4)], tmp_path / "maps.png")


def test_global_state_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = dict(matplotlib.rcParams)
    plots.training_curves([{"phase": "lens", "step": 1, "lr": 1.0}], tmp_path / "curves.png")
    plots.lod_maps([variant_map()], tmp_path / "maps.png")
    assert "matplotlib.pyplot" not in sys.modules
    assert dict(matplotlib.rcParams) == before
