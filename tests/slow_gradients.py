"""Policy gradients of variants and of entries as their terms have them, entry by entry, in float64."""

import math

import numpy as np

from lensjax.training.recipe import Recipe
from lensjax.training.terms.advantages import MOST_WEIGHT
from tests import reference
from tests.reference import estimators
from tests.slow_objective import Row, mean, std, weighted_mean

Action = tuple[int, int, float, int]
"""Variant, entry, advantage, and +1 for finer or -1 for coarser."""


def grpo(rows: list[Row], anchors: list[Row], recipe: Recipe) -> float:
    hyper, terms = recipe.hyper, []
    for row, anchor, advantages in zip(rows, anchors, variant_advantages(rows, recipe), strict=True):
        kept = [
            v for v in row.compared if recipe.objective.mask == "none" or _trusts_variant(row, v, advantages, recipe)
        ]
        ratios = {v: math.exp(hyper.beta * (row.value(v) - anchor.value(v))) for v in kept}
        if _holds(row, recipe):
            terms.append(-mean([_clipped(ratios[v], advantages[v], hyper.clip) for v in kept]))
    return mean(terms)


def _clipped(ratio: float, advantage: float, clip: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def gtpo(rows: list[Row], recipe: Recipe, *, share: float) -> float:
    temperature, terms = recipe.hyper.temperature, []
    for row, advantages in zip(rows, variant_advantages(rows, recipe), strict=True):
        actions: list[Action] = []
        for v, entries in _chosen(row).items():
            undecided = mean([estimators.entropy(_finer(row, v, i, temperature)) for i, _ in entries])
            for i, direction in entries if undecided <= recipe.hyper.entropy_limit else []:
                agreeing = [advantages[u] for u in row.compared if row.entries[v][i] in row.entries[u]]
                gained = advantages[v]
                if min(agreeing) < 0 < max(agreeing):
                    gained = max(0.0, 2 * gained)
                actions.append((v, i, gained, direction))
        kept = _kept(row, actions, recipe, share)
        if kept:
            terms.append(-_by_tokens(row, kept, lambda s, d: math.log(reference.sigmoid(d * s / temperature))))
    return mean(terms)


def spans(rows: list[Row], recipe: Recipe, *, share: float, scale: float) -> float:
    """`scale` turns nats into normalised advantages."""
    terms = []
    for row in rows:
        actions: list[Action] = []
        compared = [v in row.compared for v in range(len(row.losses))]
        by_span = reference.span_advantages(row.deltas, row.entries, compared, row.geometry)
        for v, entries in _chosen(row).items():
            for i, direction in entries:
                gained, _ = by_span[v][i]
                gained *= scale
                if recipe.objective.group_reward == "contrastive":
                    gained = _contrast(row, v, i, recipe.hyper.contrast_threshold)
                if recipe.objective.group_reward == "nll" or gained != 0:
                    actions.append((v, i, gained, direction))
        kept = _kept(row, actions, recipe, share)
        if kept:
            terms.append(-_by_tokens(row, kept, lambda s, d: d * s))
    return mean(terms)


def variant_advantages(rows: list[Row], recipe: Recipe) -> list[dict[int, float]]:
    """Of the variants of each sequence that are compared."""
    kind, hyper = recipe.objective.group_baseline, recipe.hyper
    rewards = [{v: -row.losses[v] for v in row.compared} for row in rows]
    if kind == "blended":
        found = _blended(rewards, recipe)
    elif kind == "sets":
        found = [_of_sets(row, group, recipe.objective.set_size) for row, group in zip(rows, rewards, strict=True)]
    else:
        found = [_centred(row, group, kind, hyper.beta) for row, group in zip(rows, rewards, strict=True)]
    if recipe.objective.group_weights == "importance":
        for row, group in zip(rows, found, strict=True):
            for v, probability in _policy(row, hyper.beta).items():
                group[v] *= min(MOST_WEIGHT, len(group) * probability)
    return found


def _centred(row: Row, rewards: dict[int, float], kind: str, beta: float) -> dict[int, float]:
    centre, spread = mean(list(rewards.values())), std(list(rewards.values()))
    if kind == "optimal":
        policy = list(_policy(row, beta).values())
        norms = [estimators.curvature(policy, i)[0] for i in range(len(policy))]
        centre = weighted_mean(list(rewards.values()), norms)
    if kind == "leave_one_out":
        return {v: r - mean([q for u, q in rewards.items() if u != v]) for v, r in rewards.items()}
    scale = spread if kind == "standardised" and spread else 1.0
    return {v: (r - centre) / scale for v, r in rewards.items()}


def _of_sets(row: Row, rewards: dict[int, float], size: int) -> dict[int, float]:
    distances = [
        [estimators.level_distance(row.entries[u], row.entries[v], row.geometry) for u in rewards] for v in rewards
    ]
    found = estimators.set_advantages(list(rewards.values()), distances, size=size)
    return dict(zip(rewards, found, strict=True))


def _blended(rewards: list[dict[int, float]], recipe: Recipe) -> list[dict[int, float]]:
    hyper = recipe.hyper
    width = float(np.float32(hyper.outcome_width))
    rounded = [{v: width * round(r / width) for v, r in group.items()} for group in rewards]
    means = [mean(list(group.values())) for group in rounded]
    found = []
    for group, own in zip(rounded, means, strict=True):
        values = list(group.values())
        shares = [values.count(outcome) / len(values) for outcome in set(values)]
        bits = -sum(share * math.log2(share) for share in shares)
        weight = reference.sigmoid(hyper.blend_sharpness * (bits - hyper.blend_entropy))
        beside = (own - mean(means)) / (std(means) or 1.0)
        spread = std(values)
        found.append(
            {
                v: weight * ((r - own) / spread if spread > 1e-9 else 0.0) + (1 - weight) * beside
                for v, r in group.items()
            }
        )
    return found


def _policy(row: Row, beta: float) -> dict[int, float]:
    return dict(zip(row.compared, estimators.softmax([beta * row.value(v) for v in row.compared]), strict=True))


def _holds(row: Row, recipe: Recipe) -> bool:
    return recipe.objective.group_baseline == "blended" or len({row.losses[v] for v in row.compared}) > 1


def _chosen(row: Row) -> dict[int, list[tuple[int, int]]]:
    """Of each variant, the entries that some other variant shows at another level, and whether they are finer."""
    compared = [v in row.compared for v in range(len(row.losses))]
    by_span = reference.span_advantages(row.losses, row.entries, compared, row.geometry)
    return {
        v: [(i, one[1]) for i, one in enumerate(found) if one is not None]
        for v, found in enumerate(by_span)
        if v in row.compared
    }


def _contrast(row: Row, v: int, i: int, threshold: float) -> int:
    doing = [-row.losses[u] for u in row.compared if row.entries[v][i] in row.entries[u]]
    others = [
        -row.losses[u]
        for u in row.compared
        if reference.span_targets(row.entries[v], row.entries[u], row.geometry)[0][i] is not None
    ]
    return estimators.contrast(doing, others, threshold=threshold)


def _finer(row: Row, v: int, i: int, temperature: float) -> float:
    return reference.sigmoid(row.scores[v][i] / temperature)


def _bounds(recipe: Recipe) -> dict[str, float]:
    return {name: getattr(recipe.hyper, f"trust_{name}") for name in ("step", "low", "high", "shift")}


def _trusts_variant(row: Row, v: int, advantages: dict[int, float], recipe: Recipe) -> bool:
    policy = _policy(row, recipe.hyper.beta)
    return estimators.is_trusted(
        advantages[v], *estimators.curvature(list(policy.values()), list(policy).index(v)), **_bounds(recipe)
    )


def _kept(row: Row, actions: list[Action], recipe: Recipe, share: float) -> list[Action]:
    temperature = recipe.hyper.temperature
    if recipe.objective.mask == "informative":

        def worth(action: Action) -> float:
            v, i, gained, _ = action
            return abs(gained) * estimators.entropy(_finer(row, v, i, temperature))

        return sorted(actions, key=worth, reverse=True)[: math.ceil(share * len(actions) - 1e-4)]
    if recipe.objective.mask == "trust":

        def holds(action: Action) -> bool:
            v, i, gained, direction = action
            p = _finer(row, v, i, temperature)
            norm = ((direction > 0) - p) ** 2
            return estimators.is_trusted(gained, norm, norm * p * (1 - p), **_bounds(recipe))

        return [action for action in actions if holds(action)]
    return actions


def _by_tokens(row: Row, actions: list[Action], likelihood) -> float:
    values = [gained * likelihood(row.scores[v][i], direction) for v, i, gained, direction in actions]
    return weighted_mean(values, [row.span(row.entries[v][i]) for v, i, *_ in actions])
