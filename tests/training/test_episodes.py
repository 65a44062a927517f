"""Episodes: what is recorded is what happened, and has the probability that was recorded."""

import functools

import jax
import numpy as np
import pytest

from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.models.decision import build_tree, split
from lensjax.training import nll
from lensjax.training.steps import episodes
from lensjax.training.steps.online import OnlineConfig
from tests.small import SMALL, batch, jit

SETTINGS, GEOMETRY = OnlineConfig(steps=12, refocus_steps=3), SMALL.geometry
LENGTH = 16


@functools.cache
def models():
    return SMALL.build_models()


@functools.cache
def params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    parts = {"base": models().base, "gist": models().gist, "lens": models().lens}
    return {name: model.init(key) for (name, model), key in zip(parts.items(), keys, strict=True)}


def run(parts, tokens, key, *, length):
    window = split(tokens, horizon=SMALL.context.horizon)
    return episodes.run(models(), parts, window, key, GEOMETRY, length=length, focus=SMALL.focus, settings=SETTINGS)


@functools.cache
def played(length=LENGTH):
    """One episode of each of three sequences."""
    play = functools.partial(run, params(), length=length)
    return jit(jax.vmap(play))(batch()["tokens"], jax.random.split(jax.random.key(1), 3))


def log_prob(lens_params, reference=None):
    one = functools.partial(
        episodes.log_prob, models(), lens_params, geometry=GEOMETRY, settings=SETTINGS, reference=reference
    )
    return jax.vmap(one)(played())


def test_an_episode_begins_cold_and_every_context_has_the_length():
    episode = played()
    cold = allocator.uniform(LENGTH, GEOMETRY)
    np.testing.assert_array_equal(
        episode.states.collapsed[:, 0], np.broadcast_to(cold.collapsed, (3, len(cold.collapsed)))
    )
    assert (episode.contexts.length == LENGTH).all()
    assert np.asarray(episode.swaps.count).sum() > 3
    again = functools.partial(allocator.to_context, geometry=GEOMETRY, capacity=LENGTH)
    jax.tree.map(np.testing.assert_array_equal, episode.contexts, jit(jax.vmap(jax.vmap(again)))(episode.states))


def test_losses_are_those_of_the_contexts_and_rewards_their_fall_minus_the_cost_of_edits():
    episode = played()

    def measure(tokens, seen):
        window = split(tokens, horizon=SMALL.context.horizon)
        tree = build_tree(models(), params(), window.history, GEOMETRY)
        return nll.variant_nll(models().base, params()["base"], tree, seen, window.horizon, GEOMETRY)[0]

    losses = jit(jax.vmap(measure))(batch()["tokens"], episode.contexts)
    np.testing.assert_allclose(episode.nll[:, :-1], losses, rtol=1e-5)
    falls = np.asarray(episode.nll)[:, :-1] - np.asarray(episode.nll)[:, 1:]
    expected = falls - 0.25 * np.asarray(episode.swaps.count)
    np.testing.assert_allclose(episode.rewards(edit_cost=0.25), expected, rtol=1e-6)


def test_the_policy_that_played_finds_its_episode_as_probable_as_it_recorded():
    stats, _ = jit(log_prob)(params()["lens"])
    np.testing.assert_allclose(stats.log_prob, played().log_probs, atol=1e-4)
    np.testing.assert_array_equal(stats.divergence, 0.0)
    other, _ = jit(log_prob)(params(5)["lens"], params()["lens"])
    assert (np.abs(other.log_prob - played().log_probs) > 1e-3).any()
    assert (np.asarray(other.divergence) > 0).any() and (np.asarray(other.divergence) > -1e-6).all()


def test_features_say_what_was_seen_and_send_no_gradient_to_the_policy():
    episode = played()
    _, features = jit(log_prob)(params()["lens"])
    assert features.shape == (3, 3, episodes.feature_count(models()))
    np.testing.assert_allclose(features[..., -2], episode.nll[:, :-1])
    np.testing.assert_allclose(features[..., -1], [[1, 2 / 3, 1 / 3]] * 3, rtol=1e-6)

    one = jax.tree.map(lambda leaf: leaf[0, 1], (episode.entries, episode.contexts))
    entries, context = one
    _, hidden = models().lens.apply_with_features(params()["lens"], entries)
    is_tail = np.asarray(context.valid & (context.start >= GEOMETRY.tail))
    is_rest = np.asarray(context.valid) & ~is_tail
    pooled = np.concatenate([np.asarray(hidden)[where].mean(0) for where in (is_tail, is_rest)])
    np.testing.assert_allclose(features[0, 1, :-2], pooled, rtol=1e-4, atol=1e-5)

    gradient = jit(jax.grad(lambda lens: log_prob(lens)[1].sum()))(params()["lens"])
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_no_gradient_passes_through_an_episode():
    def total(parts):
        episode = run(parts, batch()["tokens"][0], jax.random.key(0), length=LENGTH)
        return episode.nll.sum() + episode.log_probs.sum() + episode.entries.embeddings.sum()

    gradient = jit(jax.grad(total))(params())
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_the_cool_down_is_the_allocators():
    episode = played()
    edited = np.asarray(episode.states.collapsed)[:, 1:] != np.asarray(episode.states.collapsed)[:, :-1]
    np.testing.assert_array_equal(np.asarray(episode.states.cooling)[:, 1:] == SMALL.focus.cooldown, edited)


@pytest.mark.parametrize("length", [LENGTH, pytest.param(20, marks=pytest.mark.slow)])
def test_contexts_are_legal_cuts(length):
    check = functools.partial(contexts.invariants, geometry=GEOMETRY, length=length)
    episode = played(length)
    assert all(np.asarray(ok).all() for ok in jit(jax.vmap(jax.vmap(check)))(episode.contexts).values())
