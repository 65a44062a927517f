import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.context import rollouts
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from tests import reference

# Windows that are and are not multiples of the block size, tails that are and are not, and levels without a block.
BUCKETS = [
    Geometry(history=24, block_size=2, max_lod=4, recent_tokens=5),
    Geometry(history=37, block_size=3, max_lod=3, recent_tokens=6),
    Geometry(history=41, block_size=5, max_lod=1, recent_tokens=8),
    Geometry(history=38, block_size=4, max_lod=1, recent_tokens=5, omit=True, sink_blocks=2),
]
TINY = [
    Geometry(history=10, block_size=2, max_lod=2, recent_tokens=2),
    Geometry(history=15, block_size=2, max_lod=3, recent_tokens=3),
    Geometry(history=20, block_size=3, max_lod=2, recent_tokens=4),
    Geometry(history=16, block_size=2, max_lod=1, recent_tokens=3, omit=True),
    Geometry(history=16, block_size=2, max_lod=1, recent_tokens=3, omit=True, sink_blocks=2),
]
CUTS = 128


@functools.cache
def checked_rollouts(geometry, count=CUTS):
    """Compiled once for each geometry: rollouts, which are distinct, and the invariants of all of them."""

    @jax.jit
    def draw(key, length, share):
        variants, distinct = rollouts.sample_rollouts(
            key, length, share, rollouts=count, geometry=geometry, capacity=geometry.history
        )
        expected = rollouts.length_for_collapses(rollouts.collapses_for_length(length, geometry), geometry)

        check = jax.vmap(lambda context: contexts.invariants(context, geometry, length=expected))
        return variants, distinct, check(variants)

    # Typed scalars: a Python number would be one more signature to compile.
    return lambda seed, length, share: draw(jax.random.key(seed), np.int32(length), np.float32(share))


@functools.cache
def many_cuts(geometry, count):
    """Compiled once for each geometry: `count` cuts for one number of collapses, as int32[count, T]."""
    draw = jax.vmap(lambda key, *rest: rollouts.sample_cut(key, *rest, geometry), in_axes=(0, None, None))
    run = jax.jit(lambda key, collapses, share: draw(jax.random.split(key, count), collapses, share))
    return lambda seed, collapses, share: np.asarray(run(jax.random.key(seed), np.int32(collapses), np.float32(share)))


def entries_of_cut(cut, block_size):
    """Entries of one cut, by walking over it."""
    entries, token = [], 0
    while token < len(cut):
        entries.append((token, int(cut[token])))
        token += block_size ** entries[-1][1]
    return tuple(entries)


def assert_rollouts_are_sound(geometry, target, share, seed):
    variants, distinct, checks = checked_rollouts(geometry)(seed, target, share)
    assert {name for name, holds in checks.items() if not holds.all()} == set()
    rows = reference.unstack(variants)
    assert {len(reference.read(row, geometry)) for row in rows} == {geometry.length(target)}
    assert distinct.tolist() == [row not in rows[:i] for i, row in enumerate(rows)]


@settings(max_examples=36)
@given(
    geometry=st.sampled_from(BUCKETS),
    depth=st.floats(0, 1),
    share=st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32),
    seed=st.integers(0, 2**31 - 1),
)
def test_rollouts_hold_the_invariants(geometry, depth, share, seed):
    target = geometry.history - round(depth * (geometry.history - geometry.shortest))
    assert_rollouts_are_sound(geometry, target, share, seed)


@pytest.mark.slow
@settings(max_examples=25)
@given(data=st.data(), block_size=st.integers(2, 6), max_lod=st.integers(1, 4), seed=st.integers(0, 2**31 - 1))
def test_rollouts_hold_the_invariants_for_any_geometry(data, block_size, max_lod, seed):
    recent_tokens = data.draw(st.integers(2, 20), label="recent_tokens")
    window = data.draw(st.integers(recent_tokens + block_size, 100), label="window")
    geometry = Geometry(window, block_size, max_lod, recent_tokens)
    target = data.draw(st.integers(geometry.shortest, window), label="target")
    share = data.draw(st.floats(0, 1, width=32), label="share")
    assert_rollouts_are_sound(geometry, target, share, seed)


@pytest.mark.parametrize("geometry", TINY, ids=str)
def test_every_legal_cut_of_the_length_occurs_and_no_other(geometry):
    by_collapses = {}
    for entries in reference.legal_cuts(geometry):
        collapses = (geometry.history - len(reference.read(entries, geometry))) // geometry.saving
        by_collapses.setdefault(collapses, set()).add(entries)
    assert set(by_collapses) == set(range(geometry.max_collapses + 1))
    for collapses, expected in by_collapses.items():
        cuts = many_cuts(geometry, 4096)(collapses, collapses, 0.5)
        found = {entries_of_cut(cut, geometry.block_size) for cut in np.unique(cuts, axis=0)}
        assert found == expected


