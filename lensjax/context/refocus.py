"""A policy that acts: it looks at a working context, the allocator edits that, and it looks again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig, FocusInfo, FocusState
from lensjax.context.geometry import Geometry
from lensjax.context.working import MISSING, WorkingContext

ScoreFn = Callable[[WorkingContext], Array]
"""A policy before one history: from a working context of it to float32[W], the scores of the entries."""


def step(
    state: FocusState,
    score_fn: ScoreFn,
    context: WorkingContext,
    length: ArrayLike,
    geometry: Geometry,
    *,
    capacity: int,
    settings: FocusConfig,
    tokens: ArrayLike | None = None,
    key: Array | None = None,
) -> tuple[FocusState, WorkingContext, FocusInfo]:
    """A policy's decision: it looks at a context, and gets another one.

    Args:
      state: what is collapsed.
      score_fn: the policy.
      context: the working context of `state`.
      length: int32[], entries that the next context must have.
      geometry: the history.
      capacity: static number of entries of the next context.
      settings: see `swap`.
      tokens: int32[], tokens that the history holds so far; None for all of it.
      key: PRNG key, consumed; needed where `settings.temperature` is above 0.

    Returns:
      The next state, its context, and what the swaps did.
    """
    state, info = allocator.edit(
        state, score_fn(context), context, length, geometry, settings=settings, tokens=tokens, key=key
    )
    return state, allocator.to_context(state, geometry, capacity=capacity, tokens=tokens), info


def iterate(
    state: FocusState,
    score_fn: ScoreFn,
    length: ArrayLike,
    geometry: Geometry,
    *,
    steps: int,
    capacity: int,
    settings: FocusConfig,
    key: Array | None = None,
) -> tuple[FocusState, WorkingContext]:
    """Several steps of one decision after the other: look, edit, look again.

    Args:
      state: where to start, at any length.
      score_fn: the policy.
      length: int32[], entries of every context but the first.
      geometry: the history.
      steps: static number of steps.
      capacity: static number of entries W.
      settings: see `swap`.
      key: PRNG key, consumed; needed where `settings.temperature` is above 0.

    Returns:
      The last state, and all contexts in order, the first one included: leading axis `steps` + 1.
    """
    first = allocator.to_context(state, geometry, capacity=capacity)

    def one(carry: tuple[FocusState, WorkingContext], index: Array) -> tuple[Any, WorkingContext]:
        step_key = None if key is None else jax.random.fold_in(key, index)
        state, context, _ = step(
            carry[0], score_fn, carry[1], length, geometry, capacity=capacity, settings=settings, key=step_key
        )
        return (state, context), context

    (state, _), later = jax.lax.scan(one, (state, first), jnp.arange(steps))
    return state, jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), first, later)


def cold_start(
    score_fn: ScoreFn,
    length: ArrayLike,
    geometry: Geometry,
    *,
    capacity: int,
    settings: FocusConfig,
    key: Array | None = None,
) -> WorkingContext:
    """What a policy makes of a context that knows nothing: `allocator.start`, and the contexts after each refocus step.

    Args:
      score_fn: the policy before one history, such as `models.decision.policy`.
      length: int32[], entries of every context; may be traced.
      geometry: the history.
      capacity: static number of entries W, at least the length.
      settings: `steps` of them, and how each acts.
      key: PRNG key, consumed; needed where `settings.temperature` is above 0.

    Returns:
      `WorkingContext` with leading axis `settings.steps` + 1.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> likes_old = lambda context: -context.start.astype("float32")
      >>> contexts = lx.cold_start(likes_old, 6, geometry, capacity=6, settings=lx.FocusConfig(steps=2))
      >>> contexts.start[-1].tolist(), contexts.lod[-1].tolist()
      ([0, 1, 2, 4, 6, 7], [0, 0, 1, 1, 0, 0])
    """
    start = allocator.start(length, geometry, settings=settings)
    return iterate(
        start, score_fn, length, geometry, steps=settings.steps, capacity=capacity, settings=settings, key=key
    )[1]


def swap_rate(before: WorkingContext, after: WorkingContext, geometry: Geometry) -> Array:
    """Share of a context's entries that the one before it did not hold, float32[]; of what the base model reads."""
    # Spans of one level start where no other span of that level does: start and level name a row.
    row, was = jnp.searchsorted(before.start, after.start), jnp.where(before.valid, before.lod, MISSING)
    start, lod = (jnp.take(rows, row, mode="fill", fill_value=MISSING) for rows in (before.start, was))
    is_new = contexts.is_entry(after, geometry) & ((start != after.start) | (lod != after.lod))
    count = contexts.entry_count(after, geometry)
    return jnp.sum(is_new, dtype=jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
