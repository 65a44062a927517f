"""What methods of the literature change, on recall with a query; docs/results/objectives.md has all three tasks.

    make literature

The default is the recall preset with a third of its steps, half of its batch and three times its learning rate. Scales
and thresholds are those of the papers or of `Hyperparameters`, and none was chosen by what came out. Every setting has
as many passes of the base model: the teacher of the gate reads windows in full, so that its arms take fewer steps.
"""

from typing import Any

from lensjax.runs.sweep import Sweep

Setting = dict[str, Any]
GRPO: Setting = {"objective.name": "grpo", "objective.group_baseline": "leave_one_out", "hyper.beta": 8.0}
SPANS: Setting = {"objective.name": "span_advantages"}
GTPO: Setting = {"objective.name": "gtpo", "objective.group_baseline": "leave_one_out", "hyper.beta": 8.0}


def methods(gate_steps: int, own: int) -> tuple[Setting, ...]:
    """The settings beside the default.

    Args:
      gate_steps: steps of the arms with a teacher.
      own: rollouts that the policy draws, or an adversary proposes.
    """
    return (
        {"hyper.label_smoothing": 0.1},
        {"hyper.gap_margin": 0.5},
        {"objective.stages": "easy_first", "objective.anchor": "stage", "hyper.kl_weight": 0.1},
        {"hyper.attribution_weight": 0.5},
        {"objective.gate": "teacher", "steps": gate_steps},
        {"objective.pair_weights": "importance"},
        {"context.own_rollouts": own},
        {"context.own_rollouts": own, "objective.pair_weights": "importance"},
        {"context.proposed_rollouts": own},
        {"curriculum.name": "self_play"},
        GRPO,
        GRPO | {"objective.group_baseline": "optimal"},
        GRPO | {"objective.group_baseline": "blended"},
        GRPO | {"objective.group_baseline": "sets"},
        GRPO | {"objective.group_weights": "importance"},
        GRPO | {"objective.mask": "trust"},
        SPANS,
        SPANS | {"objective.group_reward": "contrastive"},
        SPANS | {"objective.mask": "informative"},
        SPANS | {"objective.mask": "trust"},
        GTPO,
    )


SWEEP = Sweep(
    preset="recall",
    changes={"steps": 100, "batch_size": 16, "hyper.learning_rate": 3e-3},
    seeds=(0, 1, 2, 3, 4),
    together=methods(gate_steps=56, own=3),
)
