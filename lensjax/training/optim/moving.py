"""State that keeps training steady, as `init`/`update` pairs over small frozen pytrees."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean

EPS = 1e-8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EmaMoments:
    """Debiased exponential moving mean and variance of x, and the product of decays, which is what debiases them.

    The variance is kept as it is, not as `E[x**2] - E[x]**2`, whose terms cancel in float32 where the mean is large.
    """

    decay_product: Array
    """float32[]: product of all decays so far; 1 before the first update."""
    mean: Array
    """float32[]; 0 before the first update."""
    variance: Array
    """float32[]; 1 before the first update."""


def init_moments() -> EmaMoments:
    """Moments that have seen nothing."""
    # Distinct buffers: a donated state may not hold one buffer twice.
    return EmaMoments(jnp.ones(()), jnp.zeros(()), jnp.ones(()))


def update_moments(moments: EmaMoments, values: ArrayLike, where: ArrayLike, beta: ArrayLike) -> EmaMoments:
    """Takes in one batch of mean m' and variance v'; a batch without valid values changes nothing.

        share    = (1 - beta) / (1 - beta P),    P the product of the decays before
        mean     = m + share (m' - m)
        variance = (1 - share) v + share v' + share (1 - share) (m' - m)^2

    These are mean and variance of all values so far, a batch i with the weight (1 - beta_i) times all later decays: a
    share of the old weight 1 - P, after its decay, and of the new one.

    Args:
      moments: the state so far.
      values: float[...], for the normaliser the deltas of all variants of the global batch.
      where: bool[...], which of them count.
      beta: float32[], decay in [0, 1).

    Returns:
      The new state.

    References:
      Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979), for two
      samples put together; Kingma and Ba, Adam, arXiv:1412.6980, section 3, for the debiasing.
    """
    where = jnp.asarray(where)
    any_valid = jnp.any(where)
    mean = masked_mean(values, where)
    variance = masked_mean(jnp.square(values - mean), where)
    decay = jnp.where(any_valid, beta, 1.0)
    share = jnp.where(any_valid, (1 - decay) / jnp.where(any_valid, 1 - decay * moments.decay_product, 1.0), 0.0)
    step = mean - moments.mean
    return EmaMoments(
        decay_product=moments.decay_product * decay,
        mean=moments.mean + share * step,
        variance=(1 - share) * moments.variance + share * variance + share * (1 - share) * step**2,
    )


def normalise(moments: EmaMoments, values: ArrayLike) -> Array:
    """z = (x - mean) / sqrt(var); the values as they are until the state holds one update."""
    return (jnp.asarray(values) - moments.mean) / jnp.sqrt(moments.variance + EPS)


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
    kind: Literal["previous", "ema", "fixed", "stage"],
    beta: ArrayLike,
    is_new_stage: ArrayLike = False,
) -> Any:
    """The anchor policy for the next step.

    Args:
      anchor: parameters of the anchor at this step.
      before: the policy's parameters before this step's update.
      after: and after it.
      kind: `previous` keeps the parameters before the update, `ema` averages the parameters after it, `fixed` stays,
        and `stage` stays but for a new stage, which begins with the policy that the one before has made.
      beta: float32[], decay of the average.
      is_new_stage: bool[], whether a stage begins with the next step; read where the kind is `stage`.

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
    if kind == "stage":
        return jax.tree.map(lambda old, new: jnp.where(is_new_stage, new, old), anchor, after)
    raise ValueError(f"anchor must be previous, ema, fixed or stage, got {kind!r}")
