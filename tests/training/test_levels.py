"""What variants have in common, by hand and token by token."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.training import levels
from tests import reference
from tests.reference import estimators
from tests.training.pairs import COARSE, FINE, GEOMETRY, HAND, random_variants, variants_of

# The third shows (8, 1) as COARSE does, and all else as FINE does.
MIXED = [*FINE[:5], (8, 1), (10, 0), (11, 0)]
EVERY = np.ones(3, bool)
compare = jax.jit(levels.compare_levels, static_argnames="geometry")
contrasts = jax.jit(levels.span_contrasts, static_argnames="geometry")
distances = jax.jit(levels.level_distances, static_argnames="geometry")


def by_hand():
    return variants_of([FINE, COARSE, MIXED], HAND, capacity=10)


def test_what_is_in_conflict_by_hand():
    found = compare(by_hand(), EVERY, HAND)
    free = np.asarray(found.where)
    conflict = functools.partial(levels.conflicts, found)
    # FINE is good, the others are bad: what it shares with MIXED is in conflict, and the tokens 8 and 9 are its own.
    both = np.asarray(conflict(np.asarray([1.0, -1.0, -2.0])))
    assert (both & free)[0].tolist() == [True, True, True, False, True] + 5 * [False]
    assert not (both & free)[1].any()
    assert (both & free)[2].tolist() == [True, True, True, False, True] + 5 * [False]
    # With COARSE it shares nothing but spans that all show alike, which no action is about; COARSE shares (8, 1).
    both = np.asarray(conflict(np.asarray([0.0, 1.0, -1.0])))
    assert np.argwhere(both & free).tolist() == [[1, 4], [2, 5]]
    assert not np.asarray(conflict(np.asarray([1.0, 2.0, 0.0]))).any()


def test_what_showing_detail_was_worth_by_hand():
    losses = np.asarray([1.0, 2.0, 1.5], "f")
    found, finer, where = contrasts(losses, by_hand(), EVERY, HAND, threshold=0.6)
    # Tokens 0 to 3: FINE and MIXED, 1.25, against 2. Tokens 8 and 9: 1 against 1.75. All want what FINE shows.
    np.testing.assert_array_equal(found[0], [1, 1, 1, 0, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(found[1], [-1, 0, -1, -1, -1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found[2], [1, 1, 1, 0, 1, -1, 0, 0, 0, 0])
    wanted = np.asarray(found * finer)
    assert wanted[0].tolist() == [1, 1, 1, 0, -1, 1, 1, 0, 0, 0]
    assert wanted[1].tolist() == [1, 0, -1, -1, 1, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(where, found != 0)
    # Below the threshold nothing is learned.
    found, _, where = contrasts(losses, by_hand(), EVERY, HAND, threshold=0.75)
    assert not np.asarray(found).any() and not np.asarray(where).any()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31 - 1))
def test_contrasts_equal_a_slow_reference(seed):
    random, cuts = np.random.default_rng(seed), random_variants(seed, length=21)
    losses, valid = random.normal(size=4).astype("f"), random.random(4) < 0.8
    found, finer, where = contrasts(
        np.where(valid, losses, np.nan), variants_of(cuts, GEOMETRY), valid, GEOMETRY, threshold=0.3
    )
    every = compare(variants_of(cuts, GEOMETRY), valid, GEOMETRY).finer
    for v, entries in enumerate(cuts):
        for i, entry in enumerate(entries):
            doing = [-losses[u] for u in range(4) if valid[u] and entry in cuts[u]]
            others = [
                -losses[u]
                for u in range(4)
                if valid[u] and reference.span_targets(entries, cuts[u], GEOMETRY)[0][i] is not None
            ]
            expected = estimators.contrast(doing, others, threshold=0.3) if valid[v] else 0
            assert found[v, i] == expected and where[v, i] == (expected != 0)
            assert finer[v, i] == (every[v, i] if expected else 0)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31 - 1))
def test_distances_are_shares_of_the_tokens(seed):
    cuts = random_variants(seed, length=21)
    found = np.asarray(distances(variants_of(cuts, GEOMETRY), GEOMETRY))
    expected = [[estimators.level_distance(one, other, GEOMETRY) for other in cuts] for one in cuts]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found == found.T).all() and not np.diag(found).any()


def test_distances_by_hand():
    found = distances(by_hand(), HAND)
    # Of 10 free tokens FINE shows 0 to 3 and 6 to 9 as COARSE does not; MIXED differs from it in 8 and 9.
    np.testing.assert_allclose(found, [[0, 0.8, 0.2], [0.8, 0, 0.6], [0.2, 0.6, 0]], rtol=1e-6)


@pytest.mark.parametrize("content", [np.nan, np.inf])
def test_a_broken_loss_is_not_hidden(content):
    losses = np.asarray([1.0, content, 1.5], "f")
    found, _, where = contrasts(losses, by_hand(), EVERY, HAND, threshold=0.6)
    assert where[0, 0] and (np.isnan(content) == np.isnan(found[0, 0]))
