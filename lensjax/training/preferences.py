"""From variant losses to supervision: advantages, preference pairs, span targets."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.working import MISSING, WorkingContext
from lensjax.losses.advantages import importance_weights
from lensjax.training.levels import compare_levels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreferencePairs:
    """P pairs of variants of one sequence; rows beyond the number of pairs are masked.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> pairs = lx.select_pairs(jnp.array([2.0, 1.0, 4.0]), jnp.ones(3, bool), hard_negative_ratio=1.0, max_pairs=3)
      >>> pairs.gap.tolist()
      [3.0, 1.0, 2.0]
    """

    better: Array
    """int32[P]: variant with the lower loss."""
    worse: Array
    """int32[P]."""
    gap: Array
    """float32[P]: loss of the worse minus loss of the better, in the unit of the losses given; at least 0."""
    valid: Array
    """bool[P]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairTargets:
    """Span targets of P pairs, on both variants: axis 1 is (better, worse)."""

    target: Array
    """float32[P, 2, W]: +1 asks for detail, -1 for less of it, 0 where not supervised."""
    where: Array
    """bool[P, 2, W]: entries that are supervised."""
    weight: Array
    """float32[P, 2, W]: tokens covered, 0 where not supervised. A span weighs the same on both sides of a pair."""


def advantage_deltas(losses: ArrayLike) -> Array:
    """delta_v = nll(v) - nll(baseline), with the baseline at index 0.

    Args:
      losses: float[..., V], nats per token.

    Returns:
      float[..., V]; negative is better than the baseline.
    """
    losses = jnp.asarray(losses)
    return losses - losses[..., :1]


def select_pairs(
    losses: ArrayLike, valid: ArrayLike, *, hard_negative_ratio: ArrayLike, max_pairs: int
) -> PreferencePairs:
    """The best variant against every other one, then the remaining pairs with the largest differences.

    Args:
      losses: float32[V], nats per token (or any loss).
      valid: bool[V], False for duplicates.
      hard_negative_ratio: float32[], share of the remaining pairs that is kept, largest |difference| first
        (rounded up to a whole pair).
      max_pairs: static bound on the pairs kept.

    Returns:
      `PreferencePairs` with P = min(max_pairs, V (V - 1) / 2) rows. Pairs of equal losses hold no preference and are
      masked, as are those with a loss that is NaN: it is for the objective to say so.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> pairs = lx.select_pairs(jnp.array([2.0, 1.0, 4.0]), jnp.ones(3, bool), hard_negative_ratio=0.0, max_pairs=3)
      >>> pairs.better.tolist(), pairs.worse.tolist(), pairs.valid.tolist()
      ([1, 1, 0], [2, 0, 2], [True, True, False])
    """
    losses, valid = jnp.asarray(losses), jnp.asarray(valid)
    first, second = (jnp.asarray(index, jnp.int32) for index in np.triu_indices(losses.shape[0], k=1))
    gap = jnp.abs(losses[first] - losses[second])
    usable = valid[first] & valid[second] & (gap > 0)
    gap = jnp.where(usable, gap, 0.0)
    # `argmin` takes a NaN for the least of all.
    best = jnp.argmin(jnp.where(valid & ~jnp.isnan(losses), losses, jnp.inf))
    holds_best = usable & ((first == best) | (second == best))

    rest = jnp.sum(usable & ~holds_best, dtype=jnp.float32)
    # A ratio times a count that should be whole may come out a rounding error above it.
    kept_rest = jnp.ceil(jnp.asarray(hard_negative_ratio) * rest - 1e-4).astype(jnp.int32)
    kept = jnp.sum(holds_best, dtype=jnp.int32) + kept_rest
    # Three groups in order: pairs with the best variant, the rest by falling difference, unusable ones.
    group = jnp.where(holds_best, 0, jnp.where(usable, 1, 2))
    order = jnp.lexsort((-gap, group))[:max_pairs]
    first, second, gap = first[order], second[order], gap[order]
    is_first_better = (losses[first] < losses[second]) | jnp.isnan(losses[second])
    return PreferencePairs(
        better=jnp.where(is_first_better, first, second),
        worse=jnp.where(is_first_better, second, first),
        gap=gap,
        valid=jnp.arange(order.shape[0]) < kept,
    )


