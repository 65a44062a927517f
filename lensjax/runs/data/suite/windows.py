"""A puzzle as a window of tokens: a text that fills the history, the question at its end, the answer behind it.

In **text** a statement is a line, which the run's tokenizer reads; in **word form** each word is one token, for models
that are trained on tokens alone.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from lensjax._settings import require
from lensjax.runs.data.suite.puzzles import Puzzle, Rng, filler
from lensjax.runs.data.suite.words import VOCABULARY
from lensjax.runs.data.tokenizers import Tokenizer


class Form(Protocol):
    """How words become tokens."""

    def statement(self, words: str) -> np.ndarray:
        """Ids int32[n] of a whole statement."""

    def ask(self, words: str) -> np.ndarray:
        """Ids int32[n] of a question, which ends a history."""

    def answer(self, words: str) -> np.ndarray:
        """Ids int32[n] of what goes on with it."""


@dataclass(frozen=True)
class Text:
    """Lines of text."""

    tokenizer: Tokenizer

    def statement(self, words: str) -> np.ndarray:  # noqa: D102
        return self.tokenizer.encode(f"{_spelled(words)}\n")

    def ask(self, words: str) -> np.ndarray:  # noqa: D102
        return self.tokenizer.encode(_spelled(words))

    def answer(self, words: str) -> np.ndarray:  # noqa: D102
        return self.tokenizer.encode(f" {_spelled(words)}")


class Words:
    """A token a word: its place in `words.VOCABULARY`.

    Example:
      >>> from lensjax.runs.data.suite.windows import Words
      >>> Words().statement("the code of harbor is pearl .").tolist()
      [0, 3, 1, 93, 2, 256, 11]
    """

    def statement(self, words: str) -> np.ndarray:  # noqa: D102
        return np.array([_IDS[word] for word in words.split()], np.int32)

    ask = answer = statement


class Example(NamedTuple):
    """A question in a window."""

    tokens: np.ndarray
    """int32[C + H]."""
    needed: np.ndarray
    """bool[C]: the tokens of the statements that answer it."""
    scored: np.ndarray
    """bool[H]: the tokens of the answer; more text comes behind it."""


def fill(puzzle: Puzzle, form: Form, rng: Rng, *, history: int, horizon: int, name: str) -> Example:
    """Puts a puzzle into a window.

    What is needed comes first, then as many other statements as fit, and lines that say nothing fill what is left: cut
    off at the front, where a history begins in the middle of a line.

    Args:
      puzzle: the question.
      form: text or words.
      rng: decides where in the text each statement stands.
      history: tokens before the cursor C.
      horizon: tokens behind it H.
      name: of the task, for messages.

    Returns:
      `Example`.

    Raises:
      ValueError: the history is too short for what is needed, or the horizon for the answer.
    """
    ask, answer = form.ask(puzzle.ask), form.answer(puzzle.answer)
    needed, others = ([form.statement(line) for line in lines] for lines in (puzzle.needed, puzzle.others))
    least = len(ask) + sum(map(len, needed))
    require(
        least <= history,
        f"{name} needs {least} tokens for its question and what answers it, more than a history of {history}: "
        "raise context.window, or leave it out",
    )
    require(
        len(answer) <= horizon,
        f"{name} has an answer of {len(answer)} tokens, more than a horizon of {horizon}: raise context.horizon",
    )
    lines, room = filler(rng), history - least
    shown, room = _first_that_fit(others, room)
    between: list[np.ndarray] = []
    while room > len(line := form.statement(next(lines))):
        between.append(line)
        room -= len(line)
    text, is_needed = merged(rng, needed, shown, between)
    before = np.concatenate([line[len(line) - room :], *text, ask])
    marks = np.repeat([False, *is_needed, False], [room, *map(len, text), len(ask)])
    behind = np.concatenate([answer, form.statement(".")])
    while len(behind) < horizon:
        behind = np.concatenate([behind, form.statement(next(lines))])
    return Example(np.concatenate([before, behind[:horizon]]).astype(np.int32), marks, np.arange(horizon) < len(answer))


def blocks(needed: np.ndarray, block_size: int) -> np.ndarray:
    """First tokens int32[n] of the blocks that hold a token of bool[C]."""
    return (np.unique(np.flatnonzero(needed) // block_size) * block_size).astype(np.int32)


def _first_that_fit(lines: list[np.ndarray], room: int) -> tuple[list[np.ndarray], int]:
    count = 0
    for line in lines:
        if len(line) > room:
            break
        room, count = room - len(line), count + 1
    return lines[:count], room


def merged(rng: Rng, *groups: list[np.ndarray]) -> tuple[list[np.ndarray], list[bool]]:
    """All lines in random order, those of one group in theirs; and which are of the first group."""
    sources = rng.permutation(np.repeat(np.arange(len(groups)), [len(group) for group in groups])).tolist()
    left = [iter(group) for group in groups]
    return [next(left[source]) for source in sources], [source == 0 for source in sources]


def _spelled(words: str) -> str:
    return words.replace(" .", ".").replace(" :", ":")


_IDS = {word: place for place, word in enumerate(VOCABULARY)}
