"""Nothing behind the cursor reaches a decision: the same history, another horizon, the same choice to the bit."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import refocus
from lensjax.context import working as contexts
from lensjax.evaluation import compare, held_out, rivals
from lensjax.models.decision import build_tree, policy, policy_scores, split
from lensjax.training import nll
from lensjax.training.scoring import score_variants
from lensjax.training.steps import episodes
from tests.small import SMALL, VOCABULARY, Run, jit

RUN = Run(**{"focus.steps": 2, "online.refocus_steps": 2, "online.steps": 12})
CONFIG, RECIPE, MODELS, SHAPE = RUN.config, RUN.recipe, RUN.models, RUN.config.context
GEOMETRY = CONFIG.geometry
LENGTH, DRAWS = 19, 2
HISTORY, HORIZON = slice(0, SHAPE.history), slice(SHAPE.history, SHAPE.window)


# Who decides, as functions of (state, tokens int32[T], key): what each makes, by name, but for losses on the horizon.


def whole(state):
    return {**RUN.frozen(), **state.params}


def by_history(state, tokens, key):
    """LensNet and its rivals, which are given the history alone."""
    history = split(tokens, horizon=SHAPE.horizon).history
    params = whole(state)
    tree = build_tree(MODELS, params, history, GEOMETRY)
    shown = policy_contexts(params, tree)
    entries = jax.vmap(lambda one: contexts.materialise(tree, one))(shown)
    return {
        "lensnet": shown,
        "lensnet_scores": policy_scores(MODELS.lens, params["lens"], entries),
        **causal(params, history, key),
    }


def policy_contexts(params, tree, capacity=LENGTH):
    """LensNet's way from the cold start."""
    score_fn = policy(MODELS.lens, params["lens"], tree)
    return refocus.cold_start(score_fn, LENGTH, GEOMETRY, capacity=capacity, settings=CONFIG.focus)


def causal(params, history, key):
    return rivals.causal(MODELS, params, history, key, GEOMETRY, length=LENGTH, draws=DRAWS, high_lod_share=0.3)


def variants(state, tokens, key):
    scored = scored_variants(whole(state), tokens, key)
    scores = policy_scores(MODELS.lens, state.params["lens"], scored.entries)
    return {"contexts": scored.contexts, "distinct": scored.distinct, "entries": scored.entries, "scores": scores}


def scored_variants(params, tokens, key):
    return score_variants(key, params, tokens, LENGTH, 0.3, models=MODELS, context=SHAPE, capacity=RECIPE.capacity)


def episode(state, tokens, key):
    window = split(tokens, horizon=SHAPE.horizon)
    options = {"length": LENGTH, "focus": CONFIG.focus, "settings": CONFIG.online}
    played = episodes.run(MODELS, whole(state), window, key, GEOMETRY, **options)
    return {name: getattr(played, name) for name in ("states", "contexts", "entries", "swaps", "log_probs")}


def maps(state, tokens, key):
    drawn = held_out.variant_maps(state, tokens[None], key, RUN.frozen(), recipe=RECIPE, models=MODELS)
    return {name: drawn[name] for name in ("cuts", "scores")}


def report(state, tokens, key):
    """What a run and a sweep report of decisions (`sweep.evaluate` is `eval_step` of every arm)."""
    batch = {"tokens": tokens[None], "answers": jnp.zeros((1, 1), jnp.int32)}
    found = held_out.eval_step(key, state, batch, RUN.frozen(), recipe=RECIPE, models=MODELS)
    names = ("hit_rate", "hit_rate_random", "mc/swap_rate", "mc/edit_wish_rate", "mc/policy_score_abs_mean")
    options = {"length": LENGTH, "draws": DRAWS, "oracle_rounds": 0, "recipe": RECIPE}
    table = compare.measure(MODELS, whole(state), tokens, None, key, **options)
    return {**{name: found[name] for name in names}, "focus": table.focus, "divergence": table.divergence}


def in_hindsight(state, tokens, key):
    window = split(tokens, horizon=SHAPE.horizon)
    params = whole(state)
    shown, chosen = (
        causal(params, window.history, key),
        rivals.hindsight(MODELS, params, window, None, GEOMETRY, length=LENGTH),
    )
    tree = build_tree(MODELS, params, window.history, GEOMETRY)
    losses = {
        name: nll.variant_nll(MODELS.base, params["base"], tree, many, window.horizon, GEOMETRY)[0]
        for name, many in shown.items()
    }
    oracle, _ = rivals.searched(MODELS, params, window, shown, losses, GEOMETRY, length=LENGTH, rounds=0)
    return {**chosen, "oracle": oracle}


@functools.cache
def compiled(decide):
    return jit(decide)


@functools.cache
def state():
    """With a LensNet of large weights: by its first ones the last token moves the scores, but rarely the choice."""
    start, rng = RUN.state(), np.random.default_rng(1)
    lens = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32), start.params["lens"])
    return replace(start, params={**start.params, "lens": lens})