@pytest.mark.parametrize("geometry", TINY, ids=str)
def test_the_share_spans_the_fewest_to_the_most_high_blocks(geometry):
    for collapses in range(geometry.max_collapses + 1):
        legal = [
            reference.level_counts(entries, geometry.max_lod)
            for entries in reference.legal_cuts(geometry)
            if len(reference.read(entries, geometry)) == geometry.history - collapses * geometry.saving
        ]
        for share, expected in ((0.0, min(legal)), (1.0, max(legal))):
            cuts = many_cuts(geometry, 4096)(0, collapses, share)
            rows = [entries_of_cut(cut, geometry.block_size) for cut in np.unique(cuts, axis=0)]
            assert {reference.level_counts(row, geometry.max_lod) for row in rows} == {expected}


def test_the_share_is_the_probability_of_each_optional_block():
    # Ten collapses: an LOD-2 block stands for five of them, so two such blocks are optional.
    geometry = Geometry(history=96, block_size=4, max_lod=2, recent_tokens=16)
    cuts = many_cuts(geometry, 4096)(0, 10, 0.25)
    count = (cuts == 2).sum(axis=1) // 16
    assert set(count.tolist()) == {0, 1, 2}
    assert np.mean(count) == pytest.approx(2 * 0.25, abs=0.05)


def test_no_block_is_preferred():
    geometry = Geometry(history=23, block_size=4, max_lod=1, recent_tokens=3)
    cuts = many_cuts(geometry, 4096)(0, 2, 0.0)
    shares = Counter(np.flatnonzero(cuts[:, : 5 * 4 : 4]) % 5)
    assert [shares[block] / 4096 for block in range(5)] == pytest.approx([0.4] * 5, abs=0.04)


def test_every_rollout_has_the_target_length_rounded_down():
    geometry = BUCKETS[1]
    draw = checked_rollouts(geometry)
    for target in range(geometry.shortest, geometry.history + 1):
        lengths = set(draw(0, target, 0.3)[0].length.tolist())
        assert lengths == {geometry.length(target)}


def test_a_target_below_the_shortest_cut_gives_the_shortest():
    geometry = TINY[0]
    collapses = rollouts.collapses_for_length(jnp.asarray([-5, 0, geometry.shortest, 10, 99]), geometry)
    assert collapses.tolist() == [6, 6, 6, 0, 0]
    assert rollouts.length_for_collapses(collapses, geometry).tolist() == [4, 4, 4, 10, 10]


def test_no_loop_whose_length_depends_on_the_draw():
    geometry = TINY[1]
    program = str(
        jax.make_jaxpr(
            lambda key, length, share: rollouts.sample_rollouts(
                key, length, share, rollouts=3, geometry=geometry, capacity=geometry.history
            )
        )(jax.random.key(0), 9, 0.5)
    )
    assert "random_bits" in program
    assert "while" not in program and "cond[" not in program and "scan[" not in program


def test_where_all_draws_coincide_the_last_becomes_an_aggressive_one():
    # Four collapses at share 0 are the four LOD-1 blocks, always; with LOD 2 they are one block of it and one of LOD 1.
    geometry = TINY[0]
    variants, distinct, _ = checked_rollouts(geometry, count=3)(0, 6, 0.0)
    rows = reference.unstack(variants)
    assert distinct.tolist() == [True, False, True]
    assert rows[0] == rows[1] == [(0, 1), (2, 1), (4, 1), (6, 1), (8, 0), (9, 0)]
    assert reference.level_counts(rows[2], 2) == (1, 1)


def test_draws_that_coincide_by_chance_are_made_distinct():
    # One collapse, four blocks: in one of 16 draws all three would be alike.
    for seed in range(64):
        _, distinct, _ = checked_rollouts(TINY[0], count=3)(seed, 9, 0.0)
        assert distinct.sum() >= 2


def test_where_one_cut_is_legal_duplicates_stay_masked():
    variants, distinct, _ = checked_rollouts(TINY[0], count=3)(0, 10, 0.5)
    assert distinct.tolist() == [True, False, False]
    assert all(row == [(token, 0) for token in range(10)] for row in reference.unstack(variants))


def test_one_rollout_is_never_replaced():
    variants, distinct, _ = checked_rollouts(TINY[0], count=1)(0, 6, 0.0)
    assert distinct.tolist() == [True]
    assert reference.level_counts(reference.unstack(variants)[0], 2) == (0, 4)


def test_equal_priorities_go_to_the_older_block():
    geometry = TINY[0]
    counts = [jnp.asarray(1, jnp.int32), jnp.asarray(1, jnp.int32)]
    cut_of = jax.jit(lambda priorities: rollouts.cut_from_priorities(counts, priorities, geometry))
    cut = cut_of([jnp.zeros(4), jnp.zeros(2)])
    assert cut.tolist() == [2, 2, 2, 2, 1, 1, 0, 0, 0, 0]
    cut = cut_of([jnp.asarray([3.0, 1.0, 0.0, 2.0]), jnp.asarray([0.0, 1.0])])
    assert cut.tolist() == [1, 1, 0, 0, 2, 2, 2, 2, 0, 0]
