"""Losses of lists of supervised entries, one entry at a time, and moving averages."""

import math
from collections.abc import Sequence


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def softened(difference: float, label_smoothing: float) -> float:
    """Cross-entropy of a preference that is the wrong way round with some probability."""
    right = sigmoid(difference)
    if label_smoothing == 0 or min(right, 1 - right) < 1e-300:
        return (1 - label_smoothing) * softplus(-difference) + label_smoothing * softplus(difference)
    return -(1 - label_smoothing) * math.log(right) - label_smoothing * math.log(1 - right)


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
    label_smoothing: float = 0.0,
    gap_margin: float = 0.0,
) -> float:
    strength, scale = math.tanh(abs(gap)), max(1.0, abs(gap)) / temperature
    spans = [1.0] * len(targets) if weights is None else weights
    costs = [collapse_weight if t < 0 else 1.0 for t in targets]
    weights = [a * c for a, c in zip(spans, costs, strict=True)]
    if not targets or sum(weights) == 0:
        return 0.0
    if granularity == "pair":
        margin = sum(c * t * s for c, t, s in zip(weights, targets, scores, strict=True)) / sum(weights)
        return strength * softened(margin * scale - gap_margin * abs(gap), label_smoothing)

    def entry(target: float, score: float) -> float:
        if form == "squared":
            return (score - target) ** 2
        return softened(target * score * scale - gap_margin * abs(gap), label_smoothing)

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


# What a teacher says of nodes.


def listwise_distillation(scores: Sequence[float], targets: Sequence[float], *, temperature: float) -> float:
    worth = [max(t, 0.0) for t in targets]
    if sum(worth) == 0:
        return 0.0
    shares = [w / sum(worth) for w in worth]
    weights = [math.exp(s / temperature) for s in scores]
    return sum(p * math.log(p * sum(weights) / w) for p, w in zip(shares, weights, strict=True) if p > 0)


def attribution_loss(scores: Sequence[float], attributions: Sequence[float], weights: Sequence[float]) -> float:
    paid = sum(w * (sigmoid(a) - 0.5) * s for w, a, s in zip(weights, attributions, scores, strict=True))
    return -paid / sum(weights) if sum(weights) else 0.0


# Moving averages.


def ema_mean_var(batches: Sequence[Sequence[float]], betas: Sequence[float]) -> tuple[float, float]:
    """Debiased moments: batch i has weight (1 - beta_i) * the product of all later betas, normalised to sum 1."""
    weights = [(1 - beta) * math.prod(betas[i + 1 :]) for i, beta in enumerate(betas)]
    first = [sum(batch) / len(batch) for batch in batches]
    second = [sum(x * x for x in batch) / len(batch) for batch in batches]

    def average(values: Sequence[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    return average(first), average(second) - average(first) ** 2
