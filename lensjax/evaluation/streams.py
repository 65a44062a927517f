"""Who else could hold a stream: policies in LensNet's place in a session, and windows of its last tokens.

All of them choose before they read: none sees a token that it is scored on.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import working as contexts
from lensjax.models import Models, Params, decision
from lensjax.session import View
from lensjax.training import key_tokens, nll
from lensjax.training.scoring import ContextConfig

_AT_ONCE = 16
"""Windows that the base model reads at a time."""


def collapse_oldest(params: dict[str, Params], view: View) -> Array:
    """A session's policy (`session.Policy`) that knows the age of an entry and nothing else: the oldest collapse first.

    Args:
      params: not read.
      view: of the session.

    Returns:
      float32[W + H]: from -1 for the oldest token held to 1 for the newest, 0 at padding.
    """
    del params
    context, held = view.context, view.held.astype(jnp.float32)
    span = contexts.spans(context, block_size=view.block_size).astype(jnp.float32)
    centre = context.start.astype(jnp.float32) + (span - 1) / 2
    return jnp.where(context.valid, 2 * centre / jnp.maximum(held - 1, 1) - 1, 0.0)


def random_scores(params: dict[str, Params], view: View) -> Array:
    """A session's policy that draws every score, uniform in [-1, 1), anew at every refocus step.

    Args:
      params: not read.
      view: of the session; read are its key and position.

    Returns:
      float32[W + H].
    """
    del params
    # The allocator may draw with the step's own key.
    key = jax.random.fold_in(jax.random.fold_in(view.key, view.read), 1)
    return jax.random.uniform(key, view.context.start.shape, minval=-1.0, maxval=1.0)


def window_token_nll(
    models: Models,
    params: dict[str, Params],
    tokens: ArrayLike,
    cursors: ArrayLike,
    lengths: ArrayLike,
    *,
    capacity: int,
    context: ContextConfig,
) -> Array:
    """Losses of a sliding window: the last tokens before each cursor in full, then the horizon.

    Args:
      models: base model and GistNet are called.
      params: parameters of `base` and `gist`.
      tokens: int32[S], the stream.
      cursors: int32[N], each with a history of C tokens before it and a horizon of H behind it.
      lengths: int32[N], tokens that the window holds at each cursor, at most C; positions count from within these.
      capacity: static, at least the largest of these lengths.
      context: shapes.

    Returns:
      float32[N, H]: nats of each token of the horizon behind each cursor.
    """
    geometry = context.geometry

    def one(place: tuple[Array, Array]) -> Array:
        cursor, length = place
        near = jax.lax.dynamic_slice_in_dim(jnp.asarray(tokens), cursor - geometry.history, context.window)
        window = decision.split(near, horizon=context.horizon)
        tree = decision.build_tree(models, params, window.history, geometry)
        shown = contexts.recency(length, geometry, capacity=capacity)
        variants = jax.tree.map(lambda leaf: leaf[None], shown)
        return nll.variant_token_nll(models.base, params["base"], tree, variants, window.horizon, geometry)[0][0]

    return jax.lax.map(one, (jnp.asarray(cursors), jnp.asarray(lengths)), batch_size=_AT_ONCE)


def key_tokens_of(
    models: Models,
    params: dict[str, Params],
    tokens: ArrayLike,
    cursors: ArrayLike,
    *,
    budget: int,
    context: ContextConfig,
) -> Array:
    """The key tokens behind each cursor, told by the whole history and by less than a window of `budget` shows.

    Args:
      models: the base model is called.
      params: parameters of `base`.
      tokens: int32[S], the stream.
      cursors: int32[N], as for `window_token_nll`.
      budget: entries of the contexts that are compared.
      context: shapes, and what makes a key token.

    Returns:
      bool[N, H].
    """
    history, short = context.history, context.key.tokens(budget)

    def one(cursor: Array) -> Array:
        near = jax.lax.dynamic_slice_in_dim(jnp.asarray(tokens), cursor - history, context.window)
        window = decision.split(near, horizon=context.horizon)
        return key_tokens.find(models.base, params["base"], window, context.key, short=short)

    return jax.lax.map(one, jnp.asarray(cursors), batch_size=_AT_ONCE)
