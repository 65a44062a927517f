"""What LensNet may look at beside embeddings, each switched on or off: the map, the base model's states, age."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lensjax.context import refocus, tree
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig
from lensjax.context.geometry import Geometry
from lensjax.models import LensModel
from lensjax.models.decision import policy
from lensjax.models.lensnet import LensConfig
from tests import reference
from tests.models.example_models import (
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
    run,
    trained,
)
from tests.small import jit

STATES = LENSES["states and recency"]
BLIND = dataclasses.replace(LENS, map=False, states=True)
"""Sees no map, but states of what it sees."""
FLOATS = ("embeddings", "blocks", "positions", "spans", "distances", "states", "block_states")


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


def test_every_score_depends_on_every_state_and_on_none_where_they_are_switched_off() -> None:
    inputs = lens_inputs()

    def influence(config: LensConfig) -> list[np.ndarray]:
        model = lens_model(config)

        def scores(states: Array, block_states: Array) -> Array:
            entries = dataclasses.replace(inputs, states=states, block_states=block_states)
            return model.apply(trained(model), entries)

        assert inputs.states is not None and inputs.block_states is not None
        found = jit(jax.jacrev(scores, argnums=(0, 1)))(inputs.states, inputs.block_states)
        return [np.abs(jacobian).sum(axis=-1) for jacobian in found]

    for size in influence(STATES):
        assert (size[:S, :S] > 0).all() and (size[S:] == 0).all() and (size[:, S:] == 0).all()
    for size in influence(LENS):
        assert (size == 0).all()
    assert not {"state", "state_norm", "slope"} & set(fresh(lens_model()))
    assert {"state", "state_norm", "slope"} <= set(fresh(lens_model(STATES)))


@pytest.mark.parametrize("name", ["states", "block_states"])
def test_states_that_are_read_must_be_there(name: str) -> None:
    model, inputs = lens_model(STATES), lens_inputs()
    assert model.reads_states and not lens_model().reads_states
    with pytest.raises(ValueError, match=rf"entries\.{name} must be there for a LensNet that reads states"):
        model.apply(fresh(model), dataclasses.replace(inputs, **{name: None}))
    with pytest.raises(ValueError, match=rf"entries\.{name} must have shape \[14, 16\].*\(14, 15\)"):
        model.apply(fresh(model), dataclasses.replace(inputs, **{name: getattr(inputs, name)[:, 1:]}))
    without = dataclasses.replace(inputs, states=None, block_states=None)
    np.testing.assert_array_equal(
        run(lens_model(), fresh(lens_model()), without), run(lens_model(), fresh(lens_model()), inputs)
    )


GEOMETRY = Geometry(history=96, block_size=4, max_lod=1, recent_tokens=8, omit=True)


def kept_of_the_last(config: LensConfig, seed: int) -> float:
    """Share of the last 48 tokens of 96 that a fresh LensNet has in full after four steps from a uniform start."""
    model = LensModel(config, 32, 1)

    @jit
    def pick(key: Array) -> contexts.WorkingContext:
        leaves = jax.random.normal(key, (GEOMETRY.history, 32))
        history = tree.build(leaves, lambda children: children.mean(axis=1), block_size=4, max_lod=1)
        score = policy(model, model.init(key), history)
        settings = FocusConfig(cooldown=0)
        path = refocus.cold_start(score, 48, GEOMETRY, capacity=48, settings=settings)
        return jax.tree.map(lambda leaf: leaf[-1], path)

    shown = reference.read(reference.entries_of(pick(jax.random.key(seed))), GEOMETRY)
    assert len(shown) == 48
    return sum(token >= 48 for token, _ in shown) / 48


def test_with_recency_a_fresh_lensnet_keeps_the_last_tokens() -> None:
    # Without a pointer: a fresh one speaks louder than age.
    plain = LensConfig(dim=32, mlp_dim=32, pointer=False)
    shares = {
        recency: [kept_of_the_last(dataclasses.replace(plain, recency=recency), seed) for seed in range(4)]
        for recency in (False, True)
    }
    assert np.mean(shares[True]) > 0.75 > 0.65 > np.mean(shares[False])
