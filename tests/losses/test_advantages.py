import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.losses import advantages
from lensjax.training.optim import schedules

KINDS = ("mean", "standardised", "leave_one_out")


def drawn(seed, count=7):
    random = np.random.default_rng(seed)
    where = random.random(count) < 0.7
    where[:2] = True
    return random.normal(size=count).astype("f"), where


# Over the steps of an episode


def slow_gae(rewards, values, continues, discount, decay):
    """The sum of all later errors, until the episode ends (Eq. 16 before it is made recursive)."""
    found = []
    for start in range(len(rewards)):
        total, weight = 0.0, 1.0
        for t in range(start, len(rewards)):
            total += weight * (rewards[t] + discount * continues[t] * values[t + 1] - values[t])
            weight *= discount * decay * continues[t]
        found.append(total)
    return found


def test_advantages_by_hand():
    found = advantages.generalised_advantages(
        [1.0, 2.0], [0.5, 1.0, 4.0], jnp.ones(2, bool), discount=0.5, trace_decay=0.5
    )
    # delta = [1 + 0.5 - 0.5, 2 + 2 - 1] = [1, 3]
    np.testing.assert_allclose(found, [1 + 0.25 * 3, 3])


@pytest.mark.slow
@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    steps=st.integers(1, 12),
    discount=st.floats(0, 1, width=32),
    decay=st.floats(0, 1, width=32),
)
def test_advantages_equal_the_sum_over_later_steps(seed, steps, discount, decay):
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=steps).astype("f"), random.normal(size=steps + 1).astype("f")
    continues = random.random(steps) < 0.8
    found = advantages.generalised_advantages(rewards, values, continues, discount=discount, trace_decay=decay)
    expected = slow_gae(rewards, values, continues, discount, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_advantages_by_hand_where_an_episode_ends():
    found = advantages.generalised_advantages(
        [1.0, 2.0, 3.0, 4.0],
        [2.0, 1.0, 4.0, 2.0, 6.0],
        jnp.asarray([True, False, True, True]),
        discount=0.5,
        trace_decay=0.25,
    )
    # delta = [1 + 0.5 * 1 - 2, 2 + 0 - 1, 3 + 0.5 * 2 - 4, 4 + 0.5 * 6 - 2] = [-0.5, 1, 0, 5]: the value after the end
    # of the episode counts nothing. Each step back weighs 0.5 * 0.25 = 0.125, and nothing crosses the end:
    # A_3 = 5,  A_2 = 0 + 0.125 * 5 = 0.625,  A_1 = 1,  A_0 = -0.5 + 0.125 * 1 = -0.375.
    np.testing.assert_array_equal(found, [-0.375, 1.0, 0.625, 5.0])


def slow_lambda_returns(rewards, values, continues, discount, decay):
    """(1 - lambda) sum_n lambda^(n-1) G_n + lambda^(N-1) G_N: n rewards and a value, averaged over n (Eq. 16 before it
    becomes a sum of errors)."""
    found = []
    for start in range(len(rewards)):
        last, weight, gained, mixed = len(rewards) - start, 1.0, 0.0, 0.0
        for n in range(1, last + 1):
            t = start + n - 1
            gained += weight * rewards[t]
            weight *= discount * continues[t]
            share = decay ** (n - 1) * (1 if n == last else 1 - decay)
            mixed += share * (gained + weight * values[t + 1])
        found.append(mixed)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_advantages_are_lambda_returns_minus_values(seed):
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=20).astype("f"), random.normal(size=21).astype("f")
    continues, (discount, decay) = random.random(20) < 0.8, random.uniform(0.5, 1, 2).astype("f")
    assert not continues.all()
    expected = slow_lambda_returns(rewards, values, continues, discount, decay) - values[:-1]
    found = advantages.generalised_advantages(rewards, values, continues, discount=discount, trace_decay=decay)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_ends_of_the_scale():
    random = np.random.default_rng(0)
    rewards, values, on = random.normal(size=5).astype("f"), random.normal(size=6).astype("f"), jnp.ones(5, bool)

    def found(discount, decay):
        return advantages.generalised_advantages(rewards, values, on, discount=discount, trace_decay=decay)

    np.testing.assert_allclose(found(0.0, 0.95), rewards - values[:-1], rtol=1e-6)
    to_the_end = np.cumsum(rewards[::-1])[::-1] + values[-1]
    np.testing.assert_allclose(found(1.0, 1.0), to_the_end - values[:-1], rtol=1e-5, atol=1e-5)


def test_nothing_after_the_end_of_an_episode_counts():
    values = np.asarray([0.1, 0.2, 0.3, 0.4, 0.5], "f")

    def first_two(rewards, values):
        continues = jnp.asarray([True, False, True, True])
        return advantages.generalised_advantages(rewards, values, continues, discount=0.9, trace_decay=0.9)[:2]

    expected = first_two(jnp.asarray([1.0, 2.0, 3.0, 4.0]), values)
    later = values + np.asarray([0, 0, 9, 9, 9], "f")
    np.testing.assert_array_equal(first_two(jnp.asarray([1.0, 2.0, 30.0, -40.0]), later), expected)


