import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lensjax.config import BaseConfig, Config, GistConfig, LensConfig, replace
from lensjax.models import BaseModel, GistModel, LensModel, Params, build_models
from lensjax.models.lensnet import time_features

BASE = BaseConfig(vocab_size=29, dim=16, layers=2, heads=4, kv_heads=2, mlp_dim=22, conv_width=3)
LENS = LensConfig(dim=16, layers=2, heads=2, mlp_dim=24)
S, D, K = 11, 16, 4

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
    for head, layers in (("linear", 0), ("mlp", 0), ("linear", 2))
}
LENSES = {"linear": LENS, "mlp": dataclasses.replace(LENS, head="mlp")}

bases = pytest.mark.parametrize("config", BASES.values(), ids=BASES)
gists = pytest.mark.parametrize("config", GISTS.values(), ids=GISTS)
lenses = pytest.mark.parametrize("config", LENSES.values(), ids=LENSES)


def gist_model(config: GistConfig, dtype: str = "float32") -> GistModel:
    return GistModel(config, D, K, dtype)


def lens_model(config: LensConfig = LENS, dtype: str = "float32") -> LensModel:
    return LensModel(config, D, 2, dtype)


def trained(model: Any, seed: int = 0, scale: float = 0.3) -> Params:
    """Parameters away from their initialisation, so that no term is too small to notice."""
    params = jax.jit(model.init)(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def base_inputs(seed: int = 0, count: int = S) -> tuple[Array, Array, Array]:
    """Entries as in a cut: spans of 16, 4 and 1 tokens, at the centres of their spans."""
    embeddings = jax.random.normal(jax.random.key(seed), (count, D))
    spans = jnp.asarray(([16.0, 4.0, 4.0] + [1.0] * count)[:count])
    return embeddings, jnp.cumsum(spans) - (spans + 1) / 2, spans


def lens_inputs(seed: int = 0, count: int = S, padding: int = 0) -> dict[str, Array]:
    embeddings, centres, spans = base_inputs(seed, count)
    inputs = {
        "embeddings": embeddings,
        "lods": jnp.round(jnp.log(spans) / math.log(K)).astype(jnp.int32),
        "spans": spans,
        "distances": spans.sum() - centres,
        "valid": jnp.ones(count, bool),
    }
    return {name: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) for name, x in inputs.items()}


def all_models() -> dict[str, tuple[Any, Callable[..., Array], tuple[Array, ...]]]:
    """Each kind of model, a function of (params, *arrays), and arguments for it."""
    base, gist, lens = BaseModel(BASE), gist_model(GISTS["query, linear, 2 layers"]), lens_model()
    children = jax.random.normal(jax.random.key(5), (3, K, D))
    return {
        "base": (base, base.apply, (*base_inputs(), jnp.asarray([4, 10]))),
        "gist": (gist, gist.apply, (children,)),
        "lens": (lens, lens.apply, tuple(lens_inputs(padding=2).values())),
    }


kinds = pytest.mark.parametrize("kind", ["base", "gist", "lens"])


# Contracts of every model.


@kinds
def test_parameters_are_float32_in_nested_dicts_with_string_keys(kind: str) -> None:
    model, apply, arguments = all_models()[kind]
    params = model.init(jax.random.key(0))

    def check(node: Any) -> None:
        if isinstance(node, dict):
            assert type(node) is dict and all(type(name) is str for name in node)
            for child in node.values():
                check(child)
        else:
            assert isinstance(node, jax.Array) and node.dtype == jnp.float32

    check(params)
    rebuilt = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(params))
    np.testing.assert_array_equal(apply(rebuilt, *arguments), apply(params, *arguments))


@kinds
def test_init_follows_its_key_under_jit_and_vmap(kind: str) -> None:
    model, _, _ = all_models()[kind]
    keys = jax.random.split(jax.random.key(3), 2)
    many = jax.jit(jax.vmap(model.init))(keys)
    leaves = [jax.tree.leaves(params) for params in (many, *map(model.init, keys))]
    for stacked, first, second in zip(*leaves, strict=True):
        np.testing.assert_allclose(stacked, jnp.stack([first, second]), rtol=1e-5, atol=1e-7)
    assert any(not np.allclose(leaf[0], leaf[1]) for leaf in leaves[0])


