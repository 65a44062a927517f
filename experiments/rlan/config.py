"""Configuration of a grid run: frozen sections, as in `lensjax.config`, which also reads and writes them."""

from dataclasses import dataclass, field

from experiments.rlan.model import GridConfig
from experiments.rlan.rules import RulesConfig
from lensjax.config import OptimizerConfig, StoppingConfig
from lensjax.hyperlora import PRESETS, HyperLoRAConfig
from lensjax.sections import require, require_positive


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
    save_steps: int = 500
    equivariance_views: int = 4
    """Dihedral elements, the first ones beside the identity, whose deltas the equivariance loss compares."""
    vote_permutations: int = 4
    """Colour permutations k of the 8 k views that vote on a test task, the identity among them."""
    vote_batches: int = 16
    """Batches of test tasks that are voted on."""
    best_step: bool = False
    """Answer with the solver's surest step instead of its last one; training always takes the last."""
    grid: GridConfig = field(default_factory=GridConfig)
    hyperlora: HyperLoRAConfig = PRESETS["rlan_stable_safe"]
    rules: RulesConfig = field(default_factory=RulesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)

    def __post_init__(self) -> None:
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
            self.rules.pairs >= 2 or self.hyperlora.loo_weight == 0,
            f"to leave one example out, rules.pairs must be 2 or more, got {self.rules.pairs}",
        )

    @property
    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a training step is given of each task, as of `lensjax.loop.Settings`."""
        grids = (2, self.rules.size, self.rules.size)
        return {"support": (self.rules.pairs, *grids), "query": (self.rules.queries, *grids)}
