import math

import numpy as np
import pytest

from lensjax.plots.curves import training_curves
from lensjax.plots.style import running_mean
from tests.plots.pictures import is_png, panels, points


def test_curves_hold_the_values_and_gaps_of_the_rows(tmp_path):
    rows = [
        {"phase": "pretrain", "step": 5, "token_loss": 5.0, "lr": 0.1},
        {"phase": "lens", "step": 5, "mc/lens_loss": 0.5, "mc/rank_loss": 0.25, "mc/lod_loss/0": 9.0},
        {"phase": "lens", "step": 10, "mc/lens_loss": "nan", "mc/rank_loss": 0.5, "perf/steps_per_second": 3.0},
        {"phase": "lens", "step": 10, "eval/mc/preference_agreement": 0.75, "eval/mc/preference_corr_mean": "n/a"},
        {"phase": "lens", "step": 15, "mc/lens_loss": "-inf", "eval/nll_oracle": 1.5, "eval/nll_baseline": 2.0},
        {"phase": "lens", "step": 20, "mc/lens_loss": 0.25, "eval/nll_oracle": "n/a", "eval/nll_baseline": 2},
    ]
    shown = panels(training_curves(rows, tmp_path / "curves.png"))
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
    assert points(pretraining) == {"train": [[5, 5.0]]}
    assert points(terms) == {"total": [[5, 0.5], [10, gap], [15, gap], [20, 0.25]], "rank": [[5, 0.25], [10, 0.5]]}
    assert points(held_out) == {"recency": [[15, 2.0], [20, 2.0]], "oracle": [[15, 1.5], [20, gap]]}
    assert points(agreement) == {"LensNet": [[10, 0.75]]}
    assert [0.5, 0.5] in [list(line.get_ydata()) for line in agreement.lines]
    assert points(rate) == {"pretraining": [[5, 0.1]]}


def test_a_run_that_only_distils_has_curves(tmp_path):
    rows = [
        {"phase": "distill", "step": 10, "loss": 0.75, "distill/top_agreement": 0.25, "grad_norm": 9.0, "lr": 0.1},
        {"phase": "distill", "step": 10, "eval/nll_policy": 2.0, "eval/nll_baseline": 3.0, "eval/nll_oracle": 1.0},
        {"phase": "distill", "step": 20, "loss": 0.5, "distill/top_agreement": 0.5, "grad_norm": 9.0, "lr": 0.05},
        {"phase": "distill", "step": 20, "eval/nll_policy": 1.5, "eval/hit_rate": 0.5, "eval/hit_rate_random": 0.25},
    ]
    shown = panels(training_curves(rows, tmp_path / "curves.png"))
    assert is_png(tmp_path / "curves.png")
    assert {title: points(panel) for title, panel in shown.items()} == {
        "Distillation: divergence from the teacher": {"train": [[10, 0.75], [20, 0.5]]},
        "Blocks that LensNet and its teacher share": {"train": [[10, 0.25], [20, 0.5]]},
        "Distillation: held-out loss at the budget": {
            "LensNet": [[10, 2.0], [20, 1.5]],
            "recency": [[10, 3.0]],
            "oracle": [[10, 1.0]],
        },
        "Distillation: held-out hit rate": {
            "the answer is shown in full": [[20, 0.5]],
            "random rollouts": [[20, 0.25]],
        },
        "Learning rate": {"distillation": [[10, 0.1], [20, 0.05]]},
    }


def test_distillation_and_preferences_are_panels_apart(tmp_path):
    rows = [
        {"phase": phase, "step": 5, "eval/nll_policy": loss, "eval/hit_rate": hits, "lr": rate}
        for phase, loss, hits, rate in (("distill", 2.0, 0.5, 0.1), ("lens", 1.0, 0.75, 0.2))
    ]
    shown = {title: points(panel) for title, panel in panels(training_curves(rows, tmp_path / "curves.png")).items()}
    assert shown == {
        "Distillation: held-out loss at the budget": {"LensNet": [[5, 2.0]]},
        "Distillation: held-out hit rate": {"the answer is shown in full": [[5, 0.5]]},
        "Held-out loss at the budget (lower is better)": {"LensNet": [[5, 1.0]]},
        "Held-out hit rate": {"the answer is shown in full": [[5, 0.75]]},
        "Learning rate": {"distillation": [[5, 0.1]], "preferences": [[5, 0.2]]},
    }


def test_noisy_training_metrics_get_a_running_mean_and_others_do_not(tmp_path):
    rows = [
        {"phase": "lens", "step": step, "mc/lens_loss": float(step % 2), "lr": float(step % 2)} for step in range(1, 41)
    ]
    loss, rate = training_curves(rows, tmp_path / "curves.png").axes
    raw, mean = (line.get_ydata() for line in loss.lines)
    assert raw.tolist() == rate.lines[0].get_ydata().tolist() == [1.0, 0.0] * 20
    assert mean.tolist() == pytest.approx([1 / 2, *([2 / 3, 1 / 3] * 19), 1 / 2])


def test_running_mean_by_hand():
    values = np.array([1.0, 3.0, math.nan, 5.0, 0.0])
    mean = running_mean(values, width=3)
    assert mean.tolist() == pytest.approx([2.0, 2.0, math.nan, 2.5, 2.5], nan_ok=True)


def test_rows_without_a_known_metric_are_refused(tmp_path):
    rows = [{"phase": "lens", "step": 1, "perf/steps_per_second": 1.0, "eval/mc/preference_corr_mean": "n/a"}]
    with pytest.raises(ValueError, match="none of 1 rows holds a metric to draw"):
        training_curves(rows, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
