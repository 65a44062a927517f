"""Drawn drops: legal, with the probabilities that they say, and the lowest ones without a draw."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import forgetting
from tests.small import jit

BLOCKS, DRAWS, TEMPERATURE = 4, 2, 0.5
HELD, SCORES = np.asarray([True, False, True, True]), np.asarray([0.5, -9.0, -0.25, 0.1], np.float32)


def slow_probability(dropped, held, scores, most):
    """Of a sequence of draws, one after the other."""
    held, found, left = list(held), 1.0, most
    for block in dropped:
        among = [i for i in range(BLOCKS) if held[i]]
        weights = {i: np.exp(-scores[i] / TEMPERATURE) if left > 0 else 0.0 for i in among}
        weights[BLOCKS] = len(among) * np.exp(-np.mean([scores[i] for i in among]) / TEMPERATURE)
        found *= weights.get(block, 0.0) / sum(weights.values())
        if block < BLOCKS and held[block]:
            held[block] = False
            left -= 1
    return found


@pytest.mark.parametrize("most", [0, 1, 2])
def test_probabilities_are_those_of_the_slow_reference_and_add_up_to_1(most):
    every = np.asarray(list(itertools.product(range(BLOCKS + 1), repeat=DRAWS)), np.int32)
    one = jax.vmap(lambda dropped: forgetting.log_prob(dropped, HELD, SCORES, most, temperature=TEMPERATURE)[0])
    found = np.exp(np.asarray(jit(one)(every)))
    expected = [slow_probability(dropped, HELD, SCORES, most) for dropped in every.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert found.sum() == pytest.approx(1, rel=1e-5)


def test_draws_come_as_often_as_they_are_probable():
    def one(key):
        return forgetting.draw(key, HELD, SCORES, 1, draws=DRAWS, temperature=TEMPERATURE)

    after, dropped = (np.asarray(x) for x in jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000)))
    for pair in itertools.product((0, 2, 3, BLOCKS), repeat=DRAWS):
        share = (dropped == np.asarray(pair)[None]).all(1).mean()
        assert share == pytest.approx(slow_probability(pair, HELD, SCORES, 1), abs=0.03)
    # What was held is held or dropped, once; nothing else is touched, and no more than one is dropped.
    is_dropped = (dropped[:, :, None] == np.arange(BLOCKS)[None, None]).sum(1)
    np.testing.assert_array_equal(after, HELD[None] & (is_dropped == 0))
    assert is_dropped.sum(1).max() == 1 and not is_dropped[:, 1].any()


def test_a_shift_of_all_scores_changes_nothing_and_nothing_is_at_most_as_likely_as_not():
    def nothing(scores):
        return forgetting.log_prob(jnp.full(1, BLOCKS), HELD, scores, 9, temperature=TEMPERATURE)[0]

    assert float(nothing(SCORES + 3)) == pytest.approx(float(nothing(SCORES)), rel=1e-5)
    assert float(nothing(jnp.full(BLOCKS, 0.7))) == pytest.approx(np.log(0.5), rel=1e-5)
    assert float(nothing(SCORES)) < np.log(0.5)


def test_entropy_by_hand():
    """Of two equal blocks and nothing, which is as likely as both: 1.5 bits; once all is read, none."""
    held, scores = jnp.asarray([True, True, False, False]), jnp.zeros(BLOCKS)
    _, entropy = forgetting.log_prob(jnp.asarray([BLOCKS]), held, scores, 1, temperature=1.0)
    assert float(entropy) == pytest.approx(1.5 * np.log(2), rel=1e-5)
    log_prob, entropy = forgetting.log_prob(jnp.asarray([BLOCKS]), held, scores, 0, temperature=1.0)
    assert float(log_prob) == float(entropy) == 0


def test_gradients_are_finite_and_those_of_what_is_not_held_are_0():
    def total(scores):
        log_prob, entropy = forgetting.log_prob(jnp.asarray([2, BLOCKS]), HELD, scores, 1, temperature=TEMPERATURE)
        return log_prob + entropy

    gradient = np.asarray(jax.grad(total)(jnp.asarray(SCORES)))
    assert np.isfinite(gradient).all() and gradient[1] == 0 and gradient[2] != 0


@pytest.mark.parametrize(
    ("most", "draws", "dropped"), [(2, 2, [2, 3]), (1, 2, [2, 4]), (9, 5, [2, 3, 0, 4, 4]), (0, 1, [4])]
)
def test_the_lowest_are_dropped_first(most, draws, dropped):
    after, found = forgetting.lowest(HELD, SCORES, most, draws=draws)
    assert found.tolist() == dropped
    assert after.tolist() == [bool(HELD[i]) and i not in dropped for i in range(BLOCKS)]
