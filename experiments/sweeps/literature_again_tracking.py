"""What came out best of `literature_tracking`, with seeds that chose nothing and steps enough to learn something.

    python -m experiments.studies.ablate literature_again_tracking --base-run runs/literature/tracking-base \
        --output-dir runs/literature/again-tracking

After the hundred steps of `literature_tracking` the default is worse than the LensNet that it started from; after three
times as many, with a third of the learning rate, it is not.
"""

from experiments.sweeps import literature_tracking
from experiments.sweeps.literature_recall import SPANS
from lensjax.runs.sweep import Sweep

SWEEP = Sweep(
    preset="tracking",
    changes={**literature_tracking.SWEEP.changes, "steps": 300, "hyper.learning_rate": 1e-3},
    seeds=tuple(range(10, 15)),
    together=(
        {"context.own_rollouts": 4},
        {"context.own_rollouts": 4, "objective.pair_weights": "importance"},
        SPANS | {"objective.mask": "informative"},
    ),
)