def tie_share(losses: ArrayLike, valid: ArrayLike) -> Array:
    """Share of the pairs of valid variants whose losses are equal, float32[]; 0 without pairs, NaN with a NaN."""
    losses, valid = jnp.asarray(losses), jnp.asarray(valid)
    first, second = np.triu_indices(losses.shape[0], k=1)
    both = valid[first] & valid[second]
    gap = losses[first] - losses[second]
    tied = jnp.where(jnp.isnan(gap), gap, (gap == 0).astype(jnp.float32))
    return jnp.sum(jnp.where(both, tied, 0.0)) / jnp.maximum(jnp.sum(both, dtype=jnp.float32), 1)


def span_targets(
    variants: WorkingContext,
    pairs: PreferencePairs,
    geometry: Geometry,
    *,
    worse_only: bool = False,
) -> PairTargets:
    """What each entry of a pair should ask for, so that its variant comes to show what the better one shows.

    Where the better variant shows a span at a finer level than the worse one does, every entry of either inside that
    span gets +1 ("this span deserves detail"); where coarser, -1. On a token that is in full already, +1 means "do not
    collapse me": what is legal is the allocator's business. Not supervised: spans both show alike, the protected
    tail, and spans that one of the two does not cover.

    Weighted by the tokens that entries cover, a span counts as much on one side, where it may be one gist, as on the
    other, where it may be 64 tokens: a policy that asks for every gist and for no token gains nothing by it. Counted by
    entries, tokens outvote gists, and the policy learns to like whatever is in full already.

    Args:
      variants: V working contexts of one history, leading axis V.
      pairs: P pairs of them.
      geometry: their history.
      worse_only: the recipe as it is usually written: only entries of the worse variant. Its gists then ask for
        detail and its tokens for less, always: the label is a function of the entry's level, and nothing about the
        content is learned. Kept for the ablation that shows it.

    Returns:
      `PairTargets`.

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> geometry = lx.Geometry(history=6, block_size=2, max_lod=1, recent_tokens=2)
      >>> cuts = jnp.array([[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
      >>> variants = jax.jit(jax.vmap(lambda cut: lx.from_cut(cut, geometry, capacity=5)))(cuts)
      >>> pairs = lx.select_pairs(jnp.array([1.0, 2.0]), jnp.ones(2, bool), hard_negative_ratio=1.0, max_pairs=1)
      >>> targets = jax.jit(lx.span_targets, static_argnums=2)(variants, pairs, geometry)
      >>> targets.target[0].tolist()  # the better shows tokens 0 and 1 in full
      [[1.0, 1.0, -1.0, 0.0, 0.0], [1.0, -1.0, -1.0, 0.0, 0.0]]
    """
    cuts = jax.vmap(lambda variant: contexts.to_cut(variant, geometry))(variants)
    better_cut, worse_cut = cuts[pairs.better], cuts[pairs.worse]
    # Cuts of one tree are nested: inside a span that either shows as one entry, the sign cannot change.
    sign = jnp.sign(worse_cut - better_cut).astype(jnp.float32)
    covered = (better_cut != MISSING) & (worse_cut != MISSING)
    # What either shows as one entry counts as a whole or not at all: its first token answers for it.
    width = geometry.block_size ** jnp.maximum(jnp.maximum(better_cut, worse_cut), 0)
    first = jnp.arange(geometry.history)[None] // width * width
    covered = jnp.take_along_axis(covered, first, axis=1)

    members = jnp.stack([pairs.better, pairs.worse], axis=1)
    start, valid = variants.start[members], variants.valid[members]
    at_start = jax.vmap(lambda row, index: jnp.take(row, index, mode="clip"))
    target = at_start(sign, start)
    where = valid & at_start(covered, start) & geometry.is_free(start) & (target != 0)
    where &= pairs.valid[:, None, None]
    if worse_only:
        where &= jnp.asarray([False, True])[None, :, None]
    spans = contexts.spans(variants, block_size=geometry.block_size)[members].astype(jnp.float32)
    return PairTargets(jnp.where(where, target, 0.0), where, jnp.where(where, spans, 0.0))


