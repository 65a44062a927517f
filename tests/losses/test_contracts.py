"""One table over every loss and component: what all of them promise, whatever they compute."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import losses
from lensjax.context import rollouts
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.geometry import CutGeometry
from lensjax.context.working import WorkingContext
from lensjax.losses import advantages
from lensjax.models import hyperlora
from lensjax.training import nll, preferences
from lensjax.training.optim import moving, schedules
from lensjax.training.preferences import PairTargets, PreferencePairs
from lensjax.training.scoring import local_rollouts
from tests import reference

BATCH = 3
GEOMETRY = CutGeometry(window=24, block_size=2, max_lod=3, recent_tokens=6)
CAPACITY, LENGTH, VARIANTS, PAIRS, DIM, HORIZON = 20, 17, 4, 5, reference.TinyModel.dim, 3
SHAPE = {"window": 24, "block_size": 2, "recent_tokens": 6}
MODEL = reference.TinyModel()

Make = Callable[[np.random.Generator], Any]


@dataclass(frozen=True)
class Case:
    """One function of arrays, how to draw its arguments for one sequence, and the types of its results."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Make, ...]
    outputs: str  # one letter a leaf: f float32, i int32, b bool

    def draw(self, seed: int) -> tuple[Any, ...]:
        rng = np.random.default_rng(seed)
        return tuple(make(rng) for make in self.arguments)

    @functools.cached_property
    def jitted(self) -> Callable[..., Any]:
        return jax.jit(self.function)


# How to draw arguments.


def uniform(*shape: int, low: float = -1, high: float = 1) -> Make:
    return lambda rng: rng.uniform(low, high, shape).astype(np.float32)


def integer(low: int, high: int) -> Make:
    return lambda rng: np.asarray(rng.integers(low, high + 1), np.int32)


def mask(*shape: int) -> Make:
    def draw(rng: np.random.Generator) -> np.ndarray:
        where = rng.random(shape) < 0.7
        where[0] = True
        return where

    return draw


def signs(rng: np.random.Generator) -> np.ndarray:
    return rng.choice([-1, 1], CAPACITY).astype(np.float32)


def spans(rng: np.random.Generator) -> np.ndarray:
    return rng.choice([1, 2, 4], CAPACITY).astype(np.float32)


def key(rng: np.random.Generator) -> jax.Array:
    return jax.random.key(int(rng.integers(2**31)))


def cut(rng: np.random.Generator) -> np.ndarray:
    entries = reference.random_cut(GEOMETRY, LENGTH, rng)
    return np.asarray(reference.cut_of(entries, 24, 2), np.int32)


def working_context(rng: np.random.Generator) -> WorkingContext:
    return reference.context_of(reference.random_cut(GEOMETRY, LENGTH, rng), window=24, capacity=CAPACITY)


def variants(rng: np.random.Generator) -> WorkingContext:
    return jax.tree.map(lambda *rows: np.stack(rows), *(working_context(rng) for _ in range(VARIANTS)))


def pairs(rng: np.random.Generator) -> PreferencePairs:
    drawn = np.asarray([rng.choice(VARIANTS, 2, replace=False) for _ in range(PAIRS)], np.int32)
    return PreferencePairs(drawn[:, 0], drawn[:, 1], uniform(PAIRS, low=0)(rng), mask(PAIRS)(rng))


def pair_targets(rng: np.random.Generator) -> PairTargets:
    where = mask(PAIRS, 2, CAPACITY)(rng)
    signs, spans = (rng.choice(choices, where.shape) * where for choices in ([-1, 1], [1, 2, 4]))
    return PairTargets(signs.astype(np.float32), where, spans.astype(np.float32))


def moments(rng: np.random.Generator) -> moving.EmaMoments:
    return moving.EmaMoments(*(np.asarray(x, np.float32) for x in (0.5, rng.uniform(0, 0.2), 0.4)))


def params(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: value(rng) for name, value in (("table", uniform(7, DIM)), ("head", uniform(DIM, 7)))}


def tokens(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 7, 24).astype(np.int32)


def horizon(rng: np.random.Generator) -> np.ndarray:
    return tokens(rng)[:HORIZON]


def gist_fn(children: jax.Array) -> jax.Array:
    return jnp.tanh(children.sum(axis=1))


