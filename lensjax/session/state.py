"""What a session is shaped like, and what it remembers: a few arrays on the device, and the history on the host."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax import Array

from lensjax._settings import PositiveInt, require, settings
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig
from lensjax.context.edge import Edge
from lensjax.context.geometry import Geometry
from lensjax.context.places import Cooling
from lensjax.context.working import Entries, WorkingContext
from lensjax.models import Params
from lensjax.session.history import History

MOST_ROWS = 2**15
"""Of a context: LensNet compares each with each."""


@settings("session")
class SessionConfig:
    """The shape of a session. A longer history than in training is fine, millions of tokens included.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=64, block_size=8, max_lod=1, recent_tokens=4)
      >>> lx.SessionConfig(geometry, budget=32, interval=16).capacity
      48
    """

    geometry: Geometry
    """How far back a decision reaches, and the cuts that it may choose; what a decision costs does not depend on it."""
    budget: PositiveInt
    """Entries W, which a refocus step never exceeds and, once the stream is longer, misses by less than one block."""
    interval: PositiveInt
    """Tokens between two refocus steps [H]: the horizon of training."""
    focus: FocusConfig = field(default_factory=FocusConfig)
    """How the allocator acts."""

    def _check(self) -> None:
        geometry = self.geometry
        require(
            self.focus.start == "uniform" or geometry.omit,
            "session.focus.start recency needs a geometry with omission: without it contexts cover the whole history",
        )
        shortest = max([geometry.shortest, *_peaks(geometry)])
        require(
            self.budget >= shortest,
            f"session.budget must hold the shortest context of any part of a history of {geometry.history} tokens, "
            f"at least {shortest} entries, got {self.budget}: raise it (context_end of a training run) or max_lod, or "
            "lower the history or recent_tokens",
        )
        require(
            geometry.history >= self.forgotten_at_once + geometry.recent_tokens,
            f"session.geometry.history must hold the {self.forgotten_at_once} tokens that are forgotten at once and "
            f"{geometry.recent_tokens} recent tokens, got {geometry.history}: raise it, or lower max_lod or "
            "session.interval",
        )

        require(
            geometry.rows(self.capacity) <= MOST_ROWS,
            f"session.geometry.history must be so short that the policy's map of what is omitted has at most "
            f"{MOST_ROWS} rows with the entries, one for each {geometry.block_size} tokens, got {geometry.history} "
            "tokens: lower it, or use a geometry without omission",
        )

    @property
    def capacity(self) -> int:
        """Entries that there is room for: W, and an interval's tokens behind them."""
        return self.budget + self.interval

    @property
    def forgotten_at_once(self) -> int:
        """Tokens that are forgotten at a time: whole blocks of the highest level, for an interval at least."""
        top = self.geometry.block_size**self.geometry.max_lod
        return -(-self.interval // top) * top


def _peaks(geometry: Geometry) -> list[int]:
    """Shortest contexts of the histories that are one token short of one more block of some level."""
    levels = range(1, geometry.max_lod + 1)
    ends = (geometry.recent_tokens + geometry.blocks(lod) * geometry.block_size**lod - 1 for lod in levels)
    return [replace(geometry, history=end).shortest for end in ends if end >= max(1, geometry.recent_tokens)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """What a session has before it: all of it that is on the device, in arrays of fixed shapes.

    Positions count from the oldest token held.
    """

    held: Array
    """int32[]: tokens that a decision can reach."""
    forgotten: Array
    """int32[]: tokens read before these."""
    edge: Edge
    """What the gists of later tokens will be made of."""
    context: WorkingContext
    """W entries, with omission a map of the rest, and room for an interval's tokens behind them; R rows."""
    embeddings: Array
    """float[R, D]: of the rows."""
    blocks: Array
    """float[R, D]: of a token the gist of its block; see `Entries`."""
    cooling: Cooling
    """What was edited lately."""
    origin: Array
    """int32[]: the token from which the base model's positions count."""
    cache: Any
    """What the base model computed of the context's entries."""
    cached: Array
    """int32[]: entries in the cache."""
    logits: Array
    """float32[vocabulary]: prediction of the next token; uniform before the first one."""
    key: Array
    """PRNG key of an allocator that samples; that of a refocus step is `fold_in(key, tokens read)`."""

    @property
    def read(self) -> Array:
        """int32[]: tokens read since the start of the stream."""
        return self.forgotten + self.held

    @property
    def block_size(self) -> int:
        """Children per gist (K)."""
        return self.edge[0].shape[-2]

    @property
    def entries(self) -> Entries:
        """The rows of the context as models read them, of R rows."""
        return contexts.entries(
            self.context, self.embeddings, self.blocks, self.held, block_size=self.block_size, origin=self.origin
        )


@dataclass(frozen=True)
class SessionState:
    """All that a session remembers. A value: it stays valid, whatever is read after it."""

    view: View
    """On the device."""
    history: History
    """On the host: tokens, and the gists of those that are complete."""

    @property
    def context(self) -> WorkingContext:
        """What is shown."""
        return self.view.context

    @property
    def read(self) -> int:
        """Tokens read since the start of the stream."""
        return self.history.read


Policy = Callable[[dict[str, Params], View], Array]
"""Whoever chooses what a session shows: from the parameters and the view before a refocus step to float32[R] in
[-1, 1], a score for every row of `view.context`. High asks for detail, low asks to be collapsed."""


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
