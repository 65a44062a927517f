"""Meta-training of grid model and hypernetwork: the loss of a batch of tasks, one step, and what deltas are worth.

    L = L_task + loo_weight L_loo + equivariance_weight L_equiv

Letters beside those of the grid model: B tasks, N examples of a task, Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from experiments.rlan import grids
from experiments.rlan.config import RlanConfig
from experiments.rlan.grids import PADDING
from experiments.rlan.model import GridModel, best_step
from lensjax._numerics import masked_mean
from lensjax.models import HyperLoRAModel, Params, hyperlora
from lensjax.models.hyperlora import Deltas
from lensjax.training.metrics import Metrics
from lensjax.training.optim import schedules
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.steps.update import Learner, gradient_step, init_learner

Batch = dict[str, Array]
"""`support` int32[B, N, 2, S, S] and `query` int32[B, Q, 2, S, S]; an example of padding alone counts for nothing. To
measure, also `size` int32[B, Q, 2] of the answers, by `grids.answer_size`."""


@dataclass(frozen=True)
class RlanModels:
    """The two models of a run. Hashable: pass it as a static argument of `jax.jit`."""

    grid: GridModel
    hypernet: HyperLoRAModel


def build_models(config: RlanConfig) -> RlanModels:
    """Builds the models of a configuration; call it once, outside `jax.jit`."""
    grid = GridModel(config.grid, config.task_set.size)
    return RlanModels(grid, HyperLoRAModel(config.hyperlora, config.grid.dim, grid.targets))


def init_state(key: Array, *, config: RlanConfig, models: RlanModels) -> Learner:
    """A learner with fresh parameters of `grid` and `hypernet`. `key` is consumed."""
    grid_key, hypernet_key = jax.random.split(key)
    params = {"grid": models.grid.init(grid_key), "hypernet": models.hypernet.init(hypernet_key)}
    return init_learner(jax.random.fold_in(key, 2), params, tx=_optimizer(config))


def _optimizer(config: RlanConfig) -> optax.GradientTransformation:
    """The hypernetwork has a learning rate of its own."""
    return make_optimizer(config.optimizer, multipliers={"hypernet": config.hyperlora.learning_rate_multiplier})


def is_example(pairs: ArrayLike) -> Array:
    """Which of int32[N, 2, S, S] are examples, not padding; bool[N]."""
    return jnp.any(jnp.asarray(pairs)[:, 0] != PADDING, axis=(1, 2))


def task_deltas(models: RlanModels, params: dict[str, Params], support: ArrayLike) -> Deltas:
    """The deltas for a task, from all of its examples int32[N, 2, S, S]."""
    features = jax.vmap(lambda pair: models.grid.encode(params["grid"], pair))(jnp.asarray(support))
    return models.hypernet.apply(params["hypernet"], hyperlora.mean_context(features, is_example(support)))


def leave_one_out_deltas(
    models: RlanModels, params: dict[str, Params], support: ArrayLike
) -> tuple[Deltas, Deltas, Array]:
    """The deltas for a task, those for each of its examples from the others, and which of these can be solved so.

    Args:
      models: static.
      params: of `grid` and `hypernet`.
      support: int32[N, 2, S, S], each encoded once.

    Returns:
      Deltas; N deltas; bool[N].
    """
    features = jax.vmap(lambda pair: models.grid.encode(params["grid"], pair))(jnp.asarray(support))
    valid = is_example(support)
    contexts, held_out = hyperlora.leave_one_out_contexts(features, valid)
    contexts = jnp.concatenate([hyperlora.mean_context(features, valid)[None], contexts])
    deltas = jax.vmap(lambda context: models.hypernet.apply(params["hypernet"], context))(contexts)
    return jax.tree.map(lambda leaf: leaf[0], deltas), jax.tree.map(lambda leaf: leaf[1:], deltas), held_out


def answers(models: RlanModels, params: dict[str, Params], deltas: Deltas, grid: ArrayLike) -> Array:
    """Logits of the solver's last step for an input int32[S, S]; float32[S, S, 10]."""
    hidden = models.grid.solve(params["grid"], deltas, grid)
    return models.grid.logits(params["grid"], deltas, hidden[-1])