def tree(rng: np.random.Generator) -> trees.TreeState:
    """A tree of 19 tokens with room for 24."""
    levels = tuple(uniform(24 // 2**lod, DIM)(rng) for lod in range(4))
    return trees.TreeState(levels, np.asarray(19, np.int32), 2)


def full_tree(rng: np.random.Generator) -> trees.TreeState:
    return trees.TreeState(tree(rng).levels, np.asarray(24, np.int32), 2)


def entries(rng: np.random.Generator) -> contexts.Entries:
    return materialised(full_tree(rng), working_context(rng))


materialised = jax.jit(contexts.materialise)


# The table.

SCORES, WHERE = uniform(CAPACITY), mask(CAPACITY)
POSITIVE, UNIT = uniform(low=0.2, high=2), uniform(low=0, high=0.9)
STEP = integer(0, 9)


def preference(name: str, function: Callable[..., Any], **static: str) -> Case:
    def call(scores, targets, where, gap, temperature, collapse_weight):
        hyper = {"gap": gap, "temperature": temperature, "collapse_weight": collapse_weight}
        return function(scores, targets, where, **hyper, **static)

    return Case(name, call, (SCORES, signs, WHERE, POSITIVE, POSITIVE, POSITIVE), "f")


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
    preference("preference_entry_losses squared", losses.preference_entry_losses, form="squared"),
    preference("preference_loss squared", losses.preference_loss, form="squared"),
    Case("rank_loss", lambda s, t, w, m: losses.rank_loss(s, t, w, margin=m), (SCORES, signs, WHERE, UNIT), "f"),
    Case(
        "rank_loss with weights",
        lambda s, t, w, m, a: losses.rank_loss(s, t, w, margin=m, weights=a),
        (SCORES, signs, WHERE, UNIT, spans),
        "f",
    ),
    Case("budget_balance", losses.budget_balance, (SCORES, spans, WHERE), "f"),
    Case("budget_loss", losses.budget_loss, (SCORES, spans, WHERE), "f"),
    Case(
        "budget_smoothing_loss",
        lambda s, a, w, e: losses.budget_smoothing_loss(s, a, w, average=e),
        (SCORES, spans, WHERE, UNIT),
        "f",
    ),
    Case(
        "policy_kl", lambda s, a, w, t: losses.policy_kl(s, a, w, temperature=t), (SCORES, SCORES, WHERE, POSITIVE), "f"
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
        (SCORES, uniform(CAPACITY + 1), WHERE, UNIT, UNIT),
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
    Case("optimal_baseline", advantages.optimal_baseline, (SCORES, uniform(CAPACITY, low=0), WHERE), "f"),
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
        (SCORES, uniform(CAPACITY, low=0), WHERE, UNIT),
        "b",
    ),
    Case("most_varied", lambda v, w: advantages.most_varied(v, w, count=5), (SCORES, WHERE), "b"),
]

STABILITY = [
    Case("update_moments", moving.update_moments, (moments, SCORES, WHERE, UNIT), "fff"),
    Case("normalise", moving.normalise, (moments, SCORES), "f"),
    Case("init_anchor", moving.init_anchor, (params,), "ff"),
    *(
        Case(
            f"update_anchor {kind}",
            lambda a, b, c, beta, kind=kind: moving.update_anchor(a, b, c, kind=kind, beta=beta),
            (params, params, params, UNIT),
            "ff",
        )
        for kind in ("previous", "ema", "fixed")
    ),
]

PREFERENCES = [
    Case("advantage_deltas", preferences.advantage_deltas, (uniform(VARIANTS),), "f"),
    Case(
        "select_pairs",
        lambda x, v, r: preferences.select_pairs(x, v, hard_negative_ratio=r, max_pairs=PAIRS),
        (uniform(VARIANTS), mask(VARIANTS), UNIT),
        "iifb",
    ),
    Case("tie_share", preferences.tie_share, (uniform(VARIANTS), mask(VARIANTS)), "f"),
    *(
        Case(
            f"span_targets worse_only={worse_only}",
            functools.partial(preferences.span_targets, worse_only=worse_only, **SHAPE),
            (variants, pairs),
            "fbf",
        )
        for worse_only in (False, True)
    ),
    Case(
        "span_advantages",
        functools.partial(preferences.span_advantages, **SHAPE),
        (uniform(VARIANTS), variants, mask(VARIANTS)),
        "ffb",
    ),
    Case(
        "pair_weights",
        lambda v, p, w, b, m: preferences.pair_weights(v, p, w, beta=b, most=m),
        (uniform(VARIANTS), pairs, mask(VARIANTS), POSITIVE, POSITIVE),
        "f",
    ),
    Case("pair_margins", preferences.pair_margins, (uniform(VARIANTS, CAPACITY), pair_targets, pairs), "f"),
    Case("agreement", preferences.agreement, (uniform(PAIRS), mask(PAIRS)), "fi"),
    Case("lod_only_scores", preferences.lod_only_scores, (variants,), "f"),
    Case(
        "variant_values",
        functools.partial(preferences.variant_values, max_lod=3, **SHAPE),
        (uniform(VARIANTS, CAPACITY), variants),
        "f",
    ),
    Case("correlation", preferences.correlation, (uniform(VARIANTS), uniform(VARIANTS), mask(VARIANTS)), "fb"),
]

CUTS = [
    Case("collapses_for_length", lambda n: rollouts.collapses_for_length(n, GEOMETRY), (integer(6, 24),), "i"),
    Case("length_for_collapses", lambda n: rollouts.length_for_collapses(n, GEOMETRY), (integer(0, 15),), "i"),
    Case("sample_cut", lambda *a: rollouts.sample_cut(*a, GEOMETRY), (key, integer(0, 15), UNIT), "i"),
    Case(
        "sample_rollouts",
        lambda *a: rollouts.sample_rollouts(*a, rollouts=3, geometry=GEOMETRY, capacity=24),
        (key, integer(9, 24), UNIT),
        "iibb",
    ),
    Case(
        "local_rollouts",
        lambda *a: local_rollouts(*a, rollouts=3, edits=2, geometry=GEOMETRY, capacity=24),
        (key, integer(9, 24), UNIT),
        "iibb",
    ),
    Case("baseline", lambda n: contexts.baseline(n, window=24, capacity=24), (integer(7, 24),), "iib"),
    Case("from_cut", lambda c: contexts.from_cut(c, block_size=2, capacity=CAPACITY), (cut,), "iib"),
    Case("to_cut", lambda c: contexts.to_cut(c, window=24), (working_context,), "i"),
    Case("spans", lambda c: contexts.spans(c, block_size=2), (working_context,), "i"),
    Case("materialise", contexts.materialise, (full_tree, working_context), "fffiffb"),
    Case(
        "invariants",
        lambda c, n: contexts.invariants(c, length=n, **SHAPE),
        (working_context, integer(15, 18)),
        "bbbb",
    ),
]

TREES = [
    Case("build", lambda x: trees.build(x, gist_fn, block_size=2, max_lod=3), (uniform(24, DIM),), "ffffi"),
    Case("append", lambda t, x: trees.append(t, x, gist_fn), (tree, uniform(5, DIM)), "ffffi"),
    Case(
        "append padded",
        lambda t, x, n: trees.append(t, x, gist_fn, count=n),
        (tree, uniform(5, DIM), integer(0, 5)),
        "ffffi",
    ),
    Case("lookup", lambda t, i: trees.lookup(t, 8 * i, i), (tree, integer(0, 1)), "f"),
]

NLL = [
    Case("reading", functools.partial(nll.reading, MODEL), (params, entries, horizon), "fffi"),
    Case("token_losses", functools.partial(nll.token_losses, MODEL), (params, entries, horizon), "f"),
    Case(
        "variant_losses",
        functools.partial(nll.variant_losses, MODEL),
        (params, full_tree, variants, horizon),
        "ffffiffb",
    ),
    Case("entry_losses", lambda *a: nll.entry_losses(MODEL, *a, horizon=HORIZON), (params, entries, tokens), "f"),
    Case("sequence_losses", lambda p, t: nll.sequence_losses(MODEL, p, t), (params, tokens), "f"),
]

SCHEDULES = [
    Case("progress", lambda i: schedules.progress(i, 8), (STEP,), "f"),
    Case("linear", lambda i, a, b: schedules.linear(i, start=a, end=b, steps=8), (STEP, UNIT, UNIT), "f"),
    *(
        Case(
            f"learning_rate {name}",
            functools.partial(schedules.learning_rate, schedule=name, warmup_steps=3, steps=9),
            (STEP, UNIT),
            "f",
        )
        for name in ("constant", "linear", "cosine")
    ),
    Case(
        "context_length",
        lambda i, a, b: schedules.context_length(i, start=a, end=b, steps=8, geometry=GEOMETRY, capacity=CAPACITY),
        (STEP, uniform(low=0.4, high=1), uniform(low=0.4, high=1)),
        "i",
    ),
]


def delta(rng: np.random.Generator) -> hyperlora.Delta:
    return hyperlora.Delta(*(rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((5, 2), (2, 5))))


def deltas(rng: np.random.Generator) -> hyperlora.Deltas:
    return {"x": delta(rng), "y": delta(rng)}


HYPERLORA = [
    Case("mix", hyperlora.mix, (uniform(3, 5), delta), "f"),
    Case("mean_context", hyperlora.mean_context, (uniform(VARIANTS, DIM), mask(VARIANTS)), "f"),
    Case("leave_one_out_contexts", hyperlora.leave_one_out_contexts, (uniform(VARIANTS, DIM), mask(VARIANTS)), "fb"),
    Case("leave_one_out_loss", hyperlora.leave_one_out_loss, (uniform(VARIANTS), mask(VARIANTS)), "f"),
    Case("equivariance_loss", hyperlora.equivariance_loss, (deltas, deltas), "f"),
    Case(
        "output_equivariance_loss",
        hyperlora.output_equivariance_loss,
        (uniform(VARIANTS, 7), uniform(VARIANTS, 7), mask(VARIANTS)),
        "f",
    ),
    Case("clamp", hyperlora.clamp, (delta, POSITIVE), "ff"),
    Case("difference_norm", hyperlora.difference_norm, (deltas, deltas), "f"),
]

SMALL, LARGE = LOSSES + ADVANTAGES + STABILITY + SCHEDULES + HYPERLORA, PREFERENCES + CUTS + TREES + NLL
TABLE = SMALL + LARGE
every_case = pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
small_cases_fast = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case in LARGE)) for case in TABLE]
)
every_loss = pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)