@kinds
def test_jit_equals_no_jit_and_vmap_equals_a_loop(kind: str) -> None:
    model, apply, arguments = all_models()[kind]
    params = trained(model)
    alone = apply(params, *arguments)
    np.testing.assert_allclose(jax.jit(apply)(params, *arguments), alone, atol=2e-5, rtol=1e-4)
    other = (-arguments[0], *arguments[1:])
    both = jax.tree.map(lambda *rows: jnp.stack(rows), arguments, other)
    mapped = jax.vmap(apply, in_axes=(None, *(0 for _ in arguments)))(params, *both)
    np.testing.assert_allclose(mapped, jnp.stack([alone, apply(params, *other)]), atol=2e-5, rtol=1e-4)
    assert not np.allclose(mapped[0], mapped[1])


@kinds
def test_bfloat16_is_near_float32_and_returns_float32(kind: str) -> None:
    model, apply, arguments = all_models()[kind]
    half = dataclasses.replace(model, dtype="bfloat16")
    params = trained(model, scale=0.05)
    exact, rounded = apply(params, *arguments), half.apply(params, *arguments)
    assert rounded.dtype == exact.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half.init(jax.random.key(0))))
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def assert_every_leaf_has_a_gradient(model: Any, apply: Callable[..., Array], arguments: tuple[Array, ...]) -> None:
    params = model.init(jax.random.key(1))

    def loss(params: Params) -> Array:
        output = apply(params, *arguments)
        return jnp.sum(output * jax.random.normal(jax.random.key(2), output.shape))

    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient).all() and np.any(gradient != 0), jax.tree_util.keystr(path)


@bases
def test_every_parameter_of_a_fresh_base_model_learns(config: BaseConfig) -> None:
    model = BaseModel(config)
    tokens = jax.random.randint(jax.random.key(0), (S,), 0, config.vocab_size)

    def apply(params: Params, *others: Array) -> Array:
        return model.apply(params, model.embed(params, tokens), *others)

    assert_every_leaf_has_a_gradient(model, apply, (*base_inputs()[1:], jnp.arange(S)))


@gists
def test_every_parameter_of_a_fresh_gistnet_learns(config: GistConfig) -> None:
    model = gist_model(config)
    assert_every_leaf_has_a_gradient(model, model.apply, (jax.random.normal(jax.random.key(0), (3, K, D)),))


