"""What a base model that shows its attention looks at when it reads in full."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import working as contexts
from lensjax.models.interfaces import AttentiveLanguageModel, Params


def attention_paid(
    base: AttentiveLanguageModel,
    params: Params,
    tokens: ArrayLike,
    query: slice,
    *,
    heads: Literal["mean", "max"] = "mean",
) -> tuple[Array, Array]:
    """Attention that some tokens of a sequence pay to all of them.

    Args:
      base: the base model.
      params: its parameters.
      tokens: int32[S], read in full.
      query: the R tokens whose attention is wanted.
      heads: over layers and heads, the mean or the largest.

    Returns:
      float32[R, S], 0 on later tokens, of sum 1 in each row where it is the mean; float32[S], L2 norms of the keys,
      mean over layers and heads.

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> from lensjax.models.attention import attention_paid
      >>> config = lx.BaseConfig(dim=16, heads=2, layers=1)
      >>> base = lx.build_models(config, lx.GistConfig(), lx.LensConfig(), block_size=2, max_lod=1).base
      >>> look = jax.jit(lambda params: attention_paid(base, params, jnp.arange(4), slice(0, 2)))
      >>> paid, norms = look(base.init(jax.random.key(0)))
      >>> paid[0].tolist(), paid.shape, norms.shape  # the first token sees itself
      ([1.0, 0.0, 0.0, 0.0], (2, 4), (4,))
    """
    tokens = jnp.asarray(tokens)
    places = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    entries = contexts.in_full(base.embed(params, tokens), places)
    weights, norms = base.attention(params, entries, places[query])
    pooled = weights.mean(axis=(0, 1)) if heads == "mean" else weights.max(axis=(0, 1))
    return pooled, norms.mean(axis=(0, 1))
