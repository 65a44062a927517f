import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.context import tree as trees
from tests import reference

DIM = 3
# Weights that differ by position: a gist that ignored the order of its children would be found out.
WEIGHTS = np.random.default_rng(0).normal(size=(8, DIM, DIM)).astype(np.float32)


def gist_fn(children):
    return jnp.tanh(jnp.einsum("nkd,kde->ne", children, WEIGHTS[: children.shape[1]]))


def slow_gist(children):
    return np.tanh(np.einsum("kd,kde->e", children, WEIGHTS[: len(children)].astype(np.float64)))


def leaves_of(tokens, seed=0):
    return np.random.default_rng(seed).normal(size=(tokens, DIM)).astype(np.float32)


def assert_same_history(tree, expected):
    """Both hold the same nodes; rows that only the larger one has room for are zero."""
    assert int(tree.length) == int(expected.length)
    for level, wanted in zip(tree.levels, expected.levels, strict=True):
        np.testing.assert_allclose(level[: len(wanted)], wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(level[len(wanted) :], 0)


@pytest.mark.parametrize(("tokens", "block_size", "max_lod"), [(9, 4, 1), (27, 3, 3), (29, 2, 4), (40, 3, 4)])
def test_build_equals_the_recursive_reference(tokens, block_size, max_lod):
    leaves = leaves_of(tokens)
    tree = trees.build(leaves, gist_fn, block_size=block_size, max_lod=max_lod)
    assert int(tree.length) == tree.capacity == tokens
    assert tree.max_lod == max_lod
    for lod, level in enumerate(tree.levels):
        # As many rows as complete blocks: one that is not complete has no gist.
        assert level.shape == (tokens // block_size**lod, DIM)
        expected = reference.level(leaves, slow_gist, lod, block_size)
        np.testing.assert_allclose(level, np.reshape(expected, level.shape), rtol=1e-5, atol=1e-6)


@jax.jit
def append(tree, leaves, count):
    return trees.append(tree, leaves, gist_fn, count=count)


@settings(max_examples=15)
@given(
    shape=st.sampled_from([(5, 1), (2, 4)]),
    counts=st.lists(st.integers(0, 9), min_size=4, max_size=7),
    seed=st.integers(0, 100),
)
def test_appending_in_any_splits_equals_building_at_once(shape, counts, seed):
    block_size, max_lod = shape
    total, rows, capacity = sum(counts), 9, 64
    leaves = leaves_of(total, seed)
    tree = trees.init(capacity=capacity, dim=DIM, block_size=block_size, max_lod=max_lod)
    for end, count in zip(np.cumsum(counts), counts, strict=True):
        chunk = np.full((rows, DIM), np.nan, np.float32)  # padding that would show if it were read
        chunk[:count] = leaves[end - count : end]
        tree = append(tree, chunk, count)
    for lod, level in enumerate(tree.levels):
        expected = reference.level(leaves, slow_gist, lod, block_size)
        np.testing.assert_allclose(level[: len(expected)], np.reshape(expected, (-1, DIM)), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(level[len(expected) :], 0)
    assert int(tree.length) == total


def with_states(tree, states):
    """The tree with states of each block beside those of its tokens."""
    size, dim = tree.block_size, states.shape[1]
    blocks = states[: len(states) // size * size].reshape(-1, size, dim).mean(axis=1)
    return dataclasses.replace(tree, states=(jnp.asarray(states), jnp.asarray(blocks)))


def test_states_of_a_block_and_of_those_before_it_by_hand():
    # Four blocks of two, of which the third is not complete: of it and of what is before the first nothing is known.
    states = np.float32([[1, -1], [3, -1], [5, -5], [5, -5], [7, 0], [100, 100], [100, 100], [100, 100]])
    tree = with_states(trees.build(leaves_of(8), gist_fn, block_size=2, max_lod=1), states)
    tree = dataclasses.replace(tree, length=jnp.int32(5))
    found = trees.lookup_states(tree, jnp.asarray([0, 1, 2, 3, 4, 7]), before=2)
    first, second, none = [2, -1], [5, -5], [0, 0]
    expected = [first + none + none] * 2 + [second + first + none] * 2 + [none + second + first, none + none + second]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(trees.lookup_states(tree, jnp.int32(3), before=0), second)


@settings(max_examples=20)
@given(held=st.integers(0, 29), before=st.integers(0, 5), size=st.integers(2, 4), seed=st.integers(0, 9))
def test_states_of_blocks_are_those_of_a_loop(held, before, size, seed):
    states = np.random.default_rng(seed).normal(size=(29, 2)).astype(np.float32)
    tree = with_states(trees.build(leaves_of(29), gist_fn, block_size=size, max_lod=1), states)
    tree = dataclasses.replace(tree, length=jnp.int32(held))
    start = np.arange(29)
    expected = np.zeros((29, 1 + before, 2))
    for token in start:
        for back in range(1 + before):
            block = token // size - back
            if block >= 0 and (block + 1) * size <= held:
                expected[token, back] = states[block * size : (block + 1) * size].mean(axis=0)
    found = trees.lookup_states(tree, start, before=before)
    np.testing.assert_allclose(found, expected.reshape(29, -1), rtol=1e-5, atol=1e-6)


def test_append_without_padding():
    @jax.jit
    def append_all(chunks):
        tree = trees.init(capacity=25, dim=DIM, block_size=2, max_lod=3)
        for chunk in chunks:
            tree = trees.append(tree, chunk, gist_fn)
        return tree

    leaves = leaves_of(23)
    built = trees.build(leaves, gist_fn, block_size=2, max_lod=3)
    assert_same_history(append_all([leaves[:6], leaves[6:7], leaves[7:]]), built)


def test_append_computes_and_writes_only_the_right_edge():
    given_blocks = []

    def counting_gist(children):
        given_blocks.append(children.shape[0])
        return gist_fn(children)

    block_size, max_lod, held, rows = 4, 3, 150, 5
    tree = trees.build(leaves_of(256), gist_fn, block_size=block_size, max_lod=max_lod)
    # Marks in place of gists: a level that is computed anew loses them.
    marked = tuple(jnp.full_like(level, 7.0) for level in tree.levels)
    tree = dataclasses.replace(tree, levels=marked, length=jnp.asarray(held, jnp.int32))
    longer = jax.jit(lambda tree, leaves: trees.append(tree, leaves, counting_gist))(tree, leaves_of(rows, seed=1))

    # One block for the unfinished edge and one for each full span of new tokens, at each level.
    assert given_blocks == [2, 1, 1]
    for lod, level in enumerate(longer.levels):
        span = block_size**lod
        changed = np.flatnonzero((np.asarray(level) != 7.0).any(axis=1))
        assert changed.tolist() == list(range(held // span, (held + rows) // span))


def test_append_leaves_levels_too_wide_for_the_capacity_empty():
    tree = append(trees.init(capacity=7, dim=DIM, block_size=2, max_lod=4), leaves_of(7), 7)
    assert [level.shape[0] for level in tree.levels] == [7, 3, 1, 0, 0]
    assert_same_history(tree, trees.build(leaves_of(7), gist_fn, block_size=2, max_lod=4))


def test_append_beyond_the_capacity_is_refused():
    tree = append(trees.init(capacity=10, dim=DIM, block_size=5, max_lod=1), leaves_of(8), 8)
    with pytest.raises(ValueError, match="holds 8 of 10 tokens and cannot take 3 more"):
        trees.append(tree, leaves_of(3), gist_fn)
    assert int(trees.append(tree, leaves_of(3), gist_fn, count=2).length) == 10


def test_append_under_jit_drops_what_does_not_fit():
    leaves = leaves_of(12)
    tree = trees.init(capacity=10, dim=DIM, block_size=2, max_lod=2)
    tree = append(append(tree, leaves, 8), np.roll(leaves, 4, axis=0), 4)
    assert_same_history(tree, trees.build(leaves[:10], gist_fn, block_size=2, max_lod=2))


def test_gradient_reaches_every_leaf_of_complete_blocks():
    def top(leaves):
        return jnp.sum(trees.build(leaves, gist_fn, block_size=2, max_lod=2).levels[2])

    gradient = jax.jit(jax.grad(top))(jnp.asarray(leaves_of(11)))
    is_touched = np.asarray(jnp.any(gradient != 0, axis=1))
    assert is_touched.tolist() == [True] * 8 + [False] * 3


def test_lookup_finds_every_node():
    leaves = leaves_of(29)
    tree = trees.build(leaves, gist_fn, block_size=3, max_lod=3)
    nodes = [(i * 3**lod, lod) for lod in range(4) for i in range(29 // 3**lod)]
    start, lod = np.asarray(nodes, np.int32).T
    expected = [reference.node(leaves, slow_gist, s, level, 3) for s, level in nodes]
    np.testing.assert_allclose(trees.lookup(tree, start, lod), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block_size": 1}, "block_size must be at least 2 children per gist, got 1"),
        ({"max_lod": 0}, "max_lod must be at least 1, got 0"),
        ({"capacity": 0}, "capacity must be at least 1 token, got 0"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        trees.init(**{"capacity": 8, "dim": DIM, "block_size": 2, "max_lod": 2} | sizes)
    if "capacity" not in sizes:
        with pytest.raises(ValueError, match=message):
            trees.build(leaves_of(8), gist_fn, **{"block_size": 2, "max_lod": 2} | sizes)
