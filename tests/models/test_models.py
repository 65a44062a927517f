import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from lensjax.context.working import Entries
from lensjax.models import BaseModel, GistModel, LensModel, Params, build_models
from lensjax.models.lensnet import FREQUENCIES, Pointer, time_features
from lensjax.models.nn import transformer
from lensjax.runs.config import BaseConfig, Config, GistConfig, LensConfig, replace

# Widths are shared, for initialisation without jit compiles once per shape.
BASE = BaseConfig(vocab_size=29, dim=16, layers=2, heads=4, kv_heads=2, mlp_dim=48, conv_width=3)
LENS = LensConfig(dim=16, layers=2, heads=2, mlp_dim=48)
S, D, K, PADDING = 11, 16, 4, 3
ROWS = jnp.arange(S)

BASES = {
    "default": BASE,
    "gaussian": dataclasses.replace(BASE, gaussian_rope=True),
    "untied, one layer": dataclasses.replace(BASE, tied=False, layers=1),
    "no convolution, plain heads": dataclasses.replace(BASE, conv_width=0, kv_heads=4),
    "one tap": dataclasses.replace(BASE, conv_width=1, kv_heads=1),
}
GISTS = {
    f"{pooling}, {head}, {layers} layers": GistConfig(pooling=pooling, head=head, layers=layers, heads=2)
    for pooling in ("mean", "query", "cls")
    for head, layers in (("linear", 0), ("mlp", 1))
}
LENSES = {
    "blocks and pointer": LENS,
    "blocks": dataclasses.replace(LENS, layers=1, pointer=False),
    "pointer": dataclasses.replace(LENS, layers=1, head="mlp", blocks=False),
    "neither": dataclasses.replace(LENS, layers=1, head="mlp", blocks=False, pointer=False),
}

bases = pytest.mark.parametrize("config", BASES.values(), ids=BASES)
gists = pytest.mark.parametrize("config", GISTS.values(), ids=GISTS)
lenses = pytest.mark.parametrize("config", LENSES.values(), ids=LENSES)
kinds = pytest.mark.parametrize("kind", ["base", "gist", "lens"])


def gist_model(config: GistConfig) -> GistModel:
    return GistModel(config, D, K)


def lens_model(config: LensConfig = LENS) -> LensModel:
    return LensModel(config, D, 2)


@functools.cache
def fresh(model: Any) -> Params:
    return model.init(jax.random.key(0))


@functools.cache
def trained(model: Any) -> Params:
    """Parameters far from their initialisation, so that no term is too small to notice."""
    random = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        noise = 0.4 * random.normal(size=leaf.shape).astype(np.float32)
        return 1 + noise if path[-1].key == "scale" else noise

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


# Equal models share their compiled functions across the file.
@functools.cache
def compiled_apply(model: Any) -> Callable[..., Array]:
    return jax.jit(model.apply)


@functools.cache
def compiled_gradients(model: Any) -> Callable[..., tuple[Params, Any]]:
    def loss(params: Params, first: Any, *others: Array) -> Array:
        output = model.apply(params, first, *others)
        return jnp.sum(output * jnp.cos(jnp.arange(1.0, output.size + 1)).reshape(output.shape))

    return jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))


def run(model: Any, params: Params, *arguments: Any) -> np.ndarray:
    return np.asarray(compiled_apply(model)(params, *arguments))


def gradients(model: Any, params: Params, *arguments: Any) -> tuple[Params, Any]:
    """Of a generic loss of the output, with respect to the parameters and the floats of the first argument."""
    found = compiled_gradients(model)(params, *arguments)
    return jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf, found)


def assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, atol=5e-5 * np.abs(expected).max(), rtol=0)


def assert_finite(tree: Any) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def base_inputs() -> tuple[Array, Array, Array]:
    """Entries as in a cut: spans of 16, 4, 4 tokens and then single tokens, at the centres of their spans."""
    spans = np.array([16, 4, 4] + [1] * (S - 3), "f")
    embeddings = np.random.default_rng(1).normal(size=(S, D)).astype("f")
    return jnp.asarray(embeddings), jnp.asarray(np.cumsum(spans) - (spans + 1) / 2), jnp.asarray(spans)


