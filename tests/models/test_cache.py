import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.context.working import Entries
from lensjax.models import BaseModel, KVCache, Params
from lensjax.models.base_lm import BaseConfig
from lensjax.models.nn.rope import Rotary
from lensjax.models.nn.transformer import Transformer, TransformerConfig
from tests.models.example_models import FAMILIES, base_entries
from tests.small import jit

BASE = BaseConfig(vocab_size=29, dim=16, layers=2, heads=4, kv_heads=2, mlp_dim=48, conv_width=3)
BASES = {
    "default": BASE,
    "gaussian": dataclasses.replace(BASE, gaussian_rope=True),
    "untied, one layer": dataclasses.replace(BASE, tied=False, layers=1),
    "no convolution, plain heads": dataclasses.replace(BASE, conv_width=0, kv_heads=4),
    "one tap, three layers": dataclasses.replace(BASE, conv_width=1, kv_heads=1, layers=3),
    # Its state is longer than one call can bring.
    "copy heads": dataclasses.replace(BASE, copy_heads=1),
    "of other families": FAMILIES,
    "six taps": dataclasses.replace(BASE, conv_width=6, layers=1),
}
S, R, D = 12, 4, 16


@functools.cache
def trained(model: BaseModel) -> Params:
    """Parameters far from their initialisation, so that no term is too small to notice."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.4 * random.normal(size=leaf.shape).astype("f") + (leaf.ndim == 1), shapes)


# Equal models share their compiled functions across the file.
@functools.cache
def compiled(model: BaseModel, name: str) -> Callable[..., Any]:
    return jit(getattr(model, name))


def entries_of(seed: int, count: int = S) -> Entries:
    random = np.random.default_rng(seed)
    spans = random.choice(np.float32([1, 4, 16]), count)
    embeddings = random.normal(size=(count, D)).astype("f")
    return jax.tree.map(np.asarray, base_entries(embeddings, np.cumsum(spans) - (spans + 1) / 2, spans))


def count_of(entries: Entries) -> int:
    return len(entries.positions)


def cut(entries: Entries, start: int, stop: int) -> Entries:
    return jax.tree.map(lambda array: array[start:stop], entries)


def padded(entries: Entries, length: int, fill: float) -> Entries:
    def pad(array: np.ndarray) -> np.ndarray:
        value = fill if array.dtype == np.float32 else 0
        return np.pad(array, ((0, length - len(array)),) + ((0, 0),) * (array.ndim - 1), constant_values=value)

    return jax.tree.map(pad, entries)


def full_logits(model: BaseModel, entries: Entries) -> np.ndarray:
    """Of all entries at once."""
    logits = compiled(model, "logits")(trained(model), padded(entries, S, 0.0), np.arange(S))
    return np.asarray(logits)[: count_of(entries)]


def extend(model: BaseModel, cache: KVCache, entries: Entries) -> tuple[np.ndarray, KVCache]:
    """Up to R entries, before padding which would spoil whatever it reached."""
    count = count_of(entries)
    logits, cache = compiled(model, "extend")(trained(model), cache, padded(entries, R, np.nan), np.int32(count))
    return np.asarray(logits)[:count], cache


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max(initial=0.0), rtol=0)


@pytest.mark.parametrize("config", BASES.values(), ids=BASES)
@settings(max_examples=8)
@given(counts=st.lists(st.integers(0, R), min_size=4, max_size=10))
def test_any_split_gives_the_logits_of_the_whole(config: BaseConfig, counts: list[int]) -> None:
    model, entries = BaseModel(config), entries_of(1)
    expected, cache, start = full_logits(model, entries), model.init_cache(S), 0
    for count in [*counts, R, R, R]:
        count = min(count, S - start)
        logits, cache = extend(model, cache, cut(entries, start, start + count))
        assert_close(logits, expected[start : start + count])
        start += count
        assert int(cache.length) == start
    assert start == S


@pytest.mark.parametrize("name", ["default", "six taps", "of other families"])
@settings(max_examples=15)
@given(steps=st.lists(st.tuples(st.integers(0, S), st.integers(1, R)), min_size=3, max_size=6))
def test_a_prefix_may_be_kept_and_continued_otherwise(name: str, steps: list[tuple[int, int]]) -> None:
    model, held = BaseModel(BASES[name]), entries_of(0, 0)
    cache = model.init_cache(S)
    for seed, (keep, count) in enumerate(steps):
        held = cut(held, 0, min(keep, S - count))
        kept = count_of(held)
        held = jax.tree.map(lambda *pair: np.concatenate(pair), held, entries_of(seed, count))
        logits, cache = extend(model, model.truncate(cache, np.int32(kept)), cut(held, kept, kept + count))
        assert_close(logits, full_logits(model, held)[kept:])
        assert int(cache.length) == kept + count


def test_what_is_held_and_nothing_of_padding() -> None:
    model, entries = BaseModel(BASE), entries_of(2)
    junk = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), model.init_cache(S))
    before = dataclasses.replace(junk, length=jnp.int32(0))
    _, cache = extend(model, before, cut(entries, 0, 3))
    assert int(cache.length) == 3 and cache.capacity == S
    np.testing.assert_array_equal(cache.inputs[:3], entries.embeddings[:3])
    for held in (cache.keys, cache.values):
        assert held.shape == (2, S, 2, 4) and (held[:, :3] != 7).all() and (held[:, 3:] == 7).all()
    assert (cache.inputs[:3] != 7).all() and (cache.inputs[3:] == 7).all()
    # Keys are turned already: by the angles of their own positions, whatever is written later.
    np.testing.assert_array_equal(extend(model, cache, cut(entries, 3, 5))[1].keys[:, :3], cache.keys[:, :3])


def test_scan_and_vmap_with_own_lengths() -> None:
    # Two sequences read side by side, one entry a step; one of them rests at every third step.
    model, both = BaseModel(BASE), [entries_of(3), entries_of(4)]
    counts = np.stack([np.ones(S, np.int32), np.arange(S, dtype=np.int32) % 3 > 0], axis=1).astype(np.int32)
    read = np.cumsum(counts, axis=0) - counts
    each = [jax.tree.map(lambda array, i=i: array[read[:, i]], entries) for i, entries in enumerate(both)]
    streams = jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *each)

    def step(caches: KVCache, inputs: tuple[Entries, jax.Array]) -> tuple[KVCache, jax.Array]:
        entries, counts = inputs
        one = functools.partial(model.extend, trained(model))
        logits, caches = jax.vmap(one)(caches, jax.tree.map(lambda array: array[:, None], entries), counts)
        return caches, logits[:, 0]

    empty = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), model.init_cache(S))
    caches, logits = jit(functools.partial(jax.lax.scan, step))(empty, (streams, counts))
    np.testing.assert_array_equal(caches.length, counts.sum(axis=0))
    for i, entries in enumerate(both):
        own = counts[:, i] == 1
        assert_close(np.asarray(logits)[own, i], full_logits(model, entries)[: own.sum()])


def test_bfloat16_is_near_and_holds_bfloat16() -> None:
    model, entries = BaseModel(BASE, "bfloat16"), entries_of(5)
    expected, cache = full_logits(model, entries), model.init_cache(S)
    rows = []
    for start in range(0, S, R):
        logits, cache = extend(model, cache, cut(entries, start, start + R))
        rows.append(logits)
    assert rows[0].dtype == np.float32 and cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert cache.inputs.dtype == jnp.float32
    assert_close(np.concatenate(rows), expected, tolerance=0.03)


def test_new_entries_alone_are_computed() -> None:
    model = BaseModel(BASE)
    program = str(jax.make_jaxpr(model.extend)(trained(model), model.init_cache(S), entries_of(0, R)))
    for width in (BASE.mlp_dim, BASE.vocab_size):
        assert f"f32[{R},{width}]" in program and f"f32[{S},{width}]" not in program


def test_a_stack_without_layers_has_nothing_to_remember() -> None:
    config = TransformerConfig(dim=D, heads=2, kv_heads=1, mlp_dim=8, layers=0, causal=True, dtype=jnp.float32)
    x, memory = jnp.ones((R, D)), (jnp.zeros((0, S, 1, 8)), jnp.zeros((0, S, 1, 8)))
    angles = Rotary(jnp.ones((R, 4)), jnp.zeros((R, 4)))
    out, longer = Transformer(config, rngs=None).extend(x, memory, rotary=angles, slots=jnp.arange(R))
    np.testing.assert_array_equal(out, x)
    assert jax.tree.map(jnp.shape, longer) == jax.tree.map(jnp.shape, memory)


def test_an_empty_cache_owns_its_buffers() -> None:
    cache = BaseModel(BASE).init_cache(S)
    assert len({leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)}) == 5
    assert int(cache.length) == 0 and cache.length.dtype == jnp.int32


def test_faults_say_what_came() -> None:
    model = BaseModel(BASE)
    cache, four = model.init_cache(6), entries_of(0, R)
    nearly_full = dataclasses.replace(cache, length=jnp.int32(3))
    with pytest.raises(ValueError, match="capacity must be at least 1 entry, got 0"):
        model.init_cache(0)
    with pytest.raises(ValueError, match="holds 3 of 6 entries and cannot take 4 more"):
        model.extend(trained(model), nearly_full, four)
    for count in (-1, 5):
        with pytest.raises(ValueError, match=f"count must be between 0 and the 4 entries given, got {count}"):
            model.extend(trained(model), cache, four, count)
    with pytest.raises(ValueError, match=r"count must have shape \[\].*\(1,\)"):
        model.extend(trained(model), cache, four, np.ones(1, np.int32))
    with pytest.raises(ValueError, match=r"entries.spans must have shape \[4\].*\(3,\)"):
        model.extend(trained(model), cache, dataclasses.replace(four, spans=four.spans[1:]))
    with pytest.raises(ValueError, match=r"cache.keys must have shape \[2, any, 2, 4\].*\(1, 6, 2, 4\)"):
        model.extend(trained(model), BaseModel(BASES["six taps"]).init_cache(6), four)


def test_what_is_held_survives_an_overflow_under_jit() -> None:
    model, entries = BaseModel(BASE), entries_of(6)
    cache = model.init_cache(S)
    for start in range(0, S, R):
        _, cache = extend(model, cache, cut(entries, start, start + R))
    _, overflowed = extend(model, model.truncate(cache, np.int32(S - 1)), entries_of(7, 2))
    assert int(overflowed.length) == S
    np.testing.assert_array_equal(overflowed.inputs[: S - 1], cache.inputs[: S - 1])
    np.testing.assert_array_equal(overflowed.keys[:, : S - 1], cache.keys[:, : S - 1])
    np.testing.assert_array_equal(overflowed.inputs[S - 1], entries_of(7, 2).embeddings[0])


@pytest.mark.parametrize("name", ["six taps"])
def test_some_rows_get_what_all_get(name):
    model = BaseModel(BASES[name])
    params, cache, three = trained(model), model.init_cache(6), entries_of(7, 3)
    read = jax.jit(model.extend)
    (all_, longer), (some, same) = (read(params, cache, three, np.int32(3), rows) for rows in (None, np.array([2, 0])))
    np.testing.assert_allclose(some, all_[np.array([2, 0])], atol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), longer, same)
