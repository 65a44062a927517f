"""The adversary: regrets by hand and in loops, the head against least squares, what it proposes, and a step with it."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.context import working as contexts
from lensjax.runs import sweep
from lensjax.training import adversary
from lensjax.training.agreement import variant_values
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps import preference
from tests.small import SMALL, Run, batch, jit

FACED = Run(**{"context.proposed_rollouts": 2, "context.rollouts": 4, "context.candidates": 6})


def slow_regrets(values, losses, where):
    found = []
    for v in range(len(values)):
        costs = []
        for u in range(len(values)):
            if u != v and where[u] and where[v]:
                worse, better = (u, v) if losses[u] > losses[v] else (v, u)
                wrong = 1.0 if values[worse] > values[better] else 0.5 if values[worse] == values[better] else 0.0
                costs.append(wrong * (losses[worse] - losses[better]))
        found.append(np.mean(costs) if costs else 0.0)
    return found


def test_regrets_by_hand():
    # The second is the best and valued below the first: one nat, over two others.
    found = adversary.regrets([0.5, 0.0, -0.5], [2.0, 1.0, 3.0], jnp.asarray([True, True, True]))
    assert found.tolist() == [0.5, 0.5, 0.0]
    tied = adversary.regrets([0.0, 0.0, 9.0], [2.0, 1.0, np.nan], jnp.asarray([True, True, False]))
    assert tied.tolist() == [0.5, 0.5, 0.0]


def test_regrets_are_those_of_the_slow_reference():
    random, found = np.random.default_rng(0), jit(adversary.regrets)
    for _ in range(20):
        values, losses = (np.round(random.normal(size=6), 1).astype(np.float32) for _ in range(2))
        where = random.uniform(size=6) < 0.8
        np.testing.assert_allclose(found(values, losses, where), slow_regrets(values, losses, where), atol=1e-6)


def batches(rng, weights, count=4):
    for _ in range(count):
        known = rng.normal(size=(3, 5, len(weights))).astype(np.float32)
        where = rng.uniform(size=(3, 5)) < 0.7
        regret = (known @ weights + 0.1 * rng.normal(size=(3, 5))).astype(np.float32)
        yield np.where(where[..., None], known, np.nan), np.where(where, regret, np.nan), where


def test_the_head_is_a_ridge_regression_on_all_that_was_measured():
    rng, beta, count = np.random.default_rng(1), 0.8, 4
    head, learn = adversary.RegretHead(jnp.zeros((count, count)), jnp.zeros(count)), jit(adversary.learn)
    gram, cross = np.zeros((count, count)), np.zeros(count)
    for known, regret, where in batches(rng, np.asarray([1.0, -2.0, 0.5, 0.0])):
        head = learn(head, known, regret, where, beta=beta)
        x, y = known[where].astype(float), regret[where].astype(float)
        gram = beta * gram + (1 - beta) * x.T @ x / len(x)
        cross = beta * cross + (1 - beta) * x.T @ y / len(x)
    ridge = adversary.RIDGE * np.trace(gram) / count * np.eye(count)
    np.testing.assert_allclose(head.weights, np.linalg.solve(gram + ridge, cross), rtol=1e-3)
    np.testing.assert_allclose(head.weights, [1.0, -2.0, 0.5, 0.0], atol=0.15)


def test_nothing_measured_changes_nothing_and_nothing_known_expects_nothing():
    head = adversary.RegretHead(jnp.zeros((2, 2)), jnp.zeros(2))
    assert head.weights.tolist() == [0, 0]
    one = adversary.learn(head, np.ones((1, 2), np.float32), np.ones(1), np.asarray([True]), beta=0.5)
    same = adversary.learn(one, np.full((1, 2), np.nan), np.full(1, np.nan), np.asarray([False]), beta=0.5)
    np.testing.assert_array_equal(same.gram, one.gram)
    np.testing.assert_array_equal(same.cross, one.cross)
    broken = adversary.learn(one, np.ones((1, 2), np.float32), np.full(1, np.nan), np.asarray([True]), beta=0.5)
    assert np.isnan(broken.cross).all(), "a NaN that counts stays"


def test_the_largest_expected_regrets_are_proposed_and_duplicates_last():
    head = adversary.RegretHead(jnp.eye(2), jnp.asarray([1.01, 0.0]))
    known = np.asarray([[9, 0], [1, 0], [3, 0], [5, 0], [4, 0]], np.float32)
    distinct = np.asarray([True, True, True, False, True])
    of = functools.partial(adversary.propose, head, known, random=1)
    assert of(distinct, proposed=2).tolist() == [0, 4, 2]
    assert of(distinct, proposed=4).tolist() == [0, 4, 2, 1, 3]


@functools.cache
def drawn(weight):
    """Variants of a batch before an adversary that expects regret where values are large, times a weight."""
    state = FACED.state()
    count = len(state.head.cross)
    cross = jnp.zeros(count).at[-3].set(weight)
    head = adversary.RegretHead(jnp.eye(count), cross)
    params = {**FACED.frozen(), **state.params}

    @jit
    def score(head):
        return preference.score_batch(
            params, replace(state, head=head), batch(), recipe=FACED.recipe, models=FACED.models
        )

    return score(head)


def test_the_first_rollouts_stay_random_and_the_others_are_what_the_adversary_asks_for():
    low, high = drawn(-1.0), drawn(1.0)
    cuts = [
        np.asarray(jax.vmap(jax.vmap(lambda one: contexts.to_cut(one, FACED.recipe.geometry)))(scored.contexts))
        for scored in (low, high)
    ]
    np.testing.assert_array_equal(cuts[0][:, :3], cuts[1][:, :3])
    assert (cuts[0][:, 3:] != cuts[1][:, 3:]).any()
    values = [np.asarray(adversary.values_of(scored.features))[:, 2:] for scored in (low, high)]
    assert (values[0].max(1) <= values[1].min(1) + 1e-6).all()
    assert low.nll.shape == (3, 5), "no pass of the base model is paid for candidates"


def test_values_among_the_features_are_those_of_the_policy():
    scored = drawn(1.0)
    scores = FACED.policy_scores(FACED.state().params["lens"], scored.entries)
    value = jax.vmap(functools.partial(variant_values, geometry=FACED.recipe.geometry))
    np.testing.assert_allclose(
        adversary.values_of(scored.features), value(scores, scored.contexts)[:, 1:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_run_learns_what_it_regrets_in_one_program():
    states, reports = FACED.history(FACED.state(), 3)
    assert FACED.train_step._cache_size() == 1
    assert not states[0].head.gram.any() and np.abs(np.asarray(states[3].head.weights)).max() > 0
    assert all(float(report[f"adversary/regret_{kind}"]) >= 0 for report in reports for kind in ("random", "proposed"))


def test_without_an_adversary_nothing_of_it_is_there():
    run = Run()
    assert run.state().head is None
    _, report = jax.eval_shape(
        functools.partial(preference.train_step, recipe=run.recipe, models=run.models),
        *(run.state(), batch(), run.frozen()),
    )
    assert not any("adversary" in name for name in report)


def test_arms_with_an_adversary_share_only_their_own_draws():
    changes = {"context.proposed_rollouts": 1}
    arms = [_settings.replace(SMALL, **changes, **{"hyper.margin": margin}) for margin in (0.1, 0.1, 0.4)]
    assert len({sweep._draw(arm) for arm in arms}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proposed_rollouts": 4}, "context.proposed_rollouts must be below context.rollouts 4"),
        ({"proposed_rollouts": 3, "candidates": 2}, "context.candidates must be at least context.proposed_rollouts 3"),
        (
            {"proposed_rollouts": 1, "own_rollouts": 1, "local_edits": 1},
            "context.own_rollouts must be 0 with context.proposed_rollouts",
        ),
    ],
)
def test_what_cannot_be_proposed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ContextConfig(**changes)


def test_an_adversary_must_be_given():
    with pytest.raises(ValueError, match="head must be given"):
        FACED.observe(FACED.state(), batch())
