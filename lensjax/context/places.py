"""The allocator on the rows of a context alone: as `allocator`, for a history of any length.

A context of R rows has at most R places to edit: a gist that is shown can be expanded, and K neighbouring siblings can
be collapsed, at the first of them. Nothing here is as long as the history, so that a refocus step over ten million
tokens takes as long as one over a thousand. What `allocator` does on one flag a node, `edit` does on the rows, with the
same order among equal scores, and gives the same contexts to the bit.
"""

from dataclasses import dataclass

import jax
from jax import Array
from jax.typing import ArrayLike

from lensjax.context.allocator import FocusConfig
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cooling:
    """The nodes that were edited lately, and are left alone: those of each of the last A refocus steps, newest first.

    A is `settings.cooldown`, E the most edits of one step.
    """

    start: Array
    """int32[A, E]: first token of each."""
    lod: Array
    """int32[A, E]: level of each; 0, which no node that is edited has, where there is none."""


def nothing_cools(rows: int, geometry: Geometry, *, settings: FocusConfig) -> Cooling:
    """The state before the first refocus step of contexts of a static number of rows R."""
    raise NotImplementedError


def edit(
    context: WorkingContext,
    cooling: Cooling,
    scores: ArrayLike,
    length: ArrayLike,
    geometry: Geometry,
    *,
    settings: FocusConfig,
    tokens: ArrayLike,
    key: Array | None = None,
) -> tuple[WorkingContext, Cooling, Array]:
    """One step of focusing: the edits that the budget demands, then those that the policy asks for (`allocator.edit`).

    Args:
      context: R rows that cover the tokens held, all of them.
      cooling: what was edited lately.
      scores: float32[R], the policy's for the rows; of padding they are ignored.
      length: int32[], entries that the next context must have, rounded down to a reachable length.
      geometry: levels, blocks and tail. Of its `history` only padding knows, which starts there: no token held may
        stand at or behind it.
      settings: thresholds, edits a step, cool-down, temperature.
      tokens: int32[], tokens held, from 0 on.
      key: PRNG key, consumed; needed where the temperature is above 0. Noise is drawn for the rows, not for the nodes
        of the history: of one law with that of `allocator`, and not the same numbers.

    Returns:
      The next context, of R rows; what cools now; and int32[], swaps that the policy asked for.

    Raises:
      ValueError: there is a temperature and no key.
    """
    raise NotImplementedError


def drop_oldest(
    context: WorkingContext, cooling: Cooling, tokens: int, geometry: Geometry
) -> tuple[WorkingContext, Cooling]:
    """Both, of a history that has lost its first tokens, a multiple of K**L: all that is left moves to the front."""
    raise NotImplementedError
