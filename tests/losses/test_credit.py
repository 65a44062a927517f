"""Contrasts, conflicts and weights within a group, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.losses import credit
from tests.reference import estimators


def test_an_action_is_rewarded_where_those_that_do_it_are_better():
    rewards, does = jnp.asarray([1.0, 3.0, 1.5, 0.5, 99.0]), jnp.asarray([True, True, False, False, True])
    where = jnp.arange(5) < 4
    # 2 against 1.
    for threshold, expected in ((0.0, 1), (0.9, 1), (1.0, 0), (2.0, 0)):
        assert credit.contrastive_reward(rewards, does, where, threshold=threshold) == expected
        assert credit.contrastive_reward(rewards, ~does, where, threshold=threshold) == -expected
        assert credit.contrastive_reward(-rewards, does, where, threshold=threshold) == -expected


@pytest.mark.parametrize("seed", range(10))
def test_a_contrast_is_the_slow_reference(seed):
    random = np.random.default_rng(seed)
    rewards, does, where = random.normal(size=6).astype("f"), random.random(6) < 0.4, random.random(6) < 0.7
    found = credit.contrastive_reward(np.where(where, rewards, np.nan), does, where, threshold=0.4)
    assert found == estimators.contrast(list(rewards[where & does]), list(rewards[where & ~does]), threshold=0.4)


def test_without_both_kinds_there_is_no_contrast_and_a_broken_reward_is_not_hidden():
    rewards, every = jnp.asarray([1.0, 2.0]), jnp.ones(2, bool)
    for does, where in ((every, every), (~every, every), (jnp.arange(2) == 0, jnp.arange(2) == 0), (every, ~every)):
        assert credit.contrastive_reward(rewards, does, where, threshold=0.0) == 0
        broken = credit.contrastive_reward(rewards.at[0].set(jnp.nan), does, where, threshold=0.0)
        assert np.isnan(broken) == bool(where[0])


def test_what_good_and_bad_samples_share_is_never_discouraged():
    advantages, conflict = jnp.asarray([2.0, -2.0, 0.0, 2.0, -2.0]), jnp.arange(5) < 3
    assert credit.conflict_advantages(advantages, conflict).tolist() == [4, 0, 0, 2, -2]
    assert np.isnan(credit.conflict_advantages(jnp.nan, True)) and np.isnan(credit.conflict_advantages(jnp.nan, False))


def test_weights_of_a_group_are_how_much_rather_the_policy_draws_each():
    scores, where = jnp.log(jnp.asarray([4.0, 1.0, 1.0, jnp.nan])), jnp.arange(4) < 3
    found = credit.group_weights(scores, where, beta=1.0, most=1.75)
    np.testing.assert_allclose(found, [1.75, 0.5, 0.5, 0], rtol=1e-6)
    # Uniform at the start, and of mean 1 where none is cut.
    assert credit.group_weights(jnp.zeros(4), where, beta=2.0, most=10.0).tolist() == pytest.approx([1, 1, 1, 0])
    assert float(credit.group_weights(scores, where, beta=0.5, most=10.0).sum()) == pytest.approx(3, rel=1e-5)
    assert credit.group_weights(scores, jnp.arange(4) == 1, beta=1.0, most=10.0).tolist() == pytest.approx([0, 1, 0, 0])
    assert np.isnan(credit.group_weights(scores, jnp.ones(4, bool), beta=1.0, most=10.0)).all()


def test_entropy_is_greatest_where_a_policy_is_undecided():
    found = credit.bernoulli_entropy(jnp.asarray([0.0, np.log(3), -np.log(3), 100.0, -100.0]))
    expected = [np.log(2), *2 * (estimators.entropy(0.25),), 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.max() < 0.7


def test_all_are_constants():
    where = jnp.ones(3, bool)
    functions = [
        lambda x: credit.contrastive_reward(x, jnp.arange(3) < 1, where, threshold=0.0),
        lambda x: credit.conflict_advantages(x, where).sum(),
        lambda x: credit.group_weights(x, where, beta=1.0, most=2.0)[0],
        lambda x: credit.bernoulli_entropy(x).sum(),
    ]
    for function in functions:
        assert not jax.grad(function)(jnp.asarray([1.0, 2.0, 3.0])).any()
