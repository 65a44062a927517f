"""How well a policy agrees with what was measured: margins, the control by levels, values, correlation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.training import agreement
from tests import reference
from tests.training.pairs import (
    BALANCED,
    CAPACITY,
    COARSE,
    FINE,
    GEOMETRY,
    HAND,
    all_pairs,
    balanced_cuts,
    one_pair,
    random_variants,
    targets_of,
    variants_of,
)

variant_values = jax.jit(agreement.variant_values, static_argnames="geometry")
pair_margins = jax.jit(agreement.pair_margins)
correlation = jax.jit(agreement.correlation)


def test_margins_by_hand():
    scores = np.zeros((2, 10), np.float32)
    scores[0, :9] = [0.5, -0.5, 0, 0.9, -1, 1, 0, 0.9, 0.9]  # FINE: targets + + + . - + + . .
    scores[1, :7] = [1, 0.9, -1, 0, -0.25, 0.9, 0.9]  # COARSE: targets + . - - + . .
    targets = targets_of([FINE, COARSE], one_pair(), HAND, capacity=10)
    margin = pair_margins(scores, targets, one_pair())
    fine, coarse = 2 * 0.5 - 0.5 + 0 + 2 * 1 + 1 + 0, 4 * 1 + 1 + 0 + 2 * -0.25
    np.testing.assert_allclose(margin, [(fine + coarse) / 16])
    none = jax.tree.map(jnp.zeros_like, targets)
    np.testing.assert_array_equal(pair_margins(scores, none, one_pair()), [0.0])


def test_agreement_by_hand():
    margins = np.asarray([[0.2, -0.1, 1e-9], [0.4, 5.0, -5.0]], np.float32)
    valid = np.asarray([[True, True, True], [True, False, False]])
    share, count = agreement.agreement(margins, valid)
    assert float(share) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert int(count) == 4
    share, count = agreement.agreement(margins, np.zeros_like(valid))
    assert (float(share), int(count)) == (0.0, 0)


def test_success_weighs_a_pair_by_its_difference():
    """It asks for the winner in 4 of 7 nats and is undecided in 2; the last pair does not count."""
    margins, gaps = np.float32([0.3, -0.2, 0, 0.5]), np.float32([4, 1, 2, 1])
    valid = np.array([True, True, True, False])
    assert float(agreement.success(margins, gaps, valid)) == pytest.approx((4 + 1) / 7)
    assert float(agreement.success(margins, gaps, np.zeros(4, bool))) == 0
    assert float(agreement.success(margins, np.zeros(4, np.float32), valid)) == 0
    margins[3] = np.nan
    assert float(agreement.success(margins, gaps, valid)) == pytest.approx(5 / 7)
    assert np.isnan(agreement.success(margins, gaps, np.ones(4, bool)))


def agreement_of(scores, targets, pairs):
    margins = pair_margins(scores, targets, pairs)
    share, count = agreement.agreement(margins, targets.where.any(axis=(1, 2)))
    return float(share), int(count)


def test_a_perfect_policy_agrees_with_every_pair():
    cuts, pairs = balanced_cuts(), one_pair(better=1, worse=2)
    targets = targets_of(cuts, pairs, BALANCED)
    scores = np.zeros((4, CAPACITY), np.float32)
    scores[[1, 2]] = targets.target[0]
    assert agreement_of(scores, targets, pairs) == (1.0, 1)
    assert agreement_of(-scores, targets, pairs) == (0.0, 1)


def test_the_lod_only_control_is_at_chance_on_balanced_pairs():
    cuts, pairs = balanced_cuts(), all_pairs()
    targets = targets_of(cuts, pairs, BALANCED)
    assert agreement_of(agreement.lod_only_scores(variants_of(cuts, BALANCED)), targets, pairs) == (0.5, 12)


def test_the_lod_only_control_answers_every_one_sided_pair():
    cuts, pairs = balanced_cuts(), all_pairs()
    targets = targets_of(cuts, pairs, BALANCED, worse_only=True)
    assert agreement_of(agreement.lod_only_scores(variants_of(cuts, BALANCED)), targets, pairs) == (1.0, 12)


def test_lod_only_scores():
    scores = agreement.lod_only_scores(variants_of([COARSE], HAND, capacity=9))
    assert scores.tolist() == [[1, 1, -1, -1, 1, -1, -1, 0, 0]]


def values_of(scores, cuts, geometry, capacity=CAPACITY):
    return variant_values(scores, variants_of(cuts, geometry, capacity), geometry)


def test_variant_values_by_hand():
    scores = np.zeros((2, 10), np.float32)
    # COARSE: LOD 2 (d = -1) at weight 4, LOD 1 (d = 0), tokens 6 and 7 (d = 1), LOD 1, the tail (no weight).
    scores[0, :7] = [-0.5, 1, 1, 0.5, 1, 1, 1]
    scores[1, :9] = [1, 0.5, -1, 1, 1, 1, 0.5, 1, 1]
    values = values_of(scores, [COARSE, FINE], HAND, 10)
    np.testing.assert_allclose(values, [(4 * 0.5 + 1 + 0.5) / 10, (0.5 - 1 + 1 + 0.5) / 10])
    assert values_of(scores[:1], [[(10, 0), (11, 0)]], HAND, 10).tolist() == [0.0]


def test_variant_values_agree_with_the_reference():
    cuts = random_variants(2)
    scores = np.random.default_rng(0).uniform(-1, 1, (4, CAPACITY)).astype(np.float32)
    values = values_of(scores, cuts, GEOMETRY)
    expected = [reference.variant_value(row, cut, GEOMETRY) for row, cut in zip(scores, cuts, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_a_policy_that_repeats_the_level_gives_every_cut_one_value():
    cuts = balanced_cuts()
    scores = agreement.lod_only_scores(variants_of(cuts, BALANCED))
    values = values_of(scores, cuts, BALANCED)
    np.testing.assert_allclose(values, np.full(4, values[0]), rtol=1e-6)
    # So the correlation with any reward is not defined, and the shortcut shows.
    assert not correlation(values, np.asarray([1.0, 2, 3, 4], np.float32), np.ones(4, bool))[1]


@pytest.mark.parametrize(
    ("values", "rewards", "valid", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], [True] * 3, 1.0),
        ([1, 2, 3], [3, 2, 1], [True] * 3, -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], [True] * 4, 0.8),
        ([1, 2, 99, 3, 4], [1, 3, -99, 2, 4], [True, True, False, True, True], 0.8),
        ([1, 1, 1], [1, 2, 3], [True] * 3, None),  # the policy has no preference
        ([1, 2, 3], [5, 5, 5], [True] * 3, None),  # the rewards are all equal
        ([1, 2, 3], [1, 2, 3], [False, True, False], None),
        ([1, 2, 3], [1, 2, 3], [False] * 3, None),
    ],
)
def test_correlation_by_hand(values, rewards, valid, expected):
    found, defined = correlation(np.asarray(values, np.float32), np.asarray(rewards, np.float32), np.asarray(valid))
    assert bool(defined) == (expected is not None)
    assert float(found) == pytest.approx(expected or 0.0, abs=1e-6)


def test_correlation_ignores_rounding_noise():
    noise = np.asarray([2.0, 2.0 + 1e-6, 2.0 - 1e-6], np.float32)
    assert not correlation(noise, np.asarray([1.0, 2, 3], np.float32), np.ones(3, bool))[1]
