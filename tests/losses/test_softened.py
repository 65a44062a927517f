"""Label smoothing and margins by strength, and the attribution of spans: by hand, and against slow references."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lensjax import losses
from tests import reference

EVERY = np.ones(2, bool)
SOFT = {"label_smoothing": 0.1, "gap_margin": 0.5}


def floats(*values):
    return np.asarray(values, np.float32)


def softplus(x):
    return math.log1p(math.exp(x))


LOGISTIC = jax.jit(losses.logistic)
PREFERENCE = jax.jit(losses.preference_loss, static_argnames=("granularity", "form"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"label_smoothing": 0.0}, softplus(-1)),
        ({"label_smoothing": 0.25}, 0.75 * softplus(-1) + 0.25 * softplus(1)),
        # A reward 2 nats higher asks for a difference of 1 that counts as 0.
        ({"gap_margin": 0.5}, softplus(0)),
        ({"gap_margin": 2.0, "label_smoothing": 0.25}, 0.75 * softplus(3) + 0.25 * softplus(-3)),
        ({"gap_range": (2.0, 3.0)}, softplus(-1)),
        ({"gap_range": (0.0, 2.0)}, 0.0),
    ],
)
def test_a_preference_of_variants_by_hand(options, expected):
    """Scores 0.5 and -0.5, rewards 2 and 0."""
    found = LOGISTIC(floats(0.5, -0.5), floats(2, 0), EVERY, beta=1.0, **options)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("granularity", ["entry", "pair"])
def test_a_preference_of_entries_by_hand(granularity):
    """A gap of 2 at temperature 1 has strength tanh 2 and scale 2; one entry is for, and one against."""
    hyper = {"gap": -2.0, "temperature": 1.0, "collapse_weight": 1.0, **SOFT}
    found = PREFERENCE(floats(0.5, 0.25), floats(1, -1), EVERY, granularity=granularity, **hyper)
    of = {"entry": [1.0 - 1, -0.5 - 1], "pair": [0.25 - 1]}[granularity]
    expected = math.tanh(2) * np.mean([0.9 * softplus(-y) + 0.1 * softplus(y) for y in of])
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("granularity", ["entry", "pair"])
def test_nothing_of_either_leaves_every_bit(granularity):
    rng, none = np.random.default_rng(0), {"label_smoothing": 0.0, "gap_margin": 0.0}
    hyper = {"gap": 1.3, "temperature": 0.7, "collapse_weight": 0.9, "granularity": granularity}
    for _ in range(5):
        scores, rewards = rng.normal(size=(2, 9)).astype("f")
        where = rng.random(9) < 0.7
        for loss, other, options in ((LOGISTIC, rewards, {"beta": 1.3}), (PREFERENCE, np.sign(rewards), hyper)):
            found = jax.value_and_grad(loss)(scores, other, where, **options, **none)
            expected = jax.value_and_grad(loss)(scores, other, where, **options)
            jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_both_equal_a_slow_reference():
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores, rewards = rng.normal(size=(2, 6)).astype("f")
        where = rng.random(6) < 0.8
        group = [(float(s), float(r)) for s, r, w in zip(scores, rewards, where, strict=True) if w]
        options = SOFT | {"beta": 0.7, "gap_range": (0.4, 1.5)}
        found = LOGISTIC(scores, rewards, where, **options)
        assert float(found) == pytest.approx(reference.logistic(group, **options), rel=1e-4, abs=1e-6)
        hyper = {"gap": 1.7, "temperature": 0.6, "collapse_weight": 0.8, **SOFT}
        signs = [(score, math.copysign(1, reward)) for score, reward in group]
        for granularity in ("entry", "pair"):
            expected = reference.preference_loss(*zip(*signs, strict=True), **hyper, granularity=granularity)
            found = PREFERENCE(scores, np.sign(rewards), where, **hyper, granularity=granularity)
            assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_smoothed_preference_has_a_best_difference_and_a_margin_moves_it():
    """Where the policy is as sure as the labels are, behind the margin."""
    for margin in (0.0, 0.5):
        best, options = math.log(0.9 / 0.1) + margin * 2, SOFT | {"beta": 1.0, "gap_margin": margin}
        slope = jax.grad(lambda d, o=options: LOGISTIC(jnp.stack([d, 0 * d]), floats(2, 0), EVERY, **o))
        assert abs(float(slope(best))) < 1e-6
        assert float(slope(best - 0.5)) < -0.01 and float(slope(best + 0.5)) > 0.01


def test_a_squared_error_cannot_be_softened():
    hyper = {"gap": 1.0, "temperature": 1.0, "collapse_weight": 1.0, "form": "squared"}
    for one in ({"label_smoothing": 0.1}, {"gap_margin": 0.1}):
        with pytest.raises(ValueError, match="soften the logistic form, and form is 'squared'"):
            losses.preference_loss(floats(0, 0), floats(1, 1), EVERY, **hyper, **one)


# What a span was seen to be worth.


def test_attributions_by_hand():
    scores, where = floats(0.5, -1.0, 9.0), np.asarray([True, True, False])
    attributions, weights = floats(math.log(3), -math.log(3), 1), floats(3, 1, 5)
    # Rewards 3/4 - 1/2 and 1/4 - 1/2.
    found = losses.attribution_loss(scores, attributions, where, weights=weights)
    assert float(found) == pytest.approx(-(3 * 0.25 * 0.5 + 0.25) / 4, rel=1e-6)
    alone = losses.attribution_loss(scores, attributions, where)
    assert float(alone) == pytest.approx(-(0.25 * 0.5 + 0.25) / 2, rel=1e-6)


def test_attributions_equal_a_slow_reference_and_their_gradient_is_bounded():
    rng = np.random.default_rng(2)
    loss = jax.jit(losses.attribution_loss)
    for _ in range(10):
        scores, attributions = (9 * rng.normal(size=(2, 7))).astype("f")
        where, weights = rng.random(7) < 0.7, rng.integers(1, 9, 7).astype("f")
        kept = [list(map(float, row[where])) for row in (scores, attributions, weights)]
        found, gradient = jax.value_and_grad(loss, argnums=(0, 1))(scores, attributions, where, weights=weights)
        assert float(found) == pytest.approx(reference.attribution_loss(*kept), rel=1e-4, abs=1e-6)
        assert not gradient[1].any() and np.abs(gradient[0]).sum() <= 0.5 + 1e-6
    check_grads(lambda s: loss(s, attributions, where, weights=weights), (jnp.asarray(scores),), order=1, rtol=1e-2)
