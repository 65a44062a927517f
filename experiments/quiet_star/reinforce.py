"""REINFORCE on thoughts: those that make the answer more probable become more probable themselves.

    reward = log p(answer | thought) - log p(answer | none), with the last token of the thought

The actions are the tokens of sampled thoughts; `lensjax.training.steps.actor_critic` has the loss. The answer itself is
not trained any more. Letters are those of the model, and B prompts in a batch.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from experiments.quiet_star import thoughts
from experiments.quiet_star.bake import Batch
from experiments.quiet_star.config import QuietStarConfig, RLConfig
from experiments.quiet_star.model import ThoughtModel
from experiments.quiet_star.thoughts import ScoredThoughts
from lensjax._numerics import masked_mean
from lensjax.models import Params, ValueModel
from lensjax.training.metrics import Metrics
from lensjax.training.optim import moving, schedules
from lensjax.training.optim.moving import Window
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.steps import actor_critic
from lensjax.training.steps.update import Learner, gradient_step, init_learner

_RECENT = 100
"""Episodes that `rl/avg_reward_100` is a mean of."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RLState(Learner):
    """What moves during REINFORCE, `params` of `lm` and `value`; and the baked model, which does not."""

    reference: Params
    """The language model as it was baked."""
    recent: Window
    """Rewards of the last episodes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Episode:
    """Thoughts of a batch and what they earned; constants of the loss."""

    thoughts: Array
    """int32[B, n, L]."""
    injected: Array
    """bool[B]: whether the prompt was hard enough for them."""
    gains: Array
    """float32[B, n]: what each thought did to the answer, 0 where it was not injected."""
    rewards: Array
    """float32[B, n]: what the policy is told; the gains, but in the control."""


def value_model(config: QuietStarConfig) -> ValueModel:
    """The value baseline of a configuration."""
    return ValueModel(config.model.dim, config.rl.value_hidden)


def init_state(key: Array, *, config: QuietStarConfig, baked: Params) -> RLState:
    """A state before the first episode, with a fresh value baseline.

    Args:
      key: PRNG key, consumed.
      config: the run.
      baked: parameters of the language model; copied.

    Returns:
      `RLState` at step 0.
    """
    run_key, value_key = jax.random.split(key)
    # Two copies: the reference must not move, and a donated state may not hold one buffer twice.
    params = {"lm": jax.tree.map(jnp.copy, baked), "value": value_model(config).init(value_key)}
    learner = init_learner(run_key, params, tx=make_optimizer(config.optimizer))
    reference = jax.tree.map(jnp.copy, baked)
    return RLState(**vars(learner), reference=reference, recent=moving.init_window(_RECENT))


def rl_step(state: RLState, batch: Batch, *, config: QuietStarConfig, model: ThoughtModel) -> tuple[RLState, Metrics]:
    """One episode of every prompt of a batch, and one update; pure.

    Args:
      state: the state before.
      batch: `prompt` int32[B, P] and `answer` int32[B]; the traces are not read.
      config: static.
      model: static.

    Returns:
      The next state, and scalars by name.
    """
    settings = config.rl
    key = jax.random.fold_in(state.key, state.step)
    episode = roll_out(state.params["lm"], batch, key, settings=settings, model=model)
    rate = schedules.learning_rate(
        state.step,
        settings.learning_rate,
        schedule=config.optimizer.schedule,
        warmup_steps=settings.warmup_episodes,
        steps=settings.episodes,
    )
    after, seen = gradient_step(
        state,
        functools.partial(episode_loss, state=state, batch=batch, episode=episode, config=config, model=model),
        tx=make_optimizer(config.optimizer),
        rates={"learning_rate": rate, "weight_decay": 0.0},
    )
    reward = jnp.mean(episode.gains)
    recent = moving.update_window(state.recent, reward)
    report = seen.aux | {
        "rl/episode": after.step,
        "rl/reward": reward,
        "rl/avg_reward_100": moving.window_mean(recent),
        "rl/num_thoughts": settings.thoughts * jnp.mean(episode.injected, dtype=jnp.float32),
        "rl/learning_rate": rate,
        "grad_norm": optax.tree.norm(seen.grads["lm"]),
    }
    return replace(after, recent=recent), report


def roll_out(params: Params, batch: Batch, key: Array, *, settings: RLConfig, model: ThoughtModel) -> Episode:
    """Samples thoughts and rewards them; `key` is consumed."""
    sample_key, shuffle_key = jax.random.split(key)

    def one(prompt: Array, answer: Array, key: Array) -> tuple[Array, Array, Array]:
        drawn = thoughts.sample(model, params, prompt, key, count=settings.thoughts)
        scored = thoughts.score(model, params, prompt, drawn)
        hardness = thoughts.difficulty(scored.without, model.attention(params, prompt), answer)
        return drawn, hardness > settings.threshold, gains(scored, answer, kind=settings.reward)

    keys = jax.random.split(sample_key, batch["prompt"].shape[0])
    drawn, injected, earned = jax.vmap(one)(batch["prompt"], batch["answer"], keys)
    earned = jnp.where(injected[:, None], earned, 0.0)
    # All or none: a control that left the zeros where they are would say which prompts are easy.
    shuffled = jax.random.permutation(shuffle_key, earned.reshape(-1)).reshape(earned.shape)
    return Episode(drawn, injected, earned, shuffled if settings.shuffle_rewards else earned)


def gains(scored: ScoredThoughts, answer: ArrayLike, *, kind: str) -> Array:
    """What each thought does to the answer int32[]; float32[n].

    `log_prob`: log p(answer | thought) - log p(answer | none). `accuracy`: 1 where it makes it right, -1 wrong.
    """
    if kind == "log_prob":
        return thoughts.answer_log_prob(scored.informed, answer) - thoughts.answer_log_prob(scored.without, answer)
    right = (jnp.argmax(scored.informed, axis=-1) == answer).astype(jnp.float32)
    return right - (jnp.argmax(scored.without) == answer).astype(jnp.float32)


def episode_loss(
    params: dict[str, Params],
    *,
    state: RLState,
    batch: Batch,
    episode: Episode,
    config: QuietStarConfig,
    model: ThoughtModel,
) -> tuple[Array, Metrics]:
    """The loss of an episode.

    Args:
      params: of `lm` and `value`, which it is differentiated by.
      state: step and reference are read.
      batch: `prompt`.
      episode: thoughts and rewards.
      config: weights.
      model: static.

    Returns:
      float32[], and scalars by name.
    """
    settings = config.rl
    score = jax.vmap(functools.partial(thoughts.score, model), (None, 0, 0))
    scored = score(params["lm"], batch["prompt"], episode.thoughts)
    reference = score(jax.lax.stop_gradient(state.reference), batch["prompt"], episode.thoughts).policy
    value = functools.partial(value_model(config).apply, params["value"])
    values = jax.vmap(jax.vmap(jax.vmap(value)))(jax.lax.stop_gradient(scored.features))
    rewards = jnp.zeros_like(values).at[..., -1].set(episode.rewards)
    gae = functools.partial(
        actor_critic.episode_advantages, discount=settings.discount, trace_decay=settings.trace_decay
    )
    advantages = jax.vmap(jax.vmap(gae))(rewards, values)
    where = jnp.broadcast_to(episode.injected[:, None, None], values.shape)
    loss, report = actor_critic.loss(
        state.step,
        log_probs=scored.log_probs,
        entropies=-jnp.sum(jnp.exp(scored.policy) * scored.policy, axis=-1),
        divergences=jnp.sum(jnp.exp(scored.policy) * (scored.policy - reference), axis=-1),
        values=values,
        advantages=advantages,
        returns=advantages + jax.lax.stop_gradient(values),
        where=where,
        settings=settings,
    )
    more = {
        "rl/coherence": masked_mean(thoughts.coherence(scored.log_probs), episode.injected[:, None]),
        "gate": masked_mean(scored.share, episode.injected[:, None]),
    }
    return loss, report | jax.lax.stop_gradient(more)
