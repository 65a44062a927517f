"""Families of files that share text: near-duplicates, which must not lie on both sides of a split.

A line says the more about where a text comes from the fewer files it stands in, so it weighs its length divided by
their number. Two files are joined when the lines they have in common weigh enough of the lighter one:

    shared(a, b) = sum over lines of both of  len(line) / files(line)
    a ~ b        where shared(a, b) >= 0.1 min(shared(a, a), shared(b, b)), or all their bytes are equal,
                 or nearly all of them wherever lines end (see `resemblance`)

and a family is what is joined by a chain of such pairs. Only lines of 20 characters or more count, without the blanks
around them, each once a file, and none that stands in more than 100.

Like every rule that looks at content, this one depends on which files there are: a new file can join two families, and
shifts the weight of the lines in it. Files that share no long line with others stay alone, whatever is added.

References:
  Broder, On the resemblance and containment of documents (1997): `shared(a, b) / shared(a, a)` is a weighted
  containment. Lee et al., Deduplicating Training Data Makes Language Models Better, arXiv:2107.06499: why.
"""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations

from lensjax.runs.data.resemblance import alike, sketch

SHARE = 0.1
LONG = 20
MOST_FILES = 100
"""A line in more files than this joins none: it is idiom, and the pairs that it stands in are many."""


def families(texts: Mapping[str, bytes]) -> dict[str, str]:
    """Finds which files belong together.

    Args:
      texts: what is in each file, by name; in any order.

    Returns:
      For each name the name of its family, which is that of its first member in the order of names.
    """
    names = sorted(texts)
    # Dicts, not sets: the order of a sum, and so its last bit, must not depend on how Python hashes.
    lines = [dict.fromkeys(_long_lines(texts[name])) for name in names]
    holders: dict[bytes, list[int]] = defaultdict(list)
    for i, own in enumerate(lines):
        for line in own:
            holders[line].append(i)

    weights = [sum(len(line) / len(holders[line]) for line in own) for own in lines]
    shared: dict[tuple[int, int], float] = defaultdict(float)
    for line, files in holders.items():
        if len(files) <= MOST_FILES:
            for pair in combinations(files, 2):
                shared[pair] += len(line) / len(files)
    pairs = [(i, j) for (i, j), weight in shared.items() if weight >= SHARE * min(weights[i], weights[j])]

    first: dict[bytes, int] = {}
    pairs += [(first.setdefault(texts[name], i), i) for i, name in enumerate(names)]
    pairs += alike([sketch(io.BytesIO(texts[name])) for name in names])
    return {name: names[root] for name, root in zip(names, joined(len(names), pairs), strict=True)}


def _long_lines(text: bytes) -> list[bytes]:
    return [line for line in map(bytes.strip, text.splitlines()) if len(line) >= LONG]


def joined(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Smallest index that each of `count` is connected to (union-find with path halving)."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, j in pairs:
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    return [root(i) for i in range(count)]
