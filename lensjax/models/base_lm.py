"""Base language model: a small decoder of the Llama kind that reads embeddings at true positions."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lensjax.models.nn.cache import KVCache
from lensjax.models.nn.rope import rotary
from lensjax.models.nn.transformer import Rotary, Transformer, TransformerConfig, rms_norm
from lensjax.runs.config import BaseConfig

# Small enough that a fresh model is near uniform over the vocabulary, far enough from 0 that no two contexts
# get the same loss: equal losses would leave the policy without a single preference.
EMBEDDING_STD = 0.02


class ShortConv(nnx.Module):
    """Causal depthwise convolution with a residual: y_s = x_s + sum_j kernel_j * x_{s-j}.

    It starts as a token shift, y_s = (1 - m) x_{s-j} + m x_{s-j-1}, where j + m climbs from 0 to width - 1 over the
    channels. Every entry then carries its predecessors' identities from the first step; attention needs that to copy.

    References:
      Peng et al., RWKV, arXiv:2305.13048 (token shift).
    """

    def __init__(self, dim: int, width: int) -> None:
        kernel = jnp.zeros((width, dim), jnp.float32)
        if width > 1:
            shift = jnp.linspace(0.0, width - 1.0, dim, dtype=jnp.float32)
            taps = jnp.maximum(0.0, 1.0 - jnp.abs(shift[None, :] - jnp.arange(width, dtype=jnp.float32)[:, None]))
            kernel = taps.at[0].add(-1.0)
        self.kernel = nnx.Param(kernel)

    def __call__(self, x: Array) -> Array:
        """Maps [S, D] to [S, D] in the type of x."""
        kernel = self.kernel[...].astype(x.dtype)
        width, length = kernel.shape[0], x.shape[0]
        padded = jnp.pad(x, ((width - 1, 0), (0, 0)))
        shifted = jnp.stack([padded[width - 1 - j : width - 1 - j + length] for j in range(width)])
        return x + jnp.sum(shifted * kernel[:, None, :], axis=0)


class BaseLM(nnx.Module):
    """Decoder-only language model: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

    References:
      Touvron et al., LLaMA, arXiv:2302.13971, section 2.2.
    """

    def __init__(self, config: BaseConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dtype
        init = nnx.initializers.normal(EMBEDDING_STD)
        self.embedding = nnx.Embed(config.vocab_size, config.dim, dtype=jnp.float32, embedding_init=init, rngs=rngs)
        if config.conv_width:
            self.conv = ShortConv(config.dim, config.conv_width)
        stack = TransformerConfig(
            dim=config.dim,
            heads=config.heads,
            kv_heads=config.kv_heads,
            mlp_dim=config.mlp_dim,
            layers=config.layers,
            causal=True,
            copy_heads=config.copy_heads,
            dtype=dtype,
        )
        self.transformer = Transformer(stack, rngs=rngs)
        self.norm = rms_norm(config.dim, rngs)
        if not config.tied:
            self.head = nnx.Linear(
                config.dim, config.vocab_size, use_bias=False, dtype=jnp.float32, kernel_init=init, rngs=rngs
            )

    def embed(self, tokens: Array) -> Array:
        """Embeddings float32[S, D] of tokens int32[S]."""
        return self.embedding(tokens)

    def __call__(self, embeddings: Array, positions: Array, spans: Array, rows: Array) -> Array:
        """Next-token logits at `rows`: float32[R, vocab]. See `lensjax.models.functional.BaseModel.apply`."""
        x = self.transformer(self._mix(embeddings), rotary=self._angles(positions, spans), rows=rows)
        return self._logits(x)

    def extend(
        self, cache: KVCache, embeddings: Array, positions: Array, spans: Array, count: Array
    ) -> tuple[Array, KVCache]:
        """Logits of new entries and the longer cache. See `lensjax.models.functional.BaseModel.extend`."""
        slots, embeddings = cache.slots(embeddings.shape[0], count), embeddings.astype(cache.inputs.dtype)
        before = cache.last_inputs(max(self.config.conv_width - 1, 0))
        x = self._mix(jnp.concatenate([before, embeddings]))[before.shape[0] :]
        memory = (cache.keys, cache.values)
        x, (keys, values) = self.transformer.extend(x, memory, rotary=self._angles(positions, spans), slots=slots)
        inputs = cache.inputs.at[slots].set(embeddings, mode="drop")
        length = jnp.minimum(cache.length + count, cache.capacity)
        return self._logits(x), KVCache(keys, values, inputs, length)

    def attention(self, embeddings: Array, positions: Array, spans: Array, rows: Array) -> tuple[Array, Array]:
        """Attention weights and norms of keys. See `lensjax.models.functional.BaseModel.attention`."""
        return self.transformer.attention(self._mix(embeddings), rotary=self._angles(positions, spans), rows=rows)

    def _angles(self, positions: Array, spans: Array) -> Rotary:
        config = self.config
        sigma = spans if config.gaussian_rope else None
        return rotary(positions, config.dim // config.heads, config.rope_theta, sigma)

    def _mix(self, embeddings: Array) -> Array:
        """What the first layer reads of the entries [S, D]."""
        x = embeddings.astype(self.dtype)
        return self.conv(x) if self.config.conv_width else x

    def _logits(self, x: Array) -> Array:
        x = self.norm(x)
        return self.embedding.attend(x) if self.config.tied else self.head(x)
