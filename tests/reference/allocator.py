"""The allocator: a set of entries, and one edit after another."""

import math
from collections.abc import Mapping, Sequence

from lensjax.context.allocator import FocusConfig
from lensjax.context.geometry import Geometry
from tests.reference.cuts import Entry, covered, read


def nodes(geometry: Geometry) -> list[Entry]:
    """Every block before the protected tail, level 1 first, each level in time order."""
    size = geometry.block_size
    spans = [(lod, size**lod) for lod in range(1, geometry.max_lod + 1)]
    return [
        (start, lod)
        for lod, span in spans
        for start in range(0, geometry.history, span)
        if start + span <= geometry.history - geometry.recent_tokens
    ]


def children(node: Entry, block_size: int) -> set[Entry]:
    """The K entries into which a node expands."""
    return {(token, node[1] - 1) for token in covered(node, block_size)[:: block_size ** (node[1] - 1)]}


def node_score(node: Entry, entries: Sequence[Entry], scores: Sequence[float], block_size: int) -> float:
    """Mean over the tokens of a node of the score of the entry that shows each."""
    by_token = {t: s for entry, s in zip(entries, scores, strict=True) for t in covered(entry, block_size)}
    tokens = covered(node, block_size)
    return sum(by_token[token] for token in tokens) / len(tokens)


class Allocator:
    """A context that is edited node by node; what can be edited is looked up anew before every edit.

    `free` holds the step from which on a node may be edited again. `held` is the number of tokens that are there.
    """

    def __init__(self, entries: Sequence[Entry], geometry: Geometry, cooling: Mapping[Entry, int]) -> None:
        self.entries, self.geometry = set(entries), geometry
        self.step, self.free = 0, dict(cooling)

    def cooling(self, node: Entry) -> int:
        """Steps for which a node must still be left alone."""
        return max(self.free.get(node, 0) - self.step, 0)

    def length(self) -> int:
        """Entries that the base model reads."""
        return len(read(list(self.entries), self.geometry))

    def gists(self) -> list[Entry]:
        """What can be expanded."""
        return [node for node in nodes(self.geometry) if node in self.entries]

    def blocks(self, held: int) -> list[Entry]:
        """What can be collapsed: shown as its K children, behind the sinks and wholly before the protected tail."""
        edge, size = held - self.geometry.recent_tokens, self.geometry.block_size
        shown = [
            node for node in nodes(self.geometry)[self.geometry.sink_blocks :] if children(node, size) <= self.entries
        ]
        return [node for node in shown if covered(node, size)[-1] < edge]

    def expand(self, gist: Entry) -> None:
        self.entries = self.entries - {gist} | children(gist, self.geometry.block_size)

    def collapse(self, block: Entry) -> None:
        self.entries = self.entries - children(block, self.geometry.block_size) | {block}

    def fit(self, scores: Mapping[Entry, float], length: int, *, held: int, cooldown: int) -> None:
        """Edits until no more than `length` entries are left and no expansion fits, or nothing is left to edit."""

        def last(node: Entry, sign: int) -> tuple[bool, float]:
            return self.cooling(node) > 0, sign * scores[node]

        while self.length() > length and (blocks := self.blocks(held)):
            block = min(blocks, key=lambda node: last(node, +1))
            self.collapse(block)
            self.free[block] = self.step + 1 + cooldown
        saved = self.geometry.block_size if self.geometry.omit else self.geometry.block_size - 1
        while self.length() + saved <= length and (gists := self.gists()):
            gist = min(gists, key=lambda node: last(node, -1))
            self.expand(gist)
            self.free[gist] = self.step + 1 + cooldown

    def swap(self, scores: Mapping[Entry, float], settings: FocusConfig, *, held: int) -> list[tuple[Entry, Entry]]:
        """Swaps of one step, in order: the gist that was expanded, the block that was collapsed."""
        size, before, swaps = self.geometry.block_size, self.entries, []
        while len(swaps) < settings.max_edits:
            gists = [node for node in self.gists() if node in before and not self.cooling(node)]
            gists = [node for node in gists if scores[node] >= settings.expand_threshold]
            if not gists:
                break
            gist, undo = max(gists, key=lambda node: scores[node]), self.entries
            self.expand(gist)
            blocks = [node for node in self.blocks(held) if children(node, size) <= before and not self.cooling(node)]
            blocks = [node for node in blocks if scores[node] <= settings.collapse_threshold]
            block = min(blocks, key=lambda node: scores[node], default=None)
            if block is None or not scores[gist] > scores[block] + settings.margin:
                self.entries = undo
                break
            self.collapse(block)
            swaps.append((gist, block))
        self.free |= {node: self.step + 1 + settings.cooldown for pair in swaps for node in pair}
        self.step += 1
        return swaps


def swap_probabilities(
    before: Sequence[Entry],
    entries: Sequence[Entry],
    scores: Mapping[Entry, float],
    geometry: Geometry,
    cooling: Mapping[Entry, int],
    *,
    temperature: float,
) -> dict[tuple[Entry, Entry] | None, float]:
    """Probability of each legal swap of a context, and of None, within a step that found the context `before`."""
    size, weights = geometry.block_size, {}
    now = Allocator(entries, geometry, {})
    for gist in now.gists():
        after = Allocator(entries, geometry, {})
        after.expand(gist)
        for block in after.blocks(geometry.history):
            is_old = gist in before and children(block, size) <= set(before)
            if is_old and not cooling.get(gist, 0) and not cooling.get(block, 0):
                weights[gist, block] = math.exp((scores[gist] - scores[block]) / temperature)
    total = sum(weights.values()) + max(len(weights), 1)
    return {None: max(len(weights), 1) / total} | {pair: weight / total for pair, weight in weights.items()}
