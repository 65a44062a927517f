import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax import losses
from lensjax.training.optim import moving
from tests import reference

update_moments = jax.jit(moving.update_moments)


def mean_and_variance(moments):
    return [float(moments.mean), float(moments.variance)]


def moments_after(batches, betas, size=6):
    """Moments after a run of batches, each padded with values that must not be read."""
    moments = moving.init_moments()
    for batch, beta in zip(batches, betas, strict=True):
        values = np.full(size, np.nan, np.float32)
        values[: len(batch)] = batch
        moments = update_moments(moments, values, np.arange(size) < len(batch), np.float32(beta))
    return moments


def test_empty_moments_normalise_nothing():
    moments = moving.init_moments()
    assert mean_and_variance(moments) == [0.0, 1.0]
    values = np.asarray([0.5, -2.0], np.float32)
    np.testing.assert_allclose(moving.normalise(moments, values), values, rtol=1e-6)


def test_moments_by_hand():
    # One batch: its own mean and variance, whatever the decay. Two: weights 0.9 * 0.1 and 0.1, divided by 0.19.
    assert mean_and_variance(moments_after([[1.0, 3.0]], [0.9])) == pytest.approx([2.0, 1.0])
    moments = moments_after([[1.0, 3.0], [5.0]], [0.9, 0.9])
    mean = (0.09 * 2 + 0.1 * 5) / 0.19
    variance = (0.09 * 5 + 0.1 * 25) / 0.19 - mean**2
    assert mean_and_variance(moments) == pytest.approx([mean, variance], rel=1e-5)
    assert float(moments.decay_product) == pytest.approx(0.81)
    z = moving.normalise(moments, np.asarray([mean, mean + 2 * variance**0.5], np.float32))
    assert z.tolist() == pytest.approx([0.0, 2.0], abs=1e-5)


@settings(max_examples=40)
@given(
    batches=st.lists(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=6), min_size=1, max_size=6),
    data=st.data(),
)
def test_moments_agree_with_the_reference(batches, data):
    betas = [data.draw(st.sampled_from([0.0, 0.5, 0.75, 0.99]), label="beta") for _ in batches]
    found = mean_and_variance(moments_after(batches, betas))
    assert found == pytest.approx(reference.ema_mean_var(batches, betas), rel=1e-5, abs=1e-5)


def test_moments_are_those_of_the_weighted_sample_in_double_precision():
    random = np.random.default_rng(0)
    batches, betas = random.normal(3, 2, (40, 7)), random.uniform(0.5, 0.99, 40)
    # Counts are in single precision, and exact.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        moments = moving.init_moments()
        for batch, beta in zip(batches, betas, strict=True):
            moments = moving.update_moments(moments, batch, np.ones(7, bool), beta)
        assert moments.variance.dtype == np.float64
    assert mean_and_variance(moments) == pytest.approx(reference.ema_mean_var(batches, betas), rel=1e-10)


@pytest.mark.parametrize(("mean", "std"), [(5.0, 1e-3), (1000.0, 0.1)])
def test_the_variance_beside_a_large_mean_does_not_cancel(mean, std):
    batches = np.random.default_rng(1).normal(mean, std, (60, 64)).astype(np.float32)
    moments = moments_after(batches, [0.9] * 60, size=64)
    expected_mean, expected = reference.ema_mean_var(batches.astype(np.float64), [0.9] * 60)
    assert float(moments.mean) == pytest.approx(expected_mean, rel=1e-6)
    assert float(moments.variance) == pytest.approx(expected, rel=0.01) == pytest.approx(std**2, rel=0.1)


def test_a_batch_without_valid_values_changes_nothing():
    moments = moments_after([[1.0, 2.0]], [0.9])
    after = moments_after([[1.0, 2.0], []], [0.9, 0.9])
    assert jax.tree.map(float, after) == jax.tree.map(float, moments)


def test_equal_values_are_normalised_without_dividing_by_zero():
    moments = moments_after([[0.3, 0.3]], [0.9])
    assert moving.normalise(moments, np.full(2, 0.3, np.float32)).tolist() == pytest.approx([0, 0], abs=1e-2)


def test_a_nan_among_valid_values_stays():
    moments = moving.update_moments(moving.init_moments(), np.asarray([1.0, np.nan], np.float32), np.ones(2, bool), 0.9)
    assert np.isnan(mean_and_variance(moments)).all()


def test_a_fresh_state_can_be_donated():
    moments = moving.init_moments()
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(moments)]
    assert len(set(buffers)) == 3
    params = {"w": jnp.ones(3)}
    anchor = moving.init_anchor(params)
    np.testing.assert_array_equal(anchor["w"], params["w"])
    assert anchor["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


# The mean of the last values

update_window = jax.jit(moving.update_window)
window_mean = jax.jit(moving.window_mean)


@settings(max_examples=40)
@given(values=st.lists(st.floats(-4, 4, width=16), max_size=12), size=st.integers(1, 5))
def test_a_window_gives_the_mean_of_the_last_values(values, size):
    window = moving.init_window(size)
    assert float(window_mean(window)) == 0
    for index, value in enumerate(values, start=1):
        window = update_window(window, np.float32(value))
        expected = np.mean(np.asarray(values[max(0, index - size) : index]))
        assert float(window_mean(window)) == pytest.approx(expected, abs=1e-6)


def test_a_window_in_a_scan_forgets_what_left_it():
    series = np.asarray([np.nan, 1e30, 1.0, 2.0, 3.0, 4.0], np.float32)

    def step(window, value):
        window = moving.update_window(window, value)
        return window, moving.window_mean(window)

    window, means = jax.lax.scan(step, moving.init_window(3), series)
    assert np.isnan(means[:3]).all() and means[3] == np.float32(1e30) / 3 and means[4:].tolist() == [2.0, 3.0]
    assert int(window.count) == 6 and window.values.dtype == np.float32


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a window must hold at least 1 value, got 0"):
        moving.init_window(0)


# The policy anchor, over a run in which the parameter is the number of updates made.


def anchors_of_a_run(kind, beta=0.75, steps=4):
    """The parameter and the anchor that each step's loss sees."""
    params = {"w": jnp.asarray(0.0)}
    anchor = moving.init_anchor(params)
    seen = []
    for _ in range(steps):
        seen.append((float(params["w"]), float(anchor["w"])))
        after = {"w": params["w"] + 1}
        anchor = moving.update_anchor(anchor, params, after, kind=kind, beta=beta)
        params = after
    return seen


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("previous", [(0, 0), (1, 0), (2, 1), (3, 2)]),
        ("ema", [(0, 0), (1, 0.25), (2, 0.6875), (3, 1.265625)]),
        ("fixed", [(0, 0), (1, 0), (2, 0), (3, 0)]),
    ],
)
def test_which_anchor_each_step_sees(kind, expected):
    assert anchors_of_a_run(kind) == expected


def test_the_kl_against_the_previous_policy_is_positive_after_a_step():
    inputs, where = np.asarray([0.5, -1.0, 2.0], np.float32), np.ones(3, bool)
    kls = [
        float(losses.policy_kl(params * inputs, anchor * inputs, where, temperature=1.0))
        for params, anchor in anchors_of_a_run("previous")
    ]
    assert kls[0] == 0
    assert all(kl > 0.01 for kl in kls[1:])


def test_an_unknown_anchor_is_refused():
    with pytest.raises(ValueError, match="anchor must be previous, ema, fixed or stage, got 'cache'"):
        moving.update_anchor({}, {}, {}, kind="cache", beta=0.9)
