"""Training of the base model itself (and GistNet with it, where asked) before LensNet has anything to learn from."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax._settings import BatchSize, NonNegative, Positive, PositiveInt, settings
from lensjax.context import rollouts
from lensjax.context import working as contexts
from lensjax.models import Models, Params
from lensjax.models.decision import build_tree, split
from lensjax.training import nll
from lensjax.training.metrics import Metrics
from lensjax.training.optim import schedules
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch
from lensjax.training.steps.update import Learner, gradient_step, init_learner, split_parts


@settings("pretrain")
class PretrainConfig:
    """The base model's own training, before LensNet's. Skipped where a run has a `base_run` or a `start_from`."""

    steps: PositiveInt = 600
    learning_rate: Positive = 3e-3
    batch_size: BatchSize = 16
    rollout_weight: NonNegative = 0.0
    """Weight of the rollouts' NLL beside the full-context loss: teaches the base model to read gists and GistNet to
    write them. 0 leaves GistNet at its initialisation."""
    train_gist: bool = True
    """Whether GistNet learns from the rollouts; False leaves it at its initialisation, nearly the mean of a block."""


ROLLOUTS_FROM = 0.5
"""Share of the steps after which rollouts are read too. Read from the start, their noisier gradient keeps a small model
from learning to use older context at all."""


def trainable_parts(settings: PretrainConfig) -> tuple[str, ...]:
    """GistNet is trained only where rollouts are read: nothing else gives it a gradient."""
    return ("base", "gist") if settings.rollout_weight > 0 and settings.train_gist else ("base",)


def init_pretrain_state(
    key: Array, *, recipe: Recipe, settings: PretrainConfig, models: Models
) -> tuple[Learner, dict[str, Params]]:
    """A state with fresh parameters of what is trained, and those of GistNet where it is not. `key` is consumed."""
    run_key, base_key, gist_key = jax.random.split(key, 3)
    params = {"base": models.base.init(base_key), "gist": models.gist.init(gist_key)}
    trained, frozen = split_parts(params, trainable_parts(settings))
    return init_learner(run_key, trained, tx=make_optimizer(recipe.optimizer)), frozen


def pretrain_step(
    state: Learner,
    batch: Batch,
    frozen: dict[str, Params],
    *,
    recipe: Recipe,
    settings: PretrainConfig,
    models: Models,
) -> tuple[Learner, Metrics]:
    """One update on one batch; compile it as `train_step`.

    Args:
      state: the state before the step.
      batch: `tokens` int32[B, T].
      frozen: parameters of `gist` where it is not trained.
      recipe: static; read are shapes and the optimizer.
      settings: static.
      models: static.

    Returns:
      The next state, and scalars by name.
    """
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), batch["tokens"].shape[0])

    def loss_fn(params: dict[str, Params]) -> tuple[Array, Metrics]:
        reads_rollouts = state.step >= int(ROLLOUTS_FROM * settings.steps)
        return _pretrain_loss({**frozen, **params}, batch["tokens"], keys, reads_rollouts, recipe, settings, models)

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
        rates={"learning_rate": rate, "weight_decay": 0.0},
    )
    return after, seen.aux | {"loss": seen.loss, "grad_norm": optax.tree.norm(seen.grads), "lr": rate}


def _pretrain_loss(
    params: dict[str, Params],
    tokens: Array,
    keys: Array,
    reads_rollouts: Array,
    recipe: Recipe,
    settings: PretrainConfig,
    models: Models,
) -> tuple[Array, Metrics]:
    """Teacher-forced loss on full windows, and then also the weighted loss of one rollout of each sequence."""
    full = jax.vmap(lambda row: nll.sequence_nll(models.base, params["base"], row))(tokens)
    token_loss = jnp.mean(full)
    report = {"token_loss": token_loss}
    if settings.rollout_weight == 0:
        return token_loss, report

    def read_rollouts() -> Array:
        return jnp.mean(jax.vmap(lambda row, key: _rollout_loss(models, params, row, key, recipe))(tokens, keys))

    rollout_loss = jax.lax.cond(reads_rollouts, read_rollouts, lambda: jnp.zeros(()))
    report["rollout_loss"] = rollout_loss
    return token_loss + settings.rollout_weight * rollout_loss, report


def _rollout_loss(models: Models, params: dict[str, Params], tokens: Array, key: Array, recipe: Recipe) -> Array:
    """Mean loss of the token after every token that one rollout of the history, and the horizon behind it, show."""
    geometry, share = recipe.geometry, recipe.hyper.high_lod_share
    context = rollouts.sample_of_any_length(key, share, geometry=geometry, capacity=recipe.capacity)
    horizon = recipe.context.horizon
    history = split(tokens, horizon=horizon).history
    tree = build_tree(models, params, history, geometry)
    entries = contexts.materialise(tree, contexts.read(context, geometry))
    return nll.entry_nll(models.base, params["base"], entries, tokens, horizon=horizon)
