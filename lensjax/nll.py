"""The reward: next-token loss of a base model that reads a working context.

    nll(v) = mean over t in [T - H, T) of -log p(token_t | entries of v that end at or before t)

The entry that predicts token t is the LOD-0 entry of token t - 1, which every variant holds because the recent tail
stays in full. Training, evaluation and pretraining all use the functions of this file.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from lensjax import context as contexts
from lensjax.context import Entries, WorkingContext
from lensjax.models import BaseModel, Params
from lensjax.tree import TreeState


def horizon_rows(length: ArrayLike, *, horizon: int) -> Array:
    """The entries that predict the horizon's tokens.

    Args:
      length: int32[], valid entries of a context whose last horizon + 1 entries are LOD-0 tokens.
      horizon: tokens scored H.

    Returns:
      int32[H]: indices of the entries of tokens T - H - 1 .. T - 2, in time order.
    """
    return jnp.asarray(length, jnp.int32) - 1 - horizon + jnp.arange(horizon, dtype=jnp.int32)


def token_losses(base: BaseModel, params: Params, entries: Entries, targets: ArrayLike) -> Array:
    """Loss of each horizon token under one working context.

    Args:
      base: the base model.
      params: its parameters.
      entries: W entries, the last valid H + 1 of them LOD-0 tokens.
      targets: int32[H], the last H tokens of the window.

    Returns:
      float32[H], in nats.
    """
    targets = jnp.asarray(targets)
    rows = horizon_rows(entries.valid.sum(dtype=jnp.int32), horizon=targets.shape[0])
    logits = base.apply(params, entries.embeddings, entries.positions, entries.spans, rows)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)


def variant_losses(
    base: BaseModel, params: Params, tree: TreeState, variants: WorkingContext, tokens: ArrayLike, *, horizon: int
) -> tuple[Array, Entries]:
    """Loss of every variant of one sequence, in one pass over all of them.

    Args:
      base: the base model.
      params: its parameters.
      tree: the sequence's tree, at full length T.
      variants: V working contexts (leading axis V) that share the last H + 1 tokens at LOD 0.
      tokens: int32[T].
      horizon: tokens scored H.

    Returns:
      float32[V], mean loss in nats per token, and the materialised `Entries` with leading axis V.

    Raises:
      ValueError: the horizon does not fit the tokens or the contexts.
    """
    tokens = jnp.asarray(tokens)
    capacity = variants.start.shape[-1]
    if not 1 <= horizon < min(tokens.shape[0], capacity):
        raise ValueError(
            f"horizon must be at least 1 and below both the window ({tokens.shape[0]} tokens) and the context "
            f"({capacity} entries): the first scored token needs an entry before it; got {horizon}"
        )
    targets = tokens[-horizon:]
    entries = jax.vmap(lambda variant: contexts.materialise(tree, variant))(variants)
    losses = jax.vmap(lambda row: token_losses(base, params, row, targets))(entries)
    return losses.mean(axis=-1), entries


def entry_losses(
    base: BaseModel, params: Params, entries: Entries, context: WorkingContext, tokens: ArrayLike
) -> tuple[Array, Array]:
    """Loss of the token after each LOD-0 entry, wherever in the context it stands, shown or inside a gist.

    The horizon's losses are the last ones of these. Pretraining uses them all: a context of W entries then teaches as
    many times how to read gists as it holds tokens.

    Args:
      base: the base model.
      params: its parameters.
      entries: W entries.
      context: the working context they were gathered for.
      tokens: int32[T].

    Returns:
      float32[W], in nats, 0 where not defined, and bool[W]: valid LOD-0 entries with a token after them.
    """
    tokens = jnp.asarray(tokens)
    where = context.valid & (context.lod == 0) & (context.start < tokens.shape[0] - 1)
    rows = jnp.arange(context.start.shape[0], dtype=jnp.int32)
    logits = base.apply(params, entries.embeddings, entries.positions, entries.spans, rows)
    targets = jnp.take(tokens, context.start + 1, mode="clip")
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(where, losses, 0.0), where


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
