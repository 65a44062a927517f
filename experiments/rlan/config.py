"""Configuration of a run on grids."""

from dataclasses import field, replace
from typing import Annotated, Literal

from experiments.rlan.arc import ArcConfig
from experiments.rlan.model import GridConfig
from experiments.rlan.rules import MOVES, OBJECTS, Family, RulesConfig
from lensjax._settings import (
    BatchCount,
    BatchSize,
    Bound,
    NonNegative,
    Positive,
    PositiveInt,
    Repeats,
    require,
    settings,
)
from lensjax.models import hyperlora
from lensjax.models.hyperlora import HyperLoRAConfig
from lensjax.runs.engine.stopping import StoppingConfig
from lensjax.runs.store.sinks import LoggingConfig
from lensjax.training.optim.optimizer import OptimizerConfig


@settings()
class RlanConfig:
    """One run. Every field is a flag of `python -m experiments.rlan.train`."""

    output_dir: str = "runs/rlan/default"
    seed: Annotated[int, Bound(0, 2**31, high_excluded=True)] = 0
    steps: PositiveInt = 1000
    batch_size: BatchSize = 16
    """Tasks in a batch [B]."""
    learning_rate: Positive = 2e-3
    weight_decay: NonNegative = 0.0
    shard_parameters: bool = False
    """Split parameters and optimizer state over the devices as well as the batch (FSDP)."""
    logging_steps: PositiveInt = 50
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    eval_steps: PositiveInt = 250
    eval_batches: BatchCount = 32
    """Batches of held-out rules that are measured; of ARC all tasks are."""
    save_steps: PositiveInt = 500
    tasks: Literal["rules", "arc"] = "rules"
    """What is learned: procedural rules, or ARC-1, which needs the extra `arc`."""
    equivariance: Literal["deltas", "outputs"] = "deltas"
    """What the equivariance loss compares: the deltas of the task and of the turned one, which is right for rules that
    commute with turns and mirrors, or the answers, turned back, which is right for all and costs an answer a view."""
    equivariance_views: Annotated[int, Bound(1, 7)] = 4
    """Dihedral elements, the first ones beside the identity, that the equivariance loss turns a task by."""
    vote_permutations: Repeats = 4
    """Colour permutations k of the 8 k views that vote on a test task, the identity among them."""
    vote_batches: BatchCount = 16
    """Batches of held-out rules that are voted on; of ARC all tasks are."""
    best_step: bool = False
    """Answer with the solver's surest step instead of its last one; training always takes the last."""
    grid: GridConfig = field(default_factory=GridConfig)
    hyperlora: HyperLoRAConfig = hyperlora.PRESETS["rlan_stable_safe"]
    rules: RulesConfig = field(default_factory=RulesConfig)
    arc: ArcConfig = field(default_factory=ArcConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)

    def _check(self) -> None:
        require(bool(self.output_dir), "output_dir must name a folder, got an empty string")
        require(
            self.steps > self.optimizer.warmup_steps,
            f"steps must be above optimizer.warmup_steps {self.optimizer.warmup_steps}, got {self.steps}",
        )
        require(
            self.optimizer.name == "adamw",
            f"optimizer.name must be adamw, since the grid model has no transformer, got {self.optimizer.name!r}",
        )
        require(
            self.task_set.pairs >= 2 or self.hyperlora.loo_weight == 0,
            f"{self.tasks}.pairs must be at least 2 to leave one example out, got {self.task_set.pairs}",
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
        """Shapes of a training task by the name of the array."""
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
"""Configurations by the name that a command line starts with."""
