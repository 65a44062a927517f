import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.context.geometry import CutGeometry
from lensjax.training import preferences
from lensjax.training.preferences import PreferencePairs
from tests import reference

variant_values = jax.jit(
    preferences.variant_values, static_argnames=("window", "block_size", "max_lod", "recent_tokens")
)
pair_margins = jax.jit(preferences.pair_margins)
correlation = jax.jit(preferences.correlation)


def context_batch(cuts, *, window, capacity):
    rows = [reference.context_of(cut, window=window, capacity=capacity) for cut in cuts]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


@functools.partial(jax.jit, static_argnames="max_pairs")
def select(losses, valid, ratio, max_pairs):
    return preferences.select_pairs(losses, valid, hard_negative_ratio=ratio, max_pairs=max_pairs)


def pairs_of(losses, *, valid=None, ratio=1.0, max_pairs=20):
    """The valid pairs, as (better, worse, gap)."""
    valid = np.ones(len(losses), bool) if valid is None else np.asarray(valid)
    pairs = select(np.asarray(losses, np.float32), valid, np.float32(ratio), max_pairs)
    rows = zip(pairs.better.tolist(), pairs.worse.tolist(), pairs.gap.tolist(), strict=True)
    kept = [row for row, is_valid in zip(rows, pairs.valid.tolist(), strict=True) if is_valid]
    assert pairs.valid.tolist() == [True] * len(kept) + [False] * (len(pairs.valid) - len(kept))
    return kept


def one_pair(better=0, worse=1):
    return PreferencePairs(
        better=np.asarray([better], np.int32),
        worse=np.asarray([worse], np.int32),
        gap=np.ones(1, np.float32),
        valid=np.ones(1, bool),
    )


def test_advantages_are_differences_to_the_baseline():
    deltas = preferences.advantage_deltas(np.asarray([[2.0, 1.5, 3.0], [1.0, 1.0, 0.0]], np.float32))
    np.testing.assert_array_equal(deltas, [[0.0, -0.5, 1.0], [0.0, 0.0, -1.0]])


# Pairs.

LOSSES = [2.0, 1.0, 4.0, 2.5]  # variant 1 is the best
WITH_BEST = [(1, 2, 3.0), (1, 3, 1.5), (1, 0, 1.0)]
REST = [(0, 2, 2.0), (3, 2, 1.5), (0, 3, 0.5)]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.0, WITH_BEST + REST), (0.5, WITH_BEST + REST[:2]), (0.34, WITH_BEST + REST[:2]), (0.0, WITH_BEST)],
)
def test_pairs_of_four_variants_by_hand(ratio, expected):
    assert pairs_of(LOSSES, ratio=ratio) == expected


def test_pairs_of_five_variants_by_hand():
    assert pairs_of([3.0, 8.0, 1.0, 1.5, 4.0], ratio=0.5) == [
        (2, 1, 7.0),
        (2, 4, 3.0),
        (2, 0, 2.0),
        (2, 3, 0.5),
        (3, 1, 6.5),
        (0, 1, 5.0),
        (4, 1, 4.0),
    ]


def test_at_most_max_pairs_are_kept():
    assert pairs_of(LOSSES, max_pairs=4) == WITH_BEST + REST[:1]
    assert pairs_of(LOSSES, max_pairs=2) == WITH_BEST[:2]
    assert select(np.asarray(LOSSES, np.float32), np.ones(4, bool), np.float32(1), 20).better.shape == (6,)


def test_duplicates_are_in_no_pair():
    assert pairs_of(LOSSES, valid=[True, False, True, True]) == [(0, 2, 2.0), (0, 3, 0.5), (3, 2, 1.5)]
    assert pairs_of(LOSSES, valid=[True, False, False, False]) == []


