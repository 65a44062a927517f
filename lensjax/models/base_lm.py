"""Base language model: a small decoder of the Llama kind that reads embeddings at true positions."""

from dataclasses import dataclass, replace
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.experimental.xla_metadata import set_xla_metadata
from jax.typing import ArrayLike, DTypeLike

from lensjax._settings import Bound, Count, Layers, Positive, PositiveInt, Width, above, require, settings
from lensjax.context.working import Entries
from lensjax.models.functional import Functional, checked, in_tiles
from lensjax.models.interfaces import Params
from lensjax.models.nn.attend import Kernel
from lensjax.models.nn.cache import KVCache
from lensjax.models.nn.conv import ShortConv
from lensjax.models.nn.layers import NORM_EPS, Activation, rms_norm
from lensjax.models.nn.rope import NO_SCALING, RopeScaling, Rotary, rotary
from lensjax.models.nn.transformer import Transformer, TransformerConfig


@settings("base")
class BaseConfig:
    """Decoder-only language model of the kinds of Llama, Qwen and Gemma 3.

    Example:
      >>> import lensjax as lx
      >>> lx.BaseConfig(dim=60)
      Traceback (most recent call last):
      ValueError: base.dim must be a multiple of 2 * base.heads = 8 (rotary pairs), got 60
    """

    vocab_size: Width = 256
    dim: Width = 64
    layers: Layers = 2
    heads: Width = 4
    kv_heads: Width = 2
    head_dim: Width | None = None
    """Width of one attention head; None for dim / heads."""
    mlp_dim: Width = 192
    qkv_bias: bool = False
    """Whether the query, key and value projections have biases, as in Qwen2."""
    qk_norm: bool = False
    """Whether queries and keys are normalised before they are turned, as in Qwen3."""
    norm_eps: Positive = NORM_EPS
    """Epsilon of every RMSNorm."""
    post_norms: bool = False
    """Whether what attention and MLP add is normalised first, as in Gemma 3."""
    activation: Activation = "silu"
    """Of the MLPs' gates."""
    scale_embedding: bool = False
    """Whether embeddings are multiplied by the square root of their width, as in Gemma 3."""
    copy_heads: Count = 0
    """Key-value heads in each layer that find an entry by the one before it, and so learn at once to copy."""
    conv_width: Annotated[int, Bound(0, 1024)] = 3
    """Taps of the causal depthwise convolution on the input embeddings; 0 leaves it out."""
    tied: bool = True
    """Whether the output head is the transposed embedding."""
    rope_theta: Annotated[float, above(1)] = 10_000.0
    rope_scaling: RopeScaling = NO_SCALING
    window: PositiveInt | None = None
    """Tokens that a local layer sees, its own and those before it; None where no layer is local."""
    global_every: PositiveInt = 6
    """With a window, every so many-th layer sees all that came before, and the others are local."""
    local_rope_theta: Annotated[float, above(1)] = 10_000.0
    """As `rope_theta`, without scaling, of local layers."""
    gaussian_rope: bool = False
    """Damp rotary frequencies by exp(-(theta sigma)^2 / 2), sigma = span width."""

    def _check(self) -> None:
        require(
            self.head_dim is not None or self.dim % (2 * self.heads) == 0,
            f"base.dim must be a multiple of 2 * base.heads = {2 * self.heads} (rotary pairs), got {self.dim}",
        )
        require(
            self.head_dim is None or self.head_dim % 2 == 0,
            f"base.head_dim must be even (rotary pairs), got {self.head_dim}",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"base.heads must be a multiple of base.kv_heads {self.kv_heads}, got {self.heads}",
        )
        require(
            self.copy_heads <= self.kv_heads,
            f"base.copy_heads must be at most base.kv_heads {self.kv_heads}, got {self.copy_heads}",
        )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.dim // self.heads


# Small enough that a fresh model is near uniform over the vocabulary, far enough from 0 that no two contexts
# get the same loss: equal losses would leave the policy without a single preference.
EMBEDDING_STD = 0.02
_OF_THE_STACK = (
    *("dim", "heads", "kv_heads", "head_dim", "mlp_dim", "layers", "copy_heads", "qkv_bias", "qk_norm"),
    *("norm_eps", "post_norms", "activation"),
)


