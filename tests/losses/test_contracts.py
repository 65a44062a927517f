"""What all losses promise, whatever they compute: a mean over what counts, which hides nothing but what does not count.

Each loss is compiled once, over rows that are drawn, extreme, masked and broken; the tests look at these rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from lensjax import losses
from lensjax.losses import advantages, credit, curvature, sets, trajectories
from tests.cases import POSITIVE, UNIT, Case, choice, key, mask, stack, uniform

COUNT = 20
SCORES, WHERE, SIGNS, SPANS = uniform(COUNT), mask(COUNT), choice(COUNT, -1, 1), choice(COUNT, 1, 2, 4)
NAN, INF = np.float32(np.nan), np.float32(np.inf)


def preference(name: str, function: Callable[..., Any], **static: str) -> Case:
    def call(scores, targets, where, gap, temperature, collapse_weight):
        hyper = {"gap": gap, "temperature": temperature, "collapse_weight": collapse_weight}
        return function(scores, targets, where, **hyper, **static)

    return Case(name, call, (SCORES, SIGNS, WHERE, POSITIVE, POSITIVE, POSITIVE), "f")


def softly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A preference loss with label smoothing and margins by strength."""
    return functools.partial(function, label_smoothing=0.1, gap_margin=0.3)


def group(function: Callable[..., Any], *hyper: str) -> Case:
    """An objective over a group of variants, with its hyperparameters by name."""
    names = hyper or ("beta",)

    def call(scores, rewards, where, *values):
        return function(scores, rewards, where, **dict(zip(names, values, strict=True)))

    return Case(function.__name__, call, (SCORES, SCORES, WHERE, *(POSITIVE for _ in names)), "f")


