"""What a preference term may look at, and which one a run has.

A term is any function of `TermInputs` to float32[], a mean over what it supervises.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import Bound, PositiveInt, require, settings
from lensjax.context.geometry import Geometry
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.preferences import PairTargets, PreferencePairs
from lensjax.training.scoring import ScoredVariants


@settings("objective")
class ObjectiveConfig:
    """What is compiled in of the LensNet objective; its weights are in `Hyperparameters`.

    Example:
      >>> import lensjax as lx
      >>> lx.ObjectiveConfig(name="ipo").is_over_groups
      True
    """

    name: Literal[
        "spans",
        "mse",
        "span_advantages",
        "a_star_po",
        "copg",
        "cpl",
        "disco",
        "grpo",
        "gtpo",
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
    with a baseline for each span (`span_advantages`) or for each variant (`gtpo`), or a loss of `lensjax.losses` over
    the variants' values."""
    group: Literal["sequence", "batch"] = "sequence"
    """What an objective over groups compares: the variants of one sequence, or all of the batch, their values and
    rewards relative to the mean of their sequence."""
    keep: Annotated[int, Bound(2, 1025)] | None = None
    """Variants of a sequence that are compared: the subset whose losses vary most; None compares all."""
    rankings: Annotated[int, Bound(2, 1024)] = 16
    """Rankings of a group that `pg_rank` draws."""
    group_baseline: Literal["standardised", "mean", "leave_one_out", "optimal", "blended", "sets"] = "standardised"
    """Of the rewards in `grpo` and `gtpo`: GRPO, Dr.GRPO, RLOO; the one of least variance (OBLR-PO); with ties counting
    by what they are beside the batch (COPO); of the sets that a variant is in (polychromic objectives)."""
    set_size: Annotated[int, Bound(2, 1024)] = 2
    """Variants in a set, where the baseline is that of sets."""
    targets: Literal["both", "worse_only"] = "both"
    granularity: Literal["entry", "pair"] = "entry"
    anchor: Literal["previous", "ema", "fixed", "stage"] = "previous"
    """What the KL term holds the policy to: that of the step before, an average, the one at the start, or the one at
    the start of the stage that `hyper.stage_boundary` begins. Objectives over groups, whose values are relative to it
    where there is such a term, need one that does not move along with the policy: any but `previous`."""
    max_pairs: PositiveInt = 8
    """Preference pairs kept per sequence [P]."""
    stages: Literal["one", "easy_first"] = "one"
    """Which pairs are learned from: all at any time, or up to `hyper.stage_boundary` those of a large gap, and then the
    others (MPO). Large is from the quantile `hyper.easy_quantile` of the gaps of the batch's pairs on."""
    gate: Literal["none", "teacher"] = "none"
    """Whether sequences with few good rollouts (`hyper.gate`, `hyper.gate_gain`) learn from the teacher of `distill`
    instead of from their preferences (HPT). The teacher reads each window three times more."""
    pair_weights: Literal["none", "importance"] = "none"
    """What pairs weigh in the terms over pairs: one as much as another, or what `preferences.pair_weights` gives; with
    `context.own_rollouts`, whose probabilities are known, what `preferences.drawn_pair_weights` gives."""
    group_weights: Literal["none", "importance"] = "none"
    """What variants weigh in `grpo` and `gtpo`: one as much as another, or what `losses.credit.group_weights` gives."""
    group_reward: Literal["nll", "contrastive"] = "nll"
    """What an entry is rewarded with in `span_advantages`: how much better its level came out, or only whether it did,
    by more than a threshold (group contrastive masking)."""
    mask: Literal["none", "trust", "informative"] = "none"
    """What is left of the actions in policy gradients (`grpo`, `gtpo`, `span_advantages`): all, those whose predicted
    step stays in an interval (CAPO), or of entries those from which most is learned (D3S, second stage)."""

    def _check(self) -> None:
        # Entries have no group, and `a_star_po` regresses on the value V* of one context.
        require(
            self.group == "sequence" or (self.is_over_groups and self.name != "a_star_po"),
            f"objective.group batch cannot go with objective.name {self.name}: set objective.group sequence, or name "
            "an objective that compares variants by their differences, such as info_nce",
        )
        require(
            self.granularity == "entry" or self.name != "mse",
            "objective.granularity must be entry where objective.name is mse, an error of entries; got pair",
        )
        require(
            self.pair_weights == "none" or self.name in ("spans", "mse"),
            f"objective.pair_weights {self.pair_weights} needs a preference term over pairs: set objective.name spans "
            f"or mse, got {self.name}",
        )
        require(
            self.stages == "one" or self.name in ("spans", "mse", "logistic"),
            f"objective.stages {self.stages} chooses among pairs, of which objective.name {self.name} knows none: set "
            "objective.name to spans, mse or logistic",
        )
        self._check_gradients()

    def _check_gradients(self) -> None:
        """The parts of a policy gradient mean nothing elsewhere."""
        variants, entries = ("grpo", "gtpo"), ("gtpo", "span_advantages")
        objectives = {
            "group_baseline": variants,
            "group_weights": variants,
            "group_reward": ("span_advantages",),
            "mask": entries if self.mask == "informative" else ("grpo", *entries),
        }
        for part, names in objectives.items():
            value = getattr(self, part)
            if value == getattr(ObjectiveConfig, part):
                continue
            require(
                self.name in names,
                f"objective.{part} {value} needs objective.name {' or '.join(names)}, got {self.name}",
            )
            require(
                self.group == "sequence" or value in ("mean", "leave_one_out"),
                f"objective.{part} {value} is of the variants of one sequence: set objective.group sequence, got "
                f"{self.group}",
            )

    @property
    def is_over_groups(self) -> bool:
        """Whether the preference term is over the values of variants; else it is over entries."""
        return self.name not in ("spans", "mse", "span_advantages", "gtpo")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairEntries:
    """The entries of both variants of each pair, side by side: M = 2 W."""

    scores: Array
    """float32[B, P, M]: the policy's."""
    target: Array
    """float32[B, P, M]: see `PairTargets`."""
    where: Array
    """bool[B, P, M]: entries that are supervised."""
    weight: Array
    """float32[B, P, M]: tokens covered."""
    gap: Array
    """float32[B, P]: how far apart the pair's advantages are."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TermInputs:
    """What a preference term may look at: B sequences of V variants, P pairs each; all but the scores are constants."""

    scores: Array
    """float32[B, V, W]: the policy's, of every entry."""
    values: Array
    """float32[B, V]: the policy's value of each variant (`agreement.variant_values`)."""
    anchor_values: Array
    """float32[B, V]: the anchor's, 0 where there is none."""
    scored: ScoredVariants
    """Leading axis B."""
    compared: Array
    """bool[B, V]: variants that are compared."""
    advantages: Array
    """float32[B, V]: normalised rises of the NLL over recency; lower is better."""
    pairs: PreferencePairs
    """Leading axis B."""
    targets: PairTargets
    """Leading axis B."""
    pair_entries: PairEntries
    """What terms over pairs read of these."""
    pair_weights: Array
    """float32[B, P]: what each pair weighs."""
    key: Array
    """PRNG key, for terms that draw."""
    temperature: ArrayLike
    """float32[]."""
    informative_share: ArrayLike
    """float32[]: share of the entries that `objective.mask informative` leaves."""
    hyper: Hyperparameters
    objective: ObjectiveConfig = field(metadata={"static": True})
    geometry: Geometry = field(metadata={"static": True})
    taught: Array | None = None
    """bool[B]: sequences that learn from a teacher instead, none of whose variants is compared; None without one."""
    gap_range: tuple[Array, Array] | None = None
    """float32[] each: what the gaps of pairs are that this stage learns from (`stages.gap_range`), in nats; None for
    all. `pairs` holds no others."""
    is_softened: bool = field(default=False, metadata={"static": True})
    """Whether label smoothing and margins by strength are compiled in."""

    @property
    def softening(self) -> dict[str, ArrayLike]:
        """Arguments of a logistic loss by name; none where nothing softens it."""
        if not self.is_softened:
            return {}
        return {"label_smoothing": self.hyper.label_smoothing, "gap_margin": self.hyper.gap_margin}

    @property
    def relative_values(self) -> Array:
        """float32[B, V]: values over the anchor's, where the KL term has a weight."""
        # In a sweep the anchor is there for all arms if it is for one.
        return self.values - jnp.where(self.hyper.kl_weight > 0, self.anchor_values, 0.0)


Term = Callable[[TermInputs], Array]


def pair_rows(rows: Array, pairs: PreferencePairs) -> Array:
    """[V, W] of each variant to [P, 2, W] of each pair, (better, worse)."""
    return rows[jnp.stack([pairs.better, pairs.worse], axis=1)]


def pair_entries(scores: Array, advantages: Array, pairs: PreferencePairs, targets: PairTargets) -> PairEntries:
    """Gathers what terms over pairs read.

    Args:
      scores: float32[B, V, W].
      advantages: float32[B, V].
      pairs: leading axis B.
      targets: leading axis B.

    Returns:
      `PairEntries`.
    """
    flat = (*targets.where.shape[:2], -1)
    take = jax.vmap(jnp.take)
    return PairEntries(
        scores=jax.vmap(pair_rows)(scores, pairs).reshape(flat),
        target=targets.target.reshape(flat),
        where=targets.where.reshape(flat),
        weight=targets.weight.reshape(flat),
        gap=jnp.abs(take(advantages, pairs.worse) - take(advantages, pairs.better)),
    )
