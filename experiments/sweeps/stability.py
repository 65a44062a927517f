"""The stability knobs and the choices of the objective, one at a time around the recall preset.

python experiments/ablate.py stability --base-run runs/recall/base --output-dir runs/ablation
"""

from lensjax.sweep import Sweep

SWEEP = Sweep(
    preset="recall",
    seeds=(0, 1, 2, 3, 4),
    one_at_a_time={
        "hyper.kl_weight": (0.1, 1.0),
        "hyper.adv_norm_beta": (0.5, 0.99),
        "hyper.smooth_weight": (0.1, 1.0),
        "hyper.budget_weight": (0.0, 1.0),
        "hyper.rank_weight": (0.0, 2.0),
        "hyper.margin": (0.0, 0.5),
        "hyper.collapse_weight": (0.5, 2.0),
        "hyper.hard_negative_ratio": (0.0, 0.5),
        "hyper.learning_rate": (3e-4, 3e-3),
        "objective.targets": ("worse_only",),
        "objective.granularity": ("pair",),
        "context.rollouts": (2, 8),
    },
    paired={"hyper.temperature": (0.5, 2.0, 2.0), "hyper.temperature_end": (0.5, 2.0, 0.5)},
)
