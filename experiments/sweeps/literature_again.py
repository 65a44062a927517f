"""What came out best of `literature_recall`, beside its default once more, with seeds that chose nothing.

    python -m experiments.studies.ablate literature_again --base-run runs/literature/recall-base \
        --output-dir runs/literature/again
"""

from experiments.sweeps import literature_recall
from lensjax.runs.sweep import Sweep

SWEEP = Sweep(
    preset="recall",
    changes=dict(literature_recall.SWEEP.changes),
    seeds=tuple(range(10, 20)),
    together=({"context.proposed_rollouts": 3},),
)
