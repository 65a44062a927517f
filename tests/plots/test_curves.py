import csv
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from lensjax.plots import curves


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr(curves, "_DPI", 40)


def panels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def drawn(ax):
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
    shown = panels(curves.training_curves(rows, tmp_path / "curves.png"))
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
    assert drawn(pretraining) == {"train": [[5, 5.0]]}
    assert drawn(terms) == {"total": [[5, 0.5], [10, gap], [15, gap], [20, 0.25]], "rank": [[5, 0.25], [10, 0.5]]}
    assert drawn(held_out) == {"recency": [[15, 2.0], [20, 2.0]], "oracle": [[15, 1.5], [20, gap]]}
    assert drawn(agreement) == {"LensNet": [[10, 0.75]]}
    assert [0.5, 0.5] in [list(line.get_ydata()) for line in agreement.lines]
    assert drawn(rate) == {"pretraining": [[5, 0.1]]}


def test_noisy_training_metrics_get_a_running_mean_and_others_do_not(tmp_path):
    rows = [
        {"phase": "lens", "step": step, "mc/lens_loss": float(step % 2), "lr": float(step % 2)} for step in range(1, 41)
    ]
    loss, rate = curves.training_curves(rows, tmp_path / "curves.png").axes
    raw, mean = (line.get_ydata() for line in loss.lines)
    assert raw.tolist() == rate.lines[0].get_ydata().tolist() == [1.0, 0.0] * 20
    assert mean.tolist() == pytest.approx([1 / 2, *([2 / 3, 1 / 3] * 19), 1 / 2])


def test_running_mean_by_hand():
    values = np.array([1.0, 3.0, math.nan, 5.0, 0.0])
    mean = curves.running_mean(values, width=3)
    assert mean.tolist() == pytest.approx([2.0, 2.0, math.nan, 2.5, 2.5], nan_ok=True)


