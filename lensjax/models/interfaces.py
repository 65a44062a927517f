"""What lensjax asks of models: protocols of pure functions over parameter dicts, for one sequence each.

Anyone's model fits that has the methods; it must be hashable, since it is a static argument of `jax.jit`.
`lensjax.models.functional` has those of this library.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jax import Array
from jax.typing import ArrayLike

from lensjax.context.working import Entries

Params = dict[str, Any]
"""Nested dict with string keys; the leaves are float32 arrays."""


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model that reads embeddings at true positions: what training and evaluation need of one.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> class Uniform:
      ...     vocab_size, dim = 4, 2
      ...     def init(self, key):
      ...         return {}
      ...     def embed(self, params, tokens):
      ...         return jnp.zeros((len(tokens), self.dim))
      ...     def logits(self, params, entries, rows):
      ...         return jnp.zeros((len(rows), self.vocab_size))
      >>> isinstance(Uniform(), lx.LanguageModel)
      True
    """

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        ...

    @property
    def dim(self) -> int:
        """Width of the embeddings [D]."""
        ...

    def init(self, key: Array) -> Params:
        """Fresh parameters. `key` is consumed."""
        ...

    def embed(self, params: Params, tokens: ArrayLike) -> Array:
        """Embeddings float32[S, D] of tokens int32[S], the leaves of the tree."""
        ...

    def logits(self, params: Params, entries: Entries, rows: ArrayLike) -> Array:
        """Next-token logits float32[R, vocabulary] at rows int32[R], each given all entries up to it.

        Of the entries, `embeddings`, `positions` and `spans` may be read. Padding comes last and is finite, so a causal
        model needs no mask.
        """
        ...


@runtime_checkable
class StreamingLanguageModel(LanguageModel, Protocol):
    """A language model with a cache: what a `Session` needs of one."""

    def init_cache(self, capacity: int) -> Any:
        """An empty cache, a pytree, with room for `capacity` entries."""
        ...

    def extend(
        self,
        params: Params,
        cache: Any,
        entries: Entries,
        count: ArrayLike | None = None,
        rows: ArrayLike | None = None,
    ) -> tuple[Array, Any]:
        """Reads the first `count` of R entries after those in the cache.

        Returns float32[R, vocabulary], the logits of each, or of `rows` int32[Q] in [0, R) alone, and the longer cache;
        both equal `logits` of all entries.
        """
        ...

    def truncate(self, cache: Any, length: Array) -> Any:
        """The cache without all but its first `length` entries, int32[]."""
        ...


@runtime_checkable
class AttentiveLanguageModel(LanguageModel, Protocol):
    """A language model that shows its attention, which some baselines score by."""

    def attention(self, params: Params, entries: Entries, rows: ArrayLike) -> tuple[Array, Array]:
        """Attention of rows float32[layers, heads, R, S], and norms of the keys float32[layers, kv_heads, S]."""
        ...


@runtime_checkable
class StatefulLanguageModel(LanguageModel, Protocol):
    """A language model that shows what it makes of its entries on the way, which some policies read."""

    def states(self, params: Params, entries: Entries) -> Array:
        """States float32[S, dim] of some middle layer, each given all entries up to it."""
        ...


@runtime_checkable
class BaseReader(Protocol):
    """A policy that says what it reads of the base model; one that does not say so reads nothing."""

    @property
    def reads(self) -> Literal["nothing", "states", "attention"]:
        """What `Entries.states` must hold."""
        ...


class GistEncoder(Protocol):
    """Compresses the K children of a block into a gist of the same width.

    Example:
      >>> import jax.numpy as jnp
      >>> class Mean:
      ...     def init(self, key):
      ...         return {}
      ...     def apply(self, params, children):
      ...         return jnp.mean(children, axis=1)
      >>> Mean().apply({}, jnp.array([[[1.0], [3.0]]])).tolist()
      [[2.0]]
    """

    def init(self, key: Array) -> Params:
        """Fresh parameters. `key` is consumed."""
        ...

    def apply(self, params: Params, children: ArrayLike) -> Array:
        """Gists float32[n, D] of complete blocks float32[n, K, D], each independent of the others."""
        ...


class LensPolicy(Protocol):
    """Scores the entries of a working context.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> class Newest:
      ...     def init(self, key):
      ...         return {}
      ...     def apply(self, params, entries):
      ...         return jnp.where(entries.valid, 1 - entries.distances / 2, 0.0)
      >>> history = lx.tree.build(jnp.ones((4, 1)), lambda children: children[:, 0], block_size=2, max_lod=1)
      >>> geometry = lx.Geometry(history=4, block_size=2, max_lod=1, recent_tokens=1)
      >>> Newest().apply({}, lx.materialise(history, lx.recency(3, geometry, capacity=4))).tolist()
      [0.0, 0.5, 1.0, 0.0]
    """

    def init(self, key: Array) -> Params:
        """Fresh parameters. `key` is consumed."""
        ...

    def apply(self, params: Params, entries: Entries) -> Array:
        """Scores float32[W] in [-1, 1], 0 at padding: positive asks to expand an entry, negative to collapse it."""
        ...


@runtime_checkable
class FeaturePolicy(LensPolicy, Protocol):
    """A policy that also says what it sees: what a value baseline and a hypernetwork read."""

    @property
    def feature_dim(self) -> int:
        """Width of the features [F]."""
        ...

    def apply_with_features(self, params: Params, entries: Entries) -> tuple[Array, Array]:
        """The scores of `apply`, and features float32[W, F], 0 at padding."""
        ...


@dataclass(frozen=True)
class Models:
    """The three models of a run. Hashable: pass it as a static argument of `jax.jit`.

    Example:
      >>> import lensjax as lx
      >>> models = lx.build_models(lx.BaseConfig(), lx.GistConfig(), lx.LensConfig(), block_size=8, max_lod=2)
      >>> isinstance(models, lx.Models), hash(models) == hash(lx.Models(models.base, models.gist, models.lens))
      (True, True)
    """

    base: LanguageModel
    gist: GistEncoder
    lens: LensPolicy


def features_of(lens: LensPolicy) -> FeaturePolicy:
    """The policy, as one that has features.

    Raises:
      ValueError: it has none.
    """
    if not isinstance(lens, FeaturePolicy):
        raise ValueError(f"models.lens must have feature_dim and apply_with_features, got {type(lens).__name__}")
    return lens
