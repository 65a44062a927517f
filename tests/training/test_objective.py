"""The objective against a slow reference, on random variants and random scores; no model is called."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.training.metrics import MAY_BE_UNDEFINED
from tests import slow_objective
from tests.small import jit
from tests.training.scored import (
    EMPTY,
    GEOMETRY,
    VARIANTS,
    as_arrays,
    compiled,
    objective,
    one_update,
    random_case,
    scored_cuts,
)

SWEPT = {
    "temperature": st.sampled_from([0.5, 1.0, 2.0]),
    "beta": st.sampled_from([1.0, 8.0]),
    "collapse_weight": st.sampled_from([0.0, 0.5, 2.0]),
    "rank_weight": st.sampled_from([0.0, 0.5]),
    "margin": st.sampled_from([0.0, 0.3]),
    "budget_weight": st.sampled_from([0.0, 0.2]),
    "smooth_weight": st.sampled_from([0.0, 0.4]),
    "kl_weight": st.sampled_from([0.0, 3.0]),
    "hard_negative_ratio": st.sampled_from([0.0, 0.5, 1.0]),
}


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), is_first=st.booleans(), swept=st.fixed_dictionaries(SWEPT))
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"granularity": "pair"},
        {"targets": "worse_only"},
        {"targets": "worse_only", "granularity": "pair"},
        {"local_edits": 2},
        {"keep": 3},
        {"name": "mse"},
        {"name": "span_advantages"},
        {"name": "span_advantages", "local_edits": 2, "keep": 3},
        {"pair_weights": "importance"},
        {"name": "mse", "pair_weights": "importance", "local_edits": 2},
    ],
    ids=lambda choice: "-".join(map(str, choice.values())) or "default",
)
def test_the_objective_is_the_slow_reference(choice, seed, is_first, swept):
    recipe, call = compiled(**choice)
    recipe = replace(recipe, hyper=replace(recipe.hyper, **swept))
    scored, scores, anchor = random_case(seed)
    output = call(
        scored,
        scores,
        anchor,
        EMPTY if is_first else one_update(0.1, 0.3),
        EMPTY if is_first else one_update(-0.2, 0.06),
        as_arrays(recipe.hyper),
    )
    expected = slow_objective.objective(
        scored,
        scores,
        anchor,
        advantage_moments=None if is_first else (0.1, 0.3),
        balance_average=None if is_first else -0.2,
        temperature=recipe.hyper.temperature,
        recipe=recipe,
    )
    found = {name: float(value) for name, value in output.metrics.items()}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    assert float(output.loss) == found["mc/lens_loss"]
    assert not [name for name, value in found.items() if np.isnan(value) and name not in MAY_BE_UNDEFINED]


def test_the_balance_of_each_variant_is_given_back_for_the_moving_average():
    scored, scores, anchor = random_case(0)
    recipe, call = compiled()
    balance = call(scored, scores, anchor, EMPTY, EMPTY, as_arrays(recipe.hyper)).balance
    rows = slow_objective.rows(scored, scores, None, recipe)
    for b, v in np.argwhere(scored.distinct):
        assert float(balance[b, v]) == pytest.approx(rows[b].balance(v), abs=1e-5)


def test_the_advantage_of_a_span_by_hand():
    """Two variants of a sequence, 1 nat apart, that differ in two blocks of two tokens each."""
    recipe, call = objective(name="span_advantages")
    recent = [(token, 0) for token in range(4, GEOMETRY.history)]
    one, other = [(0, 1), (2, 0), (3, 0), *recent], [(0, 0), (1, 0), (2, 1), *recent]
    distinct, measured = [True, True, False, False], [1.0, 2.0, np.nan, np.nan]
    scored = scored_cuts([one, other, one, one], distinct, measured, capacity=GEOMETRY.history)
    scored = jax.tree.map(lambda leaf: leaf[None], scored)
    alone = {name: 0.0 for name in ("rank_weight", "budget_weight", "smooth_weight")}
    hyper = as_arrays(replace(recipe.hyper, **alone))
    loss = jit(jax.value_and_grad(lambda s: call(scored, s, None, EMPTY, EMPTY, hyper).loss))
    scores = np.zeros((1, 4, GEOMETRY.history), np.float32)
    scores[0, 0, :3], scores[0, 1, :3] = [-0.5, 0.25, 0.75], [1.0, -1.0, 0.5]
    value, gradient = loss(scores)
    # The first is better: less of tokens 0 and 1, more of 2 and 3, on both sides by the tokens covered, of 8 in all.
    asked = [2 * 0.5 + 0.25 + 0.75, -1.0 + 1.0 + 2 * 0.5]
    assert float(value) == pytest.approx(-sum(asked) / 8, rel=1e-5)
    expected = np.zeros((2, GEOMETRY.history))
    expected[:, :3] = np.asarray([[2, -1, -1], [1, 1, -2]]) / 8
    np.testing.assert_allclose(gradient[0, :2], expected, rtol=1e-5)
    assert not gradient[0, 2:].any()
    # To repeat the level says nothing.
    assert float(loss(np.where(scored.contexts.lod > 0, 0.75, -0.25).astype(np.float32))[0]) == pytest.approx(
        0, abs=1e-7
    )


# Where gradients go.


@functools.cache
def gradients():
    """Of the whole loss with respect to scores, anchor scores and the measured losses."""
    recipe, call = objective()
    hyper = as_arrays(replace(recipe.hyper, kl_weight=1.0, smooth_weight=1.0))

    def loss(scores, anchor, losses, scored):
        return call(replace(scored, nll=losses), scores, anchor, EMPTY, EMPTY, hyper).loss

    scored, scores, anchor = random_case(1)
    return scored, jit(jax.grad(loss, argnums=(0, 1, 2)))(scores, anchor, scored.nll, scored)


def test_only_scores_before_the_protected_tail_are_trained():
    scored, (scores, _, _) = gradients()
    contexts = scored.contexts
    is_free = contexts.valid & (contexts.start < GEOMETRY.tail) & scored.distinct[..., None]
    assert np.isfinite(scores).all()
    assert (np.asarray(scores)[is_free] != 0).all()
    assert not np.asarray(scores)[~is_free].any()


def test_the_variants_and_the_anchor_are_constants():
    _, (_, anchor, losses) = gradients()
    assert not np.asarray(anchor).any()
    assert not np.asarray(losses).any()


# Degenerate batches. Both use functions that are compiled already.


def test_equal_losses_are_reported_and_train_nothing_by_preference():
    scored, scores, anchor = random_case(2)
    recipe, call = compiled()
    scored = replace(scored, nll=np.full_like(scored.nll, np.log(VARIANTS)))
    report = call(scored, scores, anchor, EMPTY, EMPTY, as_arrays(recipe.hyper)).metrics
    assert report["mc/preference_tie_share"] == 1
    assert report["frac_reward_zero_std"] == 1
    zero = ["mc/preference_pair_count", "mc/preference_loss", "mc/rank_loss", "mc/preference_corr_defined_share"]
    zero += [f"mc/lod_loss/{lod}" for lod in range(GEOMETRY.max_lod + 1)]
    zero += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    assert [float(report[name]) for name in zero] == [0] * len(zero)
    undefined = {name for name, value in report.items() if np.isnan(value)}
    assert undefined == {name for name in MAY_BE_UNDEFINED if name.startswith("mc/")}


@pytest.mark.parametrize("content", [np.nan, np.inf])
def test_a_broken_loss_or_score_is_not_hidden(content):
    scored, scores, anchor = random_case(3)
    recipe, call = compiled()
    hyper = as_arrays(recipe.hyper)
    broken = scores.copy()
    broken[1, 1, 0] = content
    assert not np.isfinite(call(scored, broken, anchor, EMPTY, EMPTY, hyper).loss)
    losses = scored.nll.copy()
    losses[1, 1] = content
    output = call(replace(scored, nll=losses), scores, anchor, EMPTY, EMPTY, hyper)
    assert np.isnan(output.loss) and not np.isfinite(output.metrics["nll_rollout_mean"])


@pytest.mark.parametrize(
    ("name", "group", "keep"),
    [("spans", "sequence", None), ("spans", "sequence", 3), ("logistic", "sequence", 3), ("disco", "batch", None)],
)
def test_only_losses_that_count_are_read_and_none_of_them_vanishes(name, group, keep):
    recipe, call = objective(name=name, group=group, keep=keep)
    scored, scores, anchor = random_case(3)
    normaliser, hyper = one_update(0.1, 0.3), as_arrays(replace(recipe.hyper, kl_weight=0.2, temperature=0.6))

    @jit
    def value_and_gradient(losses):
        def loss(scores):
            return call(replace(scored, nll=losses), scores, anchor, normaliser, EMPTY, hyper).loss

        return jax.value_and_grad(loss)(jnp.asarray(scores))

    masked = np.argwhere(~scored.distinct)
    assert len(masked) == 1
    expected = value_and_gradient(scored.nll)
    assert np.isfinite(expected[0]) and np.isfinite(expected[1]).all()
    for content in (np.nan, np.inf, -np.inf):
        for b, v in np.ndindex(scored.nll.shape):
            losses = scored.nll.copy()
            losses[b, v] = content
            found = value_and_gradient(losses)
            if [b, v] in masked.tolist():
                jax.tree.map(np.testing.assert_array_equal, found, expected)
            else:
                assert np.isnan(found[0])
    assert np.isnan(value_and_gradient(np.full_like(scored.nll, np.nan))[0])