def test_equal_losses_hold_no_preference_and_are_reported():
    losses = [1.0, 2.0, 1.0, 2.0]
    assert pairs_of(losses) == [(0, 1, 1.0), (0, 3, 1.0), (2, 1, 1.0), (2, 3, 1.0)]
    everyone = np.ones(4, bool)
    assert float(preferences.tie_share(np.asarray(losses, np.float32), everyone)) == pytest.approx(2 / 6)
    only_ties = np.full(4, 1.25, np.float32)
    assert pairs_of(only_ties) == []
    assert float(preferences.tie_share(only_ties, everyone)) == 1.0
    assert float(preferences.tie_share(only_ties, np.asarray([True, False, True, False]))) == 1.0
    assert float(preferences.tie_share(only_ties, np.asarray([True, False, False, False]))) == 0.0


def test_a_loss_that_is_no_number_is_never_the_better_one():
    losses = np.asarray([2.0, np.nan, 1.0, np.nan, 4.0], np.float32)
    pairs = select(losses, np.ones(5, bool), np.float32(1), 20)
    assert pairs_of(losses) == [(2, 4, 3.0), (2, 0, 1.0), (0, 4, 2.0)]
    both = np.isnan(losses[np.asarray([pairs.better, pairs.worse])])
    # Among the masked rows only that of the two NaN has one for its better.
    assert (both[0] <= both[1]).all() and both.all(axis=0).sum() == 1
    assert np.isfinite(pairs.gap).all()
    assert not select(np.full(3, np.nan, np.float32), np.ones(3, bool), np.float32(1), 20).valid.any()


def test_what_is_no_number_is_no_tie_no_win_and_no_lack_of_variance():
    everyone, masked = np.ones(3, bool), np.asarray([True, False, True])
    losses = np.asarray([2.0, np.nan, 2.0], np.float32)
    assert np.isnan(preferences.tie_share(losses, everyone)) and float(preferences.tie_share(losses, masked)) == 1
    assert np.isnan(preferences.agreement(losses, everyone)[0]) and float(preferences.agreement(losses, masked)[0]) == 1
    value, defined = correlation(np.asarray([1.0, 2, 3], np.float32), losses, everyone)
    assert np.isnan(value) and defined
    assert not correlation(np.asarray([1.0, 2, 3], np.float32), losses, masked)[1]


@settings(max_examples=60)
@given(
    losses=st.lists(st.integers(0, 30), min_size=5, max_size=5),
    valid=st.lists(st.booleans(), min_size=4, max_size=4),
    ratio=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    max_pairs=st.sampled_from([3, 10]),
)
def test_pairs_agree_with_the_reference(losses, valid, ratio, max_pairs):
    losses, valid = [loss / 8 for loss in losses], [True, *valid]
    found = pairs_of(losses, valid=valid, ratio=ratio, max_pairs=max_pairs)
    expected = reference.select_pairs(losses, valid, hard_negative_ratio=ratio, max_pairs=max_pairs)
    # Pairs of one gap may come in any order, so gaps are compared in order and pairs by what they say.
    assert [gap for *_, gap in found] == [gap for *_, gap in expected]
    assert len({pair[:2] for pair in found}) == len(found)
    assert all(valid[b] and valid[w] and losses[w] - losses[b] == gap for b, w, gap in found)
    best = [b for b, *_ in expected].count(expected[0][0]) if expected else 0
    assert sorted(found[:best]) == sorted(expected[:best])


# Span targets.

HAND = {"window": 12, "block_size": 2, "recent_tokens": 2}
# Tokens:         0-3     4-5     6  7     8-9     10  11
COARSE = [(0, 2), (4, 1), (6, 0), (7, 0), (8, 1), (10, 0), (11, 0)]
FINE = [(0, 1), (2, 0), (3, 0), (4, 1), (6, 1), (8, 0), (9, 0), (10, 0), (11, 0)]


def targets_of(cuts, pairs, *, worse_only=False, capacity=10, **shape):
    variants = context_batch(cuts, window=shape["window"], capacity=capacity)
    result = targets_jit(variants, pairs, worse_only=worse_only, **shape)
    assert result.where.shape == result.target.shape == (len(pairs.better), 2, capacity)
    np.testing.assert_array_equal(np.asarray(result.target)[~np.asarray(result.where)], 0)
    return result


targets_jit = jax.jit(preferences.span_targets, static_argnames=("window", "block_size", "recent_tokens", "worse_only"))


