"""What the base model remembers of the entries that it has read."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of a working context with room for S entries, of which the first `length` are there.

    Rows at and beyond `length` hold anything finite and are never seen. So a cut back to any prefix is exact:
    `dataclasses.replace(cache, length=n)`, with n int32[], forgets all but the first n <= length entries.
    """

    keys: Array
    """float[layers, S, kv_heads, head_dim], turned to their positions already."""
    values: Array
    """float[layers, S, kv_heads, head_dim]."""
    inputs: Array
    """float32[S, D]: embeddings before the short convolution, whose next outputs depend on the last of them."""
    positions: Array
    """float32[S]: where the entries stand, for those that see near ones alone."""
    length: Array
    """int32[]: entries held."""

    @classmethod
    def empty(
        cls, layers: int, capacity: int, kv_heads: int, head_dim: int, *, inputs: int, dtype: DTypeLike
    ) -> "KVCache":
        """A cache of nothing, for embeddings of width `inputs`; raises ValueError if there is room for none."""
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 entry, got {capacity}")
        shape = (layers, capacity, kv_heads, head_dim)
        # Distinct buffers: a donated cache may not hold one buffer twice.
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            inputs=jnp.zeros((capacity, inputs), jnp.float32),
            positions=jnp.zeros(capacity, jnp.float32),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Entries that there is room for (S)."""
        return self.inputs.shape[-2]

    def slots(self, rows: int, count: Array) -> Array:
        """int32[R]: where the first `count` of R new entries go; `capacity`, which is nowhere, for the others."""
        offsets = jnp.arange(rows, dtype=jnp.int32)
        return jnp.where(offsets < count, self.length + offsets, self.capacity)

    def check_room(self, rows: int, count: Array) -> None:
        """Raises ValueError if `count` of R entries cannot be, or not be held, where that is known outside `jit`."""
        if not isinstance(count, jax.core.Tracer) and not 0 <= int(count) <= rows:
            raise ValueError(f"count must be between 0 and the {rows} entries given, got {int(count)}")
        wanted = self.length + count
        if not isinstance(wanted, jax.core.Tracer) and int(wanted) > self.capacity:
            raise ValueError(
                f"the cache holds {int(self.length)} of {self.capacity} entries and cannot take {int(count)} more: "
                "cut it back or start it with a larger capacity"
            )

    def last_inputs(self, rows: int) -> Array:
        """float32[rows, D]: the newest inputs, after zeros where fewer are held."""
        index = self.length + jnp.arange(-rows, 0, dtype=jnp.int32)
        return self.inputs.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