class BaseLM(nnx.Module):
    """Decoder-only language model: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

    References:
      Touvron et al., LLaMA, arXiv:2302.13971, section 2.2.
    """

    def __init__(self, config: BaseConfig, *, dtype: DTypeLike, kernel: Kernel = "xla", rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dtype
        init = nnx.initializers.normal(EMBEDDING_STD)
        self.embedding = nnx.Embed(config.vocab_size, config.dim, dtype=jnp.float32, embedding_init=init, rngs=rngs)
        if config.conv_width:
            self.conv = ShortConv(config.dim, config.conv_width)
        shared = {name: getattr(config, name) for name in _OF_THE_STACK}
        stack = TransformerConfig(**shared, causal=True, dtype=dtype, kernel=kernel)
        self.transformer = Transformer(stack, rngs=rngs)
        self.norm = rms_norm(config.dim, rngs, config.norm_eps)
        if not config.tied:
            self.head = nnx.Linear(
                config.dim, config.vocab_size, use_bias=False, dtype=jnp.float32, kernel_init=init, rngs=rngs
            )

    def embed(self, tokens: Array) -> Array:
        """Embeddings float32[S, D] of tokens int32[S]."""
        rows = jnp.take(self.embedding.embedding[...], tokens, axis=0)
        if self.config.scale_embedding:
            rows = rows * jnp.asarray(self.config.dim**0.5, rows.dtype)
        return rows.astype(jnp.float32)

    def __call__(self, embeddings: Array, positions: Array, spans: Array, rows: Array) -> Array:
        """Next-token logits at `rows`: float32[R, vocab]. See `BaseModel.logits`."""
        x = self.transformer(self._mix(embeddings), rotary=self._angles(positions, spans), rows=rows)
        return self._logits(x)

    def extend(
        self, cache: KVCache, embeddings: Array, positions: Array, spans: Array, count: Array, rows: Array | None
    ) -> tuple[Array, KVCache]:
        """Logits of new entries and the longer cache. See `BaseModel.extend`."""
        slots, embeddings = cache.slots(embeddings.shape[0], count), embeddings.astype(cache.inputs.dtype)
        before = cache.last_inputs(max(self.config.conv_width - 1, 0))
        x = self._mix(jnp.concatenate([before, embeddings]))[before.shape[0] :]
        memory = (cache.keys, cache.values)
        held = cache.positions.at[slots].set(positions.astype(jnp.float32), mode="drop")
        # Kept: a processor would work them out anew for every head of every layer.
        with set_xla_metadata(inlineable="false"):
            angles = jax.jit(self._angles)(positions, spans, held)
        x, (keys, values) = self.transformer.extend(x, memory, rotary=angles, slots=slots, rows=rows)
        inputs = cache.inputs.at[slots].set(embeddings, mode="drop")
        length = jnp.minimum(cache.length + count, cache.capacity)
        return self._logits(x), KVCache(keys, values, inputs, held, length)

    def states(self, embeddings: Array, positions: Array, spans: Array) -> Array:
        """What half of the layers make of the entries. See `BaseModel.states`."""
        return self.transformer.half(self._mix(embeddings), rotary=self._angles(positions, spans))

    def attention(self, embeddings: Array, positions: Array, spans: Array, rows: Array) -> tuple[Array, Array]:
        """Attention weights and norms of keys. See `BaseModel.attention`."""
        return self.transformer.attention(self._mix(embeddings), rotary=self._angles(positions, spans), rows=rows)

    def _angles(self, positions: Array, spans: Array, held: Array | None = None) -> Rotary | list[Rotary]:
        """Where entries stand, for all layers or for each; `held` are positions that they may see, None for theirs."""
        config = self.config
        sigma = spans if config.gaussian_rope else None
        whole = Rotary(*rotary(positions, config.head_width, config.rope_theta, sigma, scaling=config.rope_scaling))
        if config.window is None:
            return whole
        seen = positions if held is None else held
        near = positions[:, None] - seen[None, :] < config.window
        local = Rotary(*rotary(positions, config.head_width, config.local_rope_theta, sigma), near)
        return [whole if layer % config.global_every == 0 else local for layer in range(1, config.layers + 1)]

    def _mix(self, embeddings: Array) -> Array:
        """What the first layer reads of the entries [S, D]."""
        x = embeddings.astype(jnp.float32)
        return self.conv(x) if self.config.conv_width else x

    def _logits(self, x: Array) -> Array:
        matrix = self.embedding.embedding[...].T if self.config.tied else self.head.kernel[...]
        # A float32 copy of a bfloat16 vocabulary would be larger than most layers together.
        dtype = self.dtype if matrix.dtype == self.dtype else jnp.float32
        return jnp.dot(self.norm(x).astype(dtype), matrix.astype(dtype), preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class BaseModel(Functional[BaseLM]):
    """Base language model as pure functions.

    Matrices of the parameters may be float32 or bfloat16; vectors (norms, biases) are float32, as are the residual
    stream, rotary angles, softmax and logits.
    """

    config: BaseConfig
    dtype: str = "float32"
    """Type of the matrix products."""
    kernel: Kernel = "xla"
    """What computes attention."""
    tile: int = 1
    """Entries are padded to a multiple of this for the layers: see `attend.tile`."""

    def _build(self, rngs: nnx.Rngs) -> BaseLM:
        return BaseLM(self.config, dtype=jnp.dtype(self.dtype), kernel=self.kernel, rngs=rngs)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        return self.config.vocab_size

    @property
    def dim(self) -> int:
        """Width of the embeddings [D]."""
        return self.config.dim

    def embed(self, params: Params, tokens: ArrayLike) -> Array:
        """Token embeddings, the leaves of the tree.

        Args:
          params: from `init`.
          tokens: int32[S]; a token outside the vocabulary gives NaN.

        Returns:
          float32[S, D].

        Raises:
          ValueError: `tokens` is not one sequence.
        """
        tokens = checked("tokens", tokens, None)
        return self._bind(params).embed(tokens)

    def logits(self, params: Params, entries: Entries, rows: ArrayLike) -> Array:
        """Next-token logits at chosen entries, given all entries up to each of them.

        Causal over the order of entries. Padding needs no mask: it always comes last in a working context, where
        no entry sees it. It must be finite.

        Args:
          params: from `init`.
          entries: S tokens and gists. The spans are the sigma of the Gaussian rotary positions, if those are on.
          rows: int32[R] in [0, S), entries whose prediction is wanted.

        Returns:
          float32[R, vocabulary].

        Raises:
          ValueError: a shape does not fit.
        """
        return self._bind(params)(*in_tiles(self._read(entries), self.tile), checked("rows", rows, None))

    def init_cache(self, capacity: int) -> KVCache:
        """An empty cache.

        Args:
          capacity: entries that there is room for [S].

        Returns:
          A `KVCache` of length 0.

        Raises:
          ValueError: there is room for none.
        """
        config = self.config
        shape = (config.layers, capacity, config.kv_heads, config.head_width)
        return KVCache.empty(*shape, inputs=config.dim, dtype=self.dtype)

    def extend(
        self,
        params: Params,
        cache: KVCache,
        entries: Entries,
        count: ArrayLike | None = None,
        rows: ArrayLike | None = None,
    ) -> tuple[Array, KVCache]:
        """Reads further entries after those in the cache, at the cost of these alone.

        However a sequence is split, its logits equal those of `logits` on all of it at once, to rounding.

        Args:
          params: from `init`, the same that filled the cache.
          cache: from `init_cache` or `extend`, or one of these cut back to a prefix.
          entries: R tokens and gists.
          count: int32[], how many of the R entries are real (the rest is padding and may hold anything); None for all.
          rows: int32[Q] in [0, R), new entries whose prediction is wanted; None for all.

        Returns:
          Next-token logits float32[Q, vocabulary] (without `rows` of all R), of which those of padding mean nothing,
          and the longer cache.

        Raises:
          ValueError: a shape does not fit, `count` is not in [0, R], or the cache cannot hold so many more. The last
            two are checked where they are concrete; under `jit` they are the caller's duty, entries past the capacity
            are dropped and their logits wrong.
        """
        config = self.config
        read = self._read(entries)
        checked("cache.keys", cache.keys, config.layers, None, config.kv_heads, config.head_width)
        new = read[0].shape[0]
        count = checked("count", new if count is None else count).astype(jnp.int32)
        cache.check_room(new, count)
        return self._bind(params).extend(cache, *read, count, None if rows is None else checked("rows", rows, None))

    def attention(self, params: Params, entries: Entries, rows: ArrayLike) -> tuple[Array, Array]:
        """What chosen entries attend to in every layer of `logits`, and how long the keys are there.

            weights[l, h, r, s] = softmax_s(q_h(r) . k_h(s) / sqrt(head_dim)),  s <= r

        Args:
          params: from `init`.
          entries: S tokens and gists.
          rows: int32[R] in [0, S), entries whose attention is wanted.

        Returns:
          Attention weights float32[layers, heads, R, S], 0 on later entries, and L2 norms of the keys
          float32[layers, kv_heads, S], taken before the rotation, which without Gaussian damping keeps them.

        Raises:
          ValueError: a shape does not fit.
        """
        return self._bind(params).attention(*self._read(entries), checked("rows", rows, None))

    def states(self, params: Params, entries: Entries) -> Array:
        """What half of the layers, rounded down, make of entries, each given all up to it: what a policy may read.

        Args:
          params: from `init`.
          entries: S tokens and gists.

        Returns:
          float32[S, D].

        Raises:
          ValueError: a shape does not fit.
        """
        read = self._read(entries)
        states = self._bind(params).states(*in_tiles(read, self.tile))
        return states[: read[0].shape[0]].astype(jnp.float32)

    def truncate(self, cache: KVCache, length: Array) -> KVCache:
        """The cache without all but its first `length` entries, int32[]."""
        return replace(cache, length=length)

    def _read(self, entries: Entries) -> tuple[Array, Array, Array]:
        """What the model reads of entries: embeddings, positions, spans."""
        embeddings = checked("entries.embeddings", entries.embeddings, None, self.config.dim)
        count = embeddings.shape[0]
        positions, spans = (
            checked(f"entries.{name}", getattr(entries, name), count) for name in ("positions", "spans")
        )
        return embeddings, positions, spans
