"""What holds of every model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax._settings import replace
from lensjax.models import BaseModel, Params
from lensjax.models.gistnet import GistConfig
from lensjax.models.lensnet import LensConfig
from lensjax.runs.config import Config
from tests.models.example_models import (
    BASE,
    BASES,
    CHILDREN,
    GISTS,
    ROWS,
    assert_close,
    base_inputs,
    example,
    fresh,
    function,
    gist_model,
    gists,
    gradients,
    kinds,
    lens_inputs,
    lens_model,
    lenses,
    run,
    trained,
)


@kinds
def test_parameters_are_float32_in_nested_dicts_with_string_keys(kind: str) -> None:
    model, arguments = example(kind)
    params = fresh(model)

    def check(node: Any) -> None:
        if isinstance(node, dict):
            assert type(node) is dict and all(type(name) is str for name in node)
            for child in node.values():
                check(child)
        else:
            assert isinstance(node, jax.Array) and node.dtype == jnp.float32

    check(params)
    rebuilt = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(params))
    np.testing.assert_array_equal(run(model, rebuilt, *arguments), run(model, params, *arguments))


@kinds
def test_init_follows_its_key_and_traces_under_jit_and_vmap(kind: str) -> None:
    model, _ = example(kind)
    other = model.init(jax.random.key(1))
    assert any(not np.allclose(*pair) for pair in zip(*map(jax.tree.leaves, (fresh(model), other)), strict=True))
    stacked = jax.eval_shape(jax.jit(jax.vmap(model.init)), jax.random.split(jax.random.key(0), 5))
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: (5, *leaf.shape), other)


def test_vmapped_init_equals_a_loop() -> None:
    model = gist_model(GISTS["query, linear, 0 layers"])
    keys = jax.random.split(jax.random.key(3), 2)
    stacked = jax.jit(jax.vmap(model.init))(keys)
    looped = jax.tree.map(lambda *leaves: np.stack(leaves), *map(model.init, keys))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), stacked, looped)


def test_equal_query_and_key_parameters_own_their_buffers() -> None:
    # One buffer behind two parameters could not be donated to a jitted step.
    model = lens_model()
    outputs = jax.make_jaxpr(model.init)(jax.random.key(0)).jaxpr.outvars
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(fresh(model))]
    assert len(set(outputs)) == len(outputs) and len(set(pointers)) == len(pointers)


@kinds
def test_vmap_equals_a_loop(kind: str) -> None:
    model, arguments = example(kind)
    (embeddings, *others), structure = jax.tree.flatten(arguments)
    other = jax.tree.unflatten(structure, [-embeddings, *others])
    both = jax.tree.map(lambda *rows: np.stack(rows), arguments, other)
    mapped = jax.jit(jax.vmap(function(model), in_axes=(None, *(0 for _ in arguments))))(trained(model), *both)
    assert_close(mapped, np.stack([run(model, trained(model), *each) for each in (arguments, other)]))
    assert not np.allclose(mapped[0], mapped[1])


@kinds
def test_bfloat16_is_near_float32_and_returns_float32(kind: str) -> None:
    model, arguments = example(kind)
    half = dataclasses.replace(model, dtype="bfloat16")
    exact, rounded = (run(m, fresh(model), *arguments) for m in (model, half))
    assert rounded.dtype == exact.dtype == np.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0))))
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def assert_all_learn(params_gradient: Params) -> None:
    for path, leaf in jax.tree.leaves_with_path(params_gradient):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["default", "untied, one layer"])
def test_every_parameter_of_a_fresh_base_model_learns(name: str) -> None:
    model = BaseModel(BASES[name])
    gradient = gradients(model, fresh(model), base_inputs(), ROWS)[0]
    if not model.config.tied:  # then only `embed` reads the table
        table = jax.grad(lambda params: jnp.sum(model.embed(params, ROWS) ** 2))(fresh(model))["embedding"]
        gradient = gradient | {"embedding": table}
    assert_all_learn(gradient)


@gists
def test_every_parameter_of_a_fresh_gistnet_learns(config: GistConfig) -> None:
    model = gist_model(config)
    assert_all_learn(gradients(model, fresh(model), CHILDREN)[0])


@lenses
def test_every_parameter_of_a_fresh_lensnet_learns(config: LensConfig) -> None:
    model = lens_model(config)
    gradient = gradients(model, fresh(model), lens_inputs())[0]
    assert_all_learn(gradient)
    assert ("block" in gradient) == config.blocks and ("pointer" in gradient) == config.pointer
    for pair in (gradient["transformer"]["block_0"]["attention"], gradient.get("pointer")):
        if pair is not None:
            assert not np.allclose(pair["query"]["kernel"], pair["key"]["kernel"]), "they would never part"


def test_models_of_equal_configurations_are_equal() -> None:
    config = replace(Config(), **{"base.dim": 32, "context.block_size": 4, "dtype": "bfloat16"})
    models = config.build_models()
    assert models == config.build_models() and hash(models) == hash(config.build_models())
    assert models != replace(config, **{"base.conv_width": 0}).build_models()
    assert (models.gist.dim, models.gist.block_size, models.lens.embedding_dim) == (32, 4, 32)
    assert models.lens.max_lod == config.context.max_lod
    assert {models.base.dtype, models.gist.dtype, models.lens.dtype} == {"bfloat16"}


def test_shapes_that_do_not_fit_are_refused() -> None:
    base, lens = BaseModel(BASE), lens_model()
    inputs = base_inputs()
    with pytest.raises(ValueError, match=r"entries.embeddings must have shape \[any, 16\].*vmap.*\(1, 11, 16\)"):
        base.logits(fresh(base), dataclasses.replace(inputs, embeddings=inputs.embeddings[None]), ROWS)
    with pytest.raises(ValueError, match=r"entries.positions must have shape \[11\].*\(10,\)"):
        base.logits(fresh(base), dataclasses.replace(inputs, positions=inputs.positions[1:]), ROWS)
    with pytest.raises(ValueError, match=r"rows must have shape \[any\].*\(1, 11\)"):
        base.logits(fresh(base), inputs, ROWS[None])
    with pytest.raises(ValueError, match=r"tokens must have shape \[any\]"):
        base.embed({}, jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"children must have shape \[any, 4, 16\].*\(3, 3, 16\)"):
        gist_model(GistConfig()).apply({}, CHILDREN[:, 1:])
    entries = lens_inputs()
    for name, wrong, shape in (
        ("valid", entries.valid[:3], r"\[14\].*\(3,\)"),
        ("blocks", entries.blocks[:, 1:], r"\[14, 16\].*\(14, 15\)"),
        ("embeddings", entries.embeddings[None], r"\[any, 16\].*vmap.*\(1, 14, 16\)"),
    ):
        with pytest.raises(ValueError, match=rf"entries\.{name} must have shape {shape}"):
            lens.apply({}, dataclasses.replace(entries, **{name: wrong}))
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got 16 and 3"):
        gist_model(GistConfig(heads=3))
