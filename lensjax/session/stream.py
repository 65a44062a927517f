"""A stream of any length, read through a working context of fixed size.

    session = Session(models, params, config)
    state = session.init()
    state, losses = session.append(state, tokens)      # as often as there are tokens
    logits = session.predict(state)

Every `interval` tokens, counted from the start of the stream and not of an append, LensNet looks at the working context
and the allocator brings it back to the budget: the decision of a training window whose cursor is there. The next
`interval` tokens, the horizon, then come in full. What is read is the same however it is split into appends. Between
two refocus steps the context only grows at its end, and so does the base model's cache; a refocus step keeps the cache
up to the first entry that it changes, and reads the rest anew.

The tree on the device covers a history and an interval at most. When a decision would look further back than that
history, the oldest block of the highest level is forgotten, tokens, gists and all: a working context
of W entries reaches W K**L tokens at most, so some end there must be, and memory and time a token do not grow with the
stream.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator, refocus
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.working import WorkingContext
from lensjax.models import Models, Params, StreamingLanguageModel, decision
from lensjax.session.state import Policy, Refocus, SessionConfig, SessionState


class Session:
    """The functions of a session, compiled for one set of models and shapes; all that changes is in `SessionState`.

    Args:
      models: the models; the base model must have a cache (`StreamingLanguageModel`).
      params: parameters of `base` and `gist`, and of `lens` or whatever else the policy reads.
      config: shapes.
      policy: scores the entries in LensNet's place. It is compiled with the session, so it must be pure, and what it
        has learned belongs into `params`. Budget and allocator are the same for every policy.

    Raises:
      ValueError: the base model has no cache.

    Example:
      >>> import jax, lensjax as lx
      >>> models = lx.build_models(lx.BaseConfig(), lx.GistConfig(), lx.LensConfig(), block_size=8, max_lod=1)
      >>> params = {name: getattr(models, name).init(jax.random.key(0)) for name in ("base", "gist", "lens")}
      >>> geometry = lx.Geometry(history=64, block_size=8, max_lod=1, recent_tokens=4)
      >>> session = lx.Session(models, params, lx.SessionConfig(geometry, budget=32, interval=16))
      >>> state, nll = session.append(session.init(), [1, 2, 3] * 20)
      >>> nll.shape, int(state.read)
      ((60,), 60)
    """

    def __init__(
        self, models: Models, params: dict[str, Params], config: SessionConfig, *, policy: Policy | None = None
    ) -> None:
        if not isinstance(models.base, StreamingLanguageModel):
            raise ValueError(
                f"models.base must have init_cache, extend and truncate to be read in a session, got {models.base!r}"
            )
        self.models, self.params, self.config = models, params, config
        self._base: StreamingLanguageModel = models.base
        self._policy = self._lensnet if policy is None else policy
        # In place: a tree of a long history is not copied for every few tokens.
        self._read = jax.jit(self._read_chunk, donate_argnums=1)
        self._refocus = jax.jit(self._refocus_now, donate_argnums=1)
        self._forget = jax.jit(self._forget_oldest, donate_argnums=0)
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))

    def init(self, seed: int = 0) -> SessionState:
        """A session that has read nothing; `seed` matters only where the allocator samples."""
        base, geometry, capacity = self._base, self.config.geometry, self.config.capacity
        # A whole history, and an interval's tokens behind it.
        held = replace(geometry, history=geometry.history + self.config.interval)
        start = jnp.zeros(geometry.history, jnp.int32)
        return SessionState(
            tree=trees.init(
                capacity=held.history,
                dim=base.dim,
                block_size=geometry.block_size,
                max_lod=geometry.max_lod,
            ),
            forgotten=jnp.zeros((), jnp.int32),
            focus=allocator.from_cut(start, geometry),
            context=self._empty_context(),
            cache=base.init_cache(capacity),
            cached=jnp.zeros((), jnp.int32),
            logits=jnp.zeros(base.vocab_size, jnp.float32),
            key=jax.random.key(seed),
        )

    def _empty_context(self) -> WorkingContext:
        rows = self.config.geometry.rows(self.config.capacity)
        # Padding starts where nothing else does: starts stay sorted.
        start = jnp.full(rows, self.config.geometry.history + self.config.interval, jnp.int32)
        return WorkingContext(start, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))

    def append(
        self,
        state: SessionState,
        tokens: ArrayLike,
        *,
        on_refocus: Callable[[SessionState, Refocus], None] | None = None,
    ) -> tuple[SessionState, np.ndarray]:
        """Reads tokens.

        Args:
          state: the session so far; it stays valid.
          tokens: int[n], n may be 0.
          on_refocus: called after every refocus step with the state and what the step did. What it keeps of the state
            it must copy: the next tokens are read in place.

        Returns:
          The longer session, and float32[n]: nats of each token as the session predicted it from what came before.

        Raises:
          ValueError: a token is outside the vocabulary, or `tokens` is no sequence of integers. Nothing is read then.
        """
        tokens = self._checked(tokens)
        losses = [np.zeros(0, np.float32)]
        done, position, held = 0, int(state.read), int(state.tree.length)
        state = self._copy(state)
        while done < len(tokens):
            count = min(self.config.interval - position % self.config.interval, len(tokens) - done)
            chunk = np.zeros(self.config.interval, np.int32)
            chunk[:count] = tokens[done : done + count]
            state, chunk_losses = self._read(self.params, state, chunk, np.int32(count))
            losses.append(np.asarray(chunk_losses)[:count])
            done, position, held = done + count, position + count, held + count
            if position % self.config.interval == 0:
                if held > self.config.geometry.history:
                    state, held = self._forget(state), held - self.config.forgotten_at_once
                state, report = self._refocus(self.params, state)
                if on_refocus is not None:
                    on_refocus(state, report)
        return state, np.concatenate(losses)

    def refocus(self, state: SessionState) -> tuple[SessionState, Refocus]:
        """A refocus step now, besides those that reading makes; nothing to do before the first token."""
        state, held = self._copy(state), int(state.tree.length)
        if held > self.config.geometry.history:
            state = self._forget(state)
        return self._refocus(self.params, state)

    def predict(self, state: SessionState) -> Array:
        """Logits float32[vocabulary] of the next token.

        Raises:
          ValueError: nothing was read yet.
        """
        if int(state.read) == 0:
            raise ValueError("nothing was read yet, so nothing can be predicted: append at least one token")
        return state.logits

    def generate(
        self, state: SessionState, count: int, key: Array, *, temperature: float = 1.0
    ) -> tuple[SessionState, np.ndarray]:
        """Samples tokens, and reads each as it comes.

        Args:
          state: the session so far, which must have read something.
          count: tokens wanted, 0 or more.
          key: PRNG key, consumed.
          temperature: of the samples; 0 takes the likeliest token.

        Returns:
          The session that has read them, and int32[count].

        Raises:
          ValueError: nothing was read yet, or an argument is out of range.
        """
        if count < 0 or not 0 <= temperature < np.inf:
            raise ValueError(f"count and temperature must be at least 0 and finite, got {count} and {temperature}")
        sampled: list[int] = []
        for token_key in jax.random.split(key, count):
            logits = self.predict(state)
            token = jnp.argmax(logits) if temperature == 0 else jax.random.categorical(token_key, logits / temperature)
            sampled.append(int(token))
            state, _ = self.append(state, np.asarray(sampled[-1:]))
        return state, np.asarray(sampled, np.int32)

    def _checked(self, tokens: ArrayLike) -> np.ndarray:
        array = np.asarray(tokens)
        if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"tokens must be one sequence of integers, got {array.dtype}{list(array.shape)}")
        vocabulary = self._base.vocab_size
        outside = (array < 0) | (array >= vocabulary)
        if outside.any():
            where = int(np.argmax(outside))
            raise ValueError(
                f"token {array[where]} at place {where} is outside the vocabulary: expected 0 to {vocabulary - 1}"
            )
        return array.astype(np.int32)

    def _read_chunk(
        self, params: dict[str, Params], state: SessionState, tokens: Array, count: Array
    ) -> tuple[SessionState, Array]:
        """Appends the first `count` of `interval` tokens; their losses float32[interval]."""
        base, tree = self._base, state.tree
        embeddings = base.embed(params["base"], tokens)
        new = jnp.arange(self.config.interval, dtype=jnp.int32)
        place, is_new = tree.length + new, new < count
        logits, cache = base.extend(params["base"], state.cache, contexts.in_full(embeddings, place), count)
        before = jnp.concatenate([state.logits[None], logits[:-1]])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(before, tokens)
        rows = state.context.valid.shape[0]
        slots = jnp.where(is_new, state.context.length + new, rows)
        valid = state.context.valid.at[slots].set(True, mode="drop")
        start = state.context.start.at[slots].set(place, mode="drop")
        # Padding starts where nothing else does: starts stay sorted.
        context = replace(state.context, start=jnp.where(valid, start, tree.capacity), valid=valid)
        return replace(
            state,
            tree=trees.append(tree, embeddings, self._gists(params), count=count),
            context=context,
            cache=cache,
            cached=state.cached + count,
            logits=jnp.where(count > 0, logits[jnp.maximum(count - 1, 0)], state.logits),
        ), losses

    def _gists(self, params: dict[str, Params]) -> Callable[[Array], Array]:
        return lambda children: self.models.gist.apply(params["gist"], children)

    def _lensnet(self, params: dict[str, Params], state: SessionState) -> Array:
        tree = decision.with_states(self.models, params, state.tree)
        return decision.policy(self.models.lens, params["lens"], tree)(state.context)

    def _refocus_now(self, params: dict[str, Params], state: SessionState) -> tuple[SessionState, Refocus]:
        settings = self.config.focus
        focused, context, info = refocus.step(
            state.focus,
            lambda _: self._policy(params, state),
            state.context,
            self.config.budget,
            self.config.geometry,
            capacity=self.config.capacity,
            settings=settings,
            tokens=state.tree.length,
            key=jax.random.fold_in(state.key, state.read) if settings.temperature > 0 else None,
        )
        before, after = (contexts.read(one, self.config.geometry) for one in (state.context, context))
        same = (after.start == before.start) & (after.lod == before.lod) & after.valid
        kept = jnp.minimum(jnp.argmin(jnp.append(same, False)).astype(jnp.int32), state.cached)
        rate = refocus.swap_rate(state.context, context, self.config.geometry)
        cache = self._base.truncate(state.cache, kept)
        state = replace(state, focus=focused, context=context, cache=cache, cached=kept)
        return self._read_context(params, state), Refocus(rate, info.swaps, kept)

    def _read_context(self, params: dict[str, Params], state: SessionState) -> SessionState:
        """Brings the base model's cache up to the end of the context, a chunk at a time."""
        shown = contexts.read(state.context, self.config.geometry)
        entries = contexts.materialise(state.tree, shown)
        length = shown.length

        Carry = tuple[Any, Array, Array]

        def more(carry: Carry) -> Array:
            return carry[1] < length

        def chunk(carry: Carry) -> Carry:
            cache, cached, _ = carry
            index = cached + jnp.arange(self.config.interval, dtype=jnp.int32)
            count = jnp.minimum(length - cached, self.config.interval)
            rows = jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0, mode="clip"), entries)
            logits, cache = self._base.extend(params["base"], cache, rows, count)
            return cache, cached + count, logits[count - 1]

        cache, cached, logits = jax.lax.while_loop(more, chunk, (state.cache, state.cached, state.logits))
        return replace(state, cache=cache, cached=cached, logits=logits)

    def _forget_oldest(self, state: SessionState) -> SessionState:
        """Drops the oldest tokens, whole blocks of the highest level, and all that stands for them."""
        geometry, size = self.config.geometry, self.config.forgotten_at_once

        def drop(rows: Array, lod: int) -> Array:
            gone = size // geometry.block_size**lod
            return jnp.concatenate([rows[gone:], jnp.zeros_like(rows[:gone])])

        levels = tuple(drop(level, lod) for lod, level in enumerate(state.tree.levels))
        tree = replace(state.tree, levels=levels, length=state.tree.length - size)
        focused = allocator.drop_oldest(state.focus, size, geometry)
        context = allocator.to_context(focused, geometry, capacity=self.config.capacity, tokens=tree.length)
        # The entries that are left stand elsewhere in the context now, and elsewhere in the window.
        nothing = jnp.zeros((), jnp.int32)
        return replace(
            state,
            tree=tree,
            forgotten=state.forgotten + size,
            focus=focused,
            context=context,
            cache=self._base.truncate(state.cache, nothing),
            cached=nothing,
        )