def span_advantages(
    losses: ArrayLike,
    variants: WorkingContext,
    valid: ArrayLike,
    geometry: Geometry,
) -> tuple[Array, Array, Array]:
    """What the level of each entry was worth, beside the variants that show its span at another level.

        A_vi = mean of nll(u) over the u that show the span of i at another level  -  nll(v)

    One advantage for the whole variant credits each of its spans with what all of them did, and to spans that all
    variants show alike as well. Here each span has a baseline of its own. Between two variants it is the difference of
    their losses, on the entries that `span_targets` supervises.

    Args:
      losses: float32[V], nats per token.
      variants: V working contexts of one history, leading axis V.
      valid: bool[V], False for duplicates.
      geometry: their history.

    Returns:
      float32[V, W], positive where the variant's level came out better; float32[V, W], +1 where that level is finer
      than the mean level of those that it is compared with, -1 where it is coarser; and bool[V, W]: entries before the
      protected tail whose span some other variant shows at another level. The others have 0 in both.
    """
    losses = jax.lax.stop_gradient(jnp.asarray(losses))
    levels = compare_levels(variants, valid, geometry)
    count = jnp.sum(levels.other, axis=1, dtype=jnp.float32)
    baseline = jnp.sum(jnp.where(levels.other, losses[None, :, None], 0.0), axis=1) / jnp.maximum(count, 1)
    return jnp.where(levels.where, baseline - losses[:, None], 0.0), levels.finer, levels.where


def pair_weights(
    values: ArrayLike, pairs: PreferencePairs, where: ArrayLike, *, beta: ArrayLike, most: ArrayLike
) -> Array:
    """Importance weights of pairs: how much rather the policy would have drawn the two than the sampler did.

        min(most, rho_b rho_w),    rho_v = n pi(v),    pi = softmax(beta h) over the n variants that are compared

    A pair is two draws. The sampler is taken to draw each of the variants at hand as readily as any other: its density
    is not kept, and the baseline has none. Where the policy draws some itself, `drawn_pair_weights` knows better.

    Args:
      values: float32[V], the policy's value of each variant; constants.
      pairs: P pairs.
      where: bool[V], variants that are compared.
      beta: float32[], above 0: nats of log-probability that a unit of value stands for.
      most: float32[], above 0, bound on a weight.

    Returns:
      float32[P].
    """
    where = jnp.asarray(where)
    log_policy = jax.nn.log_softmax(jnp.where(where, jnp.asarray(beta) * jnp.asarray(values), -1e30))
    log_sampler = -jnp.log(jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1))
    return importance_weights(log_policy[pairs.better] + log_policy[pairs.worse], 2 * log_sampler, most=most)


def drawn_pair_weights(log_ratio: ArrayLike, pairs: PreferencePairs, *, most: ArrayLike) -> Array:
    """Importance weights of pairs of variants whose probabilities are known.

        min(most, rho_b rho_w),    rho_v = exp(log_ratio_v)

    A pair is two draws, taken as independent: how many of a sequence's draws are the policy's own is fixed, which for
    n draws is a difference of order 1 / n.

    Args:
      log_ratio: float32[V], of `ScoredVariants`; constants.
      pairs: P pairs.
      most: float32[], above 0, bound on a weight.

    Returns:
      float32[P].
    """
    log_ratio = jnp.asarray(log_ratio)
    return importance_weights(log_ratio[pairs.better] + log_ratio[pairs.worse], 0.0, most=most)