@lenses
def test_every_parameter_of_a_fresh_lensnet_learns(config: LensConfig) -> None:
    model = lens_model(config)
    assert_every_leaf_has_a_gradient(model, model.apply, tuple(lens_inputs().values()))


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
    params, tokens = models.base.init(jax.random.key(0)), jnp.arange(3)
    with compiles() as names:
        embed(models, params, tokens)
        embed(build_models(config), params, tokens)
    assert names.count("jit(<lambda>)") == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    base, gist, lens = BaseModel(BASE), gist_model(GISTS["mean, linear, 0 layers"]), lens_model()
    embeddings, positions, spans = base_inputs()
    with pytest.raises(ValueError, match=r"embeddings must have shape \[any, 16\].*vmap.*\(1, 11, 16\)"):
        base.apply({}, embeddings[None], positions, spans, jnp.arange(2))
    with pytest.raises(ValueError, match=r"positions must have shape \[11\].*\(10,\)"):
        base.apply({}, embeddings, positions[1:], spans, jnp.arange(2))
    with pytest.raises(ValueError, match=r"tokens must have shape \[any\]"):
        base.embed({}, jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"children must have shape \[any, 4, 16\].*\(2, 3, 16\)"):
        gist.apply({}, jnp.zeros((2, 3, D)))
    with pytest.raises(ValueError, match=r"valid must have shape \[11\]"):
        lens.apply({}, **(lens_inputs() | {"valid": jnp.ones(3, bool)}))
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
        gate, up = normed @ block["mlp"]["gate"]["kernel"], normed @ block["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
    x = np.stack([norm(row, params["norm"]["scale"]) for row in x])
    return x @ (params["embedding"]["embedding"].T if config.tied else params["head"]["kernel"])


@bases
def test_base_model_equals_a_slow_reference(config: BaseConfig) -> None:
    model = BaseModel(config)
    params, inputs = trained(model), base_inputs()
    logits = jax.jit(model.apply)(params, *inputs, jnp.arange(S))
    expected = reference_logits(params, config, *inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@bases
def test_rows_equal_the_full_computation_then_a_gather(config: BaseConfig) -> None:
    model, rows = BaseModel(config), jnp.asarray([7, 0, 10, 7])
    params, inputs = trained(model), base_inputs()
    full = model.apply(params, *inputs, jnp.arange(S))
    np.testing.assert_allclose(model.apply(params, *inputs, rows), full[rows], atol=2e-5, rtol=1e-4)


def test_last_block_and_head_are_computed_at_rows_alone() -> None:
    model = BaseModel(dataclasses.replace(BASE, layers=1))
    params = model.init(jax.random.key(0))
    program = {r: str(jax.make_jaxpr(model.apply)(params, *base_inputs(), jnp.arange(r))) for r in (5, S)}
    for width in (BASE.mlp_dim, BASE.vocab_size):
        assert f"f32[{S},{width}]" in program[S]
        assert f"f32[{S},{width}]" not in program[5] and f"f32[5,{width}]" in program[5]


@bases
def test_no_gradient_from_later_entries(config: BaseConfig) -> None:
    model = BaseModel(config)
    params, (embeddings, *others) = trained(model), base_inputs()
    probe = jax.random.normal(jax.random.key(9), (config.vocab_size,))

    def read(embeddings: Array) -> Array:
        return model.apply(params, embeddings, *others, jnp.arange(S)) @ probe

    moved = np.abs(jax.jit(jax.jacrev(read))(embeddings)).sum(axis=-1)
    assert (moved[np.triu_indices(S, 1)] == 0).all()
    assert (moved[np.tril_indices(S)] > 0).all()


@bases
def test_padding_changes_no_logits_and_has_finite_gradients(config: BaseConfig) -> None:
    model = BaseModel(config)
    params, rows = trained(model), jnp.asarray([2, 10])
    embeddings, positions, spans = base_inputs()
    padded = jnp.pad(embeddings, ((0, 6), (0, 0))), jnp.pad(positions, (0, 6)), jnp.pad(spans, (0, 6))
    expected = model.apply(params, embeddings, positions, spans, rows)
    np.testing.assert_allclose(model.apply(params, *padded, rows), expected, atol=2e-5, rtol=1e-4)

    def loss(params: Params, embeddings: Array) -> Array:
        return jnp.sum(model.apply(params, embeddings, *padded[1:], rows) ** 2)

    for gradient in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(params, padded[0])):
        assert np.isfinite(gradient).all()


def test_grouped_heads_equal_plain_heads_with_repeated_keys_and_values() -> None:
    grouped, plain = BaseModel(BASE), BaseModel(dataclasses.replace(BASE, kv_heads=BASE.heads))
    params = trained(grouped)

    def repeat(path: Any, leaf: Array) -> Array:
        if not {"key", "value"} & {entry.key for entry in path}:
            return leaf
        return jnp.repeat(leaf.reshape(D, BASE.kv_heads, -1), 2, axis=1).reshape(D, -1)

    expected = grouped.apply(params, *base_inputs(), jnp.arange(S))
    actual = plain.apply(jax.tree_util.tree_map_with_path(repeat, params), *base_inputs(), jnp.arange(S))
    np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=1e-4)


def test_shifting_all_positions_changes_no_logits() -> None:
    model = BaseModel(BASE)
    params, (embeddings, positions, spans) = trained(model), base_inputs()
    near = model.apply(params, embeddings, positions, spans, jnp.arange(S))
    far = model.apply(params, embeddings, positions + 512.5, spans, jnp.arange(S))
    np.testing.assert_allclose(far, near, atol=2e-3)
    stretched = model.apply(params, embeddings, 2 * positions, spans, jnp.arange(S))
    assert np.abs(stretched - near).max() > 0.1


def test_spans_matter_to_gaussian_positions_alone() -> None:
    embeddings, positions, spans = base_inputs()
    for config, changes in ((BASES["default"], False), (BASES["gaussian"], True)):
        model = BaseModel(config)
        params = trained(model)
        wide, narrow = (model.apply(params, embeddings, positions, s, jnp.arange(S)) for s in (spans, 0 * spans))
        assert np.allclose(wide, narrow) != changes
        if changes:  # sigma 0 is a sharp position
            sharp = BaseModel(BASE).apply(params, embeddings, positions, spans, jnp.arange(S))
            np.testing.assert_allclose(narrow, sharp, atol=2e-5, rtol=1e-4)


