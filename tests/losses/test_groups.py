"""Objectives over a group of variants: values by hand, a slow reference, what they must not depend on, their optima."""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from lensjax import losses
from tests import reference

HYPER = {
    "logistic": {"beta": 0.7},
    "rpo": {"beta": 0.7, "weight": 0.4},
    "hinge": {"beta": 0.7},
    "ipo": {"beta": 0.7},
    "cpl": {"alpha": 1.3, "bias": 0.5},
    "copg": {"beta": 0.7},
    "a_star_po": {"beta": 0.7},
    "info_nca": {"alpha": 0.4, "beta": 1.3},
    "plackett_luce": {"beta": 0.7},
    "disco": {"tau": 0.6},
    "info_nce": {"tau": 0.6},
    "grpo": {"beta": 0.7, "clip": 0.4, "baseline": "standardised"},
    "pg_rank": {"beta": 0.7, "key": jax.random.key(3), "samples": 4},
}
every_objective = pytest.mark.parametrize("name", HYPER)
# One that draws has values of its own: see below.
every_certain_objective = pytest.mark.parametrize("name", [name for name in HYPER if name != "pg_rank"])


@functools.cache
def objective(name):
    return jax.jit(functools.partial(getattr(losses, name), **HYPER[name]))


@functools.cache
def _gradients(name):
    return jax.jit(jax.value_and_grad(objective(name), argnums=(0, 1)))


def value_and_gradient(name, scores, rewards, where):
    """Value, and gradient in the scores."""
    value, (gradient, _) = _gradients(name)(scores, rewards, where)
    return value, gradient


def drawn(seed, count=6):
    random = np.random.default_rng(seed)
    where = random.random(count) < 0.7
    where[:2] = True
    return random.normal(size=count).astype("f"), random.normal(size=count).astype("f"), where


def softplus(x):
    return math.log1p(math.exp(x))


# Scores 0.5 and -0.5, rewards 1 and 0.
BY_HAND = [
    ("logistic", {"beta": 1.0}, softplus(-1)),
    ("logistic", {"beta": 3.0}, softplus(-3)),
    ("rpo", {"beta": 1.0, "weight": 0.0}, softplus(-1)),
    ("rpo", {"beta": 3.0, "weight": 2.0}, softplus(-3) - 1),
    ("hinge", {"beta": 1.0}, 0.0),
    ("hinge", {"beta": 0.25}, 0.75),
    ("ipo", {"beta": 0.5}, 0.0),
    ("ipo", {"beta": 1.0}, 0.25),
    ("cpl", {"alpha": 1.0, "bias": 1.0}, softplus(-1)),
    ("cpl", {"alpha": 2.0, "bias": 0.5}, softplus(-1.5)),
    ("copg", {"beta": 1.0}, 0.0),
    ("copg", {"beta": 3.0}, 2.0),
    # V* = log((e + 1) / 2) = 0.6201: the residuals are 0.1201 and 0.1201.
    ("a_star_po", {"beta": 1.0}, (math.log((math.e + 1) / 2) - 0.5) ** 2),
    # Both softmaxes are 1 / (1 + 1 / e) and its complement: the entropy of one.
    ("info_nca", {"alpha": 1.0, "beta": 1.0}, softplus(-1) + 1 / (1 + math.e)),
    ("plackett_luce", {"beta": 1.0}, softplus(-1) / 2),
    # Ratios 1.6487 and 0.6065; advantages 1 and -1, or half of that.
    ("grpo", {"beta": 1.0, "clip": 0.2, "baseline": "standardised"}, -(1.2 - 0.8) / 2),
    ("grpo", {"beta": 1.0, "clip": 0.9, "baseline": "standardised"}, -(math.exp(0.5) - math.exp(-0.5)) / 2),
    ("grpo", {"beta": 1.0, "clip": 0.2, "baseline": "mean"}, -(1.2 - 0.8) / 4),
    ("grpo", {"beta": 1.0, "clip": 0.2, "baseline": "leave_one_out"}, -(1.2 - 0.8) / 2),
    ("disco", {"tau": 1.0}, -1.0),
    ("disco", {"tau": 0.1}, -1.0),
    ("info_nce", {"tau": 1.0}, softplus(-1)),
    ("info_nce", {"tau": 0.5}, softplus(-2)),
]


