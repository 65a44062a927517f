import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quiet_star import bake, reinforce
from tests.quiet_star.small import CONFIG, MODEL, baked, batch, compiled, drawn, largest, score, score_all
from tests.small import jit

pytestmark = pytest.mark.slow


def state(**changes):
    """A state whose policy and value have left their start."""
    fresh = reinforce.init_state(jax.random.key(1), config=CONFIG, baked=baked())
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), fresh.params
    )
    return replace(fresh, params=moved, **changes)


@functools.cache
def played():
    roll_out = jit(functools.partial(reinforce.roll_out, settings=CONFIG.rl, model=MODEL))
    return roll_out(state().params["lm"], batch(), jax.random.key(2))


def only(**weights):
    """No term of the loss beside the policy's, but for those that are named."""
    return {"value_weight": 0.0, "entropy_weight": 0.0, "entropy_floor": 0.0, "kl_weight": 0.0} | weights


def loss_and_grads(now, asked, episode, **changes):
    found = compiled(_differentiated, **changes)
    return found(now.params, now, asked, episode)


def _differentiated(params, now, asked, episode, *, config, model):
    loss = functools.partial(
        reinforce.episode_loss, state=now, batch=asked, episode=episode, config=config, model=model
    )
    return jax.value_and_grad(loss, has_aux=True)(params)


# Right where the source is wrong


def test_the_policy_loss_is_that_of_the_thought_tokens():
    now, episode = state(), played()
    (loss, report), grads = loss_and_grads(now, batch(), episode, **only())
    scored = score_all(now.params["lm"], batch()["prompt"], episode.thoughts)
    value = functools.partial(reinforce.value_model(CONFIG).apply, now.params["value"])
    values = np.asarray(jax.vmap(jax.vmap(jax.vmap(value)))(scored.features), np.float64)
    last = np.asarray(episode.rewards) - values[..., 1]
    first = 0.99 * values[..., 1] - values[..., 0] + 0.99 * 0.95 * last
    assert float(loss) == pytest.approx(-np.mean(np.stack([first, last], -1) * np.asarray(scored.log_probs)), rel=1e-4)
    assert float(report["rl/policy_loss"]) == float(loss)
    # The answer's cross-entropy has no part in it.
    for name in ("answer", "gate", "gate_hidden"):
        assert largest(grads["lm"][name]) == 0
    assert largest(grads["lm"]["thought"]) > 0 and largest(grads["lm"]["transformer"]) > 0


def test_advantages_run_over_time_and_the_order_of_the_batch_changes_nothing():
    now, episode, order = state(), played(), jnp.asarray([2, 0, 3, 1])
    mixed = jax.tree.map(lambda leaf: leaf[order], (batch(), episode))
    (loss, report), grads = loss_and_grads(now, batch(), episode)
    (other, others), moved = loss_and_grads(now, *mixed)
    assert float(other) == pytest.approx(float(loss), rel=1e-5)
    for name, value in report.items():
        assert float(others[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), moved, grads)
    # The reward of one prompt says nothing about the thoughts of another one.
    paid = replace(episode, rewards=episode.rewards.at[0].add(5.0))
    alone = [
        loss_and_grads(now, batch(), replace(one, injected=jnp.arange(4) > 0), **only())[0][0]
        for one in (episode, paid)
    ]
    assert float(alone[0]) == float(alone[1])
    assert float(loss_and_grads(now, batch(), paid)[0][0]) != float(loss)


def test_the_divergence_is_from_a_frozen_copy():
    now = reinforce.init_state(jax.random.key(1), config=CONFIG, baked=baked())
    step, kept, found = compiled(reinforce.rl_step), jax.tree.map(np.asarray, now.reference), []
    for _ in range(3):
        now, report = step(now, batch())
        found.append(float(report["rl/kl_divergence"]))
    jax.tree.map(np.testing.assert_array_equal, now.reference, kept)
    assert found[0] == pytest.approx(0, abs=1e-6) and found[2] > found[1] > 1e-5
    (_, report), _ = loss_and_grads(now, batch(), played())
    ours, theirs = (
        np.asarray(score_all(params, batch()["prompt"], played().thoughts).policy, np.float64)
        for params in (now.params["lm"], baked())
    )
    by_hand = np.mean(np.sum(np.exp(ours) * (ours - theirs), axis=-1))
    assert float(report["rl/kl_divergence"]) == pytest.approx(by_hand, rel=1e-3)


