"""LensNet's weights adapted to one document, from a few compressions of its past that were measured.

The history is cut once more, one horizon before the cursor. Variants of what is before that earlier cursor, measured on
the last H tokens of the history, are the document's **support**: all of it is known when the next context is chosen. A
hypernetwork reads what those variants show and what they cost, and changes LensNet's layers by low-rank deltas
(`models.hyperlora`). It learns from the preferences at the true cursor, of which the support knows nothing. LensNet
itself learns from L_lens alone: without deltas it is the LensNet of a run that has no hypernetwork.

The support tells what paid earlier in the document, and nothing of the query at the cursor, which comes later. Where
the query alone decides what is worth its detail, as on recall, deltas can do no more than train LensNet on.

Letters: V variants (the baseline first), W entries, F width of LensNet's features, C tokens of history, H behind it.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean, masked_std
from lensjax._settings import Positive, Width, settings
from lensjax.context.geometry import Geometry
from lensjax.context.working import Entries
from lensjax.models import HyperLoRAModel, LensModel, Models, Params, hyperlora
from lensjax.models.decision import policy_scores, split
from lensjax.models.hyperlora import Deltas, HyperLoRAConfig
from lensjax.models.interfaces import features_of
from lensjax.training import objective
from lensjax.training.metrics import Metrics
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch, ScoredVariants, score_variants
from lensjax.training.steps.difficulty import current_length
from lensjax.training.steps.preference import Loss, apply_loss, score_batch, total_loss
from lensjax.training.steps.train_state import TrainState, init_train_state, sequence_keys, statistics
from lensjax.training.steps.update import all_parts


@settings("adaptation")
class AdaptationConfig:
    """Low-rank changes of LensNet for each document; trained where `trainable` names `hypernet`."""

    rank: Width = 4
    init_scale: Positive = 0.1
    """Frobenius norm of a fresh change."""
    max_norm: Positive = 1.0
    """Its largest norm, in norms of an identity of its size."""


NOISE_NATS = 0.02
"""Differences of the loss far below this are not worth adapting to."""
# Folded into the key of a document; small numbers would give keys that are taken.
_SUPPORT = 2**31 - 2


def edit_features(features: ArrayLike, entries: Entries, *, max_lod: int, free: ArrayLike) -> Array:
    """What a variant gives detail to, in LensNet's own terms.

        phi = sum_i a_i d(lod_i) h_i / sum_i a_i,    d = 1 - 2 lod / L,    a_i = tokens covered

    as `agreement.variant_values` weighs scores.

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


def build_hypernet(lens: LensModel, settings: AdaptationConfig) -> HyperLoRAModel:
    """What adapts LensNet to a document; call it once, outside `jax.jit`."""
    net = HyperLoRAConfig(rank=settings.rank, init_scale=settings.init_scale, max_norm=settings.max_norm)
    # A context is two vectors of LensNet's width, of `document_context`.
    return HyperLoRAModel(net, 2 * lens.feature_dim, lens.targets)


def init_adaptation_state(
    key: Array, *, recipe: Recipe, models: Models, hypernet: HyperLoRAModel, params: dict[str, Params] | None = None
) -> tuple[TrainState, dict[str, Params]]:
    """`init_train_state` with a fresh hypernetwork; all else is as without one."""
    # A key of its own: with and without a hypernetwork, a run draws the same.
    fresh = {"hypernet": hypernet.init(jax.random.fold_in(key, 3))}
    return init_train_state(key, recipe=recipe, models=models, params=fresh | (params or {}))


def adaptation_step(
    state: TrainState,
    batch: Batch,
    frozen: dict[str, Params],
    *,
    recipe: Recipe,
    models: Models,
    hypernet: HyperLoRAModel,
) -> tuple[TrainState, Metrics]:
    """`train_step`, and a gradient of the hypernetwork from LensNet adapted to each document.

    Args:
      state: of `init_adaptation_state`.
      batch: `tokens` int32[B, T].
      frozen: as for `train_step`.
      recipe: static; `trainable` names `hypernet`.
      models: static.
      hypernet: static.

    Returns:
      The next state, and scalars by name.
    """
    keys, whole = sequence_keys(state, batch), all_parts(state, frozen)
    supports = score_supports(whole, state, batch, keys, state.step, recipe=recipe, models=models)

    def loss_fn(trained: dict[str, Params]) -> Loss:
        params = {**whole, **trained}
        scored = score_batch(params, state, batch, recipe=recipe, models=models)
        loss, (scored, balance, report) = total_loss(params, state, scored, recipe=recipe, models=models)
        adapted_loss, more = _adapted_loss(params, state, scored, supports, recipe, models, hypernet)
        return loss + adapted_loss, (scored, balance, report | more)

    return apply_loss(state, loss_fn, recipe=recipe)


