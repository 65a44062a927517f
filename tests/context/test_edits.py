"""Sampled edits: every probability by enumeration, and what the draws do to a context."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lensjax.context import allocator, edits
from lensjax.context.allocator import FocusConfig, FocusState
from lensjax.context.edits import Swaps
from tests import reference
from tests.context.situations import DEEP, FLAT, HAND, WIDE, by_node, flags, random_cases, row_of, state_of
from tests.small import jit

geometries = pytest.mark.parametrize("geometry", [DEEP, WIDE, FLAT], ids=["deep", "wide", "flat"])
TEMPERATURE = 0.3


def rows_log_prob(geometry):
    def log_prob(swaps, state, scores, other):
        return edits.log_prob(swaps, state, scores, geometry, temperature=TEMPERATURE, reference=other)

    return jax.vmap(log_prob)


@functools.cache
def compiled_log_prob(geometry):
    return jit(rows_log_prob(geometry))


@functools.cache
def compiled_draw(geometry, draws, temperature=TEMPERATURE, cooldown=1):
    def draw(key, state, scores):
        return edits.draw(key, state, scores, geometry, draws=draws, temperature=temperature, cooldown=cooldown)

    return jit(jax.vmap(draw))


def situations(geometry, seed, rows):
    """Contexts before a step, what cools in them, the scores of two policies: for the reference and as arrays."""
    cases, other = random_cases(geometry, seed, rows), random_cases(geometry, seed + 1, rows)
    cooling = [by_node(row, geometry) for row in np.asarray(cases.state.cooling)]
    scores = [by_node(row, geometry) for row in cases.scores]
    return cases, cooling, scores, other.scores


def swaps_of(pairs, geometry):
    """Swaps of nodes, None to keep, as arrays."""
    table = reference.nodes(geometry)
    numbers = [(len(table),) * 2 if pair is None else tuple(map(table.index, pair)) for pair in pairs]
    return Swaps(*np.asarray(numbers, np.int32).reshape(-1, 2).T)


def swapped(entries, pair, geometry):
    if pair is None:
        return list(entries)
    allocator = reference.Allocator(entries, geometry, {})
    allocator.expand(pair[0])
    allocator.collapse(pair[1])
    return sorted(allocator.entries)


def first_choices(table):
    """Probability of each node to be expanded, and of None; and of each block, once that node is."""
    first, second = {}, {}
    for pair, p in table.items():
        gist = None if pair is None else pair[0]
        first[gist] = first.get(gist, 0.0) + p
        second.setdefault(gist, {})[pair] = p
    return first, {gist: {pair: p / first[gist] for pair, p in rest.items()} for gist, rest in second.items()}


def entropy_of(probabilities):
    return -sum(p * math.log(p) for p in probabilities)


@geometries
def test_every_swap_has_the_probability_that_enumeration_gives_it(geometry):
    cases, cooling, scores, other = situations(geometry, 0, 24)
    log_prob = compiled_log_prob(geometry)
    found, expected, seen = [], [], 0
    for row, entries in enumerate(cases.entries):
        table, theirs = (
            reference.swap_probabilities(entries, entries, values, geometry, cooling[row], temperature=TEMPERATURE)
            for values in (scores[row], by_node(other[row], geometry))
        )
        (first, second), (first_theirs, second_theirs) = first_choices(table), first_choices(theirs)
        assert table.keys() == theirs.keys()
        for pair, p in table.items():
            gist = None if pair is None else pair[0]
            one, one_theirs = second[gist], second_theirs[gist]
            expected.append(
                (
                    math.log(p),
                    entropy_of(first.values()) + entropy_of(one.values()),
                    sum(q * math.log(q / first_theirs[x]) for x, q in first.items())
                    + sum(q * math.log(q / one_theirs[x]) for x, q in one.items()),
                )
            )
            found.append((row, swaps_of([pair], geometry)))
            seen += pair is not None
    rows = np.asarray([row for row, _ in found])
    swaps = jax.tree.map(lambda *leaves: np.stack(leaves), *(swaps for _, swaps in found))
    stats = log_prob(swaps, row_of(cases.state, rows), cases.scores[rows], other[rows])
    assert seen > 24
    np.testing.assert_allclose(np.stack(jax.tree.leaves(stats), 1), expected, rtol=2e-4, atol=2e-5)


@geometries
def test_later_draws_go_on_from_the_context_that_the_earlier_ones_left(geometry):
    cases, cooling, scores, other = situations(geometry, 2, 24)
    rng = np.random.default_rng(0)
    swaps, expected = [], []
    for row, entries in enumerate(cases.entries):
        now, pairs, log_prob = list(entries), [], 0.0
        for _ in range(3):
            table = reference.swap_probabilities(
                entries, now, scores[row], geometry, cooling[row], temperature=TEMPERATURE
            )
            # Swaps rather than none, where there are any.
            pair = list(table)[rng.integers(min(1, len(table) - 1), len(table))]
            pairs.append(pair)
            log_prob += math.log(table[pair])
            now = swapped(now, pair, geometry)
        swaps.append(swaps_of(pairs, geometry))
        expected.append(log_prob)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *swaps)
    stats = compiled_log_prob(geometry)(stacked, cases.state, cases.scores, other)
    assert np.asarray(stacked.changes).sum() > 24
    np.testing.assert_allclose(stats.log_prob, expected, rtol=2e-4, atol=2e-5)


@geometries
def test_draws_keep_the_length_the_order_of_levels_and_what_cools(geometry):
    cases, _, scores, _ = situations(geometry, 4, 64)
    del scores
    state, swaps = compiled_draw(geometry, 3)(jax.random.split(jax.random.key(0), 64), cases.state, cases.scores)
    before, table = np.asarray(cases.state.collapsed), reference.nodes(geometry)
    assert (np.asarray(state.collapsed).sum(1) == before.sum(1)).all()
    assert np.asarray(swaps.changes).any()
    for row, entries in enumerate(cases.entries):
        now = list(entries)
        for up, down in zip(np.asarray(swaps.expanded)[row], np.asarray(swaps.collapsed)[row], strict=True):
            pair = None if up == len(table) else (table[up], table[down])
            now = swapped(now, pair, geometry)
            if pair:
                assert not np.asarray(cases.state.cooling)[row][[up, down]].any()
        assert np.asarray(state.collapsed)[row].tolist() == flags(now, geometry)
    edited = np.asarray(state.collapsed) != before
    expected = np.where(edited, 1, np.maximum(np.asarray(cases.state.cooling) - 1, 0))
    np.testing.assert_array_equal(state.cooling, expected)


def test_draws_come_as_often_as_they_are_probable():
    count = 20_000
    entries = reference.random_cut(DEEP, 12, np.random.default_rng(3))
    rng = np.random.default_rng(4)
    scores = by_node(rng.uniform(-1, 1, len(reference.nodes(DEEP))), DEEP)
    table = reference.swap_probabilities(entries, entries, scores, DEEP, {}, temperature=TEMPERATURE)
    state = state_of([entries] * count, DEEP)
    rows = np.broadcast_to(np.asarray(list(scores.values()), np.float32), state.collapsed.shape)
    _, swaps = compiled_draw(DEEP, 1)(jax.random.split(jax.random.key(1), count), state, rows)
    drawn = list(
        zip(np.asarray(swaps.expanded)[:, 0].tolist(), np.asarray(swaps.collapsed)[:, 0].tolist(), strict=True)
    )
    assert len(table) > 3
    for pair, p in table.items():
        wanted = swaps_of([pair], DEEP)
        share = drawn.count((int(wanted.expanded[0]), int(wanted.collapsed[0]))) / count
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / count), pair


def cold_draws(geometry, seed):
    cases, cooling, _, _ = situations(geometry, seed, 64)
    # Scores without ties: which of two equal nodes is taken is chance here, and order there.
    rng = np.random.default_rng(7)
    scores = np.stack([rng.permutation(2.0 ** np.arange(cases.scores.shape[1])) for _ in range(64)]).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    return cases, cooling, scores, compiled_draw(geometry, 3, 1e-3)(keys, cases.state, scores)


@geometries
def test_cold_draws_swap_the_pair_of_largest_difference_while_it_is_above_0(geometry):
    cases, cooling, scores, (state, _) = cold_draws(geometry, 6)
    for row, entries in enumerate(cases.entries):
        now, values = list(entries), by_node(scores[row], geometry)
        for _ in range(3):
            table = reference.swap_probabilities(entries, now, values, geometry, cooling[row], temperature=1e3)
            best = max(table.keys() - {None}, key=lambda pair: values[pair[0]] - values[pair[1]], default=None)
            if best and values[best[0]] > values[best[1]]:
                now = swapped(now, best, geometry)
        assert np.asarray(state.collapsed)[row].tolist() == flags(now, geometry)


def test_where_no_gist_is_inside_a_block_cold_draws_are_those_of_the_allocator():
    cases, _, scores, (state, _) = cold_draws(FLAT, 6)
    settings = FocusConfig(max_edits=3, cooldown=1, expand_threshold=-1e9, collapse_threshold=1e9)
    greedy = jit(jax.vmap(lambda state, scores: allocator.swap(state, scores, FLAT, settings=settings)[0]))
    chex_equal(state, greedy(cases.state, scores))


def chex_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_probability_has_the_right_gradient_and_no_use_for_a_constant():
    cases, _, _, other = situations(DEEP, 8, 8)
    keys = jax.random.split(jax.random.key(0), 8)
    _, swaps = compiled_draw(DEEP, 3)(keys, cases.state, cases.scores)
    assert np.asarray(swaps.changes).sum() > 4

    def total(scores):
        # Of three different weights: a fault in one of them cannot make up for another's.
        stats = jax.tree.leaves(rows_log_prob(DEEP)(swaps, cases.state, scores, other))
        return sum(w * jnp.sum(leaf) for w, leaf in zip((1.0, 0.7, 1.9), stats, strict=True))

    def stats(scores):
        return compiled_log_prob(DEEP)(swaps, cases.state, scores, other)

    check_grads(jax.jit(total), (cases.scores,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
    for a, b in zip(jax.tree.leaves(stats(cases.scores)), jax.tree.leaves(stats(cases.scores + 0.5)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_extreme_scores_have_finite_probabilities_and_gradients():
    cases, _, _, other = situations(DEEP, 10, 16)
    scores = 1e4 * np.sign(cases.scores)
    _, swaps = compiled_draw(DEEP, 2)(jax.random.split(jax.random.key(0), 16), cases.state, cases.scores)

    def total(scores):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(rows_log_prob(DEEP)(swaps, cases.state, scores, other)))

    value, gradient = jit(jax.value_and_grad(total))(jnp.asarray(scores, jnp.float32))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_where_no_swap_is_legal_the_context_is_kept_for_certain():
    # All blocks are collapsed as far as can be: there is nothing to pay with.
    entries = min(reference.legal_cuts(HAND), key=len)
    state = state_of([entries], HAND)
    scores = np.ones((1, state.collapsed.shape[1]), np.float32)
    after, swaps = compiled_draw(HAND, 2)(jax.random.split(jax.random.key(0), 1), state, scores)
    assert not np.asarray(swaps.changes).any() and int(swaps.count[0]) == 0
    chex_equal(after, FocusState(state.collapsed, state.cooling))
    stats = compiled_log_prob(HAND)(swaps, state, scores, scores)
    np.testing.assert_allclose(np.stack(jax.tree.leaves(stats)), 0.0, atol=1e-6)
