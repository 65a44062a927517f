"""Single-span recall: a sequence ends with a block which repeats an earlier one, and which one is known."""

import sys
from dataclasses import dataclass

import numpy as np

from lensjax.runs.data.splits import SPLITS, Split
from lensjax.training.scoring import ContextConfig


@dataclass(frozen=True)
class RecallSource:
    """Single-span recall: the last K tokens of a sequence repeat one earlier block; which one is known.

    The first `query` tokens of that tail block stand before the cursor and say which block is meant; the K - query
    tokens behind the cursor are scored, and nothing but the source foretells them.

    No two blocks have the same first `query` tokens. Where the vocabulary suffices (at least T - K tokens) no token
    comes twice before the tail. The source is uniform over the candidates, the blocks wholly before the recent tokens.

    For pretraining, every block comes from a pool of `pool` different blocks, drawn anew for each sequence:
    most positions repeat something, and there is no single answer.

    Args:
      context: window [T], block size [K], recent tokens and horizon.
      vocab_size: tokens are drawn from 0 to vocab_size - 1.
      split: stream of the examples.
      seed: seed of the examples.
      query: tokens of the tail block before the cursor.
      pool: number of blocks in a pretraining sequence's pool; None for the task itself.

    Raises:
      ValueError: the task does not fit the context.
    """

    context: ContextConfig
    vocab_size: int
    split: Split
    seed: int
    query: int
    pool: int | None = None

    def __post_init__(self) -> None:
        size, window = self.context.block_size, self.context.window
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if window % size:
            raise ValueError(f"recall needs context.window as a multiple of block_size {size}, got {window}")
        if not 1 <= self.query < size:
            raise ValueError(
                "recall shows data.query tokens of the repeated block and scores the rest: data.query must be between "
                f"1 and context.block_size - 1 = {size - 1}, got {self.query}"
            )
        if self.context.horizon != size - self.query:
            raise ValueError(
                f"recall shows data.query {self.query} tokens of the repeated block and scores the rest: "
                f"context.horizon must be block_size - query = {size - self.query}, got {self.context.horizon}"
            )
        if self.context.recent_tokens < self.query:
            raise ValueError(
                f"recall keeps the query of data.query {self.query} tokens in full: context.recent_tokens must be at "
                f"least {self.query}, got {self.context.recent_tokens}"
            )
        if self.vocab_size**self.query < self._distinct:
            raise ValueError(
                f"recall needs {self._distinct} blocks that differ in their first {self.query} tokens, more than a "
                f"vocabulary of {self.vocab_size} gives; raise base.vocab_size or data.query"
            )

    @property
    def _distinct(self) -> int:
        return self.context.window // self.context.block_size - 1 if self.pool is None else self.pool

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `tokens` int32[T] and, for the task itself, `answers` int32[1], the source's first token."""
        is_pretraining = self.pool is not None
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), int(is_pretraining), index])
        size = self.context.block_size
        blocks = _distinct_blocks(rng, self._distinct, size, self.query, self.vocab_size)
        if is_pretraining:
            return {"tokens": blocks[rng.integers(len(blocks), size=self.context.window // size)].reshape(-1)}
        source = rng.integers(self.context.geometry.blocks(1))
        tokens = np.concatenate([blocks, blocks[source : source + 1]]).reshape(-1)
        return {"tokens": tokens, "answers": np.asarray([source * size], np.int32)}


def _distinct_blocks(rng: np.random.Generator, count: int, size: int, prefix: int, vocab_size: int) -> np.ndarray:
    """Draws int32[count, size], no two rows with the same prefix, and no token twice where the vocabulary allows."""
    if vocab_size >= count * size:
        return rng.permutation(vocab_size)[: count * size].reshape(count, size).astype(np.int32)
    blocks = rng.integers(vocab_size, size=(count, size), dtype=np.int32)
    while True:
        _, first = np.unique(blocks[:, :prefix], axis=0, return_index=True)
        repeats = np.setdiff1d(np.arange(count), first)
        if not len(repeats):
            return blocks
        blocks[repeats] = rng.integers(vocab_size, size=(len(repeats), size), dtype=np.int32)
