"""State that keeps training steady, as `init`/`update` pairs over small frozen pytrees."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

EPS = 1e-8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EmaMoments:
    """Exponential moving averages of x and x**2 that start at zero, and the product of decays that debiases them."""

    decay_product: Array
    """float32[]: product of all decays so far; 1 before the first update."""
    first: Array
    """float32[]: biased average of x."""
    second: Array
    """float32[]: biased average of x**2."""


def init_moments() -> EmaMoments:
    """Moments that have seen nothing."""
    # Distinct buffers: a donated state may not hold one buffer twice.
    return EmaMoments(jnp.ones(()), jnp.zeros(()), jnp.zeros(()))


def update_moments(moments: EmaMoments, values: ArrayLike, where: ArrayLike, beta: ArrayLike) -> EmaMoments:
    """Takes in one batch; a batch without valid values changes nothing.

    Args:
      moments: the state so far.
      values: float[...], for the normaliser the deltas of all variants of the global batch.
      where: bool[...], which of them count.
      beta: float32[], decay in [0, 1).

    Returns:
      The new state.
    """
    values, where = jnp.asarray(values), jnp.asarray(where)
    values = jnp.where(where, values, 0.0)
    count = jnp.sum(where, dtype=jnp.float32)
    first = jnp.sum(values) / jnp.maximum(count, 1)
    second = jnp.sum(values**2) / jnp.maximum(count, 1)
    # A decay of 1 is the identity.
    decay = jnp.where(count > 0, beta, 1.0)
    return EmaMoments(
        decay_product=moments.decay_product * decay,
        first=decay * moments.first + (1 - decay) * first,
        second=decay * moments.second + (1 - decay) * second,
    )


def moments_mean_var(moments: EmaMoments) -> tuple[Array, Array]:
    """Debiased mean and variance, float32[] each; 0 and 1 before the first update.

    Reference: Kingma and Ba, Adam (arXiv 1412.6980), section 3, for the debiasing.
    """
    is_empty = moments.decay_product >= 1
    scale = jnp.where(is_empty, 1.0, 1 - moments.decay_product)
    mean = moments.first / scale
    variance = jnp.maximum(moments.second / scale - mean**2, 0.0)
    return jnp.where(is_empty, 0.0, mean), jnp.where(is_empty, 1.0, variance)


def normalise(moments: EmaMoments, values: ArrayLike) -> Array:
    """z = (x - mean) / sqrt(var); the values as they are until the state holds one update."""
    mean, variance = moments_mean_var(moments)
    return (jnp.asarray(values) - mean) / jnp.sqrt(variance + EPS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """The last n values of a series, for their exact mean."""

    values: Array
    """float32[n]: a ring; the value with index i is at i % n."""
    count: Array
    """int32[]: values seen so far."""


def init_window(size: int) -> Window:
    """A window of so many values that has seen none.

    Raises:
      ValueError: the size is below 1.
    """
    if size < 1:
        raise ValueError(f"a window must hold at least 1 value, got {size}")
    return Window(jnp.zeros(size), jnp.zeros((), jnp.int32))


def update_window(window: Window, value: ArrayLike) -> Window:
    """Takes in one value, float32[], in the place of the oldest one."""
    place = window.count % window.values.shape[0]
    return Window(window.values.at[place].set(value), window.count + 1)


def window_mean(window: Window) -> Array:
    """Mean of the last n values, or of those seen while they are fewer, float32[]; 0 before the first one."""
    seen = jnp.minimum(window.count, window.values.shape[0])
    # Places that were not written to hold 0.
    return jnp.sum(window.values) / jnp.maximum(seen, 1).astype(jnp.float32)


def init_anchor(params: Any) -> Any:
    """The anchor policy before the first step: a copy of the policy itself, so that the first KL is 0."""
    return jax.tree.map(jnp.copy, params)


def update_anchor(
    anchor: Any,
    before: Any,
    after: Any,
    *,
    kind: Literal["previous", "ema", "fixed"],
    beta: ArrayLike,
) -> Any:
    """The anchor policy for the next step.

    Args:
      anchor: parameters of the anchor at this step.
      before: the policy's parameters before this step's update.
      after: and after it.
      kind: `previous` keeps the parameters before the update, `ema` averages the parameters after it, `fixed` stays.
      beta: float32[], decay of the average.

    Returns:
      Parameters of the anchor at the next step.

    Raises:
      ValueError: the kind is unknown.
    """
    if kind == "previous":
        return before
    if kind == "ema":
        return jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, anchor, after)
    if kind == "fixed":
        return anchor
    raise ValueError(f"anchor must be previous, ema or fixed, got {kind!r}")
