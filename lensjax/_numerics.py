"""Means over what a mask keeps."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def masked_mean(values: ArrayLike, where: ArrayLike) -> Array:
    """Mean of the valid values, 0 without any; float32[]."""
    values, where = jnp.asarray(values), jnp.asarray(where)
    where = jnp.broadcast_to(where, values.shape)
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1)


def masked_std(values: ArrayLike, where: ArrayLike) -> Array:
    """Population standard deviation of the valid values, 0 without any; float32[]."""
    values = jnp.asarray(values)
    return jnp.sqrt(masked_mean((values - masked_mean(values, where)) ** 2, where))