def turned_answers(
    models: RlanModels, params: dict[str, Params], turned: Deltas, query: Array, views: Sequence[int]
) -> Array:
    """Logits for turned inputs, turned back to where the input's own answer is.

    Args:
      models: static.
      params: of `grid` and `hypernet`.
      turned: the deltas of the task in each of the views.
      query: int32[Q, 2, S, S], inputs and answers; of an answer only the size is read.
      views: dihedral elements.

    Returns:
      float32[views, Q, S, S, 10]; what is outside of an answer means nothing.
    """
    seen = _turned(query, views)
    solve = jax.vmap(lambda deltas, inputs: jax.vmap(lambda grid: answers(models, params, deltas, grid))(inputs))
    logits = solve(turned, seen[:, :, 0])
    back = [
        jax.vmap(lambda values, answer, index=index: grids.dihedral(values, index, content=answer != PADDING))
        for index in (grids.INVERSES[view] for view in views)
    ]
    return jnp.stack([turn(logits[i], seen[i, :, 1]) for i, turn in enumerate(back)])


def grid_loss(logits: ArrayLike, answer: ArrayLike) -> tuple[Array, Array, Array]:
    """Cross-entropy of an answer, the share of cells that are right, and whether all are.

    Args:
      logits: float32[S, S, 10].
      answer: int32[S, S]; its padding does not count.

    Returns:
      Three float32[].
    """
    answer, logits = jnp.asarray(answer), jnp.asarray(logits)
    content = answer != PADDING
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(content, answer, 0))
    right = jnp.argmax(logits, axis=-1) == answer
    return (
        masked_mean(losses, content),
        masked_mean(right.astype(jnp.float32), content),
        jnp.all(right | ~content).astype(jnp.float32),
    )


def grid_scores(pair: ArrayLike) -> tuple[Array, Array]:
    """What a grid scores as an answer: a prediction, or the copied input.

    Args:
      pair: int32[2, S, S], the grid and the answer.

    Returns:
      The share of the answer's cells that are right, and whether all is, its shape too; two float32[].
    """
    source, answer = jnp.asarray(pair)
    content = answer != PADDING
    pixel = masked_mean((source == answer).astype(jnp.float32), content)
    return pixel, jnp.all(source == answer).astype(jnp.float32)


def meta_loss(
    params: dict[str, Params], batch: Batch, step: Array, *, config: RlanConfig, models: RlanModels
) -> tuple[Array, Metrics]:
    """The loss of a batch of tasks at a step, and its parts. A term of weight 0 costs nothing."""
    weights = config.hyperlora

    def one(support: Array, query: Array) -> Metrics:
        deltas, others, held_out = leave_one_out_deltas(models, params, support)
        inputs, targets, queries = query[:, 0], query[:, 1], query.shape[0]
        used = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (queries, *leaf.shape)), deltas)
        if weights.loo_weight > 0:
            used = jax.tree.map(lambda ours, theirs: jnp.concatenate([ours, theirs]), used, others)
            inputs, targets = (jnp.concatenate([a, b]) for a, b in ((inputs, support[:, 0]), (targets, support[:, 1])))
        logits = jax.vmap(lambda delta, grid: answers(models, params, delta, grid))(used, inputs)
        losses, pixels, exacts = jax.vmap(grid_loss)(logits, targets)
        where = is_example(query)
        report = {
            "task_loss": masked_mean(losses[:queries], where),
            "accuracy": masked_mean(pixels[:queries], where),
            "exact": masked_mean(exacts[:queries], where),
        }
        if weights.loo_weight > 0:
            report["loo_loss"] = hyperlora.leave_one_out_loss(losses[queries:], held_out)
            report["loo_accuracy"] = masked_mean(pixels[queries:], held_out)
            report["loo_skipped_ratio"] = 1.0 - jnp.any(held_out).astype(jnp.float32)
        if weights.equivariance_weight > 0:
            report |= _equivariance(deltas, support, query, logits[:queries])
        return report

    def _equivariance(deltas: Deltas, support: Array, query: Array, logits: Array) -> Metrics:
        views = range(1, 1 + config.equivariance_views)
        turned = jax.vmap(lambda task: task_deltas(models, params, task))(_turned(support, views))
        norms = jax.vmap(lambda other: hyperlora.difference_norm(deltas, other))(jax.lax.stop_gradient(turned))
        if config.equivariance == "outputs":
            mapped = turned_answers(models, params, turned, query, views)
            where = jnp.broadcast_to(query[:, 1] != PADDING, mapped.shape[:-1])
            loss = hyperlora.output_equivariance_loss(jnp.broadcast_to(logits, mapped.shape), mapped, where)
        else:
            loss = jnp.mean(jax.vmap(lambda other: hyperlora.equivariance_loss(deltas, other))(turned))
        return {"equivariance_loss": loss, "equiv_delta_norm": jnp.mean(norms)}

    report = {name: jnp.mean(values) for name, values in jax.vmap(one)(batch["support"], batch["query"]).items()}
    loss = report["task_loss"]
    if weights.loo_weight > 0:
        loss = loss + jnp.where(step >= weights.loo_start, weights.loo_weight, 0.0) * report["loo_loss"]
    if weights.equivariance_weight > 0:
        staged = jnp.where(step >= weights.equivariance_start, weights.equivariance_weight, 0.0)
        loss = loss + staged * report["equivariance_loss"]
    return loss, report


