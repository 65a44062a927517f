"""LensNet: a bidirectional policy that scores every entry of one working context."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lensjax.config import LensConfig
from lensjax.models.transformer import SwiGLU, Transformer, TransformerConfig, linear, rms_norm

FREQUENCIES = (0.5, 1.0, 2.0, 4.0)
"""Radians per unit of log1p(distance), for the sine and cosine features."""
FEATURE_STD = 0.3
"""Scale of the LOD embedding and of the feature map: time is heard beside content from the start. At 0.05 a LensNet on
text had not noticed after 200 steps that what is recent matters."""
HEAD_GAIN = 0.1
"""Scale of fresh scores before tanh: small, so that no entry starts saturated."""


class LensNet(nnx.Module):
    """Scores each entry in (-1, 1): positive asks to expand it, negative to collapse it into its parent.

    An entry is its embedding, its LOD, the log of its span and its distance to the cursor. Attention runs in
    both directions, since what the tail asks for decides what is worth detail. It has no rotary positions:
    whether two entries match is then the same question wherever they stand, learned once for all distances, and
    time is one more feature of an entry, to be weighed or left. Query and key projections start equal, so that
    attention begins as a similarity kernel (see `Attention`).
    """

    def __init__(
        self, config: LensConfig, embedding_dim: int, max_lod: int, *, dtype: DTypeLike, rngs: nnx.Rngs
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
        )
        self.transformer = Transformer(stack, rngs=rngs)
        self.norm = rms_norm(config.dim, rngs)
        self.head = (
            linear(config.dim, 1, dtype=jnp.float32, rngs=rngs, gain=HEAD_GAIN, bias=True)
            if config.head == "linear"
            else SwiGLU(config.dim, config.mlp_dim, 1, dtype=jnp.float32, rngs=rngs, gain=HEAD_GAIN)
        )

    def __call__(
        self, embeddings: Array, lods: Array, spans: Array, distances: Array, valid: Array
    ) -> tuple[Array, Array]:
        """Scores float32[W] and features float32[W, dim]. See `lensjax.models.functional.LensModel`."""
        # A masked key still meets its value as 0 * v: whatever stands in padding must at least be finite.
        embeddings = jnp.where(valid[:, None], embeddings, 0.0)
        lods = jnp.where(valid, lods, 0)
        spans, distances = jnp.where(valid, spans, 1.0), jnp.where(valid, distances, 0.0)
        x = self.content(self.embedding_norm(embeddings)) + self.lod(lods)
        x = x + self.features(time_features(spans, distances))
        x = self.norm(self.transformer(x, key_mask=valid))
        scores = jnp.where(valid, jnp.tanh(self.head(x)[:, 0]), 0.0)
        return scores, jnp.where(valid[:, None], x, 0.0).astype(jnp.float32)


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
