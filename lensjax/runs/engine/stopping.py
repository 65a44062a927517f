"""When a phase of training has seen enough: the best held-out score so far, as an `init`/`update` pair.

The state is plain numbers of the host, which JSON gives back equal: a checkpoint holds it beside the arrays.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Best:
    """The best evaluation so far. Lower scores are better."""

    score: float | None
    """None before the first score that is a number."""
    step: int | None
    """Training steps done at that evaluation."""
    waited: int
    """Evaluations in a row since then, none of which was an improvement."""


def init() -> Best:
    """Before the first evaluation."""
    return Best(score=None, step=None, waited=0)


def update(best: Best, score: float, step: int, *, min_improvement: float) -> Best:
    """Takes in one evaluation.

    Small improvements add up: each score is compared with the best one, not with the one before.

    Args:
      best: the state so far.
      score: of the evaluation; one that is not finite is never the best.
      step: training steps done.
      min_improvement: a score is an improvement where it is lower than the best one by more than this.

    Returns:
      The new state; its `step` is the given one where the score was an improvement.
    """
    if math.isfinite(score) and (best.score is None or best.score - score > min_improvement):
        return Best(score=float(score), step=step, waited=0)
    return replace(best, waited=best.waited + 1)


def is_over(best: Best, *, patience: int | None) -> bool:
    """Whether so many evaluations in a row brought no improvement; never where the patience is None."""
    return patience is not None and best.waited >= patience
