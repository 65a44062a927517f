import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lensjax.models import HyperLoRAModel, hyperlora
from lensjax.models.hyperlora import PRESETS, Delta, HyperLoRAConfig
from tests.small import jit

DIM, TARGETS = 32, (("square", 32, 32), ("wide", 32, 96))


def delta(seed=0, shape=(4, 5), rank=2, size=1.0):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(shape[0], rank)), random.normal(size=(rank, shape[1]))
    return Delta(jnp.asarray(size * a, jnp.float32), jnp.asarray(b, jnp.float32))


def weights(delta):
    return np.asarray(delta.a, np.float64) @ np.asarray(delta.b, np.float64)


def features(count=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, DIM)), jnp.float32)


@functools.cache
def fresh(model):
    return jit(model.init)(jax.random.key(0))


# Sizes


def test_sizes_are_those_of_the_whole_matrix():
    first, second = delta(0), delta(1)
    assert float(hyperlora.inner(first, second)) == pytest.approx(np.sum(weights(first) * weights(second)), rel=1e-5)
    assert float(hyperlora.norm(first)) == pytest.approx(np.linalg.norm(weights(first)), rel=1e-5)
    found = hyperlora.difference_norm({"x": first, "y": second}, {"x": second, "y": second})
    assert float(found) == pytest.approx(np.linalg.norm(weights(first) - weights(second)) / 2, rel=1e-5)


def test_the_gradient_of_the_norm():
    check_grads(lambda a, b: hyperlora.norm(Delta(a, b)), (delta().a, delta().b), order=1, modes=["rev"], rtol=0.02)
    zero = Delta(jnp.zeros((4, 2)), jnp.zeros((2, 5)))
    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.grad(hyperlora.norm)(zero)))


def test_clamping_keeps_the_direction_and_what_is_small():
    large, small = delta(size=10.0), delta(size=0.01)
    clamped = hyperlora.clamp(large, np.float32(0.5))
    assert np.linalg.norm(weights(clamped)) == pytest.approx(0.5 * math.sqrt(4), rel=1e-5)
    np.testing.assert_allclose(weights(clamped) / np.linalg.norm(weights(clamped)),
                               weights(large) / np.linalg.norm(weights(large)), rtol=1e-4, atol=1e-6)  # fmt: skip
    np.testing.assert_array_equal(weights(hyperlora.clamp(small, np.float32(0.5))), weights(small))


def test_magnitudes_and_diversity_by_hand():
    # delta W is 3 for one task and -1 for the other: mean norm 2, both at distance 2 of their mean 1.
    two = {"x": Delta(jnp.asarray([[[3.0]], [[-1.0]]]), jnp.ones((2, 1, 1)))}
    assert hyperlora.magnitudes(two) == {"lora_magnitude_x": 2.0}
    assert float(hyperlora.diversity(two)) == 2.0
    same = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), {"x": delta(), "y": delta(1)})
    assert float(hyperlora.diversity(same)) == 0.0


# What deltas do


def test_mixing_adds_the_product():
    square, outputs = delta(shape=(4, 4)), np.random.default_rng(3).normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        hyperlora.mix(outputs, square), outputs + outputs @ weights(square), rtol=1e-4, atol=1e-5
    )


def test_adapting_changes_the_named_matrices_of_any_parameters():
    params = {"head": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}, "x": jnp.zeros((4, 5))}
    adapted = hyperlora.adapt(params, {"head/kernel": delta(0), "x": delta(1)})
    np.testing.assert_allclose(adapted["head"]["kernel"], 1 + weights(delta(0)), rtol=1e-5)
    np.testing.assert_allclose(adapted["x"], weights(delta(1)), rtol=1e-5)
    assert adapted["head"]["bias"] is params["head"]["bias"] and params["x"].sum() == 0
    for wrong in ("head", "head/bias", "tail/kernel", "x/kernel"):
        with pytest.raises(ValueError, match=r"must lead to a matrix \[4, 5\]; there are: "):
            hyperlora.adapt(params, {wrong: delta()})


