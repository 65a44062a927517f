"""The seam between Flax modules and the library: pure `init` and `apply` over plain parameter dicts.

Nothing else in lensjax knows Flax. To use another base model, pass any object with the methods of `BaseModel` that
are called on it: training needs `init`, `embed` and `apply`.
All functions take one sequence; `jax.vmap` them over sequences and variants with the parameters unbatched.
"""

import abc
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from lensjax.context.working import Entries
from lensjax.models.base_lm import BaseLM
from lensjax.models.gistnet import GistNet
from lensjax.models.hyperlora import Deltas, HyperLoRAConfig
from lensjax.models.lensnet import LensNet
from lensjax.models.nn.cache import KVCache
from lensjax.models.nn.hypernet import HyperNet
from lensjax.models.nn.value import ValueNet
from lensjax.runs.config import BaseConfig, Config, GistConfig, LensConfig

Params = dict[str, Any]
"""Nested dict with string keys; the leaves are float32 arrays."""

Module = TypeVar("Module", bound=nnx.Module)


class Functional(abc.ABC, Generic[Module]):
    """Splits an NNX module once into a static graph and parameters; subclasses say how the module is built.

    They are frozen dataclasses, hashable: pass them as static arguments of `jax.jit`.
    """

    _graph: nnx.GraphDef[Module]

    def __post_init__(self) -> None:
        # Set past the frozen dataclass, and no field of it: models with equal fields compare and hash equal.
        object.__setattr__(self, "_graph", nnx.split(nnx.eval_shape(lambda: self._build(nnx.Rngs(0))))[0])

    @abc.abstractmethod
    def _build(self, rngs: nnx.Rngs) -> Module: ...

    def _bind(self, params: Params) -> Module:
        return nnx.merge(self._graph, params)

    def init(self, key: Array) -> Params:
        """Fresh parameters. `key` is consumed."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key)), nnx.Param))


def _checked(name: str, values: ArrayLike, *shape: int | None) -> Array:
    """`values` as an array of the given shape; None stands for any length."""
    array = jnp.asarray(values)
    fits = array.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{expected}] (one sequence; vmap over more), got {array.shape}")
    return array


@dataclass(frozen=True)
class BaseModel(Functional[BaseLM]):
    """Base language model as pure functions."""

    config: BaseConfig
    dtype: str = "float32"

    def _build(self, rngs: nnx.Rngs) -> BaseLM:
        return BaseLM(self.config, dtype=jnp.dtype(self.dtype), rngs=rngs)

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
        tokens = _checked("tokens", tokens, None)
        return self._bind(params).embed(tokens)

    def apply(
        self,
        params: Params,
        embeddings: ArrayLike,
        positions: ArrayLike,
        spans: ArrayLike,
        rows: ArrayLike,
    ) -> Array:
        """Next-token logits at chosen entries, given all entries up to each of them.

        Causal over the order of entries. Padding needs no mask: it always comes last in a working context, where
        no entry sees it. It must be finite.

        Args:
          params: from `init`.
          embeddings: float32[S, D], tokens and gists.
          positions: float32[S], centre of each entry's span, in tokens from the start of the sequence.
          spans: float32[S], tokens covered, K ** lod; sigma of the Gaussian rotary positions, if those are on.
          rows: int32[R] in [0, S), entries whose prediction is wanted.

        Returns:
          float32[R, vocabulary].

        Raises:
          ValueError: a shape does not fit.
        """
        entries = self._checked_entries(embeddings, positions, spans)
        return self._bind(params)(*entries, _checked("rows", rows, None))

    def init_cache(self, capacity: int) -> KVCache:
        """An empty cache.

        Args:
          capacity: entries that there is room for [S].

        Returns:
          A `KVCache` of length 0.

        Raises:
          ValueError: there is room for none.
        """
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 entry, got {capacity}")
        config = self.config
        shape, dtype = (config.layers, capacity, config.kv_heads, config.dim // config.heads), jnp.dtype(self.dtype)
        # Distinct buffers: a donated cache may not hold one buffer twice.
        return KVCache(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            inputs=jnp.zeros((capacity, config.dim), jnp.float32),
            length=jnp.zeros((), jnp.int32),
        )

    def extend(
        self,
        params: Params,
        cache: KVCache,
        embeddings: ArrayLike,
        positions: ArrayLike,
        spans: ArrayLike,
        count: ArrayLike | None = None,
    ) -> tuple[Array, KVCache]:
        """Reads further entries after those in the cache, at the cost of these alone.

        However a sequence is split, its logits equal those of `apply` on all of it at once, to rounding.

        Args:
          params: from `init`, the same that filled the cache.
          cache: from `init_cache` or `extend`, or one of these cut back to a prefix.
          embeddings: float32[R, D], tokens and gists.
          positions: float32[R], centre of each entry's span, in tokens from the start of the sequence.
          spans: float32[R], tokens covered, as for `apply`.
          count: int32[], how many of the R entries are real (the rest is padding and may hold anything); None for all.

        Returns:
          Next-token logits float32[R, vocabulary], of which those of padding mean nothing, and the longer cache.

        Raises:
          ValueError: a shape does not fit, `count` is not in [0, R], or the cache cannot hold so many more. The last
            two are checked where they are concrete; under `jit` they are the caller's duty, entries past the capacity
            are dropped and their logits wrong.
        """
        config = self.config
        entries = self._checked_entries(embeddings, positions, spans)
        _checked("cache.keys", cache.keys, config.layers, None, config.kv_heads, config.dim // config.heads)
        rows = entries[0].shape[0]
        count = _checked("count", rows if count is None else count).astype(jnp.int32)
        cache.check_room(rows, count)
        return self._bind(params).extend(cache, *entries, count)

    def attention(
        self, params: Params, embeddings: ArrayLike, positions: ArrayLike, spans: ArrayLike, rows: ArrayLike
    ) -> tuple[Array, Array]:
        """What chosen entries attend to in every layer of `apply`, and how long the keys are there.

            weights[l, h, r, s] = softmax_s(q_h(r) . k_h(s) / sqrt(head_dim)),  s <= r

        Args:
          params: from `init`.
          embeddings: float32[S, D], tokens and gists.
          positions: float32[S], centre of each entry's span, in tokens from the start of the sequence.
          spans: float32[S], tokens covered, as for `apply`.
          rows: int32[R] in [0, S), entries whose attention is wanted.

        Returns:
          Attention weights float32[layers, heads, R, S], 0 on later entries, and L2 norms of the keys
          float32[layers, kv_heads, S], taken before the rotation, which without Gaussian damping keeps them.

        Raises:
          ValueError: a shape does not fit.
        """
        entries = self._checked_entries(embeddings, positions, spans)
        return self._bind(params).attention(*entries, _checked("rows", rows, None))

    def _checked_entries(
        self, embeddings: ArrayLike, positions: ArrayLike, spans: ArrayLike
    ) -> tuple[Array, Array, Array]:
        embeddings = _checked("embeddings", embeddings, None, self.config.dim)
        count = embeddings.shape[0]
        return embeddings, _checked("positions", positions, count), _checked("spans", spans, count)


@dataclass(frozen=True)
class GistModel(Functional[GistNet]):
    """GistNet as pure functions."""

    config: GistConfig
    dim: int
    """Width of embeddings and gists [D]."""
    block_size: int
    """Children per gist [K]."""
    dtype: str = "float32"

    def _build(self, rngs: nnx.Rngs) -> GistNet:
        return GistNet(self.config, self.dim, self.block_size, dtype=jnp.dtype(self.dtype), rngs=rngs)

    def apply(self, params: Params, children: ArrayLike) -> Array:
        """Gists of complete blocks, each independent of the others.

        Args:
          params: from `init`.
          children: float32[n, K, D], embeddings or gists of one LOD; n may be 0.

        Returns:
          float32[n, D].

        Raises:
          ValueError: a block does not hold K children of width D.
        """
        children = _checked("children", children, None, self.block_size, self.dim)
        return self._bind(params)(children)


@dataclass(frozen=True)
class LensModel(Functional[LensNet]):
    """LensNet as pure functions."""

    config: LensConfig
    embedding_dim: int
    """Width of the entries' embeddings [D]."""
    max_lod: int
    """Highest level of detail [L]."""
    dtype: str = "float32"

    def _build(self, rngs: nnx.Rngs) -> LensNet:
        return LensNet(self.config, self.embedding_dim, self.max_lod, dtype=jnp.dtype(self.dtype), rngs=rngs)

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
        embeddings = _checked("entries.embeddings", entries.embeddings, None, self.embedding_dim)
        _checked("entries.blocks", entries.blocks, *embeddings.shape)
        for name in ("lods", "spans", "distances", "valid"):
            _checked(f"entries.{name}", getattr(entries, name), embeddings.shape[0])
        return self._bind(params)(entries)


