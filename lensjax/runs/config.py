"""Configuration of a run: its sections put together, and JSON both ways."""

import dataclasses
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from lensjax._settings import (
    AdaptationConfig,
    BaseConfig,
    ContextConfig,
    DataConfig,
    FocusConfig,
    GistConfig,
    Hyperparameters,
    LensConfig,
    ObjectiveConfig,
    OnlineConfig,
    OptimizerConfig,
    PretrainConfig,
    StoppingConfig,
    require,
    require_choice,
    require_positive,
)

__all__ = [
    "AdaptationConfig",
    "BaseConfig",
    "Config",
    "ContextConfig",
    "DataConfig",
    "FocusConfig",
    "GistConfig",
    "Hyperparameters",
    "LensConfig",
    "ObjectiveConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "StoppingConfig",
    "from_json",
    "load",
    "load_as",
    "replace",
    "to_json",
]

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Config:
    """One run. Every field is a flag of `experiments/train.py`."""

    output_dir: str = "runs/default"
    seed: int = 0
    steps: int = 1000
    """LensNet training steps on preferences; 0 leaves them out."""
    batch_size: int = 16
    """Sequences in a batch [B]."""
    trainable: tuple[Literal["base", "gist", "lens", "hyper"], ...] = ("lens",)
    """What the main phase trains; `hyper` adapts LensNet to each document."""
    base_run: str | None = None
    """Run folder whose base model and GistNet are taken instead of pretraining."""
    init: str | None = None
    """Run folder whose LensNet this run starts from, its base model and GistNet with it; instead of `base_run`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the models; parameters, softmax and losses stay in float32."""
    shard_parameters: bool = False
    """Split parameters and optimizer state over the devices as well as the batch (FSDP): less memory, more traffic."""
    logging_steps: int = 10
    eval_steps: int = 100
    eval_batches: int = 8
    save_steps: int = 100
    base: BaseConfig = field(default_factory=BaseConfig)
    gist: GistConfig = field(default_factory=GistConfig)
    lens: LensConfig = field(default_factory=LensConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    focus: FocusConfig = field(default_factory=FocusConfig)
    hyper: Hyperparameters = field(default_factory=Hyperparameters)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)

    def __post_init__(self) -> None:
        require_choice(self, "dtype")
        require_positive(self, "batch_size", "logging_steps", "eval_steps", "eval_batches", "save_steps")
        require(self.steps >= 0, f"steps must be 0 (no preference training) or more, got {self.steps}")
        counts = {"steps": self.steps, "pretrain.steps": self.pretrain.steps, "online.steps": self.online.steps}
        for name, steps in counts.items():
            require(
                steps == 0 or steps > self.optimizer.warmup_steps,
                f"{name} must be above optimizer.warmup_steps {self.optimizer.warmup_steps}, got {steps}",
            )
        for name, source in (("base_run", self.base_run), ("init", self.init)):
            require(
                self.steps + self.online.steps > 0 or source is None,
                f"steps is 0 and {name} is {source!r}: there is nothing to do; raise steps or drop {name}",
            )
        require(
            self.base_run is None or self.init is None,
            f"base_run {self.base_run!r} and init {self.init!r} both give a base model: name one of them",
        )
        is_pretrained = self.base_run is not None or self.init is not None
        self.stopping.require_reachable(
            {name: steps for name, steps in counts.items() if not (is_pretrained and name == "pretrain.steps")},
            eval_steps=self.eval_steps,
        )
        require(0 <= self.seed < 2**31, f"seed must be in [0, 2**31), got {self.seed}")
        require(bool(self.output_dir), "output_dir must name a folder, got an empty string")
        require(
            len(self.trainable) > 0 and set(self.trainable) <= {"base", "gist", "lens", "hyper"},
            f"trainable must name one or more of base, gist, lens, hyper, got {self.trainable}",
        )
        require(len(set(self.trainable)) == len(self.trainable), f"trainable names a part twice: {self.trainable}")
        require(
            self.base.dim % self.gist.heads == 0,
            f"base.dim must be a multiple of gist.heads, got {self.base.dim} and {self.gist.heads}",
        )
        require(
            not self.data.is_text or self.base.vocab_size >= 256,
            f"text is read as bytes: base.vocab_size must be at least 256, got {self.base.vocab_size}",
        )
        compared = self.context.rollouts + (self.context.local_edits == 0)
        require(
            self.objective.keep is None or self.objective.keep <= compared,
            f"objective.keep must be at most the {compared} variants that are compared (lower it, or raise "
            f"context.rollouts), got {self.objective.keep}",
        )
        # Values are relative to the anchor's: a margin over the policy of the step before is wanted anew at each step.
        require(
            not self.objective.is_over_groups or self.hyper.kl_weight == 0 or self.objective.anchor != "previous",
            f"objective.name {self.objective.name} with hyper.kl_weight {self.hyper.kl_weight} compares values with "
            "the anchor's, and objective.anchor previous moves along with the policy, so that nothing is there to "
            "converge to: set objective.anchor to fixed or ema, or hyper.kl_weight to 0",
        )
        for name in ("context_start", "context_end"):
            self.context.geometry.length_of_fraction(getattr(self.hyper, name), name=name)
        self._check_adaptation()

    def _check_adaptation(self) -> None:
        if "hyper" not in self.trainable:
            return
        require(
            self.context.rollouts >= 2,
            f"the hypernetwork compares rollouts: context.rollouts must be at least 2, got {self.context.rollouts}",
        )
        require(
            self.objective.name == "spans",
            f"the hypernetwork learns from spans: set objective.name to spans, got {self.objective.name}",
        )
        require(
            self.objective.pair_weights == "none",
            "the hypernetwork learns from pairs of equal weight: set objective.pair_weights to none, got "
            f"{self.objective.pair_weights}",
        )
        shape = self.context
        shortest = shape.block_size + shape.recent_tokens + 2 * shape.horizon
        require(
            shape.window >= shortest,
            "the hypernetwork reads what was measured one context.horizon before the cursor: context.window must hold "
            f"a block, context.recent_tokens and two horizons, at least {shortest}, got {shape.window}",
        )
        geometry = dataclasses.replace(shape.geometry, window=shape.history - shape.horizon)
        for name in ("context_start", "context_end"):
            named = (
                f"hyper.{name} (one context.horizon before the cursor, where the hypernetwork's support is measured)"
            )
            geometry.length_of_fraction(getattr(self.hyper, name), name=named)

    @property
    def past(self) -> "Config":
        """This run at the cursor one horizon earlier: its window is this one's history (see `lensjax.training.steps.adaptation`)."""
        earlier = dataclasses.replace(self.context, window=self.context.history)
        return dataclasses.replace(self, context=earlier, trainable=("lens",))

    @property
    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a training step is given of each example of a batch, as of `loop.Settings`."""
        return {"tokens": (self.context.window,)}

    @property
    def context_capacity(self) -> int:
        """Entries that the longest working context of the curriculum holds: the static size W."""
        longest = max(self.hyper.context_start, self.hyper.context_end)
        return self.context.geometry.length_of_fraction(longest)


def to_json(config: Any) -> str:
    """Writes a config as JSON text; `from_json` reads it back equal."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, *, source: str = "config") -> Config:
    """Reads a config from JSON text. Missing keys take their defaults.

    Raises:
      ValueError: the text is not a JSON object, a key is unknown, or a value has the wrong type or range.
    """
    return _from_json(text, Config, source)


