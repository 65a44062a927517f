"""What a base model that shows its attention looks at when it reads in full."""

from typing import Literal

from jax import Array
from jax.typing import ArrayLike

from lensjax.context.working import Entries
from lensjax.models.interfaces import AttentiveLanguageModel, Params


def attention_paid(
    base: AttentiveLanguageModel,
    params: Params,
    entries: Entries,
    rows: ArrayLike,
    *,
    heads: Literal["mean", "max"] = "mean",
) -> tuple[Array, Array]:
    """Attention that some entries pay to all of them.

    Args:
      base: the base model.
      params: its parameters.
      entries: S entries.
      rows: int32[R], those whose attention is wanted.
      heads: over layers and heads, the mean or the largest.

    Returns:
      float32[R, S], 0 on later entries, of sum 1 in each row where it is the mean; float32[S], L2 norms of the keys,
      mean over layers and heads.

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> from lensjax.context.working import in_full
      >>> from lensjax.models.attention import attention_paid
      >>> config = lx.BaseConfig(dim=16, heads=2, layers=1)
      >>> base = lx.build_models(config, lx.GistConfig(), lx.LensConfig(), block_size=2, max_lod=1).base
      >>> params, tokens = base.init(jax.random.key(0)), jnp.arange(4)
      >>> entries = in_full(base.embed(params, tokens), tokens)
      >>> paid, norms = jax.jit(lambda params: attention_paid(base, params, entries, jnp.arange(2)))(params)
      >>> paid[0].tolist(), paid.shape, norms.shape  # the first token sees itself
      ([1.0, 0.0, 0.0, 0.0], (2, 4), (4,))
    """
    weights, norms = base.attention(params, entries, rows)
    pooled = weights.mean(axis=(0, 1)) if heads == "mean" else weights.max(axis=(0, 1))
    return pooled, norms.mean(axis=(0, 1))
