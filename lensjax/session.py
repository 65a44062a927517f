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

The tree on the device covers the last `config.context.window` tokens at most. When a decision would look further back
than a history of training, the oldest block of the highest level is forgotten, tokens, gists and all: a working context
of W entries reaches W K**L tokens at most, so some end there must be, and memory and time a token do not grow with the
stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusState
from lensjax.context.tree import TreeState
from lensjax.context.working import WorkingContext
from lensjax.models import KVCache, Models, Params, decision
from lensjax.runs.config import Config


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SessionState:
    """All that a session remembers; every array has a fixed shape. Positions count from the oldest token held."""

    tree: TreeState
    """The tokens held and their gists."""
    forgotten: Array
    """int32[]: tokens read before those held."""
    focus: FocusState
    """What is collapsed."""
    context: WorkingContext
    """W entries, and room for an interval's tokens behind them."""
    cache: KVCache
    """What the base model computed of the context's entries."""
    logits: Array
    """float32[vocabulary]: prediction of the next token; uniform before the first one."""
    key: Array
    """PRNG key of an allocator that samples; that of a refocus step is `fold_in(key, tokens read)`."""

    @property
    def read(self) -> Array:
        """int32[]: tokens read since the start of the stream."""
        return self.forgotten + self.tree.length


Policy = Callable[[dict[str, Params], SessionState], Array]
"""Whoever chooses what a session shows: from the parameters and the session before a refocus step to float32[W + H] in
[-1, 1], a score for every entry of `state.context`. High asks for detail, low asks to be collapsed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Refocus:
    """What a refocus step did."""

    swap_rate: Array
    """float32[]: share of the entries that were not there before."""
    swaps: Array
    """int32[]: edits that the policy asked for, in pairs, beyond those that the budget demanded."""
    kept: Array
    """int32[]: entries of the context whose cache was kept."""


class Session:
    """The functions of a session, compiled for one set of models and shapes; all that changes is in `SessionState`.

    Args:
      models: the models.
      params: parameters of `base` and `gist`, and of `lens` or whatever else the policy reads.
      config: `context.history` is how far back a decision reaches; `hyper.context_end` of it is the budget W, which a
        refocus step never exceeds and, once the stream is longer, misses by less than K - 1 entries;
        `context.horizon` is the interval; `context.recent_tokens` stay in full; `focus` is how the allocator acts. A
        longer window than in training is fine.
      policy: scores the entries in LensNet's place. It is compiled with the session, so it must be pure, and what it
        has learned belongs into `params`. Budget and allocator are the same for every policy.

    Raises:
      ValueError: no context that the budget allows covers the history.
    """

    def __init__(
        self, models: Models, params: dict[str, Params], config: Config, *, policy: Policy | None = None
    ) -> None:
        shape = config.context
        self.models, self.params, self.config = models, params, config
        self._policy = self._lensnet if policy is None else policy
        self.geometry, self.interval = shape.geometry, shape.horizon
        self.budget = shape.geometry.length_of_fraction(config.hyper.context_end, name="context_end")
        self._capacity = self.budget + self.interval
        self._check_room()
        # In place: a tree of a long history is not copied for every few tokens.
        self._read = jax.jit(self._read_chunk, donate_argnums=1)
        self._refocus = jax.jit(self._refocus_now, donate_argnums=1)
        self._forget = jax.jit(self._forget_oldest, donate_argnums=0)
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))

    def init(self, seed: int = 0) -> SessionState:
        """A session that has read nothing; `seed` matters only where the allocator samples."""
        base, geometry = self.config.base, self.geometry
        window, capacity = self.config.context.window, self._capacity
        start = jnp.zeros(geometry.window, jnp.int32)
        return SessionState(
            tree=trees.init(capacity=window, dim=base.dim, block_size=geometry.block_size, max_lod=geometry.max_lod),
            forgotten=jnp.zeros((), jnp.int32),
            focus=allocator.from_cut(start, geometry),
            context=contexts.baseline(0, window=window, capacity=capacity),
            cache=self.models.base.init_cache(capacity),
            logits=jnp.zeros(base.vocab_size, jnp.float32),
            key=jax.random.key(seed),
        )

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
            count = min(self.interval - position % self.interval, len(tokens) - done)
            chunk = np.zeros(self.interval, np.int32)
            chunk[:count] = tokens[done : done + count]
            state, chunk_losses = self._read(self.params, state, chunk, np.int32(count))
            losses.append(np.asarray(chunk_losses)[:count])
            done, position, held = done + count, position + count, held + count
            if position % self.interval == 0:
                if held > self.geometry.window:
                    state, held = self._forget(state), held - self._forget_size
                state, report = self._refocus(self.params, state)
                if on_refocus is not None:
                    on_refocus(state, report)
        return state, np.concatenate(losses)

    def refocus(self, state: SessionState) -> tuple[SessionState, Refocus]:
        """A refocus step now, besides those that reading makes; nothing to do before the first token."""
        state, held = self._copy(state), int(state.tree.length)
        if held > self.geometry.window:
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

    def _check_room(self) -> None:
        """Refuses a budget that some length of the stream does not fit in."""
        geometry = self.geometry
        held = np.arange(geometry.window + 1)
        free = np.maximum(held - geometry.recent_tokens, 0)
        collapses = sum(free // geometry.block_size**lod for lod in range(1, geometry.max_lod + 1))
        shortest = int(np.max(held - collapses * (geometry.block_size - 1)))
        if shortest > self.budget:
            raise ValueError(
                f"hyper.context_end gives a budget of {self.budget} entries, which must hold the shortest context of "
                f"any part of a history of {geometry.window} tokens, and that takes {shortest}: raise "
                "hyper.context_end or context.max_lod, or lower context.window or context.recent_tokens"
            )
        if geometry.window < self._forget_size + geometry.recent_tokens:
            raise ValueError(
                f"context.window must hold the {self._forget_size} tokens that are forgotten at once, "
                f"{geometry.recent_tokens} recent tokens and a horizon of {self.interval}, got "
                f"{self.config.context.window}: raise it, or lower context.max_lod or context.horizon"
            )

    @property
    def _forget_size(self) -> int:
        top = self.geometry.block_size**self.geometry.max_lod
        return -(-self.interval // top) * top

    def _checked(self, tokens: ArrayLike) -> np.ndarray:
        array = np.asarray(tokens)
        if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"tokens must be one sequence of integers, got {array.dtype}{list(array.shape)}")
        vocabulary = self.config.base.vocab_size
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
        base, tree = self.models.base, state.tree
        embeddings = base.embed(params["base"], tokens)
        new = jnp.arange(self.interval, dtype=jnp.int32)
        place, is_new = tree.length + new, new < count
        logits, cache = base.extend(
            params["base"], state.cache, embeddings, place.astype(jnp.float32), jnp.ones(self.interval), count
        )
        before = jnp.concatenate([state.logits[None], logits[:-1]])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(before, tokens)
        slots = jnp.where(is_new, state.context.length + new, self._capacity)
        valid = state.context.valid.at[slots].set(True, mode="drop")
        start = state.context.start.at[slots].set(place, mode="drop")
        # Padding starts where nothing else does: starts stay sorted.
        context = replace(state.context, start=jnp.where(valid, start, tree.capacity), valid=valid)
        return replace(
            state,
            tree=trees.append(tree, embeddings, self._gists(params), count=count),
            context=context,
            cache=cache,
            logits=jnp.where(count > 0, logits[jnp.maximum(count - 1, 0)], state.logits),
        ), losses

    def _gists(self, params: dict[str, Params]) -> Callable[[Array], Array]:
        return lambda children: self.models.gist.apply(params["gist"], children)

    def _lensnet(self, params: dict[str, Params], state: SessionState) -> Array:
        return decision.policy(self.models, params["lens"], state.tree)(state.context)

    def _refocus_now(self, params: dict[str, Params], state: SessionState) -> tuple[SessionState, Refocus]:
        settings = self.config.focus
        focused, context, info = allocator.step(
            state.focus,
            lambda _: self._policy(params, state),
            state.context,
            self.budget,
            self.geometry,
            capacity=self._capacity,
            settings=settings,
            tokens=state.tree.length,
            key=jax.random.fold_in(state.key, state.read) if settings.temperature > 0 else None,
        )
        same = (context.start == state.context.start) & (context.lod == state.context.lod) & context.valid
        kept = jnp.minimum(jnp.argmin(jnp.append(same, False)).astype(jnp.int32), state.cache.length)
        rate = allocator.swap_rate(state.context, context, window=self.geometry.window)
        state = replace(state, focus=focused, context=context, cache=replace(state.cache, length=kept))
        return self._read_context(params, state), Refocus(rate, info.swaps, kept)

    def _read_context(self, params: dict[str, Params], state: SessionState) -> SessionState:
        """Brings the base model's cache up to the end of the context, a chunk at a time."""
        entries = contexts.materialise(state.tree, state.context)
        length = state.context.length

        def more(carry: tuple[KVCache, Array]) -> Array:
            return carry[0].length < length

        def chunk(carry: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
            cache, _ = carry
            index = cache.length + jnp.arange(self.interval, dtype=jnp.int32)
            count = jnp.minimum(length - cache.length, self.interval)
            embeddings, positions, spans = (
                jnp.take(rows, index, axis=0, mode="clip")
                for rows in (entries.embeddings, entries.positions, entries.spans)
            )
            logits, cache = self.models.base.extend(params["base"], cache, embeddings, positions, spans, count)
            return cache, logits[count - 1]

        cache, logits = jax.lax.while_loop(more, chunk, (state.cache, state.logits))
        return replace(state, cache=cache, logits=logits)

    def _forget_oldest(self, state: SessionState) -> SessionState:
        """Drops the oldest tokens, whole blocks of the highest level, and all that stands for them."""
        geometry, size = self.geometry, self._forget_size

        def drop(rows: Array, lod: int) -> Array:
            gone = size // geometry.block_size**lod
            return jnp.concatenate([rows[gone:], jnp.zeros_like(rows[:gone])])

        levels = tuple(drop(level, lod) for lod, level in enumerate(state.tree.levels))
        tree = replace(state.tree, levels=levels, length=state.tree.length - size)
        focused = allocator.drop_oldest(state.focus, size, geometry)
        context = allocator.to_context(focused, geometry, capacity=self._capacity, tokens=tree.length)
        # The entries that are left stand elsewhere in the context now, and elsewhere in the window.
        cache = replace(state.cache, length=jnp.zeros((), jnp.int32))
        return replace(state, tree=tree, forgotten=state.forgotten + size, focus=focused, context=context, cache=cache)
