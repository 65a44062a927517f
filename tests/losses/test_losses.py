import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lensjax import losses
from tests import reference

HYPER = {"gap": 1.5, "temperature": 0.5, "collapse_weight": 2.0}


def floats(*values):
    return np.asarray(values, np.float32)


JITTED = {
    "entry": jax.jit(losses.preference_loss),
    "pair": jax.jit(functools.partial(losses.preference_loss, granularity="pair")),
    "squared": jax.jit(functools.partial(losses.preference_loss, form="squared")),
    "rank": jax.jit(losses.rank_loss),
    "balance": jax.jit(losses.budget_balance),
    "budget": jax.jit(losses.budget_loss),
    "smoothing": jax.jit(losses.budget_smoothing_loss),
    "kl": jax.jit(losses.policy_kl),
}


# Preference loss.


def test_preference_loss_by_hand():
    scores, targets, where = floats(0.5, -0.25, 0.9, 0.0), floats(1, -1, 1, 0), np.asarray([True, True, True, False])
    # gap 1.5 at temperature 0.5: strength tanh(1.5), scale 3. Right with 0.5, right with 0.25, right with 0.9.
    first, second, third = (math.log1p(math.exp(-3 * margin)) for margin in (0.5, 0.25, 0.9))
    expected = math.tanh(1.5) * (first + 2 * second + third) / 3
    found = JITTED["entry"](scores, targets, where, **HYPER)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    entries = losses.preference_entry_losses(scores, targets, where, **HYPER)
    np.testing.assert_allclose(entries, np.tanh(1.5) * np.asarray([first, 2 * second, third, 0]), rtol=1e-6)


def test_squared_preference_loss_by_hand():
    scores, targets, where = floats(0.5, -0.25, 0.9), floats(1, -1, 1), np.asarray([True, True, False])
    kind = HYPER | {"weights": floats(4, 1, 16)}
    # Neither the temperature nor the size of the gap beyond its strength has a say.
    expected = math.tanh(1.5) * (4 * 0.25 + 2 * 0.5625) / 5
    assert float(JITTED["squared"](scores, targets, where, **kind)) == pytest.approx(expected, rel=1e-6)
    entries = losses.preference_entry_losses(scores, targets, where, form="squared", **HYPER)
    np.testing.assert_allclose(entries, np.tanh(1.5) * np.asarray([0.25, 2 * 0.5625, 0]), rtol=1e-6)
    for unknown in ({"form": "cubic"}, {"form": "squared", "granularity": "pair"}):
        with pytest.raises(ValueError, match="must be"):
            losses.preference_loss(scores, targets, where, **unknown, **HYPER)


def test_pair_preference_loss_by_hand():
    scores, targets, where = floats(0.5, 0.25, 0.9), floats(1, -1, 1), np.asarray([True, True, False])
    margin = (0.5 - 2 * 0.25) / 3  # the wrong answer weighs twice
    expected = math.tanh(1.5) * math.log1p(math.exp(-3 * margin))
    found = JITTED["pair"](scores, targets, where, **HYPER)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_weights_by_hand():
    scores, targets, where = floats(0.5, -0.25, 0.9), floats(1, -1, 1), np.asarray([True, True, False])
    kind = HYPER | {"weights": floats(4, 1, 16)}
    first, second = (math.log1p(math.exp(-3 * margin)) for margin in (0.5, 0.25))
    expected = math.tanh(1.5) * (4 * first + 2 * second) / 5
    assert float(JITTED["entry"](scores, targets, where, **kind)) == pytest.approx(expected, rel=1e-6)
    expected = math.tanh(1.5) * math.log1p(math.exp(-3 * (4 * 0.5 + 2 * 0.25) / 6))
    assert float(JITTED["pair"](scores, targets, where, **kind)) == pytest.approx(expected, rel=1e-6)
    # Means 0.1 and 0.2: (4 * 0.2 - 1 * 0.3) / 5, and one entry.
    ranked = JITTED["rank"](
        floats(0.2, -0.3, 0.2), floats(1, 1, -1), np.ones(3, bool), margin=0.5, weights=floats(4, 1, 9)
    )
    assert float(ranked) == pytest.approx(0.5 - (0.1 - 0.2), rel=1e-6)


@pytest.mark.parametrize("granularity", ["entry", "pair"])
def test_scores_at_zero_cost_log_two_times_the_strength(granularity):
    hyper = {"gap": 0.7, "temperature": 0.3, "collapse_weight": 1.0}
    loss = JITTED[granularity](np.zeros(4, np.float32), floats(1, -1, 1, -1), np.ones(4, bool), **hyper)
    assert float(loss) == pytest.approx(math.tanh(0.7) * math.log(2), rel=1e-6)


