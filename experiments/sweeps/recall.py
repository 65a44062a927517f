"""What each knob of the recipe does on the task with known answers.

    make ablate

The default is the recall preset with a third of its steps, half of its batch and three times its learning rate: the
task is mostly learned by then, and what helps or hurts can still show.
"""

from lensjax.runs.sweep import Sweep

KNOBS = {
    "hyper.learning_rate": (1e-3, 1e-2),
    "hyper.adv_norm_beta": (0.99,),
    "hyper.budget_weight": (0.0, 1.0),
    "hyper.smooth_weight": (1.0,),
    "hyper.rank_weight": (0.0, 2.0),
    "hyper.margin": (0.0, 0.5),
    "hyper.collapse_weight": (0.5, 2.0),
    "hyper.hard_negative_ratio": (0.0,),
    "hyper.kl_weight": (0.1, 1.0),
    "objective.targets": ("worse_only",),
    "objective.granularity": ("pair",),
    "context.rollouts": (2, 8),
    "context.local_edits": (2,),
}
TOGETHER = (
    {"hyper.temperature": 0.5, "hyper.temperature_end": 0.5},
    {"hyper.temperature": 2.0, "hyper.temperature_end": 2.0},
    {"hyper.temperature": 2.0, "hyper.temperature_end": 0.5},
    {"hyper.smooth_weight": 1.0, "hyper.budget_smooth_beta": 0.5},
    {"hyper.kl_weight": 1.0, "objective.anchor": "ema"},
    {"hyper.kl_weight": 1.0, "objective.anchor": "fixed"},
)

SWEEP = Sweep(
    preset="recall",
    changes={"steps": 100, "batch_size": 16, "hyper.learning_rate": 3e-3},
    one_at_a_time={**KNOBS, "hyper.context_start": (0.4,)},
    together=TOGETHER,
)
