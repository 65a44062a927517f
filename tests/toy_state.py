"""A state with every kind of array, and whether two are the same to the bit."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict[str, Any]
    opt: tuple[Any, ...]
    key: jax.Array


def make_state(step: int = 3) -> State:
    base = {"w": jnp.linspace(-1.0, 1.0, 60).reshape(5, 12) / 3, "b": jnp.full((2, 3), 1.1, jnp.bfloat16)}
    lens = {"scale": jnp.float32(1 / 3), "none": jnp.zeros((0, 4), jnp.int8)}
    odd = jnp.array([np.nan, -np.nan, -0.0, np.inf, 1e-45, 3.4e38], jnp.float32)
    opt = ((jnp.int32(step), base), (), None, {"odd": odd, "mask": jnp.array([True, False])})
    return State(jnp.int32(step), {"base": base, "lens": lens}, opt, jax.random.split(jax.random.key(step), 2))


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
