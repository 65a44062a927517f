"""What a session has read, in the memory of the host: tokens and gists, which only become more."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

BLOCK = 2**14
"""Rows that are allocated at a time. Memory that was not written to takes none."""


@dataclass
class _Block:
    """Room for `BLOCK` rows, the first of which are used; these never change."""

    rows: np.ndarray
    used: int = 0


@dataclass(frozen=True)
class Rows:
    """Rows of one array without end, of which the oldest may be gone. A value: all others stay as they are.

    Values share their blocks. What is appended goes into the last one in place, and where another value has put
    something there already, into a copy of it.

    Example:
      >>> import numpy as np
      >>> from lensjax.session.history import Rows
      >>> empty = Rows((), np.int32)
      >>> one = empty.append(np.array([1, 2]))
      >>> one.append(np.array([3])).take(np.array([2, 0])).tolist(), one.append(np.array([4])).between(1, 3).tolist()
      ([3, 1], [2, 4])
    """

    shape: tuple[int, ...]
    """Of one row."""
    dtype: Any
    blocks: tuple[_Block, ...] = ()
    first: int = 0
    """Row that the first block begins with."""
    length: int = 0
    """Rows that there are, those that are gone included."""

    def append(self, rows: np.ndarray) -> "Rows":
        """With further rows [n, ...] at the end."""
        blocks, length, done = self.blocks, self.length, 0
        while done < len(rows):
            used = length - self.first - (len(blocks) - 1) * BLOCK if blocks else BLOCK
            if used == BLOCK:
                blocks, used = (*blocks, _Block(np.empty((BLOCK, *self.shape), self.dtype))), 0
            elif used != blocks[-1].used:
                copy = _Block(np.empty_like(blocks[-1].rows))
                copy.rows[:used] = blocks[-1].rows[:used]
                blocks = (*blocks[:-1], copy)
            count = min(BLOCK - used, len(rows) - done)
            blocks[-1].rows[used : used + count] = rows[done : done + count]
            blocks[-1].used = used + count
            done, length = done + count, length + count
        return Rows(self.shape, self.dtype, blocks, self.first, length)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Some rows [n, ...], by their numbers int[n], none of which is gone."""
        found = np.empty((len(index), *self.shape), self.dtype)
        which, place = np.divmod(index - self.first, BLOCK)
        for block in np.unique(which):
            here = which == block
            found[here] = self.blocks[block].rows[place[here]]
        return found

    def between(self, start: int, end: int) -> np.ndarray:
        """A copy of the rows from `start` up to `end`."""
        parts = [
            self.blocks[block].rows[
                max(start - self.first - block * BLOCK, 0) : max(end - self.first - block * BLOCK, 0)
            ]
            for block in range((start - self.first) // BLOCK, -(-(end - self.first) // BLOCK))
        ]
        return np.concatenate([np.empty((0, *self.shape), self.dtype), *parts])

    def forget(self, before: int) -> "Rows":
        """Without the blocks all of whose rows come before one; what is left keeps its numbers."""
        gone = max(before - self.first, 0) // BLOCK
        return Rows(self.shape, self.dtype, self.blocks[gone:], self.first + gone * BLOCK, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are held."""
        return (self.length - self.first) * int(np.prod(self.shape, dtype=int)) * np.dtype(self.dtype).itemsize


class Found(NamedTuple):
    """What the host knows of the rows of a context."""

    tokens: np.ndarray
    """int32[..., R]: at LOD 0 the token, else 0."""
    gists: np.ndarray
    """float32[..., R, D]: of a gist itself, of a token that of its block; 0 where there is none yet, and at padding."""


@dataclass(frozen=True)
class History:
    """Tokens and gists of a stream, or of B of one length. A value, as `Rows` is.

    Positions count from the oldest token held. Of several streams what stands at one position stands side by side.
    """

    tokens: Rows
    """int32[]."""
    gists: tuple[Rows, ...]
    """float32[D], of the levels 1..L."""
    block_size: int
    forgotten: int = 0
    """Tokens before the oldest one held, a multiple of K**L; of each stream."""
    streams: int = 1
    """B."""

    @property
    def read(self) -> int:
        """Tokens since the start of the stream."""
        return self.tokens.length // self.streams

    @property
    def held(self) -> int:
        """Tokens that a decision can reach."""
        return self.read - self.forgotten

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.tokens.nbytes + sum(rows.nbytes for rows in self.gists)

    @property
    def held_tokens(self) -> np.ndarray:
        """int32[B, n], a copy of the tokens held."""
        first, end = self.forgotten * self.streams, self.tokens.length
        return self.tokens.between(first, end).reshape(-1, self.streams).T

    def append(self, tokens: np.ndarray, gists: list[np.ndarray]) -> "History":
        """With further tokens int[..., n], and the gists [..., m, D] of each level that these have completed."""
        grown = tuple(
            rows.append(self._side_by_side(new, rows)) if new.size else rows
            for rows, new in zip(self.gists, gists, strict=True)
        )
        return replace(self, tokens=self.tokens.append(self._side_by_side(tokens, self.tokens)), gists=grown)

    def _side_by_side(self, new: np.ndarray, rows: Rows) -> np.ndarray:
        return new.reshape(self.streams, -1, *rows.shape).swapaxes(0, 1).reshape(-1, *rows.shape)

    def forget(self, tokens: int) -> "History":
        """Without the oldest tokens of each stream, a multiple of K**L."""
        first = self.forgotten + tokens
        gists = tuple(
            rows.forget(first // self.block_size**lod * self.streams) for lod, rows in enumerate(self.gists, start=1)
        )
        return replace(self, tokens=self.tokens.forget(first * self.streams), gists=gists, forgotten=first)

    def find(self, start: np.ndarray, lod: np.ndarray, valid: np.ndarray) -> Found:
        """Looks up rows of a context, int[..., R] and bool[..., R]."""
        shape, (start, lod, valid) = start.shape, (rows.reshape(self.streams, -1) for rows in (start, lod, valid))
        start, stream = start.astype(np.int64) + self.forgotten, np.arange(self.streams)[:, None]
        tokens = np.zeros(start.shape, np.int32)
        gists = np.zeros((*start.shape, *self.gists[0].shape), self.gists[0].dtype)
        is_token = valid & (lod == 0)
        tokens[is_token] = self.tokens.take((start * self.streams + stream)[is_token])
        for level, rows in enumerate(self.gists, start=1):
            row = start // self.block_size**level * self.streams + stream
            here = valid & (np.maximum(lod, 1) == level) & (row < rows.length)
            if here.any():
                gists[here] = rows.take(row[here])
        return Found(tokens.reshape(shape), gists.reshape(*shape, *gists.shape[2:]))


def empty(*, dim: int, block_size: int, max_lod: int, streams: int = 1) -> History:
    """The history of a session that has read nothing."""
    levels = tuple(Rows((dim,), np.float32) for _ in range(max_lod))
    return History(Rows((), np.int32), levels, block_size, streams=streams)