def test_the_entropy_is_that_of_the_thought_policy_and_its_weight_decays():
    now = state(step=jnp.asarray(2, jnp.int32))
    (_, report), _ = loss_and_grads(now, batch(), played())
    policy = np.asarray(score_all(now.params["lm"], batch()["prompt"], played().thoughts).policy, np.float64)
    assert float(report["rl/entropy"]) == pytest.approx(-np.mean(np.sum(np.exp(policy) * policy, axis=-1)), rel=1e-4)
    assert float(report["rl/entropy_coefficient"]) == pytest.approx(0.01 * 0.9995**2, rel=1e-5)
    # Another answer head, the same entropy.
    other = replace(now, params={**now.params, "lm": {**now.params["lm"], "answer": baked()["answer"]}})
    assert float(loss_and_grads(other, batch(), played())[0][1]["rl/entropy"]) == float(report["rl/entropy"])


def test_reward_and_loss_read_the_answer_at_the_same_places():
    """On a right trace the reward of a thought is what baking calls the loss without it, minus the loss with it."""
    asked, params = batch(), baked()
    right = np.stack([_right_trace(prompt) for prompt in np.asarray(asked["prompt"])])
    one = {**asked, "trace": jnp.asarray(right), "conclusion": asked["answer"]}
    _, report = jit(functools.partial(bake.bake_loss, model=MODEL))(params, one)
    gains = jax.vmap(
        lambda prompt, trace, answer: reinforce.gains(score(params, prompt, trace[None]), answer, kind="log_prob")
    )(asked["prompt"], one["trace"], asked["answer"])
    assert float(jnp.mean(gains)) == pytest.approx(
        float(report["answer_loss_without"] - report["answer_loss"]), rel=1e-4
    )
    assert float(jnp.abs(gains).min()) > 1e-3


def _right_trace(prompt):
    first = prompt[prompt[-1]]
    return np.asarray([first, prompt[first]], np.int32)


def test_binary_gains_by_hand():
    right, wrong = jnp.log(jnp.asarray([0.8, 0.2])), jnp.log(jnp.asarray([0.3, 0.7]))
    scored = score(baked(), batch()["prompt"][0], drawn(count=2))
    for without, expected in ((right, [0, -1]), (wrong, [1, 0])):
        both = replace(scored, without=without, informed=jnp.stack([right, wrong]))
        assert reinforce.gains(both, 0, kind="accuracy").tolist() == expected
    assert reinforce.gains(both, 0, kind="log_prob").tolist() == pytest.approx([np.log(0.8 / 0.3), 0], abs=1e-6)


def test_the_warm_up_raises_the_rate():
    now, step, rates = state(), compiled(reinforce.rl_step), []
    for _ in range(5):
        now, report = step(now, batch())
        rates.append(float(report["rl/learning_rate"]))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert now.recent.count == 5 and int(report["rl/episode"]) == 5


# The rest of the loss


def test_the_value_network_learns_and_the_model_does_not_learn_from_it():
    episode = replace(played(), rewards=jnp.zeros_like(played().rewards))
    (_, report), grads = loss_and_grads(state(), batch(), episode, **only(value_weight=0.5))
    (_, _), without = loss_and_grads(state(), batch(), episode, **only())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), grads["lm"], without["lm"])
    assert largest(grads["value"]) > 0 == largest(without["value"]) and float(report["rl/value_loss"]) > 0


def test_a_shuffled_reward_goes_to_another_thought():
    roll_out = functools.partial(reinforce.roll_out, model=MODEL)
    settings = replace(CONFIG.rl, shuffle_rewards=True)
    found = jit(functools.partial(roll_out, settings=settings))(state().params["lm"], batch(), jax.random.key(2))
    np.testing.assert_array_equal(found.gains, played().gains)
    np.testing.assert_array_equal(played().rewards, played().gains)
    assert sorted(found.rewards.ravel().tolist()) == sorted(found.gains.ravel().tolist())
    assert (found.rewards != found.gains).any()


def test_muon_and_grokfast_move_everything_that_is_trained():
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, name="muon", grokfast=0.1))
    start = bake.init_state(jax.random.key(0), config=config, model=MODEL)
    after, _ = jit(functools.partial(bake.bake_step, config=config, model=MODEL))(start, batch())
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), after.params, start.params)
    assert min(jax.tree.leaves(moved)) > 0


def test_steps_are_compiled_once(compiles):
    step = compiled(reinforce.rl_step)
    now, _ = step(reinforce.init_state(jax.random.key(1), config=CONFIG, baked=baked()), batch())
    with compiles() as names:
        step(now, batch("validation"))
    assert names == []
