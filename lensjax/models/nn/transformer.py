"""The pre-norm transformer that the base model, GistNet and LensNet share.

Everything is written for one sequence `[S, D]`. Matrix products run in `dtype`; norms, rotary angles and softmax are
float32, and the residual stream has the type of what comes in. Matrices may be stored in float32 or bfloat16.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lensjax.models.nn.attend import Kernel, attend, up_to
from lensjax.models.nn.layers import NORM_EPS, Activation, SwiGLU, linear, rms_norm
from lensjax.models.nn.rope import Rotary, apply_rotary

Memory = tuple[Array, Array]
"""Keys, turned already, and values: [S, kv_heads, head_dim] each in one layer, [layers, ...] in a stack."""


@dataclass(frozen=True)
class TransformerConfig:
    """What all blocks of a stack have in common."""

    dim: int
    """Width of the entries [D]."""
    heads: int
    """Attention heads; a divisor of `dim`, unless `head_dim` is given."""
    kv_heads: int
    """Key and value heads; a divisor of `heads`."""
    mlp_dim: int
    """Hidden width of the MLPs."""
    layers: int
    """Number of blocks, 0 or more."""
    causal: bool
    """Whether an entry sees only itself and earlier entries."""
    dtype: DTypeLike
    """Type of the matrix products."""
    gain: float = 1.0
    """Scale of what all fresh blocks together add to the residual stream."""
    equal_query_key: bool = False
    """Start the query and key projections equal (see `Attention`)."""
    copy_heads: int = 0
    """Key heads, the first ones, that stand for the entry after theirs (see `Attention`)."""
    head_dim: int | None = None
    """Width of one head; None for dim / heads."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have biases."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm of their own, one for all heads, before they are turned."""
    norm_eps: float = NORM_EPS
    """Epsilon of every RMSNorm."""
    post_norms: bool = False
    """Whether what attention and MLP add to the residual stream passes an RMSNorm of its own first."""
    activation: Activation = "silu"
    """Of the MLPs' gates."""
    kernel: Kernel = "xla"
    """What computes attention."""

    def __post_init__(self) -> None:
        """Refuses widths that do not fit each other."""
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if not 0 <= self.copy_heads <= self.kv_heads:
            raise ValueError(f"copy_heads must be between 0 and kv_heads {self.kv_heads}, got {self.copy_heads}")
        if self.equal_query_key and self.kv_heads != self.heads:
            raise ValueError(f"equal_query_key needs as many kv_heads as heads, got {self.kv_heads} and {self.heads}")

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.heads

    @property
    def branch_gain(self) -> float:
        """Scale of one branch: with two a block, the sum does not grow with depth."""
        return self.gain * (2 * self.layers) ** -0.5


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values.

    With `equal_query_key` the query and key projections start as the same random matrix W, so the logits of a
    fresh layer are x W W^T y: large where two entries are alike. Attention begins as a similarity kernel, not as
    noise, and training is free to part the two matrices.

    A copy head looks one entry back for its keys: an entry is found by what came before it. With query and key
    projections that start equal, a fresh copy head reads what followed the places that resemble this one, which is
    what a language model must do to repeat a name it has read. Two plain layers can learn to do so, but had not after
    seven million bytes of text.

    References:
      Olsson et al., In-context Learning and Induction Heads, arXiv:2209.11895 (the head, and the "smeared keys" with
      which one layer has it); Ainslie et al., GQA, arXiv:2305.13245, section 2.2; Trockman and Kolter, Mimetic
      Initialization of Self-Attention Layers, arXiv:2305.09828 (their W_q W_k^T starts near a multiple of the
      identity; equal random factors are the simplest such pair).
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        own_dim, kv_dim = config.heads * config.head_width, config.kv_heads * config.head_width
        # One key used twice draws equal matrices into separate buffers, so that both can be donated.
        shared = rngs.params()
        key_rngs = nnx.Rngs(shared) if config.equal_query_key else rngs
        shape: Any = {"dtype": config.dtype, "bias": config.qkv_bias}
        self.query = linear(config.dim, own_dim, **shape, rngs=nnx.Rngs(shared))
        self.key = linear(config.dim, kv_dim, **shape, rngs=key_rngs)
        if config.copy_heads:
            group, width = config.heads // config.kv_heads, config.copy_heads * config.head_width
            keys = self.key.kernel[...][:, :width].reshape(config.dim, config.copy_heads, 1, config.head_width)
            queries = jnp.repeat(keys, group, axis=2).reshape(config.dim, width * group)
            self.query.kernel[...] = self.query.kernel[...].at[:, : width * group].set(queries)
        self.value = linear(config.dim, kv_dim, **shape, rngs=rngs)
        self.out = linear(own_dim, config.dim, dtype=config.dtype, rngs=rngs, gain=config.branch_gain)
        if config.qk_norm:
            self.query_norm = rms_norm(config.head_width, rngs, config.norm_eps)
            self.key_norm = rms_norm(config.head_width, rngs, config.norm_eps)

    def __call__(self, x: Array, *, rotary: Rotary | None, key_mask: Array | None, rows: Array | None) -> Array:
        """Attends from `rows` (all entries if None) of x [S, D] to every entry; returns [R, D] or [S, D]."""
        if rows is not None and self.config.kernel != "xla" and 2 * rows.shape[0] > x.shape[0]:
            # A fused kernel reads whole sequences; most of this one is asked for anyway.
            return self(x, rotary=rotary, key_mask=key_mask, rows=None)[rows]
        source, own_rotary = (x, rotary) if rows is None else _take((x, rotary), rows)
        # Query, key, value: in this order their gradients are added up, and another one gives other last bits.
        query, key = self._searched("query", source, own_rotary), self._searched("key", x, rotary)
        near = None if own_rotary is None else own_rotary.near
        return self._mix(query, key, self._heads(self.value(x)), rows=rows, valid=key_mask, near=near)

    def extend(
        self, x: Array, memory: Memory, *, rotary: Rotary | None, slots: Array, rows: Array | None = None
    ) -> tuple[Array, Memory]:
        """Writes x [R, D] to `slots` int32[R] of the memory and attends to all slots up to each: [R, D], memory.

        Of `rows` int32[Q] alone, where these are given: [Q, D].
        """
        source, own_rotary, own = (x, rotary, slots) if rows is None else (*_take((x, rotary), rows), slots[rows])
        query = self._searched("query", source, own_rotary)
        key = memory[0].at[slots].set(self._searched("key", x, rotary), mode="drop")
        value = memory[1].at[slots].set(self._heads(self.value(x)), mode="drop")
        return self._mix(query, key, value, rows=own, near=None if own_rotary is None else own_rotary.near), (
            key,
            value,
        )

    def weights(self, x: Array, *, rotary: Rotary | None, rows: Array) -> tuple[Array, Array]:
        """What `rows` of x [S, D] attend to, causally, and the norms of unturned keys: [heads, R, S], [kv_heads, S]."""
        config = self.config
        source, own_rotary = _take((x, rotary), rows)
        query, unturned = self._searched("query", source, own_rotary), self._searched("key", x)
        key = jnp.repeat(self._shift(_turned(unturned, rotary)), config.heads // config.kv_heads, axis=1)
        logits = jnp.einsum("rhd,shd->hrs", query, key, preferred_element_type=jnp.float32) * config.head_width**-0.5
        near = None if own_rotary is None else own_rotary.near
        weights = jax.nn.softmax(jnp.where(up_to(rows, x.shape[0], near)[None], logits, -jnp.inf))
        return weights, jnp.linalg.norm(unturned.astype(jnp.float32), axis=-1).T

    def _mix(self, query: Array, key: Array, value: Array, **seen: Array | None) -> Array:
        config = self.config
        return self.out(attend(query, self._shift(key), value, causal=config.causal, kernel=config.kernel, **seen))

    def _shift(self, key: Array) -> Array:
        """Gives each entry, in the copy heads, the key of the one before it; the first has a key of zeros."""
        count = self.config.copy_heads
        if count == 0:
            return key
        before = jnp.pad(key[:-1, :count], ((1, 0), (0, 0), (0, 0)))
        return jnp.concatenate([before, key[:, count:]], axis=1)

    def _searched(self, name: str, x: Array, rotary: Rotary | None = None) -> Array:
        """Heads of "query" or "key" of x [S, D], turned to their positions: [S, heads, head_dim]."""
        heads = self._heads(getattr(self, name)(x))
        if self.config.qk_norm:
            heads = getattr(self, f"{name}_norm")(heads).astype(heads.dtype)
        return _turned(heads, rotary)

    def _heads(self, x: Array) -> Array:
        """Splits [S, heads * head_dim] into heads."""
        return x.reshape(x.shape[0], -1, self.config.head_width)


def _turned(heads: Array, rotary: Rotary | None) -> Array:
    return heads if rotary is None else apply_rotary(heads, rotary.cos, rotary.sin)


def _take(entries: tuple[Array, Rotary | None], rows: Array) -> tuple[Array, Rotary | None]:
    return jax.tree.map(lambda of_entry: of_entry[rows], entries)


class Block(nnx.Module):
    """Pre-norm residual block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.attention_norm = rms_norm(config.dim, rngs, config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = rms_norm(config.dim, rngs, config.norm_eps)
        self.mlp = SwiGLU(
            config.dim,
            config.mlp_dim,
            config.dim,
            dtype=config.dtype,
            rngs=rngs,
            gain=config.branch_gain,
            activation=config.activation,
        )
        if config.post_norms:
            self.attention_post_norm = rms_norm(config.dim, rngs, config.norm_eps)
            self.mlp_post_norm = rms_norm(config.dim, rngs, config.norm_eps)

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
        return self._add(x if rows is None else x[rows], mixed)

    def extend(
        self, x: Array, memory: Memory, *, rotary: Rotary | None, slots: Array, rows: Array | None = None
    ) -> tuple[Array, Memory]:
        """Maps new entries x [R, D] to [R, D], or [Q, D] of `rows`, and the memory of this layer to a longer one."""
        mixed, memory = self.attention.extend(self.attention_norm(x), memory, rotary=rotary, slots=slots, rows=rows)
        return self._add(x if rows is None else x[rows], mixed), memory

    def _add(self, x: Array, mixed: Array) -> Array:
        if not self.config.post_norms:
            x = x + mixed.astype(x.dtype)
            return x + self.mlp(self.mlp_norm(x)).astype(x.dtype)
        x = x + self.attention_post_norm(mixed).astype(x.dtype)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))).astype(x.dtype)


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
        rotary: Rotary | list[Rotary] | None = None,
        key_mask: Array | None = None,
        rows: Array | None = None,
    ) -> Array:
        """Runs the blocks.

        Args:
          x: [S, D].
          rotary: where the entries stand, for all blocks or for each; None for no positions.
          key_mask: bool[S], entries that may be attended to, of a stack that is not causal; None for all.
          rows: int32[R] in [0, S), the outputs wanted; None for all. The last block computes queries and MLP
            for these alone.

        Returns:
          [S, D], or [R, D] when `rows` are given.
        """
        blocks = self._blocks(rotary)
        if not blocks:
            return x if rows is None else x[rows]
        for block, own in blocks[:-1]:
            x = block(x, rotary=own, key_mask=key_mask)
        last, own = blocks[-1]
        return last(x, rotary=own, key_mask=key_mask, rows=rows)

    def half(self, x: Array, *, rotary: Rotary | list[Rotary] | None = None) -> Array:
        """What the first half of the blocks, rounded down, makes of x: [S, D]."""
        for block, own in self._blocks(rotary)[: self.config.layers // 2]:
            x = block(x, rotary=own)
        return x

    def extend(
        self,
        x: Array,
        memory: Memory,
        *,
        rotary: Rotary | list[Rotary] | None,
        slots: Array,
        rows: Array | None = None,
    ) -> tuple[Array, Memory]:
        """Runs the blocks of a causal stack on new entries after those that it remembers.

        Args:
          x: [R, D].
          memory: keys and values of all layers, each [layers, S, kv_heads, head_dim].
          rotary: where the new entries stand, for all blocks or for each; None for no positions.
          slots: int32[R], rising, where the new entries go; S for padding, which is not written. An entry attends to
            all slots up to its own.
          rows: int32[Q] in [0, R), the outputs wanted; None for all. The last block computes queries and MLP for
            these alone.

        Returns:
          [R, D], or [Q, D] when `rows` are given, and the memory with the new entries.
        """
        (keys, values), blocks = memory, self._blocks(rotary)
        if not blocks and rows is not None:
            x = x[rows]
        for layer, (block, own) in enumerate(blocks):
            wanted = rows if layer == len(blocks) - 1 else None
            x, (key, value) = block.extend(x, (keys[layer], values[layer]), rotary=own, slots=slots, rows=wanted)
            keys, values = keys.at[layer].set(key), values.at[layer].set(value)
        return x, (keys, values)

    def attention(self, x: Array, *, rotary: Rotary | list[Rotary] | None, rows: Array) -> tuple[Array, Array]:
        """Attention weights of `rows` [layers, heads, R, S] and norms of the keys [layers, kv_heads, S]."""
        weights, key_norms = [], []
        for block, own in self._blocks(rotary):
            of_rows, of_keys = block.attention.weights(block.attention_norm(x), rotary=own, rows=rows)
            weights.append(of_rows)
            key_norms.append(of_keys)
            # Nothing reads the last block's output; jit leaves it out.
            x = block(x, rotary=own)
        return jnp.stack(weights), jnp.stack(key_norms)

    def _blocks(self, rotary: Rotary | list[Rotary] | None) -> list[tuple[Block, Rotary | None]]:
        """The blocks, each with where its entries stand."""
        own = rotary if isinstance(rotary, list) else [rotary] * self.config.layers
        return [(getattr(self, f"block_{layer}"), own[layer]) for layer in range(self.config.layers)]
