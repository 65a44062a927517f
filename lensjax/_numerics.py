"""Means over what a mask keeps; programs whose results may be undefined."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def may_be_nan(program: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A program whose results are NaN where they are undefined, whatever `JAX_DEBUG_NANS` says.

    A NaN that is a fault is found all the same: by the name of its metric, in every step.
    """

    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.debug_nans(False):
            return program(*args, **kwargs)

    return run


def masked_mean(values: ArrayLike, where: ArrayLike) -> Array:
    """Mean of the valid values, 0 without any; float32[]."""
    values, where = jnp.asarray(values), jnp.asarray(where)
    where = jnp.broadcast_to(where, values.shape)
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1)


def masked_std(values: ArrayLike, where: ArrayLike) -> Array:
    """Population standard deviation of the valid values, 0 without any; float32[]."""
    values = jnp.asarray(values)
    return jnp.sqrt(masked_mean((values - masked_mean(values, where)) ** 2, where))
