"""On-policy training: LensNet's own edits, rolled out, rewarded, and made more or less probable.

    L = -mean A_t log pi(swaps_t) + value_weight * value loss - entropy_weight * H + kl_weight * KL(pi || reference)

`online_step(state, batch) -> (state, metrics)` is pure and compiled once; base model and GistNet stay as they are.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax.losses import advantages
from lensjax.models import Models, Params, ValueModel
from lensjax.runs.config import Config
from lensjax.training.metrics import Metrics, masked_mean
from lensjax.training.optim import moving, optimizer, schedules
from lensjax.training.optim.moving import Window
from lensjax.training.scoring import Batch
from lensjax.training.steps import actor_critic, episodes
from lensjax.training.steps.episodes import Episode

_TRAINED = ("lens", "value")
_RECENT = 100
"""Steps that `rl/avg_reward_100` is a mean of."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnlineState:
    """Everything that moves during on-policy training."""

    step: Array
    """int32[]: updates done."""
    params: dict[str, Params]
    """Parameters of `base`, `gist`, `lens` and `value`."""
    opt_state: Any
    """Optimizer state of `lens` and `value`."""
    reference: Params | None
    """LensNet as the phase found it; None when the KL term is off."""
    recent: Window
    """Rewards of the last steps."""
    key: Array
    """PRNG key of the phase; step keys are `fold_in(key, step)`."""


def value_model(config: Config) -> ValueModel:
    """The value baseline of a configuration."""
    return ValueModel(episodes.feature_count(config), config.online.value_hidden)


def init_online_state(key: Array, *, config: Config, params: dict[str, Params]) -> OnlineState:
    """A state before the first step.

    Args:
      key: PRNG key, consumed.
      config: the run.
      params: parameters of `base`, `gist` and `lens` to start from; copied.

    Returns:
      `OnlineState` at step 0, with a fresh value baseline.
    """
    run_key, value_key = jax.random.split(key)
    # Copied, since a donated state takes its buffers with it.
    parts = {name: jax.tree.map(jnp.copy, params[name]) for name in ("base", "gist", "lens")}
    parts["value"] = value_model(config).init(value_key)
    return OnlineState(
        step=jnp.zeros((), jnp.int32),
        params=parts,
        opt_state=optimizer.init(config.optimizer, {name: parts[name] for name in _TRAINED}),
        reference=jax.tree.map(jnp.copy, parts["lens"]) if config.online.kl_weight > 0 else None,
        recent=moving.init_window(_RECENT),
        key=run_key,
    )


def online_step(state: OnlineState, batch: Batch, *, config: Config, models: Models) -> tuple[OnlineState, Metrics]:
    """One update on the episodes of one batch; compile it as `train.train_step`.

    Args:
      state: the state before the step.
      batch: `tokens` int32[B, T].
      config: static.
      models: static.

    Returns:
      The next state, and scalars by name.
    """
    settings = config.online
    played = roll_out(state, batch, config=config, models=models)

    def loss_fn(trainable: dict[str, Params]) -> tuple[Array, Metrics]:
        return episode_loss({**state.params, **trainable}, state, played, config=config, models=models)

    trainable: dict[str, Params] = {name: state.params[name] for name in _TRAINED}
    (loss, report), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    rate = schedules.learning_rate(
        state.step,
        settings.learning_rate,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        steps=settings.steps,
    )
    trainable, opt_state = optimizer.update(
        config.optimizer,
        grads,
        state.opt_state,
        trainable,
        learning_rate=rate,
        weight_decay=config.hyper.weight_decay,
    )
    recent = moving.update_window(state.recent, report["rl/reward"])
    next_state = replace(
        state, step=state.step + 1, params={**state.params, **trainable}, opt_state=opt_state, recent=recent
    )
    report |= {
        "loss": loss,
        "rl/avg_reward_100": moving.window_mean(recent),
        "grad_norm": optax.tree.norm(grads["lens"]),
        "lr": rate,
        "rl/learning_rate": rate,
    }
    return next_state, report


def roll_out(state: OnlineState, batch: Batch, *, config: Config, models: Models) -> Episode:
    """G episodes of every sequence of a batch, leading axes [B, G]; arguments as of `online_step`."""
    length = config.context.geometry.length_of_fraction(config.hyper.context_end)
    count = config.online.episodes
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), (batch["tokens"].shape[0], count))
    play = jax.vmap(
        lambda row, key: episodes.run(models, state.params, row, key, length=length, config=config), (None, 0)
    )
    return jax.vmap(play)(batch["tokens"], keys)


def episode_loss(
    params: dict[str, Params], state: OnlineState, played: Episode, *, config: Config, models: Models
) -> tuple[Array, Metrics]:
    """The loss of a batch of episodes.

    Args:
      params: parameters of `lens` and `value`, which it is differentiated by.
      state: step and reference policy are read.
      played: leading axes [B, G].
      config: weights.
      models: the models.

    Returns:
      float32[], and scalars by name.
    """
    settings = config.online
    judge = jax.vmap(
        jax.vmap(lambda one: episodes.judge(models, params["lens"], one, config=config, reference=state.reference))
    )
    judged, features = judge(played)
    value = functools.partial(value_model(config).apply, params["value"])
    values = jax.vmap(jax.vmap(jax.vmap(value)))(features)
    rewards = played.rewards(edit_cost=settings.edit_cost)
    raw, returns = _advantages(rewards, values, config)
    where = jnp.ones(rewards.shape, bool)
    loss, report = actor_critic.loss(
        state.step,
        log_probs=judged.log_prob,
        entropies=judged.entropy,
        divergences=judged.divergence,
        values=values,
        advantages=raw,
        returns=returns,
        where=where,
        settings=settings,
    )
    more = {
        "rl/reward": jnp.mean(jnp.sum(rewards, axis=-1)),
        "rl/swaps": masked_mean(played.swaps.count.astype(jnp.float32), where),
        "rl/nll_start": jnp.mean(played.losses[..., 0]),
        "rl/nll_end": jnp.mean(played.losses[..., -1]),
    }
    return loss, report | jax.lax.stop_gradient(more)


def _advantages(rewards: Array, values: Array, config: Config) -> tuple[Array, Array]:
    """Advantages of each step, and what the value baseline should have said; float32[B, G, S] each."""
    settings = config.online

    def gae(rewards: Array, values: Array, trace_decay: float) -> Array:
        return actor_critic.episode_advantages(rewards, values, discount=settings.discount, trace_decay=trace_decay)

    if settings.advantages == "gae":
        found = jax.vmap(jax.vmap(lambda r, v: gae(r, v, settings.trace_decay)))(rewards, values)
        return found, found + jax.lax.stop_gradient(values)
    # Rewards to come, compared with those of the other episodes at the same step.
    returns = jax.vmap(jax.vmap(lambda r, v: gae(r, v, 1.0)))(rewards, jnp.zeros_like(values))
    among = functools.partial(advantages.group_advantages, baseline=settings.advantages)
    over_group = jax.vmap(jax.vmap(among, 1, 1))
    return over_group(returns, jnp.ones(returns.shape, bool)), returns
