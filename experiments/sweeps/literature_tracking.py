"""What methods of the literature change, on variable tracking with two hops; see `literature_recall`.

make literature
"""

from experiments.sweeps.literature_recall import methods
from lensjax.runs.sweep import Sweep

SWEEP = Sweep(
    preset="tracking",
    changes={"steps": 100, "batch_size": 8, "distill.steps": 0, "hyper.learning_rate": 3e-3, "eval_batches": 16},
    seeds=(0, 1, 2, 3, 4),
    together=methods(gate_steps=42, own=4),
)
