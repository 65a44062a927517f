"""Rotary position embeddings at float positions, with optional Gaussian damping for wide spans.

Pairs are the two halves of a head, `(x[i], x[i + head_dim / 2])`, as in Llama.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def rotary(positions: ArrayLike, head_dim: int, theta: float, sigma: ArrayLike | None = None) -> tuple[Array, Array]:
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
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
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
