"""Why it is slow to learn without the answer in hand, and what helps: recall with a query of 1, 2 and 4 tokens.

    python experiments/train.py recall --steps 0 --output-dir runs/query-base
    python experiments/ablate.py query --base-run runs/query-base --output-dir runs/query

The first setting is the recall preset with 200 steps on half of its batch and 2 tokens of query.
"""

from typing import Any

from lensjax.sweep import Sweep

BLOCK = 8
PLAIN = {"lens.blocks": False, "lens.pointer": False}
BEFORE = {**PLAIN, "context.local_edits": 0}
"""LensNet and rollouts as they were when it saw the scored tokens."""
POLICIES: tuple[dict[str, Any], ...] = ({}, {"lens.pointer": False}, {"lens.blocks": False}, PLAIN, BEFORE)
TRAINING: tuple[dict[str, Any], ...] = (
    {"context.local_edits": 0},
    {**PLAIN, "steps": 600},
    {"context.rollouts": 12},
    {"lens.heads": 1},
    {"hyper.temperature": 0.5, "hyper.temperature_end": 0.5},
)


def asking(query: int) -> dict[str, Any]:
    """So many tokens of the repeated block stand before the cursor, and the rest of it behind."""
    return {"data.query": query, "context.recent_tokens": query, "context.horizon": BLOCK - query}


SWEEP = Sweep(
    preset="recall",
    changes={"steps": 200, "batch_size": 16, "hyper.learning_rate": 2e-3},
    seeds=(0, 1, 2),
    together=(*POLICIES, *TRAINING, *(asking(query) | change for query in (1, 4) for change in POLICIES)),
)
