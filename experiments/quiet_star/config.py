"""Configuration of a run that learns to think: frozen sections, as in `lensjax.runs.config`, which reads and writes them."""

import math
from dataclasses import dataclass, field
from typing import Literal

from experiments.quiet_star.model import ModelConfig
from experiments.quiet_star.tasks import TaskConfig, task_of
from lensjax._settings import require, require_choice, require_positive
from lensjax.evaluation.faithfulness import TheatreConfig
from lensjax.runs.config import OptimizerConfig, StoppingConfig


@dataclass(frozen=True)
class BakeConfig:
    """Supervised training on traces, before any reward."""

    steps: int = 1500
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        require_positive(self, "steps")
        _require_finite(self, "bake", "learning_rate", above_zero=True)


@dataclass(frozen=True)
class RLConfig:
    """REINFORCE on the model's own thoughts; an episode is one update on the thoughts of a batch of prompts."""

    episodes: int = 1500
    """0 measures the baked model."""
    learning_rate: float = 3e-4
    warmup_episodes: int = 500
    thoughts: int = 4
    """Thoughts of a prompt, side by side [n]."""
    reward: Literal["log_prob", "accuracy"] = "log_prob"
    """log p(answer | thought) - log p(answer | none), or whether it is right minus whether it was without."""
    shuffle_rewards: bool = False
    """A control: every thought gets the reward of a random one of the batch."""
    threshold: float = 0.0
    """Prompts whose difficulty, in [0, 1], is above it get thoughts; the others are answered without."""
    whiten: bool = True
    """Whether the advantages of a batch are brought to mean 0 and standard deviation 1."""
    discount: float = 0.99
    """gamma, from each thought token to the next."""
    trace_decay: float = 0.95
    """lambda of the generalised advantages."""
    value_weight: float = 0.5
    value_hidden: int = 256
    """Width of the value network's two hidden layers."""
    entropy_weight: float = 0.01
    entropy_decay: float = 0.9995
    """Factor of the entropy's weight from each episode to the next, down to `entropy_floor`."""
    entropy_floor: float = 0.001
    kl_weight: float = 0.1
    """Weight of the KL divergence from the baked model, of which a frozen copy is kept."""

    def __post_init__(self) -> None:
        require(self.episodes >= 0, f"rl.episodes must be 0 (the baked model alone) or more, got {self.episodes}")
        require_positive(self, "thoughts", "value_hidden")
        require_choice(self, "reward")
        require(
            self.warmup_episodes >= 0 and (self.warmup_episodes < self.episodes or self.episodes == 0),
            f"rl.warmup_episodes must be at least 0 and below rl.episodes {self.episodes}, got {self.warmup_episodes}",
        )
        # At 1, the highest difficulty there is, no prompt would ever get a thought.
        require(0 <= self.threshold < 1, f"rl.threshold must be in [0, 1), got {self.threshold}")
        for name in ("discount", "trace_decay", "entropy_decay"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"rl.{name} must be in [0, 1], got {value}")
        _require_finite(self, "rl", "learning_rate", above_zero=True)
        _require_finite(self, "rl", "value_weight", "entropy_weight", "entropy_floor", "kl_weight")


@dataclass(frozen=True)
class QuietStarConfig:
    """One run. Every field is a flag of `experiments/quiet_star/train.py`."""

    output_dir: str = "runs/quiet_star/default"
    seed: int = 0
    batch_size: int = 64
    """Prompts in a batch [B]."""
    init: str | None = None
    """Run folder whose baked model is taken instead of baking one."""
    shard_parameters: bool = False
    """Split parameters and optimizer state over the devices as well as the batch (FSDP)."""
    logging_steps: int = 20
    eval_steps: int = 100
    """As many as stopping averages rewards over: evaluations share no episode, and patience has time to run out."""
    eval_batches: int = 16
    save_steps: int = 500
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    bake: BakeConfig = field(default_factory=BakeConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    theatre: TheatreConfig = field(default_factory=TheatreConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of both phases; its `warmup_steps` are the baking's."""
    stopping: StoppingConfig = field(default_factory=lambda: StoppingConfig(patience=10, min_improvement=1e-3))

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "logging_steps", "eval_steps", "eval_batches", "save_steps")
        require(0 <= self.seed < 2**31, f"seed must be in [0, 2**31), got {self.seed}")
        require(bool(self.output_dir), "output_dir must name a folder, got an empty string")
        require(self.batch_size >= 2, f"batch_size must be 2 or more (thoughts are exchanged), got {self.batch_size}")
        require(
            self.bake.steps > self.optimizer.warmup_steps,
            f"bake.steps must be above optimizer.warmup_steps {self.optimizer.warmup_steps}, got {self.bake.steps}",
        )
        require(
            self.init is None or self.rl.episodes > 0,
            f"init is {self.init!r} and rl.episodes is 0: there is nothing to do; raise rl.episodes or drop init",
        )
        phases = {"rl.episodes": self.rl.episodes} | ({"bake.steps": self.bake.steps} if self.init is None else {})
        self.stopping.require_reachable(phases, eval_steps=self.eval_steps)

    @property
    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a step is given of each question, as of `lensjax.runs.engine.loop.Settings`."""
        task = task_of(self.task)
        return {"prompt": (task.prompt_length,), "answer": (), "trace": (task.thought_length,), "conclusion": ()}


def _require_finite(section: object, prefix: str, *names: str, above_zero: bool = False) -> None:
    for name in names:
        value = getattr(section, name)
        ok = 0 < value < math.inf if above_zero else 0 <= value < math.inf
        require(ok, f"{prefix}.{name} must be finite and {'above' if above_zero else 'at least'} 0, got {value}")