def test_the_table_holds_every_loss():
    named = {case.name.split()[0] for case in LOSSES}
    assert named == set(losses.__all__)


@every_case
def test_output_types(case):
    names = {"f": jnp.float32, "i": jnp.int32, "b": jnp.bool_}
    leaves = jax.tree.leaves(jax.eval_shape(case.function, *case.draw(0)))
    assert [leaf.dtype for leaf in leaves] == [names[letter] for letter in case.outputs]
    assert not any(leaf.weak_type for leaf in leaves)


@small_cases_fast
def test_jit_equals_no_jit(case):
    arguments = case.draw(1)
    plain = case.function(*jax.tree.map(jnp.asarray, arguments))
    chex.assert_trees_all_close(case.jitted(*arguments), plain, rtol=1e-5, atol=1e-6)


@small_cases_fast
def test_vmap_equals_a_loop(case):
    rows = [case.draw(seed) for seed in range(BATCH)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(case.jitted(*row) for row in rows))
    found = jax.jit(jax.vmap(case.function))(*batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_other_values_do_not_compile_again(case, compiles):
    case.jitted(*case.draw(2))
    arguments = case.draw(3)
    with compiles() as names:
        case.jitted(*arguments)
    assert names == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in TABLE if "f" in case.outputs], ids=lambda case: case.name)