def meta_step(state: Learner, batch: Batch, *, config: RlanConfig, models: RlanModels) -> tuple[Learner, Metrics]:
    """One update on one batch; pure."""
    rate = schedules.learning_rate(
        state.step,
        config.learning_rate,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        steps=config.steps,
    )
    after, seen = gradient_step(
        state,
        lambda params: meta_loss(params, batch, state.step, config=config, models=models),
        tx=_optimizer(config),
        rates={"learning_rate": rate, "weight_decay": config.weight_decay},
    )
    return after, seen.aux | {"loss": seen.loss, "grad_norm": optax.tree.norm(seen.grads), "lr": rate}


def eval_step(params: dict[str, Params], batch: Batch, *, models: RlanModels) -> Metrics:
    """Held-out metrics of a batch, with four controls: no deltas, those of the next task, the copied input, a table.

    The table is `grids.colour_table` of the same examples. An answer is scored in the size that the examples say: what
    it lacks of the true one is wrong. Each metric is the mean over the tasks of that over their inputs.
    """
    support, query, sizes = batch["support"], batch["query"], batch["size"]
    deltas, others, held_out = jax.vmap(lambda task: leave_one_out_deltas(models, params, task))(support)
    is_query = jax.vmap(is_example)(query)
    foreign = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), deltas)
    over_tasks = jax.vmap(masked_mean)

    def score(delta: Deltas, pair: Array, size: Array) -> tuple[Array, ...]:
        logits = answers(models, params, delta, pair[0])
        predicted = jnp.where(grids.inside(size, pair.shape[-1]), jnp.argmax(logits, axis=-1), PADDING)
        return grid_loss(logits, pair[1])[0], *grid_scores(jnp.stack([predicted.astype(jnp.int32), pair[1]]))

    def left_out(delta: Deltas, pair: Array) -> Array:
        return grid_loss(answers(models, params, delta, pair[0]), pair[1])[1]

    report: Metrics = {}
    for name, used in (("", deltas), ("_zeroed", hyperlora.zeroed(deltas)), ("_foreign", foreign)):
        scores = jax.vmap(jax.vmap(score, in_axes=(None, 0, 0)))(used, query, sizes)
        means = [jnp.mean(over_tasks(values, is_query)) for values in scores]
        report |= dict(zip((f"nll{name}", f"pixel{name}", f"exact{name}"), means, strict=True))
    copied = jax.vmap(jax.vmap(grid_scores))
    mapped = jax.vmap(lambda table, task: task.at[:, 0].set(table[task[:, 0]]))
    for name, pairs in (("copy", query), ("table", mapped(jax.vmap(grids.colour_table)(support), query))):
        for metric, values in zip(("pixel", "exact"), copied(pairs), strict=True):
            report[f"{metric}_{name}"] = jnp.mean(over_tasks(values, is_query))
    can_hold_out = jnp.any(held_out, axis=1)
    loo, loo_copy = jax.vmap(jax.vmap(left_out))(others, support), copied(support)[0]
    # Copying is a baseline where answers have the shape of their inputs.
    keeps_shape = jnp.all((support[:, :, 0] == PADDING) == (support[:, :, 1] == PADDING), axis=(1, 2, 3))
    for name, where in (("", can_hold_out), ("_same_shape", can_hold_out & keeps_shape)):
        accuracy, copy = (masked_mean(over_tasks(values, held_out), where) for values in (loo, loo_copy))
        report |= {
            f"loo_accuracy{name}": accuracy,
            f"loo_accuracy_copy{name}": copy,
            f"loo_lift{name}": accuracy - copy,
        }
    report["loo_skipped_ratio"] = jnp.mean(~can_hold_out, dtype=jnp.float32)
    report["lora_diversity"] = hyperlora.diversity(deltas)
    return report | hyperlora.magnitudes(deltas)


