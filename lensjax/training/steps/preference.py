"""LensNet training: `train_step(state, batch) -> (state, metrics)`, pure, compiled once for a whole run."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from lensjax.models import Models, Params, hyperlora
from lensjax.models.decision import policy_scores, split
from lensjax.runs.config import Config, Hyperparameters
from lensjax.training import metrics, objective, preferences
from lensjax.training.metrics import Metrics
from lensjax.training.optim import moving, optimizer, schedules
from lensjax.training.optim.moving import EmaMoments
from lensjax.training.scoring import Batch, ScoredVariants, score_variants
from lensjax.training.steps import adaptation

_Loss = tuple[Array, tuple[ScoredVariants, Array, Metrics]]
"""The loss; beside it the scored variants, the net demand of each, and scalars by name."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that moves during training, and the hyperparameters, so that one `vmap` runs many settings."""

    step: Array
    """int32[]: updates done."""
    params: dict[str, Params]
    """Parameters of `base`, `gist` and `lens`, and of `hyper` where it is trained."""
    opt_state: Any
    """Optimizer state of the trainable parts."""
    normaliser: EmaMoments
    """Moving moments of the advantage deltas."""
    anchor: Params | None
    """The anchor policy's parameters; None when the KL term is off."""
    budget: EmaMoments
    """Moving moments of the net demand for detail."""
    hyper: Hyperparameters
    """float32[] each."""
    key: Array
    """PRNG key of the run; step keys are `fold_in(key, step)`."""


def init_train_state(
    key: Array, *, config: Config, models: Models, params: dict[str, Params] | None = None
) -> TrainState:
    """A state before the first step.

    Args:
      key: PRNG key, consumed.
      config: the run; its `hyper` becomes arrays.
      models: the models.
      params: parameters of any of `base`, `gist`, `lens`, `hyper` to start from; the others are drawn, `hyper` only
        where it is trained.

    Returns:
      `TrainState` at step 0.

    Raises:
      ValueError: `params` names a part that does not exist.
    """
    given = params or {}
    parts: dict[str, Callable[[Array], Params]]
    parts = {"base": models.base.init, "gist": models.gist.init, "lens": models.lens.init}
    run_key, *part_keys = jax.random.split(key, 1 + len(parts))
    if models.hyper is not None:
        parts["hyper"] = models.hyper.init
        # A key of its own: with and without a hypernetwork, a run draws the same.
        part_keys.append(jax.random.fold_in(key, len(part_keys)))
    if unknown := set(given) - set(parts):
        raise ValueError(f"params may hold {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    full = {
        # Copied, since a donated state takes its buffers with it.
        name: jax.tree.map(jnp.copy, given[name]) if name in given else init(part_key)
        for (name, init), part_key in zip(parts.items(), part_keys, strict=True)
    }
    hyper = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), config.hyper)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=full,
        opt_state=optimizer.init(config.optimizer, {name: full[name] for name in config.trainable}),
        normaliser=moving.init_moments(),
        anchor=moving.init_anchor(full["lens"]) if uses_anchor(config) else None,
        budget=moving.init_moments(),
        hyper=hyper,
        key=run_key,
    )


def uses_anchor(config: Config) -> bool:
    """Whether the KL term is compiled in: a weight of 0 costs no second forward pass."""
    return config.hyper.kl_weight > 0


def train_step(state: TrainState, batch: Batch, *, config: Config, models: Models) -> tuple[TrainState, Metrics]:
    """One update on one batch.

    The caller compiles it: `jax.jit(partial(train_step, config=config, models=models), donate_argnums=0)`.

    Args:
      state: the state before the step.
      batch: `tokens` int32[B, T].
      config: static.
      models: static.

    Returns:
      The next state, and scalars by name.
    """
    support = None
    if "hyper" in config.trainable:
        keys = _sequence_keys(state, batch)
        support = score_supports(state, batch, keys, state.step, config=config, models=models)

    def loss_fn(trainable: dict[str, Params]) -> _Loss:
        params = {**state.params, **trainable}
        scored = score_batch(params, state, batch, config=config, models=models)
        return _total_loss(params, state, scored, support, config, models)

    return _update(state, loss_fn, config)


