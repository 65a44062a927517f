"""Which variants are compared, and what each pair weighs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.training import agreement, preferences
from lensjax.training.preferences import PreferencePairs
from tests import reference


@functools.partial(jax.jit, static_argnames="max_pairs")
def select(losses, valid, ratio, max_pairs):
    return preferences.select_pairs(losses, valid, hard_negative_ratio=ratio, max_pairs=max_pairs)


def pairs_of(losses, *, valid=None, ratio=1.0, max_pairs=20):
    """The valid pairs, as (better, worse, gap)."""
    valid = np.ones(len(losses), bool) if valid is None else np.asarray(valid)
    pairs = select(np.asarray(losses, np.float32), valid, np.float32(ratio), max_pairs)
    rows = zip(pairs.better.tolist(), pairs.worse.tolist(), pairs.gap.tolist(), strict=True)
    kept = [row for row, is_valid in zip(rows, pairs.valid.tolist(), strict=True) if is_valid]
    assert pairs.valid.tolist() == [True] * len(kept) + [False] * (len(pairs.valid) - len(kept))
    return kept


def test_advantages_are_differences_to_the_baseline():
    deltas = preferences.advantage_deltas(np.asarray([[2.0, 1.5, 3.0], [1.0, 1.0, 0.0]], np.float32))
    np.testing.assert_array_equal(deltas, [[0.0, -0.5, 1.0], [0.0, 0.0, -1.0]])


LOSSES = [2.0, 1.0, 4.0, 2.5]  # variant 1 is the best
WITH_BEST = [(1, 2, 3.0), (1, 3, 1.5), (1, 0, 1.0)]
REST = [(0, 2, 2.0), (3, 2, 1.5), (0, 3, 0.5)]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.0, WITH_BEST + REST), (0.5, WITH_BEST + REST[:2]), (0.34, WITH_BEST + REST[:2]), (0.0, WITH_BEST)],
)
def test_pairs_of_four_variants_by_hand(ratio, expected):
    assert pairs_of(LOSSES, ratio=ratio) == expected


def test_pairs_of_five_variants_by_hand():
    assert pairs_of([3.0, 8.0, 1.0, 1.5, 4.0], ratio=0.5) == [
        (2, 1, 7.0),
        (2, 4, 3.0),
        (2, 0, 2.0),
        (2, 3, 0.5),
        (3, 1, 6.5),
        (0, 1, 5.0),
        (4, 1, 4.0),
    ]


def test_at_most_max_pairs_are_kept():
    assert pairs_of(LOSSES, max_pairs=4) == WITH_BEST + REST[:1]
    assert pairs_of(LOSSES, max_pairs=2) == WITH_BEST[:2]
    assert select(np.asarray(LOSSES, np.float32), np.ones(4, bool), np.float32(1), 20).better.shape == (6,)


def test_duplicates_are_in_no_pair():
    assert pairs_of(LOSSES, valid=[True, False, True, True]) == [(0, 2, 2.0), (0, 3, 0.5), (3, 2, 1.5)]
    assert pairs_of(LOSSES, valid=[True, False, False, False]) == []


def test_equal_losses_hold_no_preference_and_are_reported():
    losses = [1.0, 2.0, 1.0, 2.0]
    assert pairs_of(losses) == [(0, 1, 1.0), (0, 3, 1.0), (2, 1, 1.0), (2, 3, 1.0)]
    everyone = np.ones(4, bool)
    assert float(preferences.tie_share(np.asarray(losses, np.float32), everyone)) == pytest.approx(2 / 6)
    only_ties = np.full(4, 1.25, np.float32)
    assert pairs_of(only_ties) == []
    assert float(preferences.tie_share(only_ties, everyone)) == 1.0
    assert float(preferences.tie_share(only_ties, np.asarray([True, False, True, False]))) == 1.0
    assert float(preferences.tie_share(only_ties, np.asarray([True, False, False, False]))) == 0.0


def test_a_loss_that_is_no_number_is_never_the_better_one():
    losses = np.asarray([2.0, np.nan, 1.0, np.nan, 4.0], np.float32)
    pairs = select(losses, np.ones(5, bool), np.float32(1), 20)
    assert pairs_of(losses) == [(2, 4, 3.0), (2, 0, 1.0), (0, 4, 2.0)]
    both = np.isnan(losses[np.asarray([pairs.better, pairs.worse])])
    # Among the masked rows only that of the two NaN has one for its better.
    assert (both[0] <= both[1]).all() and both.all(axis=0).sum() == 1
    assert np.isfinite(pairs.gap).all()
    assert not select(np.full(3, np.nan, np.float32), np.ones(3, bool), np.float32(1), 20).valid.any()


def test_what_is_no_number_is_no_tie_no_win_and_no_lack_of_variance():
    everyone, masked = np.ones(3, bool), np.asarray([True, False, True])
    losses = np.asarray([2.0, np.nan, 2.0], np.float32)
    assert np.isnan(preferences.tie_share(losses, everyone)) and float(preferences.tie_share(losses, masked)) == 1
    assert np.isnan(agreement.agreement(losses, everyone)[0]) and float(agreement.agreement(losses, masked)[0]) == 1
    value, defined = agreement.correlation(np.asarray([1.0, 2, 3], np.float32), losses, everyone)
    assert np.isnan(value) and defined
    assert not agreement.correlation(np.asarray([1.0, 2, 3], np.float32), losses, masked)[1]


@settings(max_examples=60)
@given(
    losses=st.lists(st.integers(0, 30), min_size=5, max_size=5),
    valid=st.lists(st.booleans(), min_size=4, max_size=4),
    ratio=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    max_pairs=st.sampled_from([3, 10]),
)
def test_pairs_agree_with_the_reference(losses, valid, ratio, max_pairs):
    losses, valid = [loss / 8 for loss in losses], [True, *valid]
    found = pairs_of(losses, valid=valid, ratio=ratio, max_pairs=max_pairs)
    expected = reference.select_pairs(losses, valid, hard_negative_ratio=ratio, max_pairs=max_pairs)
    # Pairs of one gap may come in any order, so gaps are compared in order and pairs by what they say.
    assert [gap for *_, gap in found] == [gap for *_, gap in expected]
    assert len({pair[:2] for pair in found}) == len(found)
    assert all(valid[b] and valid[w] and losses[w] - losses[b] == gap for b, w, gap in found)
    best = [b for b, *_ in expected].count(expected[0][0]) if expected else 0
    assert sorted(found[:best]) == sorted(expected[:best])


def test_weights_of_pairs_by_hand():
    """Values log 1, log 2 and log 5, and a fourth that is not compared: the policy draws 1/8, 2/8, 5/8."""
    values, where = jnp.log(jnp.asarray([1.0, 2.0, 5.0, 1e9])), jnp.asarray([True, True, True, False])
    pairs = PreferencePairs(jnp.asarray([0, 2]), jnp.asarray([1, 1]), jnp.ones(2), jnp.ones(2, bool))
    weights = functools.partial(preferences.pair_weights, pairs=pairs, where=where)
    np.testing.assert_allclose(weights(values, beta=1.0, most=9.0), [9 * 1 * 2 / 64, 9 * 5 * 2 / 64], rtol=1e-5)
    np.testing.assert_allclose(weights(values, beta=2.0, most=9.0), [9 * 4 / 900, 9 * 100 / 900], rtol=1e-5)
    np.testing.assert_allclose(weights(values, beta=1.0, most=0.5), [9 * 1 * 2 / 64, 0.5], rtol=1e-5)
    np.testing.assert_allclose(weights(jnp.full(4, 0.3), beta=1.0, most=9.0), [1, 1], rtol=1e-6)
    assert not jax.grad(lambda v: weights(v, beta=1.0, most=9.0).sum())(values).any()