def test_span_targets_by_hand():
    result = targets_of([FINE, COARSE], one_pair(better=0, worse=1), **HAND)
    better, worse = result.target[0].tolist()
    assert better == [1, 1, 1, 0, -1, 1, 1, 0, 0, 0]
    assert worse == [1, 0, -1, -1, 1, 0, 0, 0, 0, 0]
    assert result.weight[0].tolist() == [[2, 1, 1, 0, 2, 1, 1, 0, 0, 0], [4, 0, 1, 1, 2, 0, 0, 0, 0, 0]]
    # The other way round, every span asks for the opposite.
    mirrored = targets_of([FINE, COARSE], one_pair(better=1, worse=0), **HAND)
    np.testing.assert_array_equal(mirrored.target[0], -result.target[0, ::-1])


def test_worse_only_scores_the_worse_variant_and_masks_the_illegal():
    result = targets_of([FINE, COARSE], one_pair(better=1, worse=0), worse_only=True, **HAND)
    assert result.target[0].tolist() == [[0] * 10, [-1, -1, -1, 0, 1, -1, -1, 0, 0, 0]]
    result = targets_of([FINE, COARSE], one_pair(better=0, worse=1), worse_only=True, **HAND)
    assert result.target[0].tolist() == [[0] * 10, [1, 0, -1, -1, 1, 0, 0, 0, 0, 0]]


def test_the_protected_tail_is_masked():
    result = targets_of([FINE, COARSE], one_pair(), **(HAND | {"recent_tokens": 4}))
    assert result.target[0].tolist() == [[1, 1, 1, 0, -1, 0, 0, 0, 0, 0], [1, 0, -1, -1, 0, 0, 0, 0, 0, 0]]


def test_what_the_baseline_does_not_cover_is_masked():
    baseline = [(token, 0) for token in range(5, 12)]  # from the middle of the block of 4 and 5
    result = targets_of([baseline, COARSE], one_pair(), **HAND)
    # Of the blocks (0, 2) and (4, 1) the baseline covers nothing or one half: the half counts on neither side.
    assert result.target[0, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert result.target[0, 1].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_masked_pairs_have_no_targets():
    pairs = PreferencePairs(
        better=np.zeros(2, np.int32),
        worse=np.ones(2, np.int32),
        gap=np.ones(2, np.float32),
        valid=np.asarray([False, True]),
    )
    result = targets_of([FINE, COARSE], pairs, **HAND)
    assert result.where.any(axis=(1, 2)).tolist() == [False, True]


# One window for all random cuts, so that one program serves every example.
GEOMETRY = CutGeometry(window=30, block_size=2, max_lod=3, recent_tokens=5)
SHAPE = {"window": 30, "block_size": 2, "recent_tokens": 5}


def random_variants(seed, count=4, length=22, geometry=GEOMETRY):
    """The baseline and random cuts, as lists of entries."""
    rng = np.random.default_rng(seed)
    baseline = [(token, 0) for token in range(geometry.window - length, geometry.window)]
    return [baseline, *(reference.random_cut(geometry, length, rng) for _ in range(count - 1))]


def all_pairs(count=4):
    first, second = np.triu_indices(count, k=1)
    better, worse = np.concatenate([first, second]), np.concatenate([second, first])
    ones = np.ones(len(better))
    return PreferencePairs(better.astype(np.int32), worse.astype(np.int32), ones.astype(np.float32), ones.astype(bool))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), worse_only=st.booleans())
def test_span_targets_agree_with_the_reference_token_by_token(seed, worse_only):
    cuts, pairs = random_variants(seed), all_pairs()
    result = targets_of(cuts, pairs, capacity=24, worse_only=worse_only, **SHAPE)
    for i, (better, worse) in enumerate(zip(pairs.better, pairs.worse, strict=True)):
        expected = reference.span_targets(cuts[better], cuts[worse], worse_only=worse_only, **SHAPE)
        for side in (0, 1):
            padded = [target or 0 for target in expected[side]] + [0, 0]
            assert result.target[i, side].tolist() == padded


# A baseline for each span.