@pytest.mark.parametrize("granularity", ["entry", "pair"])
def test_the_gradient_asks_for_what_the_better_variant_shows(granularity):
    targets, where = floats(1, -1, 1, -1), np.asarray([True, True, True, False])
    gradient = jax.grad(JITTED[granularity])(np.full(4, 0.1, np.float32), targets, where, **HYPER)
    assert np.sign(gradient).tolist() == [-1, 1, -1, 0]


def test_a_gap_below_one_does_not_soften_the_scale():
    def ratio(gap):
        hyper = {"gap": gap, "temperature": 1.0, "collapse_weight": 1.0}
        one, other = losses.preference_entry_losses(floats(0, 1), floats(1, 1), np.ones(2, bool), **hyper)
        return float(one / other)

    at_scale = [math.log(2) / math.log1p(math.exp(-scale)) for scale in (1, 3)]
    assert ratio(0.1) == pytest.approx(at_scale[0], rel=1e-5)
    assert ratio(3.0) == ratio(-3.0) == pytest.approx(at_scale[1], rel=1e-5)


def test_weight_zero_leaves_collapses_out():
    scores, targets, where = floats(0.2, 0.7), floats(-1, -1), np.ones(2, bool)
    hyper = HYPER | {"collapse_weight": 0.0}
    for granularity in ("entry", "pair"):
        value, gradient = jax.value_and_grad(JITTED[granularity])(scores, targets, where, **hyper)
        assert float(value) == 0 and not np.asarray(gradient).any()


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="granularity must be entry or pair, got 'token'"):
        losses.preference_loss(floats(0), floats(1), np.ones(1, bool), granularity="token", **HYPER)


# Rank, budget and KL.


@pytest.mark.parametrize(
    ("scores", "targets", "expected"),
    [
        ([0.5, 0.1, -0.2], [1, 1, -1], 0.0),  # 0.3 above -0.2: more than the margin
        ([0.0, 0.1, 0.2], [1, -1, -1], 0.1 + 0.15),
        ([0.05, 0.0, 0.9], [1, -1, 0], 0.05),
        ([-1.0, -1.0, 0.0], [1, 1, 0], 0.0),  # one kind alone has no order
    ],
)
def test_rank_loss_by_hand(scores, targets, expected):
    where = np.asarray(targets) != 0
    assert float(JITTED["rank"](floats(*scores), floats(*targets), where, margin=0.1)) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(
    ("scores", "spans", "expected"),
    [
        ([0.5, -0.5], [1, 1], 0.0),
        ([0.5, -0.5], [8, 1], (4 - 0.5) / 4.5),  # a gist that expands costs its whole span
        ([0.5, 0.25], [1, 4], 1.0),
        ([-0.5, -0.25], [1, 4], -1.0),
        ([0.0, 0.0], [1, 4], 0.0),
    ],
)
def test_budget_balance_by_hand(scores, spans, expected):
    arguments = floats(*scores, 9.0), floats(*spans, 4), np.asarray([True, True, False])
    assert float(JITTED["balance"](*arguments)) == pytest.approx(expected, abs=1e-5)
    assert float(JITTED["budget"](*arguments)) == pytest.approx(expected**2, abs=1e-5)
    smooth = JITTED["smoothing"](*arguments, average=0.25)
    assert float(smooth) == pytest.approx((expected - 0.25) ** 2, abs=1e-5)


def test_the_moving_average_gets_no_gradient():
    gradient = jax.grad(
        lambda average: JITTED["smoothing"](floats(0.5, -0.1), floats(1, 1), np.ones(2, bool), average=average)
    )(0.3)
    assert float(gradient) == 0


def test_policy_kl_by_hand():
    # Logits 2 and 0: p = sigmoid(2), q = 1/2; and an entry on which both agree.
    p = 1 / (1 + math.exp(-2))
    expected = 0.5 * (p - 0.5) * 2 / 2
    found = JITTED["kl"](floats(1, 0.3, 9), floats(0, 0.3, -9), np.asarray([True, True, False]), temperature=0.5)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_policy_kl_is_zero_against_itself_and_positive_otherwise():
    rng = np.random.default_rng(0)
    scores, other = rng.uniform(-1, 1, (2, 50)).astype(np.float32)
    where = np.ones(50, bool)
    value, gradient = jax.value_and_grad(JITTED["kl"])(scores, scores, where, temperature=1.0)
    assert float(value) == 0 and not np.asarray(gradient).any()
    apart = JITTED["kl"](scores, other, where, temperature=1.0)
    assert float(apart) > 0.01
    assert float(apart) == pytest.approx(float(JITTED["kl"](other, scores, where, temperature=1.0)), rel=1e-5)


