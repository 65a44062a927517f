"""Metrics as pure dictionaries of scalars: one name in TensorBoard, JSONL and here. Histograms go to TensorBoard alone.

A value that is not defined (a correlation without variance, say) is NaN on the device and "n/a" in the log; only names
in `MAY_BE_UNDEFINED` may be so, every other NaN is a fault.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean, masked_std

Metrics = dict[str, Array]
"""Scalars by name; of a name in `HISTOGRAMS`, counts by bin."""

_MAGNITUDES = np.logspace(-4, 1, 21)
HISTOGRAMS = {"mc/adv_histogram": np.concatenate([-_MAGNITUDES[::-1], [0.0], _MAGNITUDES]).astype(np.float32)}
"""Edges of their bins, each of which holds its upper edge. Advantages are in nats, and span decades."""

UNDEFINED = "n/a"
"""Stands in the log for a value that is not defined (see `MAY_BE_UNDEFINED`)."""

ON_KEY_TOKENS = ("nll_policy_key", "nll_policy_key_adapted", "nll_baseline_key")
"""Losses of key tokens, of which a batch may have none."""

MAY_BE_UNDEFINED = (
    *ON_KEY_TOKENS,
    "mc/preference_corr_mean",
    "mc/preference_corr_max",
    "mc/preference_corr_min",
    "rl/anti_theater_correlation",
)


def histogram(values: ArrayLike, where: ArrayLike, edges: ArrayLike) -> Array:
    """How many of the valid values are in each bin, float32[bins]; those beyond the edges are in the outermost bins.

    Args:
      values: float32[...].
      where: bool[...].
      edges: float32[bins + 1], rising.
    """
    values, where, edges = jnp.ravel(values), jnp.ravel(where), jnp.asarray(edges)
    below = jnp.sum(where[:, None] & (values[:, None] <= edges[None, 1:-1]), axis=0, dtype=jnp.float32)
    return jnp.diff(below, prepend=jnp.zeros(1), append=jnp.sum(where, dtype=jnp.float32)[None])


def advantage_metrics(losses: ArrayLike, valid: ArrayLike) -> dict[str, Array]:
    """What the rollouts of a batch were worth.

    Args:
      losses: float32[B, V], nats per token, the baseline first.
      valid: bool[B, V], False for duplicates.

    Returns:
      Deltas are over the rollouts (the baseline's own is 0 by definition). `reward` is -NLL, over all variants;
      `frac_reward_zero_std` is the share of sequences whose variants all have one loss. What there is no rollout for is
      0.
    """
    losses, valid = jnp.asarray(losses), jnp.asarray(valid)
    delta = (losses - losses[:, :1])[:, 1:]
    where = valid[:, 1:]
    # NaN stands for what does not count; one that does is in the mean as well.
    p95 = jnp.where(jnp.any(where), jnp.nanpercentile(jnp.where(where, delta, jnp.nan), 95), 0.0)
    spread = jnp.max(jnp.where(valid, losses, -jnp.inf), 1) - jnp.min(jnp.where(valid, losses, jnp.inf), 1)
    best = jnp.min(jnp.where(where, losses[:, 1:], jnp.inf), axis=1)
    return {
        "mc/adv_delta_mean": masked_mean(delta, where),
        "mc/adv_delta_p95": p95,
        "mc/adv_delta_std": masked_std(delta, where),
        "nll_baseline": jnp.mean(losses[:, 0]),
        "nll_rollout_mean": masked_mean(losses[:, 1:], where),
        "nll_rollout_best": masked_mean(best, jnp.any(where, axis=1)),
        "mc/distinct_share": jnp.mean(where, dtype=jnp.float32),
        "reward_mean": -masked_mean(losses, valid),
        "reward_std": masked_std(losses, valid),
        "frac_reward_zero_std": jnp.mean(spread <= 0, dtype=jnp.float32),
    }


def correlation_metrics(correlations: ArrayLike, defined: ArrayLike) -> dict[str, Array]:
    """Mean, largest and smallest of the sequences' correlations, NaN where no sequence has one.

    Args:
      correlations: float32[B].
      defined: bool[B].
    """
    correlations, defined = jnp.asarray(correlations), jnp.asarray(defined)
    any_defined = jnp.any(defined)

    def or_nan(value: Array) -> Array:
        return jnp.where(any_defined, value, jnp.nan)

    return {
        "mc/preference_corr_mean": or_nan(masked_mean(correlations, defined)),
        "mc/preference_corr_max": or_nan(jnp.max(jnp.where(defined, correlations, -jnp.inf))),
        "mc/preference_corr_min": or_nan(jnp.min(jnp.where(defined, correlations, jnp.inf))),
        "mc/preference_corr_defined_share": jnp.mean(defined, dtype=jnp.float32),
    }


def score_metrics(scores: ArrayLike, lods: ArrayLike, where: ArrayLike, *, max_lod: int) -> dict[str, Array]:
    """How much of the tanh range the policy uses, and how much it asks to change.

    Args:
      scores: float32[B, V, W].
      lods: int32[B, V, W].
      where: bool[B, V, W], valid entries outside the protected tail.
      max_lod: highest level L.

    Returns:
      `mc/edit_wish_rate` is the share of entries for which the policy asks for a legal edit: a positive score on a
      gist, or a negative one below the highest level. What the allocator makes of the wishes is `mc/swap_rate`, see
      `held_out.eval_step`.
    """
    scores, lods, where = jnp.asarray(scores), jnp.asarray(lods), jnp.asarray(where)
    count = jnp.maximum(jnp.sum(where, axis=-1, dtype=jnp.float32), 1)
    mean = jnp.sum(jnp.where(where, scores, 0.0), axis=-1) / count
    centred = jnp.where(where, scores - mean[..., None], 0.0)
    std = jnp.sqrt(jnp.sum(centred**2, axis=-1) / count)
    wishes = ((scores > 0) & (lods > 0)) | ((scores < 0) & (lods < max_lod))
    return {
        "mc/policy_score_abs_mean": masked_mean(jnp.abs(scores), where),
        "mc/policy_score_std_mean": masked_mean(std, jnp.any(where, axis=-1)),
        "mc/edit_wish_rate": masked_mean(wishes.astype(jnp.float32), where),
    }


def reward_metrics(chosen: ArrayLike, rejected: ArrayLike, where: ArrayLike) -> dict[str, Array]:
    """The names that users of other preference trainers know; the reward is the policy's value h of a variant.

    Args:
      chosen: float32[B, P], value of the better variant of each pair.
      rejected: float32[B, P], value of the worse one.
      where: bool[B, P].
    """
    chosen, rejected = jnp.asarray(chosen), jnp.asarray(rejected)
    return {
        "rewards/chosen": masked_mean(chosen, where),
        "rewards/rejected": masked_mean(rejected, where),
        "rewards/margins": masked_mean(chosen - rejected, where),
        "rewards/accuracies": masked_mean((chosen > rejected).astype(jnp.float32), where),
    }


def lod_loss_metrics(entry_losses: ArrayLike, lods: ArrayLike, where: ArrayLike, *, max_lod: int) -> dict[str, Array]:
    """Mean preference loss of the supervised entries of each level, 0 where a level has none.

    Args:
      entry_losses: float32[...].
      lods: int32[...].
      where: bool[...].
      max_lod: highest level L.
    """
    lods, where = jnp.asarray(lods), jnp.asarray(where)
    return {f"mc/lod_loss/{lod}": masked_mean(entry_losses, where & (lods == lod)) for lod in range(max_lod + 1)}
