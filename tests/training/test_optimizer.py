import functools
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from lensjax import _settings
from lensjax.runs.engine import devices
from lensjax.runs.store import checkpoint
from lensjax.training.optim.optimizer import OptimizerConfig, make_optimizer, set_rates
from tests.small import SMALL

PARAMS = {"matrix": np.asarray([[1.0, -2.0]], np.float32), "scale": np.asarray([0.5], np.float32)}
CONFIG = OptimizerConfig(clip_norm=1.0)
GROKFAST = replace(CONFIG, grokfast=50.0)
MUON = replace(CONFIG, name="muon")
ALL = replace(MUON, grokfast=2.0)


@functools.cache
def optimizer(config):
    """The transformation, and its compiled step at given rates."""
    tx = make_optimizer(config)

    @jax.jit
    def step(grads, state, parts, rate, decay):
        state = set_rates(state, learning_rate=rate, weight_decay=decay)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, parts)
            return optax.apply_updates(parts, updates), state

    return tx, step


def run(grads, **options):
    """Parameters after each step of a run with one part."""
    return [parts["lens"] for parts in run_parts([{"lens": grad} for grad in grads], {"lens": PARAMS}, **options)]


def run_parts(grads, parts, *, rate=0.1, decay=0.0, config=CONFIG, place=lambda state: state):
    tx, step = optimizer(config)
    state, seen = place(tx.init(parts)), []
    for grad in grads:
        parts, state = step(grad, state, parts, np.float32(rate), np.float32(decay))
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


def test_adamw_is_to_the_bit_a_chain_of_optax():
    """Each part has the state of such a chain, and the two rates stand beside them."""

    @jax.jit
    def chained(grads, state, params, rate, decay):
        chain = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(0.9, 0.99),
            optax.add_decayed_weights(decay, mask={"matrix": True, "scale": False}),
            optax.scale_by_learning_rate(rate),
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, state = chain.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    state = optimizer(CONFIG)[0].init({"lens": PARAMS})
    leaves = ["count", "mu/matrix", "mu/scale", "nu/matrix", "nu/scale"]
    assert names(state.inner_state) == [f"lens/1/{name}" for name in leaves]
    assert sorted(state.hyperparams) == ["learning_rate", "weight_decay"]
    grads, params, old = [tree([3.0, -0.4], 0.2), tree([0.1, 0.2], 0.3)], PARAMS, state.inner_state["lens"]
    for grad, after in zip(grads, run(grads, decay=0.5), strict=True):
        params, old = chained(grad, old, params, np.float32(0.1), np.float32(0.5))
        jax.tree.map(np.testing.assert_array_equal, after, params)


# Grokfast


def test_grokfast_amplifies_the_slow_part_of_the_gradients():
    # Decay 0.98, strength 50: m1 = g1 / 50, so 2 g1 goes on; m2 = 0.98 g1 / 50 + g2 / 50, so 2 g2 + 0.98 g1 goes on.
    last = run([tree([0.2, -0.1], 0.1), tree([0.1, 0.2], -0.1)], decay=0.5, config=GROKFAST)[-1]
    expected = [
        adamw([0.4, 0.396], 1.0, rate=0.1, decay=0.5),
        adamw([-0.2, 0.302], -2.0, rate=0.1, decay=0.5),
        adamw([0.2, -0.102], 0.5, rate=0.1, decay=0.0),
    ]
    assert [*last["matrix"][0].tolist(), *last["scale"].tolist()] == pytest.approx(expected, rel=1e-5)


def test_what_grokfast_amplifies_is_clipped():
    # The norm of the first gradient is 1, and 2 once it is amplified.
    found = run([tree([0.6, 0.0], 0.8), tree([0.0, 0.0], -0.7)], config=GROKFAST)[-1]
    expected = run([tree([0.6, 0.0], 0.8), tree([0.588, 0.0], -0.616)])[-1]
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


