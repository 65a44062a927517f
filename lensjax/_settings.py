"""The sections of a configuration: frozen dataclasses, every field checked where it enters.

They are static: shapes, switches and schedules that are compiled in. What an ablation sweeps is `Hyperparameters`:
plain floats here, a pytree of scalar arrays inside `TrainState`.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from lensjax.context.geometry import CutGeometry


def require(ok: bool, message: str) -> None:
    """Raises `ValueError` with the message where a value is not one that works."""
    if not ok:
        raise ValueError(message)


def require_positive(config: Any, *names: str) -> None:
    """Checks that fields are at least 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{name} must be at least 1, got {value}")


def require_choice(config: Any, *names: str) -> None:
    """Checks Literal fields against the choices that their annotation lists."""
    hints = typing.get_type_hints(type(config))
    for name in names:
        choices = typing.get_args(hints[name])
        value = getattr(config, name)
        require(value in choices, f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


@dataclass(frozen=True)
class BaseConfig:
    """Decoder-only language model of the Llama kind."""

    vocab_size: int = 256
    dim: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp_dim: int = 192
    copy_heads: int = 0
    """Key-value heads in each layer that find an entry by the one before it, and so learn at once to copy."""
    conv_width: int = 3
    """Taps of the causal depthwise convolution on the input embeddings; 0 leaves it out."""
    tied: bool = True
    """Whether the output head is the transposed embedding."""
    rope_theta: float = 10_000.0
    gaussian_rope: bool = False
    """Damp rotary frequencies by exp(-(theta sigma)^2 / 2), sigma = span width."""

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "dim", "layers", "heads", "kv_heads", "mlp_dim")
        require(
            self.dim % (2 * self.heads) == 0,
            f"base.dim must be a multiple of 2 * heads = {2 * self.heads} (rotary pairs), got {self.dim}",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"base.heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}",
        )
        require(
            0 <= self.copy_heads <= self.kv_heads,
            f"base.copy_heads must be between 0 and kv_heads {self.kv_heads}, got {self.copy_heads}",
        )
        require(self.conv_width >= 0, f"base.conv_width must be 0 (none) or more, got {self.conv_width}")
        require(self.rope_theta > 1, f"base.rope_theta must be above 1, got {self.rope_theta}")


@dataclass(frozen=True)
class GistConfig:
    """GistNet: K child embeddings to one gist of the same width."""

    pooling: Literal["mean", "query", "cls"] = "mean"
    head: Literal["linear", "mlp"] = "linear"
    layers: int = 0
    heads: int = 4

    def __post_init__(self) -> None:
        require_choice(self, "pooling", "head")
        require(self.layers >= 0, f"gist.layers must be 0 or more, got {self.layers}")
        require_positive(self, "heads")


@dataclass(frozen=True)
class LensConfig:
    """LensNet: bidirectional policy over the entries of one working context."""

    dim: int = 64
    layers: int = 2
    heads: int = 2
    """Few and wide: a head compares entries by what it projects them to, and 16 numbers tell few of them apart."""
    mlp_dim: int = 192
    head: Literal["linear", "mlp"] = "linear"
    blocks: bool = True
    """Whether a token is seen with the gist of its block beside it."""
    pointer: bool = True
    """Whether the end of the history is compared with each entry, besides what attention does (`Pointer`)."""

    def __post_init__(self) -> None:
        require_positive(self, "dim", "layers", "heads", "mlp_dim")
        require_choice(self, "head")
        require(self.dim % self.heads == 0, f"lens.dim must be a multiple of heads, got {self.dim} and {self.heads}")


