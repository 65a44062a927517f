"""What a session is shaped like, and what it remembers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax import Array

from lensjax._settings import PositiveInt, require, settings
from lensjax.context.allocator import FocusConfig, FocusState
from lensjax.context.geometry import Geometry
from lensjax.context.tree import TreeState
from lensjax.context.working import WorkingContext
from lensjax.models import Params


@settings("session")
class SessionConfig:
    """The shape of a session. A longer history than in training is fine.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=64, block_size=8, max_lod=1, recent_tokens=4)
      >>> lx.SessionConfig(geometry, budget=32, interval=16).capacity
      48
    """

    geometry: Geometry
    """How far back a decision reaches, and the cuts that it may choose."""
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
class SessionState:
    """All that a session remembers; every array has a fixed shape. Positions count from the oldest token held."""

    tree: TreeState
    """The tokens held and their gists."""
    forgotten: Array
    """int32[]: tokens read before those held."""
    focus: FocusState
    """What is collapsed."""
    context: WorkingContext
    """W entries, with omission a map of the rest, and room for an interval's tokens behind them."""
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
        return self.forgotten + self.tree.length


Policy = Callable[[dict[str, Params], SessionState], Array]
"""Whoever chooses what a session shows: from the parameters and the session before a refocus step to float32[R] in
[-1, 1], a score for every row of `state.context`. High asks for detail, low asks to be collapsed."""


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
