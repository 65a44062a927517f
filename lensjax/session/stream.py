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

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import edge as edges
from lensjax.models import Models, Params
from lensjax.session import history as histories
from lensjax.session.history import History
from lensjax.session.state import Policy, Refocus, SessionConfig, SessionState
from lensjax.session.steps import Steps


class Session:
    """The functions of a session, compiled for one set of models and shapes; all that changes is in `SessionState`.

    Args:
      models: the models; the base model must have a cache (`StreamingLanguageModel`).
      params: parameters of `base` and `gist`, and of `lens` or whatever else the policy reads.
      config: shapes.
      policy: scores the entries in LensNet's place. It is compiled with the session, so it must be pure, and what it
        has learned belongs into `params`. Budget and allocator are the same for every policy.

    Raises:
      ValueError: the base model has no cache, or LensNet reads so long a history of it anew at every decision.

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
        self, models: Models, params: dict[str, Params], config: SessionConfig, *, policy: Policy | None = None
    ) -> None:
        self.models, self.params, self.config = models, params, config
        self.steps = Steps(models, config, policy)
        self._read, self._decide = jax.jit(self.steps.read), jax.jit(self.steps.decide)
        self._show, self._forget = jax.jit(self.steps.show), jax.jit(self.steps.forget)

    def init(self, seed: int = 0) -> SessionState:
        """A session that has read nothing; `seed` matters only where the allocator samples."""
        geometry = self.config.geometry
        history = histories.empty(dim=self.models.base.dim, block_size=geometry.block_size, max_lod=geometry.max_lod)
        return SessionState(self.steps.init(jax.random.key(seed)), history)

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
          on_refocus: called after every refocus step with the state and what the step did.

        Returns:
          The longer session, and float32[n]: nats of each token as the session predicted it from what came before.

        Raises:
          ValueError: a token is outside the vocabulary, or `tokens` is no sequence of integers. Nothing is read then.
        """
        tokens, interval = self._checked(tokens), self.config.interval
        losses, done = [np.zeros(0, np.float32)], 0
        while done < len(tokens):
            chunk = tokens[done : done + interval - state.read % interval]
            state, chunk_losses = self._read_tokens(state, chunk)
            losses.append(chunk_losses)
            done += len(chunk)
            if state.read % interval == 0:
                state, report = self.refocus(state)
                if on_refocus is not None:
                    on_refocus(state, report)
        return state, np.concatenate(losses)

    def _read_tokens(self, state: SessionState, tokens: np.ndarray) -> tuple[SessionState, np.ndarray]:
        """Reads at most an interval's tokens; their losses float32[n]."""
        geometry, count = self.config.geometry, len(tokens)
        chunk = np.zeros(self.config.interval, np.int32)
        chunk[:count] = tokens
        view, losses, gists = self._read(self.params, state.view, chunk, np.int32(count))
        shape = {"block_size": geometry.block_size, "max_lod": geometry.max_lod}
        whole = edges.completed(state.history.held, count, **shape)
        found, losses = jax.device_get(([rows if n else None for rows, n in zip(gists, whole, strict=True)], losses))
        new = [tokens[:0] if rows is None else rows[:n] for rows, n in zip(found, whole, strict=True)]
        return SessionState(view, state.history.append(tokens, new)), losses[:count]

    def refocus(self, state: SessionState) -> tuple[SessionState, Refocus]:
        """A refocus step now, besides those that reading makes; nothing to do before the first token."""
        view, history = state.view, state.history
        if history.held > self.config.geometry.history:
            view, history = self._forget(view), history.forget(self.config.forgotten_at_once)
        view, report = self._decide(self.params, view, self._held_tokens(history))
        shown = jax.device_get(view.context)
        view = self._show(self.params, view, history.find(shown.start, shown.lod, shown.valid))
        return SessionState(view, history), report

    def _held_tokens(self, history: History) -> np.ndarray | None:
        """int32[C + H], where the policy reads what the base model makes of them all."""
        if not self.steps.reads_base:
            return None
        tokens = history.tokens.between(history.forgotten, history.read)
        return np.pad(tokens, (0, self.config.geometry.history + self.config.interval - len(tokens)))

    def predict(self, state: SessionState) -> Array:
        """Logits float32[vocabulary] of the next token.

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
        vocabulary = self.models.base.vocab_size
        outside = (array < 0) | (array >= vocabulary)
        if outside.any():
            where = int(np.argmax(outside))
            raise ValueError(
                f"token {array[where]} at place {where} is outside the vocabulary: expected 0 to {vocabulary - 1}"
            )
        return array.astype(np.int32)
