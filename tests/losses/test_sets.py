"""Advantages of sets, by hand and by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.losses import sets
from tests.reference import estimators


def drawn(seed, count=7):
    random = np.random.default_rng(seed)
    where = random.random(count) < 0.8
    where[:2] = True
    distances = np.triu(random.random((count, count)), 1).astype("f")
    return random.normal(size=count).astype("f"), distances + distances.T, where


def test_advantages_of_sets_by_hand():
    """Four samples, two of which are alike; pairs of them."""
    far = jnp.asarray([[0.0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0.5], [1, 1, 0.5, 0]])
    rewards = jnp.asarray([5.0, 3.0, 1.0, 2.0])
    # Above the lowest: 4, 2, 0, 1. The scores of 01, 02, 03, 12, 13, 23:
    scores = [0, 2, 2.5, 1, 1.5, 0.25]
    mean = sum(scores) / 6
    expected = np.asarray([4.5 / 3, 2.5 / 3, 3.25 / 3, 4.25 / 3]) - mean
    np.testing.assert_allclose(sets.set_advantages(rewards, far, jnp.ones(4, bool), size=2), expected, rtol=1e-5)
    # The second is better than the third and the fourth, and worth less to a set: the best is already like it.
    assert expected[1] < 0 < expected[3]


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), size=st.integers(2, 5))
def test_all_sets_are_counted_and_none_is_drawn(seed, size):
    rewards, distances, where = drawn(seed)
    kept = np.flatnonzero(where)
    found = np.asarray(
        sets.set_advantages(
            np.where(where, rewards, np.nan), np.where(where[:, None] & where, distances, np.nan), where, size=size
        )
    )
    expected = estimators.set_advantages(rewards[kept].tolist(), distances[np.ix_(kept, kept)].tolist(), size=size)
    np.testing.assert_allclose(found[kept], expected, rtol=1e-4, atol=1e-5)
    assert not found[~where].any() and abs(found.sum()) < 1e-5
    shifted = sets.set_advantages(rewards + 3, distances, where, size=size)
    np.testing.assert_allclose(shifted, found, atol=1e-5)


def test_without_more_than_one_set_without_distances_or_without_differences_there_is_no_advantage():
    rewards, distances, _ = drawn(0)
    every = jnp.ones(7, bool)
    none = [
        sets.set_advantages(rewards, distances, every, size=7),
        sets.set_advantages(rewards, distances, jnp.arange(7) < 1, size=2),
        sets.set_advantages(rewards, distances, jnp.zeros(7, bool), size=2),
        sets.set_advantages(rewards, jnp.zeros((7, 7)), every, size=3),
        sets.set_advantages(jnp.full(7, -2.5), distances, every, size=3),
    ]
    assert not np.asarray(none).any()


def test_a_broken_reward_or_distance_is_not_hidden_and_all_are_constants():
    rewards, distances, where = jnp.asarray([1.0, 2.0, 4.0]), jnp.ones((3, 3)) - jnp.eye(3), jnp.ones(3, bool)
    for broken in ((rewards.at[1].set(jnp.nan), distances), (rewards, distances.at[0, 1].set(jnp.nan))):
        assert np.isnan(sets.set_advantages(*broken, where, size=2)).any()
    gradient = jax.grad(lambda r, d: sets.set_advantages(r, d, where, size=2)[0], argnums=(0, 1))(rewards, distances)
    assert not any(np.asarray(leaf).any() for leaf in gradient)


def test_what_is_no_set_is_refused():
    with pytest.raises(ValueError, match="size must be at least 2, since a set of fewer has no distance, got 1"):
        sets.set_advantages(jnp.ones(3), jnp.ones((3, 3)), jnp.ones(3, bool), size=1)
    with pytest.raises(ValueError, match=r"distances must be \[3, 3\], one of each pair, got \[3\]"):
        sets.set_advantages(jnp.ones(3), jnp.ones(3), jnp.ones(3, bool), size=2)
