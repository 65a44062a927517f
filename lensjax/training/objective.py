"""The LensNet objective over a batch of scored variants; calls no model.

L_lens = L_pref + rank_weight L_rank + budget_weight L_budget + smooth_weight L_smooth + kl_weight KL

L_pref supervises entries by span targets of pairs, or by the advantages of spans, or, by another `objective.name`, the
variants' values as a group.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax import losses
from lensjax.context.working import WorkingContext
from lensjax.losses.advantages import most_varied
from lensjax.runs.config import Config, Hyperparameters
from lensjax.training import metrics, preferences
from lensjax.training.optim import moving
from lensjax.training.optim.moving import EmaMoments
from lensjax.training.preferences import PairTargets, PreferencePairs
from lensjax.training.scoring import ScoredVariants

MOST_PAIR_WEIGHT = 10.0
"""Bound on the importance weight of a pair."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss and what the stability state takes in."""

    loss: Array
    """float32[]: L_lens."""
    balance: Array
    """float32[B, V]: net demand for detail of each variant."""
    metrics: dict[str, Array]
    """Scalars, with the names of the log."""


def lens_objective(
    scored: ScoredVariants,
    scores: Array,
    anchor_scores: Array | None,
    key: Array,
    *,
    normaliser: EmaMoments,
    budget: EmaMoments,
    temperature: ArrayLike,
    hyper: Hyperparameters,
    config: Config,
) -> ObjectiveOutput:
    """Loss of the policy's scores against the preferences that the variants' losses express.

    Args:
      scored: B sequences of V scored variants; taken as constants.
      scores: float32[B, V, W], the policy's.
      anchor_scores: float32[B, V, W], the anchor policy's on the same entries; None leaves the KL term out.
      key: PRNG key, consumed; only `pg_rank` draws.
      normaliser: moments of the advantage deltas before this batch.
      budget: moments of the net demand before this batch.
      temperature: float32[].
      hyper: weights.
      config: switches and shapes.

    Returns:
      `ObjectiveOutput`; its loss is NaN where that of a distinct variant is not finite.
    """
    scored = jax.lax.stop_gradient(scored)
    shape = config.context
    variants, distinct = scored.contexts, scored.distinct
    advantages = moving.normalise(normaliser, preferences.advantage_deltas(scored.losses))
    pairs, targets = jax.vmap(lambda one: _supervision(one, hyper, config))(scored)
    is_free = variants.valid & (variants.start < shape.history - shape.recent_tokens) & distinct[..., None]

    values = _variant_values(scores, variants, config)
    pair_weights = _pair_weights(values, scored, pairs, hyper, config)
    terms, entry_losses = _pair_terms(scores, advantages, pairs, targets, pair_weights, temperature, hyper, config)
    if config.objective.name == "span_advantages":
        terms["preference"] = _span_term(scores, advantages, scored, config)
    if config.objective.is_over_groups:
        reference = jnp.zeros(()) if anchor_scores is None else _variant_values(anchor_scores, variants, config)
        # In a sweep the anchor is there for all arms if it is for one.
        relative = values - jnp.where(hyper.kl_weight > 0, reference, 0.0)
        terms["preference"] = _group_term(relative, scored, key, temperature, hyper, config)
    per_variant = jax.vmap(jax.vmap(losses.budget_balance))
    balance = per_variant(scores, scored.entries.spans, is_free)
    average = jnp.where(budget.decay_product < 1, budget.mean, metrics.masked_mean(balance, distinct))
    smoothing = jax.vmap(jax.vmap(lambda s, w, m: losses.budget_smoothing_loss(s, w, m, average=average)))
    terms["budget"] = metrics.masked_mean(balance**2, distinct)
    terms["smooth"] = metrics.masked_mean(smoothing(scores, scored.entries.spans, is_free), distinct)
    weights = {
        "preference": 1.0,
        "rank": hyper.rank_weight,
        "budget": hyper.budget_weight,
        "smooth": hyper.smooth_weight,
    }
    if anchor_scores is not None:
        kl = jax.vmap(jax.vmap(lambda s, a, m: losses.policy_kl(s, a, m, temperature=temperature)))
        terms["kl"] = metrics.masked_mean(kl(scores, anchor_scores, is_free), distinct)
        weights["kl"] = hyper.kl_weight
    loss = sum((weights[name] * term for name, term in terms.items()), jnp.zeros(()))
    loss = _unless_broken(loss, scored)

    report = {"mc/lens_loss": loss}
    report |= {f"mc/{name}_loss": term for name, term in terms.items()}
    report |= {"kl": terms["kl"]} if "kl" in terms else {}
    report |= {"mc/adv_ema_mean": normaliser.mean, "mc/adv_ema_std": jnp.sqrt(normaliser.variance)}
    report |= metrics.advantage_metrics(scored.losses, distinct)
    report |= metrics.score_metrics(scores, variants.lod, is_free, max_lod=shape.max_lod)
    report |= _preference_metrics(scored, scores, values, pairs, targets)
    picked_lods = jax.vmap(_rows_of_pairs)(variants.lod, pairs)
    report |= metrics.lod_loss_metrics(entry_losses, picked_lods, targets.where, max_lod=shape.max_lod)
    return ObjectiveOutput(loss, jax.lax.stop_gradient(balance), jax.lax.stop_gradient(report))


