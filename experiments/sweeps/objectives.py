"""Each objective in the place of the preference term, on the task with known answers.

    python -m experiments.studies.ablate objectives --base-run runs/ablations/recall-base --output-dir runs/objectives

The default is that of `recall.py` without its rank loss, which is made of span targets and would help the others along.
Each objective has two scales, since it is not known beforehand how far apart the values of two variants should be.
"""

from lensjax.runs.sweep import Sweep

SCALES = {
    "logistic": (2.0, 8.0),
    "rpo": (2.0, 8.0),
    "hinge": (2.0, 8.0),
    "ipo": (1.0, 4.0),
    "cpl": (2.0, 8.0),
    "copg": (4.0, 16.0),
    "a_star_po": (4.0, 16.0),
    "info_nca": (4.0, 16.0),
    "plackett_luce": (2.0, 8.0),
    "pg_rank": (2.0, 8.0),
    "grpo": (2.0, 8.0),
}
TEMPERATURES = (0.5, 0.1)

SWEEP = Sweep(
    preset="recall",
    changes={"steps": 100, "batch_size": 16, "hyper.learning_rate": 3e-3, "hyper.rank_weight": 0.0},
    together=(
        *({"objective.name": name, "hyper.beta": beta} for name, scales in SCALES.items() for beta in scales),
        *(
            {"objective.name": name, "hyper.temperature": tau, "hyper.temperature_end": tau}
            for name in ("disco", "info_nce")
            for tau in TEMPERATURES
        ),
        {"objective.name": "grpo", "objective.group_baseline": "leave_one_out", "hyper.beta": 8.0},
        {"objective.name": "info_nca", "objective.group": "batch", "hyper.beta": 16.0},
        {"objective.name": "copg", "objective.group": "batch", "hyper.beta": 16.0},
        {"objective.name": "copg", "objective.keep": 3, "hyper.beta": 16.0},
    ),
)
