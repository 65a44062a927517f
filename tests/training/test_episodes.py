"""Episodes: what is recorded is what happened, and can be judged again."""

import functools

import jax
import numpy as np
import pytest

from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.models import build_models
from lensjax.models.decision import build_tree, split
from lensjax.runs import config as configs
from lensjax.training import nll
from lensjax.training.steps import episodes
from tests.small import SMALL, batch, jit

CONFIG = configs.replace(SMALL, **{"online.steps": 12, "online.edit_cost": 0.25, "online.refocus_steps": 3})
LENGTH = 16


@functools.cache
def models():
    return build_models(CONFIG)


@functools.cache
def params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    parts = {"base": models().base, "gist": models().gist, "lens": models().lens}
    return {name: model.init(key) for (name, model), key in zip(parts.items(), keys, strict=True)}


@functools.cache
def played():
    """One episode of each of three sequences."""
    run = functools.partial(episodes.run, models(), params(), length=LENGTH, config=CONFIG)
    return jit(jax.vmap(run))(batch()["tokens"], jax.random.split(jax.random.key(1), 3))


def judge(lens_params, reference=None):
    def one(episode):
        return episodes.judge(models(), lens_params, episode, config=CONFIG, reference=reference)

    return jax.vmap(one)(played())


def test_an_episode_begins_cold_and_every_context_has_the_length():
    episode, geometry = played(), CONFIG.context.geometry
    cold = allocator.uniform(LENGTH, geometry)
    np.testing.assert_array_equal(
        episode.states.collapsed[:, 0], np.broadcast_to(cold.collapsed, (3, len(cold.collapsed)))
    )
    assert (episode.contexts.length == LENGTH).all()
    assert np.asarray(episode.swaps.count).sum() > 3
    for row in range(3):
        for step in range(3):
            state, context = jax.tree.map(lambda leaf: leaf[row, step], (episode.states, episode.contexts))  # noqa: B023
            again = allocator.to_context(state, geometry, capacity=LENGTH)
            jax.tree.map(np.testing.assert_array_equal, context, again)


def test_losses_are_those_of_the_contexts_and_rewards_their_fall_minus_the_cost_of_edits():
    episode, shape = played(), CONFIG.context

    def measure(tokens, seen):
        window = split(tokens, horizon=shape.horizon)
        tree = build_tree(models(), params(), window.history, CONFIG)
        return nll.variant_losses(models().base, params()["base"], tree, seen, window.horizon)[0]

    losses = jit(jax.vmap(measure))(batch()["tokens"], episode.contexts)
    np.testing.assert_allclose(episode.losses[:, :-1], losses, rtol=1e-5)
    falls = np.asarray(episode.losses)[:, :-1] - np.asarray(episode.losses)[:, 1:]
    expected = falls - 0.25 * np.asarray(episode.swaps.count)
    np.testing.assert_allclose(episode.rewards(edit_cost=0.25), expected, rtol=1e-6)


def test_the_policy_that_played_finds_its_episode_as_probable_as_it_recorded():
    judged, _ = jit(judge)(params()["lens"])
    np.testing.assert_allclose(judged.log_prob, played().log_probs, atol=1e-4)
    np.testing.assert_array_equal(judged.divergence, 0.0)
    other, _ = jit(judge)(params(5)["lens"], params()["lens"])
    assert (np.abs(other.log_prob - played().log_probs) > 1e-3).any()
    assert (np.asarray(other.divergence) > 0).any() and (np.asarray(other.divergence) > -1e-6).all()


def test_features_say_what_was_seen_and_send_no_gradient_to_the_policy():
    episode = played()
    _, features = jit(judge)(params()["lens"])
    assert features.shape == (3, 3, episodes.feature_count(CONFIG))
    np.testing.assert_allclose(features[..., -2], episode.losses[:, :-1])
    np.testing.assert_allclose(features[..., -1], [[1, 2 / 3, 1 / 3]] * 3, rtol=1e-6)

    one = jax.tree.map(lambda leaf: leaf[0, 1], (episode.entries, episode.contexts))
    entries, context = one
    _, hidden = models().lens.apply_with_features(params()["lens"], entries)
    is_tail = np.asarray(context.valid & (context.start >= 32 - 8))
    is_rest = np.asarray(context.valid) & ~is_tail
    pooled = np.concatenate([np.asarray(hidden)[where].mean(0) for where in (is_tail, is_rest)])
    np.testing.assert_allclose(features[0, 1, :-2], pooled, rtol=1e-4, atol=1e-5)

    gradient = jit(jax.grad(lambda lens: judge(lens)[1].sum()))(params()["lens"])
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_no_gradient_passes_through_an_episode():
    def total(parts):
        run = functools.partial(episodes.run, models(), parts, length=LENGTH, config=CONFIG)
        episode = run(batch()["tokens"][0], jax.random.key(0))
        return episode.losses.sum() + episode.log_probs.sum() + episode.entries.embeddings.sum()

    gradient = jit(jax.grad(total))(params())
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_the_cool_down_is_the_allocators():
    episode = played()
    edited = np.asarray(episode.states.collapsed)[:, 1:] != np.asarray(episode.states.collapsed)[:, :-1]
    np.testing.assert_array_equal(np.asarray(episode.states.cooling)[:, 1:] == CONFIG.focus.cooldown, edited)


@pytest.mark.parametrize("length", [16, 20])
def test_contexts_are_legal_cuts(length):
    run = functools.partial(episodes.run, models(), params(), length=length, config=CONFIG)
    episode = jit(jax.vmap(run))(batch(3)["tokens"], jax.random.split(jax.random.key(2), 3))
    shape = CONFIG.context
    check = functools.partial(
        contexts.invariants,
        window=shape.history,
        block_size=shape.block_size,
        length=length,
        recent_tokens=shape.recent_tokens,
    )
    assert all(np.asarray(ok).all() for ok in jax.vmap(jax.vmap(check))(episode.contexts).values())
