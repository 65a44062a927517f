"""LensNet's weights adapted to one document, from a few of its compressions that were measured.

A hypernetwork reads what those variants show and what they cost, and changes LensNet's layers by low-rank deltas
(`lensjax.hyperlora`). It learns by holding out: from all variants of a document but one it must change LensNet so that
preferences about that one come out right. LensNet itself learns from L_lens alone: without deltas it is the LensNet of
a run that has no hypernetwork.

Letters: V variants (the baseline first), W entries, F width of LensNet's features, H variants held out.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax import hyperlora
from lensjax.config import Config
from lensjax.context import Entries
from lensjax.decision import policy_scores
from lensjax.hyperlora import Deltas
from lensjax.metrics import masked_mean, masked_std
from lensjax.models import Models, Params
from lensjax.variants import ScoredVariants

NOISE_NATS = 0.02
"""Differences of the loss far below this are not worth adapting to."""


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


def document_edits(models: Models, lens_params: Params, scored: ScoredVariants, *, config: Config) -> Array:
    """`edit_features` of the variants of one document, float32[V, F]; no gradient reaches LensNet."""
    shape = config.context
    entries = scored.entries

    def one(part: Entries, free: Array) -> Array:
        _, features = models.lens.apply_with_features(lens_params, part)
        return edit_features(features, part, max_lod=shape.max_lod, free=free)

    free = entries.valid & (scored.contexts.start < shape.history - shape.recent_tokens)
    return jax.lax.stop_gradient(jax.vmap(one)(entries, free))


def known_variants(scored: ScoredVariants) -> Array:
    """bool[V]: variants that a document is known by, its distinct rollouts.

    The baseline shows the same of every document.
    """
    return scored.distinct.at[0].set(False)


def document_deltas(models: Models, params: dict[str, Params], scored: ScoredVariants, *, config: Config) -> Deltas:
    """The deltas for a document, from all of its rollouts.

    Args:
      models: the models.
      params: parameters of `lens` and `hyper`.
      scored: the variants of one document.
      config: shapes.

    Returns:
      For `adapted`.
    """
    edits = document_edits(models, params["lens"], scored, config=config)
    context = document_context(edits, -scored.losses, known_variants(scored))
    return _deltas(models, params, context)


def adapted(lens_params: Params, deltas: Deltas) -> Params:
    """LensNet's parameters for one document; no gradient reaches those it started from."""
    return hyperlora.adapt(jax.lax.stop_gradient(lens_params), deltas)


def leave_one_out_scores(
    models: Models, params: dict[str, Params], scored: ScoredVariants, *, config: Config
) -> tuple[Array, Deltas]:
    """What LensNet says of a document's variants, adapted by all of them but one.

    Rollouts are drawn alike: the first H of them are as good as any.

    Args:
      models: the models.
      params: parameters of `lens` and `hyper`.
      scored: the variants of one document.
      config: H is `adaptation.held_out`.

    Returns:
      float32[H, V, W], row h without variant 1 + h, and the H deltas.
    """
    edits = document_edits(models, params["lens"], scored, config=config)
    others = ~jnp.eye(scored.losses.shape[0], dtype=bool)[1 : 1 + config.adaptation.held_out]
    where = known_variants(scored)[None] & others
    contexts = jax.vmap(document_context, (None, None, 0))(edits, -scored.losses, where)
    deltas = jax.vmap(lambda context: _deltas(models, params, context))(contexts)
    scores = jax.vmap(lambda one: policy_scores(models, adapted(params["lens"], one), scored.entries))(deltas)
    return scores, deltas


def _deltas(models: Models, params: dict[str, Params], context: Array) -> Deltas:
    if models.hyper is None:
        raise ValueError("there is no hypernetwork: name hyper in trainable")
    return models.hyper.apply(params["hyper"], context)
