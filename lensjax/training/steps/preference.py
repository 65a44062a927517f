"""LensNet training: `train_step(state, batch, frozen) -> (state, metrics)`, pure, compiled once for a whole run."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax.models import Models, Params
from lensjax.models.decision import policy_scores
from lensjax.training import lessons, metrics, objective, preferences, stages
from lensjax.training.metrics import Metrics
from lensjax.training.optim import moving, schedules
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch, ScoredVariants, score_variants
from lensjax.training.steps.difficulty import climb, learn_regrets, of_step
from lensjax.training.steps.train_state import (
    TrainState,
    objective_key,
    sequence_keys,
    statistics,
    temperature,
)
from lensjax.training.steps.update import Gradient, all_parts, gradient_step
from lensjax.training.terms.inputs import Term
from lensjax.training.terms.tokens import token_term

Loss = tuple[Array, tuple[ScoredVariants, Array, Metrics]]
"""The loss; beside it the scored variants, the net demand of each, and scalars by name."""
LossFn = Callable[[dict[str, Params]], Loss]


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: dict[str, Params],
    *,
    recipe: Recipe,
    models: Models,
    tx: optax.GradientTransformation | None = None,
    term: Term | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on one batch.

    The caller compiles it: `jax.jit(partial(train_step, recipe=recipe, models=models), donate_argnums=0)`.

    Args:
      state: the state before the step.
      batch: `tokens` int32[B, T].
      frozen: parameters of those of `base`, `gist` and `lens` that the state does not train; they stay as they are.
      recipe: static.
      models: static.
      tx: any optax transformation over a dict of the trained parts. One with injected `learning_rate` and
        `weight_decay` gets those of the state's hyperparameters and of the schedule; another has its own. None makes
        that of `recipe.optimizer`.
      term: any preference term; None takes that of `recipe.objective`.

    Returns:
      The next state, and scalars by name.

    Example:
      >>> import functools, jax, lensjax as lx
      >>> config = lx.Config(base=lx.BaseConfig(dim=16, layers=1), lens=lx.LensConfig(dim=16, layers=1))
      >>> recipe, models = config.recipe, config.build_models()
      >>> step = jax.jit(functools.partial(lx.train_step, recipe=recipe, models=models), donate_argnums=0)
      >>> state, frozen = lx.init_train_state(jax.random.key(0), recipe=recipe, models=models)
      >>> tokens = jax.random.randint(jax.random.key(1), (2, config.context.window), 0, 256)
      >>> state, metrics = step(state, {"tokens": tokens}, frozen)
      >>> int(state.step), int(metrics["context_length"])
      (1, 175)
    """
    whole = all_parts(state, frozen)

    def loss_fn(trained: dict[str, Params]) -> Loss:
        params = {**whole, **trained}
        scored = score_batch(params, state, batch, recipe=recipe, models=models)
        return total_loss(params, state, scored, recipe=recipe, models=models, term=term)

    return apply_loss(state, loss_fn, recipe=recipe, tx=tx)


def lens_step(
    state: TrainState, scored: ScoredVariants, *, recipe: Recipe, models: Models
) -> tuple[TrainState, Metrics]:
    """`train_step` on variants that are scored already, where LensNet alone is trained.

    Many settings that draw the same rollouts then share one pass of the base model (see `lensjax.runs.sweep`).

    Args:
      state: the state before the step.
      scored: what `score_batch` makes of the batch.
      recipe: static; `trainable` must be LensNet alone.
      models: static.

    Returns:
      The next state, and scalars by name.
    """

    def loss_fn(params: dict[str, Params]) -> Loss:
        return total_loss(params, state, scored, recipe=recipe, models=models)

    return apply_loss(state, loss_fn, recipe=recipe)


def score_batch(
    params: dict[str, Params], state: TrainState, batch: Batch, *, recipe: Recipe, models: Models
) -> ScoredVariants:
    """The variants of a batch, scored; of the state only step, key and hyperparameters are read.

    Args:
      params: parameters of `base` and `gist`, and of `lens` where it draws rollouts itself.
      state: the state before the step.
      batch: `tokens` int32[B, T].
      recipe: static.
      models: static.

    Returns:
      `ScoredVariants` with leading axis B.
    """
    length, share = of_step(state.step, state.hyper, state.ladder, recipe=recipe)

    def score(tokens: Array, key: Array) -> ScoredVariants:
        return score_variants(
            key,
            params,
            tokens,
            length,
            share,
            models=models,
            context=recipe.context,
            capacity=recipe.capacity,
            short=recipe.short,
            own_temperature=state.hyper.own_temperature,
            head=state.head,
        )

    scored = jax.vmap(score)(batch["tokens"], sequence_keys(state, batch))
    if recipe.objective.gate == "none":
        return scored
    return lessons.with_worths(scored, params["base"], batch["tokens"], recipe=recipe, models=models)