@dataclass(frozen=True)
class ContextConfig:
    """The tree, the working context and the rollouts (letters of the README in brackets)."""

    window: int = 256
    """Tokens in a training window [T]: a history, and the horizon behind it."""
    block_size: int = 8
    """Children per gist [K]."""
    max_lod: int = 2
    """Highest level of detail [L]."""
    horizon: int = 32
    """Tokens behind the cursor, on which every variant is scored and which no policy sees [H]."""
    recent_tokens: int = 8
    """Last tokens of the history, which stay at LOD 0 in every variant: the query."""
    rollouts: int = 4
    """Random variants per sequence [N]."""
    local_edits: int = 0
    """Above 0 the rollouts of a sequence are one random cut and N - 1 that differ from it by so many swaps: then a
    preference concerns few spans. The baseline, which differs from them everywhere, is in no pair."""

    def __post_init__(self) -> None:
        require_positive(self, "window", "max_lod", "horizon", "recent_tokens", "rollouts")
        require(self.local_edits >= 0, f"context.local_edits must be 0 (none) or more, got {self.local_edits}")
        require(
            self.local_edits == 0 or self.rollouts >= 2,
            f"context.local_edits compares rollouts with each other: expected 2 or more of them, got {self.rollouts}",
        )
        require(self.block_size >= 2, f"context.block_size must be at least 2, got {self.block_size}")
        shortest = self.block_size + self.recent_tokens + self.horizon
        require(
            self.window >= shortest,
            "context.window must hold at least one block, the recent tokens and the horizon: expected at least "
            f"{shortest}, got {self.window}",
        )

    @property
    def history(self) -> int:
        """Tokens before the cursor [C]: all that a policy may look at."""
        return self.window - self.horizon

    @property
    def geometry(self) -> CutGeometry:
        """The history as the arithmetic of lengths sees it."""
        return CutGeometry(self.history, self.block_size, self.max_lod, self.recent_tokens)


