"""How well a policy agrees with what was measured: margins of pairs, values of variants, correlation."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext
from lensjax.training.preferences import PairTargets, PreferencePairs

# Standard deviations below this are rounding noise of float32 means: a correlation with them is undefined.
MIN_STD = 1e-5


def pair_margins(scores: ArrayLike, targets: PairTargets, pairs: PreferencePairs) -> Array:
    """Mean of target * score over a pair's supervised entries, weighted by the tokens they cover.

    Args:
      scores: float[V, W], policy scores.
      targets: span targets of P pairs.
      pairs: the pairs.

    Returns:
      float[P]: positive where the policy asks for the better variant; 0 without supervised entries.
    """
    picked = jnp.asarray(scores)[jnp.stack([pairs.better, pairs.worse], axis=1)]
    total = jnp.sum(jnp.where(targets.where, targets.weight * targets.target * picked, 0), axis=(1, 2))
    return total / jnp.maximum(jnp.sum(targets.weight, axis=(1, 2)), 1)


def agreement(margins: ArrayLike, valid: ArrayLike) -> tuple[Array, Array]:
    """Share of pairs in which the policy asks for the measured winner; an undecided pair counts one half.

    Args:
      margins: float[..., P], from `pair_margins`.
      valid: bool[..., P], pairs with at least one supervised entry.

    Returns:
      float32[] share over all pairs given (0 without pairs), int32[] number of pairs.
    """
    valid = jnp.asarray(valid)
    count = jnp.sum(valid, dtype=jnp.int32)
    return jnp.sum(jnp.where(valid, _wins(margins), 0.0)) / jnp.maximum(count, 1).astype(jnp.float32), count


def success(margins: ArrayLike, gaps: ArrayLike, valid: ArrayLike) -> Array:
    """Share of the measured differences, in nats, in which the policy asks for the winner.

        success = sum_p gap_p win_p / sum_p gap_p,    win 1, 1/2 where undecided, or 0

    A difference that is hardly one decides nothing, where `agreement` counts it as much as any other.

    Args:
      margins: float[..., P], from `pair_margins`.
      gaps: float[..., P], differences of the losses, >= 0.
      valid: bool[..., P], pairs with at least one supervised entry.

    Returns:
      float32[], 0 without any difference.

    Example:
      >>> from lensjax.training.agreement import success
      >>> float(success([0.5, -0.5], [3.0, 1.0], [True, True]))
      0.75
    """
    gaps, valid = jnp.asarray(gaps), jnp.asarray(valid)
    total = jnp.sum(jnp.where(valid, gaps, 0.0))
    return jnp.sum(jnp.where(valid, gaps * _wins(margins), 0.0)) / jnp.where(total > 0, total, 1.0)


def _wins(margins: ArrayLike) -> Array:
    """1 where the policy asks for the measured winner, 1/2 where it is undecided, else 0."""
    margins = jnp.asarray(margins)
    # Scores that depend on the level alone cancel exactly in exact arithmetic; in float32 they leave rounding noise.
    undecided = jnp.abs(margins) < 1e-6
    # Unlike a comparison, the sign of a NaN is a NaN.
    return 0.5 + 0.5 * jnp.sign(jnp.where(undecided, 0.0, margins))


def lod_only_scores(variants: WorkingContext) -> Array:
    """The control policy that sees nothing but the level: expand every gist, collapse every token; float32[V, W]."""
    return jnp.where(variants.valid, jnp.where(variants.lod > 0, 1.0, -1.0), 0.0).astype(jnp.float32)


def variant_values(scores: ArrayLike, variants: WorkingContext, geometry: Geometry) -> Array:
    """The policy's value of each variant: how well its scores match the detail that the variant gives.

        h(v) = sum_i a_i s_i(v) d(lod_i) / sum_i a_i,    d = 1 - 2 lod / L,    a_i = tokens covered

    with a_i = 0 on the sinks and the protected tail. A policy that only repeats the level gives all variants of one
    coverage nearly the same value.

    Args:
      scores: float[V, W].
      variants: V working contexts.
      geometry: their history.

    Returns:
      float32[V]; 0 for a variant that shows nothing but these.
    """
    weight = contexts.spans(variants, block_size=geometry.block_size).astype(jnp.float32)
    weight = jnp.where(geometry.is_free(variants.start), weight, 0.0)
    detail = 1.0 - 2.0 * variants.lod.astype(jnp.float32) / geometry.max_lod
    total = jnp.sum(weight * jnp.asarray(scores) * detail, axis=-1)
    return total / jnp.maximum(jnp.sum(weight, axis=-1), 1.0)


def correlation(values: ArrayLike, rewards: ArrayLike, valid: ArrayLike) -> tuple[Array, Array]:
    """Pearson correlation of the policy's values and the rewards over one sequence's variants.

    Args:
      values: float32[V], from `variant_values`.
      rewards: float32[V], -delta_v; higher is better.
      valid: bool[V].

    Returns:
      float32[] correlation, +1 is perfect, and bool[] whether it is defined (both standard deviations above rounding);
      the correlation is 0 where it is not.
    """
    values, rewards, where = jnp.asarray(values), jnp.asarray(rewards), jnp.asarray(valid)
    count = jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1)

    def centre(x: Array) -> Array:
        return jnp.where(where, x - jnp.sum(jnp.where(where, x, 0.0)) / count, 0.0)

    x, y = centre(values), centre(rewards)
    std_x, std_y = (jnp.sqrt(jnp.sum(z * z) / count) for z in (x, y))
    # A NaN is no lack of variance, and stays.
    defined = ~((std_x <= MIN_STD) | (std_y <= MIN_STD))
    product = jnp.where(defined, std_x * std_y, 1.0)
    return jnp.where(defined, jnp.sum(x * y) / count / product, 0.0), defined