# Contexts and leaving one out


def test_contexts_by_hand():
    rows = jnp.asarray([[1.0], [2.0], [6.0], [jnp.nan]])
    valid = jnp.asarray([True, True, True, False])
    assert hyperlora.mean_context(rows, valid).tolist() == [3.0]
    contexts, held_out = hyperlora.leave_one_out_contexts(rows, valid)
    assert contexts[:3].tolist() == [[4.0], [3.5], [1.5]] and held_out.tolist() == [True, True, True, False]
    assert float(hyperlora.leave_one_out_loss([1.0, 2.0, 6.0, jnp.nan], held_out)) == 3.0


@pytest.mark.parametrize("valid", [[False, False, False], [False, True, False]])
def test_of_fewer_than_two_none_is_held_out(valid):
    contexts, held_out = hyperlora.leave_one_out_contexts(jnp.full((3, 2), jnp.nan), jnp.asarray(valid))
    assert not held_out.any() and np.isfinite(contexts[1]).all()
    gradient = jax.grad(hyperlora.leave_one_out_loss)(jnp.asarray([jnp.nan, 1.0, jnp.inf]), held_out)
    assert float(hyperlora.leave_one_out_loss([math.nan] * 3, held_out)) == 0 and not gradient.any()


def test_padding_changes_nothing():
    valid = jnp.asarray([True, True, False, True, False])
    rows = features(5)
    kept = rows[np.asarray(valid)]
    with_junk = jnp.where(valid[:, None], rows, jnp.nan)
    contexts, held_out = hyperlora.leave_one_out_contexts(with_junk, valid)
    expected, _ = hyperlora.leave_one_out_contexts(kept, jnp.ones(3, bool))
    np.testing.assert_allclose(contexts[np.asarray(valid)], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(held_out, valid)
    np.testing.assert_allclose(
        hyperlora.mean_context(with_junk, valid), hyperlora.mean_context(kept, jnp.ones(3, bool)), rtol=1e-5, atol=1e-6
    )


def test_nothing_of_an_example_reaches_its_own_prediction():
    """With subtraction from the sum, its rounding would."""
    model = HyperLoRAModel(replace(PRESETS["rlan_stable_safe"], init_scale=5.0), DIM, TARGETS)
    params, inputs = fresh(model), features(4, seed=9)

    @jit
    def predictions(examples):
        contexts, _ = hyperlora.leave_one_out_contexts(examples, jnp.ones(4, bool))
        deltas = jax.vmap(lambda context: model.apply(params, context))(contexts)
        return jax.vmap(hyperlora.mix)(inputs, deltas["square"])

    before = predictions(features())
    for i in range(4):
        after = predictions(features().at[i].multiply(1e3))
        np.testing.assert_array_equal(after[i], before[i])
        assert all((after[j] != before[j]).any() for j in range(4) if j != i)


# Equivariance


def test_equivariance_loss_by_hand():
    unit = Delta(jnp.asarray([[1.0], [0.0]]), jnp.asarray([[1.0, 0.0]]))
    double, other = Delta(2 * unit.a, unit.b), Delta(unit.a, jnp.asarray([[0.0, 1.0]]))
    loss = hyperlora.equivariance_loss
    assert float(loss({"x": unit}, {"x": unit})) == 0
    assert float(loss({"x": unit}, {"x": double})) == pytest.approx(0.3)
    assert float(loss({"x": unit}, {"x": other})) == pytest.approx(0.7)
    assert float(loss({"x": unit}, {"x": Delta(-unit.a, unit.b)})) == pytest.approx(1.4)
    assert float(loss({"x": unit, "y": unit}, {"x": double, "y": other})) == pytest.approx(0.5)
    zero = {"x": Delta(0 * unit.a, unit.b)}
    assert float(loss({"x": unit}, zero)) == pytest.approx(1.0)


def test_equivariance_pulls_the_transformed_deltas_alone():
    original, transformed = {"x": delta(0)}, {"x": delta(1)}
    check_grads(lambda y: hyperlora.equivariance_loss(original, y), (transformed,), order=1, modes=["rev"], rtol=0.02)
    still = jax.grad(hyperlora.equivariance_loss)(original, transformed)
    assert all(not leaf.any() for leaf in jax.tree.leaves(still))
    zero = jax.tree.map(jnp.zeros_like, transformed)
    gradient = jax.grad(hyperlora.equivariance_loss, argnums=1)(original, zero)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_output_equivariance_by_hand():
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]).astype(np.float32), np.log([[0.25, 0.75], [0.5, 0.5]]).astype(np.float32)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    loss = hyperlora.output_equivariance_loss
    assert float(loss(p, q, np.asarray([True, False]))) == pytest.approx(expected, rel=1e-5)
    assert float(loss(p, p, np.asarray([True, True]))) == 0 and float(loss(p, q, np.zeros(2, bool))) == 0
    check_grads(lambda q: loss(p, q, np.asarray([True, True])), (q,), order=1, modes=["rev"], rtol=0.02)
    assert not jax.grad(loss)(jnp.asarray(p), q, np.asarray([True, True])).any()


