"""Configuration of a run that learns to think."""

from dataclasses import field
from typing import Annotated, Literal

from experiments.quiet_star.model import ModelConfig
from experiments.quiet_star.tasks import TaskConfig, task_of
from lensjax._settings import (
    BatchCount,
    Bound,
    Count,
    Decay,
    NonNegative,
    Positive,
    PositiveInt,
    Share,
    Variants,
    Width,
    require,
    settings,
)
from lensjax.evaluation.faithfulness import FaithfulnessConfig
from lensjax.runs.engine.stopping import StoppingConfig
from lensjax.runs.store.sinks import LoggingConfig
from lensjax.training.optim.optimizer import OptimizerConfig


@settings("bake")
class BakeConfig:
    """Supervised training on traces, before any reward."""

    steps: PositiveInt = 1500
    learning_rate: Positive = 2e-3


@settings("rl")
class RLConfig:
    """REINFORCE on the model's own thoughts; an episode is one update on the thoughts of a batch of prompts."""

    episodes: Count = 1500
    """0 measures the baked model alone."""
    learning_rate: Positive = 3e-4
    warmup_episodes: Count = 500
    thoughts: Variants = 4
    """Thoughts of a prompt, side by side [n]."""
    reward: Literal["log_prob", "accuracy"] = "log_prob"
    """log p(answer | thought) - log p(answer | none), or whether it is right minus whether it was without."""
    shuffle_rewards: bool = False
    """A control: every thought gets the reward of a random one of the batch."""
    # At 1, the highest difficulty there is, no prompt would ever get a thought.
    threshold: Decay = 0.0
    """Prompts whose difficulty, in [0, 1], is above it get thoughts; the others are answered without."""
    whiten: bool = True
    """Whether the advantages of a batch are brought to mean 0 and standard deviation 1."""
    discount: Share = 0.99
    """gamma, from each thought token to the next."""
    trace_decay: Share = 0.95
    """lambda of the generalised advantages."""
    value_weight: NonNegative = 0.5
    value_hidden: Width = 256
    """Width of the value network's two hidden layers."""
    entropy_weight: NonNegative = 0.01
    entropy_decay: Share = 0.9995
    """Factor of the entropy's weight from each episode to the next, down to `entropy_floor`."""
    entropy_floor: NonNegative = 0.001
    kl_weight: NonNegative = 0.1
    """Weight of the KL divergence from the baked model, of which a frozen copy is kept."""

    def _check(self) -> None:
        require(
            self.warmup_episodes < self.episodes or self.episodes == 0,
            f"rl.warmup_episodes must be below rl.episodes {self.episodes}, got {self.warmup_episodes}",
        )


@settings()
class QuietStarConfig:
    """One run. Every field is a flag of `python -m experiments.quiet_star.train`."""

    output_dir: str = "runs/quiet_star/default"
    seed: Annotated[int, Bound(0, 2**31, high_excluded=True)] = 0
    batch_size: Annotated[int, Bound(2, 2**16)] = 64
    """Prompts in a batch [B], which exchange their thoughts."""
    start_from: str | None = None
    """Run folder whose baked model this run starts from, instead of baking one."""
    shard_parameters: bool = False
    """Split parameters and optimizer state over the devices as well as the batch (FSDP)."""
    logging_steps: PositiveInt = 20
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    eval_steps: PositiveInt = 100
    """As many as stopping averages rewards over: evaluations share no episode, and patience has time to run out."""
    eval_batches: BatchCount = 16
    save_steps: PositiveInt = 500
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    bake: BakeConfig = field(default_factory=BakeConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    faithfulness: FaithfulnessConfig = field(default_factory=FaithfulnessConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of both phases; its `warmup_steps` are the baking's."""
    stopping: StoppingConfig = field(default_factory=lambda: StoppingConfig(patience=10, min_improvement=1e-3))

    def _check(self) -> None:
        require(bool(self.output_dir), "output_dir must name a folder, got an empty string")
        require(
            self.bake.steps > self.optimizer.warmup_steps,
            f"bake.steps must be above optimizer.warmup_steps {self.optimizer.warmup_steps}, got {self.bake.steps}",
        )
        require(
            self.start_from is None or self.rl.episodes > 0,
            f"rl.episodes is 0 and start_from is {self.start_from!r}: there is nothing to do; raise the "
            "first or drop the second",
        )
        phases = {"rl.episodes": self.rl.episodes}
        if self.start_from is None:
            phases |= {"bake.steps": self.bake.steps}
        self.stopping.require_reachable(phases, eval_steps=self.eval_steps)

    @property
    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a question by the name of the array."""
        task = task_of(self.task)
        return {"prompt": (task.prompt_length,), "answer": (), "trace": (task.thought_length,), "conclusion": ()}
