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

Tokens and gists are in the memory of the host; the device holds the rows of the context alone, whatever is behind them.
One interval goes between the two like this:

    read      device    an interval's tokens, into the cache, and the gists of the blocks that they complete
    decide    device    scores of the rows, and the rows of the next context
    find      host      tokens and gists of these rows
    show      device    their embeddings, and the cache of what has changed

When a decision would look further back than `geometry.history`, the oldest block of the highest level is forgotten,
tokens, gists and all: a working context of W entries reaches W K**L tokens at most, so some end there must be.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import edge as edges
from lensjax.context.working import WorkingContext
from lensjax.models import Models, Params
from lensjax.session import history as histories
from lensjax.session.beside import Beside
from lensjax.session.history import History
from lensjax.session.state import Policy, Refocus, SessionConfig, SessionState, View
from lensjax.session.steps import Steps


class Session:
    """The functions of a session, compiled for one set of models and shapes; all that changes is in `SessionState`.

    Args:
      models: the models; the base model must have a cache (`StreamingLanguageModel`).
      params: parameters of `base` and `gist`, and of `lens` or whatever else the policy reads.
      config: shapes.
      policy: scores the entries in LensNet's place. It is compiled with the session, so it must be pure, and what it
        has learned belongs into `params`. Budget and allocator are the same for every policy.
      streams: how many are read side by side, a token of each at a time (B): tokens, losses, logits and all that is on
        the device then have a leading axis of that length, dealt over the local devices (`Beside`). None for one
        stream, without the axis.

    Raises:
      ValueError: the base model has no cache, there is no stream, or LensNet reads so long a history of it anew at
        every decision.

    Example:
      >>> import jax, lensjax as lx
      >>> models = lx.build_models(lx.BaseConfig(), lx.GistConfig(), lx.LensConfig(), block_size=8, max_lod=1)
      >>> params = {name: getattr(models, name).init(jax.random.key(0)) for name in ("base", "gist", "lens")}
      >>> geometry = lx.Geometry(history=64, block_size=8, max_lod=1, recent_tokens=4)
      >>> session = lx.Session(models, params, lx.SessionConfig(geometry, budget=32, interval=16))
      >>> state, nll = session.append(session.init(), [1, 2, 3] * 20)
      >>> nll.shape, state.read
      ((60,), 60)
    """

    def __init__(
        self,
        models: Models,
        params: dict[str, Params],
        config: SessionConfig,
        *,
        policy: Policy | None = None,
        streams: int | None = None,
    ) -> None:
        if streams is not None and streams < 1:
            raise ValueError(f"streams must be at least 1, or None for one without an axis, got {streams}")
        self.models, self.params, self.config, self.streams = models, params, config, streams
        self.steps = steps = Steps(models, config, policy)
        compiled: Callable[..., Callable[..., Any]] = jax.jit
        if streams is not None:
            beside = Beside(streams)
            self.params, compiled = beside.on_all(params), beside.each
        self._read, self._decide, self._show = (compiled(step) for step in (steps.read, steps.decide, steps.show))
        self._forget = compiled(lambda _, view: steps.forget(view))

    def init(self, seed: int = 0) -> SessionState:
        """A session that has read nothing; `seed` matters only where the allocator samples, stream i has `seed` + i."""
        geometry = self.config.geometry
        shape = {"block_size": geometry.block_size, "max_lod": geometry.max_lod, "streams": self.streams or 1}
        history = histories.empty(dim=self.models.base.dim, **shape)
        return SessionState(self.first_view(seed), history)

    def first_view(self, seed: ArrayLike) -> View:
        """What is on the device before the first token."""
        if self.streams is None:
            return self.steps.init(jax.random.key(seed))
        return jax.vmap(lambda stream: self.steps.init(jax.random.key(seed + stream)))(jnp.arange(self.streams))

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
          tokens: int[n], or int[B, n]; n may be 0.
          on_refocus: called after every refocus step with the state and what the step did.

        Returns:
          The longer session, and float32[n] or [B, n]: nats of each token as it was predicted from what came before.

        Raises:
          ValueError: a token is outside the vocabulary, or `tokens` is no sequence of integers. Nothing is read then.
        """
        tokens, interval = self._checked(tokens), self.config.interval
        losses, done = [np.zeros((*tokens.shape[:-1], 0), np.float32)], 0
        while done < tokens.shape[-1]:
            chunk = tokens[..., done : done + interval - state.read % interval]
            state, chunk_losses, report = self._read_tokens(state, chunk)
            losses.append(chunk_losses)
            done += chunk.shape[-1]
            if report is not None and on_refocus is not None:
                on_refocus(state, report)
        return state, np.concatenate(losses, axis=-1)

    def _read_tokens(self, state: SessionState, tokens: np.ndarray) -> tuple[SessionState, np.ndarray, Refocus | None]:
        """Reads at most an interval's tokens; their losses float32[..., n], and the refocus step at its end."""
        geometry, history, (*axis, count) = self.config.geometry, state.history, tokens.shape
        chunk = np.zeros((*axis, self.config.interval), np.int32)
        chunk[..., :count] = tokens
        changes, losses, gists = self._read(self.params, state.view, chunk, np.full(axis, count, np.int32))
        view = replace(state.view, **changes)
        report = context = None
        forgets = history.held + count > geometry.history
        if (state.read + count) % self.config.interval == 0:
            view, report = self._decide_now(view, history, tokens, forgets=forgets)
            context = view.context
        shape = {"block_size": geometry.block_size, "max_lod": geometry.max_lod}
        whole = edges.completed(history.held, count, **shape)
        complete = [rows if n else None for rows, n in zip(gists, whole, strict=True)]
        # Once, and after all that the device can do by itself.
        found, losses, context = jax.device_get((complete, losses, context))
        new = [tokens[:0] if rows is None else rows[..., :n, :] for rows, n in zip(found, whole, strict=True)]
        state = SessionState(view, history.append(tokens, new))
        if context is not None:
            state = self._show_rows(state, context, forgets=forgets)
        return state, losses[..., :count], report

    def refocus(self, state: SessionState) -> tuple[SessionState, Refocus]:
        """A refocus step now, besides those that reading makes; nothing to do before the first token."""
        history = state.history
        forgets = history.held > self.config.geometry.history
        view, report = self._decide_now(
            state.view, history, np.zeros((self.streams or 1, 0), np.int32), forgets=forgets
        )
        state = SessionState(view, history)
        return self._show_rows(state, jax.device_get(view.context), forgets=forgets), report

    def _decide_now(self, view: View, history: History, new: np.ndarray, *, forgets: bool) -> tuple[View, Refocus]:
        """The rows of the next context, `new` tokens [..., n] behind the history."""
        held = None
        if self.steps.reads_base:
            # int32[..., C + H]: what the base model reads for the policy.
            held = np.concatenate([history.held_tokens, new.reshape(self.streams or 1, -1)], axis=1)
            held = held[:, self.config.forgotten_at_once if forgets else 0 :]
            room = self.config.geometry.history + self.config.interval
            held = np.pad(held, ((0, 0), (0, room - held.shape[1])))
            held = held[0] if self.streams is None else held
        if forgets:
            view = replace(view, **self._forget(self.params, view))
        changes, report = self._decide(self.params, view, held)
        return replace(view, **changes), report

    def _show_rows(self, state: SessionState, context: WorkingContext, *, forgets: bool) -> SessionState:
        """Finds what the rows of a context hold, on the host."""
        history = state.history.forget(self.config.forgotten_at_once) if forgets else state.history
        found = history.find(*map(np.asarray, (context.start, context.lod, context.valid)))
        return SessionState(replace(state.view, **self._show(self.params, state.view, found)), history)

    def predict(self, state: SessionState) -> Array:
        """Logits float32[..., vocabulary] of the next token.

        Raises:
          ValueError: nothing was read yet.
        """
        if state.read == 0:
            raise ValueError("nothing was read yet, so nothing can be predicted: append at least one token")
        return state.view.logits

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
          The session that has read them, and int32[..., count].

        Raises:
          ValueError: nothing was read yet, or an argument is out of range.
        """
        if count < 0 or not 0 <= temperature < np.inf:
            raise ValueError(f"count and temperature must be at least 0 and finite, got {count} and {temperature}")
        sampled = [np.zeros((*state.view.held.shape, 0), np.int32)]
        for token_key in jax.random.split(key, count):
            logits = self.predict(state)
            if temperature == 0:
                token = jnp.argmax(logits, axis=-1)
            else:
                token = jax.random.categorical(token_key, logits / temperature)
            sampled.append(np.asarray(token, np.int32)[..., None])
            state, _ = self.append(state, sampled[-1])
        return state, np.concatenate(sampled, axis=-1)

    def _checked(self, tokens: ArrayLike) -> np.ndarray:
        array, axis = np.asarray(tokens), () if self.streams is None else (self.streams,)
        is_whole = array.size == 0 or np.issubdtype(array.dtype, np.integer)
        if array.shape[:-1] != axis or array.ndim == 0 or not is_whole:
            wanted = "one sequence of integers" if self.streams is None else f"integers [{self.streams}, n]"
            raise ValueError(f"tokens must be {wanted}, got {array.dtype}{list(array.shape)}")
        vocabulary = self.models.base.vocab_size
        outside = (array < 0) | (array >= vocabulary)
        if outside.any():
            *stream, where = np.unravel_index(int(np.argmax(outside)), array.shape)
            of = f" of stream {stream[0]}" if stream else ""
            raise ValueError(
                f"token {array[*stream, where]} at place {where}{of} is outside the vocabulary: expected 0 to "
                f"{vocabulary - 1}"
            )
        return array.astype(np.int32)
