"""Scalars that move with the step: learning rate, temperature, context length. All accept traced values."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context.geometry import ROUNDING, Geometry
from lensjax.context.rollouts import collapses_for_length, length_for_collapses


def progress(step: ArrayLike, steps: int) -> Array:
    """How far a schedule of `steps` steps has come: 0 at step 0, 1 from the last step on; float32[]."""
    return jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0.0, 1.0)


def linear(step: ArrayLike, *, start: ArrayLike, end: ArrayLike, steps: int) -> Array:
    """Straight line from `start` at step 0 to `end` at step `steps - 1`, then constant; float32[]."""
    fraction = progress(step, steps) if steps > 0 else jnp.ones((), jnp.float32)
    return jnp.asarray(start, jnp.float32) * (1 - fraction) + jnp.asarray(end, jnp.float32) * fraction


def exponential(step: ArrayLike, *, start: ArrayLike, decay: ArrayLike, floor: ArrayLike) -> Array:
    """start * decay**step, but never below the floor; float32[]."""
    value = jnp.asarray(start, jnp.float32) * jnp.asarray(decay, jnp.float32) ** jnp.asarray(step, jnp.float32)
    return jnp.maximum(value, jnp.asarray(floor, jnp.float32))


def learning_rate(
    step: ArrayLike,
    peak: ArrayLike,
    *,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_steps: int,
    steps: int,
    end_fraction: float = 0.1,
) -> Array:
    """Linear warm-up to the peak, then constant, or a fall to a fraction of the peak.

    Args:
      step: int32[], from 0. The warm-up's step i has rate peak * (i + 1) / (warmup_steps + 1), never 0.
      peak: float32[], the highest rate.
      schedule: shape after the warm-up.
      warmup_steps: length of the warm-up.
      steps: length of the whole run.
      end_fraction: rate at the last step, as a fraction of the peak.

    Returns:
      float32[].

    Raises:
      ValueError: the schedule is unknown, or the warm-up leaves no step of the run.
    """
    if steps <= warmup_steps:
        raise ValueError(f"warmup_steps must be below the run's {steps} steps, got {warmup_steps}")
    step = jnp.asarray(step, jnp.float32)
    fraction = progress(step - warmup_steps, steps - warmup_steps)
    if schedule == "constant":
        shape = jnp.ones_like(fraction)
    elif schedule == "linear":
        shape = 1 - (1 - end_fraction) * fraction
    elif schedule == "cosine":
        shape = end_fraction + (1 - end_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))
    else:
        raise ValueError(f"schedule must be constant, linear or cosine, got {schedule!r}")
    warmup = jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)
    return jnp.asarray(peak, jnp.float32) * shape * warmup


def context_length(
    step: ArrayLike, *, start: ArrayLike, end: ArrayLike, steps: int, geometry: Geometry, capacity: int
) -> Array:
    """The curriculum: length of every working context at a step.

    Args:
      step: int32[].
      start: float32[], length at step 0 as a fraction of the history.
      end: float32[], length from step `steps - 1` on.
      steps: length of the curriculum; 0 stays at `end`.
      geometry: the history.
      capacity: static number of entries; the length never exceeds it.

    Returns:
      int32[], rounded down to a reachable length.
    """
    fraction = linear(step, start=start, end=end, steps=steps)
    target = jnp.floor(fraction * geometry.history + ROUNDING).astype(jnp.int32)
    collapses = collapses_for_length(jnp.minimum(target, capacity), geometry)
    return length_for_collapses(collapses, geometry)