def lens_step(
    state: TrainState, scored: ScoredVariants, *, config: Config, models: Models
) -> tuple[TrainState, Metrics]:
    """`train_step` on variants that are scored already, where LensNet alone is trained.

    Many settings that draw the same rollouts then share one pass of the base model (see `lensjax.runs.sweep`). The state
    needs no other parameters than LensNet's.

    Args:
      state: the state before the step.
      scored: what `score_batch` makes of the batch.
      config: static; `trainable` must be LensNet alone.
      models: static.

    Returns:
      The next state, and scalars by name.
    """

    def loss_fn(trainable: dict[str, Params]) -> _Loss:
        return _total_loss({**state.params, **trainable}, state, scored, None, config, models)

    return _update(state, loss_fn, config)


def score_batch(
    params: dict[str, Params], state: TrainState, batch: Batch, *, config: Config, models: Models
) -> ScoredVariants:
    """The variants of a batch and their losses; of the state only step, key and hyperparameters are read.

    Args:
      params: parameters of `base` and `gist`.
      state: the state before the step.
      batch: `tokens` int32[B, T].
      config: static.
      models: static.

    Returns:
      `ScoredVariants` with leading axis B.
    """
    length = current_length(state.step, state.hyper, config)
    return jax.vmap(
        lambda tokens, key: score_variants(models, params, tokens, key, length, state.hyper.lod2_share, config=config)
    )(batch["tokens"], _sequence_keys(state, batch))


def score_supports(
    state: TrainState, batch: Batch, keys: Array, step: ArrayLike, *, config: Config, models: Models
) -> ScoredVariants:
    """The support of each document of a batch (`adaptation.score_support`); of the windows, the histories are read.

    Args:
      state: of it, parameters and hyperparameters are read.
      batch: `tokens` int32[B, T].
      keys: PRNG keys [B], those of the sequences' variants.
      step: int32[], of the curriculum: variants of the past are cut to the same fraction as those at the cursor.
      config: static.
      models: static.

    Returns:
      `ScoredVariants` with leading axis B.
    """
    histories = split(batch["tokens"], horizon=config.context.horizon).history
    length, share = current_length(step, state.hyper, config.past), state.hyper.lod2_share
    score = functools.partial(adaptation.score_support, models, state.params, config=config)
    return jax.vmap(lambda history, key: score(history, key, length, share))(histories, keys)


def _sequence_keys(state: TrainState, batch: Batch) -> Array:
    """The key of each sequence in the next step, [B]."""
    return jax.random.split(jax.random.fold_in(state.key, state.step), batch["tokens"].shape[0])


def _update(
    state: TrainState, loss_fn: Callable[[dict[str, Params]], _Loss], config: Config
) -> tuple[TrainState, Metrics]:
    """One step down the gradient of a loss, and what the stability state takes in."""
    hyper = state.hyper
    rate = schedules.learning_rate(
        state.step,
        hyper.learning_rate,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        steps=config.steps,
    )
    trainable: dict[str, Params] = {name: state.params[name] for name in config.trainable}
    (loss, (scored, balance, report)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    trainable, opt_state = optimizer.update(
        config.optimizer,
        grads,
        state.opt_state,
        trainable,
        learning_rate=rate,
        weight_decay=hyper.weight_decay,
    )
    params = {**state.params, **trainable}
    anchor = state.anchor
    if uses_anchor(config):
        anchor = moving.update_anchor(
            anchor,
            before=state.params["lens"],
            after=params["lens"],
            kind=config.objective.anchor,
            beta=hyper.anchor_beta,
        )
    deltas = preferences.advantage_deltas(scored.losses)
    next_state = replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        normaliser=moving.update_moments(state.normaliser, deltas, scored.distinct, hyper.adv_norm_beta),
        anchor=anchor,
        budget=moving.update_moments(state.budget, balance, scored.distinct, hyper.budget_smooth_beta),
    )
    report |= {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "lr": rate,
        "temperature": _temperature(state, config),
        "context_length": current_length(state.step, hyper, config).astype(jnp.float32),
        "mc/adv_histogram": metrics.histogram(
            deltas[:, 1:], scored.distinct[:, 1:], metrics.HISTOGRAMS["mc/adv_histogram"]
        ),
    }
    return next_state, report


