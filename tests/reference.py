"""Slow and obvious versions of what lensjax computes: plain Python and numpy in float64, one entry at a time.

An entry is a pair (start, lod); a working context is a list of entries in time order.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.context.geometry import CutGeometry
from lensjax.context.working import WorkingContext
from lensjax.runs.config import FocusConfig

Entry = tuple[int, int]
Gist = Callable[[np.ndarray], np.ndarray]


# Tree and working contexts.


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


def legal_cuts(geometry: CutGeometry) -> list[tuple[Entry, ...]]:
    """Every cut of a window: whole aligned blocks before the protected tail, tokens anywhere."""

    def tilings(start: int) -> Iterator[tuple[Entry, ...]]:
        if start == geometry.window:
            yield ()
        for lod in range(geometry.max_lod + 1):
            span = geometry.block_size**lod
            limit = geometry.window - (geometry.recent_tokens if lod else 0)
            if start % span == 0 and start + span <= limit:
                for rest in tilings(start + span):
                    yield ((start, lod), *rest)

    return list(tilings(0))


def random_cut(geometry: CutGeometry, length: int, rng: np.random.Generator) -> list[Entry]:
    """A random cut of that length: full tokens, then one random legal collapse after another."""
    size, entries = geometry.block_size, [(token, 0) for token in range(geometry.window)]
    while len(entries) > length:
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


def reachable_lengths(geometry: CutGeometry) -> set[int]:
    """Lengths that some cut has."""
    return {len(cut) for cut in legal_cuts(geometry)}


# The loss of a variant.


def variant_loss(
    logits_at_end: Callable[..., np.ndarray],
    leaves: np.ndarray,
    gist: Gist,
    entries: Sequence[Entry],
    tokens: Sequence[int],
    *,
    horizon: int,
    block_size: int,
) -> float:
    """Mean over the horizon of -log p(token | entries, the tokens of the horizon before it).

    `leaves` are the embeddings of all tokens; `logits_at_end(embeddings, positions, spans)` reads only what is given to
    it, for each token of the horizon anew.
    """
    losses, cursor = [], len(tokens) - horizon
    assert all(covered(entry, block_size).stop <= cursor for entry in entries), "an entry is behind the cursor"
    for target in range(cursor, len(tokens)):
        read = [*entries, *((token, 0) for token in range(cursor, target))]
        embeddings = np.stack([node(leaves, gist, start, lod, block_size) for start, lod in read])
        spans = np.asarray([block_size**lod for _, lod in read], np.float64)
        positions = np.asarray([start for start, _ in read], np.float64) + (spans - 1) / 2
        logits = np.asarray(logits_at_end(embeddings, positions, spans), np.float64)
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
    better: Sequence[Entry],
    worse: Sequence[Entry],
    *,
    window: int,
    block_size: int,
    recent_tokens: int,
    worse_only: bool = False,
) -> tuple[list[int | None], list[int | None]]:
    """The target of each entry of the two variants, token by token; None where not supervised."""
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
            if b is None or w is None or token in unseen or token >= window - recent_tokens:
                return None
            signs.add((w > b) - (w < b))
        (sign,) = signs  # one sign for the whole span, since the blocks of two cuts are nested
        if sign == 0 or (worse_only and (not is_worse or (sign > 0 and entry[1] == 0))):
            return None
        return sign

    return [target(entry, False) for entry in better], [target(entry, True) for entry in worse]


def span_advantages(
    losses: Sequence[float],
    variants: Sequence[Sequence[Entry]],
    valid: Sequence[bool],
    *,
    window: int,
    block_size: int,
    recent_tokens: int,
) -> list[list[tuple[float, int] | None]]:
    """Of each entry of each variant, against the others that are supervised in a pair with it; None without any.

    Beside it whether it is finer (1) than their mean level or coarser (-1).
    """
    shape = {"window": window, "block_size": block_size, "recent_tokens": recent_tokens}
    found: list[list[tuple[float, int] | None]] = []
    for v, entries in enumerate(variants):
        against: list[list[tuple[float, int]]] = [[] for _ in entries]
        for u, others in enumerate(variants):
            if valid[u] and valid[v] and u != v:
                targets, _ = span_targets(entries, others, **shape)
                for i, target in enumerate(targets):
                    level = cut_of(others, window, block_size)[entries[i][0]]
                    against[i] += [(losses[u], level)] if target is not None else []

        def judged(row: list[tuple[float, int]], lod: int, own: float = losses[v]) -> tuple[float, int] | None:
            if not row:
                return None
            loss, level = (sum(column) / len(row) for column in zip(*row, strict=True))
            return loss - own, (level > lod) - (level < lod)

        found.append([judged(row, lod) for row, (_, lod) in zip(against, entries, strict=True)])
    return found


def variant_value(
    scores: Sequence[float], entries: Sequence[Entry], *, window: int, block_size: int, max_lod: int, recent_tokens: int
) -> float:
    """Span-weighted alignment of scores with detail, over the tokens before the protected tail."""
    aligned, weight = 0.0, 0.0
    for score, entry in zip(scores, entries, strict=False):
        if entry[0] < window - recent_tokens:
            span = len(covered(entry, block_size))
            aligned += span * score * (1 - 2 * entry[1] / max_lod)
            weight += span
    return aligned / weight if weight else 0.0


# Losses, entry by entry. Each takes lists of supervised entries only.


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def preference_loss(
    scores: Sequence[float],
    targets: Sequence[float],
    *,
    gap: float,
    temperature: float,
    collapse_weight: float,
    weights: Sequence[float] | None = None,
    granularity: str = "entry",
    form: str = "logistic",
) -> float:
    strength, scale = math.tanh(abs(gap)), max(1.0, abs(gap)) / temperature
    spans = [1.0] * len(targets) if weights is None else weights
    costs = [collapse_weight if t < 0 else 1.0 for t in targets]
    weights = [a * c for a, c in zip(spans, costs, strict=True)]
    if not targets or sum(weights) == 0:
        return 0.0
    if granularity == "pair":
        margin = sum(c * t * s for c, t, s in zip(weights, targets, scores, strict=True)) / sum(weights)
        return strength * softplus(-margin * scale)

    def entry(target: float, score: float) -> float:
        return (score - target) ** 2 if form == "squared" else softplus(-target * score * scale)

    losses = [c * strength * entry(t, s) for c, t, s in zip(weights, targets, scores, strict=True)]
    return sum(losses) / sum(spans)


def rank_loss(
    scores: Sequence[float], targets: Sequence[float], *, margin: float, weights: Sequence[float] | None = None
) -> float:
    entries = list(zip(scores, targets, weights or [1.0] * len(scores), strict=True))

    def average(sign: int) -> float:
        return sum(a * s for s, t, a in entries if t == sign) / sum(a for _, t, a in entries if t == sign)

    if {t for _, t, _ in entries} != {1, -1}:
        return 0.0
    return max(0.0, margin - (average(1) - average(-1)))


def budget_balance(scores: Sequence[float], spans: Sequence[float]) -> float:
    expand = sum(a * s for s, a in zip(scores, spans, strict=True) if s > 0)
    collapse = sum(-a * s for s, a in zip(scores, spans, strict=True) if s < 0)
    return (expand - collapse) / (expand + collapse) if expand + collapse else 0.0


def policy_kl(scores: Sequence[float], anchor: Sequence[float], *, temperature: float) -> float:
    """Mean of KL(p || q) and KL(q || p) of Bernoulli policies, from the definition of the divergence."""

    def kl(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    pairs = [(sigmoid(s / temperature), sigmoid(a / temperature)) for s, a in zip(scores, anchor, strict=True)]
    return sum(0.5 * (kl(p, q) + kl(q, p)) for p, q in pairs) / len(pairs) if pairs else 0.0


# Moving averages.


def ema_mean_var(batches: Sequence[Sequence[float]], betas: Sequence[float]) -> tuple[float, float]:
    """Debiased moments: batch i has weight (1 - beta_i) * the product of all later betas, normalised to sum 1."""
    weights = [(1 - beta) * math.prod(betas[i + 1 :]) for i, beta in enumerate(betas)]
    first = [sum(batch) / len(batch) for batch in batches]
    second = [sum(x * x for x in batch) / len(batch) for batch in batches]

    def average(values: Sequence[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    return average(first), average(second) - average(first) ** 2


# A base model of three functions, to show that any can be passed.


class TinyModel:
    """Logits of an entry from its own embedding and a decaying memory of the entries before it.

    memory_i = 0.5 memory_{i-1} + embedding_i * (1 + position_i / 64) / span_i;    logits_i = memory_i @ head
    """

    vocab_size = 7
    dim = 5

    def init(self, key: Any) -> dict[str, Any]:
        table_key, head_key = jax.random.split(key)
        return {
            "table": jax.random.normal(table_key, (self.vocab_size, self.dim)),
            "head": jax.random.normal(head_key, (self.dim, self.vocab_size)),
        }

    def embed(self, params: dict[str, Any], tokens: Any) -> Any:
        return params["table"][tokens]

    def apply(self, params: dict[str, Any], embeddings: Any, positions: Any, spans: Any, rows: Any) -> Any:
        count = embeddings.shape[0]
        inputs = embeddings * ((1 + positions / 64) / jnp.maximum(spans, 1))[:, None]
        ages = np.arange(count)[:, None] - np.arange(count)[None, :]
        decay = np.where(ages >= 0, 0.5 ** np.maximum(ages, 0), 0).astype(np.float32)
        return (decay @ inputs)[rows] @ params["head"]

    def logits_at_end(self, params: dict[str, Any], embeddings: Any, positions: Any, spans: Any) -> np.ndarray:
        """The same recurrence as a loop over entries, in float64."""
        memory = np.zeros(self.dim)
        for embedding, position, span in zip(embeddings, positions, spans, strict=True):
            memory = 0.5 * memory + embedding * (1 + position / 64) / span
        return memory @ np.asarray(params["head"], np.float64)


# The allocator: a set of entries, and one edit after another.


def nodes(geometry: CutGeometry) -> list[Entry]:
    """Every block that may be collapsed, level 1 first, each level in time order."""
    size = geometry.block_size
    spans = [(lod, size**lod) for lod in range(1, geometry.max_lod + 1)]
    return [
        (start, lod)
        for lod, span in spans
        for start in range(0, geometry.window, span)
        if start + span <= geometry.window - geometry.recent_tokens
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

    def __init__(self, entries: Sequence[Entry], geometry: CutGeometry, cooling: Mapping[Entry, int]) -> None:
        self.entries, self.geometry = set(entries), geometry
        self.step, self.free = 0, dict(cooling)

    def cooling(self, node: Entry) -> int:
        """Steps for which a node must still be left alone."""
        return max(self.free.get(node, 0) - self.step, 0)

    def gists(self) -> list[Entry]:
        """What can be expanded."""
        return [node for node in nodes(self.geometry) if node in self.entries]

    def blocks(self, held: int) -> list[Entry]:
        """What can be collapsed: shown as its K children, wholly before the protected tail."""
        edge, size = held - self.geometry.recent_tokens, self.geometry.block_size
        shown = [node for node in nodes(self.geometry) if children(node, size) <= self.entries]
        return [node for node in shown if covered(node, size)[-1] < edge]

    def expand(self, gist: Entry) -> None:
        self.entries = self.entries - {gist} | children(gist, self.geometry.block_size)

    def collapse(self, block: Entry) -> None:
        self.entries = self.entries - children(block, self.geometry.block_size) | {block}

    def fit(self, scores: Mapping[Entry, float], length: int, *, held: int, cooldown: int) -> None:
        """Edits until no more than `length` entries are left and no expansion fits, or nothing is left to edit."""

        def last(node: Entry, sign: int) -> tuple[bool, float]:
            return self.cooling(node) > 0, sign * scores[node]

        while len(self.entries) > length and (blocks := self.blocks(held)):
            block = min(blocks, key=lambda node: last(node, +1))
            self.collapse(block)
            self.free[block] = self.step + 1 + cooldown
        while len(self.entries) + self.geometry.block_size - 1 <= length and (gists := self.gists()):
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
            if block is None or not scores[gist] > scores[block]:
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
    geometry: CutGeometry,
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
        for block in after.blocks(geometry.window):
            is_old = gist in before and children(block, size) <= set(before)
            if is_old and not cooling.get(gist, 0) and not cooling.get(block, 0):
                weights[gist, block] = math.exp((scores[gist] - scores[block]) / temperature)
    total = sum(weights.values()) + max(len(weights), 1)
    return {None: max(len(weights), 1) / total} | {pair: weight / total for pair, weight in weights.items()}


# Objectives over a group: `group` is a list of (score, reward).


def _mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _softplus(x):
    return math.log(1 + math.exp(x))


def _preferences(group):
    """Scores of the better and the worse variant of every pair."""
    return [(s, t) for s, r in group for t, q in group if r > q]


def logistic(group, *, beta):
    return _mean(_softplus(-beta * (better - worse)) for better, worse in _preferences(group))


def rpo(group, *, beta, weight):
    return _mean(_softplus(-beta * (better - worse)) - weight * better for better, worse in _preferences(group))


def hinge(group, *, beta):
    return _mean(max(0.0, 1 - beta * (better - worse)) for better, worse in _preferences(group))


def ipo(group, *, beta):
    return _mean((better - worse - 1 / (2 * beta)) ** 2 for better, worse in _preferences(group))


def cpl(group, *, alpha, bias):
    terms = []
    for better, worse in _preferences(group):
        won, lost = math.exp(alpha * better), math.exp(bias * alpha * worse)
        terms.append(-math.log(won / (won + lost)))
    return _mean(terms)


def copg(group, *, beta):
    return _mean(0.5 * ((r - q) - beta * (s - t)) ** 2 for i, (s, r) in enumerate(group) for t, q in group[:i])


def a_star_po(group, *, beta):
    value = beta * math.log(_mean(math.exp(r / beta) for _, r in group))
    return _mean((beta * s - (r - value)) ** 2 for s, r in group)


def info_nca(group, *, alpha, beta):
    wanted, found = [math.exp(r / alpha) for _, r in group], [math.exp(beta * s) for s, _ in group]
    return -sum(w / sum(wanted) * math.log(f / sum(found)) for w, f in zip(wanted, found, strict=True))


def plackett_luce(group, *, beta):
    """Each is drawn from itself and all that are worth less."""
    weights = [(math.exp(beta * s), r) for s, r in group]
    return _mean(-math.log(w / (w + sum(other for other, q in weights if q < r))) for w, r in weights)


def log_prob_of_ranking(scores, ranking):
    """Plackett-Luce: each place goes to one of those that are left, in proportion to exp(score)."""
    weights = [math.exp(scores[i]) for i in ranking]
    return sum(math.log(weight / sum(weights[k:])) for k, weight in enumerate(weights))


def ndcg(rewards, ranking):
    """Normalised discounted cumulative gain, with the rewards above the lowest as gains; 0 where all are equal."""

    def dcg(order):
        return sum((rewards[i] - min(rewards)) / math.log2(place + 1) for place, i in enumerate(order, start=1))

    best = dcg(sorted(range(len(rewards)), key=lambda i: -rewards[i]))
    return dcg(ranking) / best if best else 0.0


def _split(group):
    """Scores of the variants nearer to the best reward than to the worst, and of the others."""
    rewards = [r for _, r in group]
    middle = (max(rewards) + min(rewards)) / 2
    return [s for s, r in group if r > middle], [s for s, r in group if r <= middle]


def grpo(group, *, beta, clip, baseline):
    assert baseline == "standardised"
    mean = _mean(r for _, r in group)
    std = math.sqrt(_mean((r - mean) ** 2 for _, r in group))
    ratios = [(math.exp(beta * s), (r - mean) / std) for s, r in group]
    return -_mean(min(rho * a, min(max(rho, 1 - clip), 1 + clip) * a) for rho, a in ratios)


def disco(group, *, tau):
    better, worse = _split(group)
    return -_mean(s - tau * math.log(_mean(math.exp(t / tau) for t in worse)) for s in better)


def info_nce(group, *, tau):
    better, _ = _split(group)
    total = sum(math.exp(s / tau) for s, _ in group)
    return _mean(-math.log(math.exp(s / tau) / total) for s in better)


# The check against theatre.


@functools.cache
def edit_distance(one: tuple[Any, ...], other: tuple[Any, ...]) -> int:
    """By the definition: what to do with the first symbols, and the rest."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return edit_distance(one[1:], other[1:])
    shorter = ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    return 1 + min(edit_distance(*pair) for pair in shorter)
