"""When a phase of training has seen enough: the best held-out score so far, as an `init`/`update` pair.

The state is plain numbers of the host, which JSON gives back equal: a checkpoint holds it beside the arrays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lensjax._settings import NonNegative, PositiveInt, require, settings


@settings("stopping")
class StoppingConfig:
    """When a phase ends before its last step, and which of its parameters are kept."""

    patience: PositiveInt | None = None
    """None trains to the last step and keeps its parameters. A number ends a phase after so many evaluations in a row
    without an improvement of the held-out loss, and gives back the parameters of the best one, however it ended."""
    min_improvement: NonNegative = 0.0
    """An evaluation is an improvement where its loss is lower than the best one by more than this, in nats."""

    def _check(self) -> None:
        require(
            self.patience is not None or self.min_improvement == 0,
            f"stopping.min_improvement is read only with stopping.patience: set it, got {self.min_improvement} alone",
        )

    def require_reachable(self, steps: Mapping[str, int], *, eval_steps: int) -> None:
        """Checks that patience can run out in a run.

        Args:
          steps: of each phase, by the name of the field that says so.
          eval_steps: from each evaluation to the next; a phase's last step is evaluated too.

        Raises:
          ValueError: no phase has enough evaluations: the first one is the best so far, and then patience begins.
        """
        most = max(-(-count // eval_steps) for count in steps.values())
        require(
            self.patience is None or self.patience < most,
            f"stopping.patience {self.patience} cannot run out: with eval_steps {eval_steps} no phase has more than "
            f"{most} evaluations ({', '.join(f'{name} {count}' for name, count in steps.items())}); lower "
            "stopping.patience or eval_steps",
        )


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
