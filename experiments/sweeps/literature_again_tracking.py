"""What came out best of `literature_tracking`, with seeds that chose nothing and steps enough to learn something.

    make literature

After the hundred steps of `literature_tracking` the default is worse than the LensNet that it started from. Here it has
three times as many, and a third of the learning rate; `literature_again_recall` says what the last setting is for.
"""

from experiments.sweeps import literature_tracking
from experiments.sweeps.literature_again_recall import NO_BUDGET
from experiments.sweeps.literature_recall import SPANS
from lensjax.runs.sweep import Sweep

SWEEP = Sweep(
    preset="tracking",
    changes={**literature_tracking.SWEEP.changes, "steps": 300, "hyper.learning_rate": 1e-3},
    seeds=tuple(range(10, 15)),
    together=(
        {"context.own_rollouts": 4, "objective.pair_weights": "importance"},
        SPANS | {"objective.mask": "informative"},
        NO_BUDGET,
    ),
)