def test_rows_without_a_known_metric_are_refused(tmp_path):
    rows = [{"phase": "lens", "step": 1, "perf/steps_per_second": 1.0, "eval/mc/preference_corr_mean": "n/a"}]
    with pytest.raises(ValueError, match="none of 1 rows holds a metric to draw"):
        curves.training_curves(rows, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


# Quality at each budget

COLUMNS = (
    *("task", "policy", "information", "budget_ratio", "entries", "seed", "nll", "nll_ci_low", "nll_ci_high"),
    *("gap_closed_oracle", "gap_closed_full", "hit_rate", "swap_rate"),
)
TABLE = """
recall,recency,causal,4,128,0,3.0,2.75,3.25,0.0,,0.0,
recall,recency,causal,8,64,0,4.0,3.5,4.5,0.0,,0.0,
recall,lensnet_1,causal,8,64,0,3.0,2.75,3.5,0.5,,0.75,0.1
recall,lensnet_1,causal,8,64,1,3.5,3.0,4.0,0.25,,0.25,0.2
recall,lensnet_1,causal,4,128,0,2.5,2.25,2.75,0.5,,1.0,
recall,key_norm,causal,8,64,0,8.0,,,-2.0,,0.0,
recall,key_norm,causal,4,128,0,2.75,2.5,3.0,,,,
recall,key_norm,causal,4,128,1,2.75,2.25,2.75,0.25,,0.0,
recall,oracle,hindsight,8,64,0,2.0,1.75,2.25,1.0,,1.0,
recall,oracle,hindsight,4,128,0,2.0,1.75,2.25,1.0,,1.0,
recall,full,causal,,,0,2.25,2.0,2.5,,,,
recall,full,causal,,,1,1.75,1.5,2.0,,,,
"""


def results(table=TABLE, **changes):
    return [dict(row, **changes) for row in csv.DictReader(table.split(), COLUMNS)]


def own_lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_quality_is_drawn_at_its_budget_with_its_interval(tmp_path):
    figure = curves.quality_at_budget(results(), tmp_path / "quality.png", title="a$_$b")
    assert is_png(tmp_path / "quality.png")
    assert figure.get_suptitle() == "a$_$b"
    loss, gap, hits = panels(figure).values()
    lines = own_lines(loss)
    assert list(lines) == ["recency", "lensnet_1", "key_norm", "oracle in hindsight", "full"]
    means = {name: line.get_ydata().tolist() for name, line in lines.items() if name != "full"}
    # From 64 entries to 128, whatever the order of the rows; the mean over seeds.
    policies = {"recency": [4.0, 3.0], "lensnet_1": [3.25, 2.5], "key_norm": [8.0, 2.75]}
    assert means == policies | {"oracle in hindsight": [2.0, 2.0]}
    assert {name for name, line in lines.items() if line.get_linestyle() == ":"} == {"oracle in hindsight"}
    assert set(lines["full"].get_ydata()) == {2.0} and lines["full"].get_xdata()[:] == [0, 1]
    dodges = [np.log2(lines[name].get_xdata() / [64, 128]) for name in means]
    assert (np.abs(dodges) <= 0.2).all() and (np.diff(dodges, axis=0) > 0.05).all()
    bars = dict(zip(means, loss.collections, strict=True))
    ends = {name: [segment.tolist() for segment in some.get_segments()] for name, some in bars.items()}
    (at_64, at_128), (undefined, defined) = lines["lensnet_1"].get_xdata(), ends["key_norm"]
    assert ends["lensnet_1"] == [[[at_64, 2.75], [at_64, 4.0]], [[at_128, 2.25], [at_128, 2.75]]]
    assert undefined == [] and [y for _, y in defined] == [2.25, 3.0]
    for ax in (loss, gap, hits):
        ticks = zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
        assert {place: label.get_text() for place, label in ticks} == {64: "64\n8x", 128: "128\n4x"}
        assert ax.get_xscale() == "log"
    assert own_lines(hits)["lensnet_1"].get_ydata().tolist() == [0.5, 1.0]
    assert hits.get_xlabel() == "budget: entries, and tokens per entry"


def test_gaps_far_beyond_are_drawn_at_the_edge_and_named(tmp_path):
    gap = curves.quality_at_budget(results(), tmp_path / "quality.png").axes[1]
    lines = own_lines(gap)
    assert lines["lensnet_1"].get_ydata().tolist() == [0.375, 0.5]
    assert lines["key_norm"].get_ydata().tolist() == [-0.5, 0.25]
    (edge,) = (line for line in gap.lines if line.get_marker() == "v" and line.get_fillstyle() == "none")
    assert edge.get_ydata().tolist() == [-0.5] and edge.get_xdata()[0] == lines["key_norm"].get_xdata()[0]
    assert gap.get_xlabel().endswith("beyond the edge (open triangles): key_norm (to -2.00)")
    assert not any(np.isfinite(own_lines(gap)["full"].get_ydata()))


def test_legend_stands_in_the_order_of_the_lines_and_lensnet_stands_out(tmp_path):
    names = ("full", "lensnet_1", "uniform", "random", "recent_random", "key_norm", "snapkv", "bm25", "lensnet_4")
    rows = [dict(results()[0], policy=name, nll=str(place)) for place, name in enumerate(names)]
    rows += [dict(rows[0], policy="bm25_hindsight", information="hindsight", nll="4.5")]
    figure = curves.quality_at_budget(rows, tmp_path / "quality.svg")
    (legend,) = figure.legends
    # From worst to best; what knows the horizon is last, however good.
    assert [text.get_text() for text in legend.get_texts()] == [*reversed(names), "bm25 in hindsight"]
    bold = {text.get_text() for text in legend.get_texts() if text.get_fontweight() == "bold"}
    lines = own_lines(figure.axes[0])
    widest = max(line.get_linewidth() for line in lines.values())
    assert (
        bold == {name for name, line in lines.items() if line.get_linewidth() == widest} == {"lensnet_1", "lensnet_4"}
    )
    looks = {(line.get_color(), line.get_marker()) for line in lines.values()}
    assert len(looks) == len({line.get_marker() for line in lines.values()}) == len(names) + 1
    assert lines["full"].get_linestyle() == "--" and lines["full"].get_color() == curves.MUTED


def test_panels_without_values_are_left_out(tmp_path):
    figure = curves.quality_at_budget(results(gap_closed_oracle="", hit_rate=""), tmp_path / "quality.png")
    assert list(panels(figure)) == ["Held-out loss (lower is better)"]
    numbers = [row | {"entries": 64, "budget_ratio": 8, "nll": 2.5} for row in results()[:1]]
    (line,) = curves.quality_at_budget(numbers, tmp_path / "quality.png").axes[0].get_lines()
    assert line.get_ydata().tolist() == [2.5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 rows, in which task, policy, information, entries, budget_ratio, nll, .* are missing"),
        ([{**results()[0], "hit_rate": None}], "1 rows, in which hit_rate are missing"),
        ([{"task": "recall", "policy": "recency"}], "in which information, entries, budget_ratio, nll, .* are missing"),
        ([*results(), *results(task="text")], "rows of one task, got those of recall, text"),
        (results(entries=""), "entries and budget_ratio above 0 in all rows but those of 'full', got .*'entries': ''"),
        (results(budget_ratio="0"), "entries and budget_ratio above 0 .* got .*'budget_ratio': '0'"),
        (results()[-2:], "only rows of 'full'"),
        (results(nll=""), r"nll, got none of policy recency at one of \[64.0, 128.0\]"),
    ],
)
def test_tables_that_cannot_be_drawn_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        curves.quality_at_budget(rows, tmp_path / "quality.png")
    assert not (tmp_path / "quality.png").exists()


def test_global_state_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = dict(matplotlib.rcParams)
    curves.training_curves([{"phase": "lens", "step": 1, "lr": 1.0}], tmp_path / "curves.png")
    curves.quality_at_budget(results(), tmp_path / "quality.png")
    assert "matplotlib.pyplot" not in sys.modules
    assert dict(matplotlib.rcParams) == before
