"""Preference terms by name: what the scores of scored variants are asked to agree with.

A term is any function of `TermInputs` to float32[], a mean over what it supervises. `lens_objective(..., term=)` takes
one that is not in `TERMS`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax import losses
from lensjax._numerics import masked_mean
from lensjax._settings import Bound, PositiveInt, require, settings
from lensjax.context.geometry import Geometry
from lensjax.training import preferences
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
    with a baseline for each span (`span_advantages`), or a loss of `lensjax.losses` over the variants' values."""
    group: Literal["sequence", "batch"] = "sequence"
    """What an objective over groups compares: the variants of one sequence, or all of the batch, their values and
    rewards relative to the mean of their sequence."""
    keep: Annotated[int, Bound(2, 1025)] | None = None
    """Variants of a sequence that are compared: the subset whose losses vary most; None compares all."""
    rankings: Annotated[int, Bound(2, 1024)] = 16
    """Rankings of a group that `pg_rank` draws."""
    group_baseline: Literal["standardised", "mean", "leave_one_out"] = "standardised"
    """Of the rewards in `grpo`: GRPO, Dr.GRPO, RLOO."""
    targets: Literal["both", "worse_only"] = "both"
    granularity: Literal["entry", "pair"] = "entry"
    anchor: Literal["previous", "ema", "fixed"] = "previous"
    """What the KL term holds the policy to. Objectives over groups, whose values are relative to it where there is such
    a term, need one that does not move along with the policy: `ema` or `fixed`."""
    max_pairs: PositiveInt = 8
    """Preference pairs kept per sequence [P]."""
    pair_weights: Literal["none", "importance"] = "none"
    """What pairs weigh in the terms over pairs: one as much as another, or what `preferences.pair_weights` gives."""

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

    @property
    def is_over_groups(self) -> bool:
        """Whether the preference term is over the values of variants; else it is over entries."""
        return self.name not in ("spans", "mse", "span_advantages")


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
    """float32[B, V]: the policy's value of each variant (`preferences.variant_values`)."""
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
    hyper: Hyperparameters
    objective: ObjectiveConfig = field(metadata={"static": True})
    geometry: Geometry = field(metadata={"static": True})

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


def _mean_over_pairs(inputs: TermInputs, each: Array) -> Array:
    """Weighted mean over the supervised pairs of the batch."""
    supervised = jnp.any(inputs.pair_entries.where, axis=-1)
    # Weights say how pairs compare; how many there are is no matter of theirs.
    weights = inputs.pair_weights / jnp.maximum(masked_mean(inputs.pair_weights, supervised), 1e-30)
    return masked_mean(weights * each, supervised)


def pair_term(inputs: TermInputs, *, form: Literal["logistic", "squared"]) -> Array:
    """`losses.preference_loss` of the span targets of each pair; float32[]."""

    def loss(score: Array, target: Array, where: Array, weight: Array, gap: Array) -> Array:
        return losses.preference_loss(
            score,
            target,
            where,
            gap=gap,
            temperature=inputs.temperature,
            collapse_weight=inputs.hyper.collapse_weight,
            weights=weight,
            granularity=inputs.objective.granularity,
            form=form,
        )

    of = inputs.pair_entries
    return _mean_over_pairs(inputs, jax.vmap(jax.vmap(loss))(of.scores, of.target, of.where, of.weight, of.gap))


def rank_term(inputs: TermInputs) -> Array:
    """`losses.rank_loss` of each pair; float32[]."""

    def loss(score: Array, target: Array, where: Array, weight: Array) -> Array:
        return losses.rank_loss(score, target, where, margin=inputs.hyper.margin, weights=weight)

    of = inputs.pair_entries
    return _mean_over_pairs(inputs, jax.vmap(jax.vmap(loss))(of.scores, of.target, of.where, of.weight))


def entry_losses(inputs: TermInputs) -> Array:
    """float32[B, P, 2, W]: the preference loss by entry, for the log."""
    form: Literal["logistic", "squared"] = "squared" if inputs.objective.name == "mse" else "logistic"

    def loss(score: Array, target: Array, where: Array, gap: Array) -> Array:
        weight, temperature = inputs.hyper.collapse_weight, inputs.temperature
        return losses.preference_entry_losses(
            score, target, where, gap=gap, temperature=temperature, collapse_weight=weight, form=form
        )

    of = inputs.pair_entries
    each = jax.vmap(jax.vmap(loss))(jax.lax.stop_gradient(of.scores), of.target, of.where, of.gap)
    return each.reshape(inputs.targets.where.shape)


