"""One late reward for a whole stream: LensNet learns what to keep from what is asked at the end.

    L = -mean over steps t of trajectories i that came to their end of A_i log pi(dropped_it) - entropy_weight * H

The reward R_i is minus the loss of the answer, measured once; A_i is R_i relative to the G trajectories of the same
stream, and all steps of i share it: none of them was rewarded itself. Overlong trajectories are left out
(`losses.trajectories.shared_advantages`). A batch is used for one update, by the policy that drew it: the clipped ratio
of GRPO is 1 then, and its gradient this one.

`supo_step(state, batch, frozen) -> (state, metrics)` is pure and compiled once; base model and GistNet are frozen.

References:
  Lu et al., SUPO: Scaling LLM Multi-turn RL with End-to-end Summarization-based Context Management, arXiv:2510.06727.
  There a model writes summaries of what no longer fits; here a policy chooses the blocks that stay.
"""

import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax import losses
from lensjax._numerics import masked_mean
from lensjax._settings import Bound, NonNegative, Positive, PositiveInt, Repeats, settings
from lensjax.losses.advantages import group_advantages
from lensjax.losses.trajectories import shared_advantages
from lensjax.models import Models, Params
from lensjax.models.decision import split
from lensjax.training.metrics import Metrics
from lensjax.training.optim import schedules
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch
from lensjax.training.steps import trajectories
from lensjax.training.steps.trajectories import Trajectory
from lensjax.training.steps.update import Learner, all_parts, gradient_step, init_learner, split_parts


@settings("supo")
class SupoConfig:
    """Training on streams that are longer than the context, rewarded at their end."""

    steps: PositiveInt = 600
    learning_rate: Positive = 3e-4
    trajectories: Annotated[int, Bound(2, 1024)] = 8
    """Trajectories of each stream of a batch [G], which are compared with each other."""
    window: PositiveInt = 16
    """Blocks that a context holds [R]."""
    refocus_steps: Repeats = 14
    """Refocus steps of a trajectory, at most [S]: one that needs more is overlong."""
    draws: Repeats = 8
    """Blocks dropped in one refocus step, at most [M]: each draw may be to drop nothing."""
    temperature: Positive = 0.25
    """Of the draws, in units of scores: how far the policy explores."""
    reward: Literal["late", "steps"] = "late"
    """`late` measures a trajectory once, at its end; `steps` rewards each step with what it did to the loss of the
    answer, which is measured after every step as if the stream had ended there."""
    advantages: Literal["mean", "standardised", "leave_one_out"] = "standardised"
    """Among the trajectories of a stream: Dr.GRPO, GRPO or RLOO."""
    entropy_weight: NonNegative = 0.001


def init_supo_state(key: Array, *, recipe: Recipe, params: dict[str, Params]) -> tuple[Learner, dict[str, Params]]:
    """A state before the first step.

    Args:
      key: PRNG key, consumed.
      recipe: read is the optimizer.
      params: parameters of `base`, `gist` and `lens` to start from; that of `lens` is copied.

    Returns:
      `Learner` at step 0; and `base` and `gist`, as they are.
    """
    trained, frozen = split_parts({name: params[name] for name in ("base", "gist", "lens")}, ("lens",))
    return init_learner(key, trained, tx=make_optimizer(recipe.optimizer)), frozen


def supo_step(
    state: Learner, batch: Batch, frozen: dict[str, Params], *, recipe: Recipe, settings: SupoConfig, models: Models
) -> tuple[Learner, Metrics]:
    """One update on the trajectories of one batch; compile it as `train_step`.

    Args:
      state: the state before the step.
      batch: `tokens` int32[B, T]: streams, which end with a question, and its answer.
      frozen: parameters of `base` and `gist`.
      recipe: static; read are shapes and the optimizer.
      settings: static.
      models: static.

    Returns:
      The next state, and scalars by name.
    """
    played = roll_out(all_parts(state, frozen), state, batch, recipe=recipe, settings=settings, models=models)

    def loss_fn(params: dict[str, Params]) -> tuple[Array, Metrics]:
        return trajectory_loss({**frozen, **params}, batch, played, recipe=recipe, settings=settings, models=models)

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
    norm = optax.tree.norm(seen.grads["lens"])
    return after, seen.aux | {"loss": seen.loss, "grad_norm": norm, "lr": rate}


def roll_out(
    params: dict[str, Params], state: Learner, batch: Batch, *, recipe: Recipe, settings: SupoConfig, models: Models
) -> Trajectory:
    """G trajectories of every stream of a batch, leading axes [B, G]; of the state only step and key are read."""
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), (len(batch["tokens"]), settings.trajectories))

    def play(tokens: Array, key: Array) -> Trajectory:
        window = split(tokens, horizon=recipe.context.horizon)
        return trajectories.run(models, params, window, key, recipe.geometry, settings=settings)

    return jax.vmap(jax.vmap(play, (None, 0)))(jnp.asarray(batch["tokens"]), keys)


def trajectory_loss(
    params: dict[str, Params],
    batch: Batch,
    played: Trajectory,
    *,
    recipe: Recipe,
    settings: SupoConfig,
    models: Models,
) -> tuple[Array, Metrics]:
    """The loss of a batch of trajectories.

    Args:
      params: of all three models; it is differentiated by those of `lens`.
      batch: `tokens` int32[B, T].
      played: leading axes [B, G].
      recipe: shapes.
      settings: weights.
      models: all but the base model's reading are called.

    Returns:
      float32[], and scalars by name.
    """

    def judge(tokens: Array, group: Trajectory) -> tuple[Array, Array]:
        window = split(tokens, horizon=recipe.context.horizon)
        tree = trajectories.stream(models, params, window, recipe.geometry)
        log_prob = functools.partial(
            trajectories.log_prob, models, params["lens"], tree, geometry=recipe.geometry, settings=settings
        )
        return jax.vmap(log_prob)(group)

    log_probs, entropies = jax.vmap(judge)(jnp.asarray(batch["tokens"]), played)
    where = played.taken & played.has_ended[..., None]
    gained = jax.vmap(functools.partial(_advantages, settings=settings))(played)
    entropy = masked_mean(entropies, where)
    loss = losses.policy_gradient(log_probs, gained, where) - settings.entropy_weight * entropy
    ended = played.has_ended
    report = {
        "rl/reward": -masked_mean(played.nll[..., -1], ended),
        "rl/accuracy": masked_mean(jnp.all(played.matches, axis=-1).astype(jnp.float32), ended),
        "rl/overlong": 1 - jnp.mean(ended.astype(jnp.float32)),
        "rl/refocus_steps": jnp.mean(jnp.sum(played.taken, axis=-1, dtype=jnp.float32)),
        "rl/entropy": entropy,
    }
    return loss, jax.lax.stop_gradient(report)


def _advantages(group: Trajectory, *, settings: SupoConfig) -> Array:
    """Advantages of the steps of G trajectories of one stream, float32[G, S]."""
    taken, ended = group.taken, group.has_ended
    if settings.reward == "late":
        return shared_advantages(-group.nll[:, -1], ended, taken, baseline=settings.advantages)
    among = functools.partial(group_advantages, baseline=settings.advantages)
    where = taken & ended[:, None]
    return jax.vmap(among, 1, 1)(group.nll[:, :-1] - group.nll[:, 1:], where)
