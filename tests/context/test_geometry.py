import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensjax.context.geometry import Geometry
from tests import reference

# Windows that are and are not multiples of the block size, with and without blocks at every level.
TINY = [
    Geometry(history=12, block_size=2, max_lod=3, recent_tokens=3),
    Geometry(history=16, block_size=2, max_lod=2, recent_tokens=4),
    Geometry(history=17, block_size=3, max_lod=2, recent_tokens=2),
    Geometry(history=22, block_size=4, max_lod=1, recent_tokens=5),
    Geometry(history=23, block_size=3, max_lod=4, recent_tokens=6),
    Geometry(history=11, block_size=5, max_lod=2, recent_tokens=6),
    Geometry(history=22, block_size=4, max_lod=1, recent_tokens=5, omit=True),
    Geometry(history=15, block_size=2, max_lod=1, recent_tokens=3, omit=True),
    Geometry(history=11, block_size=6, max_lod=1, recent_tokens=6, omit=True),
    Geometry(history=23, block_size=4, max_lod=1, recent_tokens=5, omit=True, sink_blocks=2),
    Geometry(history=15, block_size=2, max_lod=1, recent_tokens=3, omit=True, sink_blocks=6),
    Geometry(history=7, block_size=2, max_lod=1, recent_tokens=3, omit=True, sink_blocks=5),
]


def test_worked_by_hand():
    # 47 tokens before the tail: 11 blocks of 4 and 2 of 16, so 13 collapses that save 3 entries each.
    geometry = Geometry(history=64, block_size=4, max_lod=2, recent_tokens=17)
    assert [geometry.blocks(lod) for lod in (1, 2)] == [11, 2]
    assert geometry.max_collapses == 13
    assert geometry.shortest == 64 - 13 * 3 == 25
    assert [geometry.length(target) for target in (25, 27, 28, 60, 61, 63, 64)] == [25, 25, 28, 58, 61, 61, 64]


def test_omission_worked_by_hand():
    # 11 blocks of 4 before the tail, each of which saves 4 entries; the policy's map has a row for each.
    geometry = Geometry(history=64, block_size=4, max_lod=1, recent_tokens=17, omit=True)
    assert (geometry.saving, geometry.max_collapses, geometry.shortest) == (4, 11, 20)
    assert [geometry.length(target) for target in (20, 23, 24, 59, 60, 63, 64)] == [20, 20, 24, 56, 60, 60, 64]
    assert (geometry.rows(30), geometry.capacity(41)) == (41, 30)
    with pytest.raises(ValueError, match="the nearest reachable lengths are 20 and 24"):
        geometry.length(19)
    gists = dataclasses.replace(geometry, omit=False)
    assert (gists.saving, gists.shortest) == (3, 31)
    assert gists.rows(30) == gists.capacity(30) == 30


def test_sinks_worked_by_hand():
    # As above, but the first 2 of the 11 blocks stay: 9 may be omitted, and only these have a row in the map.
    geometry = Geometry(history=64, block_size=4, max_lod=1, recent_tokens=17, omit=True, sink_blocks=2)
    assert (geometry.nodes, geometry.max_collapses, geometry.shortest, geometry.head) == (11, 9, 28, 8)
    assert (geometry.rows(30), geometry.capacity(39)) == (39, 30)
    assert geometry.is_free(np.asarray([0, 7, 8, 46, 47])).tolist() == [False, False, True, True, False]
    with pytest.raises(ValueError, match=r"Geometry.sink_blocks must be 0 without omission .*, got 2"):
        dataclasses.replace(geometry, omit=False)


def test_with_omission_there_is_one_level():
    with pytest.raises(ValueError, match=r"Geometry.max_lod must be 1 with omission .*, got 2"):
        Geometry(history=64, block_size=4, max_lod=2, recent_tokens=17, omit=True)


@pytest.mark.parametrize("geometry", TINY, ids=str)
def test_lengths_are_those_of_the_enumerated_cuts(geometry):
    reachable = reference.reachable_lengths(geometry)
    assert geometry.shortest == min(reachable)
    assert geometry.max_collapses == len(reachable) - 1
    for target in range(geometry.shortest, geometry.history + 1):
        assert geometry.length(target) == max(length for length in reachable if length <= target)


@given(
    window=st.integers(8, 5000),
    block_size=st.integers(2, 32),
    max_lod=st.integers(0, 4),
    tail=st.floats(0, 0.5),
    share=st.floats(0, 1),
)
def test_rounding_counts_from_the_window(window, block_size, max_lod, tail, share):
    omit = max_lod == 0
    geometry = Geometry(window, block_size, max(max_lod, 1), recent_tokens=1 + int(tail * window), omit=omit)
    saving = block_size - (not omit)
    target = geometry.shortest + int(share * (window - geometry.shortest))
    length = geometry.length(target)
    assert (window - length) % saving == 0
    assert geometry.shortest <= length <= target < length + saving
    assert geometry.capacity(geometry.rows(length)) == length <= geometry.rows(length)
    assert geometry.length(length) == length


def test_a_target_beyond_the_window_is_the_whole_window():
    assert Geometry(64, 4, 2, 17).length(1000) == 64


@pytest.mark.parametrize(("name", "least"), [("history", 1), ("block_size", 2), ("max_lod", 1), ("recent_tokens", 0)])
def test_sizes_out_of_range_are_refused(name, least):
    sizes = {"history": 64, "block_size": 4, "max_lod": 2, "recent_tokens": 8}
    assert getattr(Geometry(**sizes | {name: least}), name) == least
    with pytest.raises(
        ValueError, match=rf"Geometry.{name} must be (at least {least}|in \[{least}, 30\]), got {least - 1}"
    ):
        Geometry(**sizes | {name: least - 1})


def test_an_unreachable_length_names_the_nearest_ones():
    geometry = Geometry(history=64, block_size=4, max_lod=2, recent_tokens=17)
    with pytest.raises(ValueError, match=re.escape("context_end asks for 24 entries")) as error:
        geometry.length(24, name="context_end")
    assert "25 and 28" in str(error.value)


def test_fractions_round_down_without_float_noise():
    geometry = Geometry(history=100, block_size=2, max_lod=1, recent_tokens=5)
    assert 0.57 * 100 < 57  # in floating point
    assert geometry.length_of_fraction(0.57) == 57
    assert geometry.length_of_fraction(0.579) == 57
    assert geometry.length_of_fraction(1.0) == 100
    with pytest.raises(ValueError, match="context_start asks for 40 entries"):
        geometry.length_of_fraction(0.4, name="context_start")
