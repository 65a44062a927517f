"""LensNet's weights adapted to one document, from a few compressions of its past that were measured.

The history is cut once more, one horizon before the cursor. Variants of what is before that earlier cursor, measured on
the last H tokens of the history, are the document's **support**: all of it is known when the next context is chosen. A
hypernetwork reads what those variants show and what they cost, and changes LensNet's layers by low-rank deltas
(`lensjax.models.hyperlora`). It learns from the preferences at the true cursor, of which the support knows nothing. LensNet
itself learns from L_lens alone: without deltas it is the LensNet of a run that has no hypernetwork.

The support tells what paid earlier in the document, and nothing of the query at the cursor, which comes later. Where
the query alone decides what is worth its detail, as on recall, deltas can do no more than train LensNet on.

Letters: V variants (the baseline first), W entries, F width of LensNet's features, C tokens of history, H behind it.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context.working import Entries
from lensjax.models import Models, Params, hyperlora
from lensjax.models.hyperlora import Deltas
from lensjax.runs.config import Config
from lensjax.training.metrics import masked_mean, masked_std
from lensjax.training.scoring import ScoredVariants, score_variants

NOISE_NATS = 0.02
"""Differences of the loss far below this are not worth adapting to."""
# Folded into the key of a document; small numbers would give keys that are taken.
_SUPPORT = 2**31 - 2


def edit_features(features: ArrayLike, entries: Entries, *, max_lod: int, free: ArrayLike) -> Array:
    """What a variant gives detail to, in LensNet's own terms.

        phi = sum_i a_i d(lod_i) h_i / sum_i a_i,    d = 1 - 2 lod / L,    a_i = tokens covered

    as `preferences.variant_values` weighs scores.

    Args:
      features: float32[W, F], h.
      entries: the variant's, W of them.
      max_lod: highest level L.
      free: bool[W], entries before the protected tail.

    Returns:
      float32[F].
    """
    weight = jnp.where(jnp.asarray(free), entries.spans, 0.0)
    detail = 1.0 - 2.0 * entries.lods.astype(jnp.float32) / max_lod
    return (weight * detail) @ jnp.asarray(features) / jnp.maximum(jnp.sum(weight), 1.0)


def document_context(edits: ArrayLike, rewards: ArrayLike, where: ArrayLike) -> Array:
    """What the measured variants say of their document: what they show, and what of it paid.

        [mean phi,  mean r_v (phi_v - mean phi) / size]

    with r the rewards in standard deviations (and `NOISE_NATS` more), and size the root mean square of the
    differences. The second part is the direction in which the loss falls; it is 0 where nothing was worth anything.

    Args:
      edits: float32[V, F], of `edit_features`.
      rewards: float32[V], nats per token; a constant added to all of them changes nothing.
      where: bool[V], variants that are known; nothing of the others is read.

    Returns:
      float32[2 F].
    """
    edits, where = jnp.asarray(edits), jnp.asarray(where)
    rewards = jnp.where(where, jnp.asarray(rewards), 0.0)
    mean = hyperlora.mean_context(edits, where)
    differences = jnp.where(where[:, None], edits - mean[None], 0.0)
    square = masked_mean(differences**2, where[:, None])
    differences = differences * jax.lax.rsqrt(square + 1e-12)
    spread = masked_std(rewards, where)
    paid = (rewards - masked_mean(rewards, where)) / (spread + NOISE_NATS)
    return jnp.concatenate([mean, hyperlora.mean_context(paid[:, None] * differences, where)])


def score_support(
    models: Models,
    params: dict[str, Params],
    history: ArrayLike,
    key: Array,
    length: ArrayLike,
    lod2_share: ArrayLike,
    *,
    config: Config,
) -> ScoredVariants:
    """Draws the variants of a document at the earlier cursor and measures them on the last H tokens of its history.

    Args:
      models: the models.
      params: parameters of `base` and `gist`; no gradient reaches them.
      history: int32[C], all before the true cursor.
      key: PRNG key of the document; may be the one that its variants at the true cursor take.
      length: int32[], entries of every variant, at most `config.past.context_capacity`; may be traced.
      lod2_share: float32[], see `rollouts.sample_cut`.
      config: of the true cursor.

    Returns:
      `ScoredVariants` of the past.

    Raises:
      ValueError: the tokens are not a history of `config.context`: a whole window, say.
    """
    own = jax.random.fold_in(key, _SUPPORT)
    past = jnp.asarray(history)
    return jax.lax.stop_gradient(score_variants(models, params, past, own, length, lod2_share, config=config.past))


def document_edits(models: Models, lens_params: Params, support: ScoredVariants, *, config: Config) -> Array:
    """`edit_features` of the variants of a support, float32[V, F]; no gradient reaches LensNet."""
    shape, entries = config.past.context, support.entries

    def one(part: Entries, free: Array) -> Array:
        _, features = models.lens.apply_with_features(lens_params, part)
        return edit_features(features, part, max_lod=shape.max_lod, free=free)

    free = entries.valid & (support.contexts.start < shape.history - shape.recent_tokens)
    return jax.lax.stop_gradient(jax.vmap(one)(entries, free))


def known_variants(scored: ScoredVariants) -> Array:
    """bool[V]: variants that a document is known by, its distinct rollouts.

    The baseline shows the same of every document.
    """
    return scored.distinct.at[0].set(False)


def document_deltas(models: Models, params: dict[str, Params], support: ScoredVariants, *, config: Config) -> Deltas:
    """The deltas for a document, from all rollouts of its support.

    Args:
      models: the models.
      params: parameters of `lens` and `hyper`.
      support: of `score_support`.
      config: of the true cursor.

    Returns:
      For `adapted`.

    Raises:
      ValueError: the models have no hypernetwork.
    """
    if models.hyper is None:
        raise ValueError("there is no hypernetwork: name hyper in trainable")
    edits = document_edits(models, params["lens"], support, config=config)
    context = document_context(edits, -support.losses, known_variants(support))
    return models.hyper.apply(params["hyper"], context)


def adapted(lens_params: Params, deltas: Deltas) -> Params:
    """LensNet's parameters for one document; no gradient reaches those it started from."""
    return hyperlora.adapt(jax.lax.stop_gradient(lens_params), deltas)