def test_fresh_convolution_shifts_tokens() -> None:
    kernel = np.asarray(BaseModel(BASE).init(jax.random.key(0))["conv"]["kernel"])
    mix = np.arange(D) / (D - 1)  # y_s = x_s + kernel * x = (1 - mix) x_s + mix x_{s-1}
    np.testing.assert_allclose(kernel, [-mix, mix, 0 * mix], atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_fresh_model_is_near_uniform_but_tells_contexts_apart(tied: bool) -> None:
    model = BaseModel(BaseConfig(layers=2, tied=tied))
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 64), 0, 256).at[:, -8:].set(7 * jnp.arange(8))

    def loss(tokens: Array) -> Array:
        embeddings, positions = model.embed(params, tokens), jnp.arange(64.0)
        logits = model.apply(params, embeddings, positions, jnp.ones(64), jnp.arange(55, 63))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[56:, None], axis=-1).mean()

    losses = jax.vmap(loss)(tokens)
    np.testing.assert_allclose(losses, math.log(256), atol=0.15)
    # Same tail, other contexts: a difference that advantages can be made of, well above rounding (5e-7).
    assert np.diff(np.sort(losses)).min() > 1e-5


def test_embed_looks_tokens_up() -> None:
    model = BaseModel(BASE)
    params = model.init(jax.random.key(0))
    np.testing.assert_array_equal(model.embed(params, [3, 0]), params["embedding"]["embedding"][jnp.array([3, 0])])
    assert np.isnan(model.embed(params, [BASE.vocab_size])).all()


# GistNet.


@gists
def test_gists_are_independent_and_may_be_none(config: GistConfig) -> None:
    model = gist_model(config)
    params, children = trained(model), jax.random.normal(jax.random.key(5), (3, K, D))
    gists = model.apply(params, children)
    assert gists.shape == (3, D) and gists.dtype == jnp.float32
    np.testing.assert_allclose(model.apply(params, children[1:2]), gists[1:2], atol=2e-5, rtol=1e-4)
    assert model.apply(params, children[:0]).shape == (0, D)


@gists
def test_every_child_reaches_its_gist(config: GistConfig) -> None:
    model = gist_model(config)
    params, children = trained(model), jax.random.normal(jax.random.key(5), (1, K, D))
    moved = jax.grad(lambda children: model.apply(params, children)[0] @ jnp.arange(1.0, D + 1))(children)
    assert (np.abs(moved).sum(axis=-1) > 1e-4).all()


@gists
def test_fresh_gists_are_near_the_block_mean_unless_a_token_reads_them(config: GistConfig) -> None:
    model = gist_model(config)
    children = 0.02 * jax.random.normal(jax.random.key(5), (8, K, D))  # the scale of fresh embeddings
    distance = np.linalg.norm(model.apply(model.init(jax.random.key(0)), children) - children.mean(axis=1))
    relative = distance / np.linalg.norm(children.mean(axis=1))
    assert relative > 0.5 if config.pooling == "cls" else relative < 0.1


@gists
def test_the_order_of_children_matters_where_layers_know_it(config: GistConfig) -> None:
    model = gist_model(config)
    params, children = trained(model), jax.random.normal(jax.random.key(5), (3, K, D))
    forward, backward = model.apply(params, children), model.apply(params, children[:, ::-1])
    if config.layers:
        assert np.abs(forward - backward).max() > 1e-2
    else:
        np.testing.assert_allclose(forward, backward, atol=2e-5, rtol=1e-4)


def test_query_pooling_prefers_children_like_its_query() -> None:
    model = gist_model(GistConfig(pooling="query", heads=1))
    params = model.init(jax.random.key(0))
    params["pooling"] |= {"key": {"kernel": jnp.eye(D)}, "query": 100 * jnp.eye(D)[:1].reshape(1, 1, D)}
    gist = model.apply(params, jnp.eye(D)[None, :K])[0]
    np.testing.assert_allclose(gist, jnp.eye(D)[0], atol=1e-2)


@gists
def test_zero_children_have_finite_gists_and_gradients(config: GistConfig) -> None:
    model = gist_model(config)
    params = model.init(jax.random.key(0))
    value, gradients = jax.value_and_grad(lambda *a: model.apply(*a).sum(), argnums=(0, 1))(
        params, jnp.zeros((2, K, D))
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradients)))


# LensNet.


@lenses
def test_scores_are_bounded_and_zero_at_padding(config: LensConfig) -> None:
    model = lens_model(config)
    scores = np.asarray(model.apply(trained(model), **lens_inputs(padding=3)))
    assert scores.shape == (S + 3,) and scores.dtype == np.float32
    assert (np.abs(scores) <= 1).all() and (scores[:S] != 0).all() and (scores[S:] == 0).all()
    fresh = np.asarray(model.apply(model.init(jax.random.key(0)), **lens_inputs()))
    assert 0 < np.abs(fresh).max() < 0.5, "a fresh policy is undecided, not saturated"


