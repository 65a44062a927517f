import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.working import MISSING
from tests import reference

GEOMETRY = Geometry(history=17, block_size=2, max_lod=3, recent_tokens=4)
# (start, lod): all levels, and a token in full between blocks.
ENTRIES = [(0, 2), (4, 0), (5, 0), (6, 1), (8, 2), (12, 0), (13, 0), (14, 0), (15, 0), (16, 0)]


from_cut = jax.jit(contexts.from_cut, static_argnames=("geometry", "capacity"))
materialise = jax.jit(contexts.materialise)


def working_context(entries, *, window=17, capacity=None):
    return reference.context_of(entries, window=window, capacity=capacity or len(entries))


def broken(context, *, length=10, recent_tokens=4, first_token=0):
    """Names of the invariants that do not hold."""
    geometry = dataclasses.replace(GEOMETRY, recent_tokens=recent_tokens)
    result = check(context, geometry, length=np.int32(length), first_token=np.int32(first_token))
    return {name for name, holds in result.items() if not holds}


check = jax.jit(contexts.invariants, static_argnames="geometry")


def test_recency_is_the_end_of_the_history_in_full():
    context = contexts.recency(5, GEOMETRY, capacity=7)
    assert context.start.tolist() == [12, 13, 14, 15, 16, 17, 17]
    assert context.lod.tolist() == [0] * 7
    assert context.valid.tolist() == [True] * 5 + [False] * 2
    assert int(context.length) == 5
    assert broken(context, length=5, first_token=12) == set()


