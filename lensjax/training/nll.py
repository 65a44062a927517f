"""The reward: next-token loss behind the cursor, of a base model that reads a working context of what is before it.

    nll(v) = mean over t in [C, C + H) of -log p(token_t | entries of v, tokens C .. t - 1)

The base model reads the W entries of v and then the horizon in full, at its true positions. Token C is predicted by the
last entry, that of token C - 1, which every variant holds in full. Training, evaluation and pretraining all use the
functions of this file.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import working as contexts
from lensjax.context.tree import TreeState
from lensjax.context.working import Entries, WorkingContext
from lensjax.models import BaseModel, Params


class Reading(NamedTuple):
    """What the base model reads, S = W + H - 1 rows: the entries, the horizon but for its last token, then padding."""

    embeddings: Array
    """float[S, D]."""
    positions: Array
    """float32[S]."""
    spans: Array
    """float32[S]: tokens covered; 0 at padding."""
    rows: Array
    """int32[H]: the row that predicts each token of the horizon."""


def reading(base: BaseModel, params: Params, entries: Entries, horizon: ArrayLike) -> Reading:
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

    def followed_by(rows: Array, later: Array) -> Array:
        room = [(0, steps.shape[0] - 1)] + [(0, 0)] * (rows.ndim - 1)
        return jnp.pad(rows, room).at[slots].set(later.astype(rows.dtype))

    return Reading(
        embeddings=followed_by(entries.embeddings, base.embed(params, horizon[:-1])),
        positions=followed_by(entries.positions, cursor + steps[:-1].astype(jnp.float32)),
        spans=followed_by(entries.spans, jnp.ones(steps.shape[0] - 1, jnp.float32)),
        rows=length - 1 + steps,
    )


def token_losses(base: BaseModel, params: Params, entries: Entries, horizon: ArrayLike) -> Array:
    """Loss of each token of the horizon under one working context.

    Args:
      base: the base model.
      params: its parameters.
      entries: W entries of the history, the last valid one its last token.
      horizon: int32[H], the tokens behind the cursor.

    Returns:
      float32[H], in nats.
    """
    read = reading(base, params, entries, horizon)
    logits = base.apply(params, read.embeddings, read.positions, read.spans, read.rows)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(horizon))


def variant_losses(
    base: BaseModel, params: Params, tree: TreeState, variants: WorkingContext, horizon: ArrayLike
) -> tuple[Array, Entries]:
    """Loss of every variant of one sequence, in one pass over all of them.

    Args:
      base: the base model.
      params: its parameters.
      tree: the history.
      variants: V working contexts of it (leading axis V) that show its last token in full.
      horizon: int32[H], the tokens behind it.

    Returns:
      float32[V], mean loss in nats per token, and the materialised `Entries` with leading axis V.

    Raises:
      ValueError: the horizon is empty, or no sequence.
    """
    horizon = jnp.asarray(horizon)
    if horizon.ndim != 1 or horizon.shape[0] < 1:
        raise ValueError(f"horizon must hold one sequence of at least 1 token to score, got shape {horizon.shape}")
    entries = jax.vmap(lambda variant: contexts.materialise(tree, variant))(variants)
    losses = jax.vmap(lambda row: token_losses(base, params, row, horizon))(entries)
    return losses.mean(axis=-1), entries


def entry_losses(base: BaseModel, params: Params, entries: Entries, tokens: ArrayLike, *, horizon: int) -> Array:
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
    tokens = jnp.asarray(tokens)
    read = reading(base, params, entries, tokens[-horizon:])
    rows = jnp.arange(read.spans.shape[0], dtype=jnp.int32)
    logits = base.apply(params, read.embeddings, read.positions, read.spans, rows)
    targets = jnp.take(tokens, read.positions.astype(jnp.int32) + 1, mode="clip")
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    in_full = read.spans == 1
    return jnp.sum(jnp.where(in_full, losses, 0.0)) / jnp.sum(in_full, dtype=jnp.float32)


def sequence_losses(base: BaseModel, params: Params, tokens: ArrayLike) -> Array:
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
    positions = jnp.arange(count, dtype=jnp.float32)
    logits = base.apply(
        params,
        base.embed(params, tokens),
        positions,
        jnp.ones(count, jnp.float32),
        jnp.arange(count - 1, dtype=jnp.int32),
    )
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
