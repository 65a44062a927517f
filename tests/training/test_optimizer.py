import functools
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from lensjax.models import build_models
from lensjax.runs.config import OptimizerConfig
from lensjax.runs.engine import devices
from lensjax.runs.store import checkpoint
from lensjax.training.optim import optimizer
from tests.runs import TINY

PARAMS = {"matrix": np.asarray([[1.0, -2.0]], np.float32), "scale": np.asarray([0.5], np.float32)}
CONFIG = OptimizerConfig(b1=0.9, b2=0.99, clip_norm=1.0)
GROKFAST = replace(CONFIG, grokfast=2.0, grokfast_decay=0.5)
MUON = replace(CONFIG, name="muon")
ALL = replace(MUON, grokfast=2.0)


@functools.cache
def compiled(config):
    return jax.jit(functools.partial(optimizer.update, config))


def run(grads, *, rate=0.1, decay=0.0, config=CONFIG):
    """Parameters after each step of a run with one part."""
    steps = run_parts([{"lens": grad} for grad in grads], {"lens": PARAMS}, rate=rate, decay=decay, config=config)
    return [parts["lens"] for parts in steps]


def run_parts(grads, parts, *, rate=0.1, decay=0.0, config=CONFIG, place=lambda state: state):
    state, seen = place(optimizer.init(config, parts)), []
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


def names(tree):
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


def test_adamw_is_to_the_bit_what_it_was_before_there_were_others():
    """Checkpoints of earlier versions hold this state, and must go on as they would have."""

    @jax.jit
    def before(grads, state, params, rate, decay):
        mask = {"matrix": True, "scale": False}
        chain = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(0.9, 0.99),
            optax.add_decayed_weights(decay, mask=mask),
            optax.scale_by_learning_rate(rate),
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, state = chain.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    state = optimizer.init(CONFIG, {"lens": PARAMS})
    leaves = ["count", "mu/matrix", "mu/scale", "nu/matrix", "nu/scale"]
    assert names(state) == [f"lens/1/{name}" for name in leaves]
    grads, params, old = [tree([3.0, -0.4], 0.2), tree([0.1, 0.2], 0.3)], PARAMS, state["lens"]
    for grad, after in zip(grads, run(grads, decay=0.5), strict=True):
        params, old = before(grad, old, params, np.float32(0.1), np.float32(0.5))
        jax.tree.map(np.testing.assert_array_equal, after, params)


# Grokfast


def test_grokfast_amplifies_the_slow_part_of_the_gradients():
    # Decay 0.5, strength 2: m1 = g1 / 2, so 2 g1 goes on; m2 = g1 / 4 + g2 / 2, so 2 g2 + g1 / 2 goes on.
    last = run([tree([0.2, -0.1], 0.1), tree([0.1, 0.2], -0.1)], decay=0.5, config=GROKFAST)[-1]
    expected = [
        adamw([0.4, 0.3], 1.0, rate=0.1, decay=0.5),
        adamw([-0.2, 0.35], -2.0, rate=0.1, decay=0.5),
        adamw([0.2, -0.15], 0.5, rate=0.1, decay=0.0),
    ]
    assert [*last["matrix"][0].tolist(), *last["scale"].tolist()] == pytest.approx(expected, rel=1e-5)


def test_what_grokfast_amplifies_is_clipped():
    # The norm of the first gradient is 1, and 2 once it is amplified.
    found = run([tree([0.6, 0.0], 0.8), tree([0.1, 0.0], 0.0)], config=GROKFAST)[-1]
    expected = run([tree([0.6, 0.0], 0.8), tree([0.5, 0.0], 0.4)])[-1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


# Muon


def normal(seed, like):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), like)


MATRIX = {"transformer": {"block_0": {"kernel": np.zeros((6, 4), np.float32), "scale": np.zeros(4, np.float32)}}}
PART = normal(0, MATRIX | {"embedding": np.zeros((5, 4)), "head": {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}})


