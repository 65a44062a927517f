"""Stage one of LensNet's training: it learns from the history what a teacher knows from the horizon.

    L = mean over contexts of  KL(p || softmax(artanh(s) / temperature)),    p_b = worth_b^sharpness / sum

over the blocks of one history, with s the policy's scores of them in that context. One loss for a whole variant says
little of each of its spans; a teacher says something of every span, for three readings of a window. The contexts are
those at which the policy decides, the cold start and what it makes of it at further looks (DAgger: Ross et al.,
arXiv:1011.0686, Algorithm 3.1, with all decisions the policy's own), and a random cut of a random length: scores then
mean the same in all.

What is taught is need. Each token of the horizon weighs by how much the whole history lowers its loss below that of a
short one (`key_tokens.token_gain`), and each sequence by the sum of its worths: most tokens need nothing old, and would
teach the habit of the many.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax import losses
from lensjax.context import allocator, refocus, rollouts
from lensjax.context import working as contexts
from lensjax.context.refocus import ScoreFn
from lensjax.context.working import WorkingContext
from lensjax.models import Models, Params
from lensjax.models.decision import build_tree, policy, policy_scores, split
from lensjax.training import lessons
from lensjax.training.metrics import Metrics
from lensjax.training.optim import schedules
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch
from lensjax.training.steps.update import Learner, all_parts, gradient_step, init_learner, split_parts
from lensjax.training.teachers import DistillConfig

TRAINED = ("lens",)


def init_distill_state(key: Array, *, recipe: Recipe, params: dict[str, Params]) -> tuple[Learner, dict[str, Params]]:
    """A state before the first step.

    Args:
      key: PRNG key, consumed.
      recipe: read is the optimizer.
      params: parameters of `base`, `gist` and `lens`; that of `lens` is copied.

    Returns:
      `Learner` of `lens`, and the other parts, as they are.
    """
    trained, frozen = split_parts(params, TRAINED)
    return init_learner(key, trained, tx=make_optimizer(recipe.optimizer)), frozen


def distill_step(
    state: Learner,
    batch: Batch,
    frozen: dict[str, Params],
    *,
    recipe: Recipe,
    settings: DistillConfig,
    models: Models,
) -> tuple[Learner, Metrics]:
    """One update on one batch; compile it as `train_step`.

    Args:
      state: the state before the step.
      batch: `tokens` int32[B, T].
      frozen: parameters of `base` and `gist`.
      recipe: static; read are shapes, rates, the optimizer and where refocusing starts.
      settings: static.
      models: static.

    Returns:
      The next state, and scalars by name: of these, `distill/top_agreement` is the share of the blocks that the policy
      would show at the budget among those that the teacher would.

    Example:
      >>> import functools, jax, lensjax as lx
      >>> from lensjax.training.steps import distill
      >>> from lensjax.training.teachers import DistillConfig
      >>> config = lx.Config(base=lx.BaseConfig(dim=16, layers=1), lens=lx.LensConfig(dim=16, layers=1))
      >>> recipe, models = config.recipe, config.build_models()
      >>> state, frozen = lx.init_train_state(jax.random.key(0), recipe=recipe, models=models)
      >>> params = {**frozen, **state.params}
      >>> state, frozen = distill.init_distill_state(jax.random.key(1), recipe=recipe, params=params)
      >>> step = functools.partial(distill.distill_step, recipe=recipe, settings=DistillConfig(steps=30), models=models)
      >>> tokens = jax.random.randint(jax.random.key(2), (2, config.context.window), 0, 256)
      >>> state, metrics = jax.jit(step)(state, {"tokens": tokens}, frozen)
      >>> int(state.step), bool(metrics["loss"] > 0)
      (1, True)
    """
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), batch["tokens"].shape[0])
    whole = all_parts(state, frozen)

    def loss_fn(trained: dict[str, Params]) -> tuple[Array, Metrics]:
        params = {**whole, **trained}
        each, mass, agreement = jax.vmap(
            lambda tokens, key: _one(key, params, tokens, recipe=recipe, settings=settings, models=models)
        )(batch["tokens"], keys)
        share = mass / jnp.maximum(jnp.sum(mass), 1e-9)
        return jnp.sum(share * each), {"distill/top_agreement": jnp.mean(agreement)}

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
    return after, seen.aux | {"loss": seen.loss, "grad_norm": optax.tree.norm(seen.grads["lens"]), "lr": rate}


def _one(
    key: Array, params: dict[str, Params], tokens: Array, *, recipe: Recipe, settings: DistillConfig, models: Models
) -> tuple[Array, Array, Array]:
    """Loss of one sequence, how much it has to say, and how far policy and teacher agree at the cold start."""
    geometry = recipe.geometry
    window = split(tokens, horizon=recipe.context.horizon)
    known = {name: jax.lax.stop_gradient(params[name]) for name in ("base", "gist")}
    targets = lessons.node_worths(models.base, known["base"], window, geometry, settings=settings, short=recipe.short)
    tree = build_tree(models, known, window.history, geometry)
    where = lessons.taught_nodes(geometry)

    score_fn = policy(models.lens, jax.lax.stop_gradient(params["lens"]), tree)
    seen = _contexts(key, score_fn, recipe, looks=settings.looks)
    entries = jax.vmap(lambda one: contexts.materialise(tree, one))(seen)
    scores = policy_scores(models.lens, params["lens"], entries)
    pooled = jax.vmap(lambda row, one: lessons.node_logits(row, one, geometry))(scores, seen)
    loss = jax.vmap(lambda row: losses.listwise_distillation(row, targets, where, temperature=settings.temperature))(
        pooled
    )
    shown = max((recipe.budget - geometry.head - geometry.recent_tokens) // geometry.block_size, 1)
    both = (_among_top(pooled[0], where, shown) & _among_top(targets, where, shown)).sum(dtype=jnp.float32)
    return jnp.mean(loss), jnp.sum(jnp.where(where, targets, 0.0)), jax.lax.stop_gradient(both / shown)


def _contexts(key: Array, score_fn: ScoreFn, recipe: Recipe, *, looks: int) -> WorkingContext:
    """What the policy sees at its first looks, and a random cut whose length is log-uniform over all."""
    geometry, capacity, focus = recipe.geometry, recipe.capacity, recipe.focus
    share = recipe.hyper.high_lod_share
    drawn = rollouts.sample_of_any_length(key, share, geometry=geometry, capacity=capacity)
    _, own = refocus.iterate(
        allocator.start(recipe.budget, geometry, settings=focus),
        score_fn,
        recipe.budget,
        geometry,
        steps=looks - 1,  # nobody looks at what the last edits make
        capacity=capacity,
        settings=focus,
        key=jax.random.fold_in(key, 1),
    )
    return jax.tree.map(lambda many, random: jnp.concatenate([many, random[None]]), own, drawn)


def _among_top(values: Array, where: Array, count: int) -> Array:
    """bool[N]: the largest `count` of the values that count."""
    order = jnp.argsort(jnp.where(where, -values, jnp.inf), stable=True)
    return where & jnp.zeros(where.shape, bool).at[order[:count]].set(True)