span_advantages = jax.jit(preferences.span_advantages, static_argnames=("window", "block_size", "recent_tokens"))


def test_advantages_of_spans_by_hand():
    # The third shows (8, 1) as COARSE does, and all else as FINE does.
    mixed = [*FINE[:5], (8, 1), (10, 0), (11, 0)]
    variants = context_batch([FINE, COARSE, mixed], window=12, capacity=10)
    found, finer, where = span_advantages(np.asarray([1.0, 2.0, 4.0], "f"), variants, np.ones(3, bool), **HAND)
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
    # The baseline begins in the middle of a block.
    random, cuts = np.random.default_rng(seed), random_variants(seed, length=21)
    losses, valid = random.normal(size=4).astype("f"), random.random(4) < 0.8
    variants = context_batch(cuts, window=30, capacity=24)
    # What a variant that does not count holds is not read.
    found, finer, where = span_advantages(np.where(valid, losses, np.nan), variants, valid, **SHAPE)
    expected = reference.span_advantages(losses.tolist(), cuts, valid.tolist(), **SHAPE)
    padded = [[*row, None, None, None] for row in expected]
    assert where.tolist() == [[value is not None for value in row] for row in padded]
    expected = np.asarray([[value or (0, 0) for value in row] for row in padded])
    np.testing.assert_allclose(found, expected[..., 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(finer, expected[..., 1])
    shifted, *_ = span_advantages(losses + 3, variants, valid, **SHAPE)
    np.testing.assert_allclose(shifted, found, atol=1e-5)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31 - 1))
def test_between_two_variants_a_span_is_worth_their_difference_where_it_is_supervised(seed):
    cuts = random_variants(seed, count=3, length=21)
    losses = np.random.default_rng(seed).normal(size=3).astype("f")
    variants, valid = context_batch(cuts, window=30, capacity=24), np.asarray([True, False, True])
    found, finer, where = span_advantages(losses, variants, valid, **SHAPE)
    targets = targets_of(cuts, one_pair(better=0, worse=2), capacity=24, **SHAPE)
    np.testing.assert_array_equal(where[jnp.asarray([0, 2])], targets.where[0])
    assert not where[1].any()
    np.testing.assert_allclose(found[0], np.where(where[0], losses[2] - losses[0], 0), rtol=1e-6)
    np.testing.assert_allclose(found[2], np.where(where[2], losses[0] - losses[2], 0), rtol=1e-6)
    # The better one's level is what both should ask for, as the targets have it.
    np.testing.assert_array_equal(finer[0], targets.target[0, 0])
    np.testing.assert_array_equal(-finer[2], targets.target[0, 1])


def test_weights_of_pairs_by_hand():
    """Values log 1, log 2 and log 5, and a fourth that is not compared: the policy draws 1/8, 2/8, 5/8."""
    values, where = jnp.log(jnp.asarray([1.0, 2.0, 5.0, 1e9])), jnp.asarray([True, True, True, False])
    pairs = PreferencePairs(jnp.asarray([0, 2]), jnp.asarray([1, 1]), jnp.ones(2), jnp.ones(2, bool))
    weights = functools.partial(preferences.pair_weights, pairs=pairs, where=where)
    np.testing.assert_allclose(weights(values, beta=1.0, most=9.0), [9 * 1 * 2 / 64, 9 * 5 * 2 / 64], rtol=1e-5)
    np.testing.assert_allclose(weights(values, beta=2.0, most=9.0), [9 * 4 / 900, 9 * 100 / 900], rtol=1e-5)
    np.testing.assert_allclose(weights(values, beta=1.0, most=0.5), [9 * 1 * 2 / 64, 0.5], rtol=1e-5)
    np.testing.assert_allclose(weights(jnp.full(4, 0.3), beta=1.0, most=9.0), [1, 1], rtol=1e-6)
    assert not jax.grad(lambda v: weights(v, beta=1.0, most=9.0).sum())(values).any()


# One level of gists and full coverage: what one variant gains in detail, the other gains elsewhere.
BALANCED = {"window": 30, "block_size": 3, "recent_tokens": 5}