def test_gradients_are_finite(case):
    def total(arguments):
        results = jax.tree.leaves(case.function(*arguments))
        return sum(leaf.sum() for leaf in results if leaf.dtype == jnp.float32)

    gradients = jax.jit(jax.grad(total, allow_int=True))(case.draw(0))
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jax.dtypes.float0 or np.isfinite(leaf).all()


# Losses: a mean over valid entries that survives everything except a NaN among them.


@functools.cache
def value_and_gradient(case):
    """Summed over the result, since one of the losses is given for each entry."""
    return jax.jit(jax.value_and_grad(lambda *arguments: case.function(*arguments).sum()))


@every_loss
@pytest.mark.parametrize("score", [0.0, 1e-30, 1e6, -1e6])
def test_gradients_are_finite_at_extreme_scores(case, score):
    scores, *rest = case.draw(0)
    for changed in (np.full_like(scores, score), np.where(np.arange(len(scores)) % 2 == 0, np.float32(score), scores)):
        value, gradient = value_and_gradient(case)(changed, *rest)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@every_loss
def test_nothing_valid_gives_zero_and_no_gradient(case):
    scores, other, where, *rest = case.draw(0)
    for content in (scores, np.full_like(scores, np.nan), np.full_like(scores, np.inf)):
        value, gradient = value_and_gradient(case)(content, other, np.zeros_like(where), *rest)
        assert float(value) == 0 and not np.asarray(gradient).any()


@every_loss
def test_masked_scores_are_not_read(case):
    scores, other, where, *rest = case.draw(0)
    assert not where.all()
    expected = value_and_gradient(case)(scores, other, where, *rest)
    for content in (np.nan, np.inf, 1e30):
        found = value_and_gradient(case)(np.where(where, scores, np.float32(content)), other, where, *rest)
        chex.assert_trees_all_equal(found, expected)
    assert not np.asarray(expected[1])[~where].any()


@every_loss
def test_what_is_masked_beside_the_scores_is_not_read(case):
    """Rewards, targets, spans, the anchor's scores, advantages."""
    scores, other, where, *rest = case.draw(0)
    expected = value_and_gradient(case)(scores, other, where, *rest)
    for content in (np.nan, np.inf, 1e30):
        found = value_and_gradient(case)(scores, np.where(where, other, np.float32(content)), where, *rest)
        chex.assert_trees_all_equal(found, expected)


@every_loss
@pytest.mark.parametrize("argument", [0, 1], ids=["score", "other"])
def test_a_nan_in_a_valid_row_is_not_hidden(case, argument):
    scores, other, where, *rest = case.draw(0)
    one_each = np.eye(len(where), dtype=bool)[where]
    # Where the rest are ties or of one kind, there is nothing to compare.
    for beside in (other, np.ones_like(other)):
        for rows in (*one_each, where):
            broken = [scores, beside, where, *rest]
            broken[argument] = np.where(rows, np.float32(np.nan), broken[argument])
            assert np.isnan(value_and_gradient(case)(*broken)[0])
