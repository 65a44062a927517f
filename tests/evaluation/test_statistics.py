import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.evaluation.statistics import LEVEL, by_weight, estimate

TRIALS = 4000


def coverage(draw, mean, *, seed=0):
    """Share of the intervals that hold the mean of what is drawn."""
    rng = np.random.default_rng(seed)
    found = [estimate(draw(rng)) for _ in range(TRIALS)]
    return np.mean([one.low <= mean <= one.high for one in found])


def test_one_axis_by_hand():
    # Mean 2, standard error 1 / sqrt(3); the 97.5 % quantile of t with 2 degrees of freedom is 4.3027.
    one = estimate([1.0, 2.0, 3.0])
    assert one.mean == 2.0
    assert one.interval == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    # Its distribution function is 1/2 + t / (2 sqrt(2 + t^2)); here t^2 is 12.
    assert one.p == pytest.approx(1 - math.sqrt(12 / 14))


def test_a_weighted_mean_by_hand():
    # Three tokens of 1 nat and one of 5: the mean is 2, the mean count 2; 2 + 3 (1 - 2) / 2 and 2 + 1 (5 - 2) / 2.
    assert by_weight([1.0, math.nan, 5.0], [3, 0, 1]) == pytest.approx([0.5, 3.5])
    assert by_weight([1.0, 2.0, 6.0], [2, 2, 2]) == pytest.approx([1, 2, 6])
    assert by_weight([math.nan], [0]).size == 0


def test_the_interval_of_a_weighted_mean_covers_it():
    # The count of a sequence and its mean go together: the mean over tokens is 13 / 7, that over sequences 1.5.
    rng, held = np.random.default_rng(0), 0
    for _ in range(TRIALS):
        counts = rng.choice([0, 2, 5], 40)
        found = estimate(
            by_weight(np.where(counts == 5, 2.0, 1.5) + rng.normal(size=40) / np.sqrt(counts.clip(1)), counts)
        )
        held += found.low <= 13 / 7 <= found.high
    assert held / TRIALS == pytest.approx(1 - LEVEL, abs=0.015)


def test_two_axes_by_hand():
    # Means of seeds 1, 2, 3 and of sequences 1, 3: variances 1/3 and 1 of the mean; quantiles 4.3027 and 12.7062.
    one = estimate([[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]])
    half = math.sqrt(4.3027**2 / 3 + 12.7062**2)
    assert (one.mean, one.low, one.high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    # The quantiles of 2 and 1 degrees of freedom at which an end is 0.
    q = 1 - one.p / 2
    assert (2 * q - 1) ** 2 / (2 * q * (1 - q)) / 3 + math.tan(math.pi * (q - 0.5)) ** 2 == pytest.approx(4)


@given(st.sampled_from([(2,), (5,), (2, 2), (4, 7), (3, 2)]), st.floats(0, 2), st.integers(0, 1000))
@settings(max_examples=100)
def test_p_is_below_the_level_exactly_where_the_interval_leaves_out_zero(shape, shift, seed):
    values = np.random.default_rng(seed).normal(size=shape) + shift
    one, mirrored, axes = estimate(values), estimate(-values), estimate(np.transpose(values))
    assert (one.p < LEVEL) == (not one.low <= 0 <= one.high)
    assert one.low < one.mean < one.high
    assert (mirrored.low, mirrored.high, mirrored.p) == pytest.approx((-one.high, -one.low, one.p))
    assert axes.interval == pytest.approx(one.interval)
    assert estimate(3 * values + 10).interval == pytest.approx(tuple(3 * np.asarray(one.interval) + 10))


def test_what_does_not_vary_has_no_width():
    assert estimate(np.zeros((2, 3))).p == 1 and estimate(np.zeros(4)).interval == (0, 0)
    assert estimate([1.5, 1.5]).interval == (1.5, 1.5) and estimate([1.5, 1.5]).p < 1e-15


def test_one_constant_axis_adds_nothing():
    values = np.asarray([1.0, 2.0, 4.0])
    both, alone = estimate(np.repeat(values[:, None], 5, axis=1)), estimate(values)
    assert (both.low, both.high, both.p) == pytest.approx((alone.low, alone.high, alone.p))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (1.0, r"two or more values along each axis, got values of shape \(\)"),
        ([1.0], r"got values of shape \(1,\)"),
        (np.ones((3, 1)), r"got values of shape \(3, 1\)"),
        (np.ones((0, 4)), r"got values of shape \(0, 4\)"),
        ([1.0, math.nan, math.inf], "finite values, got 2 that are not"),
    ],
)
def test_values_without_an_interval_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        estimate(values)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 8, 16, 64])
def test_intervals_of_normal_values_cover_what_they_say(count):
    found = coverage(lambda rng: rng.normal(0.7, 1.0, count), 0.7)
    assert 0.94 <= found <= 0.96


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "least", "most"), [(4, 0.81, 0.85), (8, 0.82, 0.86), (16, 0.84, 0.88), (64, 0.89, 0.92)]
)
def test_intervals_of_skewed_values_are_too_narrow_and_by_how_much(count, least, most):
    found = coverage(lambda rng: rng.lognormal(0.0, 1.0, count), math.exp(0.5))
    assert least <= found <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "sequences", "of_seed", "of_sequence"),
    [
        (seeds, sequences, *sizes)
        for (seeds, sequences), sizes in itertools.product(
            [(2, 8), (3, 16), (5, 64), (8, 8)], [(1, 0.1), (0.1, 1), (1, 1), (0, 0)]
        )
    ],
)
def test_intervals_over_seeds_and_sequences_cover_at_least_what_they_say(seeds, sequences, of_seed, of_sequence):
    def draw(rng):
        noise = of_seed * rng.normal(size=(seeds, 1)) + of_sequence * rng.normal(size=(1, sequences))
        return 0.7 + noise + 0.5 * rng.normal(size=(seeds, sequences))

    found = coverage(draw, 0.7)
    assert found >= 0.94