def changed_by(where, decide, late=0):
    """Names of what is another thing, in any bit, when the tokens at `where` are other ones.

    The history ends `late` tokens too late: it holds the first ones behind the cursor.
    """
    found = set()
    for seed in range(8):
        rng, key = np.random.default_rng(seed), jax.random.key(seed)
        tokens = rng.integers(0, 7, SHAPE.window).astype(np.int32)
        others = tokens.copy()
        others[where] = (tokens[where] + rng.integers(1, 7, tokens[where].shape)) % 7
        rows = (np.roll(row, -late) for row in (tokens, others))
        one, other = (jax.device_get(compiled(decide)(state(), row, key)) for row in rows)
        for name, made in one.items():
            pairs = zip(jax.tree.leaves(made), jax.tree.leaves(other[name]), strict=True)
            found |= {name} if any(a.tobytes() != b.tobytes() for a, b in pairs) else set()
    return found


@pytest.mark.parametrize("decide", [by_history, variants, episode, maps, report])
def test_no_decision_depends_on_the_horizon(decide):
    assert changed_by(HORIZON, decide) == set()


@pytest.mark.parametrize(
    ("decide", "blind"),
    [
        # What looks at no token, and what reads only the order of the draws.
        (by_history, {"recency", "recency_sink", "uniform", "random", "recent_random"}),
        (variants, {"contexts", "distinct"}),
        (episode, set()),
        (maps, set()),
        (report, {"hit_rate_random"}),
    ],
)
def test_decisions_depend_on_the_history(decide, blind):
    names = set(jax.eval_shape(decide, RUN.state(), jnp.zeros(SHAPE.window, jnp.int32), jax.random.key(0)))
    assert changed_by(HISTORY, decide) == names - blind


def test_one_token_from_behind_the_cursor_is_noticed():
    """The same deciders over a history that ends one token late: whatever asks with its last tokens gives it away."""
    assert changed_by(HORIZON, by_history, late=1) >= {"lensnet", "lensnet_scores", "snapkv", "bm25", "lookup"}


def test_what_is_called_hindsight_depends_on_the_horizon():
    names = changed_by(HORIZON, in_hindsight)
    assert names == {"snapkv_hindsight", "bm25_hindsight", "oracle"}
    assert {rivals.information(name) for name in names} == {"hindsight"}


# Gradients. The tokens of the horizon are 8 to 15, those of the history 0 to 7.

TOKENS = np.concatenate([np.arange(SHAPE.history) % 8, 8 + np.arange(SHAPE.horizon)]).astype(np.int32)


@functools.cache
def gradient():
    """That of LensNet's scores at the embeddings, not cut off as in training; a function of embeddings and tokens."""
    known = RUN.params()

    def total(table, tokens):
        params = {**known, "base": {**known["base"], "embedding": {"embedding": table}}}
        scored = scored_variants(params, tokens, jax.random.key(0))
        tree = build_tree(MODELS, params, split(tokens, horizon=SHAPE.horizon).history, GEOMETRY)
        shown = policy_contexts(params, tree, RECIPE.capacity)
        picked = jax.vmap(lambda one: contexts.materialise(tree, one))(shown)
        entries = jax.tree.map(lambda *rows: jnp.concatenate(rows), scored.entries, picked)
        scores = jax.vmap(lambda one: MODELS.lens.apply(params["lens"], one))(entries)
        return jnp.sum(scores**2)

    return jit(jax.grad(total))


def influence(late):
    """float[VOCABULARY]: the largest part of that of each token; the history ends `late` tokens too late."""
    table = RUN.params()["base"]["embedding"]["embedding"]
    return np.abs(np.asarray(gradient()(table, np.roll(TOKENS, -late)))).max(axis=1)


def test_no_gradient_of_scores_reaches_the_tokens_of_the_horizon():
    np.testing.assert_array_equal(influence(0) > 0, np.arange(VOCABULARY) < 8)


def test_a_gradient_reaches_the_one_token_that_is_let_through():
    np.testing.assert_array_equal(influence(1) > 0, np.arange(VOCABULARY) < 9)


# The cut itself.


def test_a_window_is_cut_at_the_cursor():
    window = split(np.arange(10).reshape(2, 5), horizon=2)
    assert window.history.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert window.horizon.tolist() == [[3, 4], [8, 9]]


@pytest.mark.parametrize("horizon", [0, 5, 6, -1])
def test_a_horizon_that_leaves_nothing_is_refused(horizon):
    with pytest.raises(ValueError, match=f"at least 1 and leave a history of the 5 tokens, got {horizon}"):
        split(np.arange(5), horizon=horizon)


@pytest.mark.parametrize("count", [SHAPE.history + 1, SHAPE.window, SHAPE.history - 1])
def test_a_tree_of_anything_but_the_history_is_refused(count):
    message = rf"sees the 32 tokens before the cursor and no other: pass split.*\({count},\)"
    with pytest.raises(ValueError, match=message):
        build_tree(MODELS, RUN.params(), np.zeros(count, np.int32), SMALL.geometry)
