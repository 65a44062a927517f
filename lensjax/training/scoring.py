"""One window to its scored variants: baseline and rollouts of the history, and their losses on the horizon."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.context.geometry import CutGeometry
from lensjax.context.rollouts import collapses_for_length, is_distinct, sample_cut, sample_rollouts
from lensjax.context.working import Entries, WorkingContext
from lensjax.models import Models, Params
from lensjax.models.decision import build_tree, split
from lensjax.runs.config import Config, FocusConfig
from lensjax.training import nll

Batch = dict[str, Array]
"""`tokens` int32[B, T]; where answers are known also `answers` int32[B, A], first tokens of the blocks to be shown."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoredVariants:
    """The variants of one sequence and their losses."""

    contexts: WorkingContext
    """V working contexts, the baseline first."""
    distinct: Array
    """bool[V]: False for duplicates of an earlier variant."""
    entries: Entries
    """What models read of them, leading axis V."""
    losses: Array
    """float32[V]: nats per token on the horizon."""


def score_variants(
    models: Models,
    params: dict[str, Params],
    tokens: Array,
    key: Array,
    length: ArrayLike,
    lod2_share: ArrayLike,
    *,
    config: Config,
) -> ScoredVariants:
    """Draws the variants of one history and measures each on the horizon behind it.

    Args:
      models: the models.
      params: parameters of `base` and `gist`.
      tokens: int32[T].
      key: PRNG key, consumed.
      length: int32[], entries of every variant, at most `config.context_capacity`; may be traced.
      lod2_share: float32[], see `rollouts.sample_cut`.
      config: shapes.

    Returns:
      `ScoredVariants` with V = N + 1.
    """
    shape, capacity = config.context, config.context_capacity
    window = split(tokens, horizon=shape.horizon)
    tree = build_tree(models, params, window.history, config)
    base_line = contexts.baseline(length, window=shape.history, capacity=capacity)
    if shape.local_edits:
        drawn, _ = local_rollouts(
            key,
            length,
            lod2_share,
            rollouts=shape.rollouts,
            edits=shape.local_edits,
            geometry=shape.geometry,
            capacity=capacity,
        )
    else:
        drawn, _ = sample_rollouts(
            key, length, lod2_share, rollouts=shape.rollouts, geometry=shape.geometry, capacity=capacity
        )
    variants = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), base_line, drawn)
    losses, entries = nll.variant_losses(models.base, params["base"], tree, variants, window.horizon)
    # A rollout may be the baseline, too: where nothing has to be collapsed each of them is.
    cuts = jax.vmap(lambda variant: contexts.to_cut(variant, window=shape.history))(variants)
    return ScoredVariants(variants, is_distinct(cuts), entries, losses)


def local_rollouts(
    key: Array,
    length: ArrayLike,
    lod2_share: ArrayLike,
    *,
    rollouts: int,
    edits: int,
    geometry: CutGeometry,
    capacity: int,
) -> tuple[WorkingContext, Array]:
    """Draws one random working context, and N - 1 that a few random swaps make of it.

    Independent rollouts differ nearly everywhere, and which of the spans made one the better takes many of them to
    learn. These differ in a few spans, so that a preference says something of each.

    Args:
      key: PRNG key, consumed.
      length: int32[], entries of every context; may be traced.
      lod2_share: float32[], of the first one; see `rollouts.sample_cut`.
      rollouts: N, static.
      edits: static number of swaps, of one expansion and the collapse that pays for it; fewer where no more are legal.
      geometry: the window.
      capacity: static number of entries W, at least the length.

    Returns:
      A `WorkingContext` with a leading axis N, and bool[N]: which of them differ from all before them.
    """
    cut_key, swap_key = jax.random.split(key)
    first = sample_cut(cut_key, collapses_for_length(length, geometry), lod2_share, geometry)
    centre, settings = allocator.from_cut(first, geometry), FocusConfig(max_edits=edits, cooldown=0)

    def swapped(scores: Array) -> Array:
        return allocator.to_cut(allocator.swap(centre, scores, geometry, settings=settings)[0], geometry)

    # The allocator makes the swaps that random scores of blocks ask for. A gist of gists has the best score of its
    # blocks, and so is opened down to the tokens: halfway the model sees little more, and no preference comes of it.
    scores = [jax.random.uniform(swap_key, (rollouts - 1, geometry.blocks(1)))]
    for lod in range(2, geometry.max_lod + 1):
        members = scores[-1][:, : geometry.blocks(lod) * geometry.block_size]
        scores.append(members.reshape(rollouts - 1, geometry.blocks(lod), geometry.block_size).max(axis=-1))
    others = jax.vmap(swapped)(jnp.concatenate(scores, axis=1))
    cuts = jnp.concatenate([first[None], others])
    to_context = jax.vmap(lambda cut: contexts.from_cut(cut, block_size=geometry.block_size, capacity=capacity))
    return to_context(cuts), is_distinct(cuts)
