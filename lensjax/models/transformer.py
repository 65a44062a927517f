"""The pre-norm transformer that the base model, GistNet and LensNet share.

Everything is written for one sequence `[S, D]`. Matrix products run in `dtype`; parameters, norms, rotary
angles and softmax are float32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lensjax.models.rope import apply_rotary

Rotary = tuple[Array, Array]
"""cos and sin, each float32[S, head_dim / 2]."""


@dataclass(frozen=True)
class TransformerConfig:
    """What all blocks of a stack have in common."""

    dim: int
    """Width of the entries [D]."""
    heads: int
    """Attention heads; a divisor of `dim`."""
    kv_heads: int
    """Key and value heads; a divisor of `heads`."""
    mlp_dim: int
    """Hidden width of the MLPs."""
    layers: int
    """Number of blocks, 0 or more."""
    causal: bool
    """Whether an entry sees only itself and earlier entries."""
    dtype: DTypeLike
    """Type of the matrix products and of the residual stream."""
    gain: float = 1.0
    """Scale of what all fresh blocks together add to the residual stream."""
    equal_query_key: bool = False
    """Start the query and key projections equal (see `Attention`)."""

    def __post_init__(self) -> None:
        """Refuses widths that do not fit each other."""
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.equal_query_key and self.kv_heads != self.heads:
            raise ValueError(f"equal_query_key needs as many kv_heads as heads, got {self.kv_heads} and {self.heads}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def branch_gain(self) -> float:
        """Scale of one branch: with two a block, the sum does not grow with depth."""
        return self.gain * (2 * self.layers) ** -0.5


def rms_norm(dim: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm in float32. Its epsilon keeps all-zero rows (padding) and their gradients finite.

    It is smaller than usual: the mean of 64 fresh embeddings has a mean square of 6e-6, and must come out at
    unit scale like any other entry.
    """
    return nnx.RMSNorm(dim, epsilon=1e-8, dtype=jnp.float32, rngs=rngs)


def linear(
    inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs, gain: float = 1.0, bias: bool = False
) -> nnx.Linear:
    """Linear layer with weights ~ Normal(0, gain^2 / inputs)."""
    kernel_init = nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=kernel_init, rngs=rngs)


class SwiGLU(nnx.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)).

    References:
      Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, Eq. 6.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs, gain: float = 1.0
    ) -> None:
        # One product for both halves: on a CPU its gradient takes less than half the time of two.
        self.gate_up = linear(inputs, 2 * hidden, dtype=dtype, rngs=rngs)
        self.down = linear(hidden, outputs, dtype=dtype, rngs=rngs, gain=gain)

    def __call__(self, x: Array) -> Array:
        """Maps [..., inputs] to [..., outputs]."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values.

    With `equal_query_key` the query and key projections start as the same random matrix W, so the logits of a
    fresh layer are x W W^T y: large where two entries are alike. Attention begins as a similarity kernel, not as
    noise, and training is free to part the two matrices.

    References:
      Ainslie et al., GQA, arXiv:2305.13245, section 2.2; Trockman and Kolter, Mimetic Initialization of
      Self-Attention Layers, arXiv:2305.09828 (their W_q W_k^T starts near a multiple of the identity; equal
      random factors are the simplest such pair).
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        kv_dim = config.kv_heads * config.head_dim
        # One key used twice draws equal matrices into separate buffers, so that both can be donated.
        shared = rngs.params()
        key_rngs = nnx.Rngs(shared) if config.equal_query_key else rngs
        self.query = linear(config.dim, config.dim, dtype=config.dtype, rngs=nnx.Rngs(shared))
        self.key = linear(config.dim, kv_dim, dtype=config.dtype, rngs=key_rngs)
        self.value = linear(config.dim, kv_dim, dtype=config.dtype, rngs=rngs)
        self.out = linear(config.dim, config.dim, dtype=config.dtype, rngs=rngs, gain=config.branch_gain)

    def __call__(self, x: Array, *, rotary: Rotary | None, key_mask: Array | None, rows: Array | None) -> Array:
        """Attends from `rows` (all entries if None) of x [S, D] to every entry; returns [R, D] or [S, D]."""
        source = x if rows is None else x[rows]
        query, key, value = map(self._heads, (self.query(source), self.key(x), self.value(x)))
        if rotary is not None:
            cos, sin = rotary
            key = apply_rotary(key, cos, sin)
            query = apply_rotary(query, cos, sin) if rows is None else apply_rotary(query, cos[rows], sin[rows])
        mask = None if key_mask is None else key_mask[None, None, :]
        if self.config.causal and rows is not None:
            earlier = jnp.arange(x.shape[0])[None, None, :] <= rows[None, :, None]
            mask = earlier if mask is None else mask & earlier
        square_causal = self.config.causal and rows is None
        # JAX's implementation mixes bfloat16 with float32 (its softmax), which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=square_causal)
        return self.out(mixed.reshape(source.shape))

    def _heads(self, x: Array) -> Array:
        return x.reshape(x.shape[0], -1, self.config.head_dim)


class Block(nnx.Module):
    """Pre-norm residual block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = rms_norm(config.dim, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = rms_norm(config.dim, rngs)
        self.mlp = SwiGLU(
            config.dim, config.mlp_dim, config.dim, dtype=config.dtype, rngs=rngs, gain=config.branch_gain
        )

    def __call__(
        self,
        x: Array,
        *,
        rotary: Rotary | None = None,
        key_mask: Array | None = None,
        rows: Array | None = None,
    ) -> Array:
        """Maps x [S, D] to [S, D], or to [R, D] when only `rows` are asked for."""
        mixed = self.attention(self.attention_norm(x), rotary=rotary, key_mask=key_mask, rows=rows)
        x = (x if rows is None else x[rows]) + mixed
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
    """A stack of blocks whose last one is computed only where its output is read."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        # String names, not a list: the parameters are then a dict with string keys all the way down.
        for layer in range(config.layers):
            setattr(self, f"block_{layer}", Block(config, rngs=rngs))

    def __call__(
        self,
        x: Array,
        *,
        rotary: Rotary | None = None,
        key_mask: Array | None = None,
        rows: Array | None = None,
    ) -> Array:
        """Runs the blocks.

        Args:
          x: [S, D].
          rotary: cos and sin for queries and keys, each [S, head_dim / 2]; None for no positions.
          key_mask: bool[S], entries that may be attended to; None for all.
          rows: int32[R] in [0, S), the outputs wanted; None for all. The last block computes queries and MLP
            for these alone.

        Returns:
          [S, D], or [R, D] when `rows` are given.
        """
        layers = self.config.layers
        if layers == 0:
            return x if rows is None else x[rows]
        for layer in range(layers):
            block: Block = getattr(self, f"block_{layer}")
            x = block(x, rotary=rotary, key_mask=key_mask, rows=rows if layer == layers - 1 else None)
        return x
