"""Examples of the suite: of one task to measure on, or of all tasks in word form to train on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from lensjax._settings import require
from lensjax.runs.data.splits import SPLITS, Split
from lensjax.runs.data.suite.puzzles import TASKS, Puzzle, Rng, filler
from lensjax.runs.data.suite.windows import Example, Form, Words, blocks, fill, merged
from lensjax.runs.data.suite.words import VOCABULARY
from lensjax.training.scoring import ContextConfig

_OTHERS = 16
"""Statements that lead astray, in pretraining: fewer than that."""
_AGAIN = 6
"""Times that statements come again, in pretraining: fewer than that."""
_BETWEEN = 8
"""Sentences that say nothing, in pretraining: fewer than that."""


def draw(task: str, count: int, *, seed: int) -> list[tuple[Puzzle, Rng]]:
    """The same puzzles of one task for the same seed, each with the generator that puts it into a window.

    Example:
      >>> from lensjax.runs.data import suite
      >>> [(puzzle, _)] = suite.draw("needle", 1, seed=0)
      >>> puzzle.needed[0].startswith(puzzle.ask), puzzle.answer in puzzle.needed[0]
      (True, True)
    """
    generators = [np.random.default_rng([seed, list(TASKS).index(task), index]) for index in range(count)]
    return [(TASKS[task](rng), rng) for rng in generators]


def stacked(examples: Sequence[Example], block_size: int) -> dict[str, np.ndarray]:
    """Examples as one batch.

    Args:
      examples: B of them, of one shape.
      block_size: tokens of a block K.

    Returns:
      `tokens` int32[B, C + H], `answers` int32[B, A], the first tokens of the blocks that are needed, the last one
      named as often as it takes, and `scored` bool[B, H].
    """
    return {
        "tokens": np.stack([one.tokens for one in examples]),
        "answers": np.stack([_padded(one.needed, block_size) for one in examples]),
        "scored": np.stack([one.scored for one in examples]),
    }


@dataclass(frozen=True)
class SuiteSource:
    """All tasks of the suite in word form, in turns.

    For pretraining, a window holds one short puzzle of any task after the other, with its answer, and then its
    statements again and again: answers alone are one word in fifty, too few to learn to look up from.

    Args:
      context: window [T], block size [K], recent tokens and horizon [H].
      vocab_size: size of the vocabulary, at least that of the suite's words.
      split: stream of the examples.
      seed: seed of the examples.
      pretraining: whether sequences are for pretraining.

    Raises:
      ValueError: the suite does not fit the context or the vocabulary.
    """

    context: ContextConfig
    vocab_size: int
    split: Split
    seed: int
    pretraining: bool = False
    _form: Form = field(default_factory=Words, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(
            self.vocab_size >= len(VOCABULARY),
            f"the suite has {len(VOCABULARY)} words: base.vocab_size must be at least that, got {self.vocab_size}",
        )
        for index in range(len(TASKS)):
            self._window(index)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `tokens` int32[T] and, for the task itself, `answers` int32[A] (see `stacked`)."""
        if self.pretraining:
            return {"tokens": self._many(index)}
        example = self._window(index)
        return {"tokens": example.tokens, "answers": _padded(example.needed, self.context.block_size)}

    def _window(self, index: int) -> Example:
        rng = self._rng(index)
        name = list(TASKS)[index % len(TASKS)]
        puzzle = TASKS[name](rng)
        return fill(puzzle, self._form, rng, history=self.context.history, horizon=self.context.horizon, name=name)

    def _many(self, index: int) -> np.ndarray:
        rng, parts, length = self._rng(index), [], 0
        while length < self.context.window:
            puzzle = TASKS[str(rng.choice(list(TASKS)))](rng)
            astray = puzzle.others[: int(rng.integers(_OTHERS))]
            needed, others = ([self._form.statement(line) for line in lines] for lines in (puzzle.needed, astray))
            asked = [self._form.ask(puzzle.ask), self._form.answer(puzzle.answer), self._form.statement(".")]
            # Again and again behind the answer, in other orders: who looks up knows how each statement ends.
            again = [line for _ in range(rng.integers(1, _AGAIN)) for line in merged(rng, needed, others)[0]]
            between = [self._form.statement(line) for line in islice(filler(rng), int(rng.integers(_BETWEEN)))]
            parts += [*merged(rng, needed, others, between)[0], *asked, *again]
            length = sum(map(len, parts))
        return np.concatenate(parts)[: self.context.window]

    def _rng(self, index: int) -> Rng:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), int(self.pretraining), index])


def _padded(needed: np.ndarray, block_size: int) -> np.ndarray:
    found = blocks(needed, block_size)
    return np.pad(found, (0, -(-len(needed) // block_size) - len(found)), mode="edge")
