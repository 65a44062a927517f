"""Objectives over a group, a list of (score, reward), straight from their definitions."""

import math
from collections.abc import Iterable, Sequence

from tests.reference.scalars import softened, softplus

Group = Sequence[tuple[float, float]]


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept) if kept else 0.0


def _preferences(group: Group) -> list[tuple[float, float]]:
    """Scores of the better and the worse variant of every pair."""
    return [(s, t) for s, r in group for t, q in group if r > q]


def logistic(
    group: Group,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gap_margin: float = 0.0,
    gap_range: tuple[float, float] = (0.0, math.inf),
) -> float:
    losses = []
    for better, high in group:
        for worse, low in group:
            if high > low and gap_range[0] <= high - low < gap_range[1]:
                difference = beta * (better - worse) - gap_margin * (high - low)
                losses.append(softened(difference, label_smoothing))
    return _mean(losses)


def rpo(group: Group, *, beta: float, weight: float) -> float:
    return _mean(softplus(-beta * (better - worse)) - weight * better for better, worse in _preferences(group))


def hinge(group: Group, *, beta: float) -> float:
    return _mean(max(0.0, 1 - beta * (better - worse)) for better, worse in _preferences(group))


def ipo(group: Group, *, beta: float) -> float:
    return _mean((better - worse - 1 / (2 * beta)) ** 2 for better, worse in _preferences(group))


def cpl(group: Group, *, alpha: float, bias: float) -> float:
    terms = []
    for better, worse in _preferences(group):
        won, lost = math.exp(alpha * better), math.exp(bias * alpha * worse)
        terms.append(-math.log(won / (won + lost)))
    return _mean(terms)


def copg(group: Group, *, beta: float) -> float:
    return _mean(0.5 * ((r - q) - beta * (s - t)) ** 2 for i, (s, r) in enumerate(group) for t, q in group[:i])


def a_star_po(group: Group, *, beta: float) -> float:
    value = beta * math.log(_mean(math.exp(r / beta) for _, r in group))
    return _mean((beta * s - (r - value)) ** 2 for s, r in group)


def info_nca(group: Group, *, alpha: float, beta: float) -> float:
    wanted, found = [math.exp(r / alpha) for _, r in group], [math.exp(beta * s) for s, _ in group]
    return -sum(w / sum(wanted) * math.log(f / sum(found)) for w, f in zip(wanted, found, strict=True))


def plackett_luce(group: Group, *, beta: float) -> float:
    """Each is drawn from itself and all that are worth less."""
    weights = [(math.exp(beta * s), r) for s, r in group]
    return _mean(-math.log(w / (w + sum(other for other, q in weights if q < r))) for w, r in weights)


def log_prob_of_ranking(scores: Sequence[float], ranking: Sequence[int]) -> float:
    """Plackett-Luce: each place goes to one of those that are left, in proportion to exp(score)."""
    weights = [math.exp(scores[i]) for i in ranking]
    return sum(math.log(weight / sum(weights[k:])) for k, weight in enumerate(weights))


def ndcg(rewards: Sequence[float], ranking: Sequence[int]) -> float:
    """Normalised discounted cumulative gain, with the rewards above the lowest as gains; 0 where all are equal."""

    def dcg(order: Sequence[int]) -> float:
        return sum((rewards[i] - min(rewards)) / math.log2(place + 1) for place, i in enumerate(order, start=1))

    best = dcg(sorted(range(len(rewards)), key=lambda i: -rewards[i]))
    return dcg(ranking) / best if best else 0.0


def _split(group: Group) -> tuple[list[float], list[float]]:
    """Scores of the variants nearer to the best reward than to the worst, and of the others."""
    rewards = [r for _, r in group]
    middle = (max(rewards) + min(rewards)) / 2
    return [s for s, r in group if r > middle], [s for s, r in group if r <= middle]


def grpo(group: Group, *, beta: float, clip: float, baseline: str) -> float:
    assert baseline == "standardised"
    mean = _mean(r for _, r in group)
    std = math.sqrt(_mean((r - mean) ** 2 for _, r in group))
    ratios = [(math.exp(beta * s), (r - mean) / std) for s, r in group]
    return -_mean(min(rho * a, min(max(rho, 1 - clip), 1 + clip) * a) for rho, a in ratios)


def disco(group: Group, *, tau: float) -> float:
    better, worse = _split(group)
    return -_mean(s - tau * math.log(_mean(math.exp(t / tau) for t in worse)) for s in better)


def info_nce(group: Group, *, tau: float) -> float:
    better, _ = _split(group)
    total = sum(math.exp(s / tau) for s, _ in group)
    return _mean(-math.log(math.exp(s / tau) / total) for s in better)