def pair_loss(
    scored: ScoredVariants,
    scores: Array,
    *,
    normaliser: EmaMoments,
    temperature: ArrayLike,
    hyper: Hyperparameters,
    config: Config,
) -> tuple[Array, Array]:
    """L_pref + rank_weight L_rank alone, of the policy adapted to each sequence.

    Args:
      scored: B sequences of V scored variants; taken as constants.
      scores: float32[B, V, W], the adapted policy's.
      normaliser: moments of the advantage deltas before this batch.
      temperature: float32[].
      hyper: weights.
      config: switches and shapes.

    Returns:
      float32[], and float32[]: the share of the pairs in which it asks for the better one.
    """
    scored = jax.lax.stop_gradient(scored)
    advantages = moving.normalise(normaliser, preferences.advantage_deltas(scored.losses))
    pairs, targets = jax.vmap(lambda one: _supervision(one, hyper, config))(scored)
    weights = jnp.ones(pairs.valid.shape)
    terms, _ = _pair_terms(scores, advantages, pairs, targets, weights, temperature, hyper, config)
    supervised = jnp.any(targets.where, axis=(-2, -1))
    agreement, _ = preferences.agreement(jax.vmap(preferences.pair_margins)(scores, targets, pairs), supervised)
    loss = _unless_broken(terms["preference"] + hyper.rank_weight * terms["rank"], scored)
    return loss, jax.lax.stop_gradient(agreement)


def _unless_broken(loss: Array, scored: ScoredVariants) -> Array:
    """The loss; NaN where a variant's is not finite: such a variant is in no pair, and would be left out unseen."""
    return jnp.where(jnp.all(jnp.isfinite(scored.losses) | ~scored.distinct), loss, jnp.nan)


def _supervision(scored: ScoredVariants, hyper: Hyperparameters, config: Config) -> tuple[PreferencePairs, PairTargets]:
    """Pairs and span targets of one sequence."""
    pairs = preferences.select_pairs(
        scored.losses,
        _compared(scored, config),
        hard_negative_ratio=hyper.hard_negative_ratio,
        max_pairs=config.objective.max_pairs,
    )
    targets = preferences.span_targets(
        scored.contexts,
        pairs,
        window=config.context.history,
        block_size=config.context.block_size,
        recent_tokens=config.context.recent_tokens,
        worse_only=config.objective.targets == "worse_only",
    )
    return pairs, targets


def _compared(scored: ScoredVariants, config: Config) -> Array:
    """bool[V]: variants of one sequence that are compared."""
    # Local rollouts share nothing with the baseline but the tail.
    compared = scored.distinct.at[0].set(False) if config.context.local_edits else scored.distinct
    if config.objective.keep is None:
        return compared
    return most_varied(scored.losses, compared, count=config.objective.keep)


