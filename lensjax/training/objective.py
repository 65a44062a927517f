"""The LensNet objective over a batch of scored variants; calls no model.

    L_lens = L_pref + rank_weight L_rank + budget_weight L_budget + smooth_weight L_smooth + kl_weight KL
             + attribution_weight L_attribution

With a gate, a share T of the sequences is taught: L_lens = (1 - T) (L_pref + ...) + T L_lesson + the other terms.
L_pref is one of `terms.table.TERMS`, or anyone's.
"""

import functools
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax import losses
from lensjax._numerics import masked_mean
from lensjax.losses.advantages import most_varied
from lensjax.training import agreement, lessons, metrics, preferences, stages
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.optim import moving
from lensjax.training.optim.moving import EmaMoments
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import ScoredVariants
from lensjax.training.terms.entries import attribution_term
from lensjax.training.terms.inputs import Term, TermInputs, pair_entries, pair_rows
from lensjax.training.terms.lessons import lesson_term
from lensjax.training.terms.pairs import entry_losses, rank_term
from lensjax.training.terms.table import TERMS

MOST_PAIR_WEIGHT = 10.0
"""Bound on the importance weight of a pair."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss and what the moving statistics take in."""

    loss: Array
    """float32[]: L_lens."""
    balance: Array
    """float32[B, V]: net demand for detail of each variant."""
    metrics: dict[str, Array]
    """Scalars, with the names of the log."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """What the objective knows of earlier batches, and its schedule."""

    normaliser: EmaMoments
    """Moments of the advantage deltas before this batch."""
    demand: EmaMoments
    """Moments of the net demand for detail before this batch."""
    temperature: ArrayLike
    """float32[]."""
    _: KW_ONLY
    informative_share: ArrayLike = 1.0
    """float32[]: share of the entries that `objective.mask informative` leaves."""
    is_second: ArrayLike | None = None
    """bool[]: whether the run is in its second stage, which learns from other pairs than the first one (see
    `objective.stages`); None for all pairs."""


def lens_objective(
    key: Array,
    scored: ScoredVariants,
    scores: Array,
    anchor_scores: Array | None,
    statistics: Statistics,
    hyper: Hyperparameters,
    *,
    recipe: Recipe,
    term: Term | None = None,
) -> ObjectiveOutput:
    """Loss of the policy's scores against the preferences that the variants' NLL expresses.

    Args:
      key: PRNG key, consumed; only `pg_rank` draws.
      scored: B sequences of V scored variants; taken as constants.
      scores: float32[B, V, W], the policy's.
      anchor_scores: float32[B, V, W], the anchor policy's on the same entries; None leaves the KL term out.
      statistics: of earlier batches.
      hyper: weights.
      recipe: switches and shapes.
      term: the preference term; None takes that of `recipe.objective.name`.

    Returns:
      `ObjectiveOutput`; its loss is NaN where the NLL of a distinct variant is not finite.

    Example:
      >>> import functools, jax, jax.numpy as jnp, lensjax as lx
      >>> from lensjax.training.objective import Statistics
      >>> config = lx.Config(base=lx.BaseConfig(dim=16, layers=1), lens=lx.LensConfig(dim=16, layers=1))
      >>> recipe, models = config.recipe, config.build_models()
      >>> state, frozen = lx.init_train_state(jax.random.key(0), recipe=recipe, models=models)
      >>> shape = {"context": recipe.context, "capacity": recipe.capacity}
      >>> score = jax.jit(functools.partial(lx.score_variants, models=models, **shape))
      >>> one = score(jax.random.key(1), frozen, jnp.arange(config.context.window), recipe.budget, 0.1)
      >>> batch = jax.tree.map(lambda leaf: leaf[None], one)
      >>> statistics = Statistics(state.normaliser, state.demand, temperature=1.0)
      >>> objective = jax.jit(functools.partial(lx.lens_objective, recipe=recipe))
      >>> scores = jnp.zeros(batch.entries.valid.shape)
      >>> output = objective(jax.random.key(2), batch, scores, None, statistics, state.hyper)
      >>> float(output.metrics["mc/budget_loss"])  # a policy without a wish asks for as much as it gives
      0.0
    """
    scored = jax.lax.stop_gradient(scored)
    geometry = recipe.geometry
    variants, distinct = scored.contexts, scored.distinct
    is_free = variants.valid & geometry.is_free(variants.start) & distinct[..., None]
    inputs = term_inputs(key, scored, scores, anchor_scores, statistics, hyper, recipe=recipe)
    chosen = TERMS[recipe.objective.name] if term is None else term
    parts = {"preference": chosen(inputs), "rank": rank_term(inputs)}
    per_variant = jax.vmap(jax.vmap(losses.budget_balance))
    balance = per_variant(scores, scored.entries.spans, is_free)
    demand = statistics.demand
    average = jnp.where(demand.decay_product < 1, demand.mean, masked_mean(balance, distinct))
    smoothing = jax.vmap(jax.vmap(lambda s, w, m: losses.budget_smoothing_loss(s, w, m, average=average)))
    parts["budget"] = masked_mean(balance**2, distinct)
    parts["smooth"] = masked_mean(smoothing(scores, scored.entries.spans, is_free), distinct)
    weights: dict[str, Any] = {
        "preference": 1.0,
        "rank": hyper.rank_weight,
        "budget": hyper.budget_weight,
        "smooth": hyper.smooth_weight,
    }
    if anchor_scores is not None:
        kl = jax.vmap(jax.vmap(lambda s, a, m: losses.policy_kl(s, a, m, temperature=statistics.temperature)))
        parts["kl"] = masked_mean(kl(scores, anchor_scores, is_free), distinct)
        weights["kl"] = hyper.kl_weight
    if recipe.has_attribution:
        parts["attribution"] = attribution_term(inputs)
        weights["attribution"] = hyper.attribution_weight
    if inputs.taught is not None and scored.worth is not None:
        # Each sequence weighs the same, whatever it learns from.
        share = jnp.mean(inputs.taught, dtype=jnp.float32)
        preferred = [name for name in ("preference", "rank", "attribution") if name in parts]
        weights |= {name: (1 - share) * weights[name] for name in preferred}
        parts["lesson"] = lesson_term(inputs, scored.worth, inputs.taught, temperature=recipe.distill.temperature)
        weights["lesson"] = share
    loss = sum((weights[name] * part for name, part in parts.items()), jnp.zeros(()))
    loss = _unless_broken(loss, scored)

    report = {"mc/lens_loss": loss}
    report |= {f"mc/{name}_loss": part for name, part in parts.items()}
    report |= {"kl": parts["kl"]} if "kl" in parts else {}
    report |= {"mc/taught_share": weights["lesson"]} if "lesson" in parts else {}
    normaliser = statistics.normaliser
    report |= {"mc/adv_ema_mean": normaliser.mean, "mc/adv_ema_std": jnp.sqrt(normaliser.variance)}
    report |= metrics.advantage_metrics(scored.nll, distinct)
    report |= metrics.score_metrics(scores, variants.lod, is_free, max_lod=geometry.max_lod)
    report |= _preference_metrics(inputs, tells_success=recipe.curriculum.climbs)
    picked_lods = jax.vmap(pair_rows)(variants.lod, inputs.pairs)
    by_entry = entry_losses(inputs)
    report |= metrics.lod_loss_metrics(by_entry, picked_lods, inputs.targets.where, max_lod=geometry.max_lod)
    return ObjectiveOutput(loss, jax.lax.stop_gradient(balance), jax.lax.stop_gradient(report))


def pair_loss(
    key: Array,
    scored: ScoredVariants,
    scores: Array,
    statistics: Statistics,
    hyper: Hyperparameters,
    *,
    recipe: Recipe,
) -> tuple[Array, Array]:
    """L_pref + rank_weight L_rank alone, of a policy that is adapted to each sequence.

    Args:
      key: PRNG key; nothing is drawn from it.
      scored: B sequences of V scored variants; taken as constants.
      scores: float32[B, V, W], the adapted policy's.
      statistics: of earlier batches.
      hyper: weights.
      recipe: switches and shapes.

    Returns:
      float32[], and float32[]: the share of the pairs in which it asks for the better one.
    """
    scored = jax.lax.stop_gradient(scored)
    inputs = term_inputs(key, scored, scores, None, statistics, hyper, recipe=recipe)
    targets, pairs = inputs.targets, inputs.pairs
    supervised = jnp.any(targets.where, axis=(-2, -1))
    share, _ = agreement.agreement(jax.vmap(agreement.pair_margins)(scores, targets, pairs), supervised)
    preference = TERMS[recipe.objective.name](inputs)
    loss = _unless_broken(preference + hyper.rank_weight * rank_term(inputs), scored)
    return loss, jax.lax.stop_gradient(share)


def term_inputs(
    key: Array,
    scored: ScoredVariants,
    scores: Array,
    anchor_scores: Array | None,
    statistics: Statistics,
    hyper: Hyperparameters,
    *,
    recipe: Recipe,
) -> TermInputs:
    """What a preference term may look at; arguments of `lens_objective`."""
    geometry, settings = recipe.geometry, recipe.objective
    # Local rollouts share nothing with recency but the tail.
    where = scored.distinct.at[:, 0].set(False) if recipe.context.local_edits else scored.distinct
    compared = where
    if settings.keep is not None:
        compared = jax.vmap(functools.partial(most_varied, count=settings.keep))(scored.nll, where)
    taught = None
    if settings.gate == "teacher":
        if scored.worth is None:
            raise ValueError("scored.worth must be given where objective.gate is teacher: call `lessons.with_worths`")
        gate = functools.partial(lessons.needs_teacher, gain=hyper.gate_gain, most=hyper.gate)
        taught = jax.vmap(gate)(scored.nll, compared)
        compared &= ~taught[:, None]
    select = functools.partial(
        preferences.select_pairs, hard_negative_ratio=hyper.hard_negative_ratio, max_pairs=settings.max_pairs
    )
    pairs, gap_range = jax.vmap(select)(scored.nll, compared), None
    if settings.stages == "easy_first":
        if statistics.is_second is None:
            raise ValueError("statistics.is_second must be given where objective.stages is easy_first, got None")
        easy = stages.easy_gap(pairs.gap, pairs.valid, quantile=hyper.easy_quantile)
        gap_range = stages.gap_range(easy, statistics.is_second)
        is_in = (pairs.gap >= gap_range[0]) & (pairs.gap < gap_range[1])
        pairs = replace(pairs, valid=pairs.valid & is_in)
    supervise = functools.partial(preferences.span_targets, worse_only=settings.targets == "worse_only")
    targets = jax.vmap(lambda variants, of: supervise(variants, of, geometry))(scored.contexts, pairs)
    value = jax.vmap(functools.partial(agreement.variant_values, geometry=geometry))
    values = value(scores, scored.contexts)
    weights = jnp.ones(pairs.valid.shape)
    if settings.pair_weights == "importance":
        if scored.log_ratio is None:
            weigh = functools.partial(preferences.pair_weights, beta=hyper.beta, most=MOST_PAIR_WEIGHT)
            weights = jax.vmap(weigh)(values, pairs, compared)
        else:
            known = functools.partial(preferences.drawn_pair_weights, most=MOST_PAIR_WEIGHT)
            weights = jax.vmap(known)(scored.log_ratio, pairs)
    advantages = moving.normalise(statistics.normaliser, preferences.advantage_deltas(scored.nll))
    return TermInputs(
        scores=scores,
        values=values,
        anchor_values=jnp.zeros(()) if anchor_scores is None else value(anchor_scores, scored.contexts),
        scored=scored,
        compared=compared,
        advantages=advantages,
        pairs=pairs,
        targets=targets,
        pair_entries=pair_entries(scores, advantages, pairs, targets),
        pair_weights=weights,
        key=key,
        temperature=statistics.temperature,
        informative_share=statistics.informative_share,
        hyper=hyper,
        objective=settings,
        geometry=geometry,
        taught=taught,
        gap_range=gap_range,
        is_softened=recipe.is_softened,
    )


def _unless_broken(loss: Array, scored: ScoredVariants) -> Array:
    """The loss; NaN where a variant's NLL is not finite: such a variant is in no pair, and would be left out unseen."""
    return jnp.where(jnp.all(jnp.isfinite(scored.nll) | ~scored.distinct), loss, jnp.nan)


