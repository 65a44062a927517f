"""A base model that shares nothing with those of the library but the protocols: no Flax, and a cache of its own."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax import Entries, Params
from lensjax.models import StreamingLanguageModel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memories:
    """The memory after each entry read."""

    rows: Array
    """float32[S, D]."""
    length: Array
    """int32[]: entries read."""


@dataclass(frozen=True)
class ForeignModel:
    """Logits of an entry from a decaying memory of the entries up to it.

    memory_i = 0.5 memory_{i-1} + embedding_i (1 + position_i / 64) / span_i;    logits_i = memory_i @ head
    """

    vocab_size: int = 7
    dim: int = 5

    def init(self, key: Array) -> Params:
        table_key, head_key = jax.random.split(key)
        return {
            "table": jax.random.normal(table_key, (self.vocab_size, self.dim)),
            "head": jax.random.normal(head_key, (self.dim, self.vocab_size)),
        }

    def embed(self, params: Params, tokens: ArrayLike) -> Array:
        return jnp.take(params["table"], jnp.asarray(tokens), axis=0)

    def logits(self, params: Params, entries: Entries, rows: ArrayLike) -> Array:
        memories = self._remember(jnp.zeros(self.dim), entries)
        return jnp.dot(jnp.take(memories, jnp.asarray(rows), axis=0), params["head"])

    def init_cache(self, capacity: int) -> Memories:
        return Memories(jnp.zeros((capacity, self.dim)), jnp.zeros((), jnp.int32))

    def extend(
        self,
        params: Params,
        cache: Memories,
        entries: Entries,
        count: ArrayLike | None = None,
        rows: ArrayLike | None = None,
    ) -> tuple[Array, Memories]:
        index = jnp.arange(entries.positions.shape[0], dtype=jnp.int32)
        count = jnp.asarray(len(index) if count is None else count, jnp.int32)
        last = jnp.where(cache.length > 0, cache.rows[jnp.maximum(cache.length - 1, 0)], 0.0)
        memories = self._remember(last, entries)
        slots = jnp.where(index < count, cache.length + index, cache.rows.shape[0])
        longer = Memories(cache.rows.at[slots].set(memories, mode="drop"), cache.length + count)
        return jnp.dot(memories if rows is None else memories[jnp.asarray(rows)], params["head"]), longer

    def truncate(self, cache: Memories, length: Array) -> Memories:
        return Memories(cache.rows, length)

    def _remember(self, memory: Array, entries: Entries) -> Array:
        """The memory after each entry, float32[S, D], and before them all `memory`."""
        scale = (1 + entries.positions / 64) / jnp.maximum(entries.spans, 1)

        def step(memory: Array, entry: Array) -> tuple[Array, Array]:
            memory = 0.5 * memory + entry
            return memory, memory

        _, memories = jax.lax.scan(step, memory, entries.embeddings * scale[:, None])
        return memories


model: StreamingLanguageModel = ForeignModel()
"""Checked by mypy: the protocols are all that is needed."""
