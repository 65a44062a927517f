"""Grids of objects, and what may be done to them. An object is cells of one colour, not 0, that touch side by side.

Colour 0 is the background. A grid is int32[S, S] without padding; each function returns a new one.
"""

import numpy as np

from experiments.rlan.grids import COLOURS

Cell = tuple[int, int]
"""Row and column."""
Object = tuple[np.ndarray, np.ndarray]
"""Rows and columns of its cells: an index into the grid."""

OBJECTS, LARGEST = 3, 6
"""Objects on a drawn grid, and the most cells that one has."""
SMALLEST_SIDE = 6
"""Of a grid that is drawn: there is room for three objects apart from each other, one of them within."""


def find(grid: np.ndarray) -> list[Object]:
    """The objects of a grid, the largest one first; of equally large ones, that which comes first row by row."""
    left, objects = {(int(row), int(column)) for row, column in np.argwhere(grid)}, []
    while left:
        edge, cells = [left.pop()], []
        while edge:
            cells.append(edge.pop())
            beside = {cell for cell in _beside(cells[-1]) if cell in left and grid[cell] == grid[cells[-1]]}
            left -= beside
            edge.extend(beside)
        objects.append(sorted(cells))
    objects.sort(key=lambda cells: (-len(cells), cells[0]))
    return [
        (np.asarray(rows), np.asarray(columns)) for rows, columns in (zip(*cells, strict=True) for cells in objects)
    ]


def draw(random: np.random.Generator, side: int) -> np.ndarray:
    """Three objects of different colours and sizes that do not touch; one is at the border and one is not.

    Args:
      random: moved on.
      side: S, `SMALLEST_SIDE` or more.
    """
    while True:
        grid = np.zeros((side, side), np.int32)
        free = {(row, column) for row in range(side) for column in range(side)}
        sizes = 1 + random.permutation(LARGEST)[:OBJECTS]
        for size, colour in zip(sizes, 1 + random.permutation(COLOURS - 1)[:OBJECTS], strict=True):
            cells = _grown(random, free, int(size))
            free -= {(row + i, column + j) for row, column in cells for i in (-1, 0, 1) for j in (-1, 0, 1)}
            for cell in cells:
                grid[cell] = colour
        objects = find(grid)
        at_border = [_touches_border(cells, side) for cells in objects]
        if sorted(len(rows) for rows, _ in objects) == sorted(sizes) and any(at_border) and not all(at_border):
            return grid


def by_rank(grid: np.ndarray, *, colours: tuple[int, ...]) -> np.ndarray:
    """The largest object takes the first colour, the next one the second, and so on."""
    result = np.zeros_like(grid)
    for cells, colour in zip(find(grid), colours, strict=True):
        result[cells] = colour
    return result


def by_border(grid: np.ndarray, *, touching: int | None, within: int | None) -> np.ndarray:
    """Objects that touch the border take one colour, the others another; None leaves them as they are."""
    result = grid.copy()
    for cells in find(grid):
        _paint(result, cells, touching if _touches_border(cells, len(grid)) else within)
    return result


def flood(grid: np.ndarray, *, rank: int, itself: int | None, others: int | None) -> np.ndarray:
    """The background takes the colour of one object.

    Args:
      grid: int32[S, S].
      rank: which object: 0 is the largest, -1 the smallest.
      itself: what that object becomes.
      others: what the other objects become; None leaves either as it is.
    """
    rest = find(grid)
    chosen = rest.pop(rank)
    result = np.where(grid == 0, grid[chosen][0], grid)
    _paint(result, chosen, itself)
    for cells in rest:
        _paint(result, cells, others)
    return result


def _paint(grid: np.ndarray, cells: Object, colour: int | None) -> None:
    if colour is not None:
        grid[cells] = colour


def _beside(cell: Cell) -> tuple[Cell, ...]:
    row, column = cell
    return (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)


def _touches_border(cells: Object, side: int) -> bool:
    return any(bool(((line == 0) | (line == side - 1)).any()) for line in cells)


def _grown(random: np.random.Generator, free: set[Cell], size: int) -> list[Cell]:
    """Up to so many free cells that touch; fewer where there is no room."""
    cells: list[Cell] = []
    edge = sorted(free)
    while edge and len(cells) < size:
        cells.append(edge[random.integers(len(edge))])
        edge = sorted({other for cell in cells for other in _beside(cell)} & free - set(cells))
    return cells
