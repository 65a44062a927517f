import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.models.nn.rope import apply_rotary, rotary


def test_angles_by_hand() -> None:
    # head_dim 4 and theta 100 give the frequencies 1 and 100 ** (-1/2) = 0.1; half-integers are positions too.
    cos, sin = rotary([0.0, 1.5], 4, 100.0)
    np.testing.assert_allclose(cos, [[1.0, 1.0], [np.cos(1.5), np.cos(0.15)]], atol=1e-7)
    np.testing.assert_allclose(sin, [[0.0, 0.0], [np.sin(1.5), np.sin(0.15)]], atol=1e-7)


def test_pairs_are_the_two_halves() -> None:
    # A quarter turn of the first pair (1, 3) -> (-3, 1); the second pair (2, 4) stays.
    turned = apply_rotary(np.array([[[1.0, 2.0, 3.0, 4.0]]], np.float32), [[0.0, 1.0]], [[1.0, 0.0]])
    np.testing.assert_array_equal(turned, [[[-3.0, 2.0, 1.0, 4.0]]])


def test_every_head_turns_alike() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 1, 8))
    cos, sin = rotary(jnp.arange(3.0), 8, 10_000.0)
    turned = apply_rotary(jnp.tile(x, (1, 2, 1)), cos, sin)
    np.testing.assert_array_equal(turned[:, 0], turned[:, 1])
    assert not np.allclose(turned[:, :1], x)


@settings(max_examples=30)
@given(first=st.integers(0, 2000), second=st.integers(0, 2000), shift=st.integers(-4000, 4000), seed=st.integers(0, 99))
def test_attention_logits_depend_on_the_distance_alone(first: int, second: int, shift: int, seed: int) -> None:
    x = np.asarray(jax.random.normal(jax.random.key(seed), (2, 1, 8)))

    def logit(offset: float) -> float:
        cos, sin = rotary([first / 2 + offset / 2, second / 2 + offset / 2], 8, 10_000.0)
        query, key = np.asarray(apply_rotary(x, cos, sin))[:, 0]
        return float(query @ key)

    assert logit(shift) == pytest.approx(logit(0), abs=5e-3)


def test_logits_change_with_the_distance() -> None:
    x = jnp.ones((2, 1, 8))
    near, far = (apply_rotary(x, *rotary([0.0, p], 8, 10_000.0))[:, 0] for p in (1.0, 9.0))
    assert abs(float(near[0] @ near[1]) - float(far[0] @ far[1])) > 0.1


def test_damping_by_hand_for_spans_of_one_two_and_four_tokens() -> None:
    # Block size 2: sigma = 2 ** lod. Frequencies 1 and 0.1, damped by exp(-(f sigma)^2 / 2).
    cos, sin = rotary(np.zeros(3), 4, 100.0, sigma=2.0 ** np.arange(3))
    expected = np.exp([[-0.5, -0.005], [-2.0, -0.02], [-8.0, -0.08]])
    np.testing.assert_allclose(cos, expected, rtol=1e-6)
    np.testing.assert_array_equal(sin, 0.0)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 8.0])
def test_damped_pair_is_the_expectation_over_positions(sigma: float) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    positions = 37.5 + sigma * nodes
    angles = positions[:, None] * 50.0 ** (-np.arange(0, 6, 2) / 6)
    weights = weights[:, None] / weights.sum()
    cos, sin = rotary([37.5], 6, 50.0, sigma=[sigma])
    np.testing.assert_allclose(cos[0], np.sum(weights * np.cos(angles), axis=0), atol=1e-5)
    np.testing.assert_allclose(sin[0], np.sum(weights * np.sin(angles), axis=0), atol=1e-5)


def test_wide_spans_keep_their_slow_frequencies() -> None:
    # A LOD-2 gist of blocks of 8 covers 64 tokens. A sigma of window ** lod would erase it: queries and keys are 0.
    right, _ = rotary([0.0], 16, 10_000.0, sigma=[8.0**2])
    wrong, _ = rotary([0.0], 16, 10_000.0, sigma=[256.0**2])
    assert right.max() > 0.99 and right.min() < 1e-6
    assert wrong.max() < 1e-6


def test_types() -> None:
    cos, sin = rotary(jnp.arange(2, dtype=jnp.int32), 4, 100.0, sigma=jnp.ones(2, jnp.int32))
    assert cos.dtype == sin.dtype == jnp.float32
    assert apply_rotary(jnp.ones((2, 1, 4), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_far_positions_stay_apart() -> None:
    cos, _ = rotary([1_000_000.0, 1_000_001.0], 4, 100.0)
    np.testing.assert_allclose(cos[:, 0], np.cos([1_000_000.0, 1_000_001.0]), atol=1e-3)


def test_odd_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"even.*got 5"):
        rotary([0.0], 5, 100.0)
