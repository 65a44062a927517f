"""Why it is slow to learn without the answer in hand, and what helps: recall with a query of 2 tokens.

    python -m experiments.train recall --steps 0 --output-dir runs/query/base
    python -m experiments.studies.ablate query --base-run runs/query/base --output-dir runs/query/sweep

The default is the recall preset with 200 steps on half of its batch and twice its learning rate. Without pointer,
blocks and local edits LensNet and its rollouts are what they were when it saw the scored tokens.
"""

from lensjax.runs.sweep import Sweep

PLAIN = {"lens.blocks": False, "lens.pointer": False}

SWEEP = Sweep(
    preset="recall",
    changes={"steps": 200, "batch_size": 16, "hyper.learning_rate": 2e-3, "focus.cooldown": 1},
    seeds=(0, 1, 2),
    together=(
        {"lens.pointer": False},
        {"lens.blocks": False},
        PLAIN,
        {"context.local_edits": 0},
        {**PLAIN, "context.local_edits": 0},
        {"hyper.temperature": 0.5, "hyper.temperature_end": 0.5},
    ),
)
