"""LensNet: a bidirectional policy that scores every entry of one working context."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lensjax._settings import Layers, Width, require, settings
from lensjax.context.working import BLOCKS_BEFORE, Entries
from lensjax.models.functional import Functional, checked, in_tiles
from lensjax.models.interfaces import Params
from lensjax.models.nn.attend import Kernel
from lensjax.models.nn.layers import SwiGLU, linear, rms_norm
from lensjax.models.nn.transformer import Transformer, TransformerConfig


@settings("lens")
class LensConfig:
    """LensNet: bidirectional policy over the entries of one working context.

    Example:
      >>> import lensjax as lx
      >>> lx.LensConfig(dim=65)
      Traceback (most recent call last):
      ValueError: lens.dim must be a multiple of lens.heads 2, got 65
    """

    dim: Width = 64
    layers: Layers = 2
    heads: Width = 2
    """Few and wide: a head compares entries by what it projects them to, and 16 numbers tell few of them apart."""
    mlp_dim: Width = 192
    head: Literal["linear", "mlp"] = "linear"
    blocks: bool = True
    """Whether a token is seen with the gist of its block beside it."""
    reads: Literal["nothing", "states", "attention"] = "nothing"
    """What of the base model, which reads the whole history for it, is seen of an entry's block and the four before it:
    the states of a middle layer, or what the history's end attends to."""
    map: bool = True
    """Whether what is omitted is seen, as gists; without omission every gist is an entry, and seen."""
    recency: bool = False
    """Whether scores fall with age to begin with; what resembles the query (`pointer`) is above that from the start."""
    pointer: bool = True
    """Whether the end of the history is compared with each entry, besides what attention does (`Pointer`)."""

    def _check(self) -> None:
        require(self.dim % self.heads == 0, f"lens.dim must be a multiple of lens.heads {self.heads}, got {self.dim}")


FREQUENCIES = (0.5, 1.0, 2.0, 4.0)
"""Radians per unit of log1p(distance), for the sine and cosine features."""
FEATURE_STD = 0.3
"""Scale of the LOD embedding and of the feature map: time is heard beside content from the start. At 0.05 a LensNet on
text had not noticed after 200 steps that what is recent matters."""
HEAD_GAIN = 0.1
"""Scale of what a fresh head says before tanh: small, so that no entry starts saturated by it. A fresh pointer speaks
up: what resembles the query begins with a high score."""
RECENCY_SLOPE = 0.15
"""Fall of a fresh score before tanh with log1p(distance): over a thousand tokens it goes from 0 to -1."""
FAINTEST = 1e-5
"""Attention that counts as none."""
_NEVER = -1e30
"""Logit of padding: finite, so that a context without entries has weights."""


