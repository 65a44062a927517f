"""What each knob of the recipe does on the standard library of this Python.

    make ablate

The default is the demo preset at a quarter of the window (64 of 256 entries), with fewer steps, a shorter protected
tail and three times the learning rate.
"""

from experiments.sweeps.recall import KNOBS, TOGETHER
from lensjax.runs.sweep import Sweep

SWEEP = Sweep(
    preset="demo",
    changes={
        "steps": 100,
        "eval_batches": 32,
        "context.horizon": 32,
        "hyper.context_start": 0.25,
        "hyper.context_end": 0.25,
        "hyper.learning_rate": 3e-3,
    },
    one_at_a_time={**KNOBS, "hyper.high_lod_share": (0.3,)},
    together=TOGETHER,
)