def test_a_value_must_follow_the_last_step():
    with pytest.raises(ValueError, match="expected values of 4 states for 3 rewards, got 3"):
        advantages.generalised_advantages(jnp.ones(3), jnp.ones(3), jnp.ones(3, bool), discount=1, trace_decay=1)


# Within a group


def test_group_advantages_by_hand():
    rewards, where = jnp.asarray([1.0, 2.0, 6.0, 99.0]), jnp.asarray([True, True, True, False])
    found = {kind: advantages.group_advantages(rewards, where, baseline=kind) for kind in KINDS}
    np.testing.assert_allclose(found["mean"], [-2, -1, 3, 0])
    np.testing.assert_allclose(found["leave_one_out"], [1 - 4, 2 - 3.5, 6 - 1.5, 0])
    np.testing.assert_allclose(found["standardised"], np.asarray([-2, -1, 3, 0]) / np.sqrt(14 / 3), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_group_advantages_do_not_depend_on_a_constant_order_or_masked_values(kind):
    rewards, where = drawn(1)
    expected = advantages.group_advantages(rewards, where, baseline=kind)
    assert abs(expected.sum()) < 1e-5 and not expected[~where].any()
    shifted = advantages.group_advantages(rewards + 3, where, baseline=kind)
    np.testing.assert_allclose(shifted, expected, atol=1e-5)
    order = np.random.default_rng(0).permutation(7)
    moved = advantages.group_advantages(rewards[order], where[order], baseline=kind)
    np.testing.assert_allclose(moved, expected[order], atol=1e-6)
    broken = np.where(where, rewards, np.nan)
    np.testing.assert_array_equal(advantages.group_advantages(broken, where, baseline=kind), expected)
    scaled = advantages.group_advantages(2 * rewards, where, baseline=kind)
    np.testing.assert_allclose(scaled, expected if kind == "standardised" else 2 * expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_equal_rewards_and_single_samples_have_no_advantage(kind, value):
    rewards = jnp.full(5, value)
    for where in (jnp.ones(5, bool), jnp.arange(5) == 2, jnp.zeros(5, bool)):
        found = advantages.group_advantages(rewards, where, baseline=kind)
        assert np.abs(found).max() <= 1e-6 * value


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="baseline must be mean, standardised or leave_one_out, got 'median'"):
        advantages.group_advantages(jnp.ones(3), jnp.ones(3, bool), baseline="median")


def slow_blend(groups, sharpness, threshold):
    """`groups` is a list of lists of rewards."""

    def standardised(values):
        return [(value - np.mean(values)) / (np.std(values) or 1) for value in values]

    between = standardised([np.mean(group) for group in groups])
    found = []
    for group, worth in zip(groups, between, strict=True):
        shares = [group.count(outcome) / len(group) for outcome in set(group)]
        entropy = -sum(share * np.log2(share) for share in shares)
        weight = 1 / (1 + np.exp(-sharpness * (entropy - threshold)))
        found.append([weight * local + (1 - weight) * worth for local in standardised(group)])
    return found


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), sharpness=st.floats(0, 8, width=32), threshold=st.floats(0, 2, width=32))
def test_blended_advantages_equal_a_slow_reference(seed, sharpness, threshold):
    random = np.random.default_rng(seed)
    rewards, where = random.choice([0.0, 0.5, 1.0], (3, 5)).astype("f"), random.random((3, 5)) < 0.7
    where[:, 0] = True
    rewards[0] = rewards[0, 0]  # a group of ties
    found = advantages.blended_advantages(
        np.where(where, rewards, np.nan), where, sharpness=sharpness, threshold=threshold
    )
    expected = slow_blend(
        [row[valid].tolist() for row, valid in zip(rewards, where, strict=True)], sharpness, threshold
    )
    for row, valid, values in zip(np.asarray(found), where, expected, strict=True):
        np.testing.assert_allclose(row[valid], values, rtol=1e-4, atol=1e-5)
        assert not row[~valid].any()


