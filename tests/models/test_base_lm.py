"""The base model."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lensjax.context.working import Entries, in_full
from lensjax.models import BaseModel, Params
from lensjax.models.base_lm import BaseConfig
from lensjax.models.nn import attend
from tests.models.example_models import (
    BASE,
    BASES,
    PADDING,
    ROWS,
    D,
    S,
    assert_close,
    assert_finite,
    base_inputs,
    bases,
    compiled_gradients,
    floats,
    fresh,
    gradients,
    run,
    scaled,
    trained,
)


def reference_logits(params: Params, config: BaseConfig, entries: Entries, layers: int | None = None) -> np.ndarray:
    """The base model, or its first layers, as loops over entries and heads, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, positions, spans = (
        np.asarray(value, np.float64) for value in (entries.embeddings, entries.positions, entries.spans)
    )
    width, count = config.head_dim or config.dim // config.heads, len(x)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + config.norm_eps) * scale

    def turn(x: np.ndarray, s: int) -> np.ndarray:
        out = np.zeros(width)
        for i in range(width // 2):
            frequency = scaled(config.rope_theta ** (-2 * i / width), config)
            damping = np.exp(-((frequency * spans[s]) ** 2) / 2) if config.gaussian_rope else 1.0
            z = complex(x[i], x[i + width // 2]) * np.exp(1j * frequency * positions[s]) * damping
            out[i], out[i + width // 2] = z.real, z.imag
        return out

    if config.conv_width:
        kernel = params["conv"]["kernel"]
        x = np.stack(
            [x[s] + sum(kernel[j] * x[s - j] for j in range(config.conv_width) if j <= s) for s in range(count)]
        )
    for layer in range(config.layers if layers is None else layers):
        block = params["transformer"][f"block_{layer}"]
        layers_of = block["attention"]

        def project(name: str, x: np.ndarray, own: slice, layers_of: Params = layers_of) -> np.ndarray:
            out = x @ layers_of[name]["kernel"][:, own]
            out = out + layers_of[name]["bias"][own] if config.qkv_bias else out
            return norm(out, layers_of[f"{name}_norm"]["scale"]) if config.qk_norm and name != "value" else out

        normed = np.stack([norm(row, block["attention_norm"]["scale"]) for row in x])
        mixed = np.zeros((count, config.heads * width))
        for head in range(config.heads):
            own = slice(head * width, (head + 1) * width)
            group = head // (config.heads // config.kv_heads)
            shared = slice(group * width, (group + 1) * width)
            query = [turn(project("query", normed[s], own), s) for s in range(count)]
            key = [turn(project("key", normed[s], shared), s) for s in range(count)]
            for s in range(count):
                attention = np.exp([query[s] @ key[r] / np.sqrt(width) for r in range(s + 1)])
                values = project("value", normed[: s + 1], shared)
                mixed[s, own] = attention / attention.sum() @ values
        x = x + mixed @ layers_of["out"]["kernel"]
        normed = np.stack([norm(row, block["mlp_norm"]["scale"]) for row in x])
        gate, up = np.split(normed @ block["mlp"]["gate_up"]["kernel"], 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
    x = np.stack([norm(row, params["norm"]["scale"]) for row in x])
    return x @ (params["embedding"]["embedding"].T if config.tied else params["head"]["kernel"])


@bases
def test_base_model_equals_a_slow_reference(config: BaseConfig) -> None:
    model = BaseModel(config)
    params, inputs = trained(model), base_inputs()
    assert_close(run(model, params, inputs, ROWS), reference_logits(params, config, inputs))


@pytest.mark.parametrize(("size", "most", "blocks"), [(4, 100, 3), (1, 2, 2), (1, 100, S)])
def test_attention_in_blocks_of_queries_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, size: int, most: int, blocks: int
) -> None:
    model, inputs = BaseModel(BASE), base_inputs()
    params, lengths = trained(model), []
    expected = gradients(model, params, inputs, ROWS)

    def mixed(query: Array, key: Array, *others: Array, **options: Any) -> Array:
        lengths.append((query.shape[0], key.shape[0]))
        return whole(query, key, *others, **options)

    whole = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", mixed)
    monkeypatch.setattr(attend, "_MIN_BLOCK", size)
    monkeypatch.setattr(attend, "_MAX_BLOCKS", most)
    found = floats(compiled_gradients.__wrapped__(model)(params, inputs, ROWS))
    jax.tree.map(assert_close, found, expected)
    *of_blocks, of_rows = lengths
    assert len(of_blocks) == blocks and of_rows == (S, S)
    assert [keys for _, keys in of_blocks] == np.cumsum([queries for queries, _ in of_blocks]).tolist()


@bases
def test_rows_equal_the_full_computation_then_a_gather(config: BaseConfig) -> None:
    model, rows = BaseModel(config), jnp.asarray([7, 0, 10, 7, 1, 9, 3, 3, 2, 8, 0])
    params, inputs = trained(model), base_inputs()
    assert_close(run(model, params, inputs, rows), run(model, params, inputs, ROWS)[rows])


def test_few_rows_cost_little() -> None:
    model = BaseModel(BASES["untied, one layer"])
    params, inputs = trained(model), base_inputs()
    program = {r: str(jax.make_jaxpr(model.logits)(params, inputs, jnp.arange(r))) for r in (5, S)}
    for width in (BASE.mlp_dim, BASE.vocab_size):
        assert f"f32[{S},{width}]" in program[S]
        assert f"f32[{S},{width}]" not in program[5] and f"f32[5,{width}]" in program[5]
    assert_close(run(model, params, inputs, ROWS[:5]), run(model, params, inputs, ROWS)[:5])


def test_no_gradient_from_later_entries() -> None:
    model = BaseModel(BASE)
    params, inputs = trained(model), base_inputs()
    probe = jnp.asarray(np.random.default_rng(3).normal(size=BASE.vocab_size).astype("f"))

    def total(embeddings: Array) -> Array:
        return model.logits(params, dataclasses.replace(inputs, embeddings=embeddings), ROWS) @ probe

    influence = np.abs(jax.jit(jax.jacrev(total))(inputs.embeddings)).sum(axis=-1)
    assert (influence[np.triu_indices(S, 1)] == 0).all()
    assert (influence[np.tril_indices(S)] > 0).all()


def test_padding_changes_no_logits_and_has_finite_gradients() -> None:
    model, count = BaseModel(BASE), S - PADDING
    padded = jax.tree.map(lambda x: x.at[count:].set(jnp.zeros_like(x[0])), base_inputs())
    expected = run(model, trained(model), jax.tree.map(lambda x: x[:count], base_inputs()), ROWS[:count])
    assert_close(run(model, trained(model), padded, ROWS)[:count], expected)
    assert_close(run(model, trained(model), base_inputs(), ROWS)[:count], expected)
    rows = jnp.minimum(ROWS, count - 1)
    params_gradient, moved = gradients(model, trained(model), padded, rows)
    assert_finite(params_gradient)
    moved = moved.embeddings
    assert (moved[:count] != 0).any(axis=-1).all() and (moved[count:] == 0).all()


def test_grouped_heads_equal_plain_heads_with_repeated_keys_and_values() -> None:
    grouped, plain = BaseModel(BASE), BaseModel(dataclasses.replace(BASE, kv_heads=BASE.heads))
    params = trained(grouped)

    def repeat(path: Any, leaf: Any) -> np.ndarray:
        if not {"key", "value"} & {entry.key for entry in path}:
            return leaf
        return np.repeat(np.reshape(leaf, (D, BASE.kv_heads, -1)), 2, axis=1).reshape(D, -1)

    repeated = jax.tree.map_with_path(repeat, params)
    assert_close(run(plain, repeated, base_inputs(), ROWS), run(grouped, params, base_inputs(), ROWS))


def test_only_distances_between_positions_matter() -> None:
    model = BaseModel(BASE)
    params, inputs = trained(model), base_inputs()

    def moved_to(positions: Array) -> np.ndarray:
        return run(model, params, dataclasses.replace(inputs, positions=positions), ROWS)

    near = run(model, params, inputs, ROWS)
    far = moved_to(inputs.positions + 512.5)
    np.testing.assert_allclose(far, near, atol=1e-3 * np.abs(near).max())
    stretched = moved_to(2 * inputs.positions)
    assert np.abs(stretched - near).max() > 0.05 * np.abs(near).max()


def test_spans_matter_to_gaussian_positions_alone() -> None:
    inputs = base_inputs()
    narrow = dataclasses.replace(inputs, spans=0 * inputs.spans)
    sharp, soft = BaseModel(BASES["default"]), BaseModel(BASES["gaussian"])
    params = trained(sharp)
    expected = run(sharp, params, inputs, ROWS)
    np.testing.assert_array_equal(run(sharp, params, narrow, ROWS), expected)
    assert_close(run(soft, params, narrow, ROWS), expected)  # sigma 0
    assert not np.allclose(run(soft, params, inputs, ROWS), expected, atol=1e-2)


def test_fresh_convolution_shifts_tokens() -> None:
    kernel = np.asarray(fresh(BaseModel(BASE))["conv"]["kernel"])
    shift = 2 * np.arange(D) / (D - 1)  # over the channels from this token to the one two before
    taps = kernel + np.asarray([[1], [0], [0]])  # y_s = x_s + kernel * x
    np.testing.assert_allclose(taps.sum(axis=0), 1, atol=1e-6)
    np.testing.assert_allclose((taps * np.asarray([[0], [1], [2]])).sum(axis=0), shift, atol=1e-6)
    assert ((taps > 1e-6).sum(axis=0) <= 2).all()


def copies(model: BaseModel) -> tuple[Params, Array, Array]:
    """Weights of a fresh model's first layer from the last token of a text whose end repeats places 8 to 11."""
    tokens = np.random.default_rng(0).permutation(29)[:20].astype(np.int32)
    tokens[16:] = tokens[8:12]
    params = fresh(model)
    entries = in_full(model.embed(params, tokens), jnp.arange(20))
    weights, _ = model.attention(params, entries, jnp.asarray([18]))
    return params, weights[0, :, 0], tokens


@pytest.mark.slow
def test_a_fresh_copy_head_finds_what_came_after_the_last_time() -> None:
    config = dataclasses.replace(BASE, dim=128, copy_heads=1, rope_theta=1e6)
    _, weights, _ = copies(BaseModel(config))
    # Tokens 16 to 18 repeat 8 to 10, so 11 comes next. Two query heads share the one copy head, two have none.
    assert (np.argmax(weights[:2], axis=-1) == 11).all()
    _, plain, _ = copies(BaseModel(dataclasses.replace(config, copy_heads=0)))
    assert (np.asarray(weights[:2, 11]) > 2 * np.asarray(plain[:2, 11])).all()


def test_query_and_key_of_a_copy_head_start_equal_and_the_others_apart() -> None:
    params = fresh(BaseModel(dataclasses.replace(BASE, copy_heads=1)))["transformer"]["block_1"]["attention"]
    query, key = (np.asarray(params[name]["kernel"]).reshape(D, -1, D // 4) for name in ("query", "key"))
    np.testing.assert_array_equal(query[:, 0], key[:, 0])
    np.testing.assert_array_equal(query[:, 1], key[:, 0])
    assert (query[:, 2:] != key[:, 1:]).any()


def test_the_first_entry_and_causality_of_copy_heads() -> None:
    model = BaseModel(dataclasses.replace(BASE, copy_heads=2))
    params = fresh(model)
    inputs = jax.random.normal(jax.random.key(0), (12, D))

    def logits(inputs: Array) -> Array:
        return model.logits(params, in_full(inputs, jnp.arange(12)), jnp.asarray([0, 5])).sum(axis=-1)

    gradient = np.abs(np.asarray(jax.jit(jax.jacobian(logits))(inputs))).sum(axis=-1)
    assert (gradient[0] > 0).tolist() == [True] + 11 * [False]
    assert (gradient[1] > 0).tolist() == 6 * [True] + 6 * [False]


@pytest.mark.parametrize("name", ["default", "untied, one layer"])
def test_fresh_model_is_near_uniform_but_tells_contexts_apart(name: str) -> None:
    model = BaseModel(BASES[name])
    tokens = np.random.default_rng(4).integers(0, 29, (4, 32), np.int32)
    tokens[:, -8:] = 3 * np.arange(8)

    def loss(params: Params, tokens: Array) -> Array:
        entries = in_full(model.embed(params, tokens), jnp.arange(32))
        logits = model.logits(params, entries, jnp.arange(23, 31))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[24:, None], axis=-1).mean()

    losses = jax.jit(jax.vmap(loss, in_axes=(None, 0)))(fresh(model), tokens)
    np.testing.assert_allclose(losses, math.log(29), atol=0.1)
    # One tail, four contexts: losses that advantages can be made of, well apart from rounding (3e-7).
    assert np.diff(np.sort(losses)).min() > 1e-5


def test_embed_looks_tokens_up_and_gives_nan_outside_the_vocabulary() -> None:
    model = BaseModel(BASE)
    params = fresh(model)
    table = np.asarray(params["embedding"]["embedding"])
    embeddings = model.embed(params, jnp.asarray([3, 0, BASE.vocab_size]))
    np.testing.assert_array_equal(embeddings, [table[3], table[0], np.full(D, np.nan)])


@bases
def test_states_are_what_a_model_of_half_the_layers_would_predict_from(config: BaseConfig) -> None:
    model, inputs = BaseModel(config), base_inputs()
    params = trained(model)
    states = jax.jit(model.states)(params, inputs)
    assert states.shape == (S, D) and states.dtype == jnp.float32
    x = np.asarray(states, np.float64)
    normed = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + config.norm_eps) * params["norm"]["scale"]
    head = params["embedding"]["embedding"].T if config.tied else params["head"]["kernel"]
    assert_close(normed @ head, reference_logits(params, config, inputs, config.layers // 2))


def test_no_state_depends_on_a_later_entry() -> None:
    model, inputs = BaseModel(dataclasses.replace(BASE, layers=3)), base_inputs()
    params = trained(model)

    def states(embeddings: Array) -> Array:
        return model.states(params, dataclasses.replace(inputs, embeddings=embeddings))

    influence = np.abs(np.asarray(jax.jit(jax.jacrev(states))(inputs.embeddings))).sum(axis=(1, 3))
    np.testing.assert_array_equal(influence > 0, np.tri(S, dtype=bool))