def view_predictions(
    models: RlanModels,
    params: dict[str, Params],
    support: Array,
    grid: Array,
    size: Array,
    permutations: Array,
    *,
    take_best_step: bool = False,
) -> Array:
    """Answers to all views of a task, mapped back.

    Args:
      models: static.
      params: of `grid` and `hypernet`.
      support: int32[N, 2, S, S].
      grid: int32[S, S], the input to answer.
      size: int32[2], rows and columns of the answer, of `grids.output_size`.
      permutations: int32[k, 11], of `grids.colour_permutations`.
      take_best_step: answer with the surest step of the solver, not its last.

    Returns:
      int32[8 k, S, S], views of one dihedral element in a row; padding outside of the answer.
    """
    pairs = jnp.concatenate([support.reshape(-1, *grid.shape), grid[None]])
    seen, where = [], []
    for index in range(grids.DIHEDRAL):
        seen.append(_all_views(pairs, index, permutations, grids.forward))
        turned = size[::-1] if grids.TRANSPOSES[index] else size
        where.append(jnp.broadcast_to(grids.inside(turned, grid.shape[0]), (len(permutations), *grid.shape)))

    def answer(view: Array, content: Array) -> Array:
        deltas = task_deltas(models, params, view[:-1].reshape(support.shape))
        logits = models.grid.logits(params["grid"], deltas, models.grid.solve(params["grid"], deltas, view[-1]))
        chosen = best_step(logits, content) if take_best_step else -1
        return jnp.where(content, jnp.argmax(logits[chosen], axis=-1), PADDING).astype(jnp.int32)

    predicted = jax.vmap(answer)(jnp.concatenate(seen), jnp.concatenate(where))
    predicted = predicted.reshape(grids.DIHEDRAL, len(permutations), *grid.shape)
    back = [
        jax.vmap(lambda view, row, index=index: grids.inverse(view, index, row))(predicted[index], permutations)
        for index in range(grids.DIHEDRAL)
    ]
    return jnp.concatenate(back)


def _turned(pairs: Array, views: Sequence[int]) -> Array:
    """All grids int32[N, 2, S, S] turned alike, once for each dihedral element; colours stay."""
    flat = pairs.reshape(-1, *pairs.shape[2:])
    return jnp.stack(
        [_all_views(flat, index, _IDENTITY[None], grids.forward)[0].reshape(pairs.shape) for index in views]
    )


def _all_views(pairs: Array, index: int, permutations: Array, view: Any) -> Array:
    return jax.vmap(lambda row: jax.vmap(lambda one: view(one, index, row))(pairs))(permutations)


_IDENTITY = grids.colour_permutations(0, 1)[0]
