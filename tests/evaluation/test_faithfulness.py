import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.evaluation import faithfulness
from lensjax.evaluation.faithfulness import Evidence, FaithfulnessConfig
from tests import reference
from tests.small import jit

NAN = math.nan
CAPACITY = 6
distance_of = jit(faithfulness.edit_distance)
divergence_of = jit(faithfulness.divergence)


def padded(symbols):
    """Padding that would count as equal, were it read."""
    return np.asarray([*symbols, *[7] * (CAPACITY - len(symbols))], np.int32), np.int32(len(symbols))


def distance(one, other):
    return int(distance_of(*padded(one), *padded(other)))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("kitten", "sittin", 2),
        ("abc", "abc", 0),
        ("abc", "", 3),
        ("", "ab", 2),
        ("", "", 0),
        ("abcd", "bcd", 1),
        ("ab", "ba", 2),  # a transposition is two edits
        ("abcdef", "uvwxyz", 6),
    ],
)
def test_distances_by_hand(one, other, expected):
    one, other = [ord(letter) for letter in one], [ord(letter) for letter in other]
    assert distance(one, other) == expected
    longest = max(len(one), len(other))
    share = float(divergence_of(*padded(one), *padded(other)))
    assert share == pytest.approx(expected / longest if longest else 0)


SEQUENCES = st.lists(st.integers(0, 2), max_size=CAPACITY)


@settings(max_examples=60)
@given(one=SEQUENCES, other=SEQUENCES)
def test_the_distance_is_the_slow_one(one, other):
    assert distance(one, other) == reference.edit_distance(tuple(one), tuple(other))


@settings(max_examples=60)
@given(one=SEQUENCES, other=SEQUENCES, third=SEQUENCES)
def test_the_distance_is_a_metric(one, other, third):
    assert distance(one, other) == distance(other, one)
    assert (distance(one, other) == 0) == (one == other)
    assert distance(one, third) <= distance(one, other) + distance(other, third)


def test_sequences_of_other_shapes_and_many_at_a_time():
    wide = jnp.asarray([[1, 2, 3, 4], [1, 1, 0, 0]], jnp.int32)
    narrow = jnp.asarray([[2, 3], [1, 0]], jnp.int32)
    found = jax.vmap(faithfulness.divergence)(wide, jnp.asarray([4, 2]), narrow, jnp.asarray([2, 1]))
    np.testing.assert_allclose(found, [2 / 4, 1 / 2])
    nothing = jnp.zeros(0, jnp.int32)
    assert (
        faithfulness.edit_distance(nothing, 0, narrow[0], 2)
        == faithfulness.edit_distance(narrow[0], 2, nothing, 0)
        == 2
    )


def test_gains_by_hand():
    right, control = jnp.asarray([True, True, False, True]), jnp.asarray([False, True, False, False])
    assert float(faithfulness.gain(right, control)) == 0.5
    assert float(faithfulness.gain([-1.0, -2.0], [-0.5, -0.5])) == -1.0


def test_correlations_by_hand():
    # Means of 2 and 5, half of them in each group, and a variance of 2.75.
    right = jnp.asarray([False, True, False, True])
    assert float(faithfulness.correlation([1.0, 5.0, 3.0, 5.0], right)) == pytest.approx((5 - 2) / math.sqrt(2.75) / 2)
    assert float(faithfulness.correlation([1.0, 2.0, 3.0], [9.0, 7.0, 5.0])) == pytest.approx(-1)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_the_correlation_is_that_of_numpy_and_knows_no_scale(seed):
    values, scores = np.random.default_rng(seed).normal(size=(2, 9)).astype("f")
    expected = np.corrcoef(values, scores)[0, 1]
    assert float(faithfulness.correlation(values, scores)) == pytest.approx(expected, abs=1e-5)
    assert float(faithfulness.correlation(100 + 3 * values, scores)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("values", "scores"),
    [
        ([1000.1] * 7, [1, 0, 0, 1, 0, 1, 1]),  # the float32 mean of seven of these is not one of them
        ([1, 2, 3, 4, 5, 6, 7], [True] * 7),
        ([1, NAN, 3, 4, 5, 6, 7], [1, 0, 0, 1, 0, 1, 1]),
    ],
)
def test_a_correlation_with_a_constant_is_undefined(values, scores):
    assert math.isnan(faithfulness.correlation(jnp.asarray(values, jnp.float32), jnp.asarray(scores)))


ALL_GOOD = Evidence(*(jnp.float32(value) for value in (0.5, 0.1, 0.6, 0.1)))
NAMES = ("divergence", "ablation", "correlation", "counterfactual")


def test_what_is_above_every_threshold_passes():
    found = faithfulness.passed(ALL_GOOD, FaithfulnessConfig())
    assert set(found) == {*NAMES, "all_passed"} and all(found.values())
    logged = faithfulness.metrics(ALL_GOOD, FaithfulnessConfig(), prefix="rl/")
    expected = {"divergence": 0.5, "ablation": 0.1, "correlation": 0.6, "counterfactual": 0.1, "all_passed": 1.0}
    assert {name: float(value) for name, value in logged.items()} == {
        f"rl/anti_theater_{name}": pytest.approx(value) for name, value in expected.items()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["at the threshold", -0.5, NAN])
def test_one_that_is_not_above_fails_alone_and_all_with_it(name, value):
    thresholds = FaithfulnessConfig()
    value = getattr(thresholds, name) if value == "at the threshold" else value
    evidence = replace(ALL_GOOD, **{name: jnp.float32(value)})
    found = jit(functools.partial(faithfulness.passed, thresholds=thresholds))(evidence)
    assert {key for key, good in found.items() if not good} == {name, "all_passed"}
    assert faithfulness.metrics(evidence, thresholds, prefix="")["anti_theater_all_passed"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": 1.0}, r"faithfulness.divergence must be in \[0, 1\), got 1.0"),
        ({"correlation": -1.5}, r"faithfulness.correlation must be in \[-1, 1\), got -1.5"),
        ({"ablation": NAN}, "faithfulness.ablation must be finite and at least 0, got nan"),
        ({"counterfactual": -0.1}, "faithfulness.counterfactual must be at least 0, got -0.1"),
    ],
)
def test_thresholds_that_cannot_be_meant_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FaithfulnessConfig(**change)
