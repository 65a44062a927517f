"""On-policy training: LensNet's own edits, rolled out, rewarded, and made more or less probable.

    L = -mean A_t log pi(swaps_t) + value_weight * value loss - entropy_weight * H + kl_weight * KL(pi || reference)

`online_step(state, batch, frozen) -> (state, metrics)` is pure and compiled once; base model and GistNet are frozen.
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax._numerics import masked_mean
from lensjax._settings import Count, NonNegative, Positive, Repeats, Share, Variants, require, settings
from lensjax.context.geometry import Geometry
from lensjax.losses import advantages, trajectories
from lensjax.models import Models, Params, ValueModel
from lensjax.models.decision import split
from lensjax.training.metrics import Metrics
from lensjax.training.optim import moving, schedules
from lensjax.training.optim.moving import Window
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch, reward_weights
from lensjax.training.steps import actor_critic, episodes
from lensjax.training.steps.episodes import Episode
from lensjax.training.steps.update import Learner, all_parts, gradient_step, init_learner, split_parts


@settings("online")
class OnlineConfig:
    """On-policy training, after the preferences: LensNet's own edits are rolled out and rewarded. 0 steps: none."""

    steps: Count = 0
    learning_rate: Positive = 1e-3
    episodes: Variants = 1
    """Episodes of each sequence of a batch [G]."""
    refocus_steps: Repeats = 4
    """Refocus steps of an episode, from a cold start [S]."""
    draws: Repeats = 4
    """Swaps drawn in one refocus step, each of which may be to keep the context [M]."""
    temperature: Positive = 0.1
    """Of the draws, in units of scores: how far the policy explores."""
    edit_cost: NonNegative = 0.001
    """Nats per token that a swap must earn."""
    advantages: Literal["gae", "mean", "standardised", "leave_one_out"] = "gae"
    """`gae` has the value network as baseline; the others (Dr.GRPO, GRPO, RLOO) the episodes of the same sequence."""
    whiten: bool = True
    """Whether the advantages of a batch are brought to mean 0 and standard deviation 1."""
    discount: Share = 0.99
    """gamma; at 0 an advantage is the step's own reward minus the baseline."""
    trace_decay: Share = 0.95
    """lambda of the generalised advantages."""
    value_weight: NonNegative = 0.5
    entropy_weight: NonNegative = 0.01
    entropy_decay: Share = 0.9995
    """Factor of the entropy's weight from each step to the next, down to `entropy_floor`."""
    entropy_floor: NonNegative = 0.001
    kl_weight: NonNegative = 0.0
    """Weight of the KL divergence from LensNet as this phase found it; 0 leaves it and its forward pass out."""
    credit: Literal["all", "diverging"] = "all"
    """Steps that the loss is a mean of: `diverging` leaves out those before the episodes of a sequence first differ."""
    amplification: Positive = 1.0
    """Factor of advantages above 0."""

    def _check(self) -> None:
        require(
            self.advantages == "gae" or self.episodes >= 2,
            f"online.episodes must be at least 2 where online.advantages {self.advantages} compares those of one "
            f"sequence, got {self.episodes}",
        )
        require(
            self.credit == "all" or self.episodes >= 2,
            f"online.episodes must be at least 2 where online.credit {self.credit} asks where those of one sequence "
            f"part, got {self.episodes}",
        )