def lens_inputs(padding: int = PADDING) -> Entries:
    """The same entries for LensNet, followed by padding: four tokens have a gist, the last four not yet."""
    embeddings, centres, spans = base_inputs()
    gist = jnp.asarray(np.random.default_rng(7).normal(size=D).astype("f"))
    lods, valid = jnp.asarray([2, 1, 1] + [0] * (S - 3)), jnp.ones(S, bool)
    blocks = embeddings.at[3:7].set(gist)
    # From the centres to the last token, as in `materialise`.
    entries = Entries(embeddings, blocks, centres, lods, spans, spans.sum() - 1 - centres, valid)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)), entries)


CHILDREN = jnp.asarray(np.random.default_rng(2).normal(size=(3, K, D)).astype("f"))


def example(kind: str) -> tuple[Any, tuple[Any, ...]]:
    """A model of each kind with arguments of `apply`."""
    return {
        "base": (BaseModel(BASE), (*base_inputs(), ROWS)),
        "gist": (gist_model(GISTS["query, mlp, 1 layers"]), (CHILDREN,)),
        "lens": (lens_model(), (lens_inputs(),)),
    }[kind]


# Contracts of every model.


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
    mapped = jax.jit(jax.vmap(model.apply, in_axes=(None, *(0 for _ in arguments))))(trained(model), *both)
    assert_close(mapped, np.stack([run(model, trained(model), *each) for each in (arguments, other)]))
    assert not np.allclose(mapped[0], mapped[1])


@pytest.mark.slow
@kinds
def test_jit_equals_no_jit(kind: str) -> None:
    model, arguments = example(kind)
    assert_close(model.apply(trained(model), *arguments), run(model, trained(model), *arguments))


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
    gradient = gradients(model, fresh(model), *base_inputs(), ROWS)[0]
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


def test_equal_configurations_are_one_static_argument(
    compiles: Callable[[], AbstractContextManager[list[str]]],
) -> None:
    config = replace(Config(), **{"base.dim": 32, "context.block_size": 4, "dtype": "bfloat16"})
    models = build_models(config)
    assert models == build_models(config) and hash(models) == hash(build_models(config))
    assert models != build_models(replace(config, **{"base.conv_width": 0}))
    assert (models.gist.dim, models.gist.block_size, models.lens.embedding_dim) == (32, 4, 32)
    assert models.lens.max_lod == config.context.max_lod
    assert {models.base.dtype, models.gist.dtype, models.lens.dtype} == {"bfloat16"}

    embed = jax.jit(lambda models, params, tokens: models.base.embed(params, tokens), static_argnums=0)
    params = jax.tree.map(jnp.zeros_like, jax.eval_shape(models.base.init, jax.random.key(0)))
    tokens = jnp.arange(3)
    with compiles() as names:
        embed(models, params, tokens)
        embed(build_models(config), params, tokens)
    assert names.count("jit(<lambda>)") == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    base, lens = BaseModel(BASE), lens_model()
    embeddings, positions, spans = base_inputs()
    with pytest.raises(ValueError, match=r"embeddings must have shape \[any, 16\].*vmap.*\(1, 11, 16\)"):
        base.apply({}, embeddings[None], positions, spans, ROWS)
    with pytest.raises(ValueError, match=r"positions must have shape \[11\].*\(10,\)"):
        base.apply({}, embeddings, positions[1:], spans, ROWS)
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


# The base model.