def test_muon_orthogonalises_the_matrices_of_a_transformer_and_leaves_the_rest_to_adam():
    grads = [{"lens": normal(seed, PART)} for seed in (1, 2, 3)]
    steps, others = (run_parts(grads, {"lens": PART}, config=config) for config in (MUON, CONFIG))
    before = PART
    for step, other in zip(steps, others, strict=True):
        kernels = [part["transformer"]["block_0"].pop("kernel") for part in (step["lens"], other["lens"])]
        update = (before["transformer"]["block_0"]["kernel"] - kernels[0]) / 0.1
        values = np.linalg.svd(update, compute_uv=False) / (0.2 * 6**0.5)
        assert (values > 0.6).all() and (values < 1.3).all()
        assert np.sqrt(np.mean(update**2)) == pytest.approx(0.2, rel=0.3)  # that of Adam's updates
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), step["lens"], other["lens"])
        step["lens"]["transformer"]["block_0"]["kernel"] = kernels[0]
        before = step["lens"]


def test_muon_takes_the_momentum_of_the_gradients_and_not_their_size():
    grads = [{"lens": normal(seed, MATRIX)} for seed in (1, 2)]
    smaller = [jax.tree.map(lambda leaf: leaf / 100, grad) for grad in grads]
    unclipped = replace(MUON, clip_norm=1e9)
    found, other = (run_parts(one, {"lens": MATRIX}, config=unclipped)[-1]["lens"] for one in (grads, smaller))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, other)


def test_every_leaf_of_the_models_moves():
    built = build_models(replace(TINY, gist=replace(TINY.gist, layers=1, pooling="query")))
    shapes = {name: jax.eval_shape(getattr(built, name).init, jax.random.key(0)) for name in ("base", "gist", "lens")}
    parts = normal(0, shapes)
    after = run_parts([normal(1, parts)], parts, config=ALL)[-1]
    assert names(after) == names(parts)
    moved = jax.tree.map(lambda old, new: bool((np.asarray(old) != np.asarray(new)).any()), parts, after)
    assert all(jax.tree.leaves(moved)), moved
    matrices = {
        name
        for name, label in zip(names(parts), jax.tree.leaves(optimizer._labels(parts)), strict=True)
        if label == "muon"
    }
    inside = ("attention/key/kernel", "attention/out/kernel", "attention/query/kernel", "attention/value/kernel")
    blocks = [f"{part}/transformer/block_0" for part in parts]
    assert matrices == {f"{block}/{n}" for block in blocks for n in (*inside, "mlp/down/kernel", "mlp/gate_up/kernel")}


def test_a_split_state_gives_the_same_steps_and_is_saved_whole(tmp_path):
    parts, grads = {"lens": PART}, [{"lens": normal(seed, PART)} for seed in (1, 2)]
    mesh = devices.make_mesh({})
    place = functools.partial(devices.place, mesh=mesh, split=True)
    expected = run_parts(grads, parts, config=ALL)[-1]
    found = run_parts(grads, place(parts), config=ALL, place=place)[-1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    state = place(optimizer.init(ALL, parts))
    split = [name for name, leaf in zip(names(state), jax.tree.leaves(state), strict=True) if any(leaf.sharding.spec)]
    assert "lens/2/inner_states/muon/inner_state/0/mu/transformer/block_0/kernel" in split
    checkpoint.save(tmp_path, 1, state)
    restored, _ = checkpoint.restore(tmp_path, 1, jax.eval_shape(lambda: optimizer.init(ALL, parts)))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_step_of_muon_compiles_once_for_all_rates_and_settings(compiles):
    parts, grads = {"lens": PART}, [{"lens": normal(1, PART)}]
    state = optimizer.init(ALL, parts)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, None, None, 0))
    def step(grad, state, parts, rate):
        return optimizer.update(ALL, grad, state, parts, learning_rate=rate, weight_decay=rate)

    with compiles() as compiled_names:
        step(grads[0], state, parts, np.asarray([0.1, 0.2], np.float32))
        after, states = step(grads[0], state, parts, np.asarray([0.01, 0.1], np.float32))
    assert compiled_names.count("jit(step)") == 1
    alone = run_parts(grads[:1], parts, config=ALL, rate=0.1, decay=0.1)[-1]
    second = jax.tree.map(lambda leaf: leaf[1], after)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), second, alone)
    spec = lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type)  # noqa: E731
    assert jax.tree.map(spec, jax.tree.map(lambda leaf: leaf[1], states)) == jax.tree.map(spec, state)


def test_muon_without_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.name is muon, .* matrices of a transformer, and lens has none"):
        optimizer.init(MUON, {"lens": PARAMS})
