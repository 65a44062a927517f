"""Configuration of a grid run: frozen sections, as in `lensjax.runs.config`, which also reads and writes them."""

from dataclasses import dataclass, field, replace
from typing import Literal

from experiments.rlan.arc import ArcConfig
from experiments.rlan.model import GridConfig
from experiments.rlan.rules import MOVES, OBJECTS, Family, RulesConfig
from lensjax._settings import require, require_choice, require_positive
from lensjax.models import hyperlora
from lensjax.models.hyperlora import HyperLoRAConfig
from lensjax.runs.config import OptimizerConfig, StoppingConfig


@dataclass(frozen=True)
class RlanConfig:
    """One run. Every field is a flag of `experiments/rlan/train.py`."""

    output_dir: str = "runs/rlan/default"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 16
    """Tasks in a batch [B]."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    shard_parameters: bool = False
    """Split parameters and optimizer state over the devices as well as the batch (FSDP)."""
    logging_steps: int = 50
    eval_steps: int = 250
    eval_batches: int = 32
    """Batches of held-out rules that are measured; of ARC all tasks are."""
    save_steps: int = 500
    tasks: Literal["rules", "arc"] = "rules"
    """What is learned: procedural rules, or ARC-1, which needs the extra `arc`."""
    equivariance: Literal["deltas", "outputs"] = "deltas"
    """What the equivariance loss compares: the deltas of the task and of the turned one, which is right for rules that
    commute with turns and mirrors, or the answers, turned back, which is right for all and costs an answer a view."""
    equivariance_views: int = 4
    """Dihedral elements, the first ones beside the identity, that the equivariance loss turns a task by."""
    vote_permutations: int = 4
    """Colour permutations k of the 8 k views that vote on a test task, the identity among them."""
    vote_batches: int = 16
    """Batches of held-out rules that are voted on; of ARC all tasks are."""
    best_step: bool = False
    """Answer with the solver's surest step instead of its last one; training always takes the last."""
    grid: GridConfig = field(default_factory=GridConfig)
    hyperlora: HyperLoRAConfig = hyperlora.PRESETS["rlan_stable_safe"]
    rules: RulesConfig = field(default_factory=RulesConfig)
    arc: ArcConfig = field(default_factory=ArcConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)

    def __post_init__(self) -> None:
        require_choice(self, "tasks", "equivariance")
        require_positive(self, "steps", "batch_size", "logging_steps", "eval_steps", "eval_batches", "save_steps")
        require_positive(self, "vote_permutations", "vote_batches")
        require(0 <= self.seed < 2**31, f"seed must be in [0, 2**31), got {self.seed}")
        require(self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}")
        require(self.weight_decay >= 0, f"weight_decay must be at least 0, got {self.weight_decay}")
        require(bool(self.output_dir), "output_dir must name a folder, got an empty string")
        require(1 <= self.equivariance_views <= 7, f"equivariance_views must be 1 to 7, got {self.equivariance_views}")
        require(
            self.steps > self.optimizer.warmup_steps,
            f"steps must be above optimizer.warmup_steps {self.optimizer.warmup_steps}, got {self.steps}",
        )
        require(self.optimizer.name == "adamw", "optimizer.name must be adamw: the grid model has no transformer")
        require(
            self.task_set.pairs >= 2 or self.hyperlora.loo_weight == 0,
            f"to leave one example out, {self.tasks}.pairs must be 2 or more, got {self.task_set.pairs}",
        )

    @property
    def task_set(self) -> RulesConfig | ArcConfig:
        """The section of the tasks that are learned."""
        return self.arc if self.tasks == "arc" else self.rules

    @property
    def balanced_families(self) -> tuple[Family, ...]:
        """Families of rules that are equally frequent, each of which is measured alone."""
        return self.rules.families if self.tasks == "rules" and self.rules.balanced else ()

    @property
    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a training step is given of each task, as of `lensjax.runs.engine.loop.Settings`."""
        tasks = self.task_set
        grids = (2, tasks.size, tasks.size)
        return {"support": (tasks.pairs, *grids), "query": (tasks.queries, *grids)}


PRESETS = {name: RlanConfig(hyperlora=section) for name, section in hyperlora.PRESETS.items()} | {
    "objects": RlanConfig(
        output_dir="runs/rlan/objects",
        steps=1500,
        eval_batches=16,
        rules=RulesConfig(families=OBJECTS, size=6, balanced=True),
    ),
    # Offsets and turns do not commute with turns: equal deltas would be wrong.
    "moves": RlanConfig(
        output_dir="runs/rlan/moves",
        steps=500,
        eval_batches=16,
        rules=RulesConfig(families=MOVES, size=6, balanced=True),
        hyperlora=replace(hyperlora.PRESETS["rlan_stable_safe"], equivariance_weight=0.0),
    ),
    # Training turns and mirrors whole tasks already, so equivariance has no weight.
    "arc": RlanConfig(
        output_dir="runs/rlan/arc",
        tasks="arc",
        steps=400,
        batch_size=8,
        eval_steps=100,
        save_steps=200,
        hyperlora=replace(hyperlora.PRESETS["rlan_stable_safe"], equivariance_weight=0.0),
    ),
}
"""By the name that a command line starts with."""
