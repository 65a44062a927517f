import functools

import jax
import numpy as np
import pytest

from lensjax import optimizer
from lensjax.config import OptimizerConfig

PARAMS = {"matrix": np.asarray([[1.0, -2.0]], np.float32), "scale": np.asarray([0.5], np.float32)}
CONFIG = OptimizerConfig(b1=0.9, b2=0.99, clip_norm=1.0)


@functools.cache
def compiled(config):
    return jax.jit(functools.partial(optimizer.update, config))


def run(grads, *, rate=0.1, decay=0.0, config=CONFIG):
    """Parameters after each step of a run with one part."""
    steps = run_parts([{"lens": grad} for grad in grads], {"lens": PARAMS}, rate=rate, decay=decay, config=config)
    return [parts["lens"] for parts in steps]


def run_parts(grads, parts, *, rate=0.1, decay=0.0, config=CONFIG):
    state, seen = optimizer.init(config, parts), []
    for grad in grads:
        parts, state = compiled(config)(
            grad, state, parts, learning_rate=np.float32(rate), weight_decay=np.float32(decay)
        )
        seen.append(parts)
    return seen


def tree(matrix, scale):
    return {"matrix": np.asarray([matrix], np.float32), "scale": np.asarray([scale], np.float32)}


def adamw(steps, start, *, rate, decay):
    """The textbook recurrence for one number."""
    x, m, v = start, 0.0, 0.0
    for t, grad in enumerate(steps, start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
        x -= rate * (m / (1 - 0.9**t) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-8) + decay * x)
    return x


def test_it_is_adamw_that_decays_matrices_only():
    # Norms below 1: nothing is clipped.
    last = run([tree([0.3, -0.4], 0.2), tree([0.1, 0.5], -0.3)], rate=0.1, decay=0.5)[-1]
    expected = [
        adamw([0.3, 0.1], 1.0, rate=0.1, decay=0.5),
        adamw([-0.4, 0.5], -2.0, rate=0.1, decay=0.5),
        adamw([0.2, -0.3], 0.5, rate=0.1, decay=0.0),
    ]
    assert [*last["matrix"][0].tolist(), *last["scale"].tolist()] == pytest.approx(expected, rel=1e-5)


def test_gradients_are_clipped_to_the_norm_of_the_whole_part():
    # The first gradient has norm 5 and counts as a fifth of itself.
    found = run([tree([3.0, 0.0], 4.0), tree([0.1, 0.2], 0.3)])
    clipped = run([tree([0.6, 0.0], 0.8), tree([0.1, 0.2], 0.3)])
    other = run([tree([3.0, 0.0], 4.0), tree([0.1, 0.2], 0.3)], config=OptimizerConfig(clip_norm=100.0))
    np.testing.assert_allclose(found[-1]["matrix"], clipped[-1]["matrix"], rtol=1e-6)
    np.testing.assert_allclose(found[-1]["scale"], clipped[-1]["scale"], rtol=1e-6)
    assert abs(other[-1]["scale"] - found[-1]["scale"]) > 1e-3


def test_each_part_is_clipped_alone():
    small, large = tree([0.1, 0.2], 0.3), tree([300.0, 0.0], 400.0)
    grads = [small, tree([0.3, -0.2], 0.1)]
    alone = run(grads)
    together = run_parts([{"lens": grad, "base": large} for grad in grads], {"lens": PARAMS, "base": PARAMS})
    jax.tree.map(np.testing.assert_array_equal, together[-1]["lens"], alone[-1])


def test_rate_and_decay_are_data(compiles):
    grads = [tree([0.3, -0.4], 0.2)]
    (slow,) = run(grads, rate=0.01)
    with compiles() as names:
        (fast,), (decayed,) = run(grads, rate=0.1), run(grads, rate=0.1, decay=0.5)
    assert names == []
    moved = {name: np.asarray(fast[name]) - PARAMS[name] for name in PARAMS}
    for name, value in moved.items():
        np.testing.assert_allclose(value, 10 * (np.asarray(slow[name]) - PARAMS[name]), rtol=1e-4)
    np.testing.assert_allclose(decayed["matrix"], fast["matrix"] - 0.05 * PARAMS["matrix"], rtol=1e-5)
    np.testing.assert_array_equal(decayed["scale"], fast["scale"])


def test_types_stay():
    (after,) = run([tree([0.3, -0.4], 0.2)])
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {np.dtype("float32")}
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(after))
