"""What methods of the literature change, on text that quotes itself; see `literature_recall`.

make literature
"""

from experiments.sweeps.literature_recall import methods
from lensjax.runs.sweep import Sweep

SWEEP = Sweep(
    preset="demo",
    changes={"steps": 100, "batch_size": 8, "distill.steps": 0, "hyper.learning_rate": 3e-3, "eval_batches": 32},
    seeds=(0, 1, 2, 3, 4),
    together=methods(gate_steps=36, own=2),
)