@pytest.mark.parametrize(("name", "hyper", "expected"), BY_HAND)
def test_values_by_hand(name, hyper, expected):
    scores, rewards = jnp.asarray([0.5, -0.5]), jnp.asarray([1.0, 0.0])
    found = getattr(losses, name)(scores, rewards, jnp.ones(2, bool), **hyper)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_all_of_them_are_tested():
    over_groups = {name for name in losses.__all__ if "rewards" in inspect.signature(getattr(losses, name)).parameters}
    assert over_groups == set(HYPER)


@every_certain_objective
def test_values_equal_a_slow_reference(name):
    for seed in range(20):
        scores, rewards, where = drawn(seed)
        kept = [(float(s), float(r)) for s, r, w in zip(scores, rewards, where, strict=True) if w]
        expected = getattr(reference, name)(kept, **HYPER[name])
        assert float(objective(name)(scores, rewards, where)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@every_objective
def test_gradients_are_those_of_the_values(name):
    scores, rewards, where = drawn(3)
    check_grads(lambda s: objective(name)(s, rewards, where), (jnp.asarray(scores),), order=1, rtol=2e-2, atol=2e-3)


@every_certain_objective
def test_the_order_of_the_variants_does_not_matter(name):
    scores, rewards, where = drawn(4)
    order = np.random.default_rng(0).permutation(len(scores))
    expected, gradient = value_and_gradient(name, scores, rewards, where)
    found, moved = value_and_gradient(name, scores[order], rewards[order], where[order])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(moved, gradient[order], rtol=1e-4, atol=1e-6)


@every_objective
def test_only_differences_of_scores_matter(name):
    scores, rewards, where = drawn(5)
    expected, found = (float(objective(name)(scores + shift, rewards, where)) for shift in (0, 2))
    is_the_same = found == pytest.approx(expected, rel=1e-4)
    assert is_the_same == (name not in ("a_star_po", "cpl", "grpo", "rpo"))
    if name == "cpl":
        expected, found = (float(losses.cpl(scores + x, rewards, where, alpha=1.3, bias=1.0)) for x in (0, 2))
        assert found == pytest.approx(expected, rel=1e-4)


@every_objective
def test_only_differences_of_rewards_matter(name):
    scores, rewards, where = drawn(6)
    expected, found = (float(objective(name)(scores, rewards + shift, where)) for shift in (0, 2))
    assert found == pytest.approx(expected, rel=1e-4)


@every_objective
@pytest.mark.parametrize("rewards", [np.zeros(6, "f"), np.full(6, 0.3, "f")])
def test_a_group_of_equal_rewards_holds_no_preference(name, rewards):
    scores, _, where = drawn(7)
    value, gradient = value_and_gradient(name, scores, rewards, where)
    if name in ("copg", "a_star_po", "info_nca"):
        # These pull the policy to the reference where the rewards say nothing.
        _, pulled = value_and_gradient(name, np.zeros(6, "f"), rewards, where)
        assert np.abs(gradient).max() > 0.01 and np.abs(pulled).max() < 1e-6
    else:
        assert value == 0 and not gradient.any()


def test_ties_of_a_ranking_by_hand():
    """Scores 0.5, -0.5 and 0.2."""
    scores, where = jnp.asarray([0.5, -0.5, 0.2]), jnp.ones(3, bool)

    def loss(rewards):
        return jax.value_and_grad(losses.plackett_luce)(scores, jnp.asarray(rewards), where, beta=1.0)

    # The first two are as good as each other, and each is compared with the third alone.
    value, gradient = loss([1.0, 1.0, 0.0])
    assert float(value) == pytest.approx((softplus(-0.3) + softplus(0.7)) / 3, rel=1e-6)
    pulls = np.asarray([1 / (1 + math.exp(0.3)), 1 / (1 + math.exp(-0.7))]) / 3
    np.testing.assert_allclose(gradient, [-pulls[0], -pulls[1], pulls.sum()], rtol=1e-5)
    # The last two are: the first is drawn out of all three, and they out of nothing else.
    value, gradient = loss([1.0, 0.0, 0.0])
    total = math.exp(0.5) + math.exp(-0.5) + math.exp(0.2)
    assert float(value) == pytest.approx(-math.log(math.exp(0.5) / total) / 3, rel=1e-6)
    np.testing.assert_allclose(
        gradient, np.asarray([math.exp(0.5) - total, math.exp(-0.5), math.exp(0.2)]) / total / 3, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["logistic", "rpo", "hinge", "plackett_luce"])
def test_d18_4_a_group_of_equal_rewards_teaches_nothing(name):
    scores, rewards = jnp.asarray([0.1, 0.2, 0.3, -0.2]), jnp.full(4, 0.5)
    loss = functools.partial(getattr(losses, name), **(HYPER[name] | ({"weight": 0.0} if name == "rpo" else {})))
    assert jax.grad(loss)(scores, rewards, jnp.ones(4, bool)).tolist() == [0.0] * 4


def test_tied_variants_of_one_score_are_treated_alike():
    scores, rewards = np.asarray([0.3, 0.3, 0.3, -1.0, 9, 9], "f"), np.asarray([1.0, 1.0, 1.0, 0.0, 9, 9], "f")
    for name in HYPER:
        if name != "pg_rank":  # which draws
            _, gradient = value_and_gradient(name, scores, rewards, np.arange(6) < 4)
            first, second, third = gradient[:3]
            assert float(first) == pytest.approx(float(second), rel=1e-5) == pytest.approx(float(third), rel=1e-5)


def test_without_ties_a_ranking_has_the_likelihood_of_plackett_and_luce():
    scores, rewards, where = drawn(13)
    kept, order = 0.7 * scores[where], np.argsort(-rewards[where])
    expected = -reference.log_prob_of_ranking(kept.tolist(), order.tolist()) / where.sum()
    assert float(objective("plackett_luce")(scores, rewards, where)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["copg", "a_star_po", "info_nca"])
def test_the_optimum_is_that_of_the_regularised_problem(name):
    """pi ~ pi_ref exp(r / beta): relative scores r / beta, for InfoNCA r / (alpha beta), up to a constant."""
    _, rewards, where = drawn(8)
    hyper = HYPER[name]
    optimum = rewards / (hyper["alpha"] * hyper["beta"] if name == "info_nca" else hyper["beta"])
    if name == "a_star_po":
        optimum = optimum - np.log(np.mean(np.exp(rewards[where] / hyper["beta"])))
    assert np.abs(value_and_gradient(name, optimum, rewards, where)[1]).max() < 1e-5


def test_the_temperature_chooses_the_negatives():
    scores, rewards = jnp.asarray([0.0, 0.5, -0.5, -2.0]), jnp.asarray([1.0, 0.0, 0.0, 0.0])
    where = jnp.ones(4, bool)

    def weights(tau):
        gradient = jax.grad(losses.disco)(scores, rewards, where, tau=tau)
        return np.asarray(gradient[1:])

    np.testing.assert_allclose(weights(0.05), [1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(weights(1e3), [1 / 3] * 3, atol=1e-2)


def test_several_positives_count_alike():
    """Eq. 2 of 2004.11362: the mean over positives is outside of the logarithm, and all are in the denominator."""
    scores, rewards, tau = np.asarray([0.3, -0.2, 0.9, 0.4], "f"), np.asarray([2.0, 1.8, 0.0, 0.3], "f"), 0.5
    weights = np.exp(scores / tau)
    expected = -np.mean(np.log(weights[:2] / weights.sum()))
    found, gradient = jax.value_and_grad(losses.info_nce)(scores, rewards, np.ones(4, bool), tau=tau)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, (weights / weights.sum() - np.asarray([0.5, 0.5, 0, 0])) / tau, rtol=1e-5)


def better_and_worse(scores, rewards, where):
    """Scores of both sides of every pair, float32[pairs]."""
    won = where[:, None] & where[None] & (rewards[:, None] > rewards[None])
    better, worse = np.nonzero(won)
    return scores[better], scores[worse]


OPTAX = {
    "logistic": lambda d, b: optax.losses.sigmoid_binary_cross_entropy(b * d, jnp.ones_like(d)).mean(),
    "hinge": lambda d, b: optax.losses.hinge_loss(b * d, jnp.ones_like(d)).mean(),
    "ipo": lambda d, b: optax.losses.squared_error(d, jnp.full_like(d, 0.5 / b)).mean(),
}


@pytest.mark.parametrize("name", OPTAX)
def test_objectives_of_pairs_are_losses_of_optax(name):
    scores, rewards, where = drawn(10)
    better, worse = better_and_worse(scores, rewards, where)
    expected = OPTAX[name](jnp.asarray(better - worse), HYPER[name]["beta"])
    assert float(objective(name)(scores, rewards, where)) == pytest.approx(float(expected), rel=1e-5)


def test_objectives_of_the_whole_group_are_cross_entropies_of_optax():
    scores, rewards, where = drawn(11)
    kept, worth = jnp.asarray(scores[where]), jnp.asarray(rewards[where])
    wanted = jax.nn.softmax(worth / HYPER["info_nca"]["alpha"])
    expected = optax.losses.softmax_cross_entropy(HYPER["info_nca"]["beta"] * kept, wanted)
    assert float(objective("info_nca")(scores, rewards, where)) == pytest.approx(float(expected), rel=1e-5)
    positive = (worth > (worth.max() + worth.min()) / 2).astype(jnp.float32)
    expected = optax.losses.softmax_cross_entropy(kept / HYPER["info_nce"]["tau"], positive / positive.sum())
    assert float(objective("info_nce")(scores, rewards, where)) == pytest.approx(float(expected), rel=1e-5)


# Rankings that are drawn


def exact_gradient(scores, rewards, beta):
    """Of minus the expected utility, over all rankings, in the scores; and the gradient of each ranking's log pi."""
    rankings = jnp.asarray(list(itertools.permutations(range(len(scores)))))
    utilities = jnp.asarray([reference.ndcg(rewards.tolist(), ranking) for ranking in rankings.tolist()])

    def log_probs(values):
        logits = (beta * values)[rankings]
        return jnp.sum(logits - jax.lax.cumlogsumexp(logits, axis=1, reverse=True), axis=1)

    expected = [reference.log_prob_of_ranking((beta * scores).tolist(), ranking) for ranking in rankings.tolist()]
    np.testing.assert_allclose(log_probs(scores), expected, rtol=1e-4)
    return jax.grad(lambda values: -jnp.sum(jnp.exp(log_probs(values)) * utilities))(jnp.asarray(scores))


@pytest.mark.slow
@pytest.mark.parametrize("samples", [2, 5])
def test_drawn_rankings_estimate_the_gradient_of_the_expected_utility_without_bias(samples):
    where = np.asarray([True, True, False, True, True])
    random = np.random.default_rng(12)
    scores, rewards = random.normal(size=5).astype("f"), random.normal(size=5).astype("f")
    expected = exact_gradient(scores[where], rewards[where], 1.3)

    @jax.jit
    @jax.vmap
    def estimate(key):
        return jax.grad(losses.pg_rank)(scores, rewards, where, beta=1.3, key=key, samples=samples)

    found = np.asarray(estimate(jax.random.split(jax.random.key(0), 20_000)))
    assert not found[:, ~where].any()
    mean, error = found[:, where].mean(axis=0), found[:, where].std(axis=0) / np.sqrt(len(found))
    assert (np.abs(mean - expected) < 4 * error).all(), (mean, expected, error)
    # The test would see a gradient that is wrong by a fifth.
    assert np.abs(expected).max() > 20 * error.max()


def test_one_ranking_has_no_baseline():
    with pytest.raises(
        ValueError, match="samples must be at least 2, since each ranking is the others' baseline, got 1"
    ):
        losses.pg_rank(jnp.ones(3), jnp.ones(3), jnp.ones(3, bool), beta=1.0, key=jax.random.key(0), samples=1)
    losses.pg_rank(jnp.ones(3), jnp.ones(3), jnp.ones(3, bool), beta=1.0, key=jax.random.key(0), samples=2)


def test_rewards_get_no_gradient():
    scores, rewards, where = drawn(9)
    for name in HYPER:
        assert not _gradients(name)(scores, rewards, where)[1][1].any()
