"""A run in two stages: where the second begins, and which pairs each learns from."""

import jax
import numpy as np
import pytest

from lensjax.training import stages
from lensjax.training.optim import moving
from tests import slow_objective


@pytest.mark.parametrize(("share", "first"), [(0.0, 0), (0.1, 1), (0.3, 3), (0.31, 4), (0.7, 7), (0.95, 10), (1.0, 10)])
def test_the_first_step_of_the_second_stage_by_hand(share, first):
    found = stages.second_stage(share, steps=10)
    assert int(found) == first and found.dtype == np.int32


def test_easy_gaps_by_hand():
    gaps, where = np.asarray([[0.5, 2.0], [1.0, 4.0], [9.0, 0.1]], np.float32), np.ones((3, 2), bool)
    where[2] = False
    found = {q: float(stages.easy_gap(gaps, where, quantile=q)) for q in (0.0, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0)}
    assert found == {0.0: 0.5, 0.25: 1.0, 0.26: 2.0, 0.5: 2.0, 0.75: 4.0, 0.76: np.inf, 1.0: np.inf}
    assert stages.easy_gap(gaps, np.zeros((3, 2), bool), quantile=0.0) == np.inf


def test_every_pair_is_of_one_stage_and_the_share_is_the_quantile():
    rng, easy_of = np.random.default_rng(0), jax.jit(stages.easy_gap)
    for _ in range(20):
        gaps, where = rng.exponential(size=(4, 6)).astype("f"), rng.random((4, 6)) < 0.6
        quantile = float(rng.random())
        easy = easy_of(gaps, where, quantile=quantile)
        taken = []
        for is_second in (False, True):
            low, high = stages.gap_range(easy, is_second)
            assert (float(low), float(high)) == pytest.approx(
                slow_objective.easy_gaps([float(gap) for gap in gaps[where]], quantile, is_second), rel=1e-6
            )
            taken.append(where & (gaps >= float(low)) & (gaps < float(high)))
        np.testing.assert_array_equal(taken[0] ^ taken[1], where)
        assert taken[1].sum() == np.ceil(quantile * where.sum())
        assert gaps[taken[0]].min(initial=np.inf) > gaps[taken[1]].max(initial=0)


def test_what_does_not_count_is_not_read():
    gaps, where = np.asarray([1.0, 2.0, 3.0], np.float32), np.asarray([True, True, False])
    for content in (np.nan, np.inf, 0.0):
        gaps[2] = content
        assert float(stages.easy_gap(gaps, where, quantile=0.5)) == 2.0


def test_the_anchor_of_a_stage_is_the_policy_that_the_stage_before_has_made():
    anchor, params, seen = {"w": np.float32(0)}, {"w": np.float32(0)}, []
    for step in range(5):
        seen.append(float(anchor["w"]))
        after = {"w": params["w"] + 1}
        begins = step + 1 == stages.second_stage(0.5, steps=5)
        anchor = moving.update_anchor(anchor, params, after, kind="stage", beta=0.9, is_new_stage=begins)
        params = after
    assert seen == [0, 0, 0, 3, 3]