def span_term(inputs: TermInputs) -> Array:
    """Policy gradient of the entries, each against a baseline of its own; mean over the sequences that have any.

        -sum_vi a_vi A_vi d_vi s_vi / sum_vi a_vi,    d = +1 where the level is finer than that of the others, else -1

    A finer level that came out better asks for detail, and so does a coarser one that came out worse. a is the tokens
    covered: both sides of a difference weigh the same, and the level alone says nothing (see `span_targets`).
    """

    def loss(scores: Array, advantages: Array, scored: ScoredVariants, compared: Array) -> tuple[Array, Array]:
        gained, finer, where = preferences.span_advantages(advantages, scored.contexts, compared, inputs.geometry)
        spans = jnp.where(where, scored.entries.spans, 0.0)
        share = spans / jnp.maximum(masked_mean(spans, where), 1)
        flat = (leaf.ravel() for leaf in (finer * scores, share * gained, where))
        return losses.policy_gradient(*flat), jnp.any(where)

    return masked_mean(*jax.vmap(loss)(inputs.scores, inputs.advantages, inputs.scored, inputs.compared))


GroupLoss = Callable[..., Array]
"""A loss of variants, such as `losses.grpo`: values, rewards and mask [G] to float32[]."""


def group_term(
    inputs: TermInputs, *, loss: GroupLoss, settings: Callable[[TermInputs, Array], dict[str, Any]]
) -> Array:
    """A loss over each sequence's variants, mean over the sequences that hold a preference; or over all at once.

    Args:
      inputs: the batch.
      loss: of one group.
      settings: its keyword arguments, from the inputs and the group's PRNG key.

    Returns:
      float32[].
    """

    def one(values: Array, rewards: Array, where: Array, key: Array) -> Array:
        return loss(values, rewards, where, **settings(inputs, key))

    compared, rewards, values = inputs.compared, -inputs.scored.nll, inputs.relative_values
    lowest = jnp.min(jnp.where(compared, rewards, jnp.inf), axis=-1)
    highest = jnp.max(jnp.where(compared, rewards, -jnp.inf), axis=-1)
    if inputs.objective.group == "batch":
        centre = jax.vmap(lambda row, where: row - masked_mean(row, where))
        values, rewards = centre(values, compared), centre(rewards, compared)
        where = compared & (highest > lowest)[:, None]
        return one(values.ravel(), rewards.ravel(), where.ravel(), inputs.key)
    each = jax.vmap(one)(values, rewards, compared, jax.random.split(inputs.key, len(values)))
    return masked_mean(each, highest > lowest)


def _group(loss: GroupLoss, settings: Callable[[TermInputs, Array], dict[str, Any]] | None = None) -> Term:
    chosen = settings or (lambda inputs, key: {"beta": inputs.hyper.beta})
    return functools.partial(group_term, loss=loss, settings=chosen)


TERMS: Mapping[str, Term] = {
    "spans": functools.partial(pair_term, form="logistic"),
    "mse": functools.partial(pair_term, form="squared"),
    "span_advantages": span_term,
    "a_star_po": _group(losses.a_star_po),
    "copg": _group(losses.copg),
    "cpl": _group(losses.cpl, lambda inputs, key: {"alpha": inputs.hyper.beta, "bias": inputs.hyper.cpl_bias}),
    "disco": _group(losses.disco, lambda inputs, key: {"tau": inputs.temperature}),
    "grpo": _group(
        losses.grpo,
        lambda inputs, key: {
            "beta": inputs.hyper.beta,
            "clip": inputs.hyper.clip,
            "baseline": inputs.objective.group_baseline,
        },
    ),
    "hinge": _group(losses.hinge),
    "info_nca": _group(
        losses.info_nca, lambda inputs, key: {"alpha": inputs.hyper.reward_temperature, "beta": inputs.hyper.beta}
    ),
    "info_nce": _group(losses.info_nce, lambda inputs, key: {"tau": inputs.temperature}),
    "ipo": _group(losses.ipo),
    "logistic": _group(losses.logistic),
    "pg_rank": _group(
        losses.pg_rank,
        lambda inputs, key: {"beta": inputs.hyper.beta, "key": key, "samples": inputs.objective.rankings},
    ),
    "plackett_luce": _group(losses.plackett_luce),
    "rpo": _group(losses.rpo, lambda inputs, key: {"beta": inputs.hyper.beta, "weight": inputs.hyper.rpo_weight}),
}
"""By the `name` of an `ObjectiveConfig`."""
