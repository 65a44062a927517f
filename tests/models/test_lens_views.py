"""What LensNet may look at beside embeddings, each switched on or off: the map, the base model's states, age."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lensjax.context import refocus, tree
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig
from lensjax.context.geometry import Geometry
from lensjax.models import LensModel, Params
from lensjax.models.decision import policy
from lensjax.models.lensnet import LensConfig
from tests import reference
from tests.models.example_models import (
    LENS,
    LENSES,
    PADDING,
    D,
    F,
    S,
    assert_close,
    assert_finite,
    fresh,
    gradients,
    lens_inputs,
    lens_model,
    run,
    trained,
)
from tests.small import jit

STATES = LENSES["states and recency"]
BLIND = dataclasses.replace(LENS, map=False, reads="states")
"""Sees no map, but states of what it sees."""
FLOATS = ("embeddings", "blocks", "positions", "spans", "distances", "states")


def test_without_a_map_gists_are_neither_seen_nor_scored() -> None:
    model, inputs = lens_model(BLIND), lens_inputs()
    is_gist = np.asarray(inputs.lods > 0)
    expected = run(model, trained(model), inputs)
    assert (expected[is_gist] == 0).all() and (expected[:S][~is_gist[:S]] != 0).all()
    for garbage in (0.0, 1e3, np.nan):
        others = {name: getattr(inputs, name).at[np.flatnonzero(is_gist)].set(garbage) for name in FLOATS}
        np.testing.assert_array_equal(run(model, trained(model), dataclasses.replace(inputs, **others)), expected)
    changed = dataclasses.replace(inputs, embeddings=inputs.embeddings.at[0].add(1))
    with_map = lens_model(dataclasses.replace(BLIND, map=True))
    scores = run(with_map, trained(with_map), inputs)
    assert (scores[:S] != 0).all()
    assert (run(with_map, trained(with_map), changed) != scores)[:S].all()


def test_without_a_map_it_is_lensnet_on_the_tokens_alone() -> None:
    model, whole = lens_model(BLIND), lens_model(dataclasses.replace(BLIND, map=True))
    assert jax.tree.map(jnp.shape, fresh(model)) == jax.tree.map(jnp.shape, fresh(whole))
    alone = jax.tree.map(lambda leaf: leaf[3:], lens_inputs())
    assert_close(run(model, trained(model), lens_inputs())[3:], run(whole, trained(model), alone))
    found = gradients(model, trained(model), lens_inputs())
    assert_finite(found)
    assert not np.any(found[1].embeddings[:3]) and not np.any(found[1].blocks[:3])


def test_a_map_without_a_token_scores_zero_with_zero_gradients() -> None:
    model = lens_model(BLIND)
    nothing = dataclasses.replace(lens_inputs(), lods=jnp.ones(S + PADDING, jnp.int32))
    assert (run(model, trained(model), nothing) == 0).all()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients(model, trained(model), nothing)))


def influence(config: LensConfig) -> np.ndarray:
    """float[S + PADDING, S + PADDING, 5, F]: how far each score depends on what is known of each entry's blocks."""
    model, inputs = lens_model(config), lens_inputs()
    assert inputs.states is not None

    def scores(states: Array) -> Array:
        return model.apply(trained(model), dataclasses.replace(inputs, states=states))

    found = jit(jax.jacrev(scores))(inputs.states)
    return np.abs(np.asarray(found)).reshape(S + PADDING, S + PADDING, 1 + contexts.BLOCKS_BEFORE, -1)


@pytest.mark.parametrize("reads", ["states", "attention"])
def test_every_score_depends_on_every_state_and_on_none_where_they_are_switched_off(reads: Any) -> None:
    size = influence(dataclasses.replace(LENS, layers=1, reads=reads)).sum(axis=3)
    assert (size[:S, :S] > 0).all() and (size[S:] == 0).all() and (size[:, S:] == 0).all()
    assert (influence(LENS) == 0).all()
    assert not {"state", "slope"} & set(fresh(lens_model()))
    assert {"state", "slope"} <= set(fresh(lens_model(STATES)))


