"""Variable tracking: which value does a variable have that is defined by another one, and that one by a third?

One statement fills one block, so that each statement is one gist of LOD 1:

    VAR a 7 END   VAR c b END   VAR b a END   VAR d 5 END   ...   ASK c | b a 7

It takes a look-up for each token behind the cursor, and what is to be looked up next stands in what was found before:
a policy which knows only what is asked (c) can find the first statement by the text it has, and no other one.

References:
  Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models? (2024), section 3.2,
  "variable tracking". There the statements of a chain stand in order; here in any, so that where a statement stands
  says nothing about its place in its chain.
"""

import sys
from dataclasses import dataclass

import numpy as np

from lensjax.runs.data.splits import SPLITS, Split
from lensjax.training.scoring import ContextConfig

VAR, END, ASK = 0, 1, 2
_WORDS = 3
_QUERY = 2
"""Tokens of a question: ASK and a name."""


@dataclass(frozen=True)
class TrackingSource:
    """Chains of `hops` statements: a literal, and variables each of which is the one before it.

    A history is n = (C - 2) / K statements in a uniformly random order and a question, `ASK` and the name of the last
    variable of one of the chains, uniformly chosen. As many chains as fit are there; statements left over define
    further literals. The horizon spells the asked chain: the right-hand side of the variable, that one's, and so on to
    the literal. All names of a sequence differ, and so do all literals.

    Vocabulary: `VAR`, `END`, `ASK`; the rest is half names, half values. A statement is `VAR`, a name, a value or a
    name, and `END` to the end of the block.

    For pretraining, the number of chains is log-uniform from one to as many as fit, and questions fill the rest, each
    in blocks of its own that end with `END`; they ask for all chains equally often. Few chains, asked for many times,
    teach to look up; many, to look among many.

    Args:
      context: window [T], block size [K], recent tokens and horizon [H].
      vocab_size: size of the vocabulary.
      split: stream of the examples.
      seed: seed of the examples.
      hops: statements in a chain.
      pretraining: whether sequences are for pretraining.
      chains: chains in a sequence; 0 for as many as fit.
      quiet: statements at the end of a history none of which belongs to a chain: who keeps the last ones alone cannot
        answer. Not for pretraining.

    Raises:
      ValueError: the task does not fit the context.
    """

    context: ContextConfig
    vocab_size: int
    split: Split
    seed: int
    hops: int
    pretraining: bool = False
    chains: int = 0
    quiet: int = 0

    def __post_init__(self) -> None:
        size, history = self.context.block_size, self.context.history
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if size < 4:
            raise ValueError(f"a statement to track takes 4 tokens: context.block_size must be at least 4, got {size}")
        if self.context.horizon != self.hops:
            raise ValueError(
                f"tracking scores a token for each of data.hops {self.hops}: context.horizon must be {self.hops}, got "
                f"{self.context.horizon}"
            )
        if self.context.recent_tokens < _QUERY:
            raise ValueError(
                f"tracking keeps the question of {_QUERY} tokens in full: context.recent_tokens must be at least "
                f"{_QUERY}, got {self.context.recent_tokens}"
            )
        if (history - _QUERY) % size:
            fits = (history - _QUERY) // size * size + _QUERY + self.hops
            raise ValueError(
                f"tracking fills blocks of {size} tokens, then asks and answers with {_QUERY + self.hops}: "
                f"context.window must be a multiple of {size} plus {_QUERY + self.hops}, such as {fits}, got "
                f"{self.context.window}"
            )
        if self._statements < self.hops:
            raise ValueError(
                f"tracking needs room for a chain of data.hops {self.hops} statements: context.window must be at least "
                f"{self.hops * size + _QUERY + self.hops}, got {self.context.window}"
            )
        room = self._statements - self.quiet
        if self.quiet < 0 or (self.pretraining and self.quiet) or room < self.hops:
            raise ValueError(
                f"quiet must be 0 in pretraining, and else leave {self.hops} of {self._statements} statements to a "
                f"chain, got {self.quiet}"
            )
        if not 0 <= self.chains * self.hops <= room:
            raise ValueError(
                f"chains of {self.hops} statements must fit into {room}: at most {room // self.hops}, got {self.chains}"
            )
        if self._names < self._statements:
            raise ValueError(
                f"tracking needs {self._statements} names and as many values beside {_WORDS} words: base.vocab_size "
                f"must be at least {_WORDS + 2 * self._statements}, got {self.vocab_size}"
            )

    @property
    def _statements(self) -> int:
        return (self.context.history - _QUERY) // self.context.block_size

    @property
    def _names(self) -> int:
        return (self.vocab_size - _WORDS) // 2

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `tokens` int32[T] and, for the task itself, `answers` int32[hops].

        These are the first tokens of the statements of the asked chain, in the order in which they are needed.
        """
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), int(self.pretraining), index])
        size, hops = self.context.block_size, self.hops
        blocks = -(-(_QUERY + hops) // size)  # of a question; the last one stands behind the cursor
        chains, questions = self.chains or (self._statements - self.quiet) // hops, 1
        if self.pretraining:
            chains = int((chains + 1) ** rng.random())
            questions += (self._statements - chains * hops) // blocks
        count = self._statements - (questions - 1) * blocks
        names, values = self._definitions(rng, count, chains)

        order = self._order(rng, count, chains * hops)
        statements = np.full((count, size), END, np.int32)
        statements[:, :3] = np.stack([np.full(count, VAR), names[order], values[order]], axis=1)

        asked = rng.permutation(chains)[:1]
        if self.pretraining:
            asked = rng.permutation(np.arange(questions) % chains)
        needed = (asked[:, None] + 1) * hops - 1 - np.arange(hops)  # from the last variable of a chain to its first
        text = np.full((questions, blocks * size), END, np.int32)
        text[:, : _QUERY + hops] = np.concatenate(
            [np.full((questions, 1), ASK), names[needed[:, :1]], values[needed]], axis=1
        )

        tokens = np.concatenate([statements.reshape(-1), text.reshape(-1)])[: self.context.window]
        if self.pretraining:
            return {"tokens": tokens}
        return {"tokens": tokens, "answers": (np.argsort(order)[needed[0]] * size).astype(np.int32)}

    def _order(self, rng: np.random.Generator, count: int, used: int) -> np.ndarray:
        """Which statement stands in each place, int[count]; the first `used` are those of chains."""
        if self.quiet == 0:
            return rng.permutation(count)
        early = rng.permutation(count - self.quiet)
        rest = np.concatenate([early[used:], np.arange(count - self.quiet, count)])
        return np.argsort(np.concatenate([early[:used], rng.permutation(rest)]))

    def _definitions(self, rng: np.random.Generator, count: int, chains: int) -> tuple[np.ndarray, np.ndarray]:
        """Names and right-hand sides int[count]; each `hops` in turn are a chain, those left over literals."""
        names = _WORDS + rng.permutation(self._names)[:count]
        values = _WORDS + self._names + rng.permutation(self.vocab_size - _WORDS - self._names)[:count]
        index = np.arange(count)
        (uses,) = np.nonzero((index % self.hops > 0) & (index < chains * self.hops))
        values[uses] = names[uses - 1]
        return names, values
