"""What all functions of arrays promise outside of the losses: their types, of one sequence and of a batch, and finite
gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import nodes, rollouts
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.models import hyperlora
from lensjax.models.decision import Window
from lensjax.training import agreement, levels, nll, preferences, teachers
from lensjax.training.optim import moving, schedules
from lensjax.training.preferences import PairTargets, PreferencePairs
from lensjax.training.scoring import local_rollouts
from tests import reference
from tests.cases import POSITIVE, UNIT, Case, integer, key, mask, stack, uniform
from tests.foreign import ForeignModel

GEOMETRY, MODEL = Geometry(history=24, block_size=2, max_lod=3, recent_tokens=6), ForeignModel()
CAPACITY, LENGTH, VARIANTS, PAIRS, DIM, HORIZON = 20, 17, 4, 5, MODEL.dim, 3
STEP = integer(0, 9)


# How to draw arguments.


def cut(rng):
    return np.asarray(reference.cut_of(reference.random_cut(GEOMETRY, LENGTH, rng), 24, 2), np.int32)


def working_context(rng):
    return reference.context_of(reference.random_cut(GEOMETRY, LENGTH, rng), window=24, capacity=CAPACITY)


def variants(rng):
    return stack([working_context(rng) for _ in range(VARIANTS)])


def pairs(rng):
    drawn = np.asarray([rng.choice(VARIANTS, 2, replace=False) for _ in range(PAIRS)], np.int32)
    return PreferencePairs(drawn[:, 0], drawn[:, 1], uniform(PAIRS, low=0)(rng), mask(PAIRS)(rng))


def pair_targets(rng):
    where = mask(PAIRS, 2, CAPACITY)(rng)
    signs, spans = (rng.choice(choices, where.shape) * where for choices in ([-1, 1], [1, 2, 4]))
    return PairTargets(signs.astype(np.float32), where, spans.astype(np.float32))


def moments(rng):
    return moving.EmaMoments(*(np.asarray(x, np.float32) for x in (0.5, rng.uniform(0, 0.2), 0.4)))


def params(rng):
    return {name: value(rng) for name, value in (("table", uniform(7, DIM)), ("head", uniform(DIM, 7)))}


def tokens(rng):
    return rng.integers(0, 7, 24).astype(np.int32)


def horizon(rng):
    return tokens(rng)[:HORIZON]


def window(rng):
    return Window(tokens(rng), horizon(rng))


def tree(rng, length=19):
    """A tree of some tokens with room for 24."""
    levels = tuple(uniform(24 // 2**lod, DIM)(rng) for lod in range(4))
    return trees.TreeState(levels, np.asarray(length, np.int32), 2)


full_tree = functools.partial(tree, length=24)


def entries(rng):
    return contexts.materialise(full_tree(rng), working_context(rng))


def delta(rng):
    return hyperlora.Delta(*(rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((5, 2), (2, 5))))


def deltas(rng):
    return {"x": delta(rng), "y": delta(rng)}


def gist_fn(children):
    return jnp.tanh(children.sum(axis=1))


# The table.

MOVING = [
    Case("update_moments", moving.update_moments, (moments, uniform(9), mask(9), UNIT), "fff"),
    Case("normalise", moving.normalise, (moments, uniform(9)), "f"),
    Case("init_anchor", moving.init_anchor, (params,), "ff"),
    *(
        Case(
            f"update_anchor {kind}",
            lambda a, b, c, beta, kind=kind: moving.update_anchor(a, b, c, kind=kind, beta=beta),
            (params, params, params, UNIT),
            "ff",
        )
        for kind in ("previous", "ema", "fixed", "stage")
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
            functools.partial(preferences.span_targets, geometry=GEOMETRY, worse_only=worse_only),
            (variants, pairs),
            "fbf",
        )
        for worse_only in (False, True)
    ),
    Case(
        "span_advantages",
        functools.partial(preferences.span_advantages, geometry=GEOMETRY),
        (uniform(VARIANTS), variants, mask(VARIANTS)),
        "ffb",
    ),
    Case(
        "compare_levels",
        functools.partial(levels.compare_levels, geometry=GEOMETRY),
        (variants, mask(VARIANTS)),
        "bbfb",
    ),
    Case(
        "conflicts",
        lambda v, w, a: levels.conflicts(levels.compare_levels(v, w, GEOMETRY), a),
        (variants, mask(VARIANTS), uniform(VARIANTS)),
        "b",
    ),
    Case(
        "span_contrasts",
        lambda x, v, w, t: levels.span_contrasts(x, v, w, GEOMETRY, threshold=t),
        (uniform(VARIANTS), variants, mask(VARIANTS), UNIT),
        "ffb",
    ),
    Case("level_distances", functools.partial(levels.level_distances, geometry=GEOMETRY), (variants,), "f"),
    Case(
        "pair_weights",
        lambda v, p, w, b, m: preferences.pair_weights(v, p, w, beta=b, most=m),
        (uniform(VARIANTS), pairs, mask(VARIANTS), POSITIVE, POSITIVE),
        "f",
    ),
    Case("pair_margins", agreement.pair_margins, (uniform(VARIANTS, CAPACITY), pair_targets, pairs), "f"),
    Case("agreement", agreement.agreement, (uniform(PAIRS), mask(PAIRS)), "fi"),
    Case("success", agreement.success, (uniform(PAIRS), uniform(PAIRS), mask(PAIRS)), "f"),
    Case("lod_only_scores", agreement.lod_only_scores, (variants,), "f"),
    Case(
        "variant_values",
        functools.partial(agreement.variant_values, geometry=GEOMETRY),
        (uniform(VARIANTS, CAPACITY), variants),
        "f",
    ),
    Case("correlation", agreement.correlation, (uniform(VARIANTS), uniform(VARIANTS), mask(VARIANTS)), "fb"),
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
    Case("recency", lambda n: contexts.recency(n, GEOMETRY, capacity=24), (integer(7, 24),), "iib"),
    Case("from_cut", lambda c: contexts.from_cut(c, GEOMETRY, capacity=CAPACITY), (cut,), "iib"),
    Case("to_cut", lambda c: contexts.to_cut(c, GEOMETRY), (working_context,), "i"),
    Case("spans", lambda c: contexts.spans(c, block_size=2), (working_context,), "i"),
    Case("materialise", contexts.materialise, (full_tree, working_context), "fffiffb"),
    Case("in_full", contexts.in_full, (uniform(4, DIM), uniform(4)), "fffiffb"),
    Case(
        "invariants",
        lambda c, n: contexts.invariants(c, GEOMETRY, length=n),
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
    Case("reading", functools.partial(nll.reading, MODEL), (params, entries, horizon), "fffiffbi"),
    Case("token_nll", functools.partial(nll.token_nll, MODEL), (params, entries, horizon), "f"),
    Case(
        "variant_nll",
        functools.partial(nll.variant_nll, MODEL, geometry=GEOMETRY),
        (params, full_tree, variants, horizon),
        "ffffiffb",
    ),
    Case("entry_nll", lambda *a: nll.entry_nll(MODEL, *a, horizon=HORIZON), (params, entries, tokens), "f"),
    Case("sequence_nll", lambda p, t: nll.sequence_nll(MODEL, p, t), (params, tokens), "f"),
]
TEACHERS = [
    Case("of_blocks", lambda x: nodes.of_blocks(x, GEOMETRY), (uniform(GEOMETRY.blocks(1)),), "f"),
    Case(
        "gate_gradients",
        lambda p, w, a: teachers.gate_gradients(MODEL, p, w, GEOMETRY, weights=a, points=2),
        (params, window, uniform(HORIZON, low=0)),
        "f",
    ),
]
SCHEDULES = [
    Case("progress", lambda i: schedules.progress(i, 8), (STEP,), "f"),
    Case("linear", lambda i, a, b: schedules.linear(i, start=a, end=b, steps=8), (STEP, UNIT, UNIT), "f"),
    Case(
        "exponential",
        lambda i, a, b, c: schedules.exponential(i, start=a, decay=b, floor=c),
        (STEP, POSITIVE, POSITIVE, UNIT),
        "f",
    ),
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
TABLE = MOVING + PREFERENCES + CUTS + TREES + NLL + TEACHERS + SCHEDULES + HYPERLORA


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_output_types(case):
    case.check_types()


@pytest.mark.parametrize("case", [case for case in TABLE if "f" in case.outputs], ids=lambda case: case.name)
def test_gradients_are_finite(case):
    def total(arguments):
        results = jax.tree.leaves(case.function(*arguments))
        return sum(leaf.sum() for leaf in results if leaf.dtype == jnp.float32)

    rows = stack([case.draw(seed) for seed in range(3)])
    for leaf in jax.tree.leaves(jax.jit(jax.vmap(jax.grad(total, allow_int=True)))(rows)):
        assert leaf.dtype == jax.dtypes.float0 or np.isfinite(leaf).all()
