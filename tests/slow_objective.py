"""The LensNet objective and its report, sequence by sequence, pair by pair, entry by entry, in float64."""

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np

from lensjax.training.agreement import MIN_STD
from lensjax.training.objective import MOST_PAIR_WEIGHT
from lensjax.training.optim.moving import EPS
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import ScoredVariants
from tests import reference
from tests.reference import Entry

Report = dict[str, float]


def mean(values: Sequence[float], otherwise: float = 0.0) -> float:
    return sum(values) / len(values) if len(values) else otherwise


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The plain mean where there are no weights."""
    if not weights:
        return mean(values)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def std(values: Sequence[float]) -> float:
    return float(np.std(np.asarray(values, np.float64))) if len(values) else 0.0


class Row:
    """One sequence: its distinct variants by index, with entries, scores and losses."""

    def __init__(self, scored: ScoredVariants, scores: np.ndarray, anchor: np.ndarray | None, recipe: Recipe) -> None:
        count = len(scored.nll)
        self.context, self.keep = recipe.context, recipe.objective.keep
        self.geometry = recipe.geometry
        self.distinct = [v for v in range(count) if scored.distinct[v]]
        self.entries = [
            reference.entries_of(jax.tree.map(lambda leaf, v=v: leaf[v], scored.contexts)) for v in range(count)
        ]
        self.scores = [[float(s) for s in scores[v]][: len(self.entries[v])] for v in range(count)]
        self.anchor = None if anchor is None else [[float(s) for s in row] for row in anchor]
        self.losses = [float(loss) for loss in scored.nll]
        self.deltas = [loss - self.losses[0] for loss in self.losses]

    @property
    def compared(self) -> list[int]:
        """Variants that are in pairs and groups: of those that may be, the ones whose losses vary most."""
        found = [v for v in self.distinct if v > 0 or self.context.local_edits == 0]
        if self.keep is None or self.keep >= len(found):
            return found
        return list(max(itertools.combinations(found, self.keep), key=lambda some: std([self.losses[v] for v in some])))

    def free(self, v: int) -> list[int]:
        """Entries outside the protected tail."""
        return [i for i, (start, _) in enumerate(self.entries[v]) if start < self.geometry.tail]

    def span(self, entry: Entry) -> int:
        return len(reference.covered(entry, self.geometry.block_size))

    def balance(self, v: int) -> float:
        free = self.free(v)
        spans = [self.span(self.entries[v][i]) for i in free]
        return reference.budget_balance([self.scores[v][i] for i in free], spans)

    def kl(self, v: int, temperature: float) -> float:
        assert self.anchor is not None
        scores, anchor = ([row[v][i] for i in self.free(v)] for row in (self.scores, self.anchor))
        return reference.policy_kl(scores, anchor, temperature=temperature)

    def value(self, v: int) -> float:
        return reference.variant_value(self.scores[v], self.entries[v], self.geometry)

    def correlation(self) -> float | None:
        values = [self.value(v) for v in self.distinct]
        rewards = [-self.deltas[v] for v in self.distinct]
        if min(std(values), std(rewards)) <= MIN_STD:
            return None
        return float(np.corrcoef(values, rewards)[0, 1])

    def supervised(self, better: int, worse: int, *, worse_only: bool) -> list[tuple[float, int, int, int]]:
        """(score, target, LOD, tokens covered) of each supervised entry of both variants."""
        both = reference.span_targets(self.entries[better], self.entries[worse], self.geometry, worse_only=worse_only)
        return [
            (score, target, lod, self.geometry.block_size**lod)
            for v, targets in zip((better, worse), both, strict=True)
            for score, target, (_, lod) in zip(self.scores[v], targets, self.entries[v], strict=True)
            if target is not None
        ]


def rows(scored: ScoredVariants, scores: np.ndarray, anchor_scores: np.ndarray | None, recipe: Recipe) -> list[Row]:
    """The sequences of a batch."""
    scored, scores, anchor_scores = jax.device_get((scored, scores, anchor_scores))
    anchors = [None] * len(scores) if anchor_scores is None else anchor_scores
    each = [jax.tree.map(lambda leaf, b=b: leaf[b], scored) for b in range(len(scores))]
    return [Row(*row, recipe) for row in zip(each, scores, anchors, strict=True)]


def objective(
    scored: ScoredVariants,
    scores: np.ndarray,
    anchor_scores: np.ndarray | None,
    *,
    advantage_moments: tuple[float, float] | None,
    balance_average: float | None,
    temperature: float,
    recipe: Recipe,
) -> Report:
    """What `lens_objective` reports.

    Moments are debiased, None before the first update. The weights are those of `recipe.hyper`.
    """
    sequences = rows(scored, scores, anchor_scores, recipe)
    report = _pair_report(sequences, advantage_moments, temperature, recipe)
    report |= _regularizers(sequences, balance_average, temperature, with_kl=anchor_scores is not None)
    hyper = recipe.hyper
    weights = {
        "preference": 1.0,
        "rank": hyper.rank_weight,
        "budget": hyper.budget_weight,
        "smooth": hyper.smooth_weight,
        "kl": hyper.kl_weight,
    }
    report["mc/lens_loss"] = sum(weight * report.get(f"mc/{name}_loss", 0.0) for name, weight in weights.items())
    average, variance = advantage_moments or (0.0, 1.0)
    report |= {"mc/adv_ema_mean": average, "mc/adv_ema_std": math.sqrt(variance)}
    return report | _reward_report(sequences) | _score_report(sequences)


def _pair_report(
    sequences: list[Row], moments: tuple[float, float] | None, temperature: float, recipe: Recipe
) -> Report:
    hyper, switches = recipe.hyper, recipe.objective
    average, variance = moments or (0.0, 1.0)
    preference, rank, weights, wins, lod_wins, chosen, rejected, ties = [], [], [], [], [], [], [], []
    by_lod: list[list[float]] = [[] for _ in range(recipe.context.max_lod + 1)]
    for row in sequences:
        compared = [v in row.compared for v in range(len(row.losses))]
        advantages = [(delta - average) / math.sqrt(variance + EPS) for delta in row.deltas]
        combinations = [(v, w) for v in row.distinct for w in row.distinct if v < w]
        ties.append(mean([row.losses[v] == row.losses[w] for v, w in combinations]))
        for better, worse, _ in reference.select_pairs(
            row.losses, compared, hard_negative_ratio=hyper.hard_negative_ratio, max_pairs=switches.max_pairs
        ):
            chosen.append(row.value(better))
            rejected.append(row.value(worse))
            entries = row.supervised(better, worse, worse_only=switches.targets == "worse_only")
            if not entries:
                continue
            kind = {
                "gap": abs(advantages[worse] - advantages[better]),
                "temperature": temperature,
                "collapse_weight": hyper.collapse_weight,
                "form": "squared" if switches.name == "mse" else "logistic",
            }
            picked, targets, lods, spans = zip(*entries, strict=True)
            weights.append(_pair_weight(row, better, worse, recipe))
            kind_of_pair = {"weights": spans, "granularity": switches.granularity}
            preference.append(reference.preference_loss(picked, targets, **kind, **kind_of_pair))
            rank.append(reference.rank_loss(picked, targets, margin=hyper.margin, weights=spans))
            wins.append(_win(sum(a * s * t for s, t, _, a in entries) / sum(spans)))
            lod_wins.append(_win(sum(a * (1 if lod else -1) * t for _, t, lod, a in entries) / sum(spans)))
            for score, target, lod in zip(picked, targets, lods, strict=True):
                by_lod[lod].append(reference.preference_loss([score], [target], **kind))
    if switches.name == "span_advantages":
        preference, weights = _span_terms(sequences, average, variance), []
    return {
        "mc/preference_loss": weighted_mean(preference, weights),
        "mc/rank_loss": weighted_mean(rank, weights),
        "mc/preference_agreement": mean(wins),
        "mc/preference_agreement_lod_only": mean(lod_wins),
        "mc/preference_pair_count": len(wins),
        "mc/preference_tie_share": mean(ties),
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(chosen) - mean(rejected),
        "rewards/accuracies": mean([c > r for c, r in zip(chosen, rejected, strict=True)]),
        **{f"mc/lod_loss/{lod}": mean(losses) for lod, losses in enumerate(by_lod)},
    }


def _pair_weight(row: Row, better: int, worse: int, recipe: Recipe) -> float:
    """Importance weight of the two variants: how much rather the policy draws them than one that draws any."""
    if recipe.objective.pair_weights == "none":
        return 1.0
    odds = {v: math.exp(recipe.hyper.beta * row.value(v)) for v in row.compared}
    ratios = [odds[v] / sum(odds.values()) * len(odds) for v in (better, worse)]
    return min(math.prod(ratios), MOST_PAIR_WEIGHT)


def _span_terms(sequences: list[Row], average: float, variance: float) -> list[float]:
    """Of each sequence with entries that have a baseline, minus their policy gradient."""
    terms = []
    for row in sequences:
        advantages = [(delta - average) / math.sqrt(variance + EPS) for delta in row.deltas]
        compared = [v in row.compared for v in range(len(row.losses))]
        by_span = reference.span_advantages(advantages, row.entries, compared, row.geometry)
        entries = [
            (row.span(entry), gained, finer, score)
            for v, found in enumerate(by_span)
            for one, entry, score in zip(found, row.entries[v], row.scores[v], strict=True)
            if one is not None
            for gained, finer in [one]
        ]
        if entries:
            total = sum(span * gained * finer * score for span, gained, finer, score in entries)
            terms.append(-total / sum(span for span, *_ in entries))
    return terms


def _win(margin: float) -> float:
    return 0.5 if abs(margin) < 1e-6 else float(margin > 0)


def _regularizers(sequences: list[Row], average: float | None, temperature: float, *, with_kl: bool) -> Report:
    balances = [row.balance(v) for row in sequences for v in row.distinct]
    average = mean(balances) if average is None else average
    report = {
        "mc/budget_loss": mean([balance**2 for balance in balances]),
        "mc/smooth_loss": mean([(balance - average) ** 2 for balance in balances]),
    }
    if with_kl:
        kl = mean([row.kl(v, temperature) for row in sequences for v in row.distinct])
        report |= {"mc/kl_loss": kl, "kl": kl}
    return report


def _reward_report(sequences: list[Row]) -> Report:
    rollouts = [(row, v) for row in sequences for v in row.distinct if v > 0]
    deltas = [row.deltas[v] for row, v in rollouts]
    correlations = [c for row in sequences if (c := row.correlation()) is not None]
    distinct_losses = [[row.losses[v] for v in row.distinct] for row in sequences]
    return {
        "mc/adv_delta_mean": mean(deltas),
        "mc/adv_delta_std": std(deltas),
        "mc/adv_delta_p95": float(np.percentile(deltas, 95)) if deltas else 0.0,
        "mc/preference_corr_mean": mean(correlations, math.nan),
        "mc/preference_corr_max": max(correlations, default=math.nan),
        "mc/preference_corr_min": min(correlations, default=math.nan),
        "mc/preference_corr_defined_share": len(correlations) / len(sequences),
        "mc/distinct_share": len(rollouts) / sum(len(row.losses) - 1 for row in sequences),
        "nll_baseline": mean([row.losses[0] for row in sequences]),
        "nll_rollout_mean": mean([row.losses[v] for row, v in rollouts]),
        "nll_rollout_best": mean(
            [min(row.losses[v] for v in row.distinct if v > 0) for row in sequences if len(row.distinct) > 1]
        ),
        "reward_mean": -mean([loss for losses in distinct_losses for loss in losses]),
        "reward_std": std([loss for losses in distinct_losses for loss in losses]),
        "frac_reward_zero_std": mean([max(losses) == min(losses) for losses in distinct_losses]),
    }


def _score_report(sequences: list[Row]) -> Report:
    sizes, wishes, spreads = [], [], []
    for row in sequences:
        for v in row.distinct:
            free = [(row.scores[v][i], row.entries[v][i][1]) for i in row.free(v)]
            sizes += [abs(score) for score, _ in free]
            wishes += [(s > 0 and lod > 0) or (s < 0 and lod < row.geometry.max_lod) for s, lod in free]
            spreads += [std([score for score, _ in free])] if free else []
    return {
        "mc/policy_score_abs_mean": mean(sizes),
        "mc/policy_score_std_mean": mean(spreads),
        "mc/edit_wish_rate": mean(wishes),
    }
