"""LensNet."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from lensjax.context.working import Entries
from lensjax.models import BaseModel, Params
from lensjax.models.lensnet import FREQUENCIES, LensConfig, Pointer, time_features
from tests.models.example_models import (
    BASES,
    LENS,
    LENSES,
    PADDING,
    S,
    assert_close,
    assert_finite,
    fresh,
    gradients,
    lens_inputs,
    lens_model,
    lenses,
    run,
    trained,
)


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
    for i, known in enumerate(entries.states):
        if config.reads == "states":
            x[i] = x[i] + known / np.sqrt(np.mean(known**2) + 1e-5) @ params["state"]["kernel"]
        if config.reads == "attention":  # from -1 where there is none to 1 where there is nothing else
            x[i] = x[i] + (1 + 2 * np.log(known + 1e-5) / np.log(1e5)) @ params["state"]["kernel"]
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
    return np.tanh(scores - params["slope"] * np.asarray(ages) if config.recency else scores)


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
    if config.recency:  # and what is old begins below 0
        params = params | {"slope": 0 * params["slope"]}
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


@pytest.mark.parametrize("config", ["blocks and pointer", "states and recency", "attention"])
@pytest.mark.parametrize("garbage", [1e3, np.nan])
def test_neither_content_nor_count_of_padding_matters(config: str, garbage: float) -> None:
    model, inputs = lens_model(LENSES[config]), lens_inputs()
    names = ("embeddings", "blocks", "positions", "spans", "distances", "states")
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
