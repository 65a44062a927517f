"""Entries in whole tiles: the same numbers, and no product that the compiler for an H100 cannot cut."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from lensjax.context.working import Entries
from lensjax.models import LensModel
from lensjax.models.base_lm import BaseModel
from lensjax.models.build import build_models
from lensjax.models.decision import policy_scores
from lensjax.models.lensnet import LensConfig
from lensjax.models.nn.attend import tile
from tests.small import SMALL, jit

WIDTH, COUNT = 16, 21
PLAIN = LensModel(LensConfig(dim=16, layers=1, heads=2, mlp_dim=32), WIDTH, 2)
BASE = BaseModel(SMALL.base)
TILED = replace(PLAIN, tile=16)


def entries(*lead: int) -> Entries:
    shape, random = (*lead, COUNT), np.random.default_rng(0)
    return Entries(
        embeddings=jnp.asarray(random.normal(size=(*shape, WIDTH)), jnp.float32),
        blocks=jnp.asarray(random.normal(size=(*shape, WIDTH)), jnp.float32),
        lods=jnp.asarray(random.integers(0, 3, shape), jnp.int32),
        spans=jnp.asarray(random.integers(1, 9, shape), jnp.float32),
        distances=jnp.asarray(random.integers(0, 99, shape), jnp.float32),
        positions=jnp.broadcast_to(jnp.arange(COUNT), shape),
        valid=jnp.broadcast_to(jnp.arange(COUNT) < COUNT - 2, shape),
    )


def mean_square(params, entries, lens):
    scores = policy_scores(lens, params, entries)
    return jnp.mean(jnp.square(scores)), scores


@pytest.mark.slow
def test_whole_tiles_change_no_score_and_no_gradient():
    params, given = PLAIN.init(jax.random.key(0)), entries()
    found = jit(jax.grad(mean_square, has_aux=True), static_argnums=2)
    ours, theirs = found(params, given, TILED), found(params, given, PLAIN)
    assert ours[1].shape == (COUNT,)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("read", ["logits", "states"])
def test_whole_tiles_change_nothing_that_the_base_model_says(read):
    params, given = BASE.init(jax.random.key(0)), entries()
    rows = {"rows": jnp.asarray([0, 3, COUNT - 1])} if read == "logits" else {}
    ours, theirs = (jit(getattr(model, read))(params, given, **rows) for model in (replace(BASE, tile=16), BASE))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def rows_of_products(function: Callable[..., Any], *inputs: Any) -> set[int]:
    """Sizes of axes in the products of a function, as they are lowered for a GPU."""
    lowered = export.export(jax.jit(function), platforms=["cuda"])(*inputs).mlir_module()
    products = [line.partition(" : ")[2] for line in lowered.splitlines() if "dot_general" in line]
    return {int(size) for line in products for size in re.findall(r"(?<=[<x])\d+(?=x)", line)}


def test_no_product_of_lens_net_for_a_gpu_has_rows_that_fill_no_tile():
    inputs = PLAIN.init(jax.random.key(0)), entries(2, 3)
    plain, tiled = (rows_of_products(functools.partial(policy_scores, lens), *inputs) for lens in (PLAIN, TILED))
    assert COUNT in plain
    assert COUNT not in tiled and 32 in tiled


def test_no_product_of_the_base_model_for_a_gpu_has_rows_that_fill_no_tile():
    params, given = BASE.init(jax.random.key(0)), entries(2)
    read = jax.vmap(lambda entries: replace(BASE, tile=16).logits(params, entries, jnp.arange(3)))
    plain = jax.vmap(lambda entries: BASE.logits(params, entries, jnp.arange(3)))
    assert COUNT in rows_of_products(plain, given)
    assert COUNT not in rows_of_products(read, given)


def test_tiles_are_for_accelerators():
    assert [tile("cpu"), tile("gpu"), tile("tpu")] == [1, 16, 16]


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 1), ("gpu", 16)])
def test_models_are_built_for_the_device_that_is_here(monkeypatch, platform, rows):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    shape = {"block_size": SMALL.context.block_size, "max_lod": 1, "attention": "xla"}
    models = build_models(SMALL.base, SMALL.gist, SMALL.lens, **shape)
    assert models.base.tile == models.lens.tile == rows