def balanced_cuts():
    """Four distinct cuts of one length, with one level of gists."""
    geometry, rng = CutGeometry(max_lod=1, **BALANCED), np.random.default_rng(0)
    cuts = [reference.random_cut(geometry, 22, rng) for _ in range(4)]
    assert len({tuple(cut) for cut in cuts}) == 4
    return cuts, context_batch(cuts, window=30, capacity=24)


@pytest.mark.parametrize(("worse_only", "labels"), [(True, {0: {-1}, 1: {1}}), (False, {0: {-1, 1}, 1: {-1, 1}})])
def test_only_the_one_sided_labels_are_a_function_of_the_level(worse_only, labels):
    (cuts, variants), pairs = balanced_cuts(), all_pairs()
    result = targets_of(cuts, pairs, capacity=24, worse_only=worse_only, **BALANCED)
    lod = variants.lod[np.stack([pairs.better, pairs.worse], axis=1)]
    where, target = np.asarray(result.where), np.asarray(result.target)
    assert {level: set(target[where & (lod == level)].tolist()) for level in (0, 1)} == labels


# Agreement, the control, values and correlation.


def test_margins_by_hand():
    scores = np.zeros((2, 10), np.float32)
    scores[0, :9] = [0.5, -0.5, 0, 0.9, -1, 1, 0, 0.9, 0.9]  # FINE: targets + + + . - + + . .
    scores[1, :7] = [1, 0.9, -1, 0, -0.25, 0.9, 0.9]  # COARSE: targets + . - - + . .
    targets = targets_of([FINE, COARSE], one_pair(), **HAND)
    margin = pair_margins(scores, targets, one_pair())
    fine, coarse = 2 * 0.5 - 0.5 + 0 + 2 * 1 + 1 + 0, 4 * 1 + 1 + 0 + 2 * -0.25
    np.testing.assert_allclose(margin, [(fine + coarse) / 16])
    none = jax.tree.map(jnp.zeros_like, targets)
    np.testing.assert_array_equal(pair_margins(scores, none, one_pair()), [0.0])


def test_agreement_by_hand():
    margins = np.asarray([[0.2, -0.1, 1e-9], [0.4, 5.0, -5.0]], np.float32)
    valid = np.asarray([[True, True, True], [True, False, False]])
    share, count = preferences.agreement(margins, valid)
    assert float(share) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert int(count) == 4
    share, count = preferences.agreement(margins, np.zeros_like(valid))
    assert (float(share), int(count)) == (0.0, 0)


def agreement_of(scores, targets, pairs):
    margins = pair_margins(scores, targets, pairs)
    share, count = preferences.agreement(margins, targets.where.any(axis=(1, 2)))
    return float(share), int(count)


def test_a_perfect_policy_agrees_with_every_pair():
    (cuts, _), pairs = balanced_cuts(), one_pair(better=1, worse=2)
    targets = targets_of(cuts, pairs, capacity=24, **BALANCED)
    scores = np.zeros((4, 24), np.float32)
    scores[[1, 2]] = targets.target[0]
    assert agreement_of(scores, targets, pairs) == (1.0, 1)
    assert agreement_of(-scores, targets, pairs) == (0.0, 1)


def test_the_lod_only_control_is_at_chance_on_balanced_pairs():
    (cuts, variants), pairs = balanced_cuts(), all_pairs()
    targets = targets_of(cuts, pairs, capacity=24, **BALANCED)
    assert agreement_of(preferences.lod_only_scores(variants), targets, pairs) == (0.5, 12)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), max_lod=st.sampled_from([1, 3]))
def test_a_span_weighs_the_same_on_both_sides_so_that_levels_alone_say_nothing(seed, max_lod):
    # The baseline among them: it begins in the middle of a block.
    cuts, pairs = random_variants(seed, geometry=CutGeometry(max_lod=max_lod, **SHAPE)), all_pairs()
    targets = targets_of(cuts, pairs, capacity=24, **SHAPE)
    sums = np.asarray(targets.weight * targets.target).sum(axis=2)
    np.testing.assert_array_equal(sums[:, 0], sums[:, 1])
    if max_lod == 1:
        scores = preferences.lod_only_scores(context_batch(cuts, window=30, capacity=24))
        np.testing.assert_array_equal(pair_margins(scores, targets, pairs), 0)


