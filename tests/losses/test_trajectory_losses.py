"""Credit within a group of trajectories: values by hand, and the slow way to say the same."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.losses import trajectories
from tests.losses.test_advantages import KINDS

NAN = np.float32(np.nan)


def slow_diverging(actions, where):
    """A trajectory is credited from where the prefixes of some pair are no longer the same."""
    group, steps = actions.shape[:2]
    counted = [i for i in range(group) if where[i]]
    found = np.zeros((group, steps), bool)
    for t in range(steps):
        for i, j in itertools.combinations(counted, 2):
            if not np.array_equal(actions[i, : t + 1], actions[j, : t + 1]):
                found[counted, t] = True
    return found


def test_credit_begins_where_the_first_of_a_group_leaves_the_others():
    # Two swaps a step. The third one leaves in the second step, by its second swap, and comes back to what they do.
    alike = [[[1, 2], [3, 4], [5, 6]]] * 2
    actions = jnp.asarray([*alike, [[1, 2], [3, 9], [5, 6]]])
    found = trajectories.diverging(actions, jnp.ones(3, bool))
    assert found.tolist() == [[False, True, True]] * 3


def test_nothing_is_credited_without_a_difference():
    actions = jnp.asarray([[1, 2], [1, 2], [9, 9]])
    among_two = trajectories.diverging(actions, jnp.asarray([True, True, False]))
    alone = trajectories.diverging(actions, jnp.asarray([False, False, True]))
    assert not among_two.any() and not alone.any()
    assert not trajectories.diverging(actions, jnp.zeros(3, bool)).any()


@pytest.mark.parametrize("seed", range(20))
def test_credit_is_that_of_the_slow_reference(seed):
    random = np.random.default_rng(seed)
    actions, where = random.integers(0, 2, (4, 3, 1)), random.random(4) < 0.8
    expected = slow_diverging(actions, where)
    np.testing.assert_array_equal(trajectories.diverging(actions, where), expected)
    # What does not count is not looked at, and the order of a group says nothing.
    order = random.permutation(4)
    changed = np.where(where[:, None, None], actions, 7)
    np.testing.assert_array_equal(trajectories.diverging(changed[order], where[order]), expected[order])


def test_every_pair_that_differs_makes_a_third_one_differ():
    """So the prefix that all share is also what each shares with every other one."""
    for a, b, c in itertools.product(itertools.product((0, 1), repeat=2), repeat=3):
        actions = np.asarray([a, b, c])
        own = [(actions != row).any(0).cumsum() > 0 for row in actions]
        np.testing.assert_array_equal(trajectories.diverging(actions, np.ones(3, bool)), own)


@pytest.mark.parametrize(("shape", "flags"), [((3,), 3), ((3, 2), 2)])
def test_credit_needs_steps_and_a_flag_for_each_trajectory(shape, flags):
    with pytest.raises(ValueError, match=r"expected actions of shape \[G, S, ...\] and a flag for each of G"):
        trajectories.diverging(jnp.zeros(shape, int), jnp.ones(flags, bool))


def test_amplification_by_hand():
    found = trajectories.amplified(jnp.asarray([-2.0, 0.0, 0.5, NAN]), factor=3.0)
    np.testing.assert_array_equal(found, [-2.0, 0.0, 1.5, NAN])


SHARED = {
    # mean 2 of 1 and 3; the overlong third one is neither credited nor a baseline
    "mean": [[-1.0, -1.0, -1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    "standardised": [[-1.0, -1.0, -1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    "leave_one_out": [[-2.0, -2.0, -2.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
}
TAKEN = np.asarray([[True, True, True], [True, False, False], [True, True, True]])
ENDED = np.asarray([True, True, False])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of_overlong", [9.0, -1e30, NAN])
def test_a_trajectory_shares_its_advantage_by_hand(kind, of_overlong):
    """Each step has all of it, so that a trajectory of one step counts as much among the others as one of three."""
    rewards = jnp.asarray([1.0, 3.0, of_overlong])
    found = trajectories.shared_advantages(rewards, ENDED, TAKEN, baseline=kind)
    np.testing.assert_array_equal(found, SHARED[kind])


def test_a_nan_that_counts_is_not_hidden():
    found = trajectories.shared_advantages(jnp.asarray([NAN, 1.0, 2.0]), ENDED, TAKEN, baseline="mean")
    np.testing.assert_array_equal(np.isnan(found), TAKEN & ENDED[:, None])


def test_no_gradient_passes():
    def total(rewards):
        shared = trajectories.shared_advantages(rewards, ENDED, TAKEN, baseline="mean")
        return trajectories.amplified(shared * rewards[0], factor=3.0).sum()

    assert not jax.grad(total)(jnp.asarray([1.0, 3.0, 5.0])).any()