def _total_loss(
    params: dict[str, Params],
    state: TrainState,
    scored: ScoredVariants,
    support: ScoredVariants | None,
    config: Config,
    models: Models,
) -> _Loss:
    """L_lens, plus the token loss where the base model or GistNet is trained, and the hypernetwork's where that is.

    No gradient of L_lens reaches base or gist (its inputs are constants), none of the other two reaches LensNet.
    """
    hyper = state.hyper
    scores = policy_scores(models, params["lens"], scored.entries)
    anchor_scores = None if state.anchor is None else policy_scores(models, state.anchor, scored.entries)
    output = objective.lens_objective(
        scored,
        scores,
        anchor_scores,
        objective_key(jax.random.fold_in(state.key, state.step)),
        normaliser=state.normaliser,
        budget=state.budget,
        temperature=_temperature(state, config),
        hyper=hyper,
        config=config,
    )
    loss, report = output.loss, output.metrics
    if {"base", "gist"} & set(config.trainable):
        token_loss = metrics.masked_mean(scored.losses, scored.distinct)
        # The baseline is a constant here: a worse one would be the cheapest way to a smaller difference.
        rises = jax.nn.relu(scored.losses - jax.lax.stop_gradient(scored.losses[:, :1]))
        gist_delta = metrics.masked_mean(rises, scored.distinct)
        loss = loss + hyper.token_loss_weight * token_loss + hyper.gist_delta_weight * gist_delta
        report = report | {"token_loss": token_loss, "gist_delta_loss": gist_delta}
    if support is not None:
        adapted_loss, adapted_report = _adapted_loss(params, state, scored, support, config, models)
        loss = loss + adapted_loss
        report = report | adapted_report | {"plain_agreement": report["mc/preference_agreement"]}
    return loss, (jax.lax.stop_gradient(scored), output.balance, report)


def _adapted_loss(
    params: dict[str, Params],
    state: TrainState,
    scored: ScoredVariants,
    support: ScoredVariants,
    config: Config,
    models: Models,
) -> tuple[Array, Metrics]:
    """What LensNet, adapted to each document by its support, makes of the preferences at the cursor."""
    deltas = jax.vmap(lambda one: adaptation.document_deltas(models, params, one, config=config))(support)
    loss, agreement = objective.pair_loss(
        scored,
        jax.vmap(lambda delta, entries: policy_scores(models, adaptation.adapted(params["lens"], delta), entries))(
            deltas, scored.entries
        ),
        normaliser=state.normaliser,
        temperature=_temperature(state, config),
        hyper=state.hyper,
        config=config,
    )
    deltas = jax.lax.stop_gradient(deltas)
    report = {
        "adapted_loss": loss,
        "adapted_agreement": agreement,
        "lora_diversity": hyperlora.diversity(deltas),
        "lora_magnitude": jnp.mean(jnp.stack(list(hyperlora.magnitudes(deltas).values()))),
    }
    return loss, jax.lax.stop_gradient(report)


def objective_key(key: Array) -> Array:
    """Randomness of the objective in a step with this key, whose `split` the sequences of the batch take."""
    # `fold_in` with a small number would give the key of a sequence.
    return jax.random.fold_in(key, 2**31 - 1)


def _temperature(state: TrainState, config: Config) -> Array:
    return schedules.linear(
        state.step, start=state.hyper.temperature, end=state.hyper.temperature_end, steps=config.steps
    )


def current_length(step: ArrayLike, hyper: Hyperparameters, config: Config) -> Array:
    """Entries of every working context at a step of the curriculum, int32[]."""
    steps = config.optimizer.curriculum_steps
    return schedules.context_length(
        step,
        start=hyper.context_start,
        end=hyper.context_end,
        steps=config.steps // 2 if steps is None else steps,
        geometry=config.context.geometry,
        capacity=config.context_capacity,
    )