def reference_logits(params: Params, config: BaseConfig, embeddings: Any, positions: Any, spans: Any) -> np.ndarray:
    """The base model as loops over entries and heads, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, positions, spans = (np.asarray(value, np.float64) for value in (embeddings, positions, spans))
    width, count = config.dim // config.heads, len(x)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + 1e-8) * scale

    def turn(x: np.ndarray, s: int) -> np.ndarray:
        out = np.zeros(width)
        for i in range(width // 2):
            frequency = config.rope_theta ** (-2 * i / width)
            damping = np.exp(-((frequency * spans[s]) ** 2) / 2) if config.gaussian_rope else 1.0
            z = complex(x[i], x[i + width // 2]) * np.exp(1j * frequency * positions[s]) * damping
            out[i], out[i + width // 2] = z.real, z.imag
        return out

    if config.conv_width:
        kernel = params["conv"]["kernel"]
        x = np.stack(
            [x[s] + sum(kernel[j] * x[s - j] for j in range(config.conv_width) if j <= s) for s in range(count)]
        )
    for layer in range(config.layers):
        block = params["transformer"][f"block_{layer}"]
        weights = {name: child["kernel"] for name, child in block["attention"].items()}
        normed = np.stack([norm(row, block["attention_norm"]["scale"]) for row in x])
        mixed = np.zeros_like(x)
        for head in range(config.heads):
            own = slice(head * width, (head + 1) * width)
            group = head // (config.heads // config.kv_heads)
            shared = slice(group * width, (group + 1) * width)
            query = [turn(normed[s] @ weights["query"][:, own], s) for s in range(count)]
            key = [turn(normed[s] @ weights["key"][:, shared], s) for s in range(count)]
            for s in range(count):
                attention = np.exp([query[s] @ key[r] / np.sqrt(width) for r in range(s + 1)])
                values = normed[: s + 1] @ weights["value"][:, shared]
                mixed[s, own] = attention / attention.sum() @ values
        x = x + mixed @ weights["out"]
        normed = np.stack([norm(row, block["mlp_norm"]["scale"]) for row in x])
        gate, up = np.split(normed @ block["mlp"]["gate_up"]["kernel"], 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
    x = np.stack([norm(row, params["norm"]["scale"]) for row in x])
    return x @ (params["embedding"]["embedding"].T if config.tied else params["head"]["kernel"])


@bases
def test_base_model_equals_a_slow_reference(config: BaseConfig) -> None:
    model = BaseModel(config)
    params, inputs = trained(model), base_inputs()
    assert_close(run(model, params, *inputs, ROWS), reference_logits(params, config, *inputs))


@pytest.mark.parametrize(("size", "most", "blocks"), [(4, 100, 3), (1, 2, 2), (1, 100, S)])
def test_attention_in_blocks_of_queries_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, size: int, most: int, blocks: int
) -> None:
    model, inputs = BaseModel(BASE), base_inputs()
    params, lengths = trained(model), []
    expected = gradients(model, params, *inputs, ROWS)

    def mixed(query: Array, key: Array, *others: Array) -> Array:
        lengths.append((query.shape[0], key.shape[0]))
        return whole(query, key, *others)

    whole = transformer._mixed
    monkeypatch.setattr(transformer, "_mixed", mixed)
    monkeypatch.setattr(transformer, "_MIN_BLOCK", size)
    monkeypatch.setattr(transformer, "_MAX_BLOCKS", most)
    found = compiled_gradients.__wrapped__(model)(params, *inputs, ROWS)
    jax.tree.map(assert_close, found, expected)
    *of_blocks, of_rows = lengths
    assert len(of_blocks) == blocks and of_rows == (S, S)
    assert [keys for _, keys in of_blocks] == np.cumsum([queries for queries, _ in of_blocks]).tolist()


@bases
def test_rows_equal_the_full_computation_then_a_gather(config: BaseConfig) -> None:
    model, rows = BaseModel(config), jnp.asarray([7, 0, 10, 7, 1, 9, 3, 3, 2, 8, 0])
    params, inputs = trained(model), base_inputs()
    assert_close(run(model, params, *inputs, rows), run(model, params, *inputs, ROWS)[rows])


def test_few_rows_cost_little() -> None:
    model = BaseModel(BASES["untied, one layer"])
    params, inputs = trained(model), base_inputs()
    program = {r: str(jax.make_jaxpr(model.apply)(params, *inputs, jnp.arange(r))) for r in (5, S)}
    for width in (BASE.mlp_dim, BASE.vocab_size):
        assert f"f32[{S},{width}]" in program[S]
        assert f"f32[{S},{width}]" not in program[5] and f"f32[5,{width}]" in program[5]
    assert_close(run(model, params, *inputs, ROWS[:5]), run(model, params, *inputs, ROWS)[:5])


def test_no_gradient_from_later_entries() -> None:
    model = BaseModel(BASE)
    params, (embeddings, *others) = trained(model), base_inputs()
    probe = jnp.asarray(np.random.default_rng(3).normal(size=BASE.vocab_size).astype("f"))
    jacobian = jax.jacrev(lambda embeddings: model.apply(params, embeddings, *others, ROWS) @ probe)
    influence = np.abs(jax.jit(jacobian)(embeddings)).sum(axis=-1)
    assert (influence[np.triu_indices(S, 1)] == 0).all()
    assert (influence[np.tril_indices(S)] > 0).all()


def test_padding_changes_no_logits_and_has_finite_gradients() -> None:
    model, count = BaseModel(BASE), S - PADDING
    embeddings, positions, spans = (x.at[count:].set(0) for x in base_inputs())
    expected = run(model, trained(model), *(x[:count] for x in base_inputs()), ROWS[:count])
    padded = run(model, trained(model), embeddings, positions, spans, ROWS)[:count]
    assert_close(padded, expected)
    assert_close(run(model, trained(model), *base_inputs(), ROWS)[:count], expected)
    rows = jnp.minimum(ROWS, count - 1)
    params_gradient, moved = gradients(model, trained(model), embeddings, positions, spans, rows)
    assert_finite(params_gradient)
    assert (moved[:count] != 0).any(axis=-1).all() and (moved[count:] == 0).all()


def test_grouped_heads_equal_plain_heads_with_repeated_keys_and_values() -> None:
    grouped, plain = BaseModel(BASE), BaseModel(dataclasses.replace(BASE, kv_heads=BASE.heads))
    params = trained(grouped)

    def repeat(path: Any, leaf: Any) -> np.ndarray:
        if not {"key", "value"} & {entry.key for entry in path}:
            return leaf
        return np.repeat(np.reshape(leaf, (D, BASE.kv_heads, -1)), 2, axis=1).reshape(D, -1)

    repeated = jax.tree.map_with_path(repeat, params)
    assert_close(run(plain, repeated, *base_inputs(), ROWS), run(grouped, params, *base_inputs(), ROWS))


def test_only_distances_between_positions_matter() -> None:
    model = BaseModel(BASE)
    params, (embeddings, positions, spans) = trained(model), base_inputs()
    near = run(model, params, embeddings, positions, spans, ROWS)
    far = run(model, params, embeddings, positions + 512.5, spans, ROWS)
    np.testing.assert_allclose(far, near, atol=1e-3 * np.abs(near).max())
    stretched = run(model, params, embeddings, 2 * positions, spans, ROWS)
    assert np.abs(stretched - near).max() > 0.05 * np.abs(near).max()


def test_spans_matter_to_gaussian_positions_alone() -> None:
    embeddings, positions, spans = base_inputs()
    sharp, soft = BaseModel(BASES["default"]), BaseModel(BASES["gaussian"])
    params = trained(sharp)
    expected = run(sharp, params, embeddings, positions, spans, ROWS)
    np.testing.assert_array_equal(run(sharp, params, embeddings, positions, 0 * spans, ROWS), expected)
    assert_close(run(soft, params, embeddings, positions, 0 * spans, ROWS), expected)  # sigma 0
    assert not np.allclose(run(soft, params, embeddings, positions, spans, ROWS), expected, atol=1e-2)


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
    params, places = fresh(model), jnp.arange(20.0)
    rows = jnp.asarray([18])
    weights, _ = model.attention(params, model.embed(params, tokens), places, jnp.ones(20), rows)
    return params, weights[0, :, 0], tokens


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
        return model.apply(params, inputs, jnp.arange(12.0), jnp.ones(12), jnp.asarray([0, 5])).sum(axis=-1)

    gradient = np.abs(np.asarray(jax.jit(jax.jacobian(logits))(inputs))).sum(axis=-1)
    assert (gradient[0] > 0).tolist() == [True] + 11 * [False]
    assert (gradient[1] > 0).tolist() == 6 * [True] + 6 * [False]


@pytest.mark.parametrize("name", ["default", "untied, one layer"])
def test_fresh_model_is_near_uniform_but_tells_contexts_apart(name: str) -> None:
    model = BaseModel(BASES[name])
    tokens = np.random.default_rng(4).integers(0, 29, (4, 32), np.int32)
    tokens[:, -8:] = 3 * np.arange(8)

    def loss(params: Params, tokens: Array) -> Array:
        embeddings, positions = model.embed(params, tokens), jnp.arange(32.0)
        logits = model.apply(params, embeddings, positions, jnp.ones(32), jnp.arange(23, 31))
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


# GistNet.


@gists
def test_gists_are_independent_and_may_be_none(config: GistConfig) -> None:
    model = gist_model(config)
    params = trained(model)
    before, after = run(model, params, CHILDREN), run(model, params, CHILDREN.at[1].add(1.0))
    assert before.shape == (3, D) and before.dtype == np.float32
    np.testing.assert_array_equal((before != after).any(axis=-1), [False, True, False])
    assert run(model, params, CHILDREN[:0]).shape == (0, D)


@gists
def test_every_child_reaches_its_gist(config: GistConfig) -> None:
    model = gist_model(config)
    params = trained(model)
    changed = [run(model, params, CHILDREN.at[0, k].add(0.1)) for k in range(K)]
    assert (np.abs(np.stack(changed) - run(model, params, CHILDREN))[:, 0].max(axis=-1) > 1e-3).all()


@gists
def test_fresh_gists_are_near_the_block_mean_unless_a_token_reads_them(config: GistConfig) -> None:
    model = gist_model(config)
    children = 0.02 * CHILDREN  # the scale of a fresh base model's embeddings
    mean = np.mean(children, axis=1)
    relative = np.linalg.norm(run(model, fresh(model), children) - mean) / np.linalg.norm(mean)
    assert relative > 0.5 if config.pooling == "cls" else relative < 0.1


@gists
def test_the_order_of_children_matters_where_layers_know_it(config: GistConfig) -> None:
    model = gist_model(config)
    params = trained(model)
    forward, backward = run(model, params, CHILDREN), run(model, params, CHILDREN[:, ::-1])
    if config.layers:
        assert np.abs(forward - backward).max() > 1e-2
    else:
        assert_close(backward, forward)


def test_query_pooling_prefers_children_like_its_query() -> None:
    model, one_hot = gist_model(GISTS["query, linear, 0 layers"]), jnp.eye(D)
    query = 100 * one_hot[0].reshape(1, 2, D // 2)
    params = fresh(model) | {"pooling": fresh(model)["pooling"] | {"key": {"kernel": one_hot}, "query": query}}
    children = jnp.stack([jnp.roll(one_hot[:K], k, axis=0) for k in range(3)])  # e_0 first, second, third
    np.testing.assert_allclose(run(model, params, children), jnp.tile(one_hot[:1], (3, 1)), atol=1e-2)


@gists
def test_zero_children_have_finite_gists_and_gradients(config: GistConfig) -> None:
    model = gist_model(config)
    assert_finite(run(model, fresh(model), 0 * CHILDREN))
    assert_finite(gradients(model, fresh(model), 0 * CHILDREN))


# LensNet.


def reference_scores(params: Params, config: LensConfig, entries: Entries) -> np.ndarray:
    """LensNet as loops over entries and heads, in float64; no entry is padding."""
    params, entries = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, entries))
    width, count = config.dim // config.heads, len(entries.valid)
    heads = [slice(head * width, (head + 1) * width) for head in range(config.heads)]
    ages = [math.log(1 + distance) for distance in entries.distances]

    def norm(x: np.ndarray, weights: Params) -> np.ndarray:
        return np.stack([row / np.sqrt(np.mean(row**2) + 1e-8) for row in x]) * weights["scale"]

    def softmax(logits: Any) -> np.ndarray:
        return np.exp(logits) / np.sum(np.exp(logits))

    def swiglu(x: np.ndarray, weights: Params) -> np.ndarray:
        gate, up = np.split(x @ weights["gate_up"]["kernel"], 2, axis=-1)
        return (gate / (1 + np.exp(-gate)) * up) @ weights["down"]["kernel"]

    def content(x: np.ndarray) -> np.ndarray:
        return norm(x, params["embedding_norm"]) @ params["content"]["kernel"]

    shown = content(entries.embeddings)
    blocks = content(entries.blocks) if config.blocks else shown
    x = shown + blocks @ params["block"]["kernel"] if config.blocks else shown.copy()
    for i, (lod, span, age) in enumerate(zip(entries.lods, entries.spans, ages, strict=True)):
        waves = [wave(frequency * age) for wave in (math.sin, math.cos) for frequency in FREQUENCIES]
        features = np.asarray([math.log(span), age, *waves]) @ params["features"]["kernel"]
        x[i] = x[i] + params["lod"]["embedding"][int(lod)] + features
    for layer in range(config.layers):
        block = params["transformer"][f"block_{layer}"]
        weights = {name: child["kernel"] for name, child in block["attention"].items()}
        normed = norm(x, block["attention_norm"])
        query, key, value = (normed @ weights[name] for name in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        for own in heads:
            for i in range(count):
                logits = [query[i, own] @ key[j, own] / math.sqrt(width) for j in range(count)]
                mixed[i, own] = softmax(logits) @ value[:, own]
        x = x + mixed @ weights["out"]
        x = x + swiglu(norm(x, block["mlp_norm"]), block["mlp"])
    x = norm(x, params["norm"])
    head = params["head"]
    scores = (x @ head["kernel"] + head["bias"] if config.head == "linear" else swiglu(x, head))[:, 0]
    if config.pointer:
        pointer = params["pointer"]
        for h, own in enumerate(heads):
            weights = softmax([x[j] @ pointer["weight"]["kernel"][:, h] - 2 * ages[j] for j in range(count)])
            asked = sum(weights[j] * shown[j] @ pointer["query"]["kernel"][:, own] for j in range(count))
            for i in range(count):
                match = asked @ (blocks[i] @ pointer["key"]["kernel"][:, own]) / math.sqrt(width)
                scores[i] += pointer["gain"][h] * match
    return np.tanh(scores)


@lenses
def test_lensnet_equals_a_slow_reference(config: LensConfig) -> None:
    model = lens_model(config)
    # Small enough that tanh does not hide the scores.
    params = trained(model) | {"norm": {"scale": 0.2 * trained(model)["norm"]["scale"]}}
    if config.pointer:
        params["pointer"] = params["pointer"] | {"gain": np.asarray([0.02, -0.03], np.float32)}
    expected = reference_scores(params, config, lens_inputs(padding=0))
    assert np.abs(expected).max() < 0.99
    scores = run(model, params, lens_inputs())
    assert_close(scores[:S], expected)
    assert scores.dtype == np.float32 and (scores[:S] != 0).all() and (scores[S:] == 0).all()


@lenses
def test_scores_are_bounded_and_those_of_a_fresh_head_small(config: LensConfig) -> None:
    model = lens_model(config)
    assert (np.abs(run(model, trained(model), lens_inputs())) <= 1).all()
    params = fresh(model)
    if config.pointer:  # it has much to say of the last entries from the start
        params = params | {"pointer": params["pointer"] | {"gain": 0 * params["pointer"]["gain"]}}
    assert 0 < np.abs(run(model, params, lens_inputs())).max() < 0.5


def test_every_score_depends_on_every_entry_and_its_block_and_on_no_padding() -> None:
    model, inputs = lens_model(), lens_inputs()

    def scores(embeddings: Array, blocks: Array) -> Array:
        return model.apply(fresh(model), dataclasses.replace(inputs, embeddings=embeddings, blocks=blocks))

    for jacobian in jax.jit(jax.jacrev(scores, argnums=(0, 1)))(inputs.embeddings, inputs.blocks):
        influence = np.abs(jacobian).sum(axis=-1)
        assert (influence[:S, :S] > 0).all()
        assert (influence[S:] == 0).all() and (influence[:, S:] == 0).all()


def test_blocks_are_heard_only_where_they_are_switched_on() -> None:
    changed = dataclasses.replace(lens_inputs(), blocks=lens_inputs().blocks + 1)
    for config in (LENSES["blocks"], LENSES["pointer"]):
        model = lens_model(config)
        before, after = (run(model, fresh(model), entries) for entries in (lens_inputs(), changed))
        assert (np.abs(after - before).max() > 1e-3) == config.blocks
        assert config.blocks or (after == before).all()


@pytest.mark.parametrize(("feature", "value"), [("lods", 0), ("spans", 1.0), ("distances", 1.0)])
def test_scores_depend_on_every_feature(feature: str, value: float) -> None:
    model, inputs = lens_model(), lens_inputs()
    changed = dataclasses.replace(inputs, **{feature: getattr(inputs, feature).at[0].set(value)})
    assert abs(run(model, fresh(model), inputs)[0] - run(model, fresh(model), changed)[0]) > 1e-4


def test_features_by_hand() -> None:
    # A LOD-1 entry of blocks of 4, two tokens from the cursor: log1p(2) = 1.0986.
    features = time_features(jnp.asarray([4.0]), jnp.asarray([2.0]))[0]
    waves = np.array([0.5, 1.0, 2.0, 4.0]) * 1.0986123
    np.testing.assert_allclose(features, [1.3862944, 1.0986123, *np.sin(waves), *np.cos(waves)], atol=1e-6)


@pytest.mark.parametrize("garbage", [1e3, np.nan])
def test_neither_content_nor_count_of_padding_matters(garbage: float) -> None:
    model, inputs = lens_model(), lens_inputs()
    names = ("embeddings", "blocks", "positions", "spans", "distances")
    floats = {name: getattr(inputs, name).at[S:].set(garbage) for name in names}
    padded = dataclasses.replace(inputs, lods=inputs.lods.at[S:].set(2), **floats)
    expected = run(model, trained(model), lens_inputs(padding=0))
    assert_close(run(model, trained(model), padded)[:S], expected)
    assert_finite(gradients(model, trained(model), padded))


def test_a_context_of_padding_alone_scores_zero_with_zero_gradients() -> None:
    model = lens_model()
    nothing = dataclasses.replace(lens_inputs(), valid=jnp.zeros(S + PADDING, bool))
    assert (run(model, trained(model), nothing) == 0).all()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients(model, trained(model), nothing)))


@lenses
def test_scores_move_with_their_entries(config: LensConfig) -> None:
    model, inputs = lens_model(config), lens_inputs()
    order = np.random.default_rng(5).permutation(S + PADDING)
    shuffled = jax.tree.map(lambda x: x[order], inputs)
    assert_close(run(model, trained(model), shuffled), run(model, trained(model), inputs)[order])


def test_a_fresh_pointer_finds_the_block_that_holds_what_the_end_resembles() -> None:
    content = np.random.default_rng(8).normal(size=(20, 64)).astype("f")
    blocks = jnp.asarray(content.reshape(5, 4, 64).mean(axis=1).repeat(4, axis=0)).at[8:12].add(content[-1] / 4)
    distances, valid = jnp.arange(20.0)[::-1], jnp.ones(20, bool)
    pointer = Pointer(64, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    scores = np.asarray(pointer(jnp.asarray(content), blocks, jnp.asarray(content), distances, valid))[:16]
    assert scores[8:12].min() > 1.5 * np.delete(scores, range(8, 12)).max()


def test_lensnet_attention_begins_as_a_similarity_kernel() -> None:
    stack = fresh(lens_model())["transformer"]
    kernels = [np.asarray(stack[f"block_{layer}"]["attention"]["query"]["kernel"]) for layer in range(LENS.layers)]
    entries = np.random.default_rng(6).normal(size=(50, LENS.dim))
    for layer, query in enumerate(kernels):
        key = np.asarray(stack[f"block_{layer}"]["attention"]["key"]["kernel"])
        np.testing.assert_array_equal(query, key)
        logits = (entries @ query) @ (entries @ key).T
        assert (np.diag(logits) > logits.mean(axis=1)).all(), "an entry is like itself"
    assert not np.allclose(*kernels)
    pointer = fresh(lens_model())["pointer"]
    np.testing.assert_array_equal(pointer["query"]["kernel"], pointer["key"]["kernel"])
    base = fresh(BaseModel(BASES["no convolution, plain heads"]))["transformer"]["block_0"]["attention"]
    assert not np.allclose(base["query"]["kernel"], base["key"]["kernel"])
