"""The parts of a policy gradient, sample by sample: sets by enumeration, curvature by matrices."""

import itertools
import math
from collections.abc import Collection, Sequence

import numpy as np

from lensjax.context.geometry import Geometry
from tests.reference.cuts import Entry, cut_of


def set_advantages(rewards: Sequence[float], distances: Sequence[Sequence[float]], *, size: int) -> list[float]:
    """Mean score of the sets that hold a sample, minus that of all sets."""
    lowest = min(rewards)

    def score(chosen: Collection[int]) -> float:
        reward = np.mean([rewards[i] - lowest for i in chosen])
        return float(reward * np.mean([distances[i][j] for i, j in itertools.combinations(chosen, 2)]))

    scores = {chosen: score(chosen) for chosen in itertools.combinations(range(len(rewards)), size)}
    if len(scores) < 2:
        return [0.0] * len(rewards)
    every = np.mean(list(scores.values()))
    return [float(np.mean([f for s, f in scores.items() if v in s]) - every) for v in range(len(rewards))]


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def curvature(probabilities: Sequence[float], chosen: int) -> tuple[float, float]:
    """Square norm of the score function of a softmax policy, and its product with the Fisher information."""
    pi = np.asarray(probabilities)
    score = np.eye(len(pi))[chosen] - pi
    return float(score @ score), float(score @ (np.diag(pi) - np.outer(pi, pi)) @ score)


def is_trusted(
    advantage: float, norm: float, bend: float, *, step: float, low: float, high: float, shift: float
) -> bool:
    rise = step * advantage**2 * norm + step**2 * advantage**3 * (norm**2 - bend) / 2
    return low <= rise <= high and step**2 * advantage**2 * bend / 2 <= shift


def entropy(probability: float) -> float:
    return -sum(p * math.log(p) for p in (probability, 1 - probability))


def contrast(doing: Sequence[float], others: Sequence[float], *, threshold: float) -> int:
    """Whether rewards are higher with an action than without it (1), lower (-1), or neither (0)."""
    if not doing or not others:
        return 0
    gap = sum(doing) / len(doing) - sum(others) / len(others)
    return 0 if abs(gap) <= threshold else int(math.copysign(1, gap))


def level_distance(one: Sequence[Entry], other: Sequence[Entry], geometry: Geometry) -> float:
    """Share of the tokens outside sinks and protected tail that two cuts do not show alike."""
    cuts = [cut_of(entries, geometry.history, geometry.block_size) for entries in (one, other)]
    free = [token for token in range(geometry.history) if geometry.head <= token < geometry.tail]
    return sum(cuts[0][token] != cuts[1][token] for token in free) / len(free)
