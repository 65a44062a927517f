"""Which lengths a working context can have: integer arithmetic on the shape of the tree, no arrays.

Every cut of a window arises from the uncompressed one by *collapses*; one collapse replaces K siblings by their
parent and so saves K - 1 entries, at every level. A history of C tokens therefore reaches the lengths
C - u (K - 1), where u runs from 0 to the number of blocks that lie wholly before the protected tail.
"""

import math
from dataclasses import dataclass

# A fraction of the window is computed in float32 on the device and in float64 here; both add this before rounding
# down, so that 0.7 * 100 is 70 in both. It exceeds the error of float32 up to windows of 100,000 tokens.
ROUNDING = 1e-2


@dataclass(frozen=True)
class CutGeometry:
    """What is cut, a history of C tokens (`window`): K children per gist, levels up to L, a tail that stays in full."""

    window: int
    block_size: int
    max_lod: int
    recent_tokens: int

    def blocks(self, lod: int) -> int:
        """Number of blocks of one level that may be collapsed: complete, and wholly before the protected tail."""
        return (self.window - self.recent_tokens) // self.block_size**lod

    @property
    def max_collapses(self) -> int:
        """Collapses that take every eligible block of every level: u at the shortest length."""
        return sum(self.blocks(lod) for lod in range(1, self.max_lod + 1))

    @property
    def shortest(self) -> int:
        """Fewest entries that a cut can have."""
        return self.window - self.max_collapses * (self.block_size - 1)

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
            step = self.block_size - 1
            above = min(self.shortest + step, self.window)
            raise ValueError(
                f"{name} asks for {target} entries, which no cut of {self.window} tokens reaches with block_size "
                f"{self.block_size}, max_lod {self.max_lod} and {self.recent_tokens} recent tokens kept in full: the "
                f"nearest reachable lengths are {self.shortest} and {above}. Raise {name}, raise max_lod or keep "
                "fewer recent tokens."
            )
        collapses = -(-max(self.window - target, 0) // (self.block_size - 1))
        return self.window - collapses * (self.block_size - 1)

    def length_of_fraction(self, fraction: float, *, name: str = "length") -> int:
        """As `length`, for a target given as a fraction of the window."""
        return self.length(math.floor(fraction * self.window + ROUNDING), name=name)
