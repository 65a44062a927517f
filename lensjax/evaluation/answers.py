"""Tasks with known answers: the context that shows them, and whether a context does."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator, nodes
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusState
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext


def oracle_state(answers: ArrayLike, length: ArrayLike, geometry: Geometry) -> FocusState:
    """The context of one length that shows the blocks at tokens int32[A] in full, and else the most recent blocks."""
    tokens, answers = jnp.arange(geometry.history), jnp.asarray(answers)
    is_answer = jnp.any(tokens[None, :] // geometry.block_size == answers[:, None] // geometry.block_size, axis=0)
    wish = jnp.where(is_answer, 1.0, tokens / geometry.history - 1)
    in_full = allocator.uniform(geometry.history, geometry)
    return allocator.fit(in_full, nodes.pool_tokens(wish, geometry), length, geometry)


def shows_in_full(context: WorkingContext, answers: ArrayLike, geometry: Geometry) -> Array:
    """Whether a context shows all of the blocks that begin at tokens int32[A] in full; bool[]."""
    cut = contexts.to_cut(context, geometry)
    tokens = jnp.asarray(answers)[:, None] + jnp.arange(geometry.block_size)[None, :]
    return jnp.all(cut[tokens] == 0)
