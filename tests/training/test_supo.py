"""`supo_step` as a whole: its loss by a slow reference, what is shared and what is left out, and one compile."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.models.decision import split
from lensjax.training.steps import supo, trajectories
from lensjax.training.steps.supo import SupoConfig
from tests.small import jit
from tests.training.test_trajectories import CONFIG, GEOMETRY, models, params

SETTINGS = SupoConfig(steps=10, trajectories=3, window=4, refocus_steps=4, draws=3, temperature=0.5, entropy_weight=0.1)


def batch(seed=0):
    return {"tokens": jnp.asarray(np.random.default_rng(seed).integers(0, 16, (2, 24)), jnp.int32)}


def static(**changes):
    recipe = replace(CONFIG.recipe, optimizer=replace(CONFIG.optimizer, warmup_steps=1))
    return {"recipe": recipe, "settings": replace(SETTINGS, **changes), "models": models()}


def start(seed=0):
    return supo.init_supo_state(jax.random.key(seed), recipe=static()["recipe"], params=params())


@functools.cache
def step():
    return jit(functools.partial(supo.supo_step, **static()))


@functools.cache
def played(reward="late"):
    state, frozen = start()
    roll_out = jit(functools.partial(supo.roll_out, **static(reward=reward)))
    return roll_out({**frozen, **state.params}, replace(state, step=jnp.asarray(2, jnp.int32)), batch())


@pytest.fixture(params=["late", "steps"])
def group(request):
    """Trajectories of which one of each kind is there: ended at once or late, overlong."""
    one = played(request.param)
    read = one.read.at[0, 0, -1].set(9)  # overlong, whatever it was
    read = read.at[0, 1:].set(jnp.asarray([4, 7, 10, 10, 10])[None]).at[1, :, -1].set(10)
    return request.param, replace(one, read=read)


def slow_advantages(reward, one, kind="standardised"):
    """A stream and a trajectory at a time."""
    nll, taken, ended = (np.asarray(x, np.float64) for x in (one.nll, one.taken, one.has_ended))
    found = np.zeros(taken.shape)
    for b in range(2):
        for t in range(4):
            among = [g for g in range(3) if ended[b, g] and (reward == "late" or taken[b, g, t])]
            worth = {g: -nll[b, g, -1] if reward == "late" else nll[b, g, t] - nll[b, g, t + 1] for g in among}
            values = np.asarray(list(worth.values()))
            for g in among:
                spread = values.std()
                if taken[b, g, t] and spread > 1e-6 * np.abs(values).max():
                    found[b, g, t] = (worth[g] - values.mean()) / spread
    return found


def test_the_loss_is_that_of_the_slow_reference(group):
    reward, one = group
    loss = jit(functools.partial(supo.trajectory_loss, **static(reward=reward)))
    found, report = loss(params(), batch(), one)
    log_probs, entropies = judged(one)
    where = np.asarray(one.taken) & np.asarray(one.has_ended)[..., None]
    assert not where[0, 0].any() and where[0, 1].tolist() == [True, True, False, False]
    entropy = entropies[where].mean()
    expected = -(slow_advantages(reward, one) * log_probs)[where].mean() - 0.1 * entropy
    assert float(found) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    ended = np.asarray(one.has_ended)
    assert float(report["rl/reward"]) == pytest.approx(-np.asarray(one.nll)[..., -1][ended].mean(), rel=1e-5)
    assert float(report["rl/overlong"]) == pytest.approx(1 - ended.mean())
    assert float(report["rl/entropy"]) == pytest.approx(entropy, rel=1e-4)


def judged(one):
    """Log-probability and entropy of every step, [B, G, S]."""
    parts = params()

    def judge(tokens, group):
        tree = trajectories.stream(models(), parts, split(tokens, horizon=2), GEOMETRY)
        log_prob = functools.partial(trajectories.log_prob, models(), parts["lens"], tree)
        return jax.vmap(functools.partial(log_prob, geometry=GEOMETRY, settings=SETTINGS))(group)

    return jax.device_get(jit(jax.vmap(judge))(batch()["tokens"], one))


def test_all_steps_of_a_trajectory_share_its_advantage(group):
    reward, one = group
    first = jax.tree.map(lambda leaf: leaf[1], one)
    found = np.asarray(supo._advantages(first, settings=replace(SETTINGS, reward=reward)))
    taken = np.asarray(first.taken)
    apart = [np.ptp(found[g][taken[g]]) for g in range(3)]
    assert (max(apart) == 0) == (reward == "late") and not found[~taken].any()


def test_what_an_overlong_trajectory_was_worth_reaches_neither_loss_nor_gradient(group):
    reward, one = group
    loss = functools.partial(supo.trajectory_loss, **static(reward=reward))

    def total(lens, one):
        return loss({**params(), "lens": lens}, batch(), one)[0]

    gradient = jit(jax.value_and_grad(total))
    expected = gradient(params()["lens"], one)
    for content in (jnp.nan, 1e30):
        changed = replace(one, nll=one.nll.at[0, 0].set(content))
        jax.tree.map(np.testing.assert_array_equal, gradient(params()["lens"], changed), expected)
    assert np.isnan(gradient(params()["lens"], replace(one, nll=one.nll.at[0, 1].set(jnp.nan)))[0])


def test_lensnet_moves_and_nothing_else_in_one_program():
    state, frozen = start()
    assert set(state.params) == {"lens"} and set(frozen) == {"base", "gist"}
    after = state
    for index in range(3):
        after, report = step()(after, batch(index), frozen)
        assert all(np.isfinite(value) for value in report.values())
    assert step()._cache_size() == 1 and int(after.step) == 3
    before, later = (jax.tree.leaves(each.params) for each in (state, after))
    assert any(bool((a != b).any()) for a, b in zip(before, later, strict=True))


def test_a_trajectory_is_measured_once_or_after_every_step():
    assert played("late").nll.shape == (2, 3, 1) and played("steps").nll.shape == (2, 3, 5)
    np.testing.assert_allclose(played("late").nll[..., 0], played("steps").nll[..., -1], rtol=1e-5)


def test_a_single_trajectory_has_none_to_be_compared_with():
    with pytest.raises(ValueError, match=r"supo.trajectories must be in .2, 1024., got 1"):
        SupoConfig(trajectories=1)
