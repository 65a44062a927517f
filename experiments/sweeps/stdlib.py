"""What each knob of the recipe does on the standard library of this Python.

    make ablate

The default is the demo preset, trained by preferences alone, with three times the learning rate.
"""

from experiments.sweeps.recall import KNOBS, TOGETHER
from lensjax.runs.sweep import Sweep

SWEEP = Sweep(
    preset="demo",
    changes={
        "steps": 100,
        "eval_batches": 32,
        "distill.steps": 0,
        "hyper.learning_rate": 3e-3,
    },
    one_at_a_time=KNOBS,
    together=TOGETHER,
)