# The hypernetwork


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_the_norm_of_fresh_deltas_is_init_scale(scaling):
    model = HyperLoRAModel(HyperLoRAConfig(scaling=scaling, init_scale=0.3), 64, (("square", 64, 64), ("wide", 64, 96)))
    found = jit(lambda key, contexts: jax.vmap(functools.partial(model.apply, model.init(key)))(contexts))(
        jax.random.key(1), jax.random.normal(jax.random.key(2), (16, 64))
    )
    for norm in hyperlora.magnitudes(found).values():
        assert float(norm) == pytest.approx(0.3, rel=0.1)


def test_the_published_scale_is_a_standard_deviation():
    """With which the norm at width 256 was measured as 212."""
    model = HyperLoRAModel(PRESETS["rlan_stable"], 256, (("x", 256, 256),))
    found = jit(lambda key, context: model.apply(model.init(key), context))(
        jax.random.key(0), jax.random.normal(jax.random.key(1), (256,))
    )
    assert float(hyperlora.norm(found["x"])) == pytest.approx(212, rel=0.1)


def test_deltas_depend_on_the_context_and_stay_below_the_limit():
    config = HyperLoRAConfig(init_scale=50.0, max_norm=0.25)
    model = HyperLoRAModel(config, DIM, TARGETS)
    params = fresh(model)
    found = jit(jax.vmap(lambda context: model.apply(params, context)))(features())
    assert {name: (d.a.shape, d.b.shape) for name, d in found.items()} == {
        "square": ((4, 32, 8), (4, 8, 32)),
        "wide": ((4, 32, 8), (4, 8, 96)),
    }
    for norm in hyperlora.magnitudes(found).values():
        assert float(norm) == pytest.approx(0.25 * math.sqrt(32), rel=1e-4)
    assert float(hyperlora.diversity(found)) > 0.1
    with pytest.raises(ValueError, match=r"context must have shape \[32\]"):
        model.apply(params, jnp.zeros(31))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"hyperlora.rank must be in \[1, 1048576\], got 0"),
        ({"init": "none"}, "hyperlora.init must be one of norm, std, got 'none'"),
        ({"init_scale": 0.0}, "hyperlora.init_scale must be above 0, got 0.0"),
        ({"max_norm": math.inf}, "hyperlora.max_norm must be finite and above 0, got inf"),
        ({"loo_weight": -1.0}, "hyperlora.loo_weight must be at least 0, got -1.0"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        HyperLoRAConfig(**change)


def test_the_mean_of_one_example_is_that_example():
    context = hyperlora.mean_context([[2.0, 4.0], [9.0, 9.0]], [True, False])
    np.testing.assert_array_equal(context, [2.0, 4.0])
