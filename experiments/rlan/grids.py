"""Grids of colours: transforms and their inverses, the views of a task, the size of an answer, and votes.

A grid is int32[S, S]: colours 0 to 9 in a rectangle at the top left, padding everywhere else. Two grids of different
shape therefore differ, and an example without any colour is padding as a whole.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

COLOURS, PADDING = 10, 10
DIHEDRAL = 8
"""Elements of the dihedral group: turns by 0, 90, 180 and 270 degrees, then mirrored left to right, upside down, along
the diagonal and along the other one."""
INVERSES = (0, 3, 2, 1, 4, 5, 6, 7)
TRANSPOSES = (False, True, False, True, False, False, True, True)
"""Which elements exchange height and width."""

Size = tuple[int, int]
"""Rows and columns."""


def dihedral(values: ArrayLike, index: int, *, content: ArrayLike) -> Array:
    """Turns or mirrors what is in a padded square, and moves it back to the top left.

    Args:
      values: [S, S, ...], a grid or something of each cell, such as logits.
      index: element of the dihedral group, static.
      content: bool[S, S], the rectangle at the top left that is not padding.

    Returns:
      [S, S, ...]; the cells outside of the rectangle hold values of other such cells.

    Raises:
      ValueError: the element is unknown.
    """
    if not 0 <= index < DIHEDRAL:
        raise ValueError(f"a dihedral element is 0 to {DIHEDRAL - 1}, got {index}")
    turned, where = _turned(jnp.asarray(values), index), _turned(jnp.asarray(content), index)
    first = jnp.stack([jnp.argmax(jnp.any(where, axis=1 - axis)) for axis in (0, 1)])
    return jnp.roll(turned, -first, axis=(0, 1))


def forward(grid: ArrayLike, index: int, permutation: ArrayLike) -> Array:
    """A view of a grid: colours first, then the dihedral element.

    Args:
      grid: int32[S, S].
      index: dihedral element, static.
      permutation: int32[11], of `colour_permutations`.

    Returns:
      int32[S, S].
    """
    grid = jnp.asarray(permutation)[jnp.asarray(grid)]
    return dihedral(grid, index, content=grid != PADDING)


def inverse(grid: ArrayLike, index: int, permutation: ArrayLike) -> Array:
    """Takes back `forward`, to the bit: the dihedral element first, then the colours."""
    grid = jnp.asarray(grid)
    grid = dihedral(grid, INVERSES[index], content=grid != PADDING)
    return jnp.argsort(jnp.asarray(permutation))[grid].astype(jnp.int32)


def view(grid: np.ndarray, index: int, permutation: np.ndarray) -> np.ndarray:
    """What `forward` does to a grid without padding, on the host: int32[rows, columns]."""
    return np.asarray(_turned(permutation[grid], index), np.int32)


def colour_permutations(seed: int, count: int) -> np.ndarray:
    """Permutations of the colours 1 to 9, the first one the identity; 0 and padding stay.

    Returns:
      int32[count, 11].
    """
    random = np.random.default_rng(seed)
    rows = [np.arange(1, COLOURS)] + [1 + random.permutation(COLOURS - 1) for _ in range(count - 1)]
    return np.stack([[0, *row, PADDING] for row in rows]).astype(np.int32)


def inside(size: ArrayLike, side: int) -> Array:
    """Cells of a rectangle at the top left.

    Args:
      size: int32[2], rows and columns.
      side: S.

    Returns:
      bool[S, S].
    """
    rows, columns = jnp.asarray(size)
    places = jnp.arange(side)
    return (places < rows)[:, None] & (places < columns)[None, :]


def size_of(grid: np.ndarray) -> Size:
    """Rows and columns of a grid's rectangle."""
    content = grid != PADDING
    return int(content.any(axis=1).sum()), int(content.any(axis=0).sum())


def output_size(pairs: Sequence[tuple[Size, Size]], query: Size) -> Size | None:
    """The size of an answer, from the sizes of the examples alone.

    The input's where all examples keep their size; that of all outputs where they share one; the input's times a
    constant ratio where there is one.

    Args:
      pairs: sizes of input and output of each valid example, one or more.
      query: size of the input to answer.

    Returns:
      Rows and columns; None where no rule fits the examples, or it gives no whole numbers.
    """
    if all(source == target for source, target in pairs):
        return query
    targets = {target for _, target in pairs}
    if len(targets) == 1:
        return targets.pop()
    (source, target), *others = pairs
    has_ratio = all(t[axis] * source[axis] == s[axis] * target[axis] for s, t in others for axis in (0, 1))
    if not has_ratio or any(query[axis] * target[axis] % source[axis] for axis in (0, 1)):
        return None
    return query[0] * target[0] // source[0], query[1] * target[1] // source[1]


def answer_size(support: np.ndarray, grid: np.ndarray) -> Size:
    """The size of an answer by `output_size`, or 0 x 0, which no answer has, where no rule fits.

    Args:
      support: int32[N, 2, S, S], examples and padding.
      grid: int32[S, S], the input to answer.
    """
    pairs = [(size_of(source), size_of(target)) for source, target in support if (source != PADDING).any()]
    return output_size(pairs, size_of(grid)) or (0, 0)


def colour_table(pairs: ArrayLike) -> Array:
    """What stands in the place of each colour most often: a rule that looks at no cell but the one it answers.

    Args:
      pairs: int32[N, 2, S, S], examples and padding.

    Returns:
      int32[11]; of equally frequent colours the lowest. A colour that no input has stays, and so does padding.
    """
    source, target = (jnp.asarray(pairs)[:, side].ravel() for side in (0, 1))
    counted = (source != PADDING) & (target != PADDING)
    counts = jnp.zeros((PADDING + 1, PADDING + 1), jnp.int32).at[source, target].add(counted.astype(jnp.int32))
    seen = jnp.any(counts > 0, axis=1)
    return jnp.where(seen, jnp.argmax(counts, axis=1), jnp.arange(PADDING + 1)).astype(jnp.int32)


def vote(grids: np.ndarray) -> list[np.ndarray]:
    """The distinct grids, the most frequent one first; of equally frequent ones, that of the earlier view.

    Args:
      grids: int32[views, S, S], predictions mapped back; padding outside of the answer makes shape part of a vote.

    Returns:
      Grids int32[S, S].
    """
    counts = Counter(grid.tobytes() for grid in grids)
    return [np.frombuffer(key, grids.dtype).reshape(grids.shape[1:]) for key, _ in counts.most_common()]


def passes(ranked: Sequence[np.ndarray], truth: np.ndarray, tries: int) -> bool:
    """Whether one of the first so many grids is the answer (pass@k)."""
    return any(np.array_equal(grid, truth) for grid in ranked[:tries])


def _turned(values: Any, index: int) -> Any:
    numbers = values.__array_namespace__()  # of the array that came: NumPy's on the host, JAX's in a program
    if index < 4:
        return numbers.rot90(values, index)
    if index == 6:
        return numbers.swapaxes(values, 0, 1)
    if index == 7:
        return numbers.rot90(numbers.swapaxes(values, 0, 1), 2)
    return numbers.flip(values, axis=5 - index)
