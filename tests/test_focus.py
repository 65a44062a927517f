import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import context as contexts
from lensjax import focus
from lensjax.lengths import CutGeometry
from lensjax.rollouts import collapses_for_length

GEOMETRIES = [
    CutGeometry(window=32, block_size=2, max_lod=2, recent_tokens=8),
    CutGeometry(window=45, block_size=3, max_lod=2, recent_tokens=7),
    CutGeometry(window=40, block_size=2, max_lod=4, recent_tokens=5),
    CutGeometry(window=30, block_size=4, max_lod=1, recent_tokens=6),
]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
SEEDS = 12


def reachable(geometry):
    return range(geometry.window, geometry.shortest - 1, 1 - geometry.block_size)


@functools.cache
def compiled(geometry):
    """Cuts of every pair of scores [S, blocks] and lengths [R]: int32[R, S, T]."""
    one = functools.partial(focus.cut_from_block_scores, geometry=geometry)
    return jax.jit(jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(None, 0)))


def random_scores(geometry):
    """A row each of noise, with some equal scores; the last row is all equal."""
    scores = np.random.default_rng(0).uniform(-1, 1, (SEEDS, geometry.blocks(1))).astype(np.float32)
    scores[: SEEDS // 2] = np.round(scores[: SEEDS // 2], 1)
    scores[-1] = 0.25
    return scores


def cuts_of_all_lengths(geometry):
    lengths = np.asarray(reachable(geometry), np.int32)
    return lengths, random_scores(geometry), np.asarray(compiled(geometry)(random_scores(geometry), lengths))


def blocks_in_full(cut, geometry):
    """Whether each LOD-1 block before the protected tail is shown as tokens."""
    size, count = geometry.block_size, geometry.blocks(1)
    return (cut[: count * size].reshape(count, size) == 0).all(axis=1)


@every_geometry
def test_the_cold_start_collapses_every_block_once(geometry):
    cut = np.asarray(focus.coarse_cut(geometry))
    edge = geometry.blocks(1) * geometry.block_size
    assert cut.tolist() == [1] * edge + [0] * (geometry.window - edge)
    assert geometry.window - edge >= geometry.recent_tokens


@every_geometry
def test_every_length_is_met_exactly_and_legally(geometry):
    lengths, _, cuts = cuts_of_all_lengths(geometry)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    @functools.partial(jax.vmap, in_axes=(0, None))
    def check(cut, length):
        context = contexts.from_cut(cut, block_size=geometry.block_size, capacity=geometry.window)
        shape = {"window": geometry.window, "block_size": geometry.block_size}
        return contexts.invariants(context, length=length, recent_tokens=geometry.recent_tokens, **shape)

    for name, holds in check(jnp.asarray(cuts), lengths).items():
        assert holds.all(), name
    # Up to the highest level: the shortest length needs all of them.
    assert cuts.max() == geometry.max_lod


@every_geometry
def test_a_length_between_is_rounded_down(geometry):
    scores = random_scores(geometry)[:1]
    lengths = np.arange(geometry.shortest, geometry.window + 1, dtype=np.int32)
    below = np.asarray([max(length for length in reachable(geometry) if length <= target) for target in lengths])
    cuts = compiled(geometry)(scores, lengths)
    np.testing.assert_array_equal(cuts, compiled(geometry)(scores, below.astype(np.int32)))


@every_geometry
def test_the_blocks_in_full_are_those_of_the_highest_scores(geometry):
    lengths, scores, cuts = cuts_of_all_lengths(geometry)
    for length, rows in zip(lengths, cuts, strict=True):
        collapses = int(collapses_for_length(length, geometry))
        kept = max(geometry.blocks(1) - collapses, 0)
        for row, cut in zip(scores, rows, strict=True):
            in_full = blocks_in_full(cut, geometry)
            assert in_full.sum() == kept
            assert row[in_full].min(initial=np.inf) >= row[~in_full].max(initial=-np.inf)
            # Among equal scores the recent ones stay.
            tied = row == row[in_full].min(initial=np.inf)
            assert (np.diff(in_full[tied].astype(int)) >= 0).all()


def test_parents_of_the_lowest_mean_score_go_first_by_hand():
    # 16 tokens before the tail: 8 blocks, 4 parents of means 0, 0.5, -0.5, 0.25.
    geometry = CutGeometry(window=18, block_size=2, max_lod=2, recent_tokens=2)
    scores = np.asarray([0.9, -0.9, 0.5, 0.5, -0.5, -0.5, 0.0, 0.5], np.float32)
    lengths = np.asarray([15, 10, 9, 8], np.int32)
    found = np.asarray(compiled(geometry)(scores[None], lengths))[:, 0]
    one, two = [1, 1], [2, 2, 2, 2]
    assert found[0].tolist() == [0, 0, *one, 0, 0, 0, 0, *one, *one, 0, 0, 0, 0, 0, 0]
    assert found[1].tolist() == [*one * 8, 0, 0]
    assert found[2].tolist() == [*one * 4, *two, *one * 2, 0, 0]
    assert found[3].tolist() == [*two, *one * 2, *two, *one * 2, 0, 0]


@every_geometry
def test_a_block_asked_for_alone_is_in_full_wherever_any_can_be(geometry):
    lengths = np.asarray(reachable(geometry), np.int32)
    wishes = np.eye(geometry.blocks(1), dtype=np.float32)
    cuts = np.asarray(compiled(geometry)(wishes, lengths))
    for length, rows in zip(lengths, cuts, strict=True):
        shown = [blocks_in_full(cut, geometry)[block] for block, cut in enumerate(rows)]
        assert all(shown) == (collapses_for_length(length, geometry) < geometry.blocks(1))
