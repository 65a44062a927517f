"""Functions of arrays, and how to draw their arguments: for what many functions promise alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Make = Callable[[np.random.Generator], Any]
TYPES = {"f": jnp.float32, "i": jnp.int32, "b": jnp.bool_}


@dataclass(frozen=True)
class Case:
    """One function of arrays, how to draw its arguments for one sequence, and the types of its results."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Make, ...]
    outputs: str
    """One letter a leaf: f float32, i int32, b bool."""

    def draw(self, seed: int) -> tuple[Any, ...]:
        rng = np.random.default_rng(seed)
        return tuple(make(rng) for make in self.arguments)

    def check_types(self) -> None:
        """Of one sequence and of a batch; a weak type would compile anew where it meets a strong one."""
        one = self.draw(0)
        leaves = jax.tree.leaves(jax.eval_shape(self.function, *one))
        assert [leaf.dtype for leaf in leaves] == [TYPES[letter] for letter in self.outputs]
        assert not any(leaf.weak_type for leaf in leaves)
        batch = jax.eval_shape(jax.vmap(self.function), *stack([one, self.draw(1)]))
        assert [leaf.shape for leaf in jax.tree.leaves(batch)] == [(2, *leaf.shape) for leaf in leaves]


def stack(rows: list[Any]) -> Any:
    """Trees of arrays, with a leading axis for them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def uniform(*shape: int, low: float = -1, high: float = 1) -> Make:
    return lambda rng: rng.uniform(low, high, shape).astype(np.float32)


def integer(low: int, high: int) -> Make:
    return lambda rng: np.asarray(rng.integers(low, high + 1), np.int32)


def choice(count: int, *values: float) -> Make:
    return lambda rng: rng.choice(values, count).astype(np.float32)


def mask(*shape: int) -> Make:
    """Some are left out, the first never is."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        where = rng.random(shape) < 0.7
        where[0] = True
        return where

    return draw


def key(rng: np.random.Generator) -> jax.Array:
    return jax.random.key(int(rng.integers(2**31)))


POSITIVE, UNIT = uniform(low=0.2, high=2), uniform(low=0, high=0.9)
