"""Low-rank deltas of a language model's queries and values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import working as contexts
from lensjax.models import hyperlora, lora
from lensjax.models.base_lm import BaseConfig, BaseModel
from tests.small import jit

CONFIG = BaseConfig(vocab_size=7, dim=12, layers=2, heads=3, kv_heads=1, mlp_dim=8, conv_width=0)
MODEL = BaseModel(CONFIG)
NAMES = [f"transformer/block_{layer}/attention/{name}/kernel" for layer in (0, 1) for name in ("query", "value")]


@functools.cache
def base():
    return jit(MODEL.init)(jax.random.key(0))


def deltas(rank=2, seed=1):
    """With a b that is not 0 any more."""
    random = np.random.default_rng(seed)
    fresh = lora.init(jax.random.key(seed), base(), rank=rank)
    return {name: hyperlora.Delta(one.a, random.normal(size=one.b.shape).astype("f")) for name, one in fresh.items()}


def leaves(params):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(params)}


def test_queries_and_values_of_every_layer_have_a_delta_that_changes_nothing_yet():
    fresh = lora.init(jax.random.key(1), base(), rank=3)
    assert sorted(fresh) == sorted(NAMES)
    for name, one in fresh.items():
        assert one.a.shape == (12, 3) and one.b.shape == (3, leaves(base())[name].shape[1])
        assert np.std(one.a) == pytest.approx(12**-0.5, rel=0.4)
    assert len({float(one.a[0, 0]) for one in fresh.values()}) == 4
    jax.tree.map(np.testing.assert_array_equal, hyperlora.adapt(base(), fresh), base())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_changed_matrices_give_what_the_deltas_add(dtype):
    stored = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, base())
    changed, before = leaves(hyperlora.adapt(stored, deltas())), leaves(stored)
    x = np.random.default_rng(2).normal(size=(5, 12))
    for name, leaf in changed.items():
        assert leaf.dtype == before[name].dtype
        if name in NAMES:
            one = deltas()[name]
            expected = x @ np.asarray(before[name], np.float64) + x @ one.a @ one.b
            found = x @ np.asarray(leaf, np.float64)
            np.testing.assert_allclose(found, expected, atol=4e-6 if dtype == "float32" else 0.1)
        else:
            assert leaf is before[name]


def test_a_changed_model_reads_otherwise():
    places = jnp.arange(6)
    read = jit(lambda params: MODEL.logits(params, contexts.in_full(MODEL.embed(params, places), places), places))
    assert float(jnp.abs(read(hyperlora.adapt(base(), deltas())) - read(base())).max()) > 1e-3


def test_a_model_without_such_matrices_is_refused():
    with pytest.raises(ValueError, match="has no attention/query/kernel or attention/value/kernel"):
        lora.init(jax.random.key(0), {"transformer": {"attention": {"query": jnp.ones((2, 2))}}}, rank=1)
