"""Configuration of a run: a recipe, its models and data, where it goes and how often it looks."""

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

from lensjax._settings import BatchCount, BatchSize, Bound, PositiveInt, require, settings
from lensjax.models import HyperLoRAModel, LensModel, Models, build_models
from lensjax.models.base_lm import BaseConfig
from lensjax.models.build import choose_attention
from lensjax.models.gistnet import GistConfig
from lensjax.models.lensnet import LensConfig
from lensjax.models.nn.attend import Choice, Setting
from lensjax.runs.data.task import DataConfig
from lensjax.runs.engine.stopping import StoppingConfig
from lensjax.runs.store.sinks import LoggingConfig
from lensjax.session import SessionConfig
from lensjax.training.recipe import Recipe
from lensjax.training.steps.adaptation import AdaptationConfig, build_hypernet
from lensjax.training.steps.gists import GistTrainingConfig, gist_capacity
from lensjax.training.steps.online import OnlineConfig
from lensjax.training.steps.pretrain import PretrainConfig

STEPS = {
    "pretrain": "pretrain.steps",
    "gists": "gists.steps",
    "distill": "distill.steps",
    "lens": "steps",
    "online": "online.steps",
}
"""The setting of the number of steps of each phase."""
PHASES = tuple(STEPS)
"""What a run does one after the other; each has its checkpoints and its rows in the log."""


@settings("checkpoint")
class CheckpointConfig:
    """A trained language model to take as the base model. `base` is read from it, and it is not pretrained.

    Example:
      >>> from lensjax.runs.config import CheckpointConfig
      >>> CheckpointConfig(sha256="0" * 64)
      Traceback (most recent call last):
      ValueError: checkpoint.sha256 is that of checkpoint.path, which is missing: name it, or drop checkpoint.sha256
    """

    path: str | None = None
    """A Hugging Face folder or a GGUF file. A run reads it where it lies and holds no copy."""
    sha256: str | None = None
    """Of its weights; filled in when a run starts. Other weights are then refused."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of its parameters."""

    def _check(self) -> None:
        require(
            self.path is not None or self.sha256 is None,
            "checkpoint.sha256 is that of checkpoint.path, which is missing: name it, or drop checkpoint.sha256",
        )


