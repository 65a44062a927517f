"""The nodes of a window: where they are, which context they show, and their scores."""

import jax
import numpy as np
import pytest

from lensjax.context import allocator, nodes
from lensjax.context.geometry import Geometry
from lensjax.context.working import MISSING
from tests import reference
from tests.context.situations import HAND, both, by_node, legal_cuts, row_of, state_of
from tests.small import jit


def test_nodes_by_hand():
    # 11 tokens before the tail: 5 blocks of 2, 2 of 4, 1 of 8.
    table = nodes.table(Geometry(history=14, block_size=2, max_lod=3, recent_tokens=3))
    assert table.lod.tolist() == [1, 1, 1, 1, 1, 2, 2, 3]
    assert table.start.tolist() == [0, 2, 4, 6, 8, 0, 4, 0]
    assert table.end.tolist() == [2, 4, 6, 8, 10, 4, 8, 8]
    assert table.parent.tolist() == [5, 5, 6, 6, 8, 7, 7, 8]


@both
def test_cuts_and_states_are_two_views_of_one_thing(geometry):
    assert list(zip(*nodes.table(geometry)[1::-1], strict=True)) == reference.nodes(geometry)
    legal = legal_cuts(geometry)
    assert len(legal) > 80
    cuts = np.asarray([reference.cut_of(cut, geometry.history, geometry.block_size) for cut in legal], np.int32)

    @jit
    @jax.vmap
    def there_and_back(cut):
        state = allocator.from_cut(cut, geometry)
        context = allocator.to_context(state, geometry, capacity=geometry.history)
        return state, allocator.to_cut(state, geometry), context

    states, back, context = there_and_back(cuts)
    np.testing.assert_array_equal(states.collapsed, state_of(legal, geometry).collapsed)
    assert not states.cooling.any()
    np.testing.assert_array_equal(back, cuts)
    assert [tuple(entries) for entries in reference.unstack(context)] == legal


def test_tokens_that_are_not_there_yet_are_missing():
    state = row_of(state_of([[(0, 1)]], HAND), 0)
    cut = jit(lambda held: allocator.to_cut(state, HAND, tokens=held))(np.int32(6))
    assert cut.tolist() == [1, 1, 0, 0, 0, 0, *[MISSING] * 4]
    context = jit(lambda held: allocator.to_context(state, HAND, capacity=8, tokens=held))(np.int32(6))
    assert reference.entries_of(context) == [(0, 1), (2, 0), (3, 0), (4, 0), (5, 0)]


def test_node_scores_by_hand():
    context = reference.context_of([(0, 2), (4, 0), (5, 0), (6, 1), (8, 0), (9, 0)], window=10, capacity=8)
    scores = np.asarray([0.5, 0.25, 0.75, -0.5, 0.9, 0.9, np.nan, np.nan], np.float32)
    found = by_node(jit(lambda row: nodes.pool_scores(row, context, HAND))(scores), HAND)
    assert found.pop((0, 2)) == found.pop((0, 1)) == found.pop((2, 1)) == 0.5  # a gist, and what is inside of it
    assert found == {(4, 1): 0.5, (6, 1): -0.5, (4, 2): 0.0}


@both
def test_node_scores_equal_the_reference(geometry):
    legal = legal_cuts(geometry)
    rng = np.random.default_rng(1)
    capacity = geometry.history + 2
    batch = [reference.context_of(cut, window=geometry.history, capacity=capacity) for cut in legal]
    batch = jax.tree.map(lambda *rows: np.stack(rows), *batch)
    scores = rng.uniform(-1, 1, batch.start.shape).astype(np.float32)
    pool = jit(jax.vmap(lambda row, context: nodes.pool_scores(row, context, geometry)))
    expected = [
        [reference.node_score(node, cut, row[: len(cut)], geometry.block_size) for node in reference.nodes(geometry)]
        for cut, row in zip(legal, scores, strict=True)
    ]
    np.testing.assert_allclose(pool(np.where(batch.valid, scores, np.nan), batch), expected, atol=1e-6)


@pytest.mark.parametrize("block_size", [3, 8])
def test_equal_scores_stay_equal_to_the_bit(block_size):
    geometry = Geometry(history=2 * block_size**2 + 2, block_size=block_size, max_lod=2, recent_tokens=2)
    values = np.linspace(-1, 1, 64, dtype=np.float32)
    rows = np.repeat(values[:, None], geometry.history, axis=1)  # given whole: XLA would know a constant's mean
    pooled = jit(jax.vmap(lambda row: nodes.pool_tokens(row, geometry)))(rows)
    np.testing.assert_array_equal(pooled, np.broadcast_to(values[:, None], pooled.shape))


@both
def test_means_of_extreme_scores_are_in_range(geometry):
    size, most = geometry.block_size, np.finfo(np.float32).max
    blocks = [[most] * size, [-most, most, *[0.0] * (size - 2)], [-np.inf, *[1.0] * (size - 1)]]
    blocks += [[np.inf, *[-np.inf] * (size - 1)], [np.nan, *[np.inf] * (size - 1)]]
    tokens = np.zeros(geometry.history, np.float32)
    tokens[: 5 * size] = np.ravel(blocks)
    found = np.asarray(jit(lambda row: nodes.pool_tokens(row, geometry))(tokens))
    np.testing.assert_array_equal(found[:5], np.asarray([most, 0, -np.inf, np.inf, np.nan], np.float32))
    above = nodes.by_level(found, geometry)[1]
    assert above[0] == (np.float32(most) / 2 if size == 2 else -np.inf)
    assert above[1] == np.inf if size == 2 else np.isnan(above[1])


def test_one_score_that_is_no_number_is_never_lost():
    # Of many blocks at once: a vectorised minimum leaves it out.
    geometry = Geometry(history=96, block_size=2, max_lod=4, recent_tokens=3)
    rows = np.zeros((64, geometry.history), np.float32)
    rows[:, 2:4] = np.nan
    found = np.asarray(jax.jit(jax.vmap(lambda row: nodes.pool_tokens(row, geometry)))(rows))
    lost = {node for row in found for node, value in by_node(row, geometry).items() if np.isnan(value)}
    assert lost == {(2, 1), (0, 2), (0, 3), (0, 4)} and np.isnan(found).sum() == 64 * 4
