"""Base language model: a small decoder of the Llama kind that reads embeddings at true positions."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lensjax.config import BaseConfig
from lensjax.models.rope import rotary
from lensjax.models.transformer import Transformer, TransformerConfig, rms_norm

# Small enough that a fresh model is near uniform over the vocabulary, far enough from 0 that no two contexts
# get the same loss: equal losses would leave the policy without a single preference.
EMBEDDING_STD = 0.02


class ShortConv(nnx.Module):
    """Causal depthwise convolution with a residual: y_s = x_s + sum_j kernel_j * x_{s-j}.

    It starts as a token shift, y_s = (1 - m) x_s + m x_{s-1}, where m climbs from 0 to 1 over the channels.
    Every entry then carries its predecessor's identity from the first step; attention needs that to copy.

    References:
      Peng et al., RWKV, arXiv:2305.13048 (token shift).
    """

    def __init__(self, dim: int, width: int) -> None:
        kernel = jnp.zeros((width, dim), jnp.float32)
        if width > 1:
            mix = jnp.linspace(0.0, 1.0, dim, dtype=jnp.float32)
            kernel = kernel.at[0].set(-mix).at[1].set(mix)
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
        config = self.config
        sigma = spans if config.gaussian_rope else None
        angles = rotary(positions, config.dim // config.heads, config.rope_theta, sigma)
        x = embeddings.astype(self.dtype)
        if config.conv_width:
            x = self.conv(x)
        x = self.norm(self.transformer(x, rotary=angles, rows=rows))
        return self.embedding.attend(x) if config.tied else self.head(x)
