"""Text that quotes itself: a window of real text whose end begins an earlier passage of it again.

    ... def __repr__(self): return f"{self.name}..." ........................... def __re|pr__(self): return f"{s
        ^ a passage of the history                                               ^ query | horizon

The last `quote` tokens of the history are the first of a passage further back, and the horizon is how that passage goes
on. Most text tells little of what is far back, so that its last tokens are hard to beat; here it is known which blocks
are needed, and that they can be found from what stands before the cursor.
"""

from dataclasses import dataclass

import numpy as np

from lensjax.training.scoring import ContextConfig


@dataclass(frozen=True)
class Quotes:
    """Writes quotes into windows of text; what it draws is a function of the generator that it is given.

    Args:
      context: window [T], block size [K], recent tokens and horizon.
      quote: tokens of a quote before the cursor.
      pretraining: whether quotes stand all over a window, and not at its cursor.

    Raises:
      ValueError: a quote does not fit the context.
    """

    context: ContextConfig
    quote: int
    pretraining: bool = False

    def __post_init__(self) -> None:
        context = self.context
        if self.quote > context.recent_tokens:
            raise ValueError(
                f"text keeps the data.quote {self.quote} tokens before the cursor in full: context.recent_tokens must "
                f"be at least {self.quote}, got {context.recent_tokens}"
            )
        if self._latest < 0:
            raise ValueError(
                f"a quote of data.quote {self.quote} tokens and context.horizon {context.horizon} must stand in the "
                f"blocks before it: raise context.window {context.window}, or lower one of these"
            )

    @property
    def length(self) -> int:
        """Tokens of a passage that is quoted."""
        return self.quote + self.context.horizon

    @property
    def _latest(self) -> int:
        """Last place where a passage may begin: all of it in blocks before the protected tail."""
        geometry = self.context.geometry
        return geometry.tail // geometry.block_size * geometry.block_size - self.length

    def __call__(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Maps `tokens` int32[T] to tokens and, for the task itself, `answers` int32[A]: the blocks of the passage.

        These are the blocks that hold what the horizon repeats, by their first tokens; the last one is named more than
        once where a passage takes fewer than it could.
        """
        tokens, length = example["tokens"].copy(), self.length
        if self.pretraining:
            for _ in range(len(tokens) // (2 * length)):
                place = int(rng.integers(length, len(tokens) - length + 1))
                earlier = int(rng.integers(0, place - length + 1))
                tokens[place : place + length] = tokens[earlier : earlier + length]
            return {"tokens": tokens}
        size, history, horizon = self.context.block_size, self.context.history, self.context.horizon
        source = int(rng.integers(0, self._latest + 1))
        tokens[history - self.quote :] = tokens[source : source + length]
        first, last = (source + self.quote) // size, (source + length - 1) // size
        blocks = np.minimum(first + np.arange(-(-(horizon - 1) // size) + 1), last)
        return {"tokens": tokens, "answers": (blocks * size).astype(np.int32)}