def _variant_values(scores: Array, variants: WorkingContext, config: Config) -> Array:
    """The policy's value of each variant, float32[B, V]."""
    shape = config.context
    value = functools.partial(
        preferences.variant_values,
        window=shape.history,
        block_size=shape.block_size,
        max_lod=shape.max_lod,
        recent_tokens=shape.recent_tokens,
    )
    return jax.vmap(value)(scores, variants)


def _group_term(
    values: Array, scored: ScoredVariants, key: Array, temperature: ArrayLike, hyper: Hyperparameters, config: Config
) -> Array:
    """The objective over each sequence's variants, mean over the sequences that hold a preference; or over all at once.

    Args:
      values: float32[B, V], relative to the anchor's where there is one.
      scored: the variants and what they are worth.
      key: PRNG key, consumed.
      temperature: float32[].
      hyper: scales.
      config: names the objective and the group.

    Returns:
      float32[].
    """
    beta, objective = {"beta": hyper.beta}, config.objective

    def loss(values: Array, rewards: Array, where: Array, key: Array) -> Array:
        settings: dict[str, dict[str, Any]] = {
            "cpl": {"alpha": hyper.beta, "bias": hyper.cpl_bias},
            "disco": {"tau": temperature},
            "grpo": {"beta": hyper.beta, "clip": hyper.clip, "baseline": objective.baseline},
            "info_nca": {"alpha": hyper.reward_temperature, "beta": hyper.beta},
            "info_nce": {"tau": temperature},
            "pg_rank": {"beta": hyper.beta, "key": key, "samples": objective.rankings},
            "rpo": {"beta": hyper.beta, "weight": hyper.rpo_weight},
        }
        return getattr(losses, objective.name)(values, rewards, where, **settings.get(objective.name, beta))

    compared, rewards = jax.vmap(lambda one: _compared(one, config))(scored), -scored.losses
    lowest = jnp.min(jnp.where(compared, rewards, jnp.inf), axis=-1)
    highest = jnp.max(jnp.where(compared, rewards, -jnp.inf), axis=-1)
    if objective.group == "batch":
        centre = jax.vmap(lambda row, where: row - metrics.masked_mean(row, where))
        values, rewards = centre(values, compared), centre(rewards, compared)
        where = compared & (highest > lowest)[:, None]
        return loss(values.ravel(), rewards.ravel(), where.ravel(), key)
    each = jax.vmap(loss)(values, rewards, compared, jax.random.split(key, len(values)))
    return metrics.masked_mean(each, highest > lowest)


def _span_term(scores: Array, advantages: Array, scored: ScoredVariants, config: Config) -> Array:
    """Policy gradient of the entries, each against a baseline of its own; mean over the sequences that have any.

        -sum_vi a_vi A_vi d_vi s_vi / sum_vi a_vi,    d = +1 where the level is finer than that of the others, else -1

    A finer level that came out better asks for detail, and so does a coarser one that came out worse. a is the tokens
    covered: both sides of a difference weigh the same, and the level alone says nothing (see `span_targets`).

    Args:
      scores: float32[B, V, W].
      advantages: float32[B, V], the variants' normalised losses; the A of entries are differences of them.
      scored: the variants.
      config: shapes.

    Returns:
      float32[].
    """
    shape = config.context

    def loss(scores: Array, advantages: Array, scored: ScoredVariants) -> tuple[Array, Array]:
        gained, finer, where = preferences.span_advantages(
            advantages,
            scored.contexts,
            _compared(scored, config),
            window=shape.history,
            block_size=shape.block_size,
            recent_tokens=shape.recent_tokens,
        )
        spans = jnp.where(where, scored.entries.spans, 0.0)
        share = spans / jnp.maximum(metrics.masked_mean(spans, where), 1)
        flat = (leaf.ravel() for leaf in (finer * scores, share * gained, where))
        return losses.policy_gradient(*flat), jnp.any(where)

    return metrics.masked_mean(*jax.vmap(loss)(scores, advantages, scored))


def _pair_weights(
    values: Array, scored: ScoredVariants, pairs: PreferencePairs, hyper: Hyperparameters, config: Config
) -> Array:
    """float32[B, P]: what each pair weighs."""
    if config.objective.pair_weights == "none":
        return jnp.ones(pairs.valid.shape)
    compared = jax.vmap(lambda one: _compared(one, config))(scored)
    weigh = functools.partial(preferences.pair_weights, beta=hyper.beta, most=MOST_PAIR_WEIGHT)
    return jax.vmap(weigh)(values, pairs, compared)


