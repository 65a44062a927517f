"""Span targets and the advantages of spans, by hand and token by token."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.training import agreement, preferences
from tests import reference
from tests.training.pairs import (
    BALANCED,
    COARSE,
    FINE,
    GEOMETRY,
    HAND,
    all_pairs,
    balanced_cuts,
    one_pair,
    pairs_of,
    random_variants,
    targets_of,
    variants_of,
)

by_hand = functools.partial(targets_of, geometry=HAND, capacity=10)


def test_span_targets_by_hand():
    result = by_hand([FINE, COARSE], one_pair(better=0, worse=1))
    better, worse = result.target[0].tolist()
    assert better == [1, 1, 1, 0, -1, 1, 1, 0, 0, 0]
    assert worse == [1, 0, -1, -1, 1, 0, 0, 0, 0, 0]
    assert result.weight[0].tolist() == [[2, 1, 1, 0, 2, 1, 1, 0, 0, 0], [4, 0, 1, 1, 2, 0, 0, 0, 0, 0]]
    # The other way round, every span asks for the opposite.
    mirrored = by_hand([FINE, COARSE], one_pair(better=1, worse=0))
    np.testing.assert_array_equal(mirrored.target[0], -result.target[0, ::-1])


def test_worse_only_scores_the_worse_variant_and_masks_the_illegal():
    result = by_hand([FINE, COARSE], one_pair(better=1, worse=0), worse_only=True)
    assert result.target[0].tolist() == [[0] * 10, [-1, -1, -1, 0, 1, -1, -1, 0, 0, 0]]
    result = by_hand([FINE, COARSE], one_pair(better=0, worse=1), worse_only=True)
    assert result.target[0].tolist() == [[0] * 10, [1, 0, -1, -1, 1, 0, 0, 0, 0, 0]]


def test_the_protected_tail_is_masked():
    result = by_hand([FINE, COARSE], one_pair(), geometry=replace(HAND, recent_tokens=4))
    assert result.target[0].tolist() == [[1, 1, 1, 0, -1, 0, 0, 0, 0, 0], [1, 0, -1, -1, 0, 0, 0, 0, 0, 0]]


def test_what_recency_does_not_cover_is_masked():
    recency = [(token, 0) for token in range(5, 12)]  # from the middle of the block of 4 and 5
    result = by_hand([recency, COARSE], one_pair())
    # Of the blocks (0, 2) and (4, 1) recency covers nothing or one half: the half counts on neither side.
    assert result.target[0, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert result.target[0, 1].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_masked_pairs_have_no_targets():
    pairs = pairs_of([(0, 1), (0, 1)], valid=[False, True])
    result = by_hand([FINE, COARSE], pairs)
    assert result.where.any(axis=(1, 2)).tolist() == [False, True]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), worse_only=st.booleans())
def test_span_targets_agree_with_the_reference_token_by_token(seed, worse_only):
    cuts, pairs = random_variants(seed), all_pairs()
    result = targets_of(cuts, pairs, GEOMETRY, worse_only=worse_only)
    for i, (better, worse) in enumerate(zip(pairs.better, pairs.worse, strict=True)):
        expected = reference.span_targets(cuts[better], cuts[worse], GEOMETRY, worse_only=worse_only)
        for side in (0, 1):
            padded = [target or 0 for target in expected[side]] + [0, 0]
            assert result.target[i, side].tolist() == padded


span_advantages = jax.jit(preferences.span_advantages, static_argnames="geometry")


def test_advantages_of_spans_by_hand():
    # The third shows (8, 1) as COARSE does, and all else as FINE does.
    mixed = [*FINE[:5], (8, 1), (10, 0), (11, 0)]
    variants = variants_of([FINE, COARSE, mixed], HAND, capacity=10)
    found, finer, where = span_advantages(np.asarray([1.0, 2.0, 4.0], "f"), variants, np.ones(3, bool), HAND)
    np.testing.assert_allclose(found[0], [1, 1, 1, 0, 1, 2, 2, 0, 0, 0])
    np.testing.assert_allclose(found[1], [0.5, 0, 0.5, 0.5, -1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(found[2], [-2, -2, -2, 0, -2, -3, 0, 0, 0, 0])
    np.testing.assert_array_equal(where, found != 0)
    assert finer[0].tolist() == [1, 1, 1, 0, -1, 1, 1, 0, 0, 0]
    assert finer[1].tolist() == [-1, 0, 1, 1, -1, 0, 0, 0, 0, 0]
    assert finer[2].tolist() == [1, 1, 1, 0, -1, -1, 0, 0, 0, 0]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31 - 1))
def test_advantages_of_spans_equal_a_slow_reference(seed):
    # Recency begins in the middle of a block.
    random, cuts = np.random.default_rng(seed), random_variants(seed, length=21)
    losses, valid = random.normal(size=4).astype("f"), random.random(4) < 0.8
    variants = variants_of(cuts, GEOMETRY)
    # What a variant that does not count holds is not read.
    found, finer, where = span_advantages(np.where(valid, losses, np.nan), variants, valid, GEOMETRY)
    expected = reference.span_advantages(losses.tolist(), cuts, valid.tolist(), GEOMETRY)
    padded = [[*row, None, None, None] for row in expected]
    assert where.tolist() == [[value is not None for value in row] for row in padded]
    expected = np.asarray([[value or (0, 0) for value in row] for row in padded])
    np.testing.assert_allclose(found, expected[..., 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(finer, expected[..., 1])
    shifted, *_ = span_advantages(losses + 3, variants, valid, GEOMETRY)
    np.testing.assert_allclose(shifted, found, atol=1e-5)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31 - 1))
def test_between_two_variants_a_span_is_worth_their_difference_where_it_is_supervised(seed):
    cuts = random_variants(seed, count=3, length=21)
    losses = np.random.default_rng(seed).normal(size=3).astype("f")
    variants, valid = variants_of(cuts, GEOMETRY), np.asarray([True, False, True])
    found, finer, where = span_advantages(losses, variants, valid, GEOMETRY)
    targets = targets_of(cuts, one_pair(better=0, worse=2), GEOMETRY)
    np.testing.assert_array_equal(where[jnp.asarray([0, 2])], targets.where[0])
    assert not where[1].any()
    np.testing.assert_allclose(found[0], np.where(where[0], losses[2] - losses[0], 0), rtol=1e-6)
    np.testing.assert_allclose(found[2], np.where(where[2], losses[0] - losses[2], 0), rtol=1e-6)
    # The better one's level is what both should ask for, as the targets have it.
    np.testing.assert_array_equal(finer[0], targets.target[0, 0])
    np.testing.assert_array_equal(-finer[2], targets.target[0, 1])


@pytest.mark.parametrize(("worse_only", "labels"), [(True, {0: {-1}, 1: {1}}), (False, {0: {-1, 1}, 1: {-1, 1}})])
def test_only_the_one_sided_labels_are_a_function_of_the_level(worse_only, labels):
    cuts, pairs = balanced_cuts(), all_pairs()
    result = targets_of(cuts, pairs, BALANCED, worse_only=worse_only)
    lod = variants_of(cuts, BALANCED).lod[np.stack([pairs.better, pairs.worse], axis=1)]
    where, target = np.asarray(result.where), np.asarray(result.target)
    assert {level: set(target[where & (lod == level)].tolist()) for level in (0, 1)} == labels


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), max_lod=st.sampled_from([1, 3]))
def test_a_span_weighs_the_same_on_both_sides_so_that_levels_alone_say_nothing(seed, max_lod):
    # Recency among them: it begins in the middle of a block.
    cuts, pairs = random_variants(seed, geometry=replace(GEOMETRY, max_lod=max_lod)), all_pairs()
    targets = targets_of(cuts, pairs, GEOMETRY)
    sums = np.asarray(targets.weight * targets.target).sum(axis=2)
    np.testing.assert_array_equal(sums[:, 0], sums[:, 1])
    if max_lod == 1:
        scores = agreement.lod_only_scores(variants_of(cuts, GEOMETRY))
        np.testing.assert_array_equal(agreement.pair_margins(scores, targets, pairs), 0)
