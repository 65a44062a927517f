"""GistNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.models.gistnet import GistConfig, centred, scaled
from tests.models.example_models import (
    CHILDREN,
    GISTS,
    D,
    K,
    assert_close,
    assert_finite,
    fresh,
    gist_model,
    gists,
    gradients,
    run,
    trained,
)


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


def test_the_scaled_mean_by_hand():
    # About (1, 2), four children whose mean is (2, 2): twice as far.
    np.testing.assert_allclose(scaled(np.array([2.0, 2.0]), np.array([1.0, 2.0]), 4), [3.0, 2.0])
    # About 0 the mean (1, 0) of (1, 3) and (1, -3) is sqrt(2) long.
    np.testing.assert_allclose(scaled(np.array([1.0, 0.0]), np.zeros(2), 2), [2**0.5, 0.0], rtol=1e-6)
    # What all children have in common stays.
    np.testing.assert_allclose(scaled(np.full((3, 2), 5.0), np.full(2, 5.0), 9), np.full((3, 2), 5.0))


@pytest.mark.parametrize("pooling", ["mean", "query"])
@pytest.mark.parametrize("layers", [0, 1])
def test_a_scaled_gistnet_begins_at_the_norm_of_tokens(pooling, layers):
    model = gist_model(GistConfig(pooling=pooling, layers=layers, heads=2, start="scaled"))
    vocabulary = 0.1 * np.random.default_rng(0).normal(size=(200, D)).astype(np.float32) + 0.3
    children = jnp.asarray(vocabulary[: 40 * K].reshape(40, K, D))
    params = centred(fresh(model), vocabulary)
    mu = vocabulary.mean(axis=0)
    expected = mu + 2 * (np.asarray(children).mean(axis=1) - mu)  # sqrt(4) = 2
    found = run(model, params, children)
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    own = np.linalg.norm(found - mu, axis=1).mean() / np.linalg.norm(vocabulary - mu, axis=1).mean()
    assert 0.9 < own < 1.1
    plain = gist_model(GistConfig(pooling=pooling, layers=layers, heads=2))
    halved = np.linalg.norm(run(plain, fresh(plain), children) - mu, axis=1).mean()
    assert halved / np.linalg.norm(vocabulary - mu, axis=1).mean() < 0.6


def test_scaling_is_all_that_start_changes():
    before, after = (gist_model(GistConfig(heads=2, start=start)) for start in ("mean", "scaled"))
    assert set(fresh(after)) == set(fresh(before)) | {"centre"} and not np.asarray(fresh(after)["centre"]).any()
    same = {name: leaf for name, leaf in fresh(after).items() if name != "centre"}
    assert jax.tree.structure(same) == jax.tree.structure(fresh(before))


def test_a_centre_needs_a_gistnet_that_is_scaled():
    model = gist_model(GistConfig(heads=2))
    with pytest.raises(ValueError, match=r"must have a centre: set gist\.start to scaled"):
        centred(fresh(model), CHILDREN[0])
    with pytest.raises(ValueError, match=r"gist\.start must be mean with gist\.pooling cls, .* got scaled"):
        GistConfig(pooling="cls", start="scaled")
