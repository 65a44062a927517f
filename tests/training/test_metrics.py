import jax
import numpy as np
import pytest

from lensjax.training import metrics

NAN = float("nan")


def f32(*values):
    return np.asarray(values, np.float32)


def report_of(function, *arguments, **static):
    """The report as numbers, computed under jit."""
    report = jax.jit(lambda *a: function(*a, **static))(*arguments)
    assert all(value.shape == () and value.dtype == np.float32 for value in report.values())
    return {name: float(value) for name, value in report.items()}


def test_advantages_by_hand():
    losses = f32(2, 1, 4, 9, 3, 3, 9, 9).reshape(2, 4)
    valid = np.asarray([[True, True, True, False], [True, True, False, False]])
    # Deltas of the rollouts that count: -1, 2 and 0.
    assert report_of(metrics.advantage_metrics, losses, valid) == pytest.approx(
        {
            "mc/adv_delta_mean": 1 / 3,
            "mc/adv_delta_p95": 1.8,
            "mc/adv_delta_std": (14 / 9) ** 0.5,
            "nll_baseline": 2.5,
            "nll_rollout_mean": 8 / 3,
            "nll_rollout_best": 2.0,
            "mc/distinct_share": 0.5,
            "reward_mean": -2.6,
            "reward_std": 1.04**0.5,
            "frac_reward_zero_std": 0.5,
        }
    )


def test_a_histogram_by_hand():
    values, where = f32(-9, -1, -0.5, 0, 0, 2, 9, NAN), np.asarray([True] * 4 + [False] + [True] * 2 + [False])
    found = jax.jit(metrics.histogram)(values, where, f32(-1, 0, 1, 2))
    # An upper edge is in its bin; what lies beyond the edges is in the first and the last one.
    assert found.tolist() == [4, 0, 2] and found.dtype == np.float32
    (edges,) = metrics.HISTOGRAMS.values()
    assert (np.diff(edges) > 0).all() and 0 in edges and edges[-1] == -edges[0] == 10


def test_sequences_without_a_rollout_of_their_own_are_left_out():
    """Where nothing has to be collapsed every rollout is recency."""
    losses, valid = f32(2, 1, 4, 3, 3, 3).reshape(2, 3), np.asarray([[True, True, True], [True, False, False]])
    report = report_of(metrics.advantage_metrics, losses, valid)
    assert (report["nll_rollout_best"], report["nll_rollout_mean"]) == (1, 2.5)
    report = report_of(metrics.advantage_metrics, losses, np.asarray([[True, False, False]] * 2))
    assert report["nll_baseline"] == 2.5 and report["mc/adv_delta_p95"] == report["nll_rollout_best"] == 0
    assert np.isfinite(list(report.values())).all()


def test_correlations_are_left_out_where_they_are_not_defined():
    report = report_of(metrics.correlation_metrics, f32(0.5, 0, -0.25), np.asarray([True, False, True]))
    assert report == pytest.approx(
        {
            "mc/preference_corr_mean": 0.125,
            "mc/preference_corr_max": 0.5,
            "mc/preference_corr_min": -0.25,
            "mc/preference_corr_defined_share": 2 / 3,
        }
    )


def test_no_correlation_is_undefined_and_not_zero():
    report = report_of(metrics.correlation_metrics, f32(0, 0), np.zeros(2, bool))
    assert report.pop("mc/preference_corr_defined_share") == 0
    assert len(report) == 3 and set(report) <= set(metrics.MAY_BE_UNDEFINED)
    assert np.isnan(list(report.values())).all()


def test_scores_by_hand():
    scores = f32(0.5, -0.5, -0.1, 9, 0.3, -0.3, 0.6, 9, 9, 9, 9, 9).reshape(1, 3, 4)
    lods = np.asarray([0, 0, 2, 0, 1, 2, 2, 0, 0, 0, 0, 0], np.int32).reshape(1, 3, 4)
    where = np.asarray([1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0], bool).reshape(1, 3, 4)
    # Edits asked for: collapse the second entry, expand the fifth and the seventh. A token cannot be expanded, nor an
    # entry of the highest level collapsed. The third variant has no entries that count.
    assert report_of(metrics.score_metrics, scores, lods, where, max_lod=2) == pytest.approx(
        {
            "mc/policy_score_abs_mean": 2.3 / 6,
            "mc/policy_score_std_mean": (np.std([0.5, -0.5, -0.1]) + np.std([0.3, -0.3, 0.6])) / 2,
            "mc/edit_wish_rate": 0.5,
        }
    )


def test_rewards_by_hand():
    chosen, rejected, where = f32(0.5, 0.1, 7), f32(0.2, 0.4, -7), np.asarray([True, True, False])
    assert report_of(metrics.reward_metrics, chosen, rejected, where) == pytest.approx(
        {"rewards/chosen": 0.3, "rewards/rejected": 0.3, "rewards/margins": 0.0, "rewards/accuracies": 0.5}, abs=1e-6
    )
    # An undecided pair is not a win.
    assert report_of(metrics.reward_metrics, chosen, chosen, where)["rewards/accuracies"] == 0


def test_losses_by_level():
    lods, where = np.asarray([0, 0, 1, 3, 1]), np.asarray([True, True, True, True, False])
    report = report_of(metrics.lod_loss_metrics, f32(1, 2, 4, 8, 16), lods, where, max_lod=3)
    assert report == {"mc/lod_loss/0": 1.5, "mc/lod_loss/1": 4, "mc/lod_loss/2": 0, "mc/lod_loss/3": 8}