def test_every_score_depends_on_every_entry() -> None:
    model = lens_model()
    params, inputs = trained(model, scale=0.1), lens_inputs()
    embeddings = inputs.pop("embeddings")
    moved = jax.jit(jax.jacrev(lambda x: model.apply(params, x, **inputs)))(embeddings)
    assert (np.abs(moved).sum(axis=-1) > 0).all()


@pytest.mark.parametrize("feature", ["lods", "spans", "distances"])
def test_scores_depend_on_every_feature(feature: str) -> None:
    model = lens_model()
    params, inputs = trained(model, scale=0.1), lens_inputs()
    changed = inputs | {feature: inputs[feature].at[0].set(0 if feature == "lods" else 1)}
    before, after = model.apply(params, **inputs), model.apply(params, **changed)
    assert abs(before[0] - after[0]) > 1e-4


def test_features_by_hand() -> None:
    # A LOD-1 entry of blocks of 4, two tokens from the cursor: log1p(2) = 1.0986.
    features = time_features(jnp.asarray([4.0]), jnp.asarray([2.0]))[0]
    waves = np.array([0.5, 1.0, 2.0, 4.0]) * 1.0986123
    np.testing.assert_allclose(features, [1.3862944, 1.0986123, *np.sin(waves), *np.cos(waves)], atol=1e-6)


@pytest.mark.parametrize("garbage", [0.0, 1e3, np.nan])
def test_neither_content_nor_count_of_padding_matters(garbage: float) -> None:
    model = lens_model()
    params, plain = trained(model), lens_inputs()
    padded = lens_inputs(padding=5)
    for name in ("embeddings", "spans", "distances"):
        padded[name] = padded[name].at[S:].set(garbage)
    padded["lods"] = padded["lods"].at[S:].set(2)
    np.testing.assert_allclose(model.apply(params, **padded)[:S], model.apply(params, **plain), atol=2e-5, rtol=1e-4)
    gradients = jax.grad(lambda params: model.apply(params, **padded).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_context_of_padding_alone_scores_zero_with_finite_gradients() -> None:
    model = lens_model()
    inputs = lens_inputs() | {"valid": jnp.zeros(S, bool)}
    scores, gradients = jax.value_and_grad(lambda params: model.apply(params, **inputs).sum())(trained(model))
    assert scores == 0 and all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def test_scores_move_with_their_entries() -> None:
    model = lens_model()
    params, inputs = trained(model), lens_inputs(padding=2)
    order = jax.random.permutation(jax.random.key(4), S + 2)
    shuffled = {name: value[order] for name, value in inputs.items()}
    expected = model.apply(params, **inputs)[order]
    np.testing.assert_allclose(model.apply(params, **shuffled), expected, atol=2e-5, rtol=1e-4)


def test_lensnet_attention_begins_as_a_similarity_kernel() -> None:
    fresh = lens_model().init(jax.random.key(0))
    for layer in range(LENS.layers):
        attention = fresh["transformer"][f"block_{layer}"]["attention"]
        query, key = attention["query"]["kernel"], attention["key"]["kernel"]
        np.testing.assert_array_equal(query, key)
        entries = np.asarray(jax.random.normal(jax.random.key(1), (50, LENS.dim)))
        logits = (entries @ query) @ (entries @ key).T
        assert np.mean(logits.argmax(axis=1) == np.arange(50)) > 0.8, "an entry is most like itself"
    first, second = (fresh["transformer"][f"block_{i}"]["attention"]["query"]["kernel"] for i in (0, 1))
    assert not np.allclose(first, second)
    base = BaseModel(dataclasses.replace(BASE, kv_heads=BASE.heads)).init(jax.random.key(0))
    attention = base["transformer"]["block_0"]["attention"]
    assert not np.allclose(attention["query"]["kernel"], attention["key"]["kernel"])


def test_equal_projections_can_be_donated_and_part_in_training() -> None:
    model, inputs = lens_model(), lens_inputs()

    def step(params: Params) -> Params:
        gradients = jax.grad(lambda params: model.apply(params, **inputs) @ jnp.arange(float(S)))(params)
        return jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, params, gradients)

    for init in (model.init, jax.jit(model.init)):  # one buffer behind two leaves could not be donated
        params = jax.jit(step, donate_argnums=0)(init(jax.random.key(0)))
    attention = params["transformer"]["block_0"]["attention"]
    assert not np.allclose(attention["query"]["kernel"], attention["key"]["kernel"], atol=1e-6)