def test_the_anchor_gets_no_gradient():
    gradient = jax.grad(JITTED["kl"], argnums=1)(floats(0.5, -0.5), floats(0.1, 0.2), np.ones(2, bool), temperature=1.0)
    assert not np.asarray(gradient).any()


# The slow reference.


def loss_arguments(rng, count=12):
    """Scores, targets, spans, an anchor and a mask; masked entries hold what must not be read."""
    where = rng.random(count) < 0.7
    targets = np.where(where, rng.choice([-1.0, 1.0], count), 0)
    return {
        "scores": np.where(where, rng.uniform(-1, 1, count), np.nan).astype(np.float32),
        "targets": targets.astype(np.float32),
        "spans": rng.choice([1.0, 4.0, 16.0], count).astype(np.float32),
        "anchor": np.where(where, rng.uniform(-1, 1, count), np.nan).astype(np.float32),
        "where": where,
    }


@pytest.mark.parametrize("seed", range(8))
def test_losses_agree_with_the_reference(seed):
    rng = np.random.default_rng(seed)
    a = loss_arguments(rng)
    scores, targets, spans, anchor = (a[name][a["where"]].tolist() for name in ("scores", "targets", "spans", "anchor"))
    hyper = {
        "gap": rng.uniform(0, 3),
        "temperature": rng.uniform(0.2, 2),
        "collapse_weight": rng.uniform(0.1, 3),
    }
    traced = {name: np.float32(value) for name, value in hyper.items()}
    margin, average = np.float32(rng.uniform(0, 1)), np.float32(rng.uniform(-1, 1))

    def check(name, expected, *arguments, **keywords):
        assert float(JITTED[name](*arguments, a["where"], **keywords)) == pytest.approx(expected, rel=1e-4, abs=1e-6)

    for weights in ({}, {"weights": spans}):
        traced_weights = {"weights": a["spans"]} if weights else {}
        for granularity in ("entry", "pair"):
            expected = reference.preference_loss(scores, targets, granularity=granularity, **hyper, **weights)
            check(granularity, expected, a["scores"], a["targets"], **traced, **traced_weights)
        expected = reference.preference_loss(scores, targets, form="squared", **hyper, **weights)
        check("squared", expected, a["scores"], a["targets"], **traced, **traced_weights)
        expected = reference.rank_loss(scores, targets, margin=margin, **weights)
        check("rank", expected, a["scores"], a["targets"], margin=margin, **traced_weights)
    balance = reference.budget_balance(scores, spans)
    check("balance", balance, a["scores"], a["spans"])
    check("budget", balance**2, a["scores"], a["spans"])
    check("smoothing", (balance - average) ** 2, a["scores"], a["spans"], average=average)
    kl = reference.policy_kl(scores, anchor, temperature=hyper["temperature"])
    check("kl", kl, a["scores"], a["anchor"], temperature=traced["temperature"])


# Gradients against finite differences, away from the kinks of relu.

SMOOTH = floats(0.8, -0.5, 0.3, -0.9, 0.6)
TARGETS, SPANS, WHERE = floats(1, -1, -1, 1, 0), floats(1, 4, 1, 16, 1), np.asarray([True] * 4 + [False])


@pytest.mark.parametrize(
    ("name", "arguments", "hyper"),
    [
        ("entry", (TARGETS,), HYPER),
        ("pair", (TARGETS,), HYPER),
        ("rank", (TARGETS,), {"margin": 0.3}),
        ("entry", (TARGETS,), HYPER | {"weights": SPANS}),
        ("pair", (TARGETS,), HYPER | {"weights": SPANS}),
        ("squared", (TARGETS,), HYPER | {"weights": SPANS}),
        ("rank", (TARGETS,), {"margin": 0.9, "weights": SPANS}),
        ("balance", (SPANS,), {}),
        ("budget", (SPANS,), {}),
        ("smoothing", (SPANS,), {"average": 0.2}),
        ("kl", (floats(0.1, 0.2, -0.3, 0.4, 0.5),), {"temperature": 0.7}),
    ],
)
def test_gradients_agree_with_finite_differences(name, arguments, hyper):
    def loss(scores):
        return JITTED[name](scores, *arguments, WHERE, **hyper)

    check_grads(loss, (jnp.asarray(SMOOTH),), order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=2e-3)
    assert np.asarray(jax.grad(loss)(SMOOTH))[:4].all()
