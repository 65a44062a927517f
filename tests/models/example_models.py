"""Small models of each kind, inputs for them, and what is compiled of them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lensjax.context.working import Entries
from lensjax.models import BaseModel, GistModel, LensModel, Params
from lensjax.models.base_lm import BaseConfig
from lensjax.models.gistnet import GistConfig
from lensjax.models.lensnet import LensConfig
from lensjax.models.nn.rope import RopeScaling

# Widths are shared, for initialisation without jit compiles once per shape.
BASE = BaseConfig(vocab_size=29, dim=16, layers=2, heads=4, kv_heads=2, mlp_dim=48, conv_width=3)
LENS = LensConfig(dim=16, layers=2, heads=2, mlp_dim=48)
S, D, K, F, PADDING = 11, 16, 4, 3, 3
ROWS = jnp.arange(S)

# All at once that other families add to Llama; the frequencies are one that stays, a mixture, and one divided.
FAMILIES = dataclasses.replace(
    BASE,
    head_dim=6,
    qkv_bias=True,
    qk_norm=True,
    norm_eps=1e-2,
    rope_theta=100.0,
    rope_scaling=RopeScaling("llama3", factor=4.0, low=0.5, high=2.0, original_length=16),
    post_norms=True,
    activation="gelu_tanh",
    scale_embedding=True,
    window=6,
    global_every=2,
    local_rope_theta=30.0,
)
BASES = {
    "default": BASE,
    "gaussian": dataclasses.replace(BASE, gaussian_rope=True),
    "untied, one layer": dataclasses.replace(BASE, tied=False, layers=1),
    "no convolution, plain heads": dataclasses.replace(BASE, conv_width=0, kv_heads=4),
    "one tap": dataclasses.replace(BASE, conv_width=1, kv_heads=1),
    "of other families": FAMILIES,
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
    "states and recency": dataclasses.replace(LENS, layers=1, reads="states", recency=True),
    "attention": dataclasses.replace(LENS, layers=1, reads="attention"),
}

bases = pytest.mark.parametrize("config", BASES.values(), ids=BASES)
gists = pytest.mark.parametrize("config", GISTS.values(), ids=GISTS)
lenses = pytest.mark.parametrize("config", LENSES.values(), ids=LENSES)
kinds = pytest.mark.parametrize("kind", ["base", "gist", "lens"])


def gist_model(config: GistConfig) -> GistModel:
    return GistModel(config, D, K)


def lens_model(config: LensConfig = LENS) -> LensModel:
    return LensModel(config, D, 2, state_dim=0 if config.reads == "nothing" else F)


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


def function(model: Any) -> Callable[..., Array]:
    """What a model computes: logits, gists or scores."""
    return model.logits if isinstance(model, BaseModel) else model.apply


# Equal models share their compiled functions.
@functools.cache
def compiled_apply(model: Any) -> Callable[..., Array]:
    return jax.jit(function(model))


@functools.cache
def compiled_gradients(model: Any) -> Callable[..., tuple[Params, Any]]:
    def loss(params: Params, first: Any, *others: Array) -> Array:
        output = function(model)(params, first, *others)
        return jnp.sum(output * jnp.cos(jnp.arange(1.0, output.size + 1)).reshape(output.shape))

    return jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))


def run(model: Any, params: Params, *arguments: Any) -> np.ndarray:
    return np.asarray(compiled_apply(model)(params, *arguments))


def gradients(model: Any, params: Params, *arguments: Any) -> tuple[Params, Any]:
    """Of a generic loss of the output, with respect to the parameters and the floats of the first argument."""
    return floats(compiled_gradients(model)(params, *arguments))


def floats(gradients: Any) -> Any:
    """The gradients alone: what is no float has none."""
    return jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf, gradients)


def assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, atol=5e-5 * np.abs(expected).max(), rtol=0)


def assert_finite(tree: Any) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def base_entries(embeddings: Any, positions: Any, spans: Any) -> Entries:
    """Entries for a language model, which reads these three; what else is there would be noticed."""
    embeddings, positions, spans = (jnp.asarray(values, jnp.float32) for values in (embeddings, positions, spans))
    unread = jnp.full_like(positions, jnp.nan)
    lods, valid = jnp.full(positions.shape, 99), jnp.zeros(positions.shape, bool)
    return Entries(embeddings, jnp.full_like(embeddings, jnp.nan), positions, lods, spans, unread, valid)


def base_inputs() -> Entries:
    """Entries as in a cut: spans of 16, 4, 4 tokens and then single tokens, at the centres of their spans."""
    spans = np.array([16, 4, 4] + [1] * (S - 3), "f")
    embeddings = np.random.default_rng(1).normal(size=(S, D)).astype("f")
    return base_entries(embeddings, np.cumsum(spans) - (spans + 1) / 2, spans)


def lens_inputs(padding: int = PADDING) -> Entries:
    """The same entries for LensNet, followed by padding: four tokens have a gist, the last four not yet."""
    inputs = base_inputs()
    embeddings, centres, spans = inputs.embeddings, inputs.positions, inputs.spans
    gist = jnp.asarray(np.random.default_rng(7).normal(size=D).astype("f"))
    lods, valid = jnp.asarray([2, 1, 1] + [0] * (S - 3)), jnp.ones(S, bool)
    blocks = embeddings.at[3:7].set(gist)
    # From the centres to the last token, as in `materialise`.
    # Above 0, as attention is, and of many sizes.
    states = jnp.exp(jnp.asarray(np.random.default_rng(9).normal(-3, 2, size=(S, 5 * F)).astype("f")))
    entries = Entries(embeddings, blocks, centres, lods, spans, spans.sum() - 1 - centres, valid, states)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)), entries)


CHILDREN = jnp.asarray(np.random.default_rng(2).normal(size=(3, K, D)).astype("f"))


def example(kind: str) -> tuple[Any, tuple[Any, ...]]:
    """A model of each kind with arguments of its function."""
    return {
        "base": (BaseModel(BASE), (base_inputs(), ROWS)),
        "gist": (gist_model(GISTS["query, mlp, 1 layers"]), (CHILDREN,)),
        "lens": (lens_model(), (lens_inputs(),)),
    }[kind]


def is_local(layer: int, config: BaseConfig) -> bool:
    """Whether a layer, counted from 0, sees the window alone."""
    return config.window is not None and (layer + 1) % config.global_every != 0


def activated(gate: np.ndarray, config: BaseConfig) -> np.ndarray:
    """The gate of an MLP, behind its activation."""
    if config.activation == "silu":
        return gate / (1 + np.exp(-gate))
    return gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))


def frequency_of(pair: int, layer: int, config: BaseConfig) -> float:
    """Radians per token of a rotary pair in a layer."""
    width = config.head_dim or config.dim // config.heads
    if is_local(layer, config):
        return config.local_rope_theta ** (-2 * pair / width)
    return scaled(config.rope_theta ** (-2 * pair / width), config)


def scaled(frequency: float, config: BaseConfig) -> float:
    """As the published code of Llama 3.1 has it, by wavelengths."""
    scaling, length = config.rope_scaling, 2 * math.pi / frequency
    if scaling.kind == "none" or length < scaling.original_length / scaling.high:
        return frequency
    if length > scaling.original_length / scaling.low:
        return frequency / scaling.factor
    smooth = (scaling.original_length / length - scaling.low) / (scaling.high - scaling.low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
