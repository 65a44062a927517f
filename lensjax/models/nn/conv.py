"""The short convolution over the embeddings that the base model reads."""

import jax.numpy as jnp
from flax import nnx
from jax import Array


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
        for j in range(width):
            x = x + padded[width - 1 - j : width - 1 - j + length] * kernel[j][None, :]
        return x
