"""The loss of a variant, and what is made of losses: pairs, targets, and how well a policy agrees with them."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from lensjax.context.geometry import Geometry
from lensjax.models import Params
from tests.reference.cuts import Entry, Gist, covered, cut_of, node


def logits_at_end(params: Params, embeddings: np.ndarray, positions: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """What `ForeignModel` predicts after the last entry: its recurrence as a loop."""
    head = np.asarray(params["head"], np.float64)
    memory = np.zeros(head.shape[0])
    for embedding, position, span in zip(embeddings, positions, spans, strict=True):
        memory = 0.5 * memory + embedding * (1 + position / 64) / span
    return memory @ head


def variant_loss(
    predict: Callable[..., np.ndarray],
    leaves: np.ndarray,
    gist: Gist,
    entries: Sequence[Entry],
    tokens: Sequence[int],
    *,
    horizon: int,
    block_size: int,
) -> float:
    """Mean over the horizon of -log p(token | entries, the tokens of the horizon before it).

    `leaves` are the embeddings of all tokens; `predict(embeddings, positions, spans)` reads only what is given to
    it, for each token of the horizon anew.
    """
    losses, cursor = [], len(tokens) - horizon
    assert all(covered(entry, block_size).stop <= cursor for entry in entries), "an entry is behind the cursor"
    for target in range(cursor, len(tokens)):
        read = [*entries, *((token, 0) for token in range(cursor, target))]
        embeddings = np.stack([node(leaves, gist, start, lod, block_size) for start, lod in read])
        spans = np.asarray([block_size**lod for _, lod in read], np.float64)
        positions = np.asarray([start for start, _ in read], np.float64) + (spans - 1) / 2
        logits = np.asarray(predict(embeddings, positions, spans), np.float64)
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[target]])
    return float(np.mean(losses))


# Pairs, targets and how well a policy agrees with them.


def select_pairs(
    losses: Sequence[float], valid: Sequence[bool], *, hard_negative_ratio: float, max_pairs: int
) -> list[tuple[int, int, float]]:
    """(better, worse, gap) of the pairs kept, in order."""
    usable = [v for v in range(len(losses)) if valid[v]]
    best = min(usable, key=lambda v: (losses[v], v))
    pairs = [(b, w, losses[w] - losses[b]) for b in usable for w in usable if losses[b] < losses[w]]
    pairs.sort(key=lambda pair: -pair[2])
    with_best = [pair for pair in pairs if pair[0] == best]
    rest = [pair for pair in pairs if pair[0] != best]
    return (with_best + rest[: math.ceil(hard_negative_ratio * len(rest))])[:max_pairs]


def span_targets(
    better: Sequence[Entry], worse: Sequence[Entry], geometry: Geometry, *, worse_only: bool = False
) -> tuple[list[int | None], list[int | None]]:
    """The target of each entry of the two variants, token by token; None where not supervised."""
    window, block_size = geometry.history, geometry.block_size
    better_cut, worse_cut = cut_of(better, window, block_size), cut_of(worse, window, block_size)
    unseen = {t for t in range(window) if better_cut[t] is None or worse_cut[t] is None}
    # Of an entry that the other variant covers in part, nothing counts, on either side.
    for entry in (*better, *worse):
        if unseen & set(covered(entry, block_size)):
            unseen |= set(covered(entry, block_size))

    def target(entry: Entry, is_worse: bool) -> int | None:
        signs = set()
        for token in covered(entry, block_size):
            b, w = better_cut[token], worse_cut[token]
            if b is None or w is None or token in unseen or token >= geometry.tail:
                return None
            signs.add((w > b) - (w < b))
        (sign,) = signs  # one sign for the whole span, since the blocks of two cuts are nested
        if sign == 0 or (worse_only and (not is_worse or (sign > 0 and entry[1] == 0))):
            return None
        return sign

    return [target(entry, False) for entry in better], [target(entry, True) for entry in worse]


def span_advantages(
    losses: Sequence[float], variants: Sequence[Sequence[Entry]], valid: Sequence[bool], geometry: Geometry
) -> list[list[tuple[float, int] | None]]:
    """Of each entry of each variant, against the others that are supervised in a pair with it; None without any.

    Beside it whether it is finer (1) than their mean level or coarser (-1).
    """
    found: list[list[tuple[float, int] | None]] = []
    for v, entries in enumerate(variants):
        against: list[list[tuple[float, int]]] = [[] for _ in entries]
        for u, others in enumerate(variants):
            if valid[u] and valid[v] and u != v:
                levels = cut_of(others, geometry.history, geometry.block_size)
                for i, target in enumerate(span_targets(entries, others, geometry)[0]):
                    level = levels[entries[i][0]]
                    against[i] += [(losses[u], level)] if target is not None and level is not None else []

        def against_others(row: list[tuple[float, int]], lod: int, own: float = losses[v]) -> tuple[float, int] | None:
            if not row:
                return None
            loss, level = (sum(column) / len(row) for column in zip(*row, strict=True))
            return loss - own, (level > lod) - (level < lod)

        found.append([against_others(row, lod) for row, (_, lod) in zip(against, entries, strict=True)])
    return found


def variant_value(scores: Sequence[float], entries: Sequence[Entry], geometry: Geometry) -> float:
    """Span-weighted alignment of scores with detail, over the tokens before the protected tail."""
    aligned, weight = 0.0, 0.0
    for score, entry in zip(scores, entries, strict=False):
        if entry[0] < geometry.tail:
            span = len(covered(entry, geometry.block_size))
            aligned += span * score * (1 - 2 * entry[1] / geometry.max_lod)
            weight += span
    return aligned / weight if weight else 0.0
