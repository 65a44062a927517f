"""Swaps that are sampled."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from lensjax.context import allocator
from lensjax.context.allocator import FocusConfig, FocusState
from tests.context.situations import (
    FLAT,
    GREEDY,
    HAND,
    ROWS,
    SAMPLED,
    both,
    compiled_swap,
    random_cases,
    row_of,
    state_of,
)

# Of 6 blocks, 4 compete; the last two pay for any of them, whatever the noise.
COMPETING = np.asarray([0.5, -0.25, 0.125, 0.75])
DRAWS = 8192


def draw(settings, *, expand, seed=0):
    """Which of the competing nodes are edited in each of many draws, bool[DRAWS, 4]."""
    payer = -1e5 if expand else 1e5
    scores = np.asarray([*COMPETING, payer, payer], np.float32)
    state = FocusState(np.asarray([expand] * 4 + [not expand] * 2), np.zeros(6, np.int32))
    state, scores = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (DRAWS, 6)), (state, scores))
    _, info = jax.device_get(compiled_swap(FLAT, settings)(state, scores, key=jax.random.key(seed)))
    assert (info.swaps == min(settings.max_edits, 2)).all()
    return (info.expanded if expand else info.collapsed)[:, :4]


def softmax(values):
    return np.exp(values) / np.exp(values).sum()


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "collapse"])
def test_the_first_draw_follows_the_softmax_of_the_scores(expand):
    found = draw(FocusConfig(max_edits=1, temperature=0.5), expand=expand).mean(axis=0)
    expected = softmax((COMPETING if expand else -COMPETING) / 0.5)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_two_draws_are_without_replacement():
    found = draw(FocusConfig(max_edits=2, temperature=0.5), expand=True)
    p = softmax(COMPETING / 0.5)
    for a, b in itertools.combinations(range(4), 2):
        either_order = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        assert abs((found[:, a] & found[:, b]).mean() - either_order) < 0.02


def test_thresholds_go_by_the_scores_without_noise():
    hot = {"max_edits": 1, "temperature": 100.0}
    found = draw(FocusConfig(expand_threshold=0.5, **hot), expand=True).mean(axis=0)
    np.testing.assert_allclose(found, [0.5, 0, 0, 0.5], atol=0.02)


def test_the_same_key_makes_the_same_swaps():
    settings = FocusConfig(max_edits=1, temperature=0.5)
    np.testing.assert_array_equal(draw(settings, expand=True), draw(settings, expand=True))
    assert (draw(settings, expand=True) != draw(settings, expand=True, seed=1)).any()


@both
def test_a_low_temperature_is_greedy(geometry):
    cases = random_cases(geometry, seed=11)
    ranks = np.tile(np.linspace(-1, 1, cases.scores.shape[1], dtype=np.float32), (ROWS, 1))
    distinct = np.random.default_rng(11).permuted(ranks, axis=1)
    greedy = compiled_swap(geometry, GREEDY)(cases.state, distinct)
    cold = compiled_swap(geometry, dataclasses.replace(GREEDY, temperature=1e-6))(cases.state, distinct)
    jax.tree.map(np.testing.assert_array_equal, greedy, cold)


def test_sampling_without_a_key_is_an_error():
    state, scores = row_of(state_of([[(0, 1)]], HAND), 0), np.zeros(6, np.float32)
    with pytest.raises(ValueError, match=r"temperature 0\.5 .*key"):
        jax.eval_shape(lambda one: allocator.swap(one, scores, HAND, settings=SAMPLED), state)