_TRAINED = ("lens", "value")
_RECENT = 100
"""Steps that `rl/avg_reward_100` is a mean of."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnlineState(Learner):
    """Everything that moves during on-policy training: `params` of `lens` and `value`."""

    reference: Params | None
    """LensNet as the phase found it; None when the KL term is off."""
    recent: Window
    """Rewards of the last steps."""


def value_model(models: Models, settings: OnlineConfig) -> ValueModel:
    """The value baseline of what LensNet sees."""
    return ValueModel(episodes.feature_count(models))


def init_online_state(
    key: Array, *, recipe: Recipe, settings: OnlineConfig, models: Models, params: dict[str, Params]
) -> tuple[OnlineState, dict[str, Params]]:
    """A state before the first step.

    Args:
      key: PRNG key, consumed.
      recipe: read is the optimizer.
      settings: of the phase.
      models: LensNet must have features.
      params: parameters of `base`, `gist` and `lens` to start from; that of `lens` is copied.

    Returns:
      `OnlineState` at step 0, with a fresh value baseline; and `base` and `gist`, as they are.
    """
    run_key, value_key = jax.random.split(key)
    parts = {name: params[name] for name in ("base", "gist", "lens")}
    parts["value"] = value_model(models, settings).init(value_key)
    trained, frozen = split_parts(parts, _TRAINED)
    learner = init_learner(run_key, trained, tx=make_optimizer(recipe.optimizer))
    state = OnlineState(
        **vars(learner),
        reference=jax.tree.map(jnp.copy, parts["lens"]) if settings.kl_weight > 0 else None,
        recent=moving.init_window(_RECENT),
    )
    return state, frozen


def online_step(
    state: OnlineState,
    batch: Batch,
    frozen: dict[str, Params],
    *,
    recipe: Recipe,
    settings: OnlineConfig,
    models: Models,
) -> tuple[OnlineState, Metrics]:
    """One update on the episodes of one batch; compile it as `train_step`.

    Args:
      state: the state before the step.
      batch: `tokens` int32[B, T].
      frozen: parameters of `base` and `gist`.
      recipe: static; read are shapes, the allocator's cool-down and the optimizer.
      settings: static.
      models: static; LensNet must have features.

    Returns:
      The next state, and scalars by name.
    """
    played = roll_out(all_parts(state, frozen), state, batch, recipe=recipe, settings=settings, models=models)

    def loss_fn(params: dict[str, Params]) -> tuple[Array, Metrics]:
        return episode_loss(params, state, played, geometry=recipe.geometry, settings=settings, models=models)

    rate = schedules.learning_rate(
        state.step,
        settings.learning_rate,
        schedule=recipe.optimizer.schedule,
        warmup_steps=recipe.optimizer.warmup_steps,
        steps=settings.steps,
    )
    after, seen = gradient_step(
        state,
        loss_fn,
        tx=make_optimizer(recipe.optimizer),
        rates={"learning_rate": rate, "weight_decay": recipe.hyper.weight_decay},
    )
    recent = moving.update_window(state.recent, seen.aux["rl/reward"])
    report = seen.aux | {
        "loss": seen.loss,
        "rl/avg_reward_100": moving.window_mean(recent),
        "grad_norm": optax.tree.norm(seen.grads["lens"]),
        "lr": rate,
        "rl/learning_rate": rate,
    }
    return replace(after, recent=recent), report


def roll_out(
    params: dict[str, Params],
    state: OnlineState,
    batch: Batch,
    *,
    recipe: Recipe,
    settings: OnlineConfig,
    models: Models,
) -> Episode:
    """G episodes of every sequence of a batch, leading axes [B, G]; of the state only step and key are read."""
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), (batch["tokens"].shape[0], settings.episodes))

    def play(tokens: Array, key: Array) -> Episode:
        window = split(tokens, horizon=recipe.context.horizon)
        return episodes.run(
            models,
            params,
            window,
            key,
            recipe.geometry,
            length=recipe.budget,
            focus=recipe.focus,
            settings=settings,
            weights=reward_weights(models, params, window, recipe.context, recipe.short),
        )

    return jax.vmap(jax.vmap(play, (None, 0)))(batch["tokens"], keys)


def episode_loss(
    params: dict[str, Params],
    state: OnlineState,
    played: Episode,
    *,
    geometry: Geometry,
    settings: OnlineConfig,
    models: Models,
) -> tuple[Array, Metrics]:
    """The loss of a batch of episodes.

    Args:
      params: parameters of `lens` and `value`, which it is differentiated by.
      state: step and reference policy are read.
      played: leading axes [B, G].
      geometry: the history.
      settings: weights.
      models: LensNet must have features.

    Returns:
      float32[], and scalars by name.
    """
    log_prob = functools.partial(
        episodes.log_prob, models, params["lens"], geometry=geometry, settings=settings, reference=state.reference
    )
    stats, features = jax.vmap(jax.vmap(log_prob))(played)
    value = functools.partial(value_model(models, settings).apply, params["value"])
    values = jax.vmap(jax.vmap(jax.vmap(value)))(features)
    rewards = played.rewards(edit_cost=settings.edit_cost)
    raw, returns = _advantages(rewards, values, settings)
    every = jnp.ones(rewards.shape, bool)
    where = _parted(played) if settings.credit == "diverging" else every
    loss, report = actor_critic.loss(
        state.step,
        log_probs=stats.log_prob,
        entropies=stats.entropy,
        divergences=stats.divergence,
        values=values,
        advantages=raw,
        returns=returns,
        where=where,
        settings=settings,
        amplification=settings.amplification,
    )
    more = {
        "rl/reward": jnp.mean(jnp.sum(rewards, axis=-1)),
        "rl/swaps": masked_mean(played.swaps.count.astype(jnp.float32), every),
        "rl/nll_start": jnp.mean(played.nll[..., 0]),
        "rl/nll_end": jnp.mean(played.nll[..., -1]),
    }
    if settings.credit == "diverging":
        more["rl/credited"] = jnp.mean(where.astype(jnp.float32))
    return loss, report | jax.lax.stop_gradient(more)


def _parted(played: Episode) -> Array:
    """bool[B, G, S]: steps from the first one on in which not all episodes of a sequence drew the same swaps."""
    drawn = jnp.stack([played.swaps.expanded, played.swaps.collapsed], axis=-1)
    return jax.vmap(trajectories.diverging)(drawn, jnp.ones(drawn.shape[:2], bool))


def _advantages(rewards: Array, values: Array, settings: OnlineConfig) -> tuple[Array, Array]:
    """Advantages of each step, and what the value baseline should have said; float32[B, G, S] each."""

    def gae(rewards: Array, values: Array, trace_decay: float) -> Array:
        return actor_critic.episode_advantages(rewards, values, discount=settings.discount, trace_decay=trace_decay)

    if settings.advantages == "gae":
        gained = jax.vmap(jax.vmap(lambda r, v: gae(r, v, settings.trace_decay)))(rewards, values)
        return gained, gained + jax.lax.stop_gradient(values)
    # Rewards to come, compared with those of the other episodes at the same step.
    returns = jax.vmap(jax.vmap(lambda r, v: gae(r, v, 1.0)))(rewards, jnp.zeros_like(values))
    among = functools.partial(advantages.group_advantages, baseline=settings.advantages)
    over_group = jax.vmap(jax.vmap(among, 1, 1))
    return over_group(returns, jnp.ones(returns.shape, bool)), returns