def load(path: str | Path) -> Config:
    """Reads a config file; errors name it."""
    return load_as(path, Config)


def load_as(path: str | Path, kind: type[Kind]) -> Kind:
    """Reads a config file of another kind: any frozen dataclass whose sections are dataclasses; errors name the file.

    Raises:
      ValueError: as of `from_json`.
    """
    return _from_json(Path(path).read_text(encoding="utf-8", errors="replace"), kind, str(path))


def _from_json(text: str, kind: type[Kind], source: str) -> Kind:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    config: Kind = _build(kind, raw, where=source)
    return config


def _build(cls: type, raw: Any, *, where: str) -> Any:
    require(isinstance(raw, dict), f"{where}: expected an object with keys of {cls.__name__}, got {raw!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(raw) - set(hints))
    require(
        not unknown,
        f"{where}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}; known keys: {', '.join(sorted(hints))}",
    )
    values = {
        name: _build(hints[name], value, where=f"{where}.{name}")
        if dataclasses.is_dataclass(hints[name])
        else _checked_type(hints[name], value, where=f"{where}.{name}")
        for name, value in raw.items()
    }
    return cls(**values)


def _checked_type(hint: Any, value: Any, *, where: str) -> Any:
    """JSON has no tuples and writes whole floats as integers; everything else must match the annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value  # checked with its choices in __post_init__
    if origin is tuple:
        is_list = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        require(is_list, f"{where}: expected a list of names, got {value!r}")
        return tuple(value)
    accepted: tuple[type, ...] = tuple(args) if args else (hint,)
    if float in accepted and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_stray_bool = isinstance(value, bool) and bool not in accepted
    require(
        isinstance(value, accepted) and not is_stray_bool,
        f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}",
    )
    return value


def replace(config: Config, **changes: Any) -> Config:
    """`dataclasses.replace` with dotted names: `replace(config, **{"hyper.temperature": 2.0, "seed": 1})`.

    Raises:
      ValueError: a name is unknown, or the changed config is not valid.
    """
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        require(head in _names(config), f"unknown config key {name}")
        if rest:
            require(dataclasses.is_dataclass(getattr(config, head)), f"unknown config key {name}")
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = value
    change: Callable[..., Any] = dataclasses.replace
    for head, inner in nested.items():
        section = flat.get(head, getattr(config, head))
        unknown = sorted(set(inner) - _names(section))
        require(not unknown, f"unknown config key {head}.{unknown[0] if unknown else ''}")
        flat[head] = change(section, **inner)
    return change(config, **flat)


def _names(section: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(section)}