@settings()
class Config(Recipe):
    """One run. Every field is a flag of `python -m experiments.train`.

    Example:
      >>> import lensjax as lx
      >>> config = lx.Config(steps=100, hyper=lx.Hyperparameters(context_end=0.5))
      >>> config.context.history, config.budget
      (224, 112)
    """

    output_dir: str = "runs/default"
    seed: Annotated[int, Bound(0, 2**31, high_excluded=True)] = 0
    batch_size: BatchSize = 16
    """Sequences in a batch [B]."""
    base_run: str | None = None
    """Run folder whose base model and GistNet are taken instead of pretraining."""
    start_from: str | None = None
    """Run folder whose LensNet this run starts from, its base model and GistNet with it; instead of `base_run`."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the models; parameters, softmax and losses stay in float32."""
    attention: Setting = "auto"
    """What computes attention: XLA, or a fused kernel in bfloat16, cuDNN's on NVIDIA and splash on a TPU. `auto` takes
    the one that the device has, where it serves; a run says which at its start."""
    shard_parameters: bool = False
    """Split parameters and optimizer state over the devices as well as the batch (FSDP): less memory, more traffic."""
    logging_steps: PositiveInt = 10
    eval_steps: PositiveInt = 100
    eval_batches: BatchCount = 8
    save_steps: PositiveInt = 100
    base: BaseConfig = field(default_factory=BaseConfig)
    gist: GistConfig = field(default_factory=GistConfig)
    lens: LensConfig = field(default_factory=LensConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    gists: GistTrainingConfig = field(default_factory=GistTrainingConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)

    def _check(self) -> None:
        super()._check()
        require(bool(self.output_dir), "output_dir must name a folder, got an empty string")
        counts = {
            "steps": self.steps,
            "pretrain.steps": self.pretrain.steps,
            "gists.steps": self.gists.steps,
            "distill.steps": self.distill.steps,
            "online.steps": self.online.steps,
        }
        for name, steps in counts.items():
            require(
                steps == 0 or steps > self.optimizer.warmup_steps,
                f"{name} must be above optimizer.warmup_steps {self.optimizer.warmup_steps}, got {steps}",
            )
        if self.gists.steps:
            require(
                self.trains_lens,
                f"gists.steps is {self.gists.steps} and LensNet is not trained after it: raise steps, distill.steps or "
                "online.steps",
            )
            require(
                self.optimizer.name != "muon" or self.gist.layers > 0 or self.gist.pooling == "cls",
                "optimizer.name muon is for the matrices of a transformer, and the GistNet that gists.steps trains has "
                "none: raise gist.layers, or set optimizer.name to adamw",
            )
            gist_capacity(self.recipe)
        weights = self.checkpoint.path
        sources = {"base_run": self.base_run, "start_from": self.start_from, "checkpoint.path": weights}
        for name, source in sources.items():
            require(
                self.trains_lens or source is None,
                f"steps is 0 and {name} is {source!r}: there is nothing to do; raise steps or drop {name}",
            )
        require(
            self.base_run is None or self.start_from is None,
            f"base_run {self.base_run!r} and start_from {self.start_from!r} both give a base model: name one of them",
        )
        require(
            self.base_run is None or weights is None,
            f"base_run {self.base_run!r} and checkpoint.path {weights!r} both give a base model: name one of them (or, "
            "for the GistNet and the LensNet of a run on the same weights, start_from)",
        )
        require(
            weights is None or self.checkpoint.dtype == "float32" or "base" not in self.trainable,
            "checkpoint.dtype must be float32 where trainable names base, whose updates are too small for "
            f"{self.checkpoint.dtype}",
        )
        self.stopping.require_reachable(
            {name: steps for name, steps in counts.items() if self.pretrains or name != "pretrain.steps"},
            eval_steps=self.eval_steps,
        )
        require(
            self.base.dim % self.gist.heads == 0,
            f"base.dim must be a multiple of gist.heads {self.gist.heads}, got {self.base.dim}",
        )
        require(
            self.lens.map or self.context.omit,
            "lens.map must be on without context.omit, where every gist is an entry of the context",
        )
        require(
            not self.data.is_text or self.data.tokenizer is not None or self.base.vocab_size >= 256,
            f"base.vocab_size must be at least 256 for text, which is read as bytes, got {self.base.vocab_size}",
        )

    @property
    def trains_lens(self) -> bool:
        """Whether there is more to do than to pretrain."""
        return self.steps + self.distill.steps + self.online.steps > 0

    @property
    def pretrains(self) -> bool:
        """Whether the base model is trained from scratch, and not taken."""
        return self.base_run is None and self.start_from is None and self.checkpoint.path is None

    @property
    def recipe(self) -> Recipe:
        """What is compiled of this run: its recipe alone."""
        return Recipe(**{item.name: getattr(self, item.name) for item in dataclasses.fields(Recipe)})

    @property
    def session(self) -> SessionConfig:
        """The session whose decisions are those of training."""
        return SessionConfig(self.geometry, budget=self.budget, interval=self.context.horizon, focus=self.focus)

    @property
    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one example of a training batch by the name of the array."""
        return {"tokens": (self.context.window,)}

    def build_models(self) -> Models:
        """The models of the run; call it once, outside `jax.jit`."""
        shape = {"block_size": self.context.block_size, "max_lod": self.context.max_lod}
        return build_models(self.base, self.gist, self.lens, **shape, dtype=self.dtype, attention=self.attention)

    def choose_attention(self) -> Choice:
        """What computes attention in the models, and why."""
        return choose_attention(self.base, self.lens, dtype=self.dtype, attention=self.attention)

    def build_hypernet(self, models: Models) -> HyperLoRAModel | None:
        """What adapts LensNet to a document, where it is trained."""
        if "hypernet" not in self.trainable:
            return None
        if not isinstance(models.lens, LensModel):
            raise ValueError(f"the hypernetwork adapts the matrices of a LensModel, got {type(models.lens).__name__}")
        return build_hypernet(models.lens, self.adaptation)
