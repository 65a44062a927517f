"""Preference loss (Bradley-Terry, or squared as a control) and rank loss of one preference pair."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.losses._softened import softened


def _cleared(scores: ArrayLike, targets: ArrayLike, where: ArrayLike) -> tuple[Array, Array, Array]:
    """The same arrays, with 0 where nothing is supervised: what stands there reaches neither loss nor gradient."""
    where = jnp.asarray(where)
    return jnp.where(where, scores, 0.0), jnp.where(where, targets, 0.0), where


def _weighted_mean(values: Array, weights: Array) -> Array:
    """Mean of the values whose weight is above 0; 0 if there is none."""
    total = jnp.sum(weights)
    return jnp.sum(jnp.where(weights > 0, weights * values, 0.0)) / jnp.where(total > 0, total, 1.0)


def _strength_and_scale(gap: ArrayLike, temperature: ArrayLike) -> tuple[Array, Array]:
    gap = jnp.abs(jnp.asarray(gap))
    return jnp.tanh(gap), jnp.maximum(gap, 1.0) / temperature


def preference_entry_losses(
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike,
    *,
    gap: ArrayLike,
    temperature: ArrayLike,
    collapse_weight: ArrayLike,
    form: Literal["logistic", "squared"] = "logistic",
    label_smoothing: ArrayLike | None = None,
    gap_margin: ArrayLike | None = None,
) -> Array:
    """Loss of each supervised entry of one pair.

        logistic:  c_j a softplus(-y_j),    y_j = t_j s_j g - gap_margin gap
        squared:   c_j a (s_j - t_j)^2      a = tanh(gap),    g = max(1, gap) / temperature

    With `label_smoothing` epsilon, softplus(-y) is (1 - epsilon) softplus(-y) + epsilon softplus(y).

    Args:
      scores: float32[M], policy scores of the pair's entries (both variants, flattened).
      targets: float32[M], +1 or -1 where supervised.
      where: bool[M], supervised entries.
      gap: float32[], |z_w - z_b|, difference of the normalised advantages.
      temperature: float32[], above 0; small is sharp.
      collapse_weight: float32[], weight c_j of entries whose target is -1.
      form: Bradley-Terry, or regression on the targets, which takes back a score beyond them.
      label_smoothing: float32[] in [0, 1/2), the probability that a preference is the wrong way round; None for 0.
      gap_margin: float32[], at least 0, of the margin that a gap of 1 asks for; None for 0. Scores of at most 1 reach
        g at most.

    Returns:
      float32[M], 0 where not supervised.

    Raises:
      ValueError: the form is unknown, or the squared one is to be softened.

    References:
      Mitchell (2023), conservative DPO, for the smoothing; Amini et al., DPO with an Offset, arXiv:2402.10571, for the
      margin, whose scaling is linear here. Both are of whole answers there, and of entries here.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, targets, every = jnp.array([0.5, 0.0]), jnp.array([1.0, -1.0]), jnp.ones(2, bool)
      >>> options = {"gap": 1.0, "temperature": 1.0, "collapse_weight": 1.0}
      >>> losses = lx.losses.preference_entry_losses(scores, targets, every, **options)
      >>> [f"{loss:.3f}" for loss in losses]
      ['0.361', '0.528']
    """
    if form not in ("logistic", "squared"):
        raise ValueError(f"form must be logistic or squared, got {form!r}")
    softening = {"label_smoothing": label_smoothing, "gap_margin": gap_margin}
    if form == "squared" and any(value is not None for value in softening.values()):
        raise ValueError("label_smoothing and gap_margin soften the logistic form, and form is 'squared': pass None")
    scores, targets, where = _cleared(scores, targets, where)
    strength, scale = _strength_and_scale(gap, temperature)
    weight = jnp.where(targets < 0, collapse_weight, 1.0)
    if form == "squared":
        each = jnp.square(scores - targets)
    else:
        each = softened(targets * scores * scale, jnp.abs(jnp.asarray(gap)), **softening)
    return jnp.where(where, weight * strength * each, 0.0)


def preference_loss(
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike,
    *,
    gap: ArrayLike,
    temperature: ArrayLike,
    collapse_weight: ArrayLike,
    weights: ArrayLike = 1.0,
    granularity: Literal["entry", "pair"] = "entry",
    form: Literal["logistic", "squared"] = "logistic",
    label_smoothing: ArrayLike | None = None,
    gap_margin: ArrayLike | None = None,
) -> Array:
    """Loss of one pair: the policy should ask for what the better variant shows.

        entry:  sum_j m_j w_j l_j / sum_j m_j w_j,    l_j of `preference_entry_losses`
        pair:   a softplus(-y),    y = g sum_j m_j w_j c_j t_j s_j / sum_j m_j w_j c_j - gap_margin gap

    Args:
      scores: float32[M], policy scores of the pair's entries (both variants, flattened).
      targets: float32[M], +1 or -1 where supervised.
      where: bool[M], supervised entries m_j.
      gap: float32[], |z_w - z_b|, difference of the normalised advantages.
      temperature: float32[], above 0.
      collapse_weight: float32[], weight c_j of entries whose target is -1.
      weights: float32[M] or float32[], w_j above 0. With the tokens that each entry covers, both sides of a pair weigh
        the same, and to answer by the level alone gains nothing (see `preferences.span_targets`).
      granularity: a loss of every entry, or one softplus for the pair's mean margin.
      form: of the entries' losses; a pair's is logistic.
      label_smoothing: as in `preference_entry_losses`.
      gap_margin: likewise.

    Returns:
      float32[].

    Raises:
      ValueError: the granularity or the form is unknown, or the form is squared and the granularity is pair or the
        loss is to be softened.

    References:
      Bradley and Terry (1952); the logistic preference loss as in Christiano et al., arXiv 1706.03741, Eq. 1.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, targets, every = jnp.array([0.5, 0.0]), jnp.array([1.0, -1.0]), jnp.ones(2, bool)
      >>> loss = lx.losses.preference_loss(scores, targets, every, gap=1.0, temperature=1.0, collapse_weight=1.0)
      >>> print(f"{loss:.3f}")
      0.444
    """
    softening = {"label_smoothing": label_smoothing, "gap_margin": gap_margin}
    if granularity == "entry":
        losses = preference_entry_losses(
            scores,
            targets,
            where,
            gap=gap,
            temperature=temperature,
            collapse_weight=collapse_weight,
            form=form,
            **softening,
        )
        return _weighted_mean(losses, jnp.where(jnp.asarray(where), weights, 0.0))
    if granularity != "pair":
        raise ValueError(f"granularity must be entry or pair, got {granularity!r}")
    if form != "logistic":
        raise ValueError(f"form must be logistic where granularity is pair, got {form!r}")
    scores, targets, where = _cleared(scores, targets, where)
    strength, scale = _strength_and_scale(gap, temperature)
    weight = jnp.where(where, weights * jnp.where(targets < 0, collapse_weight, 1.0), 0.0)
    margin = _weighted_mean(targets * scores, weight)
    each = softened(margin * scale, jnp.abs(jnp.asarray(gap)), **softening)
    return jnp.where(jnp.sum(weight) > 0, strength * each, 0.0)


def rank_loss(
    scores: ArrayLike, targets: ArrayLike, where: ArrayLike, *, margin: ArrayLike, weights: ArrayLike = 1.0
) -> Array:
    """Hinge between the mean scores of the two kinds of entries of one pair.

        relu(margin - (mean score where t = +1  -  mean score where t = -1))

    Args:
      scores: float32[M], policy scores of the pair's entries.
      targets: float32[M], +1 or -1 where supervised.
      where: bool[M], supervised entries.
      margin: float32[], at least 0.
      weights: float32[M] or float32[], above 0, of the means; see `preference_loss`.

    Returns:
      float32[]; 0 unless both kinds are present.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, targets, every = jnp.array([0.5, 0.0]), jnp.array([1.0, -1.0]), jnp.ones(2, bool)
      >>> float(lx.losses.rank_loss(scores, targets, every, margin=1.0))
      0.5
    """
    scores, targets, where = _cleared(scores, targets, where)
    # A target that is not a number is of the second kind, so that it is not left out unseen.
    positive, negative = where & (targets > 0), where & ~(targets > 0)
    difference = sum(_weighted_mean(targets * scores, jnp.where(kind, weights, 0.0)) for kind in (positive, negative))
    has_both = jnp.any(positive) & jnp.any(negative)
    # Times 0 and not 0: a NaN stays one.
    return jnp.where(has_both, jax.nn.relu(margin - difference), 0.0 * difference)