@dataclass(frozen=True)
class ValueModel(Functional[ValueNet]):
    """A value baseline as pure functions."""

    features: int
    """Numbers that describe a state [F]."""
    hidden: int = 256

    def _build(self, rngs: nnx.Rngs) -> ValueNet:
        return ValueNet(self.features, self.hidden, rngs=rngs)

    def apply(self, params: Params, features: ArrayLike) -> Array:
        """The return to expect from a state.

        Args:
          params: from `init`.
          features: float32[F]. Detach them where the value's loss must not train their source.

        Returns:
          float32[], 0 for fresh parameters.

        Raises:
          ValueError: a shape does not fit.
        """
        return self._bind(params)(_checked("features", features, self.features))


@dataclass(frozen=True)
class HyperLoRAModel(Functional[HyperNet]):
    """The hypernetwork as pure functions."""

    config: HyperLoRAConfig
    dim: int
    """Width of a context [D]."""
    targets: tuple[tuple[str, int, int], ...]
    """Name, inputs and outputs of each matrix that gets a delta."""

    def _build(self, rngs: nnx.Rngs) -> HyperNet:
        sizes = {name: (width, out) for name, width, out in self.targets}
        return HyperNet(self.config, self.dim, sizes, rngs=rngs)

    def apply(self, params: Params, context: ArrayLike) -> Deltas:
        """The deltas for one task.

        Args:
          params: from `init`.
          context: float32[D], of `hyperlora.mean_context` or one row of `hyperlora.leave_one_out_contexts`.

        Returns:
          A delta for each target.

        Raises:
          ValueError: a shape does not fit.
        """
        return self._bind(params)(_checked("context", context, self.dim))


@dataclass(frozen=True)
class Models:
    """The three models of a run. Hashable: pass it as a static argument of `jax.jit`."""

    base: BaseModel
    gist: GistModel
    lens: LensModel
    hyper: HyperLoRAModel | None = None
    """What adapts LensNet to a document; None where it is not trained."""


def build_models(config: Config) -> Models:
    """Builds the models of a configuration; call it once, outside `jax.jit`."""
    lens = LensModel(config.lens, config.base.dim, config.context.max_lod, config.dtype)
    settings = config.adaptation
    net = HyperLoRAConfig(rank=settings.rank, init_scale=settings.init_scale, max_norm=settings.max_norm)
    return Models(
        base=BaseModel(config.base, config.dtype),
        gist=GistModel(config.gist, config.base.dim, config.context.block_size, config.dtype),
        lens=lens,
        # Two vectors of LensNet's width, of `adaptation.document_context`.
        hyper=HyperLoRAModel(net, 2 * config.lens.dim, lens.targets) if "hyper" in config.trainable else None,
    )
