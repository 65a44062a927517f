"""Training of the base model itself (and GistNet with it, where asked) before LensNet has anything to learn from."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax.context import rollouts
from lensjax.context import working as contexts
from lensjax.models import Models, Params
from lensjax.models.decision import build_tree, split
from lensjax.runs.config import Config
from lensjax.training import nll
from lensjax.training.metrics import Metrics
from lensjax.training.optim import optimizer, schedules
from lensjax.training.scoring import Batch

ROLLOUTS_FROM = 0.5
"""Share of the steps after which rollouts are read too. Read from the start, their noisier gradient keeps a small model
from learning to use older context at all."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PretrainState:
    """Everything that moves during pretraining."""

    step: Array
    """int32[]: updates done."""
    params: dict[str, Params]
    """Parameters of `base` and `gist`."""
    opt_state: Any
    key: Array
    """PRNG key of the phase; step keys are `fold_in(key, step)`."""


def trainable_parts(config: Config) -> tuple[str, ...]:
    """GistNet is trained only where rollouts are read: nothing else gives it a gradient."""
    return ("base", "gist") if config.pretrain.rollout_weight > 0 and config.pretrain.train_gist else ("base",)


def init_pretrain_state(key: Array, *, config: Config, models: Models) -> PretrainState:
    """A state with fresh parameters. `key` is consumed."""
    run_key, base_key, gist_key = jax.random.split(key, 3)
    params = {"base": models.base.init(base_key), "gist": models.gist.init(gist_key)}
    return PretrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(config.optimizer, {name: params[name] for name in trainable_parts(config)}),
        key=run_key,
    )


def pretrain_step(
    state: PretrainState, batch: Batch, *, config: Config, models: Models
) -> tuple[PretrainState, Metrics]:
    """One update on one batch; compile it as `train.train_step`.

    Args:
      state: the state before the step.
      batch: `tokens` int32[B, T].
      config: static.
      models: static.

    Returns:
      The next state, and scalars by name.
    """
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), batch["tokens"].shape[0])

    def loss_fn(trainable: dict[str, Params]) -> tuple[Array, Metrics]:
        reads_rollouts = state.step >= int(ROLLOUTS_FROM * config.pretrain.steps)
        return _pretrain_loss({**state.params, **trainable}, batch["tokens"], keys, reads_rollouts, config, models)

    trainable = {name: state.params[name] for name in trainable_parts(config)}
    (loss, report), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    rate = schedules.learning_rate(
        state.step,
        config.pretrain.learning_rate,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        steps=config.pretrain.steps,
    )
    trainable, opt_state = optimizer.update(
        config.optimizer, grads, state.opt_state, trainable, learning_rate=rate, weight_decay=0.0
    )
    next_state = PretrainState(state.step + 1, {**state.params, **trainable}, opt_state, state.key)
    return next_state, report | {"loss": loss, "grad_norm": optax.tree.norm(grads), "lr": rate}


def _pretrain_loss(
    params: dict[str, Params], tokens: Array, keys: Array, reads_rollouts: Array, config: Config, models: Models
) -> tuple[Array, Metrics]:
    """Teacher-forced loss on full windows, and then also the weighted loss of one rollout of each sequence."""
    full = jax.vmap(lambda row: nll.sequence_losses(models.base, params["base"], row))(tokens)
    token_loss = jnp.mean(full)
    report = {"token_loss": token_loss}
    if config.pretrain.rollout_weight == 0:
        return token_loss, report

    def read_rollouts() -> Array:
        return jnp.mean(jax.vmap(lambda row, key: _rollout_loss(models, params, row, key, config))(tokens, keys))

    rollout_loss = jax.lax.cond(reads_rollouts, read_rollouts, lambda: jnp.zeros(()))
    report["rollout_loss"] = rollout_loss
    return token_loss + config.pretrain.rollout_weight * rollout_loss, report


def _rollout_loss(models: Models, params: dict[str, Params], tokens: Array, key: Array, config: Config) -> Array:
    """Mean loss of the token after every token that one rollout of the history, and the horizon behind it, show.

    Its length is log-uniform from the shortest cut to the capacity: all ratios of compression are read equally often.
    """
    geometry, capacity = config.context.geometry, config.context_capacity
    length_key, rollout_key = jax.random.split(key)
    bounds = jnp.log(jnp.asarray([geometry.shortest, capacity + 1], jnp.float32))
    length = jnp.exp(jax.random.uniform(length_key, (), minval=bounds[0], maxval=bounds[1])).astype(jnp.int32)
    drawn, _ = rollouts.sample_rollouts(
        rollout_key, length, config.hyper.lod2_share, rollouts=1, geometry=geometry, capacity=capacity
    )
    context = jax.tree.map(lambda leaf: leaf[0], drawn)
    horizon = config.context.horizon
    history = split(tokens, horizon=horizon).history
    entries = contexts.materialise(build_tree(models, params, history, config), context)
    return nll.entry_losses(models.base, params["base"], entries, tokens, horizon=horizon)
