"""GistNet."""

import jax.numpy as jnp
import numpy as np

from lensjax.models.gistnet import GistConfig
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