def _adapted_loss(
    params: dict[str, Params],
    state: TrainState,
    scored: ScoredVariants,
    supports: ScoredVariants,
    recipe: Recipe,
    models: Models,
    hypernet: HyperLoRAModel,
) -> tuple[Array, Metrics]:
    """What LensNet, adapted to each document by its support, makes of the preferences at the cursor."""
    deltas = jax.vmap(lambda one: document_deltas(models, hypernet, params, one, recipe.past.geometry))(supports)
    scores = jax.vmap(lambda delta, entries: policy_scores(models.lens, adapted(params["lens"], delta), entries))(
        deltas, scored.entries
    )
    key = jax.random.fold_in(state.key, state.step)
    loss, agreement = objective.pair_loss(
        key, scored, scores, statistics(state, recipe=recipe), state.hyper, recipe=recipe
    )
    deltas = jax.lax.stop_gradient(deltas)
    report = {
        "adapted_loss": loss,
        "adapted_agreement": agreement,
        "lora_diversity": hyperlora.diversity(deltas),
        "lora_magnitude": jnp.mean(jnp.stack(list(hyperlora.magnitudes(deltas).values()))),
    }
    return loss, jax.lax.stop_gradient(report)


def score_supports(
    params: dict[str, Params],
    state: TrainState,
    batch: Batch,
    keys: Array,
    step: ArrayLike,
    *,
    recipe: Recipe,
    models: Models,
) -> ScoredVariants:
    """The support of each document of a batch; of the windows, the histories are read.

    Args:
      params: parameters of `base` and `gist`.
      state: of it, the hyperparameters are read.
      batch: `tokens` int32[B, T].
      keys: PRNG keys [B], those of the sequences' variants.
      step: int32[], of the curriculum: variants of the past are cut to the same fraction as those at the cursor.
      recipe: of the true cursor.
      models: static.

    Returns:
      `ScoredVariants` with leading axis B.
    """
    histories = split(batch["tokens"], horizon=recipe.context.horizon).history
    length, share = current_length(step, state.hyper, recipe=recipe.past), state.hyper.high_lod_share

    def score(history: Array, key: Array) -> ScoredVariants:
        return score_support(models, params, history, key, length, share, recipe=recipe)

    return jax.vmap(score)(histories, keys)


def score_support(
    models: Models,
    params: dict[str, Params],
    history: ArrayLike,
    key: Array,
    length: ArrayLike,
    high_lod_share: ArrayLike,
    *,
    recipe: Recipe,
) -> ScoredVariants:
    """Draws the variants of a document at the earlier cursor and measures them on the last H tokens of its history.

    Args:
      models: base model and GistNet are called.
      params: parameters of `base` and `gist`; no gradient reaches them.
      history: int32[C], all before the true cursor.
      key: PRNG key of the document; may be the one that its variants at the true cursor take.
      length: int32[], entries of every variant, at most `recipe.past.capacity`; may be traced.
      high_lod_share: float32[], see `rollouts.sample_cut`.
      recipe: of the true cursor.

    Returns:
      `ScoredVariants` of the past.

    Raises:
      ValueError: the tokens are not a history: a whole window, say.
    """
    own, past = jax.random.fold_in(key, _SUPPORT), recipe.past
    scored = score_variants(
        own,
        params,
        jnp.asarray(history),
        length,
        high_lod_share,
        models=models,
        context=past.context,
        capacity=past.capacity,
        short=past.short,
    )
    return jax.lax.stop_gradient(scored)


def document_edits(models: Models, lens_params: Params, support: ScoredVariants, geometry: Geometry) -> Array:
    """`edit_features` of the variants of a support, float32[V, F]; no gradient reaches LensNet."""
    entries, lens = support.entries, features_of(models.lens)

    def one(part: Entries, free: Array) -> Array:
        _, features = lens.apply_with_features(lens_params, part)
        return edit_features(features, part, max_lod=geometry.max_lod, free=free)

    free = entries.valid & geometry.is_free(support.contexts.start)
    return jax.lax.stop_gradient(jax.vmap(one)(entries, free))


def known_variants(scored: ScoredVariants) -> Array:
    """bool[V]: variants that a document is known by, its distinct rollouts.

    Recency shows the same of every document.
    """
    return scored.distinct.at[0].set(False)


def document_deltas(
    models: Models, hypernet: HyperLoRAModel, params: dict[str, Params], support: ScoredVariants, geometry: Geometry
) -> Deltas:
    """The deltas for a document, from all rollouts of its support.

    Args:
      models: base model and GistNet are called.
      hypernet: the hypernetwork.
      params: parameters of `lens` and `hypernet`.
      support: of `score_support`.
      geometry: of the past: `recipe.past.geometry`.

    Returns:
      For `adapted`.
    """
    edits = document_edits(models, params["lens"], support, geometry)
    context = document_context(edits, -support.nll, known_variants(support))
    return hypernet.apply(params["hypernet"], context)


def adapted(lens_params: Params, deltas: Deltas) -> Params:
    """LensNet's parameters for one document; no gradient reaches those it started from."""
    return hyperlora.adapt(jax.lax.stop_gradient(lens_params), deltas)
