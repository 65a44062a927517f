import csv

import numpy as np
import pytest

from lensjax.plots.budget import quality_at_budget
from lensjax.plots.style import MUTED
from tests.plots.pictures import is_png, labelled_lines, panels

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


def test_quality_is_drawn_at_its_budget_with_its_interval(tmp_path):
    figure = quality_at_budget(results(), tmp_path / "quality.png", title="a$_$b")
    assert is_png(tmp_path / "quality.png")
    assert figure.get_suptitle() == "a$_$b"
    loss, gap, hits = panels(figure).values()
    lines = labelled_lines(loss)
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
    assert labelled_lines(hits)["lensnet_1"].get_ydata().tolist() == [0.5, 1.0]
    assert hits.get_xlabel() == "budget: entries, and tokens per entry"


def test_gaps_far_beyond_are_drawn_at_the_edge_and_named(tmp_path):
    gap = quality_at_budget(results(), tmp_path / "quality.png").axes[1]
    lines = labelled_lines(gap)
    assert lines["lensnet_1"].get_ydata().tolist() == [0.375, 0.5]
    assert lines["key_norm"].get_ydata().tolist() == [-0.5, 0.25]
    (edge,) = (line for line in gap.lines if line.get_marker() == "v" and line.get_fillstyle() == "none")
    assert edge.get_ydata().tolist() == [-0.5] and edge.get_xdata()[0] == lines["key_norm"].get_xdata()[0]
    assert gap.get_xlabel().endswith("beyond the edge (open triangles): key_norm (to -2.00)")
    assert not any(np.isfinite(labelled_lines(gap)["full"].get_ydata()))


def test_legend_stands_in_the_order_of_the_lines_and_lensnet_stands_out(tmp_path):
    names = ("full", "lensnet_1", "uniform", "random", "recent_random", "key_norm", "snapkv", "bm25", "lensnet_4")
    rows = [dict(results()[0], policy=name, nll=str(place)) for place, name in enumerate(names)]
    rows += [dict(rows[0], policy="bm25_hindsight", information="hindsight", nll="4.5")]
    figure = quality_at_budget(rows, tmp_path / "quality.svg")
    (legend,) = figure.legends
    # From worst to best; what knows the horizon is last, however good.
    assert [text.get_text() for text in legend.get_texts()] == [*reversed(names), "bm25 in hindsight"]
    bold = {text.get_text() for text in legend.get_texts() if text.get_fontweight() == "bold"}
    lines = labelled_lines(figure.axes[0])
    widest = max(line.get_linewidth() for line in lines.values())
    assert (
        bold == {name for name, line in lines.items() if line.get_linewidth() == widest} == {"lensnet_1", "lensnet_4"}
    )
    looks = {(line.get_color(), line.get_marker()) for line in lines.values()}
    assert len(looks) == len({line.get_marker() for line in lines.values()}) == len(names) + 1
    assert lines["full"].get_linestyle() == "--" and lines["full"].get_color() == MUTED


def test_panels_without_values_are_left_out(tmp_path):
    figure = quality_at_budget(results(gap_closed_oracle="", hit_rate=""), tmp_path / "quality.png")
    assert list(panels(figure)) == ["Held-out loss (lower is better)"]
    numbers = [row | {"entries": 64, "budget_ratio": 8, "nll": 2.5} for row in results()[:1]]
    (line,) = quality_at_budget(numbers, tmp_path / "quality.png").axes[0].get_lines()
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
        quality_at_budget(rows, tmp_path / "quality.png")
    assert not (tmp_path / "quality.png").exists()