def _rows_of_pairs(rows: Array, pairs: PreferencePairs) -> Array:
    """[V, W] per variant -> [P, 2, W] per pair, (better, worse)."""
    return rows[jnp.stack([pairs.better, pairs.worse], axis=1)]


def _pair_terms(
    scores: Array,
    advantages: Array,
    pairs: PreferencePairs,
    targets: PairTargets,
    pair_weights: Array,
    temperature: ArrayLike,
    hyper: Hyperparameters,
    config: Config,
) -> tuple[dict[str, Array], Array]:
    """Preference and rank loss, means over the supervised pairs of the batch; and float32[B, P, 2, W] by entry."""
    form: Literal["logistic", "squared"] = "squared" if config.objective.name == "mse" else "logistic"
    flat = (*targets.where.shape[:2], -1)
    picked = jax.vmap(_rows_of_pairs)(scores, pairs).reshape(flat)
    target, where, weight = (leaf.reshape(flat) for leaf in (targets.target, targets.where, targets.weight))
    take = jax.vmap(jnp.take)
    gap = jnp.abs(take(advantages, pairs.worse) - take(advantages, pairs.better))

    def preference(score: Array, target: Array, where: Array, weight: Array, gap: Array) -> Array:
        return losses.preference_loss(
            score,
            target,
            where,
            gap=gap,
            temperature=temperature,
            collapse_weight=hyper.collapse_weight,
            weights=weight,
            granularity=config.objective.granularity,
            form=form,
        )

    def rank(score: Array, target: Array, where: Array, weight: Array) -> Array:
        return losses.rank_loss(score, target, where, margin=hyper.margin, weights=weight)

    def by_entry(score: Array, target: Array, where: Array, gap: Array) -> Array:
        return losses.preference_entry_losses(
            score, target, where, gap=gap, temperature=temperature, collapse_weight=hyper.collapse_weight, form=form
        )

    supervised = jnp.any(where, axis=-1)
    # Weights say how pairs compare; how many there are is no matter of theirs.
    pair_weights = pair_weights / jnp.maximum(metrics.masked_mean(pair_weights, supervised), 1e-30)

    def mean(each: Array) -> Array:
        return metrics.masked_mean(pair_weights * each, supervised)

    terms = {
        "preference": mean(jax.vmap(jax.vmap(preference))(picked, target, where, weight, gap)),
        "rank": mean(jax.vmap(jax.vmap(rank))(picked, target, where, weight)),
    }
    entry_losses = jax.vmap(jax.vmap(by_entry))(jax.lax.stop_gradient(picked), target, where, gap)
    return terms, entry_losses.reshape(targets.where.shape)


def _preference_metrics(
    scored: ScoredVariants, scores: Array, values: Array, pairs: PreferencePairs, targets: PairTargets
) -> dict[str, Array]:
    """Does the policy ask for what was measured to be better?"""
    supervised = jnp.any(targets.where, axis=(-2, -1))
    share, count = preferences.agreement(jax.vmap(preferences.pair_margins)(scores, targets, pairs), supervised)
    control = jax.vmap(preferences.pair_margins)(preferences.lod_only_scores(scored.contexts), targets, pairs)
    control_share, _ = preferences.agreement(control, supervised)

    rewards = -preferences.advantage_deltas(scored.losses)
    correlations, defined = jax.vmap(preferences.correlation)(values, rewards, scored.distinct)
    take = jax.vmap(jnp.take)
    report = {
        "mc/preference_agreement": share,
        "mc/preference_agreement_lod_only": control_share,
        "mc/preference_pair_count": count.astype(jnp.float32),
        "mc/preference_tie_share": jnp.mean(jax.vmap(preferences.tie_share)(scored.losses, scored.distinct)),
    }
    report |= metrics.correlation_metrics(correlations, defined)
    report |= metrics.reward_metrics(take(values, pairs.better), take(values, pairs.worse), pairs.valid)
    return report