# The first argument of every loss is the scores, and its third the mask.
LOSSES = [
    preference("preference_entry_losses", losses.preference_entry_losses),
    preference("preference_loss entry", losses.preference_loss, granularity="entry"),
    preference("preference_loss pair", losses.preference_loss, granularity="pair"),
    preference("preference_loss softened", softly(losses.preference_loss), granularity="entry"),
    preference("preference_loss softened pair", softly(losses.preference_loss), granularity="pair"),
    preference("preference_entry_losses softened", softly(losses.preference_entry_losses)),
    Case(
        "logistic softened, of some gaps",
        lambda s, r, w, b, g: softly(losses.logistic)(s, r, w, beta=b, gap_range=(0.0, g)),
        (SCORES, SCORES, WHERE, POSITIVE, POSITIVE),
        "f",
    ),
    Case("attribution_loss", losses.attribution_loss, (SCORES, SCORES, WHERE), "f"),
    Case(
        "attribution_loss with weights",
        lambda s, a, w, c: losses.attribution_loss(s, a, w, weights=c),
        (SCORES, SCORES, WHERE, SPANS),
        "f",
    ),
    preference("preference_entry_losses squared", losses.preference_entry_losses, form="squared"),
    preference("preference_loss squared", losses.preference_loss, form="squared"),
    Case("rank_loss", lambda s, t, w, m: losses.rank_loss(s, t, w, margin=m), (SCORES, SIGNS, WHERE, UNIT), "f"),
    Case(
        "rank_loss with weights",
        lambda s, t, w, m, a: losses.rank_loss(s, t, w, margin=m, weights=a),
        (SCORES, SIGNS, WHERE, UNIT, SPANS),
        "f",
    ),
    Case("budget_balance", losses.budget_balance, (SCORES, SPANS, WHERE), "f"),
    Case("budget_loss", losses.budget_loss, (SCORES, SPANS, WHERE), "f"),
    Case(
        "budget_smoothing_loss",
        lambda s, a, w, e: losses.budget_smoothing_loss(s, a, w, average=e),
        (SCORES, SPANS, WHERE, UNIT),
        "f",
    ),
    Case(
        "policy_kl", lambda s, a, w, t: losses.policy_kl(s, a, w, temperature=t), (SCORES, SCORES, WHERE, POSITIVE), "f"
    ),
    Case(
        "listwise_distillation",
        lambda s, t, w, x: losses.listwise_distillation(s, t, w, temperature=x),
        (SCORES, SCORES, WHERE, POSITIVE),
        "f",
    ),
    *(group(function) for function in (losses.logistic, losses.hinge, losses.ipo, losses.copg, losses.a_star_po)),
    *(group(losses.plackett_luce), group(losses.disco, "tau"), group(losses.info_nce, "tau")),
    *(group(losses.cpl, "alpha", "bias"), group(losses.info_nca, "alpha", "beta"), group(losses.rpo, "beta", "weight")),
    *(
        Case(
            f"grpo {kind}",
            lambda s, r, w, b, c, kind=kind: losses.grpo(s, r, w, beta=b, clip=c, baseline=kind),
            (SCORES, SCORES, WHERE, POSITIVE, UNIT),
            "f",
        )
        for kind in ("standardised", "mean", "leave_one_out")
    ),
    Case(
        "pg_rank",
        lambda s, r, w, b, k: losses.pg_rank(s, r, w, beta=b, key=k, samples=3),
        # Few: the log-probability of a ranking of many is large, and with it its rounding.
        (uniform(10), uniform(10), mask(10), POSITIVE, key),
        "f",
    ),
    Case("policy_gradient", losses.policy_gradient, (SCORES, SCORES, WHERE), "f"),
    Case("value_loss", losses.value_loss, (SCORES, SCORES, WHERE), "f"),
    Case(
        "clipped_surrogate",
        lambda s, a, w, o, c: losses.clipped_surrogate(s, a, w, old_log_probs=o, clip=c),
        (SCORES, SCORES, WHERE, SCORES, UNIT),
        "f",
    ),
]
ADVANTAGES = [
    Case(
        "generalised_advantages",
        lambda r, v, c, g, t: advantages.generalised_advantages(r, v, c, discount=g, trace_decay=t),
        (SCORES, uniform(COUNT + 1), WHERE, UNIT, UNIT),
        "f",
    ),
    *(
        Case(
            f"group_advantages {kind}",
            lambda r, w, kind=kind: advantages.group_advantages(r, w, baseline=kind),
            (SCORES, WHERE),
            "f",
        )
        for kind in ("mean", "standardised", "leave_one_out")
    ),
    Case("optimal_baseline", advantages.optimal_baseline, (SCORES, uniform(COUNT, low=0), WHERE), "f"),
    Case(
        "importance_weights",
        lambda p, b, m: advantages.importance_weights(p, b, most=m),
        (SCORES, SCORES, POSITIVE),
        "f",
    ),
    Case(
        "blended_advantages",
        lambda r, w, k, b: advantages.blended_advantages(r, w, sharpness=k, threshold=b),
        (uniform(3, 5), mask(3, 5), POSITIVE, POSITIVE),
        "f",
    ),
    Case(
        "most_informative",
        lambda a, e, w, s: advantages.most_informative(a, e, w, share=s),
        (SCORES, uniform(COUNT, low=0), WHERE, UNIT),
        "b",
    ),
    Case("most_varied", lambda v, w: advantages.most_varied(v, w, count=5), (SCORES, WHERE), "b"),
    Case(
        "set_advantages",
        lambda r, d, w: sets.set_advantages(r, d, w, size=3),
        (SCORES, uniform(COUNT, COUNT, low=0), WHERE),
        "f",
    ),
    Case("softmax_curvature", curvature.softmax_curvature, (SCORES, WHERE), "ff"),
    Case("bernoulli_curvature", curvature.bernoulli_curvature, (SCORES, WHERE), "ff"),
    Case(
        "trusted",
        lambda a, n, c, *bounds: curvature.trusted(
            a, n, c, **dict(zip(("step", "low", "high", "shift"), bounds, strict=True))
        ),
        (SCORES, uniform(COUNT, low=0), uniform(COUNT, low=0), POSITIVE, UNIT, UNIT, UNIT),
        "b",
    ),
    Case(
        "contrastive_reward",
        lambda r, d, w, t: credit.contrastive_reward(r, d, w, threshold=t),
        (SCORES, mask(COUNT), WHERE, UNIT),
        "f",
    ),
    Case("conflict_advantages", credit.conflict_advantages, (SCORES, WHERE), "f"),
    Case(
        "group_weights",
        lambda s, w, b, m: credit.group_weights(s, w, beta=b, most=m),
        (SCORES, WHERE, *2 * (POSITIVE,)),
        "f",
    ),
    Case("bernoulli_entropy", credit.bernoulli_entropy, (SCORES,), "f"),
    Case("diverging", trajectories.diverging, (uniform(3, 4), mask(3)), "b"),
    Case("amplified", lambda a, f: trajectories.amplified(a, factor=f), (SCORES, POSITIVE), "f"),
    Case(
        "shared_advantages",
        lambda r, w, t: trajectories.shared_advantages(r, w, t, baseline="standardised"),
        (SCORES, WHERE, mask(COUNT, 4)),
        "f",
    ),
]
every_loss = pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)


