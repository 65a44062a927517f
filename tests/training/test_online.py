"""`online_step` as a whole: its loss by a slow reference, what it trains, and that it learns."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.losses.test_advantages import slow_gae

from lensjax.models import build_models
from lensjax.runs import config as configs
from lensjax.runs.config import OnlineConfig
from lensjax.runs.engine import devices
from lensjax.training.steps import episodes, online, preference
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
GROUP = {"online.advantages": "leave_one_out", "online.episodes": 3, "online.whiten": False}


class Played:
    """A configuration, and what is compiled of it."""

    def __init__(self, **changes):
        self.config = configs.replace(SMALL, **{"online.steps": 12, "online.refocus_steps": 3, **changes})
        self.models = build_models(self.config)
        static = {"config": self.config, "models": self.models}
        self.step = jit(functools.partial(online.online_step, **static), donate_argnums=0)
        self.roll_out = jit(functools.partial(online.roll_out, **static))
        self.loss = jit(functools.partial(online.episode_loss, **static))

    def state(self, seed=0):
        start = preference.init_train_state(jax.random.key(seed), config=self.config, models=self.models)
        return online.init_online_state(jax.random.key(seed + 1), config=self.config, params=start.params)

    def batch(self, seed=0):
        return batch(seed, self.config.batch_size)

    @functools.cached_property
    def history(self):
        """States and reports of the first three steps."""
        state = self.state()
        states, reports = [jax.tree.map(jnp.copy, state)], []
        for index in range(3):
            state, report = self.step(state, self.batch(index))
            states.append(jax.tree.map(jnp.copy, state))
            reports.append({name: float(value) for name, value in report.items()})
        return states, reports


@functools.cache
def run(name):
    return Played(**{"gae": GAE, "group": GROUP}[name])


both = pytest.mark.parametrize("name", ["gae", "group"])


@both
def test_the_names_of_the_report(name):
    _, reports = run(name).history
    assert all(set(report) == REPORT for report in reports)
    assert all(np.isfinite(value) for report in reports for value in report.values())


@both
def test_the_loss_is_that_of_the_slow_reference(name):
    one = run(name)
    states, reports = one.history
    state, settings = states[2], one.config.online
    played = one.roll_out(state, one.batch(2))
    judge = functools.partial(episodes.judge, one.models, config=one.config)
    judged, features = jit(
        jax.vmap(jax.vmap(lambda episode: judge(state.params["lens"], episode, reference=state.reference)))
    )(played)
    value = functools.partial(online.value_model(one.config).apply, state.params["value"])
    values = np.asarray(jax.vmap(jax.vmap(jax.vmap(value)))(features), np.float64)
    losses, count = np.asarray(played.losses, np.float64), np.asarray(played.swaps.count)
    rewards = losses[..., :-1] - losses[..., 1:] - settings.edit_cost * count
    advantages, returns = slow_advantages(rewards, values, settings)
    used = (advantages - advantages.mean()) / advantages.std() if settings.whiten else advantages
    expected = {
        "rl/reward": rewards.sum(-1).mean(),
        "rl/policy_loss": -(used * np.asarray(judged.log_prob)).mean(),
        "rl/value_loss": 0.5 * ((values - returns) ** 2).mean(),
        "rl/entropy": np.asarray(judged.entropy).mean(),
        "rl/entropy_coefficient": max(0.01 * settings.entropy_decay**2, settings.entropy_floor),
        "rl/advantages": advantages.mean(),
        "rl/kl_divergence": np.asarray(judged.divergence).mean(),
        "rl/swaps": count.mean(),
        "rl/nll_start": losses[..., 0].mean(),
        "rl/nll_end": losses[..., -1].mean(),
    }
    expected["loss"] = (
        expected["rl/policy_loss"]
        + settings.value_weight * expected["rl/value_loss"]
        - expected["rl/entropy_coefficient"] * expected["rl/entropy"]
        + settings.kl_weight * expected["rl/kl_divergence"]
    )
    found = {name: reports[2][name] for name in expected}
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-5)
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


@both
def test_lensnet_and_value_move_and_nothing_else(name):
    states, _ = run(name).history
    for part in ("base", "gist", "lens", "value"):
        before, after = (jax.tree.leaves(states[i].params[part]) for i in (0, 3))
        moved = [bool((np.asarray(a) != np.asarray(b)).any()) for a, b in zip(before, after, strict=True)]
        # The value's last layer starts at 0, which hides the layers before it for one step.
        assert all(moved) if part in ("lens", "value") else not any(moved), part


def test_the_divergence_is_from_the_policy_at_the_start():
    states, reports = run("gae").history
    assert reports[0]["rl/kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert reports[2]["rl/kl_divergence"] > 0
    jax.tree.map(np.testing.assert_array_equal, states[3].reference, states[0].params["lens"])


@both
def test_one_compile_serves_all_steps(name):
    run(name).history  # noqa: B018
    assert run(name).step._cache_size() == 1


def test_two_devices_do_what_one_does():
    # Whitening takes the mean over all sequences, wherever they are.
    one = run("gae")
    states, reports = one.history
    mesh = devices.make_mesh({"batch_size": 4})
    shared = {"tokens": devices.share_out(np.asarray(one.batch()["tokens"]), mesh)}
    static = {"config": one.config, "models": one.models}
    step = jit(functools.partial(online.online_step, **static))
    both, report = step(devices.place(one.state(), mesh, split=True), shared)
    assert float(report["loss"]) == pytest.approx(reports[0]["loss"], rel=1e-4, abs=1e-5)
    for a, b in zip(jax.tree.leaves(states[1].params["lens"]), jax.tree.leaves(both.params["lens"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_with_discount_0_an_advantage_is_the_reward_minus_the_baseline():
    one = Played(**{"online.discount": 0.0, "online.whiten": False})
    state = one.state()
    # A baseline that says 0.3 of everything.
    state.params["value"]["head"]["bias"] = jnp.full(1, 0.3)
    played = one.roll_out(state, one.batch())
    _, report = one.loss(state.params, state, played)
    rewards = np.asarray(played.rewards(edit_cost=one.config.online.edit_cost))
    assert float(report["rl/advantages"]) == pytest.approx(rewards.mean() - 0.3, rel=1e-4)
    assert float(report["rl/value_loss"]) == pytest.approx(0.5 * ((rewards - 0.3) ** 2).mean(), rel=1e-4)


def test_episodes_of_a_sequence_differ_and_steps_draw_anew():
    one = run("group")
    state = one.state()
    played = one.roll_out(state, one.batch())
    later = one.roll_out(replace(state, step=jnp.ones((), jnp.int32)), one.batch())
    drawn = np.asarray(played.swaps.expanded)
    assert drawn.shape[:2] == (3, 3)
    assert (drawn[:, 0] != drawn[:, 1]).any() and (drawn != np.asarray(later.swaps.expanded)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, r"online.steps must be 0 \(none\) or more, got -1"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"advantages": "standardised"}, "online.advantages standardised compares .* set online.episodes to 2 or more"),
        ({"advantages": "ppo"}, "advantages must be one of gae, mean, standardised, leave_one_out, got 'ppo'"),
        ({"temperature": 0.0}, "online.temperature must be finite and above 0, got 0.0"),
        ({"discount": 1.5}, r"online.discount must be in \[0, 1\], got 1.5"),
        ({"kl_weight": -0.1}, "online.kl_weight must be finite and at least 0, got -0.1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OnlineConfig(**changes)
