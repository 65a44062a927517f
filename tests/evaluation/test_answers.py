"""Tasks with known answers: the context that shows them, and whether a context does."""

import numpy as np

from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.evaluation import answers
from tests.small import SMALL

GEOMETRY = SMALL.geometry
SIZE, BLOCKS = GEOMETRY.block_size, GEOMETRY.blocks(1)


def test_the_oracle_shows_the_answer_and_then_the_most_recent_blocks():
    state = answers.oracle_state([4 * SIZE], 22, GEOMETRY)
    cut = np.asarray(allocator.to_cut(state, GEOMETRY))
    assert (cut == 0).sum() + sum((cut == lod).sum() // SIZE**lod for lod in (1, 2)) == 22
    assert (cut[4 * SIZE : 5 * SIZE] == 0).all()
    # Blocks 0 to 3 and 6 to 9 as gists of two; 5 alone, as its parent holds the answer; what is newer in full.
    assert cut[: BLOCKS * SIZE : SIZE].tolist() == [2, 2, 2, 2, 0, 1, 2, 2, 0, 0, 0, 0]


def test_the_oracle_shows_all_of_several_answers():
    state = answers.oracle_state([2 * SIZE, 5 * SIZE], 22, GEOMETRY)
    cut = np.asarray(allocator.to_cut(state, GEOMETRY))
    assert (cut[4:6] == 0).all() and (cut[10:12] == 0).all() and (cut[:4] > 0).all()


def test_a_context_shows_a_block_in_full_or_it_does_not():
    cut = np.zeros(GEOMETRY.history, np.int32)
    cut[4:8] = 2
    context = contexts.from_cut(cut, GEOMETRY, capacity=GEOMETRY.history)
    shown = [bool(answers.shows_in_full(context, [start], GEOMETRY)) for start in range(0, 12, SIZE)]
    assert shown == [True, True, False, False, True, True]
    # Of several blocks all must be shown.
    assert answers.shows_in_full(context, [2, 8], GEOMETRY) and not answers.shows_in_full(context, [2, 6], GEOMETRY)
    late = contexts.recency(10, GEOMETRY, capacity=10)
    assert not answers.shows_in_full(late, [20], GEOMETRY) and answers.shows_in_full(late, [22], GEOMETRY)