def test_the_table_holds_every_loss():
    assert {case.name.split()[0] for case in LOSSES} == set(losses.__all__)


@pytest.mark.parametrize("case", LOSSES + ADVANTAGES, ids=lambda case: case.name)
def test_output_types(case):
    case.check_types()


# The rows, by what they are for.


def rows_of(case):
    """(name, arguments) of every row."""
    scores, other, where, *rest = case.draw(0)
    assert not where.all()
    for seed in range(3):
        yield "drawn", case.draw(seed)
    for score in (0.0, 1e-30, 1e6, -1e6):
        extreme = np.full_like(scores, score)
        for changed in (extreme, np.where(np.arange(len(scores)) % 2 == 0, extreme, scores)):
            yield "extreme", (changed, other, where, *rest)
    for content in (scores, np.full_like(scores, NAN), np.full_like(scores, INF)):
        yield "nothing", (content, other, np.zeros_like(where), *rest)
    for content in (NAN, INF, np.float32(1e30)):
        yield "masked", (np.where(where, scores, content), other, where, *rest)
        yield "masked", (scores, np.where(where, other, content), where, *rest)
    # Where the rest are ties or of one kind, there is nothing to compare.
    for beside in (other, np.ones_like(other)):
        for broken in (*np.eye(len(where), dtype=bool)[where], where):
            yield "broken", (np.where(broken, NAN, scores), beside, where, *rest)
            yield "broken", (scores, np.where(broken, NAN, beside), where, *rest)


@functools.cache
def outcomes(case):
    """Value and gradient of every row, by its name; summed over the result, which one of the losses has by entry."""
    names, rows = zip(*rows_of(case), strict=True)
    function = jax.vmap(jax.value_and_grad(lambda *arguments: case.function(*arguments).sum()))
    values, gradients = jax.tree.map(np.asarray, jax.jit(function)(*stack(list(rows))))
    return {name: [(values[i], gradients[i]) for i, other in enumerate(names) if other == name] for name in names}


@every_loss
@pytest.mark.parametrize("kind", ["drawn", "extreme"])
def test_values_and_gradients_are_finite(case, kind):
    for value, gradient in outcomes(case)[kind]:
        assert np.isfinite(value) and np.isfinite(gradient).all()


@every_loss
def test_nothing_valid_gives_zero_and_no_gradient(case):
    for value, gradient in outcomes(case)["nothing"]:
        assert value == 0 and not gradient.any()


@every_loss
def test_what_is_masked_is_not_read(case):
    """Scores, and beside them rewards, targets, spans, the anchor's scores, advantages."""
    expected, expected_gradient = outcomes(case)["drawn"][0]
    for value, gradient in outcomes(case)["masked"]:
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(gradient, expected_gradient)
        assert not gradient[~case.draw(0)[2]].any()


@every_loss
def test_a_nan_in_a_valid_row_is_not_hidden(case):
    assert all(np.isnan(value) for value, _ in outcomes(case)["broken"])
