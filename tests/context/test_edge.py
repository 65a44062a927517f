"""The edge of a tree makes the gists that the whole tree would."""

import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import edge, tree
from tests.small import jit


def mean(children):
    return children.mean(axis=1) + 1


@pytest.mark.parametrize(("size", "levels", "rows"), [(2, 3, 5), (3, 2, 4), (2, 4, 1), (4, 2, 16)])
def test_gists_are_those_of_the_tree_however_it_grows(size, levels, rows):
    random = np.random.default_rng(size + levels)
    leaves = random.normal(size=(90, 2)).astype("f")
    whole = tree.build(leaves, mean, block_size=size, max_lod=levels)
    append = jit(lambda *inputs, count: edge.append(*inputs, mean, count=count))
    held, now, found = 0, edge.init(dim=2, block_size=size, max_lod=levels), [[] for _ in range(levels)]
    while held < len(leaves):
        count = min(int(random.integers(0, rows + 1)), len(leaves) - held)
        chunk = np.full((rows, 2), np.inf, "f")  # what padding holds reaches nothing
        chunk[:count] = leaves[held : held + count]
        now, gists = append(now, jnp.int32(held), chunk, count=jnp.int32(count))
        counts = edge.completed(held, count, block_size=size, max_lod=levels)
        for level, rows_, new in zip(found, gists, counts, strict=True):
            level.extend(np.asarray(rows_[:new]))
        held += count
        for lod, waiting in enumerate(now):
            nodes = np.asarray(whole.levels[lod])[: held // size**lod]
            left = len(nodes) % size
            np.testing.assert_array_equal(waiting[:left], nodes[len(nodes) - left :])
            assert not np.any(waiting[left:])
    for level, expected in zip(found, whole.levels[1:], strict=True):
        np.testing.assert_array_equal(np.reshape(level, (-1, 2)), expected)