def test_a_group_of_ties_counts_for_what_it_is_beside_the_others():
    rewards = jnp.asarray([[1.0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
    found = advantages.blended_advantages(rewards, jnp.ones((3, 4), bool), sharpness=50.0, threshold=0.5)
    scale = np.sqrt(1.5)
    np.testing.assert_allclose(found, [[scale] * 4, [-scale] * 4, [-1, 1, -1, 1]], rtol=1e-5)


def test_no_baseline_gives_less_variance_than_the_optimal_one():
    """A softmax over 4 actions: the variance of grad log pi (r - b), computed over all of them."""
    logits, rewards = jnp.asarray([0.3, -1.0, 0.5, 0.0]), jnp.asarray([1.0, -2.0, 0.5, 4.0])
    probs = np.asarray(jax.nn.softmax(logits))
    scores = np.eye(4) - probs[None, :]

    def variance(baseline):
        samples = scores * (np.asarray(rewards) - baseline)[:, None]
        mean = probs @ samples
        return float(probs @ ((samples - mean) ** 2).sum(axis=1))

    # Weighed by how often each action is drawn.
    norms = probs * (scores**2).sum(axis=1)
    best = float(advantages.optimal_baseline(rewards, norms, jnp.ones(4, bool)))
    assert all(variance(best) < variance(best + step) for step in (-0.5, -0.01, 0.01, 0.5))
    assert variance(best) < variance(float(probs @ np.asarray(rewards)))


def test_the_optimal_baseline_without_gradients_is_the_mean():
    rewards, where = jnp.asarray([1.0, 2.0, 99.0]), jnp.asarray([True, True, False])
    assert advantages.optimal_baseline(rewards, jnp.zeros(3), where) == 1.5
    assert advantages.optimal_baseline(rewards, jnp.asarray([3.0, 1.0, 7.0]), where) == 1.25


def test_importance_weights_are_ratios_up_to_a_bound():
    log_probs, behaviour = jnp.log(jnp.asarray([0.2, 0.9, 0.9])), jnp.log(jnp.asarray([0.4, 0.3, 1e-30]))
    found = advantages.importance_weights(log_probs, behaviour, most=2.0)
    np.testing.assert_allclose(found, [0.5, 2, 2], rtol=1e-6)


def test_importance_weights_correct_for_who_acted():
    policy, behaviour, worth = np.asarray([0.7, 0.2, 0.1]), np.asarray([0.2, 0.3, 0.5]), np.asarray([1.0, 5.0, -3.0])
    weights = advantages.importance_weights(np.log(policy), np.log(behaviour), most=10.0)
    assert float(behaviour @ (weights * worth)) == pytest.approx(float(policy @ worth), rel=1e-5)


@pytest.mark.slow
@settings(max_examples=30)
@given(seed=st.integers(0, 1000), count=st.integers(1, 7))
def test_the_most_varied_subset_is_the_best_of_all(seed, count):
    values, where = drawn(seed)
    found = np.asarray(advantages.most_varied(values, where, count=count))
    kept = np.flatnonzero(where)
    size = min(count, len(kept))
    assert found.sum() == size and not found[~where].any()
    best = max(np.std(values[list(subset)]) for subset in itertools.combinations(kept, size))
    assert np.std(values[found]) == pytest.approx(best, rel=1e-4, abs=1e-6)


def test_a_subset_of_nothing_is_refused():
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"count must be between 1 and the 3 samples of the group, got {count}"):
            advantages.most_varied(jnp.ones(3), jnp.ones(3, bool), count=count)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.1, 0.2, 0.5, 0.6, 1.0]))
def test_the_most_informative_are_the_top_share(seed, share):
    values, where = drawn(seed)
    entropies = np.random.default_rng(seed + 1).random(7).astype("f")
    found = np.asarray(advantages.most_informative(np.where(where, values, np.nan), entropies, where, share=share))
    order = sorted(np.flatnonzero(where), key=lambda i: -abs(values[i]) * entropies[i])
    assert set(np.flatnonzero(found)) == set(order[: int(np.ceil(round(share * len(order), 6)))])


def test_a_broken_action_is_kept_for_the_loss_to_show():
    values = jnp.asarray([3.0, jnp.nan, 1.0, jnp.nan])
    kept = advantages.most_informative(values, jnp.ones(4), jnp.arange(4) < 3, share=0.3)
    assert kept.tolist() == [True, True, False, False]


def test_the_share_grows_with_a_linear_schedule():
    values, entropies, where = jnp.arange(10.0) - 5, jnp.ones(10), jnp.ones(10, bool)

    @jax.jit
    def kept(step):
        share = schedules.linear(step, start=0.2, end=1.0, steps=5)
        return advantages.most_informative(values, entropies, where, share=share).sum()

    assert [int(kept(step)) for step in range(6)] == [2, 4, 6, 8, 10, 10]
    # In float32 this product is above 15.
    ones = jnp.ones(25)
    assert int(advantages.most_informative(ones, ones, ones > 0, share=0.6).sum()) == 15


def test_advantages_are_constants():
    rewards, where = drawn(2)
    for kind in KINDS:
        gradient = jax.grad(lambda r, kind=kind: advantages.group_advantages(r, where, baseline=kind)[0])(rewards)
        assert not gradient.any()
    gradient = jax.grad(
        lambda v: advantages.generalised_advantages(rewards, v, where, discount=0.9, trace_decay=0.9).sum()
    )(jnp.ones(8))
    assert not gradient.any()
