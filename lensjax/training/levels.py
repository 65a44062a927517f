"""At which level variants of one history show its spans: what they have in common, and how far apart they are."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.working import MISSING, WorkingContext
from lensjax.losses.credit import contrastive_reward


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LevelComparison:
    """Every entry of V variants beside what the others show of its span."""

    same: Array
    """bool[V, U, W]: whether variant U, the entry's own among them, shows the span as the entry does."""
    other: Array
    """bool[V, U, W]: whether U shows it at another level, none of it missing."""
    finer: Array
    """float32[V, W]: +1 where the entry's level is finer than the mean level of those others, -1 where it is coarser; 0
    without any."""
    where: Array
    """bool[V, W]: entries between the sinks and the protected tail that have any."""


def compare_levels(variants: WorkingContext, valid: ArrayLike, geometry: Geometry) -> LevelComparison:
    """Compares every entry with what the other variants show of its span.

    Args:
      variants: V working contexts of one history, leading axis V.
      valid: bool[V], False for duplicates: neither they nor their entries are compared.
      geometry: their history.

    Returns:
      `LevelComparison`.
    """
    valid = jnp.asarray(valid)
    cuts = jax.vmap(lambda variant: contexts.to_cut(variant, geometry))(variants)

    def shown(other: Array, own: Array, start: Array, lod: Array) -> tuple[Array, Array]:
        """bool[W]: entries whose span both cuts show whole; int32[W]: the level of the other one."""
        there = jnp.take(other, start, mode="clip")
        # What either shows as one entry counts as a whole or not at all: its first token answers for it.
        width = geometry.block_size ** jnp.maximum(there, lod)
        first = start // width * width
        whole = (jnp.take(other, first, mode="clip") != MISSING) & (jnp.take(own, first, mode="clip") != MISSING)
        return whole, there

    of_others = jax.vmap(shown, (0, None, None, None))
    whole, levels = jax.vmap(of_others, (None, 0, 0, 0))(cuts, cuts, variants.start, variants.lod)
    is_same = levels == variants.lod[:, None]
    other = whole & ~is_same & valid[None, :, None]
    count = jnp.sum(other, axis=1, dtype=jnp.float32)
    where = (count > 0) & variants.valid & geometry.is_free(variants.start) & valid[:, None]
    level = jnp.sum(jnp.where(other, levels, 0), axis=1).astype(jnp.float32) / jnp.maximum(count, 1)
    finer = jnp.where(where, jnp.sign(level - variants.lod.astype(jnp.float32)), 0.0)
    return LevelComparison(is_same & valid[None, :, None], other, finer, where)


def conflicts(levels: LevelComparison, advantages: ArrayLike) -> Array:
    """Entries that better and worse variants have in common: the same span at the same level.

    Args:
      levels: of V variants.
      advantages: float32[V].

    Returns:
      bool[V, W].
    """
    advantages = jnp.asarray(advantages)[None, :, None]
    shared = (jnp.any(levels.same & chosen, axis=1) for chosen in (advantages > 0, advantages < 0))
    return jnp.logical_and(*shared)


def span_contrasts(
    losses: ArrayLike, variants: WorkingContext, valid: ArrayLike, geometry: Geometry, *, threshold: ArrayLike
) -> tuple[Array, Array, Array]:
    """Whether the level of each entry was worth choosing: group contrastive masking of spans.

        A_vi = losses.credit.contrastive_reward(-nll, does: shows the span of i at the level of i, threshold)

    over the variants that show that span whole. The auxiliary action of the paper, a construction, is to show a span
    in detail: where those that do are better by more than the threshold, both sides learn to want it, where they are
    worse, neither does, and in between nothing is learned. How much better says nothing.

    Args:
      losses: float32[V], nats per token.
      variants: V working contexts of one history, leading axis V.
      valid: bool[V], False for duplicates.
      geometry: their history.
      threshold: float32[], at least 0, nats per token.

    Returns:
      What `preferences.span_advantages` does: float32[V, W], +1 where the level of the entry came out better and -1
      where it came out worse; float32[V, W], finer or coarser; bool[V, W], entries of which something is learned.

    References:
      Wang et al., GeometryZero (GCPO), arXiv:2506.07160. Its reward is of those that construct alone, and the others
      get their share through the group's baseline; here both sides have it by the levels.
    """
    levels = compare_levels(variants, valid, geometry)
    rewards = -jnp.asarray(losses)

    def contrast(does: Array, does_not: Array) -> Array:
        return contrastive_reward(rewards, does, does | does_not, threshold=threshold)

    over_entries = jax.vmap(jax.vmap(contrast, (1, 1)))
    found = over_entries(levels.same, levels.other)
    where = levels.where & (found != 0)
    return jnp.where(where, found, 0.0), jnp.where(where, levels.finer, 0.0), where


def level_distances(variants: WorkingContext, geometry: Geometry) -> Array:
    """How differently two variants show the history: share of its tokens that they show at different levels.

    Of the tokens between the sinks and the protected tail. A token that one of the two does not show is different.

    Args:
      variants: V working contexts of one history, leading axis V.
      geometry: their history.

    Returns:
      float32[V, V] in [0, 1], symmetric, 0 on the diagonal.
    """
    cuts = jax.vmap(lambda variant: contexts.to_cut(variant, geometry))(variants)
    is_free = geometry.is_free(jnp.arange(geometry.history))
    differ = (cuts[:, None] != cuts[None, :]).astype(jnp.float32)
    return jax.vmap(jax.vmap(lambda tokens: masked_mean(tokens, is_free)))(differ)
