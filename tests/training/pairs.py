"""Variants of one history, by hand and at random, and what pairs of them supervise."""

import functools

import jax
import numpy as np

from lensjax.context.geometry import Geometry
from lensjax.training import preferences
from lensjax.training.preferences import PreferencePairs
from tests import reference

HAND = Geometry(history=12, block_size=2, max_lod=2, recent_tokens=2)
# Tokens:         0-3     4-5     6  7     8-9     10  11
COARSE = [(0, 2), (4, 1), (6, 0), (7, 0), (8, 1), (10, 0), (11, 0)]
FINE = [(0, 1), (2, 0), (3, 0), (4, 1), (6, 1), (8, 0), (9, 0), (10, 0), (11, 0)]

# One window for all random cuts, so that one program serves every example.
GEOMETRY = Geometry(history=30, block_size=2, max_lod=3, recent_tokens=5)
CAPACITY = 24

# One level of gists and full coverage: what one variant gains in detail, the other gains elsewhere.
BALANCED = Geometry(history=30, block_size=3, max_lod=1, recent_tokens=5)


def variants_of(cuts, geometry, capacity=CAPACITY):
    return reference.variants_of(cuts, window=geometry.history, capacity=capacity)


def random_variants(seed, count=4, length=22, geometry=GEOMETRY):
    """Recency and random cuts, as lists of entries."""
    rng = np.random.default_rng(seed)
    recency = [(token, 0) for token in range(geometry.history - length, geometry.history)]
    return [recency, *(reference.random_cut(geometry, length, rng) for _ in range(count - 1))]


def balanced_cuts():
    """Four distinct cuts of one length, with one level of gists."""
    rng = np.random.default_rng(0)
    cuts = [reference.random_cut(BALANCED, 22, rng) for _ in range(4)]
    assert len({tuple(cut) for cut in cuts}) == 4
    return cuts


def one_pair(better=0, worse=1):
    return pairs_of([(better, worse)])


def all_pairs(count=4):
    return pairs_of([(b, w) for b in range(count) for w in range(count) if b != w])


def pairs_of(members, valid=None):
    better, worse = np.asarray(members, np.int32).T
    ones = np.ones(len(members), np.float32)
    return PreferencePairs(better, worse, ones, ones.astype(bool) if valid is None else np.asarray(valid))


@functools.cache
def _span_targets(geometry, worse_only):
    return jax.jit(functools.partial(preferences.span_targets, geometry=geometry, worse_only=worse_only))


def targets_of(cuts, pairs, geometry, *, worse_only=False, capacity=CAPACITY):
    result = _span_targets(geometry, worse_only)(variants_of(cuts, geometry, capacity), pairs)
    assert result.where.shape == result.target.shape == (len(pairs.better), 2, capacity)
    np.testing.assert_array_equal(np.asarray(result.target)[~np.asarray(result.where)], 0)
    return result
