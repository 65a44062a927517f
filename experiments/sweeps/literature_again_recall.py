"""What came out best of `literature_recall`, with seeds that chose nothing; and the default without its budget term.

    make literature

The budget term (`hyper.budget_weight`) is in no paper's row: it was taken away when a LensNet on tracking was found to
be worse after a hundred steps than before the first, and so has seeds here that did not find that.
"""

from typing import Any

from experiments.sweeps import literature_recall
from lensjax.runs.sweep import Sweep

NO_BUDGET: dict[str, Any] = {"hyper.budget_weight": 0.0}

SWEEP = Sweep(
    preset="recall",
    changes=dict(literature_recall.SWEEP.changes),
    seeds=tuple(range(10, 20)),
    together=({"context.proposed_rollouts": 3}, NO_BUDGET),
)
