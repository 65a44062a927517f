"""The reward: next-token loss behind the cursor, of a base model that reads a working context of what is before it.

    nll(v) = mean over t in [C, C + H) of -log p(token_t | entries of v, tokens C .. t - 1)

The base model reads the W entries of v and then the horizon in full, at its true positions. Token C is predicted by the
last entry, that of token C - 1, which every variant holds in full. Training, evaluation and pretraining all use the
functions of this file.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.tree import TreeState
from lensjax.context.working import Entries, WorkingContext
from lensjax.models import LanguageModel, Params


class Reading(NamedTuple):
    """What the base model reads, S = W + H - 1 rows: the entries, the horizon but for its last token, then padding."""

    entries: Entries
    """Leading axis S."""
    rows: Array
    """int32[H]: the row that predicts each token of the horizon."""


def reading(base: LanguageModel, params: Params, entries: Entries, horizon: ArrayLike) -> Reading:
    """A working context followed by the horizon.

    Args:
      base: the base model.
      params: its parameters.
      entries: W entries of the history, the last valid one its last token.
      horizon: int32[H], the tokens behind the cursor.

    Returns:
      `Reading`.
    """
    horizon = jnp.asarray(horizon)
    length = entries.valid.sum(dtype=jnp.int32)
    steps = jnp.arange(horizon.shape[0], dtype=jnp.int32)
    # Nothing is predicted from the last token of the horizon. The others come right behind the entries: padding, which
    # must be last, moves to the end.
    slots, cursor = length + steps[:-1], entries.positions[length - 1] + 1
    behind = contexts.in_full(base.embed(params, horizon[:-1]), cursor + steps[:-1].astype(jnp.float32))

    def followed_by(rows: Array, later: Array) -> Array:
        room = [(0, steps.shape[0] - 1)] + [(0, 0)] * (rows.ndim - 1)
        return jnp.pad(rows, room).at[slots].set(later.astype(rows.dtype))

    # What a policy knows of the entries besides is not for the base model.
    entries = replace(entries, states=None)
    return Reading(jax.tree.map(followed_by, entries, behind), rows=length - 1 + steps)


def token_nll(base: LanguageModel, params: Params, entries: Entries, horizon: ArrayLike) -> Array:
    """Loss of each token of the horizon under one working context.

    Args:
      base: the base model.
      params: its parameters.
      entries: W entries of the history, the last valid one its last token.
      horizon: int32[H], the tokens behind the cursor.

    Returns:
      float32[H], in nats.
    """
    logits = _horizon_logits(base, params, entries, horizon)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(horizon))


def _horizon_logits(base: LanguageModel, params: Params, entries: Entries, horizon: ArrayLike) -> Array:
    """float32[H, vocabulary]: what is predicted at each token of the horizon."""
    read = reading(base, params, entries, horizon)
    return base.logits(params, read.entries, read.rows)


def mean_nll(losses: Array, weights: Array | None = None) -> Array:
    """Mean over the horizon of float32[..., H], or with weights float32[H] that sum to 1 the weighted one."""
    if weights is None:
        return losses.mean(axis=-1)
    return jnp.sum(losses * jnp.broadcast_to(weights, losses.shape), axis=-1)


def variant_nll(
    base: LanguageModel,
    params: Params,
    tree: TreeState,
    variants: WorkingContext,
    horizon: ArrayLike,
    geometry: Geometry,
    weights: Array | None = None,
) -> tuple[Array, Entries]:
    """Loss of every variant of one sequence, in one pass over all of them.

    Args:
      base: the base model.
      params: its parameters.
      tree: the history.
      variants: V working contexts of it (leading axis V) that show its last token in full.
      horizon: int32[H], the tokens behind it.
      geometry: the history; says which rows of a variant the base model reads.
      weights: float32[H] that sum to 1, of the tokens of the horizon; None weighs all alike.

    Returns:
      float32[V], mean loss in nats per token, and the materialised `Entries` of all rows with leading axis V: what a
      policy sees.

    Raises:
      ValueError: the horizon is empty, or no sequence.

    Example:
      >>> import functools, jax, jax.numpy as jnp, lensjax as lx
      >>> config = lx.BaseConfig(dim=16, heads=2, layers=1)
      >>> base = lx.build_models(config, lx.GistConfig(), lx.LensConfig(), block_size=2, max_lod=1).base
      >>> params, geometry = base.init(jax.random.key(0)), lx.Geometry(8, 2, 1, recent_tokens=2)
      >>> mean = lambda children: children.mean(axis=1)
      >>> history = lx.tree.build(base.embed(params, jnp.arange(8)), mean, block_size=2, max_lod=1)
      >>> variants = jax.tree.map(lambda leaf: leaf[None], lx.recency(4, geometry, capacity=4))
      >>> measure = jax.jit(functools.partial(lx.variant_nll, base, geometry=geometry))
      >>> nll, _ = measure(params, history, variants, jnp.array([8, 9]))
      >>> bool(jnp.abs(nll[0] - jnp.log(256.0)) < 0.2)  # a fresh model is near uniform
      True
    """
    losses, entries = variant_token_nll(base, params, tree, variants, horizon, geometry)
    return mean_nll(losses, weights), entries


def variant_token_nll(
    base: LanguageModel,
    params: Params,
    tree: TreeState,
    variants: WorkingContext,
    horizon: ArrayLike,
    geometry: Geometry,
) -> tuple[Array, Entries]:
    """Loss of each token of the horizon under every variant, float32[V, H]; arguments and entries of `variant_nll`."""
    horizon = jnp.asarray(horizon)
    if horizon.ndim != 1 or horizon.shape[0] < 1:
        raise ValueError(f"horizon must hold one sequence of at least 1 token to score, got shape {horizon.shape}")
    entries, read = _materialised(tree, variants, geometry)
    return jax.vmap(lambda row: token_nll(base, params, row, horizon))(read), entries


def variant_matches(
    base: LanguageModel,
    params: Params,
    tree: TreeState,
    variants: WorkingContext,
    horizon: ArrayLike,
    geometry: Geometry,
) -> tuple[Array, Array]:
    """Loss of each token of the horizon, and whether it is the likeliest one; arguments of `variant_nll`.

    Returns:
      float32[V, H] in nats, and bool[V, H]. A model that takes the likeliest token at each place writes the first n
      tokens of the horizon if and only if all of these match.
    """
    horizon = jnp.asarray(horizon)

    def one(entries: Entries) -> tuple[Array, Array]:
        logits = _horizon_logits(base, params, entries, horizon)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, horizon)
        return losses, jnp.argmax(logits, axis=-1) == horizon

    _, read = _materialised(tree, variants, geometry)
    return jax.vmap(one)(read)


def _materialised(tree: TreeState, variants: WorkingContext, geometry: Geometry) -> tuple[Entries, Entries]:
    """All rows of V variants, which a policy sees, and those of them that the base model reads."""
    seen = jax.vmap(lambda variant: contexts.materialise(tree, variant))
    entries = seen(variants)
    read = seen(jax.vmap(lambda variant: contexts.read(variant, geometry))(variants)) if geometry.omit else entries
    return entries, read


def entry_nll(base: LanguageModel, params: Params, entries: Entries, tokens: ArrayLike, *, horizon: int) -> Array:
    """Mean loss of the token after each one that a reading holds in full, in the context or behind it.

    The horizon's losses are the last ones of these. Pretraining uses them all: a context of W entries then teaches as
    many times how to read gists as it holds tokens.

    Args:
      base: the base model.
      params: its parameters.
      entries: W entries of the history.
      tokens: int32[T], the whole window.
      horizon: tokens behind the cursor H.

    Returns:
      float32[], in nats.
    """
    read = reading(base, params, entries, jnp.asarray(tokens)[-horizon:]).entries
    logits = base.logits(params, read, jnp.arange(read.spans.shape[0], dtype=jnp.int32))
    return in_full_nll(logits, read, tokens)


def in_full_nll(logits: Array, entries: Entries, tokens: ArrayLike) -> Array:
    """Mean loss of the token after each one in full, from logits float32[S, vocabulary] of S entries of a window.

    Args:
      logits: float32[S, vocabulary], at each of the entries.
      entries: S of them, a `reading`.
      tokens: int32[T], the whole window.

    Returns:
      float32[], in nats.
    """
    targets = jnp.take(jnp.asarray(tokens), entries.positions.astype(jnp.int32) + 1, mode="clip")
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    in_full = entries.spans == 1
    return jnp.sum(jnp.where(in_full, losses, 0.0)) / jnp.sum(in_full, dtype=jnp.float32)


def sequence_nll(base: LanguageModel, params: Params, tokens: ArrayLike) -> Array:
    """Ordinary teacher-forced loss of a whole window.

    Args:
      base: the base model.
      params: its parameters.
      tokens: int32[T].

    Returns:
      float32[T - 1], in nats: entry i is the loss of token i + 1.
    """
    tokens = jnp.asarray(tokens)
    count = tokens.shape[0]
    entries = contexts.in_full(base.embed(params, tokens), jnp.arange(count))
    logits = base.logits(params, entries, jnp.arange(count - 1, dtype=jnp.int32))
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