@pytest.mark.slow
def test_every_leaf_of_the_models_moves():
    built = _settings.replace(SMALL, **{"gist.layers": 1, "gist.pooling": "query"}).build_models()
    shapes = {name: jax.eval_shape(getattr(built, name).init, jax.random.key(0)) for name in ("base", "gist", "lens")}
    parts = normal(0, shapes)
    after = run_parts([normal(1, parts)], parts, config=ALL)[-1]
    assert names(after) == names(parts)
    moved = jax.tree.map(lambda old, new: bool((np.asarray(old) != np.asarray(new)).any()), parts, after)
    assert all(jax.tree.leaves(moved)), moved
    momenta = {
        name.split("/mu/")[1] for name in names(optimizer(ALL)[0].init(parts)) if "muon" in name and "/mu/" in name
    }
    inside = ("attention/key/kernel", "attention/out/kernel", "attention/query/kernel", "attention/value/kernel")
    assert momenta == {f"transformer/block_0/{name}" for name in (*inside, "mlp/down/kernel", "mlp/gate_up/kernel")}


def test_a_split_state_gives_the_same_steps_and_is_saved_whole(tmp_path):
    parts, grads = {"lens": PART}, [{"lens": normal(seed, PART)} for seed in (1, 2)]
    mesh = devices.make_mesh({})
    place = functools.partial(devices.place, mesh=mesh, split=True)
    expected = run_parts(grads, parts, config=ALL)[-1]
    found = run_parts(grads, place(parts), config=ALL, place=place)[-1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    init = optimizer(ALL)[0].init
    state = place(init(parts))
    split = [name for name, leaf in zip(names(state), jax.tree.leaves(state), strict=True) if any(leaf.sharding.spec)]
    assert "inner_state/lens/2/inner_states/muon/inner_state/0/mu/transformer/block_0/kernel" in split
    checkpoint.save(tmp_path, 1, state)
    restored, _ = checkpoint.restore(tmp_path, 1, jax.eval_shape(lambda: init(parts)))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_muon_without_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.name is muon, .* matrices of a transformer, and lens has none"):
        make_optimizer(MUON).init({"lens": PARAMS})


# Rates


def test_a_vmap_over_rates_is_as_many_runs():
    tx, rates = make_optimizer(ALL), np.asarray([0.01, 0.1], np.float32)
    parts, grads = {"lens": PART}, [{"lens": normal(seed, PART)} for seed in (1, 2)]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
    def step(grad, state, parts, rate):
        state = set_rates(state, learning_rate=rate, weight_decay=rate)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grad, state, parts)
            return optax.apply_updates(parts, updates), state

    both, states = jax.tree.map(lambda leaf: np.stack([leaf] * 2), (parts, tx.init(parts)))
    for grad in grads:
        both, states = step(grad, states, both, rates)
    for index, rate in enumerate(rates):
        alone = run_parts(grads, parts, config=ALL, rate=rate, decay=rate)[-1]
        one = jax.tree.map(lambda leaf, i=index: leaf[i], both)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, alone)
    kinds = [(leaf.shape[1:], leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(states)]
    assert kinds == [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tx.init(parts))]


def test_set_rates_changes_what_is_injected_and_nothing_else():
    tx = make_optimizer(CONFIG, learning_rate=0.3, weight_decay=0.2)
    state = tx.init({"lens": PARAMS})
    assert {name: float(rate) for name, rate in state.hyperparams.items()} == pytest.approx(
        {"learning_rate": 0.3, "weight_decay": 0.2}
    )
    after = set_rates(state, learning_rate=0.5, momentum=0.9)
    assert {name: float(rate) for name, rate in after.hyperparams.items()} == pytest.approx(
        {"learning_rate": 0.5, "weight_decay": 0.2}
    )
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    foreign = optax.adam(1e-3).init(PARAMS)
    assert set_rates(foreign, learning_rate=0.5) is foreign