def test_the_lod_only_control_answers_every_one_sided_pair():
    (cuts, variants), pairs = balanced_cuts(), all_pairs()
    targets = targets_of(cuts, pairs, capacity=24, worse_only=True, **BALANCED)
    assert agreement_of(preferences.lod_only_scores(variants), targets, pairs) == (1.0, 12)


def test_lod_only_scores():
    variants = context_batch([COARSE], window=12, capacity=9)
    scores = preferences.lod_only_scores(variants)
    assert scores.tolist() == [[1, 1, -1, -1, 1, -1, -1, 0, 0]]


def values_of(scores, cuts, *, window=12, block_size=2, max_lod=2, recent_tokens=2, capacity=10):
    variants = context_batch(cuts, window=window, capacity=capacity)
    return variant_values(
        scores, variants, window=window, block_size=block_size, max_lod=max_lod, recent_tokens=recent_tokens
    )


def test_variant_values_by_hand():
    scores = np.zeros((2, 10), np.float32)
    # COARSE: LOD 2 (d = -1) at weight 4, LOD 1 (d = 0), tokens 6 and 7 (d = 1), LOD 1, the tail (no weight).
    scores[0, :7] = [-0.5, 1, 1, 0.5, 1, 1, 1]
    scores[1, :9] = [1, 0.5, -1, 1, 1, 1, 0.5, 1, 1]
    values = values_of(scores, [COARSE, FINE])
    np.testing.assert_allclose(values, [(4 * 0.5 + 1 + 0.5) / 10, (0.5 - 1 + 1 + 0.5) / 10])
    assert values_of(scores[:1], [[(10, 0), (11, 0)]]).tolist() == [0.0]


def test_variant_values_agree_with_the_reference():
    cuts = random_variants(2)
    scores = np.random.default_rng(0).uniform(-1, 1, (4, 24)).astype(np.float32)
    values = values_of(scores, cuts, window=30, max_lod=3, recent_tokens=5, capacity=24)
    expected = [reference.variant_value(row, cut, max_lod=3, **SHAPE) for row, cut in zip(scores, cuts, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_a_policy_that_repeats_the_level_gives_every_cut_one_value():
    cuts, variants = balanced_cuts()
    scores = preferences.lod_only_scores(variants)
    values = values_of(scores, cuts, window=30, block_size=3, max_lod=1, recent_tokens=5, capacity=24)
    np.testing.assert_allclose(values, np.full(4, values[0]), rtol=1e-6)
    # So the correlation with any reward is not defined, and the shortcut shows.
    assert not correlation(values, np.asarray([1.0, 2, 3, 4], np.float32), np.ones(4, bool))[1]


@pytest.mark.parametrize(
    ("values", "rewards", "valid", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], [True] * 3, 1.0),
        ([1, 2, 3], [3, 2, 1], [True] * 3, -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], [True] * 4, 0.8),
        ([1, 2, 99, 3, 4], [1, 3, -99, 2, 4], [True, True, False, True, True], 0.8),
        ([1, 1, 1], [1, 2, 3], [True] * 3, None),  # the policy has no preference
        ([1, 2, 3], [5, 5, 5], [True] * 3, None),  # the rewards are all equal
        ([1, 2, 3], [1, 2, 3], [False, True, False], None),
        ([1, 2, 3], [1, 2, 3], [False] * 3, None),
    ],
)
def test_correlation_by_hand(values, rewards, valid, expected):
    found, defined = correlation(np.asarray(values, np.float32), np.asarray(rewards, np.float32), np.asarray(valid))
    assert bool(defined) == (expected is not None)
    assert float(found) == pytest.approx(expected or 0.0, abs=1e-6)


def test_correlation_ignores_rounding_noise():
    noise = np.asarray([2.0, 2.0 + 1e-6, 2.0 - 1e-6], np.float32)
    assert not correlation(noise, np.asarray([1.0, 2, 3], np.float32), np.ones(3, bool))[1]