def test_from_cut_by_hand():
    cut = np.asarray([2, 2, 2, 2, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 0], np.int32)
    context = from_cut(cut, GEOMETRY, capacity=12)
    assert reference.entries_of(context) == ENTRIES
    assert context.start[10:].tolist() == [17, 17]  # padding sorts last
    assert contexts.spans(context, block_size=2).tolist() == [4, 1, 1, 2, 4, 1, 1, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(contexts.to_cut(context, GEOMETRY), cut)


def test_neighbouring_blocks_of_one_level_stay_apart():
    geometry = Geometry(history=9, block_size=3, max_lod=1, recent_tokens=2)
    context = from_cut(np.asarray([1] * 6 + [0] * 3, np.int32), geometry, capacity=9)
    assert reference.entries_of(context) == [(0, 1), (3, 1), (6, 0), (7, 0), (8, 0)]


def test_cuts_and_entries_are_two_views_of_one_thing():
    legal = reference.legal_cuts(GEOMETRY)
    assert len(legal) > 100
    cuts = np.asarray([reference.cut_of(entries, 17, 2) for entries in legal], np.int32)

    @jax.jit
    @jax.vmap
    def there_and_back(cut):
        context = contexts.from_cut(cut, GEOMETRY, capacity=17)
        return context, contexts.to_cut(context, GEOMETRY)

    listed, back = there_and_back(cuts)
    np.testing.assert_array_equal(back, cuts)
    assert [tuple(entries) for entries in reference.unstack(listed)] == legal


def test_tokens_before_the_first_entry_are_missing():
    geometry = Geometry(history=9, block_size=2, max_lod=1, recent_tokens=2)
    cut = contexts.to_cut(contexts.recency(4, geometry, capacity=6), geometry)
    assert cut.tolist() == [MISSING] * 5 + [0] * 4
    assert reference.entries_of(from_cut(cut, geometry, capacity=6)) == [(i, 0) for i in range(5, 9)]


def test_materialise_equals_the_reference():
    leaves = np.random.default_rng(0).normal(size=(17, 3)).astype(np.float32)
    tree = trees.build(leaves, lambda children: children.mean(axis=1), block_size=2, max_lod=3)
    entries = materialise(tree, working_context(ENTRIES, capacity=13))
    for row, (start, lod) in enumerate(ENTRIES):
        tokens = reference.covered((start, lod), 2)
        expected = reference.node(leaves, lambda children: children.mean(axis=0), start, lod, 2)
        np.testing.assert_allclose(entries.embeddings[row], expected, rtol=1e-6)
        if lod == 0 and start < 16:  # token 16 is the first of a block
            expected = reference.node(leaves, lambda children: children.mean(axis=0), start // 2 * 2, 1, 2)
        np.testing.assert_allclose(entries.blocks[row], expected, rtol=1e-6)
        assert float(entries.positions[row]) == np.mean(tokens)
        assert float(entries.distances[row]) == 16 - np.mean(tokens)
        assert float(entries.spans[row]) == len(tokens)
        assert int(entries.lods[row]) == lod
    assert all(not np.asarray(leaf[10:]).any() for leaf in jax.tree.leaves(entries))


def test_the_cursor_is_the_last_token_held():
    tree = trees.init(capacity=32, dim=1, block_size=2, max_lod=1)
    tree = dataclasses.replace(tree, length=jnp.asarray(6, jnp.int32))
    entries = materialise(tree, working_context([(0, 1), (2, 0), (5, 0)], window=32))
    assert entries.distances.tolist() == [4.5, 3.0, 0.0]


def test_tokens_in_full_stand_for_themselves():
    entries = contexts.in_full(np.eye(3, dtype=np.float32), np.asarray([4, 5, 6]))
    np.testing.assert_array_equal(entries.embeddings, np.eye(3))
    np.testing.assert_array_equal(entries.blocks, np.eye(3))
    assert entries.positions.tolist() == [4, 5, 6]
    assert entries.distances.tolist() == [2, 1, 0]
    assert entries.spans.tolist() == [1, 1, 1]
    assert entries.lods.tolist() == [0, 0, 0]
    assert entries.valid.all()


@pytest.mark.parametrize("length", [5, 7])
def test_the_block_of_a_token_is_its_gist_once_there_is_one(length):
    # Nothing in the tree is zero, not even where nothing is held yet: a wrong row would be noticed.
    tree = trees.build(
        np.arange(1.0, 9.0, dtype=np.float32)[:, None], lambda children: children.sum(axis=1), block_size=2, max_lod=2
    )
    assert [level[:, 0].tolist() for level in tree.levels] == [[1, 2, 3, 4, 5, 6, 7, 8], [3, 7, 11, 15], [10, 26]]
    tree = dataclasses.replace(tree, length=jnp.asarray(length, jnp.int32))
    held = [(0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]
    entries = materialise(tree, working_context(held, window=8, capacity=9))
    # Gists stand for themselves; token 4 waits for token 5.
    assert entries.blocks[:, 0].tolist() == [10, 3, 3, 3, 7, 7, 5 if length == 5 else 11, 0, 0]
    assert entries.embeddings[:, 0].tolist() == [10, 3, 1, 2, 3, 4, 5, 0, 0]


def test_every_legal_cut_holds_the_invariants():
    legal = reference.legal_cuts(GEOMETRY)
    batch = jax.tree.map(lambda *rows: jnp.stack(rows), *(working_context(cut, capacity=17) for cut in legal))

    @jax.jit
    @jax.vmap
    def check(context, length):
        return contexts.invariants(context, GEOMETRY, length=length)

    result = check(batch, jnp.asarray([len(cut) for cut in legal], jnp.int32))
    assert {name: bool(holds.all()) for name, holds in result.items()} == dict.fromkeys(
        ["alignment", "budget", "contiguity", "tail"], True
    )


@pytest.mark.parametrize(
    ("entries", "violated"),
    [
        ([(0, 0), (1, 1), *((i, 0) for i in range(3, 17))], {"alignment"}),
        ([*ENTRIES[:3], *ENTRIES[4:]], {"contiguity"}),  # a hole
        ([*ENTRIES[:4], (6, 0), (7, 0), *ENTRIES[4:]], {"contiguity"}),  # shown twice
        (ENTRIES[:-1], {"contiguity"}),  # stops before the window ends
        (ENTRIES[1:], {"contiguity"}),  # starts after the first token
        ([*ENTRIES[:5], (12, 1), (14, 0), (15, 0), (16, 0)], {"tail"}),
    ],
)
def test_each_invariant_notices_its_violation(entries, violated):
    assert broken(working_context(entries, capacity=17), length=len(entries)) == violated


def test_the_budget_is_exact_and_padding_is_last():
    context = working_context(ENTRIES, capacity=17)
    assert broken(context, length=10) == set()
    assert broken(context, length=11) == broken(context, length=9) == {"budget"}
    late = dataclasses.replace(context, valid=jnp.roll(context.valid, 1))
    assert "budget" in broken(late, length=10)


def test_of_a_history_that_is_not_full_the_tokens_held_count():
    held = dataclasses.replace(GEOMETRY, history=11)
    for entries in reference.legal_cuts(held):
        context, length = working_context(entries, capacity=17), np.int32(len(entries))
        found = check(context, GEOMETRY, length=length, tokens=np.int32(11))
        assert all(found.values()), (entries, found)
    found = check(working_context([(0, 3), (8, 1), (10, 0)], capacity=17), GEOMETRY, length=3, tokens=np.int32(11))
    assert [name for name, holds in found.items() if not holds] == ["tail"]
    found = check(context, GEOMETRY, length=length, tokens=np.int32(12))
    assert not found["contiguity"]


# Omission: the policy sees every row of a cut, the base model the tokens alone.

OMITTING = Geometry(history=17, block_size=2, max_lod=1, recent_tokens=4, omit=True)


def test_recency_with_omission_by_hand():
    context = contexts.recency(7, OMITTING, capacity=8)
    # Tokens 10 to 16; the five blocks before them are mapped. There is room for one token and one block more.
    assert context.start.tolist() == [0, 2, 4, 6, 8, *range(10, 17), 17, 17]
    assert context.lod.tolist() == [1] * 5 + [0] * 9
    shown = contexts.read(context, OMITTING)
    assert shown.start.tolist() == [*range(10, 17), 17] and shown.valid.tolist() == [True] * 7 + [False]
    assert shown.lod.tolist() == [0] * 8
    # A length that no cut has: half a block is neither read nor mapped.
    assert contexts.to_cut(contexts.recency(6, OMITTING, capacity=6), OMITTING).tolist()[8:12] == [1, 1, 1, 0]
    context = contexts.recency(6, OMITTING, capacity=6)
    assert reference.entries_of(context) == [
        *((block, 1) for block in range(0, 10, 2)),
        *((i, 0) for i in range(11, 17)),
    ]
    assert int(contexts.entry_count(context, OMITTING)) == 6


@jax.jit
def recency_as_cut(length):
    context = contexts.recency(length, OMITTING, capacity=17)
    cut = contexts.to_cut(context, OMITTING)
    checks = contexts.invariants(context, OMITTING, length=length)
    return context, cut, contexts.from_cut(cut, OMITTING, capacity=17), checks


def test_recency_of_a_legal_length_is_a_cut_like_any_other():
    legal = [reference.cut_of(cut, 17, 2) for cut in reference.legal_cuts(OMITTING)]
    for length in reference.reachable_lengths(OMITTING):
        context, cut, again, checks = recency_as_cut(np.int32(length))
        assert cut.tolist() in legal and all(checks.values())
        jax.tree.map(np.testing.assert_array_equal, context, again)


@functools.cache
def read_of(capacity):
    @jax.jit
    def run(cut, length):
        context = contexts.from_cut(cut, OMITTING, capacity=capacity)
        checks = contexts.invariants(context, OMITTING, length=length)
        return context, contexts.read(context, OMITTING), contexts.entry_count(context, OMITTING), checks

    return run


@given(chosen=st.sets(st.integers(0, 5)), spare=st.sampled_from([0, 17]))
def test_the_base_model_reads_the_tokens_of_a_cut_in_order_at_their_places(chosen, spare):
    cut = np.zeros(17, np.int32)
    for block in chosen:
        cut[2 * block : 2 * block + 2] = 1
    (tokens,) = np.nonzero(cut == 0)
    # With no room to spare every row of the cut still has its place: a block is mapped or read.
    capacity = max(len(tokens), spare)
    context, shown, count, checks = read_of(capacity)(cut, np.int32(len(tokens)))
    assert context.start.shape == (capacity + 6,) and shown.start.shape == (capacity,)
    assert reference.cut_of(reference.entries_of(context), 17, 2) == cut.tolist()
    assert reference.entries_of(shown) == [(token, 0) for token in tokens.tolist()]
    assert int(count) == len(tokens) and all(checks.values())
    rest = capacity - len(tokens)
    assert shown.start[len(tokens) :].tolist() == [17] * rest and not np.any(shown.lod)
    assert shown.valid.tolist() == [True] * len(tokens) + [False] * rest


def test_without_omission_everything_is_read():
    context = working_context(ENTRIES, capacity=13)
    assert contexts.read(context, GEOMETRY) is context
    assert int(contexts.entry_count(context, GEOMETRY)) == 10
    np.testing.assert_array_equal(contexts.is_entry(context, GEOMETRY), context.valid)


def test_with_omission_the_budget_counts_what_is_read():
    entries = [(0, 1), (2, 0), (3, 0), (4, 1), *((token, 0) for token in range(6, 17))]
    context = working_context(entries, capacity=17)
    for length, violated in ((13, set()), (15, {"budget"}), (12, {"budget"})):
        result = check(context, OMITTING, length=np.int32(length))
        assert {name for name, holds in result.items() if not holds} == violated


def test_entries_know_of_their_block_and_the_four_before_it_and_padding_of_nothing():
    leaves = np.random.default_rng(0).normal(size=(17, 3)).astype(np.float32)
    plain = trees.build(leaves, functools.partial(jnp.mean, axis=1), block_size=2, max_lod=3)
    blocks = 1 + np.arange(8, dtype=np.float32)[:, None]
    tree = dataclasses.replace(plain, states=(jnp.zeros((17, 1)), jnp.asarray(blocks)))
    entries = materialise(tree, working_context(ENTRIES, capacity=13))
    expected = np.zeros((13, 5))
    for row, (start, _) in enumerate(ENTRIES):
        for back in range(5):
            block = start // 2 - back
            expected[row, back] = 1 + block if 0 <= block < 8 else 0
    np.testing.assert_array_equal(entries.states, expected)
    assert expected[:10].any(axis=1).all() and contexts.BLOCKS_BEFORE == 4
    assert materialise(plain, working_context(ENTRIES, capacity=13)).states is None


def test_the_tail_counts_whole_spans():
    assert broken(working_context(ENTRIES), recent_tokens=5) == set()
    assert broken(working_context(ENTRIES), recent_tokens=6) == {"tail"}
