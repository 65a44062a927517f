"""What a teacher's worths ask of the scores of a context, and which sequences are taught rather than left to prefer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax import losses
from lensjax._numerics import masked_mean
from lensjax.context import nodes
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext
from lensjax.models import LanguageModel, Models, Params
from lensjax.models.decision import Window, split
from lensjax.training import key_tokens, teachers
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import ScoredVariants
from lensjax.training.teachers import DistillConfig

WIDEST = 1 - 1e-6
"""Scores beyond it are taken for it: what tanh rounds to 1 has no finite inverse."""


def node_worths(
    base: LanguageModel, params: Params, window: Window, geometry: Geometry, *, settings: DistillConfig, short: int
) -> Array:
    """What each node of a history is worth in full to the need of the horizon, by a teacher.

    Each token of the horizon weighs by how much the whole history lowers its loss below that of a short one.

    Args:
      base: the base model.
      params: its parameters; no gradient reaches them.
      window: history and horizon.
      geometry: the history.
      settings: the teacher, and the power of its worths.
      short: tokens of the short history, see `key_tokens.token_gain`.

    Returns:
      float32[N], at least 0.
    """
    fixed = jax.lax.stop_gradient(params)
    need = jax.nn.relu(key_tokens.token_gain(base, fixed, window, short=short).gain)
    worth = teachers.worth(base, fixed, window, geometry, teacher=settings.teacher, weights=need)
    targets = jax.lax.stop_gradient(nodes.pool_tokens(worth, geometry))
    return jnp.maximum(targets, 0.0) ** settings.sharpness


def node_logits(scores: ArrayLike, context: WorkingContext, geometry: Geometry) -> Array:
    """The policy's scores of the nodes of a history, before tanh: with it, what all of them share leaves no gradient.

    Args:
      scores: float32[W], the policy's, of a context that covers the history from its first token on.
      context: W entries.
      geometry: the history.

    Returns:
      float32[N].
    """
    logits = jnp.arctanh(jnp.clip(jnp.asarray(scores), -WIDEST, WIDEST))
    return nodes.pool_scores(logits, context, geometry)


def taught_nodes(geometry: Geometry) -> Array:
    """bool[N]: the blocks that may be collapsed, which a teacher speaks of."""
    return nodes.eligible(geometry, None) & jnp.asarray(nodes.table(geometry).lod == 1)


def lesson(
    scores: ArrayLike,
    contexts: WorkingContext,
    where: ArrayLike,
    worths: ArrayLike,
    geometry: Geometry,
    *,
    temperature: ArrayLike,
) -> Array:
    """Loss of the policy's scores against a teacher's worths, mean over some contexts of one history.

    Args:
      scores: float32[V, W], the policy's.
      contexts: V of them, that cover the history from its first token on where they count.
      where: bool[V], contexts that count.
      worths: float32[N], of `node_worths`.
      geometry: the history.
      temperature: float32[], above 0.

    Returns:
      float32[], in nats (`losses.listwise_distillation`).
    """
    counted = jnp.where(jnp.asarray(where)[:, None], scores, 0.0)
    logits = jax.vmap(lambda row, context: node_logits(row, context, geometry))(counted, contexts)
    among = taught_nodes(geometry)
    each = jax.vmap(lambda row: losses.listwise_distillation(row, worths, among, temperature=temperature))(logits)
    return masked_mean(each, where)


def needs_teacher(nll: ArrayLike, where: ArrayLike, *, gain: ArrayLike, most: ArrayLike) -> Array:
    """Whether too few of a sequence's rollouts are any good for it to learn from preferences between them.

        mean over rollouts of [nll_recency - nll_v >= gain]  <=  most

    Args:
      nll: float32[V], recency first.
      where: bool[V], variants that are compared; recency is no rollout.
      gain: float32[], by how many nats a rollout must be below recency to be good enough.
      most: float32[] in [0, 1], the largest share of good rollouts with which a sequence is taught.

    Returns:
      bool[]; True where there is no rollout.

    References:
      Lv et al., Towards a Unified View of Large Language Model Post-Training, arXiv:2509.04419: Hybrid Post-Training
      takes the supervised loss of a question where the mean reward of its rollouts does not exceed a gate, else the
      loss of reinforcement learning. Rewards there are 0 or 1; that a gain over recency is what makes a 1 is a choice
      made here.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.training import lessons
      >>> nll, every = jnp.array([2.0, 1.5, 2.5]), jnp.ones(3, bool)
      >>> [bool(lessons.needs_teacher(nll, every, gain=gain, most=0.0)) for gain in (0.25, 0.75)]
      [False, True]
    """
    nll = jnp.asarray(nll)
    good = (nll[0] - nll >= jnp.asarray(gain)).astype(jnp.float32)
    return masked_mean(good, jnp.asarray(where).at[0].set(False)) <= jnp.asarray(most)


def with_worths(
    scored: ScoredVariants, params: Params, tokens: Array, *, recipe: Recipe, models: Models
) -> ScoredVariants:
    """Scored variants with what the teacher of `recipe.distill` says beside them.

    Args:
      scored: leading axis B.
      params: parameters of the base model.
      tokens: int32[B, T].
      recipe: static.
      models: static.

    Returns:
      The same, with `worth`.
    """

    def one(row: Array) -> Array:
        window = split(row, horizon=recipe.context.horizon)
        return node_worths(models.base, params, window, recipe.geometry, settings=recipe.distill, short=recipe.short)

    return replace(scored, worth=jax.vmap(one)(tokens))
