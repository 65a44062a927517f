"""`online_step` as a whole: its loss by a slow reference, what it trains, and that it learns."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.runs.engine import devices
from lensjax.training.steps import episodes, online
from lensjax.training.steps.online import OnlineConfig
from lensjax.training.steps.train_state import init_train_state
from tests.losses.test_advantages import slow_gae
from tests.losses.test_trajectory_losses import slow_diverging
from tests.small import SMALL, batch, jit

REPORT = {
    *("loss", "grad_norm", "lr"),
    *(f"rl/{name}" for name in ("reward", "avg_reward_100", "policy_loss", "value_loss", "entropy")),
    *(f"rl/{name}" for name in ("entropy_coefficient", "advantages", "kl_divergence", "total_loss", "learning_rate")),
    *(f"rl/{name}" for name in ("swaps", "nll_start", "nll_end")),
}
GAE = {
    "batch_size": 4,
    "online.edit_cost": 0.01,
    "online.kl_weight": 0.3,
    "online.entropy_decay": 0.5,
    "online.entropy_floor": 0.002,
}
CREDIT = {"online.credit": "diverging", "online.amplification": 3.0}
GROUP = {"online.advantages": "leave_one_out", "online.episodes": 3, "online.whiten": False}


class Played:
    """A configuration, and what is compiled of it."""

    def __init__(self, **changes):
        self.config = _settings.replace(SMALL, **{"online.steps": 12, "online.refocus_steps": 3, **changes})
        self.models, self.settings = self.config.build_models(), self.config.online
        of_phase = {"settings": self.settings, "models": self.models}
        self.static = {"recipe": self.config.recipe, **of_phase}
        self.step = jit(functools.partial(online.online_step, **self.static), donate_argnums=0)
        self.roll_out = jit(functools.partial(online.roll_out, **self.static))
        self.loss = jit(functools.partial(online.episode_loss, geometry=self.config.geometry, **of_phase))

    def state(self, seed=0):
        start, frozen = init_train_state(jax.random.key(seed), recipe=self.config.recipe, models=self.models)
        params = {**frozen, **start.params}
        state, self.frozen = online.init_online_state(jax.random.key(seed + 1), params=params, **self.static)
        return state

    def play(self, state, batch):
        return self.roll_out({**self.frozen, **state.params}, state, batch)

    def batch(self, seed=0):
        return batch(seed, self.config.batch_size)

    @functools.cached_property
    def history(self):
        """States and reports of the first three steps."""
        state = self.state()
        states, reports = [jax.tree.map(jnp.copy, state)], []
        for index in range(3):
            state, report = self.step(state, self.batch(index), self.frozen)
            states.append(jax.tree.map(jnp.copy, state))
            reports.append({name: float(value) for name, value in report.items()})
        return states, reports


@functools.cache
def run(name):
    return Played(**{"gae": GAE, "group": GROUP}[name])


@pytest.mark.slow
def test_the_names_of_the_report():
    _, reports = run("gae").history
    assert all(set(report) == REPORT for report in reports)
    assert all(np.isfinite(value) for report in reports for value in report.values())


@pytest.mark.parametrize("name", ["gae", pytest.param("group", marks=pytest.mark.slow)])
def test_the_loss_is_that_of_the_slow_reference(name):
    """With a value baseline in the third step, and among the episodes of a sequence in the first one."""
    one, settings = run(name), run(name).settings
    state = one.history[0][2] if name == "gae" else one.state()
    played = one.play(state, one.batch(2))
    log_prob = functools.partial(
        episodes.log_prob,
        one.models,
        state.params["lens"],
        geometry=one.config.geometry,
        settings=settings,
        reference=state.reference,
    )
    stats, features = jit(jax.vmap(jax.vmap(log_prob)))(played)
    value = functools.partial(online.value_model(one.models, settings).apply, state.params["value"])
    values = np.asarray(jax.vmap(jax.vmap(jax.vmap(value)))(features), np.float64)
    losses, count = np.asarray(played.nll, np.float64), np.asarray(played.swaps.count)
    rewards = losses[..., :-1] - losses[..., 1:] - settings.edit_cost * count
    advantages, returns = slow_advantages(rewards, values, settings)
    used = (advantages - advantages.mean()) / advantages.std() if settings.whiten else advantages
    expected = {
        "rl/reward": rewards.sum(-1).mean(),
        "rl/policy_loss": -(used * np.asarray(stats.log_prob)).mean(),
        "rl/value_loss": 0.5 * ((values - returns) ** 2).mean(),
        "rl/entropy": np.asarray(stats.entropy).mean(),
        "rl/entropy_coefficient": max(0.01 * settings.entropy_decay ** int(state.step), settings.entropy_floor),
        "rl/advantages": advantages.mean(),
        "rl/kl_divergence": np.asarray(stats.divergence).mean(),
        "rl/swaps": count.mean(),
        "rl/nll_start": losses[..., 0].mean(),
        "rl/nll_end": losses[..., -1].mean(),
    }
    expected["rl/total_loss"] = (
        expected["rl/policy_loss"]
        + settings.value_weight * expected["rl/value_loss"]
        - expected["rl/entropy_coefficient"] * expected["rl/entropy"]
        + settings.kl_weight * expected["rl/kl_divergence"]
    )
    report = one.history[1][2] if name == "gae" else one.loss(state.params, state, played)[1]
    assert {name: float(report[name]) for name in expected} == pytest.approx(expected, rel=2e-3, abs=1e-5)


def test_the_report_of_a_step_and_of_the_last_hundred():
    _, reports = run("gae").history
    assert reports[2]["rl/total_loss"] == reports[2]["loss"]
    assert reports[2]["rl/avg_reward_100"] == pytest.approx(np.mean([report["rl/reward"] for report in reports]))


def slow_advantages(rewards, values, settings):
    """Advantages and the value's targets, an episode at a time."""
    sequences, group, steps = rewards.shape
    if settings.advantages == "gae":
        found = [
            slow_gae(
                rewards[b, g], [*values[b, g], 0.0], [1] * (steps - 1) + [0], settings.discount, settings.trace_decay
            )
            for b in range(sequences)
            for g in range(group)
        ]
        found = np.asarray(found).reshape(rewards.shape)
        return found, found + values
    returns = np.zeros_like(rewards)
    for t in range(steps):
        for later in range(t, steps):
            returns[..., t] += settings.discount ** (later - t) * rewards[..., later]
    others = (returns.sum(1, keepdims=True) - returns) / (group - 1)
    return returns - others, returns


