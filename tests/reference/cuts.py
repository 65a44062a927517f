"""Trees and working contexts: an entry is a pair (start, lod), a context a list of them in time order."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext

Entry = tuple[int, int]
Gist = Callable[[np.ndarray], np.ndarray]


def node(leaves: np.ndarray, gist: Gist, start: int, lod: int, block_size: int) -> np.ndarray:
    """The embedding of one node, from its children down to the leaves."""
    if lod == 0:
        return np.asarray(leaves[start], np.float64)
    span = block_size ** (lod - 1)
    children = [node(leaves, gist, start + i * span, lod - 1, block_size) for i in range(block_size)]
    return gist(np.stack(children))


def level(leaves: np.ndarray, gist: Gist, lod: int, block_size: int) -> list[np.ndarray]:
    """All complete nodes of one level."""
    span = block_size**lod
    return [node(leaves, gist, i * span, lod, block_size) for i in range(len(leaves) // span)]


def legal_cuts(geometry: Geometry) -> list[tuple[Entry, ...]]:
    """Every cut of a window: whole aligned blocks between the sinks and the protected tail, tokens anywhere."""
    sinks = geometry.sink_blocks * geometry.block_size

    def tilings(start: int) -> Iterator[tuple[Entry, ...]]:
        if start == geometry.history:
            yield ()
        for lod in range(geometry.max_lod + 1):
            span = geometry.block_size**lod
            limit = geometry.history - (geometry.recent_tokens if lod else 0)
            if start % span == 0 and start + span <= limit and (lod == 0 or start >= sinks):
                for rest in tilings(start + span):
                    yield ((start, lod), *rest)

    return list(tilings(0))


def read(entries: Sequence[Entry], geometry: Geometry) -> list[Entry]:
    """What the base model reads of a cut: with omission its tokens alone."""
    return [entry for entry in entries if entry[1] == 0 or not geometry.omit]


def random_cut(geometry: Geometry, length: int, rng: np.random.Generator) -> list[Entry]:
    """A random cut of that length: full tokens, then one random legal collapse after another."""
    size, entries = geometry.block_size, [(token, 0) for token in range(geometry.history)]
    while len(read(entries, geometry)) > length:
        shown = set(entries)
        parents = [
            (start, lod)
            for lod in range(1, geometry.max_lod + 1)
            for start in range(0, geometry.blocks(lod) * size**lod, size**lod)
            if shown >= {(start + i * size ** (lod - 1), lod - 1) for i in range(size)}
        ]
        parent = parents[rng.integers(len(parents))]
        hidden = covered(parent, size)
        entries = sorted([entry for entry in entries if entry[0] not in hidden] + [parent])
    return entries


def level_counts(entries: Sequence[Entry], max_lod: int) -> tuple[int, ...]:
    """Blocks shown at each level, highest level first, tokens left out."""
    return tuple(sum(lod == wanted for _, lod in entries) for wanted in range(max_lod, 0, -1))


def entries_of(context: WorkingContext) -> list[Entry]:
    """The valid entries of one working context."""
    rows = zip(*(np.asarray(x).tolist() for x in (context.start, context.lod, context.valid)), strict=True)
    return [(start, lod) for start, lod, valid in rows if valid]


def context_of(entries: Sequence[Entry], *, window: int, capacity: int) -> WorkingContext:
    """The working context that lists those entries, padded to the capacity; numpy arrays."""
    padded = [*entries, *[(window, 0)] * (capacity - len(entries))]
    start, lod = np.asarray(padded, np.int32).T
    return WorkingContext(start, lod, np.arange(capacity) < len(entries))


def variants_of(cuts: Sequence[Sequence[Entry]], *, window: int, capacity: int) -> WorkingContext:
    """The working contexts of several cuts of one window, leading axis V; numpy arrays."""
    rows = [context_of(cut, window=window, capacity=capacity) for cut in cuts]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def unstack(batch: WorkingContext) -> list[list[Entry]]:
    """The entries of each of a batch of working contexts."""
    rows = zip(*(np.asarray(x) for x in (batch.start, batch.lod, batch.valid)), strict=True)
    return [entries_of(WorkingContext(*row)) for row in rows]


def covered(entry: Entry, block_size: int) -> range:
    """The tokens that an entry covers."""
    start, lod = entry
    return range(start, start + block_size**lod)


def cut_of(entries: Sequence[Entry], window: int, block_size: int) -> list[int | None]:
    """The level at which each token is shown; None where it is not."""
    cut: list[int | None] = [None] * window
    for entry in entries:
        for token in covered(entry, block_size):
            cut[token] = entry[1]
    return cut


def reachable_lengths(geometry: Geometry) -> set[int]:
    """Lengths that some cut has."""
    return {len(read(cut, geometry)) for cut in legal_cuts(geometry)}


@functools.cache
def edit_distance(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """By the definition: what to do with the first symbols, and the rest."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return edit_distance(one[1:], other[1:])
    shorter = ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    return 1 + min(edit_distance(*pair) for pair in shorter)
