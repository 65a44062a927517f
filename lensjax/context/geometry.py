"""Which lengths a working context can have: integer arithmetic on the shape of the tree.

Every cut of a history arises from the uncompressed one by *collapses*; one collapse replaces K siblings by their
parent and so saves K - 1 entries, at every level. A history of C tokens therefore reaches the lengths
C - u (K - 1), where u runs from 0 to the number of blocks that lie wholly before the protected tail.

With **omission** the base model reads nothing of a collapsed block: a collapse saves K entries, the lengths are
C - u K, and the last W tokens of a history are one of its cuts. The gists of what is omitted are the policy's *map*: it
alone sees them. The first blocks can be kept as **attention sinks**: every cut shows them in full, as it does the tail.
"""

import math
from typing import Annotated

from jax import Array

from lensjax._settings import Bound, Count, PositiveInt, at_least, require, settings

# A fraction of the history is computed in float32 on the device and in float64 here; both add this before rounding
# down, so that 0.7 * 100 is 70 in both. It exceeds the error of float32 up to windows of 100,000 tokens.
ROUNDING = 1e-2

HIGHEST_LOD = 30
"""Of blocks of 2, what an int32 can count."""


@settings("Geometry")
class Geometry:
    """A history, and the cuts that it allows.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=64, block_size=4, max_lod=2, recent_tokens=17)
      >>> geometry.shortest, geometry.length(60)
      (25, 58)
    """

    history: PositiveInt
    """Tokens [C]."""
    block_size: Annotated[int, at_least(2)]
    """Children per gist [K]."""
    max_lod: Annotated[int, Bound(1, HIGHEST_LOD)]
    """Highest level of detail [L]."""
    recent_tokens: Count
    """Last tokens, which stay in full: the query."""
    omit: bool = False
    """Whether the base model reads nothing of what is collapsed, rather than its gist; `max_lod` is 1 then."""
    sink_blocks: Count = 0
    """With omission, first blocks, which stay in full: models that others have trained attend to what stands first."""

    def _check(self) -> None:
        require(
            not self.omit or self.max_lod == 1,
            f"Geometry.max_lod must be 1 with omission (a block is read or not), got {self.max_lod}",
        )
        require(
            self.omit or self.sink_blocks == 0,
            f"Geometry.sink_blocks must be 0 without omission (a context shows the whole history), got "
            f"{self.sink_blocks}",
        )

    @property
    def head(self) -> int:
        """First token behind the sinks."""
        return self.sink_blocks * self.block_size

    @property
    def tail(self) -> int:
        """First token of the protected tail."""
        return self.history - self.recent_tokens

    def is_free(self, start: Array) -> Array:
        """bool[...]: whether an entry that starts at token int32[...] lies between the sinks and the protected tail."""
        return (start >= self.head) & (start < self.tail)

    def blocks(self, lod: int) -> int:
        """Number of blocks of one level that are complete and lie wholly before the protected tail."""
        return self.tail // self.block_size**lod

    @property
    def nodes(self) -> int:
        """Number of blocks of all levels [N], the sinks included."""
        return sum(self.blocks(lod) for lod in range(1, self.max_lod + 1))

    @property
    def saving(self) -> int:
        """Entries that one collapse saves."""
        return self.block_size if self.omit else self.block_size - 1

    def rows(self, capacity: int) -> int:
        """Rows of a working context that has room for `capacity` entries: those, and a map of what is omitted."""
        return capacity + self.max_collapses if self.omit else capacity

    def seen(self, length: int) -> int:
        """Rows that a policy sees of a context of `length` entries: with omission a map of the rest beside them."""
        return length + (self.history - length) // self.block_size if self.omit else length

    def capacity(self, rows: int) -> int:
        """Entries that a working context of so many rows has room for: the inverse of `rows`."""
        return rows - self.max_collapses if self.omit else rows

    @property
    def max_collapses(self) -> int:
        """Collapses that take every block of every level but the sinks: u at the shortest length."""
        return max(self.nodes - self.sink_blocks, 0)

    @property
    def shortest(self) -> int:
        """Fewest entries that a cut can have."""
        return self.history - self.max_collapses * self.saving

    def length(self, target: int, *, name: str = "length") -> int:
        """Rounds a target length down to the nearest reachable one.

        Args:
          target: entries wanted, at least `shortest`.
          name: what the target is called in the error.

        Returns:
          The largest reachable length that is at most `target`.

        Raises:
          ValueError: the target is below the shortest cut; names the nearest reachable lengths.
        """
        if target < self.shortest:
            above = min(self.shortest + self.saving, self.history)
            raise ValueError(
                f"{name} asks for {target} entries, which no cut of {self.history} tokens reaches with block_size "
                f"{self.block_size}, max_lod {self.max_lod} and {self.recent_tokens} recent tokens kept in full: the "
                f"nearest reachable lengths are {self.shortest} and {above}. Raise {name}, raise max_lod or keep "
                "fewer recent tokens."
            )
        collapses = -(-max(self.history - target, 0) // self.saving)
        return self.history - collapses * self.saving

    def length_of_fraction(self, fraction: float, *, name: str = "length") -> int:
        """As `length`, for a target given as a fraction of the history."""
        return self.length(math.floor(fraction * self.history + ROUNDING), name=name)
