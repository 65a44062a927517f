"""GistNet: compresses K child embeddings into one gist of the same width."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from lensjax._settings import Bound, Width, require, settings
from lensjax.models.functional import Functional, checked
from lensjax.models.interfaces import Params
from lensjax.models.nn.layers import SwiGLU, linear, rms_norm
from lensjax.models.nn.transformer import Transformer, TransformerConfig


@settings("gist")
class GistConfig:
    """GistNet: K child embeddings to one gist of the same width.

    Example:
      >>> import lensjax as lx
      >>> lx.GistConfig(pooling="max")
      Traceback (most recent call last):
      ValueError: gist.pooling must be one of mean, query, cls, got 'max'
    """

    pooling: Literal["mean", "query", "cls"] = "mean"
    head: Literal["linear", "mlp"] = "linear"
    layers: Annotated[int, Bound(0, 128)] = 0
    heads: Width = 4
    start: Literal["mean", "scaled"] = "mean"
    """What a fresh GistNet gives: the pooled children, or these `scaled` to the norm of a child (the function of that
    name), which a base model that was not trained with gists can read."""

    def _check(self) -> None:
        require(
            self.start == "mean" or self.pooling != "cls",
            "gist.start must be mean with gist.pooling cls, whose gists are no average of the children, got "
            f"{self.start}",
        )


MLP_RATIO = 3
FRESH_GAIN = 1e-4
"""Scale of what a fresh GistNet adds to plain pooling: far below the mean of many embeddings, but not 0."""
TOKEN_STD = 0.02
"""Scale of the learned token and query: that of the base model's fresh embeddings."""


def scaled(pooled: ArrayLike, centre: ArrayLike, children: int) -> Array:
    """An average of children at the norm of one child.

        centre + sqrt(children) (pooled - centre)

    Independent children share the mean of all embeddings, the centre; the mean of n of them leaves it as it is, while
    what each has of its own shrinks with sqrt(n). A model that has only read tokens takes that direction for a token.

    Args:
      pooled: float[..., D], the average.
      centre: float[D].
      children: how many were averaged.

    Returns:
      float32[..., D].

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.models.gistnet import scaled
      >>> scaled(jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0]), 4).tolist()
      [5.0, 1.0]
    """
    pooled, centre = (jnp.asarray(values, jnp.float32) for values in (pooled, centre))
    centre = jnp.broadcast_to(centre, pooled.shape)
    return centre + math.sqrt(children) * (pooled - centre)


def centred(params: Params, embeddings: ArrayLike) -> Params:
    """The parameters of a GistNet of `start` scaled, about the mean of a base model's embeddings.

    A fresh one is about 0, which is where the embeddings of a fresh base model are.

    Args:
      params: of GistNet.
      embeddings: float[n, D], of the tokens of some text. Not of the vocabulary: what rare tokens have in common is
        elsewhere, and all that text has in common would be scaled with the rest.

    Returns:
      The parameters, of which `centre` is another.

    Raises:
      ValueError: they have no centre.

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> from lensjax.models.gistnet import GistModel, centred
      >>> model = GistModel(lx.GistConfig(start="scaled", heads=1), dim=2, block_size=4)
      >>> centred(model.init(jax.random.key(0)), jnp.array([[1.0, 2.0], [3.0, 2.0]]))["centre"].tolist()
      [2.0, 2.0]
    """
    require("centre" in params, "the parameters of GistNet must have a centre: set gist.start to scaled")
    return {**params, "centre": jnp.asarray(embeddings, jnp.float32).mean(axis=0)}


class QueryPooling(nnx.Module):
    """Weighted mean of the children, the weights of each head read off by a learned query.

        pooled[h] = sum_k softmax_k(q_h . key_h(norm(x_k)) / sqrt(d)) x_k[h]

    The children themselves are averaged, not a projection of them, so that a gist stays in the embedding space.
    """

    def __init__(self, dim: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm = rms_norm(dim, rngs)
        self.key = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.query = nnx.Param(TOKEN_STD * jax.random.normal(rngs.params(), (1, heads, dim // heads)))

    def __call__(self, children: Array) -> Array:
        """Maps [K, D] to [D]."""
        values = children.reshape(children.shape[0], self.heads, -1)
        keys = self.key(self.norm(children)).reshape(values.shape)
        query = self.query[...].astype(keys.dtype)
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(query, keys, values.astype(keys.dtype)).reshape(-1)


class GistNet(nnx.Module):
    """Pools K children into a gist, plus a small learned correction: gist = pooled + head(norm(pooled)).

    Bidirectional transformer layers over the children (with learned child positions) may come first. A fresh
    `mean` or `query` GistNet of any depth gives nearly the mean of the children, or with `start` scaled this at the
    norm of one child, about a learned centre (`centred`).

    - `mean`: the mean of the children;
    - `query`: an average weighted by a learned query (`QueryPooling`);
    - `cls`: a learned token is put before the children, and pooled is its state after the last layer. The token
      sees the children only inside a layer, so with `layers = 0` it still has one, without child positions.
    """

    def __init__(self, config: GistConfig, dim: int, block_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dtype
        has_token = config.pooling == "cls"
        stack = TransformerConfig(
            dim=dim,
            heads=config.heads,
            kv_heads=config.heads,
            mlp_dim=MLP_RATIO * dim,
            layers=max(config.layers, 1) if has_token else config.layers,
            causal=False,
            dtype=dtype,
            # All that a token knows of the children comes through the layers; elsewhere they only correct.
            gain=TOKEN_STD if has_token else FRESH_GAIN,
        )
        self.transformer = Transformer(stack, rngs=rngs)
        if config.layers:
            self.positions = nnx.Param(FRESH_GAIN * jax.random.normal(rngs.params(), (block_size, dim)))
        if config.pooling == "query":
            self.pooling = QueryPooling(dim, config.heads, dtype=dtype, rngs=rngs)
        if has_token:
            self.token = nnx.Param(TOKEN_STD * jax.random.normal(rngs.params(), (1, dim)))
        if config.start == "scaled":
            self.centre = nnx.Param(jnp.zeros(dim, jnp.float32))
        self.norm = rms_norm(dim, rngs)
        self.head = (
            linear(dim, dim, dtype=dtype, rngs=rngs, gain=FRESH_GAIN)
            if config.head == "linear"
            else SwiGLU(dim, MLP_RATIO * dim, dim, dtype=dtype, rngs=rngs, gain=FRESH_GAIN)
        )

    def __call__(self, children: Array) -> Array:
        """Gists float32[n, D] of children [n, K, D]; blocks are independent and n may be 0."""
        return jax.vmap(self._gist)(children)

    def _gist(self, children: Array) -> Array:
        x = children
        if self.config.layers:
            x = x + self.positions[...]
        if self.config.pooling == "cls":
            x = jnp.concatenate([self.token[...], x])
            pooled = self.transformer(x.astype(self.dtype), rows=jnp.zeros(1, jnp.int32))[0]
        elif self.config.pooling == "query":
            pooled = self.pooling(self.transformer(x.astype(self.dtype)))
        else:
            pooled = jnp.mean(self.transformer(x.astype(self.dtype)).astype(jnp.float32), axis=0)
        if self.config.start == "scaled":
            pooled = scaled(pooled, self.centre[...], children.shape[0])
        correction = self.head(self.norm(pooled))
        return pooled.astype(jnp.float32) + correction.astype(jnp.float32)


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
        children = checked("children", children, None, self.block_size, self.dim)
        return self._bind(params)(children)
