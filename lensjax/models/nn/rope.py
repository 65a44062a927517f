"""Rotary position embeddings at float positions, with optional Gaussian damping for wide spans.

Pairs are the two halves of a head, `(x[i], x[i + head_dim / 2])`, as in Llama.
"""

import math
from typing import Annotated, Literal, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import Positive, PositiveInt, at_least, require, settings

Numbers = TypeVar("Numbers", Array, np.ndarray)


class Rotary(NamedTuple):
    """Where the entries of a block stand."""

    cos: Array
    """float32[S, head_dim / 2]."""
    sin: Array
    """float32[S, head_dim / 2]."""
    near: Array | None = None
    """bool[S, S], or with a memory bool[R, S]: which entries each is near enough to see; None for all."""


@settings("base.rope_scaling")
class RopeScaling:
    """How the frequencies of a model are slowed down that was trained further, on longer texts.

        llama3:  f' = f (m + (1 - m) / factor),  m = (original_length f / (2 pi) - low) / (high - low) clipped to [0, 1]

    Frequencies that turn fewer than `low` times within the original length are divided by the factor, those that turn
    more than `high` times stay, in between it is a mixture.

    References:
      Grattafiori et al., The Llama 3 Herd of Models, arXiv:2407.21783, section 3.4.2 [from memory]; the formula is that
      of the published reference code.

    Example:
      >>> from lensjax.models.nn.rope import RopeScaling
      >>> RopeScaling("llama3", low=4.0)
      Traceback (most recent call last):
      ValueError: base.rope_scaling.high must be above base.rope_scaling.low 4.0, got 4.0
    """

    kind: Literal["none", "llama3"] = "none"
    factor: Annotated[float, at_least(1)] = 8.0
    low: Positive = 1.0
    high: Positive = 4.0
    original_length: PositiveInt = 8192
    """Tokens of the texts before the longer ones."""

    def _check(self) -> None:
        require(
            self.high > self.low,
            f"base.rope_scaling.high must be above base.rope_scaling.low {self.low}, got {self.high}",
        )

    def __call__(self, frequencies: Numbers) -> Numbers:
        """The frequencies in use, in radians per token; any shape, of JAX or NumPy."""
        if self.kind == "none":
            return frequencies
        turns = self.original_length * frequencies / (2 * math.pi)
        mixture = ((turns - self.low) / (self.high - self.low)).clip(0.0, 1.0)
        return frequencies * (mixture + (1.0 - mixture) / self.factor)


NO_SCALING = RopeScaling()


def rotary(
    positions: ArrayLike,
    head_dim: int,
    theta: float,
    sigma: ArrayLike | None = None,
    *,
    scaling: RopeScaling = NO_SCALING,
) -> tuple[Array, Array]:
    """Cosine and sine of every rotary angle, damped when positions are uncertain.

        f_i = theta ** (-2 i / head_dim),  i = 0 .. head_dim / 2 - 1
        cos[s, i] = cos(f_i p_s) exp(-(f_i sigma_s)^2 / 2),  sin alike

    Damped so, cos and sin are the expectation of exp(j f_i p) over p ~ Normal(p_s, sigma_s^2): an entry that
    stands for many tokens loses the frequencies that turn within its span and keeps the slow ones.

    Args:
      positions: [S], in tokens; fractions are fine. Absolute angles are float32, so adjacent tokens stay
        distinct up to positions of about 10^6.
      head_dim: width of an attention head, even.
      theta: base of the frequencies.
      sigma: [S], in tokens, standard deviation of the position; None for exact positions.
      scaling: what is made of the frequencies f_i first.

    Returns:
      cos and sin, each float32[S, head_dim / 2].

    Raises:
      ValueError: `head_dim` is odd.

    References:
      Su et al., RoFormer, arXiv:2104.09864, section 3.2.2.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even (rotary turns pairs), got {head_dim}")
    positions = jnp.asarray(positions, jnp.float32)
    frequencies = scaling(theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    angles = positions[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if sigma is None:
        return cos, sin
    widths = jnp.asarray(sigma, jnp.float32)[:, None] * frequencies[None, :]
    damping = jnp.exp(-0.5 * jnp.square(widths))
    return cos * damping, sin * damping


def apply_rotary(x: ArrayLike, cos: ArrayLike, sin: ArrayLike) -> Array:
    """Turns every pair of every head by its entry's angle: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
      x: [S, heads, head_dim], queries or keys.
      cos: float32[S, head_dim / 2], from `rotary`.
      sin: float32[S, head_dim / 2], from `rotary`.

    Returns:
      [S, heads, head_dim] in the type of `x`; the turn itself is float32.
    """
    x = jnp.asarray(x)
    cos, sin = jnp.asarray(cos)[:, None, :], jnp.asarray(sin)[:, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