@dataclass(frozen=True)
class FocusConfig:
    """How the allocator turns scores into edits; no part of training."""

    steps: int = 4
    """Refocus steps from a cold start."""
    max_edits: int = 64
    """Swaps in one refocus step, at most."""
    expand_threshold: float = -1.0
    """Scores below it are not expanded; scores lie in [-1, 1]."""
    collapse_threshold: float = 1.0
    """Scores above it are not collapsed."""
    cooldown: int = 1
    """Refocus steps for which an edited node is left alone; 0 for none."""
    temperature: float = 0.0
    """0 takes the best edits; above it they are sampled."""
    top_k: int = 0
    """Samples come from that many of the best candidates; 0 for all."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "max_edits")
        for name in ("cooldown", "top_k", "temperature"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"focus.{name} must be finite and at least 0, got {value}")
        for name in ("expand_threshold", "collapse_threshold"):
            value = getattr(self, name)
            require(not math.isnan(value), f"focus.{name} must be a number, got {value}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What an ablation sweeps. Floats in a `Config`; float32 scalars, or a batch of them, in a `TrainState`."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    temperature: float = 1.0
    """Temperature of the preference scale g, of the Bernoulli policy in the KL, and of `disco` and `info_nce` (tau)."""
    temperature_end: float = 1.0
    """Temperature at the last step; linear in between."""
    beta: float = 1.0
    """Scale of the variants' values in the objectives over groups (alpha of `cpl`)."""
    reward_temperature: float = 1.0
    """Temperature of the rewards in `info_nca` (alpha), in nats."""
    cpl_bias: float = 0.5
    """Weight of the worse variant in `cpl` (lambda)."""
    clip: float = 0.2
    """How far from 1 the ratio of `grpo` counts (epsilon)."""
    rpo_weight: float = 0.1
    """Weight of the better variant's own value in `rpo` (eta)."""
    adv_norm_beta: float = 0.9
    """Decay of the advantage normaliser's moving averages."""
    collapse_weight: float = 1.0
    """Weight of entries whose target is to collapse."""
    rank_weight: float = 0.5
    margin: float = 0.1
    """Margin of the rank loss."""
    budget_weight: float = 0.1
    smooth_weight: float = 0.0
    budget_smooth_beta: float = 0.9
    kl_weight: float = 0.0
    """0 in the `Config` leaves the term, and the anchor's forward pass, out of the compiled step."""
    anchor_beta: float = 0.99
    """Decay of the policy anchor's parameters when the anchor is an EMA."""
    hard_negative_ratio: float = 1.0
    """Share kept of the pairs that do not hold the best variant, largest difference first."""
    lod2_share: float = 0.1
    """Probability of each block of LOD 2 or above that the target length leaves open."""
    context_start: float = 0.8
    """Length of a working context at step 0, as a fraction of the history. The larger of the two lengths in the
    `Config` is the compiled capacity, which bounds them in a state."""
    context_end: float = 0.75
    """Length of a working context at the end of the curriculum, as a fraction of the history."""
    token_loss_weight: float = 1.0
    """Weight of mean_v nll(v) when the base model or GistNet is trained."""
    gist_delta_weight: float = 0.0
    """Weight of relu(nll(v) - nll(baseline)) when the base model or GistNet is trained."""

    def __post_init__(self) -> None:
        # Inside jax transformations the fields are tracers or placeholders: only numbers can be checked.
        if not all(isinstance(value, int | float) for value in dataclasses.asdict(self).values()):
            return
        for name in ("learning_rate", "temperature", "temperature_end", "beta", "reward_temperature", "cpl_bias"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} must be finite and above 0, got {value}")
        require(0 < self.clip < 1, f"clip must be in (0, 1), got {self.clip}")
        for name in ("adv_norm_beta", "budget_smooth_beta", "anchor_beta"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be in [0, 1), got {value}")
        for name in ("hard_negative_ratio", "lod2_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} must be in [0, 1], got {value}")
        for name in ("context_start", "context_end"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{name} is a fraction of the history in (0, 1], got {value}")
        for name in (
            "weight_decay",
            "rpo_weight",
            "collapse_weight",
            "rank_weight",
            "margin",
            "budget_weight",
            "smooth_weight",
            "kl_weight",
            "token_loss_weight",
            "gist_delta_weight",
        ):
            value = getattr(self, name)
            require(value >= 0 and math.isfinite(value), f"{name} must be finite and at least 0, got {value}")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is compiled in of the LensNet objective; its weights are in `Hyperparameters`."""

    name: Literal[
        "spans",
        "mse",
        "span_advantages",
        "a_star_po",
        "copg",
        "cpl",
        "disco",
        "grpo",
        "hinge",
        "info_nca",
        "info_nce",
        "ipo",
        "logistic",
        "pg_rank",
        "plackett_luce",
        "rpo",
    ] = "spans"
    """The preference term: `preference_loss` of span targets, their squared error (`mse`), a policy gradient of entries
    with a baseline for each span (`span_advantages`), or one of `losses.groups` over the variants' values."""
    group: Literal["sequence", "batch"] = "sequence"
    """What an objective over groups compares: the variants of one sequence, or all of the batch, their values and
    rewards relative to the mean of their sequence."""
    keep: int | None = None
    """Variants of a sequence that are compared: the subset whose losses vary most; None compares all."""
    rankings: int = 16
    """Rankings of a group that `pg_rank` draws."""
    baseline: Literal["standardised", "mean", "leave_one_out"] = "standardised"
    """Of the rewards in `grpo`: GRPO, Dr.GRPO, RLOO."""
    targets: Literal["both", "worse_only"] = "both"
    granularity: Literal["entry", "pair"] = "entry"
    anchor: Literal["previous", "ema", "fixed"] = "previous"
    """What the KL term holds the policy to. Objectives over groups, whose values are relative to it where there is such
    a term, need one that does not move along with the policy: `ema` or `fixed`."""
    max_pairs: int = 8
    """Preference pairs kept per sequence [P]."""
    pair_weights: Literal["none", "importance"] = "none"
    """What pairs weigh in the terms over pairs: one as much as another, or as of `preferences.pair_weights`."""

    def __post_init__(self) -> None:
        require_choice(self, "name", "group", "baseline", "targets", "granularity", "anchor", "pair_weights")
        require_positive(self, "max_pairs")
        # The former have no group, the latter regresses on the value V* of one context.
        require(
            self.group == "sequence" or (self.is_over_groups and self.name != "a_star_po"),
            f"objective.group batch cannot go with objective.name {self.name}: set objective.group sequence, or name "
            "an objective that compares variants by their differences, such as info_nce",
        )
        require(
            self.keep is None or self.keep >= 2,
            f"objective.keep must be at least 2 (there is nothing to compare with one), or None, got {self.keep}",
        )
        require(self.rankings >= 2, f"objective.rankings must be at least 2, got {self.rankings}")
        require(
            self.granularity == "entry" or self.name != "mse",
            "objective.name mse is an error of entries: set objective.granularity entry, got pair",
        )
        require(
            self.pair_weights == "none" or self.name in ("spans", "mse"),
            f"objective.pair_weights {self.pair_weights} needs a preference term over pairs: set objective.name spans "
            f"or mse, got {self.name}",
        )

    @property
    def is_over_groups(self) -> bool:
        """Whether the preference term is over the values of variants; else it is over entries."""
        return self.name not in ("spans", "mse", "span_advantages")


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become steps; the learning rate and the weight decay are hyperparameters."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the matrices inside the transformers; all else stays with AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 20
    curriculum_steps: int | None = None
    """Steps over which the context length anneals; None: half of the run."""
    b1: float = 0.9
    b2: float = 0.99
    clip_norm: float = 1.0
    grokfast: float = 0.0
    """What the slow part of the gradients is amplified by (lambda of Grokfast); 0 leaves it out."""
    grokfast_decay: float = 0.98
    """Decay of the moving average that is the slow part (alpha of Grokfast)."""

    def __post_init__(self) -> None:
        require_choice(self, "name", "schedule")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps must be 0 or more, got {self.warmup_steps}")
        require(
            self.curriculum_steps is None or self.curriculum_steps >= 0,
            f"optimizer.curriculum_steps must be 0 or more, or None, got {self.curriculum_steps}",
        )
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"b1 and b2 must be in [0, 1), got {self.b1} and {self.b2}")
        require(self.clip_norm > 0, f"optimizer.clip_norm must be above 0, got {self.clip_norm}")
        require(0 <= self.grokfast < math.inf, f"optimizer.grokfast must be finite and at least 0, got {self.grokfast}")
        require(0 <= self.grokfast_decay < 1, f"optimizer.grokfast_decay must be in [0, 1), got {self.grokfast_decay}")


@dataclass(frozen=True)
class StoppingConfig:
    """When a phase ends before its last step, and which of its parameters are kept."""

    patience: int | None = None
    """None trains to the last step and keeps its parameters. A number ends a phase after so many evaluations in a row
    without an improvement of the held-out loss, and gives back the parameters of the best one, however it ended."""
    min_improvement: float = 0.0
    """An evaluation is an improvement where its loss is lower than the best one by more than this, in nats."""

    def __post_init__(self) -> None:
        require(
            self.patience is None or self.patience >= 1,
            f"stopping.patience must be 1 evaluation or more, or None, got {self.patience}",
        )
        require(
            0 <= self.min_improvement < math.inf,
            f"stopping.min_improvement must be finite and at least 0, got {self.min_improvement}",
        )
        require(
            self.patience is not None or self.min_improvement == 0,
            f"stopping.min_improvement is read only with stopping.patience: set it, got {self.min_improvement} alone",
        )

    def require_reachable(self, steps: Mapping[str, int], *, eval_steps: int) -> None:
        """Checks that patience can run out in a run.

        Args:
          steps: of each phase, by the name of the field that says so.
          eval_steps: from each evaluation to the next; a phase's last step is evaluated too.

        Raises:
          ValueError: no phase has enough evaluations: the first one is the best so far, and then patience begins.
        """
        most = max(-(-count // eval_steps) for count in steps.values())
        require(
            self.patience is None or self.patience < most,
            f"stopping.patience {self.patience} cannot run out: with eval_steps {eval_steps} no phase has more than "
            f"{most} evaluations ({', '.join(f'{name} {count}' for name, count in steps.items())}); lower "
            "stopping.patience or eval_steps",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    task: Literal["stdlib", "text", "recall", "tracking"] = "stdlib"
    """The running Python's standard library, the user's own text files, single-span recall, or variable tracking."""
    path: str | None = None
    """Folder or glob of text files; for task text."""
    max_files: int | None = None
    """Read at most this many files a split, in hash order; None reads all."""
    recall_pool: int = 4
    """Distinct blocks in a recall pretraining sequence; few, so that most positions repeat something."""
    query: int = 2
    """First tokens of the block to recall that stand before the cursor; the rest of it is scored."""
    hops: int = 2
    """Statements in a chain of variables to track, each of which takes a look-up."""

    def __post_init__(self) -> None:
        require_choice(self, "task")
        require(
            self.task != "text" or bool(self.path),
            "data.path must name a folder or a glob when data.task is text, got none",
        )
        require(
            self.task == "text" or self.path is None,
            f"data.path is read only when data.task is text: set --data.task text, got {self.task!r}",
        )
        require(self.max_files is None or self.max_files >= 1, f"max_files must be 1 or more, got {self.max_files}")
        require_positive(self, "recall_pool", "query", "hops")

    @property
    def is_text(self) -> bool:
        """Whether tokens are bytes of files; otherwise they are of a synthetic task."""
        return self.task in ("stdlib", "text")


@dataclass(frozen=True)
class PretrainConfig:
    """The base model's own training, before LensNet's. Skipped when `Config.base_run` or `Config.init` is given."""

    steps: int = 600
    learning_rate: float = 3e-3
    batch_size: int = 16
    rollout_weight: float = 0.0
    """Weight of the rollouts' NLL beside the full-context loss: teaches the base model to read gists and GistNet to
    write them. 0 leaves GistNet at its initialisation."""
    train_gist: bool = True
    """Whether GistNet learns from the rollouts; False leaves it at its initialisation, nearly the mean of a block."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size")
        require(
            0 < self.learning_rate < math.inf,
            f"pretrain.learning_rate must be finite and above 0, got {self.learning_rate}",
        )
        require(self.rollout_weight >= 0, f"pretrain.rollout_weight must be 0 or more, got {self.rollout_weight}")


@dataclass(frozen=True)
class OnlineConfig:
    """On-policy training, after the preferences: LensNet's own edits are rolled out and rewarded. 0 steps: none."""

    steps: int = 0
    learning_rate: float = 1e-3
    episodes: int = 1
    """Episodes of each sequence of a batch [G]."""
    refocus_steps: int = 4
    """Refocus steps of an episode, from a cold start [S]."""
    draws: int = 4
    """Swaps drawn in one refocus step, each of which may be to keep the context [M]."""
    temperature: float = 0.1
    """Of the draws, in units of scores: how far the policy explores."""
    edit_cost: float = 0.001
    """Nats per token that a swap must earn."""
    advantages: Literal["gae", "mean", "standardised", "leave_one_out"] = "gae"
    """`gae` has the value network as baseline; the others (Dr.GRPO, GRPO, RLOO) the episodes of the same sequence."""
    whiten: bool = True
    """Whether the advantages of a batch are brought to mean 0 and standard deviation 1."""
    discount: float = 0.99
    """gamma; at 0 an advantage is the step's own reward minus the baseline."""
    trace_decay: float = 0.95
    """lambda of the generalised advantages."""
    value_weight: float = 0.5
    value_hidden: int = 256
    """Width of the value network."""
    entropy_weight: float = 0.01
    entropy_decay: float = 0.9995
    """Factor of the entropy's weight from each step to the next, down to `entropy_floor`."""
    entropy_floor: float = 0.001
    kl_weight: float = 0.0
    """Weight of the KL divergence from LensNet as this phase found it; 0 leaves it and its forward pass out."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"online.steps must be 0 (none) or more, got {self.steps}")
        require_positive(self, "episodes", "refocus_steps", "draws", "value_hidden")
        require_choice(self, "advantages")
        require(
            self.advantages == "gae" or self.episodes >= 2,
            f"online.advantages {self.advantages} compares episodes of one sequence: set online.episodes to 2 or more",
        )
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"online.{name} must be finite and above 0, got {value}")
        for name in ("discount", "trace_decay", "entropy_decay"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"online.{name} must be in [0, 1], got {value}")
        for name in ("edit_cost", "value_weight", "entropy_weight", "entropy_floor", "kl_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"online.{name} must be finite and at least 0, got {value}")


@dataclass(frozen=True)
class AdaptationConfig:
    """Low-rank changes of LensNet for each document (`lensjax.training.steps.adaptation`); trained where `trainable` names `hyper`."""

    rank: int = 4
    init_scale: float = 0.1
    """Frobenius norm of a fresh change."""
    max_norm: float = 1.0
    """Its largest norm, in norms of an identity of its size."""

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        for name in ("init_scale", "max_norm"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"adaptation.{name} must be finite and above 0, got {value}")
