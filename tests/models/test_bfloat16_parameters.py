"""Matrices in bfloat16; everything that must not be is float32."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.models import BaseModel, Params
from tests.models.example_models import BASE, FAMILIES, ROWS, D, S, base_inputs, fresh
from tests.small import jit

MODELS = {name: BaseModel(config, "bfloat16") for name, config in {"llama": BASE, "others": FAMILIES}.items()}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@functools.cache
def halved(model: BaseModel) -> Params:
    def stored(leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf

    return jax.tree.map(stored, fresh(model))


@models
def test_everything_that_a_model_gives_is_float32_and_near_that_of_float32(model: BaseModel) -> None:
    exact, params, inputs = dataclasses.replace(model, dtype="float32"), halved(model), base_inputs()
    for name, arguments in (
        ("embed", (ROWS,)),
        ("logits", (inputs, ROWS)),
        ("states", (inputs,)),
        ("attention", (inputs, ROWS)),
    ):
        for one, other in zip(
            jax.tree.leaves(jit(getattr(model, name))(params, *arguments)),
            jax.tree.leaves(jit(getattr(exact, name))(fresh(model), *arguments)),
            strict=True,
        ):
            assert one.dtype == jnp.float32
            assert 0 < np.abs(one - other).max() < 0.05 * np.abs(other).max(), name


@models
def test_a_cache_in_bfloat16_gives_the_logits_of_the_whole(model: BaseModel) -> None:
    whole = jit(model.logits)(halved(model), base_inputs(), ROWS)
    logits, cache = jit(model.extend)(halved(model), model.init_cache(S), base_inputs())
    assert cache.keys.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, whole, atol=0.02 * np.abs(whole).max())


def operations(jaxpr: Any) -> list[tuple[str, jax.core.ShapedArray]]:
    """Names and results of all operations, those of inner programs too."""
    found = []
    for eqn in jaxpr.eqns:
        found += [(eqn.primitive.name, variable.aval) for variable in eqn.outvars]
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda one: hasattr(one, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += operations(inner) if hasattr(inner, "eqns") else []
    return found


@models
def test_residual_stream_and_softmax_are_float32_and_no_matrix_is_copied(model: BaseModel) -> None:
    program = operations(jax.make_jaxpr(model.logits)(halved(model), base_inputs(), ROWS).jaxpr)
    assert {str(aval.dtype) for name, aval in program if name == "exp"} == {"float32"}
    sums = [aval for name, aval in program if name == "add" and aval.shape == (S, D)]
    assert len(sums) >= 2 * BASE.layers and {str(aval.dtype) for aval in sums} == {"float32"}
    roots = {str(aval.dtype) for name, aval in program if name == "rsqrt"}
    assert roots == {"float32"}
    copies = [aval for name, aval in program if name == "convert_element_type" and aval.dtype == jnp.float32]
    shapes = {leaf.shape for leaf in jax.tree.leaves(halved(model)) if leaf.dtype == jnp.bfloat16}
    kernel = halved(model)["conv"]["kernel"].shape
    assert not {aval.shape for aval in copies} & (shapes | {shape[::-1] for shape in shapes}) - {kernel}


def test_parameters_in_bfloat16_with_products_in_float32_are_those_parameters_exactly() -> None:
    model = BaseModel(BASE)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halved(model))
    np.testing.assert_array_equal(
        jit(model.logits)(halved(model), base_inputs(), ROWS), jit(model.logits)(rounded, base_inputs(), ROWS)
    )