def of_each_alone(config: LensConfig) -> tuple[LensModel, Params]:
    """A LensNet whose layers add nothing: each entry is scored by what is known of it."""
    model = lens_model(dataclasses.replace(config, layers=1, pointer=False))
    params = trained(model)
    return model, {**params, "transformer": jax.tree.map(jnp.zeros_like, params["transformer"])}


@pytest.mark.parametrize("reads", ["states", "attention"])
def test_a_score_depends_on_the_four_blocks_before_and_on_none_that_is_farther(reads: Any) -> None:
    """Of a whole tree: eight blocks of four, and what is known of each."""
    model, params = of_each_alone(dataclasses.replace(LENS, reads=reads))
    leaves = np.random.default_rng(0).normal(size=(32, D)).astype("f")
    plain = tree.build(leaves, lambda children: children.mean(axis=1), block_size=4, max_lod=1)
    geometry = Geometry(history=32, block_size=4, max_lod=1, recent_tokens=4, omit=True)
    context = contexts.recency(12, geometry, capacity=12)
    known = jnp.asarray(np.random.default_rng(1).uniform(0.01, 1, size=(8, F)).astype("f"))

    def scores(known: Array) -> Array:
        history = dataclasses.replace(plain, states=(jnp.zeros((32, F)), known))
        return model.apply(params, contexts.materialise(history, context))

    size = np.abs(np.asarray(jit(jax.jacrev(scores))(known))).sum(axis=2)
    block = np.asarray(context.start)[:, None] // 4
    before = block - np.arange(8)
    expected = (before >= 0) & (before <= 4) & np.asarray(context.valid)[:, None]
    np.testing.assert_array_equal(size > 0, expected)
    assert expected.sum(axis=1).max() == 5 and (~expected).any()


@pytest.mark.parametrize("config", [STATES, LENSES["attention"]], ids=["states", "attention"])
def test_states_that_are_read_must_be_there(config: LensConfig) -> None:
    model, inputs = lens_model(config), lens_inputs()
    assert model.reads == config.reads and lens_model().reads == "nothing"
    with pytest.raises(ValueError, match=rf"entries\.states must be there .* lens\.reads {config.reads}"):
        model.apply(fresh(model), dataclasses.replace(inputs, states=None))
    assert inputs.states is not None
    with pytest.raises(ValueError, match=r"entries\.states must have shape \[14, 15\].*\(14, 14\)"):
        model.apply(fresh(model), dataclasses.replace(inputs, states=inputs.states[:, 1:]))
    without = dataclasses.replace(inputs, states=None)
    np.testing.assert_array_equal(
        run(lens_model(), fresh(lens_model()), without), run(lens_model(), fresh(lens_model()), inputs)
    )


GEOMETRY = Geometry(history=96, block_size=4, max_lod=1, recent_tokens=8, omit=True)


def kept_of_the_last(config: LensConfig, seeds: range) -> list[float]:
    """Shares of the last 48 tokens of 96 that fresh LensNets have in full after four steps from a uniform start."""
    model = LensModel(config, 32, 1)

    @jit
    def pick(key: Array) -> contexts.WorkingContext:
        leaves = jax.random.normal(key, (GEOMETRY.history, 32))
        history = tree.build(leaves, lambda children: children.mean(axis=1), block_size=4, max_lod=1)
        score = policy(model, model.init(key), history)
        settings = FocusConfig(cooldown=0)
        path = refocus.cold_start(score, 48, GEOMETRY, capacity=48, settings=settings)
        return jax.tree.map(lambda leaf: leaf[-1], path)

    shown = [reference.read(reference.entries_of(pick(jax.random.key(seed))), GEOMETRY) for seed in seeds]
    assert {len(one) for one in shown} == {48}
    return [sum(token >= 48 for token, _ in one) / 48 for one in shown]


def test_with_recency_a_fresh_lensnet_keeps_the_last_tokens() -> None:
    # Without a pointer: a fresh one speaks louder than age.
    plain = LensConfig(dim=32, mlp_dim=32, pointer=False)
    shares = {
        recency: kept_of_the_last(dataclasses.replace(plain, recency=recency), range(4)) for recency in (False, True)
    }
    assert np.mean(shares[True]) > 0.75 > 0.65 > np.mean(shares[False])
