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
        self.context, self.keep, self.recipe = recipe.context, recipe.objective.keep, recipe
        self.geometry = recipe.geometry
        self.distinct = [v for v in range(count) if scored.distinct[v]]
        self.entries = [
            reference.entries_of(jax.tree.map(lambda leaf, v=v: leaf[v], scored.contexts)) for v in range(count)
        ]
        self.scores = [[float(s) for s in scores[v]][: len(self.entries[v])] for v in range(count)]
        self.anchor = None if anchor is None else [[float(s) for s in row] for row in anchor]
        self.losses = [float(loss) for loss in scored.nll]
        self.deltas = [loss - self.losses[0] for loss in self.losses]
        self.worth = None if scored.worth is None else [float(worth) for worth in scored.worth]

    @property
    def compared(self) -> list[int]:
        """Variants that are in pairs and groups: of those that may be, the ones whose losses vary most."""
        return [] if self.is_taught else self.comparable

    @property
    def is_taught(self) -> bool:
        """Whether too few of the rollouts are any good for it to learn from them."""
        if self.recipe.objective.gate == "none":
            return False
        rollouts = [v for v in self.comparable if v > 0]
        good = mean([self.deltas[v] <= -self.recipe.hyper.gate_gain for v in rollouts])
        return good <= self.recipe.hyper.gate

    @property
    def comparable(self) -> list[int]:
        """Variants that would be compared without a teacher."""
        found = [v for v in self.distinct if v > 0 or self.context.local_edits == 0]
        if self.keep is None or self.keep >= len(found):
            return found
        return list(max(itertools.combinations(found, self.keep), key=lambda some: std([self.losses[v] for v in some])))

    def free(self, v: int) -> list[int]:
        """Entries outside the protected tail."""
        return [i for i, (start, _) in enumerate(self.entries[v]) if start < self.geometry.tail]

    def span(self, entry: Entry) -> int:
        return len(reference.covered(entry, self.geometry.block_size))

    def lesson(self) -> float:
        """How far the scores of the rollouts are from what the teacher says."""
        assert self.worth is not None
        size, blocks = self.geometry.block_size, self.geometry.blocks(1)
        worths, tau, losses = self.worth[:blocks], self.recipe.distill.temperature, []
        for v in self.distinct[1:]:
            logits = [math.atanh(score) for score in self.scores[v]]
            nodes = [reference.node_score((size * b, 1), self.entries[v], logits, size) for b in range(blocks)]
            losses.append(reference.listwise_distillation(nodes, worths, temperature=tau))
        return mean(losses)

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
    is_second: bool = False,
) -> Report:
    """What `lens_objective` reports.

    Moments are debiased, None before the first update. The weights are those of `recipe.hyper`.
    """
    sequences = rows(scored, scores, anchor_scores, recipe)
    report = _pair_report(sequences, advantage_moments, temperature, recipe, is_second)
    report |= _regularizers(sequences, balance_average, temperature, with_kl=anchor_scores is not None)
    hyper = recipe.hyper
    weights = {
        "preference": 1.0,
        "rank": hyper.rank_weight,
        "budget": hyper.budget_weight,
        "smooth": hyper.smooth_weight,
        "kl": hyper.kl_weight,
    }
    if hyper.attribution_weight:
        terms = _attribution_terms(sequences, *(advantage_moments or (0.0, 1.0)))
        report["mc/attribution_loss"], weights["attribution"] = mean(terms), hyper.attribution_weight
    if recipe.objective.gate == "teacher":
        taught = [row for row in sequences if row.is_taught]
        share = len(taught) / len(sequences)
        masses = [sum(row.worth[: row.geometry.blocks(1)]) for row in taught]
        report["mc/lesson_loss"] = weighted_mean([row.lesson() for row in taught], masses) if any(masses) else 0.0
        report["mc/taught_share"] = share
        weights = {
            name: weight * (1 - share if name in ("preference", "rank", "attribution") else 1.0)
            for name, weight in weights.items()
        }
        weights["lesson"] = share
    report["mc/lens_loss"] = sum(weight * report.get(f"mc/{name}_loss", 0.0) for name, weight in weights.items())
    average, variance = advantage_moments or (0.0, 1.0)
    report |= {"mc/adv_ema_mean": average, "mc/adv_ema_std": math.sqrt(variance)}
    return report | _reward_report(sequences) | _score_report(sequences)


def _pair_report(
    sequences: list[Row], moments: tuple[float, float] | None, temperature: float, recipe: Recipe, is_second: bool
) -> Report:
    hyper, switches = recipe.hyper, recipe.objective
    average, variance = moments or (0.0, 1.0)
    preference, rank, weights, wins, lod_wins, chosen, rejected, ties = [], [], [], [], [], [], [], []
    by_lod: list[list[float]] = [[] for _ in range(recipe.context.max_lod + 1)]
    for row, pairs in zip(sequences, _pairs(sequences, recipe, is_second), strict=True):
        advantages = [(delta - average) / math.sqrt(variance + EPS) for delta in row.deltas]
        combinations = [(v, w) for v in row.distinct for w in row.distinct if v < w]
        ties.append(mean([row.losses[v] == row.losses[w] for v, w in combinations]))
        for better, worse, _ in pairs:
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
                "label_smoothing": hyper.label_smoothing,
                "gap_margin": hyper.gap_margin,
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


def _pairs(sequences: list[Row], recipe: Recipe, is_second: bool) -> list[list[tuple[int, int, float]]]:
    """(better, worse, gap) of the pairs of each sequence that are learned from."""
    ratio, most = recipe.hyper.hard_negative_ratio, recipe.objective.max_pairs
    found = []
    for row in sequences:
        compared = [v in row.compared for v in range(len(row.losses))]
        options = {"hard_negative_ratio": ratio, "max_pairs": most}
        found.append(reference.select_pairs(row.losses, compared, **options) if any(compared) else [])
    if recipe.objective.stages == "one":
        return found
    low, high = easy_gaps([gap for pairs in found for *_, gap in pairs], recipe.hyper.easy_quantile, is_second)
    return [[pair for pair in pairs if low <= pair[2] < high] for pairs in found]


def easy_gaps(gaps: list[float], quantile: float, is_second: bool) -> tuple[float, float]:
    """Gaps that a stage learns from: up to how many of them are smaller, whatever is above is easy."""
    ranked = sorted(gaps)
    place = math.ceil(quantile * len(ranked) - 1e-4)
    easy = ranked[place] if place < len(ranked) else math.inf
    return (0.0, easy) if is_second else (easy, math.inf)


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
    for entries in _spans(sequences, average, variance):
        total = sum(span * gained * finer * score for span, gained, finer, score in entries)
        terms.append(-total / sum(span for span, *_ in entries))
    return terms


def _attribution_terms(sequences: list[Row], average: float, variance: float) -> list[float]:
    """Of each such sequence, how little the scores follow what its spans were worth."""
    terms = []
    for entries in _spans(sequences, average, variance):
        spans, gained, finer, scores = zip(*entries, strict=True)
        attributions = [a * d for a, d in zip(gained, finer, strict=True)]
        terms.append(reference.attribution_loss(scores, attributions, spans))
    return terms


def _spans(sequences: list[Row], average: float, variance: float) -> list[list[tuple[float, ...]]]:
    """(tokens covered, advantage, sign of the level, score) of the entries that have a baseline, by sequence."""
    found_entries = []
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
            found_entries.append(entries)
    return found_entries


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
