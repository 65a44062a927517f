"""The seam between Flax modules and the library: pure functions over plain parameter dicts.

Nothing else knows how Flax splits a module. The models beside this file say how theirs is built and what it maps. All
functions take one sequence; `jax.vmap` them over sequences and variants with the parameters unbatched.
"""

import abc
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from lensjax.models.interfaces import Params

Module = TypeVar("Module", bound=nnx.Module)
Tree = TypeVar("Tree")


class Functional(abc.ABC, Generic[Module]):
    """Splits an NNX module once into a static graph and parameters; subclasses say how the module is built.

    They are frozen dataclasses, hashable: pass them as static arguments of `jax.jit`.
    """

    _graph: nnx.GraphDef[Module]

    def __post_init__(self) -> None:
        # Set past the frozen dataclass, and no field of it: models with equal fields compare and hash equal.
        object.__setattr__(self, "_graph", nnx.split(nnx.eval_shape(lambda: self._build(nnx.Rngs(0))))[0])

    @abc.abstractmethod
    def _build(self, rngs: nnx.Rngs) -> Module: ...

    def _bind(self, params: Params) -> Module:
        return nnx.merge(self._graph, params)

    def init(self, key: Array) -> Params:
        """Fresh parameters. `key` is consumed."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key)), nnx.Param))


def in_tiles(tree: Tree, tile: int) -> Tree:
    """Arrays [S, ...] with rows of zeros behind them, up to a multiple of `tile` (see `attend.tile`)."""

    def whole(rows: Array) -> Array:
        more = -rows.shape[0] % tile
        return jnp.pad(rows, [(0, more)] + [(0, 0)] * (rows.ndim - 1)) if more else rows

    return jax.tree.map(whole, tree)


def checked(name: str, values: ArrayLike, *shape: int | None) -> Array:
    """`values` as an array of the given shape; None stands for any length."""
    array = jnp.asarray(values)
    fits = array.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{expected}] (one sequence; vmap over more), got {array.shape}")
    return array
