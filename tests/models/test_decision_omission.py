"""Decisions with a map and the base model's states: none knows the horizon, and both are of the history alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import refocus
from lensjax.context import working as contexts
from lensjax.models import decision
from lensjax.models.decision import build_tree, policy, policy_scores, split
from lensjax.training.scoring import score_variants
from lensjax.training.steps import episodes
from tests.small import OMITTING, jit

CONFIG, RECIPE, SHAPE, GEOMETRY = OMITTING.config, OMITTING.recipe, OMITTING.config.context, OMITTING.config.geometry
MODELS, LENGTH = OMITTING.models, 16
HISTORY, HORIZON = slice(0, SHAPE.history), slice(SHAPE.history, SHAPE.window)


def params():
    """With a LensNet of large weights, whose choices depend on what it sees."""
    start, rng = OMITTING.state().params, np.random.default_rng(1)
    lens = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32), start["lens"])
    return {**start, "lens": lens}


def decide(params, tokens, key, shift=0):
    """What LensNet makes of a history, and what training shows it; `shift` lets tokens behind the cursor in."""
    tree = build_tree(MODELS, params, tokens[shift : SHAPE.history + shift], GEOMETRY)
    score_fn = policy(MODELS.lens, params["lens"], tree)
    shown = refocus.cold_start(score_fn, LENGTH, GEOMETRY, capacity=LENGTH, settings=CONFIG.focus)
    scored = score_variants(key, params, tokens, LENGTH, 0.0, models=MODELS, context=SHAPE, capacity=RECIPE.capacity)
    window = split(tokens, horizon=SHAPE.horizon)
    played = episodes.run(
        MODELS, params, window, key, GEOMETRY, length=LENGTH, focus=CONFIG.focus, settings=CONFIG.online
    )
    return {
        "states": tree.states,
        "shown": shown,
        "shown_scores": jax.vmap(score_fn)(shown),
        "variants": scored.contexts,
        "variant_entries": scored.entries,
        "variant_scores": policy_scores(MODELS.lens, params["lens"], scored.entries),
        "episode": (played.states, played.contexts, played.entries, played.swaps, played.log_probs),
    }


@functools.cache
def compiled(shift):
    return jit(functools.partial(decide, shift=shift))


def changed_by(where, shift=0):
    """Names of what is another thing, in any bit, when the tokens at `where` are other ones."""
    found = set()
    for seed in range(6):
        rng, key = np.random.default_rng(seed), jax.random.key(seed)
        tokens = rng.integers(0, 7, SHAPE.window).astype(np.int32)
        others = tokens.copy()
        others[where] = (tokens[where] + rng.integers(1, 7, tokens[where].shape)) % 7
        one, other = (jax.device_get(compiled(shift)(params(), row, key)) for row in (tokens, others))
        for name, made in one.items():
            pairs = zip(jax.tree.leaves(made), jax.tree.leaves(other[name]), strict=True)
            found |= {name} if any(a.tobytes() != b.tobytes() for a, b in pairs) else set()
    return found


ALL = {"states", "shown", "shown_scores", "variant_entries", "variant_scores", "episode"}


def test_no_decision_depends_on_the_horizon():
    assert changed_by(HORIZON) == set()


def test_decisions_depend_on_the_history():
    assert changed_by(HISTORY) == ALL


def test_one_token_from_behind_the_cursor_is_noticed():
    assert changed_by(HORIZON, shift=1) == {"states", "shown", "shown_scores"}


def test_every_score_depends_on_what_the_base_model_does_not_read():
    """The map shows it, as a gist: here the changed token's."""
    cut = np.zeros(SHAPE.history, np.int32)
    cut[4:8] = 1
    tokens = np.random.default_rng(3).integers(0, 7, SHAPE.window).astype(np.int32)
    others = tokens.copy()
    others[4] = (tokens[4] + 1) % 7

    @jit
    def scores(tokens):
        start = OMITTING.state().params
        tree = build_tree(MODELS, start, split(tokens, horizon=SHAPE.horizon).history, GEOMETRY)
        # The states of later tokens know it, too.
        tree = dataclasses.replace(tree, states=jax.tree.map(jnp.zeros_like, tree.states))
        context = contexts.from_cut(cut, GEOMETRY, capacity=28)
        return policy(MODELS.lens, start["lens"], tree)(context), context.valid

    (one, valid), (other, _) = scores(tokens), scores(others)
    assert int(valid.sum()) == 30 and (one != other)[valid].all()


def test_the_states_of_a_tree_are_those_of_the_base_model_on_the_history():
    tokens = np.random.default_rng(0).integers(0, 16, SHAPE.history).astype(np.int32)
    start = params()

    @jit
    def both(tokens):
        tree = build_tree(MODELS, start, tokens, GEOMETRY)
        entries = contexts.in_full(MODELS.base.embed(start["base"], tokens), jnp.arange(SHAPE.history))
        return tree, MODELS.base.states(start["base"], entries)

    tree, states = both(tokens)
    np.testing.assert_allclose(tree.states[0], states, rtol=1e-5, atol=1e-6)
    size = SHAPE.block_size
    means = np.asarray(states, np.float64).reshape(-1, size, states.shape[1]).mean(axis=1)
    np.testing.assert_allclose(tree.states[1], means, rtol=1e-5, atol=1e-6)
    assert np.abs(states - np.asarray(tree.levels[0])).max() > 1e-2, "half of no layers would be the embeddings"


def test_a_policy_that_reads_states_asks_for_a_base_model_that_shows_them():
    assert decision.stateful_base(MODELS) is MODELS.base

    class Stateless:
        """Everything but `states`."""

        vocab_size = dim = 4
        init = embed = logits = None

    models = dataclasses.replace(MODELS, base=Stateless())
    with pytest.raises(ValueError, match=r"lens.states needs a base model that shows its states.*Stateless"):
        decision.stateful_base(models)
    lens = dataclasses.replace(MODELS.lens, config=dataclasses.replace(MODELS.lens.config, states=False))
    assert decision.stateful_base(dataclasses.replace(models, lens=lens)) is None

    class Opaque:
        """A policy that does not say what it reads."""

        init = apply = None

    assert decision.stateful_base(dataclasses.replace(models, lens=Opaque())) is None