def total_loss(
    params: dict[str, Params],
    state: TrainState,
    scored: ScoredVariants,
    *,
    recipe: Recipe,
    models: Models,
    term: Term | None = None,
) -> Loss:
    """L_lens, plus the token loss where the base model or GistNet is trained.

    No gradient of L_lens reaches base or gist (its inputs are constants), none of the token loss reaches LensNet.
    """
    hyper = state.hyper
    scores = policy_scores(models.lens, params["lens"], scored.entries)
    anchor_scores = None if state.anchor is None else policy_scores(models.lens, state.anchor, scored.entries)
    output = objective.lens_objective(
        objective_key(jax.random.fold_in(state.key, state.step)),
        scored,
        scores,
        anchor_scores,
        statistics(state, recipe=recipe),
        hyper,
        recipe=recipe,
        term=term,
    )
    loss, report = output.loss, output.metrics
    if {"base", "gist"} & set(recipe.trainable):
        token_loss, by_name = token_term(scored, hyper)
        loss, report = loss + token_loss, report | by_name
    return loss, (jax.lax.stop_gradient(scored), output.balance, report)


def apply_loss(
    state: TrainState, loss_fn: LossFn, *, recipe: Recipe, tx: optax.GradientTransformation | None = None
) -> tuple[TrainState, Metrics]:
    """One step down the gradient of a loss, and what the moving statistics take in."""
    hyper = state.hyper
    rate = schedules.learning_rate(
        state.step,
        hyper.learning_rate,
        schedule=recipe.optimizer.schedule,
        warmup_steps=recipe.optimizer.warmup_steps,
        steps=recipe.steps,
    )
    after, seen = gradient_step(
        state,
        loss_fn,
        tx=make_optimizer(recipe.optimizer) if tx is None else tx,
        rates={"learning_rate": rate, "weight_decay": hyper.weight_decay},
    )
    return _take_in(state, after, seen, rate, recipe)


def _take_in(
    state: TrainState,
    after: TrainState,
    seen: Gradient[tuple[ScoredVariants, Array, Metrics]],
    rate: Array,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """The moving statistics and the anchor after a step, and its report."""
    hyper, (scored, balance, report) = state.hyper, seen.aux
    anchor = state.anchor
    if recipe.has_anchor and "lens" in after.params:
        anchor = moving.update_anchor(
            anchor,
            before=state.params["lens"],
            after=after.params["lens"],
            kind=recipe.objective.anchor,
            beta=hyper.anchor_beta,
            is_new_stage=after.step == stages.second_stage(hyper.stage_boundary, recipe.steps),
        )
    deltas = preferences.advantage_deltas(scored.nll)
    head, regrets = learn_regrets(state.head, scored, recipe=recipe)
    after = replace(
        after,
        normaliser=moving.update_moments(state.normaliser, deltas, scored.distinct, hyper.adv_norm_beta),
        anchor=anchor,
        demand=moving.update_moments(state.demand, balance, scored.distinct, hyper.budget_smooth_beta),
        ladder=climb(state.ladder, report, hyper, recipe=recipe),
        head=head,
    )
    report |= regrets | {
        "loss": seen.loss,
        "grad_norm": optax.tree.norm(seen.grads),
        "temperature": temperature(state, recipe=recipe),
        "context_length": of_step(state.step, hyper, state.ladder, recipe=recipe)[0].astype(jnp.float32),
        "mc/adv_histogram": metrics.histogram(
            deltas[:, 1:], scored.distinct[:, 1:], metrics.HISTOGRAMS["mc/adv_histogram"]
        ),
    }
    if after.ladder is not None:
        report |= {"curriculum/level": after.ladder.level.astype(jnp.float32), "curriculum/success": after.ladder.rate}
    # Another optimizer has its own rate, which nothing here knows.
    if "learning_rate" in getattr(after.opt_state, "hyperparams", {}):
        report["lr"] = rate
    return after, report