def _preference_metrics(inputs: TermInputs, *, tells_success: bool) -> dict[str, Array]:
    """Does the policy ask for what was measured to be better?"""
    scored, pairs, targets, values = inputs.scored, inputs.pairs, inputs.targets, inputs.values
    supervised = jnp.any(targets.where, axis=(-2, -1))
    margins = jax.vmap(agreement.pair_margins)(inputs.scores, targets, pairs)
    share, count = agreement.agreement(margins, supervised)
    control = jax.vmap(agreement.pair_margins)(agreement.lod_only_scores(scored.contexts), targets, pairs)
    control_share, _ = agreement.agreement(control, supervised)

    rewards = -preferences.advantage_deltas(scored.nll)
    correlations, defined = jax.vmap(agreement.correlation)(values, rewards, scored.distinct)
    take = jax.vmap(jnp.take)
    report = {
        "mc/preference_agreement": share,
        "mc/preference_agreement_lod_only": control_share,
        "mc/preference_pair_count": count.astype(jnp.float32),
        "mc/preference_tie_share": jnp.mean(jax.vmap(preferences.tie_share)(scored.nll, scored.distinct)),
    }
    if tells_success:
        # Of each sequence its first pair, the best variant and the worst.
        first = margins[:, 0], pairs.gap[:, 0], supervised[:, 0]
        report["mc/preference_success"] = agreement.success(*first)
        report["mc/preference_success_count"] = jnp.sum(supervised[:, 0], dtype=jnp.float32)
    report |= metrics.correlation_metrics(correlations, defined)
    report |= metrics.reward_metrics(take(values, pairs.better), take(values, pairs.worse), pairs.valid)
    return report