class Pointer(nnx.Module):
    """What the end of the history asks for, compared with every entry: a score for each.

        s_i = sum_h (sum_j w_jh q_jh) . k_ih / sqrt(d),    w_jh = softmax_j(u_h . x_j - 2 log1p(distance_j))

    Attention tells an entry what it resembles; this tells it how much. A gist is a mean of K embeddings, in which a
    product of two projections can recognise a token, where layers with a nonlinearity in between learn slowly to.

    References:
      Vinyals et al., Pointer Networks, arXiv:1506.03134, Eq. 3; DeepSeek-AI, DeepSeek-V3.2 (2025), section 2.1 (an
      indexer of learned keys and queries, trained apart from the model that reads what it selects).
    """

    def __init__(self, dim: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        # As in `Attention`: one key drawn twice, so that what is alike matches from the start.
        shared = rngs.params()
        self.query = linear(dim, dim, dtype=dtype, rngs=nnx.Rngs(shared))
        self.key = linear(dim, dim, dtype=dtype, rngs=nnx.Rngs(shared))
        self.weight = linear(dim, heads, dtype=dtype, rngs=rngs)
        self.gain = nnx.Param(jnp.full(heads, 1.0 / heads, jnp.float32))

    def __call__(self, content: Array, blocks: Array, x: Array, distances: Array, valid: Array) -> Array:
        """float32[W] from entries, their blocks, what the layers made of them, [W, dim] each, and their age."""
        logits = self.weight(x).astype(jnp.float32) - 2 * jnp.log1p(distances)[:, None]
        weights = jax.nn.softmax(jnp.where(valid[:, None], logits, _NEVER), axis=0)
        shape = (len(valid), self.heads, -1)
        query, key = (y.astype(jnp.float32).reshape(shape) for y in (self.query(content), self.key(blocks)))
        request = jnp.einsum("jh,jhd->hd", weights, query)
        return jnp.einsum("hd,ihd,h->i", request, key, self.gain[...]) * query.shape[-1] ** -0.5


class LensNet(nnx.Module):
    """Scores each entry in (-1, 1): positive asks to expand it, negative to collapse it into its parent.

    An entry is its embedding, its block's gist, its LOD, the log of its span and its distance to the cursor. With
    the gist beside the token, a span looks the same whichever way it is shown: what was learned of it as a gist still
    holds once it was expanded. Attention runs in both directions, since what the query asks for decides what is worth
    detail. It has no rotary positions: whether two entries match is then the same question wherever they stand, learned
    once for all distances, and time is one more feature of an entry, to be weighed or left. Query and key projections
    start equal, so that attention begins as a similarity kernel (see `Attention`).
    """

    def __init__(
        self,
        config: LensConfig,
        embedding_dim: int,
        max_lod: int,
        *,
        state_dim: int = 0,
        dtype: DTypeLike,
        kernel: Kernel = "xla",
        rngs: nnx.Rngs,
    ) -> None:
        init = nnx.initializers.normal(FEATURE_STD)
        self.embedding_norm = rms_norm(embedding_dim, rngs)
        self.content = linear(embedding_dim, config.dim, dtype=dtype, rngs=rngs)
        self.lod = nnx.Embed(max_lod + 1, config.dim, dtype=dtype, embedding_init=init, rngs=rngs)
        features = 2 + 2 * len(FREQUENCIES)
        self.features = nnx.Linear(features, config.dim, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        stack = TransformerConfig(
            dim=config.dim,
            heads=config.heads,
            kv_heads=config.heads,
            mlp_dim=config.mlp_dim,
            layers=config.layers,
            causal=False,
            dtype=dtype,
            equal_query_key=True,
            kernel=kernel,
        )
        self.transformer = Transformer(stack, rngs=rngs)
        self.norm = rms_norm(config.dim, rngs)
        self.config = config
        if config.blocks:
            self.block = linear(config.dim, config.dim, dtype=dtype, rngs=rngs)
        if config.reads != "nothing":
            self.state = linear(state_dim * (1 + BLOCKS_BEFORE), config.dim, dtype=dtype, rngs=rngs)
        if config.recency:
            self.slope = nnx.Param(jnp.full((), RECENCY_SLOPE, jnp.float32))
        if config.pointer:
            self.pointer = Pointer(config.dim, config.heads, dtype=dtype, rngs=rngs)
        self.head = (
            linear(config.dim, 1, dtype=jnp.float32, rngs=rngs, gain=HEAD_GAIN, bias=True)
            if config.head == "linear"
            else SwiGLU(config.dim, config.mlp_dim, 1, dtype=jnp.float32, rngs=rngs, gain=HEAD_GAIN)
        )

    def __call__(self, entries: Entries) -> tuple[Array, Array]:
        """Scores float32[W] and features float32[W, dim]. See `LensModel`."""
        # A masked key still meets its value as 0 * v: whatever stands in padding must at least be finite.
        valid = entries.valid if self.config.map else entries.valid & (entries.lods == 0)
        lods = jnp.where(valid, entries.lods, 0)
        spans, distances = jnp.where(valid, entries.spans, 1.0), jnp.where(valid, entries.distances, 0.0)
        content = self._content(entries.embeddings, valid)
        block = self._content(entries.blocks, valid) if self.config.blocks else content
        x = content + self.lod(lods) + self.features(time_features(spans, distances))
        x = x + self.block(block) if self.config.blocks else x
        if entries.states is not None and self.config.reads != "nothing":
            x = x + self._known(entries.states, valid)
        x = self.norm(self.transformer(x, key_mask=valid))
        scores = self.head(x)[:, 0]
        if self.config.pointer:
            scores = scores + self.pointer(content, block, x, distances, valid)
        if self.config.recency:
            scores = scores - self.slope[...] * jnp.log1p(distances)
        scores = jnp.where(valid, jnp.tanh(scores), 0.0)
        return scores, jnp.where(valid[:, None], x, 0.0).astype(jnp.float32)

    def _content(self, embeddings: Array, valid: Array) -> Array:
        return self.content(self.embedding_norm(jnp.where(valid[:, None], embeddings, 0.0)))

    def _known(self, states: Array, valid: Array) -> Array:
        """What is read of the base model: attention on a logarithmic scale, states at unit size."""
        states = jnp.where(valid[:, None], states, 0.0)
        if self.config.reads == "attention":
            return self.state(1 + jnp.log(states + FAINTEST) / jnp.log(1 / FAINTEST) * 2)
        size = jnp.sqrt(jnp.mean(jnp.square(states), axis=-1, keepdims=True) + FAINTEST)
        return self.state(states / size)


def time_features(spans: Array, distances: Array) -> Array:
    """Width and distance of entries on logarithmic scales.

        [log span, log1p(distance), sin(f log1p(distance)), cos(f log1p(distance)) for f in FREQUENCIES]

    Args:
      spans: float32[W], tokens covered.
      distances: float32[W], tokens from the entry's centre to the cursor.

    Returns:
      float32[W, 2 + 2 * len(FREQUENCIES)].
    """
    age = jnp.log1p(distances)
    angles = age[:, None] * jnp.asarray(FREQUENCIES, jnp.float32)[None, :]
    return jnp.concatenate([jnp.log(spans)[:, None], age[:, None], jnp.sin(angles), jnp.cos(angles)], axis=-1)


@dataclass(frozen=True)
class LensModel(Functional[LensNet]):
    """LensNet as pure functions."""

    config: LensConfig
    embedding_dim: int
    """Width of the entries' embeddings [D]."""
    max_lod: int
    """Highest level of detail [L]."""
    dtype: str = "float32"
    state_dim: int = 0
    """Numbers that are read of the base model for each block [F]."""
    kernel: Kernel = "xla"
    """What computes attention."""
    tile: int = 1
    """Entries are padded to a multiple of this for the layers: see `attend.tile`."""

    def _build(self, rngs: nnx.Rngs) -> LensNet:
        return LensNet(
            self.config,
            self.embedding_dim,
            self.max_lod,
            state_dim=self.state_dim,
            dtype=jnp.dtype(self.dtype),
            kernel=self.kernel,
            rngs=rngs,
        )

    @property
    def reads(self) -> Literal["nothing", "states", "attention"]:
        """What `Entries.states` must hold."""
        return self.config.reads

    @property
    def feature_dim(self) -> int:
        """Width of the features of `apply_with_features`."""
        return self.config.dim

    @property
    def targets(self) -> tuple[tuple[str, int, int], ...]:
        """What a hypernetwork adapts: the last matrix of each MLP and of the head; their paths, inputs and outputs."""
        shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(self.init, jax.random.key(0)))
        named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape) for path, leaf in shapes]
        ends = ("mlp/down/kernel", "head/down/kernel", "head/kernel")
        return tuple((name, *shape) for name, shape in named if name.endswith(ends))

    def apply(self, params: Params, entries: Entries) -> Array:
        """Policy scores: positive asks to expand an entry, negative to collapse it.

        Args:
          params: from `init`.
          entries: W entries of one working context. Detach them where LensNet's loss must not train their source. What
            stands in padding is ignored.

        Returns:
          float32[W] in (-1, 1), 0 at padding.

        Raises:
          ValueError: a shape does not fit.
        """
        return self.apply_with_features(params, entries)[0]

    def apply_with_features(self, params: Params, entries: Entries) -> tuple[Array, Array]:
        """The scores of `apply`, and what the last layer says of each entry, float32[W, dim], 0 at padding."""
        embeddings = checked("entries.embeddings", entries.embeddings, None, self.embedding_dim)
        checked("entries.blocks", entries.blocks, *embeddings.shape)
        if self.config.reads != "nothing":
            if entries.states is None:
                raise ValueError(f"entries.states must be there for a LensNet with lens.reads {self.config.reads}")
            checked("entries.states", entries.states, embeddings.shape[0], self.state_dim * (1 + BLOCKS_BEFORE))
        for name in ("lods", "spans", "distances", "valid"):
            checked(f"entries.{name}", getattr(entries, name), embeddings.shape[0])
        count = embeddings.shape[0]
        scores, features = self._bind(params)(in_tiles(entries, self.tile))
        return scores[:count], features[:count]
