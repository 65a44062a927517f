"""LensNet's entries in whole tiles: the same scores, and no product that the compiler for an H100 cannot cut."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from lensjax.context.working import Entries
from lensjax.models import LensModel
from lensjax.models.build import build_models, tile
from lensjax.models.decision import policy_scores
from lensjax.models.lensnet import LensConfig
from tests.small import SMALL, jit

WIDTH, COUNT = 16, 21
PLAIN = LensModel(LensConfig(dim=16, layers=1, heads=2, mlp_dim=32), WIDTH, 2)
TILED = replace(PLAIN, tile=16)


def entries(*lead: int) -> Entries:
    shape, random = (*lead, COUNT), np.random.default_rng(0)
    return Entries(
        embeddings=jnp.asarray(random.normal(size=(*shape, WIDTH)), jnp.float32),
        blocks=jnp.asarray(random.normal(size=(*shape, WIDTH)), jnp.float32),
        lods=jnp.asarray(random.integers(0, 3, shape), jnp.int32),
        spans=jnp.asarray(random.integers(1, 9, shape), jnp.float32),
        distances=jnp.asarray(random.integers(0, 99, shape), jnp.float32),
        positions=jnp.zeros(shape, jnp.float32),
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


def rows_of_products(lens: LensModel) -> set[int]:
    """Sizes of axes in LensNet's products, as they are lowered for a GPU."""
    scores = jax.jit(functools.partial(policy_scores, lens))
    lowered = export.export(scores, platforms=["cuda"])(PLAIN.init(jax.random.key(0)), entries(2, 3)).mlir_module()
    products = [line.partition(" : ")[2] for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) > 10
    return {int(size) for line in products for size in re.findall(r"(?<=[<x])\d+(?=x)", line)}


def test_no_product_for_a_gpu_has_rows_that_fill_no_tile():
    assert COUNT in rows_of_products(PLAIN)
    sizes = rows_of_products(TILED)
    assert COUNT not in sizes and 32 in sizes


def test_tiles_are_for_accelerators():
    assert [tile("xla", "cpu"), tile("xla", "gpu"), tile("cudnn", "gpu"), tile("splash", "tpu")] == [1, 16, 128, 128]


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 1), ("gpu", 16)])
def test_models_are_built_for_the_device_that_is_here(monkeypatch, platform, rows):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    shape = {"block_size": SMALL.context.block_size, "max_lod": 1, "attention": "xla"}
    models = build_models(SMALL.base, SMALL.gist, SMALL.lens, **shape)
    assert models.lens.tile == rows