def test_lensnet_and_value_move_and_nothing_else():
    states, _ = run("gae").history
    assert set(states[0].params) == {"lens", "value"} and set(run("gae").frozen) == {"base", "gist"}
    before, after = (jax.tree.leaves(states[i].params) for i in (0, 3))
    # The value's last layer starts at 0, which hides the layers before it for one step.
    assert all(bool((np.asarray(a) != np.asarray(b)).any()) for a, b in zip(before, after, strict=True))


def test_the_divergence_is_from_the_policy_at_the_start():
    states, reports = run("gae").history
    assert reports[0]["rl/kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert reports[2]["rl/kl_divergence"] > 0
    jax.tree.map(np.testing.assert_array_equal, states[3].reference, states[0].params["lens"])


def test_one_compile_serves_all_steps():
    run("gae").history  # noqa: B018
    assert run("gae").step._cache_size() == 1


@pytest.mark.slow
def test_two_devices_do_what_one_does():
    # Whitening takes the mean over all sequences, wherever they are.
    one = run("gae")
    states, reports = one.history
    mesh = devices.make_mesh({"batch_size": 4})
    shared = {"tokens": devices.share_out(np.asarray(one.batch()["tokens"]), mesh)}
    step = jit(functools.partial(online.online_step, **one.static))
    state, frozen = (devices.place(tree, mesh, split=True) for tree in (one.state(), one.frozen))
    both, report = step(state, shared, frozen)
    assert float(report["loss"]) == pytest.approx(reports[0]["loss"], rel=1e-4, abs=1e-5)
    for a, b in zip(jax.tree.leaves(states[1].params["lens"]), jax.tree.leaves(both.params["lens"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_with_discount_0_an_advantage_is_the_reward_minus_the_baseline():
    one, state = run("gae"), run("gae").state()
    settings = replace(one.settings, discount=0.0, whiten=False)
    # A baseline that says 0.3 of everything.
    state.params["value"]["head"]["bias"] = jnp.full(1, 0.3)
    played = one.play(state, one.batch())
    _, report = jit(
        functools.partial(online.episode_loss, geometry=one.config.geometry, settings=settings, models=one.models)
    )(state.params, state, played)
    rewards = np.asarray(played.rewards(edit_cost=settings.edit_cost))
    assert float(report["rl/advantages"]) == pytest.approx(rewards.mean() - 0.3, rel=1e-4)
    assert float(report["rl/value_loss"]) == pytest.approx(0.5 * ((rewards - 0.3) ** 2).mean(), rel=1e-4)


def test_episodes_of_a_sequence_differ_and_steps_draw_anew():
    one = run("group")
    state = one.state()
    played = one.play(state, one.batch())
    later = one.play(replace(state, step=jnp.ones((), jnp.int32)), one.batch())
    drawn = np.asarray(played.swaps.expanded)
    assert drawn.shape[:2] == (3, 3)
    assert (drawn[:, 0] != drawn[:, 1]).any() and (drawn != np.asarray(later.swaps.expanded)).any()


def test_a_single_episode_has_none_to_be_compared_with():
    message = "online.episodes must be at least 2 where online.advantages standardised compares .*, got 1"
    with pytest.raises(ValueError, match=message):
        OnlineConfig(advantages="standardised")


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["credit", "amplification"])
def test_episodes_are_compared_by_what_they_drew(setting):
    """All episodes of the first sequence begin as its first one: at least that step is not credited."""
    one = run("group")
    state = one.state()
    played = one.play(state, one.batch())
    first = jax.tree.map(lambda leaf: leaf.at[0, :, 0].set(leaf[0, 0, 0]), played.swaps)
    played = replace(played, swaps=first)
    settings = replace(one.settings, **{setting: CREDIT[f"online.{setting}"]})
    loss = functools.partial(online.episode_loss, geometry=one.config.geometry, settings=settings, models=one.models)
    report = jit(lambda *arguments: loss(*arguments)[1])(state.params, state, played)
    log_prob = functools.partial(
        episodes.log_prob, one.models, state.params["lens"], geometry=one.config.geometry, settings=settings
    )
    stats, _ = jit(jax.vmap(jax.vmap(log_prob)))(played)
    losses, count = np.asarray(played.nll, np.float64), np.asarray(played.swaps.count)
    advantages, _ = slow_advantages(losses[..., :-1] - losses[..., 1:] - settings.edit_cost * count, None, settings)
    where = np.ones(advantages.shape, bool)
    if setting == "credit":
        drawn = np.stack([played.swaps.expanded, played.swaps.collapsed], axis=-1)
        where = np.stack([slow_diverging(group, [True] * 3) for group in drawn])
        assert not where[0, :, 0].any() and where[:, :, 2].any()
        assert float(report["rl/credited"]) == pytest.approx(where.mean())
    else:
        advantages = np.where(advantages > 0, 3 * advantages, advantages)
    assert float(report["rl/policy_loss"]) == pytest.approx(
        -(advantages * np.asarray(stats.log_prob))[where].mean(), rel=2e-3
    )


def test_credit_for_parting_needs_others_to_part_from():
    message = "online.episodes must be at least 2 where online.credit diverging asks where those .* part, got 1"
    with pytest.raises(ValueError, match=message):
        OnlineConfig(credit="diverging")


@pytest.mark.slow
def test_one_compile_serves_all_steps_of_credited_episodes():
    one = Played(**GROUP, **CREDIT)
    state = one.state()
    for index in range(2):
        state, report = one.step(state, one.batch(index), one.frozen)
    assert one.step._cache_size() == 1 and 0 < float(report["rl/credited"]) <= 1
