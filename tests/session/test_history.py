"""What a session has read: values that share their blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensjax.session import history as histories
from lensjax.session.history import Rows


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(histories, "BLOCK", 4)


@given(
    steps=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9), st.booleans()), min_size=1, max_size=25),
    where=st.integers(0, 100),
)
def test_every_value_stays_what_it_was_however_others_grow(steps, where):
    """Appending to any value made so far, not only to the newest, against plain lists."""
    made = [(Rows((2,), np.int32), [], 0)]
    for number, (of, count, forgets) in enumerate(steps):
        rows, expected, gone = made[of % len(made)]
        if forgets:
            gone = max(gone, where % (len(expected) + 1))
            rows = rows.forget(gone)
        new = [[100 * number + index, index] for index in range(count)]
        made.append((rows.append(np.array(new, np.int32).reshape(-1, 2)), expected + new, gone))
    for rows, expected, gone in made:
        assert rows.length == len(expected) and rows.first % 4 == 0 and gone - 4 < rows.first <= gone
        assert rows.nbytes == 8 * (len(expected) - rows.first)
        assert rows.between(rows.first, rows.length).tolist() == expected[rows.first :]
        index = np.arange(gone, len(expected))[::-1]
        assert rows.take(index).tolist() == [expected[place] for place in index]
        middle = (rows.first + rows.length) // 2
        assert rows.between(middle, rows.length).tolist() == expected[middle:]


def test_values_that_only_grow_at_the_end_are_not_copied():
    rows = Rows((), np.int32).append(np.arange(3))
    longer = rows.append(np.arange(3, 11))
    assert longer.blocks[0] is rows.blocks[0] and len(longer.blocks) == 3
    other = rows.append(np.array([7]))
    assert other.blocks[0] is not rows.blocks[0] and longer.take(np.array([3])) == 3 and other.take(np.array([3])) == 7


def test_rows_of_a_context_are_found():
    history = histories.empty(dim=1, block_size=2, max_lod=2)
    # Seven tokens: three blocks of two, one of four. A gist says its level and block.
    gists = [np.array([[10.0], [11.0], [12.0]]), np.array([[20.0]])]
    history = history.append(np.arange(40, 47), gists)
    start, lod, valid = np.array([0, 4, 5, 6, 99]), np.array([2, 0, 0, 0, 0]), np.array([True] * 4 + [False])
    found = history.find(start, lod, valid)
    assert found.tokens.tolist() == [0, 44, 45, 46, 0]
    assert found.gists[:, 0].tolist() == [20, 12, 12, 0, 0]  # the last token's block has no gist yet
    later = history.append(np.array([47, 48]), [np.array([[13.0]]), np.array([[21.0]])]).forget(4)
    assert (later.read, later.held, later.forgotten) == (9, 5, 4)
    found = later.find(np.array([0, 2, 4]), np.array([1, 0, 0]), np.ones(3, bool))
    assert found.tokens.tolist() == [0, 46, 48] and found.gists[:, 0].tolist() == [12, 13, 0]
    assert found.tokens.dtype == np.int32 and found.gists.dtype == np.float32
