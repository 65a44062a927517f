"""What a session does on the device: pure functions of parameters and a `View`, each of one stream.

They can be compiled, and mapped over a leading axis of streams.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax.context import edge as edges
from lensjax.context import places, refocus
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.edge import Edge
from lensjax.context.working import BLOCKS_BEFORE, WorkingContext
from lensjax.models import Models, Params, StreamingLanguageModel, decision
from lensjax.models.interfaces import BaseReader
from lensjax.session.history import Found
from lensjax.session.state import Policy, Refocus, SessionConfig, View

NEAR = 2**16
"""Positions count from a multiple of it: far from where they do, float32 cannot tell neighbouring tokens apart."""

Changes = dict[str, Any]
"""The fields of a `View` that a step changes. What it leaves as it is, it does not copy: a cache is large."""


@dataclass(frozen=True)
class Steps:
    """The steps of sessions of one set of models and shapes; see `Session`."""

    models: Models
    config: SessionConfig
    policy: Policy | None = None

    def __post_init__(self) -> None:
        base, history = self.models.base, self.config.geometry.history
        if not isinstance(base, StreamingLanguageModel):
            raise ValueError(
                f"models.base must have init_cache, extend and truncate to be read in a session, got {base!r}"
            )
        if self.reads_base and history > NEAR:
            raise ValueError(
                f"session.geometry.history must be at most {NEAR} for a LensNet whose lens.reads is not nothing: the "
                f"base model reads the whole history for it at every decision; got {history}: lower it"
            )

    @property
    def base(self) -> StreamingLanguageModel:
        """The base model, which has a cache."""
        base = self.models.base
        assert isinstance(base, StreamingLanguageModel)
        return base

    @property
    def reads_base(self) -> bool:
        """Whether the policy reads what the base model makes of the whole history."""
        lens = self.models.lens
        return self.policy is None and isinstance(lens, BaseReader) and lens.reads != "nothing"

    def init(self, key: Array) -> View:
        """The view of a session that has read nothing."""
        base, geometry, capacity = self.base, self.config.geometry, self.config.capacity
        rows = geometry.rows(capacity)
        # Padding starts where nothing else does: starts stay sorted.
        start = jnp.full(rows, geometry.history + self.config.interval, jnp.int32)
        return View(
            held=jnp.zeros((), jnp.int32),
            forgotten=jnp.zeros((), jnp.int32),
            edge=edges.init(dim=base.dim, block_size=geometry.block_size, max_lod=geometry.max_lod),
            context=WorkingContext(start, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)),
            embeddings=jnp.zeros((rows, base.dim)),
            blocks=jnp.zeros((rows, base.dim)),
            cooling=places.nothing_cools(rows, geometry, settings=self.config.focus),
            origin=jnp.zeros((), jnp.int32),
            cache=base.init_cache(capacity),
            cached=jnp.zeros((), jnp.int32),
            logits=jnp.zeros(base.vocab_size, jnp.float32),
            key=key,
        )

    def read(self, params: dict[str, Params], view: View, tokens: Array, count: Array) -> tuple[Changes, Array, Edge]:
        """Appends the first `count` of `interval` tokens; their losses float32[interval], and the new gists."""
        base, context = self.base, view.context
        embeddings = base.embed(params["base"], tokens)
        new = jnp.arange(self.config.interval, dtype=jnp.int32)
        place = view.held + new
        logits, cache = base.extend(
            params["base"], view.cache, contexts.in_full(embeddings, place - view.origin), count
        )
        before = jnp.concatenate([view.logits[None], logits[:-1]])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(before, tokens)
        slots = jnp.where(new < count, context.length + new, context.valid.shape[0])
        valid = context.valid.at[slots].set(True, mode="drop")
        start = context.start.at[slots].set(place, mode="drop")
        # Padding starts where nothing else does: starts stay sorted.
        start = jnp.where(valid, start, self.config.geometry.history + self.config.interval)
        grown = edges.append(view.edge, view.held, embeddings, self._gists(params), count=count)
        context, held = replace(context, start=start, valid=valid), view.held + count
        blocks = view.blocks.at[slots].set(embeddings, mode="drop")
        changes = {
            "held": held,
            "edge": grown.edge,
            "context": context,
            "embeddings": view.embeddings.at[slots].set(embeddings, mode="drop"),
            "blocks": _with_gists(blocks, grown.gists[0], context, view.held, held, size=view.block_size),
            "cache": cache,
            "cached": view.cached + count,
            "logits": jnp.where(count > 0, logits[jnp.maximum(count - 1, 0)], view.logits),
        }
        return changes, losses, grown.gists

    def _gists(self, params: dict[str, Params]) -> Callable[[Array], Array]:
        return lambda children: self.models.gist.apply(params["gist"], children)

    def _scores(self, params: dict[str, Params], view: View, tokens: Array | None) -> Array:
        if self.policy is not None:
            return self.policy(params, view)
        entries = view.entries
        if tokens is not None:
            entries = replace(entries, states=self._states(params, view, tokens))
        return decision.policy_scores(self.models.lens, params["lens"], entries)

    def _states(self, params: dict[str, Params], view: View, tokens: Array) -> Array:
        """What the policy reads of the base model: float[R, 5 F]."""
        base, geometry = self.base, self.config.geometry
        tree = trees.init(capacity=len(tokens), dim=base.dim, block_size=geometry.block_size, max_lod=geometry.max_lod)
        is_held = jnp.arange(len(tokens)) < view.held
        leaves = jnp.where(is_held[:, None], base.embed(params["base"], tokens), 0)
        tree = decision.with_states(
            self.models, params, replace(tree, levels=(leaves, *tree.levels[1:]), length=view.held)
        )
        states = trees.lookup_states(tree, view.context.start, before=BLOCKS_BEFORE)
        return jnp.where(view.context.valid[:, None], states, 0)

    def decide(self, params: dict[str, Params], view: View, tokens: Array | None) -> tuple[Changes, Refocus]:
        """The rows of the next context, and how much of the cache is kept; what the rows hold is still to be found."""
        geometry, settings = self.config.geometry, self.config.focus
        context, cooling, swaps = places.edit(
            view.context,
            view.cooling,
            self._scores(params, view, tokens),
            self.config.budget,
            geometry,
            settings=settings,
            tokens=view.held,
            key=jax.random.fold_in(view.key, view.read) if settings.temperature > 0 else None,
        )
        before, after = (contexts.read(one, geometry) for one in (view.context, context))
        same = (after.start == before.start) & (after.lod == before.lod) & after.valid
        origin = view.held // NEAR * NEAR
        kept = jnp.minimum(jnp.argmin(jnp.append(same, False)).astype(jnp.int32), view.cached)
        kept = jnp.where(origin == view.origin, kept, 0)
        rate = refocus.swap_rate(view.context, context, geometry)
        return {"context": context, "cooling": cooling, "origin": origin, "cached": kept}, Refocus(rate, swaps, kept)

    def show(self, params: dict[str, Params], view: View, found: Found) -> Changes:
        """Takes up what the rows of the context hold, and brings the base model's cache up to their end."""
        context, size = view.context, view.block_size
        tokens = self.base.embed(params["base"], found.tokens)
        is_gist = (context.lod > 0)[:, None]
        is_whole = ((context.start // size + 1) * size <= view.held)[:, None]
        embeddings = jnp.where(is_gist, found.gists, tokens)
        blocks = jnp.where(is_gist | is_whole, found.gists, tokens)
        valid = context.valid[:, None]
        shown: Changes = {"embeddings": jnp.where(valid, embeddings, 0), "blocks": jnp.where(valid, blocks, 0)}
        return shown | self._read_context(params, replace(view, **shown))

    def _read_context(self, params: dict[str, Params], view: View) -> Changes:
        """Brings the base model's cache up to the end of the context, a chunk at a time."""
        entries = view.entries
        if self.config.geometry.omit:
            is_read = contexts.is_entry(view.context, self.config.geometry)
            (order,) = jnp.nonzero(is_read, size=self.config.capacity, fill_value=0)
            entries = jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=0), entries)
        length = contexts.entry_count(view.context, self.config.geometry)

        Carry = tuple[Any, Array, Array]

        def more(carry: Carry) -> Array:
            return carry[1] < length

        def chunk(carry: Carry) -> Carry:
            cache, cached, _ = carry
            index = cached + jnp.arange(self.config.interval, dtype=jnp.int32)
            count = jnp.minimum(length - cached, self.config.interval)
            rows = jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0, mode="clip"), entries)
            (logits,), cache = self.base.extend(params["base"], cache, rows, count, count[None] - 1)
            return cache, cached + count, logits

        kept = self.base.truncate(view.cache, view.cached)
        cache, cached, logits = jax.lax.while_loop(more, chunk, (kept, view.cached, view.logits))
        return {"cache": cache, "cached": cached, "logits": logits}

    def forget(self, view: View) -> Changes:
        """Drops the oldest tokens, whole blocks of the highest level, and the rows that show them."""
        geometry, size = self.config.geometry, self.config.forgotten_at_once
        gone = jnp.sum(view.context.valid & (view.context.start < size), dtype=jnp.int32)
        context, cooling = places.drop_oldest(view.context, view.cooling, size, geometry)

        def left(rows: Array) -> Array:
            return jnp.where(context.valid[:, None], jnp.roll(rows, -gone, axis=0), 0)

        # The entries that are left stand elsewhere in the context now, and elsewhere in the window.
        return {
            "held": view.held - size,
            "forgotten": view.forgotten + size,
            "context": context,
            "embeddings": left(view.embeddings),
            "blocks": left(view.blocks),
            "cooling": cooling,
            "cached": jnp.zeros((), jnp.int32),
        }


def _with_gists(
    blocks: Array, gists: Array, context: WorkingContext, before: Array, held: Array, *, size: int
) -> Array:
    """`View.blocks` with the gists of the blocks that became complete since `before` tokens were held."""
    block = context.start // size - before // size
    is_new = (block >= 0) & ((context.start // size + 1) * size <= held) & context.valid & (context.lod == 0)
    found = jnp.take(gists, jnp.maximum(block, 0), axis=0, mode="clip")
    return jnp.where(is_new[:, None], found, blocks)
