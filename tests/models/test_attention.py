"""What the base model shows of its attention, beside a slow version of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.models import BaseModel, Params
from lensjax.models.base_lm import BaseConfig
from tests.models.example_models import BASE, FAMILIES, S, activated, base_inputs, frequency_of, is_local, trained
from tests.small import jit

BASES = {
    "two layers, grouped heads": BASE,
    "one layer, gaussian": dataclasses.replace(BASE, layers=1, kv_heads=1, gaussian_rope=True),
    "of other families": FAMILIES,
}
ROWS = np.array([10, 3, 0, 7, 7])

bases = pytest.mark.parametrize("config", BASES.values(), ids=BASES)


def reference_attention(params: Params, config: BaseConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of all rows, norms of keys, and the model's logits, in float64 and one head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    entries = base_inputs()
    x, positions, spans = (np.asarray(x, np.float64) for x in (entries.embeddings, entries.positions, entries.spans))
    width, group = config.head_dim or config.dim // config.heads, config.heads // config.kv_heads
    distance = positions[:, None] - positions[None, :]

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    def after(name: str, block: Params, rows: np.ndarray) -> np.ndarray:
        return norm(rows, block[f"{name}_post_norm"]["scale"]) if config.post_norms else rows

    def as_complex(x: np.ndarray) -> np.ndarray:
        return x[:, : width // 2] + 1j * x[:, width // 2 :]

    kernel = params["conv"]["kernel"]
    x = x + sum(kernel[j] * np.pad(x, ((j, 0), (0, 0)))[:S] for j in range(config.conv_width))
    weights = np.zeros((config.layers, config.heads, S, S))
    norms = np.zeros((config.layers, config.kv_heads, S))
    for layer in range(config.layers):
        block = params["transformer"][f"block_{layer}"]
        frequency = np.asarray([frequency_of(i, layer, config) for i in range(width // 2)])
        turn = np.exp(1j * np.outer(positions, frequency))
        if config.gaussian_rope:
            turn = turn * np.exp(-(np.outer(spans, frequency) ** 2) / 2)
        near = distance < (config.window if is_local(layer, config) else np.inf)
        normed = norm(x, block["attention_norm"]["scale"])
        attention = block["attention"]
        projected = {name: normed @ attention[name]["kernel"] for name in ("query", "key", "value")}
        if config.qkv_bias:
            projected = {name: x + attention[name]["bias"] for name, x in projected.items()}
        if config.qk_norm:
            for name in ("query", "key"):
                heads = projected[name].reshape(S, -1, width)
                projected[name] = norm(heads, attention[f"{name}_norm"]["scale"]).reshape(S, -1)
        mixed = []
        for head in range(config.heads):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head // group * width, (head // group + 1) * width)
            query, key = as_complex(projected["query"][:, own]) * turn, as_complex(projected["key"][:, shared]) * turn
            exponentials = np.tril(near * np.exp((query @ key.conj().T).real / np.sqrt(width)))
            weights[layer, head] = exponentials / exponentials.sum(axis=1, keepdims=True)
            norms[layer, head // group] = np.sqrt((projected["key"][:, shared] ** 2).sum(axis=1))
            mixed.append(weights[layer, head] @ projected["value"][:, shared])
        x = x + after("attention", block, np.concatenate(mixed, axis=1) @ block["attention"]["out"]["kernel"])
        normed = norm(x, block["mlp_norm"]["scale"])
        gate, up = np.split(normed @ block["mlp"]["gate_up"]["kernel"], 2, axis=-1)
        x = x + after("mlp", block, activated(gate, config) * up @ block["mlp"]["down"]["kernel"])
    return weights, norms, norm(x, params["norm"]["scale"]) @ params["embedding"]["embedding"].T


def assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@bases
def test_attention_equals_a_slow_reference(config: BaseConfig) -> None:
    model = BaseModel(config)
    weights, norms, logits = reference_attention(trained(model), config)
    # The reference is the model: it ends in its logits.
    assert_close(jit(model.logits)(trained(model), base_inputs(), np.arange(S)), logits)
    actual, actual_norms = jit(model.attention)(trained(model), base_inputs(), ROWS)
    assert actual.shape == (config.layers, config.heads, len(ROWS), S) and actual.dtype == jnp.float32
    assert actual_norms.shape == (config.layers, config.kv_heads, S) and actual_norms.dtype == jnp.float32
    assert_close(actual, weights[:, :, ROWS])
    assert_close(actual_norms, norms)
    np.testing.assert_allclose(actual.sum(axis=-1), 1, atol=1e-5)
    assert (np.asarray(actual)[..., np.arange(S)[None, :] > ROWS[:, None]] == 0).all()


def test_norms_are_those_of_turned_keys() -> None:
    model = BaseModel(BASE)
    _, norms = jit(model.attention)(trained(model), base_inputs(), ROWS)
    _, cache = jit(model.extend)(trained(model), model.init_cache(S), base_inputs())
    assert_close(norms, np.linalg.norm(cache.keys, axis=-1).swapaxes(1, 2))


def test_bfloat16_gives_float32_near_that_of_float32() -> None:
    exact, rounded = (
        jit(BaseModel(BASE, dtype).attention)(BaseModel(BASE).init(jax.random.key(0)), base_inputs(), ROWS)
        for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == jnp.float32
        assert 0 < np.abs(one - other).max() < 0.05 * np.abs(one).max()


def test_shapes_are_checked() -> None:
    model = BaseModel(BASE)
    with pytest.raises(ValueError, match=r"rows must have shape \[any\].*\(\)"):
        model.attention(trained(model), base_inputs(), 3)
