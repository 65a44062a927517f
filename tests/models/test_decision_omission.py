"""Decisions with a map and what the base model shows: none knows the horizon, and all is of the history alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import refocus
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.models import decision
from lensjax.models.decision import build_tree, policy, policy_scores, split
from lensjax.training.scoring import score_variants
from lensjax.training.steps import episodes
from tests.small import OMISSION, OMITTING, Run, jit

CONFIG, RECIPE, SHAPE, GEOMETRY = OMITTING.config, OMITTING.recipe, OMITTING.config.context, OMITTING.config.geometry
MODELS, LENGTH = OMITTING.models, 16  # whose base model is that of all
HISTORY, HORIZON = slice(0, SHAPE.history), slice(SHAPE.history, SHAPE.window)


@functools.cache
def reading(reads):
    """The run whose LensNet reads so much."""
    return OMITTING if reads == "attention" else Run(**OMISSION | {"lens.reads": reads})


def params(reads):
    """With a LensNet of large weights, whose choices depend on what it sees."""
    start, rng = reading(reads).params(), np.random.default_rng(1)
    lens = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32), start["lens"])
    return {**start, "lens": lens}


def decide(params, tokens, key, *, models):
    """What LensNet makes of a history, and what training shows it."""
    tree = build_tree(models, params, tokens[: SHAPE.history], GEOMETRY)
    score_fn = policy(models.lens, params["lens"], tree)
    shown = refocus.cold_start(score_fn, LENGTH, GEOMETRY, capacity=LENGTH, settings=CONFIG.focus)
    scored = score_variants(key, params, tokens, LENGTH, 0.0, models=models, context=SHAPE, capacity=RECIPE.capacity)
    window = split(tokens, horizon=SHAPE.horizon)
    played = episodes.run(
        models, params, window, key, GEOMETRY, length=LENGTH, focus=CONFIG.focus, settings=CONFIG.online
    )
    return {
        "states": tree.states,
        "shown": shown,
        "shown_scores": jax.vmap(score_fn)(shown),
        "variants": scored.contexts,
        "variant_entries": scored.entries,
        "variant_scores": policy_scores(models.lens, params["lens"], scored.entries),
        "episode": (played.states, played.contexts, played.entries, played.swaps, played.log_probs),
    }


@functools.cache
def compiled(reads):
    return jit(functools.partial(decide, models=reading(reads).models))


def changed_by(where, reads, late=0):
    """Names of what is another thing, in any bit, when the tokens at `where` are other ones.

    The history ends `late` tokens too late: it holds the first ones behind the cursor.
    """
    found = set()
    for seed in range(6):
        rng, key = np.random.default_rng(seed), jax.random.key(seed)
        tokens = rng.integers(0, 7, SHAPE.window).astype(np.int32)
        others = tokens.copy()
        others[where] = (tokens[where] + rng.integers(1, 7, tokens[where].shape)) % 7
        rows = (np.roll(row, -late) for row in (tokens, others))
        one, other = (jax.device_get(compiled(reads)(params(reads), row, key)) for row in rows)
        for name, made in one.items():
            pairs = zip(jax.tree.leaves(made), jax.tree.leaves(other[name]), strict=True)
            found |= {name} if any(a.tobytes() != b.tobytes() for a, b in pairs) else set()
    return found


ALL = {"states", "shown", "shown_scores", "variant_entries", "variant_scores", "episode"}


@pytest.mark.parametrize("reads", ["states", "attention"])
def test_no_decision_depends_on_the_horizon(reads):
    assert changed_by(HORIZON, reads) == set()


@pytest.mark.parametrize("reads", ["states", "attention"])
def test_decisions_depend_on_the_history(reads):
    assert changed_by(HISTORY, reads) == ALL


def test_one_token_from_behind_the_cursor_is_noticed():
    assert changed_by(HORIZON, "attention", late=1) == ALL


def test_every_score_depends_on_what_the_base_model_does_not_read():
    """The map shows it, as a gist: here the changed token's."""
    cut = np.zeros(SHAPE.history, np.int32)
    cut[4:8] = 1
    tokens = np.random.default_rng(3).integers(0, 7, SHAPE.window).astype(np.int32)
    others = tokens.copy()
    others[4] = (tokens[4] + 1) % 7

    @jit
    def scores(tokens):
        start = OMITTING.params()
        tree = build_tree(MODELS, start, split(tokens, horizon=SHAPE.horizon).history, GEOMETRY)
        # What is known of later tokens knows it, too.
        tree = dataclasses.replace(tree, states=jax.tree.map(jnp.zeros_like, tree.states))
        context = contexts.from_cut(cut, GEOMETRY, capacity=28)
        return policy(MODELS.lens, start["lens"], tree)(context), context.valid

    (one, valid), (other, _) = scores(tokens), scores(others)
    assert int(valid.sum()) == 30 and (one != other)[valid].all()


def base_model_at(tokens, held, start):
    """Middle states float[C, F] and attention float[layers, heads, C, C] of a history's first `held` tokens alone."""
    alone = contexts.in_full(MODELS.base.embed(start["base"], tokens[:held]), jnp.arange(held))
    weights, _ = MODELS.base.attention(start["base"], alone, jnp.arange(held))
    return MODELS.base.states(start["base"], alone), weights


@functools.cache
def found_at(held, reads):
    """What is known of a history that holds `held` of the tokens there is room for, and what should be known."""
    models, start = reading(reads).models, params(reads)
    tokens = np.random.default_rng(0).integers(0, 16, SHAPE.history).astype(np.int32)

    @jit
    def both(tokens):
        tree = build_tree(models, start, tokens, GEOMETRY)
        shorter = dataclasses.replace(tree, length=jnp.int32(held))
        return decision.with_states(models, start, shorter).states, base_model_at(tokens, held, start)

    return jax.device_get(both(tokens))


@pytest.mark.parametrize("held", [32, 19, 8])
def test_attention_is_that_of_the_last_tokens_to_all(held):
    (tokens, blocks), (_, weights) = found_at(held, "attention")
    layers, heads = weights.shape[:2]
    assert decision.QUERIES == (8, 32) and tokens.shape == (32, 2 * layers * heads)
    expected = np.zeros((2, layers, heads, held))
    for number, query in enumerate((8, 32)):
        for row in range(held - min(query, held), held):
            expected[number] += weights[:, :, row] / query
        # A history that is shorter than the query begins with its first token more than once, which sees itself.
        expected[number, :, :, 0] += max(query - held, 0) / query
    expected = expected.reshape(-1, held).T
    np.testing.assert_allclose(tokens[:held], expected, rtol=1e-4, atol=1e-6)
    assert not tokens[held:].any()
    np.testing.assert_allclose(
        blocks[: held // 2], expected[: held // 2 * 2].reshape(held // 2, 2, -1).mean(axis=1), rtol=1e-4, atol=1e-6
    )
    # Each row is a distribution, and the two numbers of a head are not one.
    np.testing.assert_allclose(tokens.sum(axis=0), 1, rtol=1e-5)
    few, many = np.split(tokens, 2, axis=1)
    assert np.abs(few - many).max() > 1e-2


@pytest.mark.parametrize("held", [32, 19])
def test_states_are_those_of_the_base_model_on_the_history_in_full(held):
    (tokens, blocks), (states, _) = found_at(held, "states")
    np.testing.assert_allclose(tokens[:held], states, rtol=1e-4, atol=1e-5)
    means = np.asarray(states, np.float64)[: held // 2 * 2].reshape(held // 2, 2, -1).mean(axis=1)
    np.testing.assert_allclose(blocks[: held // 2], means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reads", ["states", "attention"])
def test_padding_of_a_tree_that_is_not_full_changes_no_decision(reads):
    """What stands behind the tokens that it holds is not read, whatever it is."""
    models, start, held = reading(reads).models, params(reads), 19

    @jit
    def scores(tokens):
        tree = dataclasses.replace(build_tree(models, start, tokens, GEOMETRY), length=jnp.int32(held))
        tree = decision.with_states(models, start, tree)
        return policy(models.lens, start["lens"], tree)(contexts.recency(held, GEOMETRY, capacity=held))

    tokens = np.random.default_rng(0).integers(0, 16, SHAPE.history).astype(np.int32)
    others = np.append(tokens[:held], (tokens[held:] + 1) % 16).astype(np.int32)
    np.testing.assert_array_equal(scores(tokens), scores(others))
    earlier = tokens.copy()
    earlier[3] = (tokens[3] + 1) % 16
    assert (scores(tokens) != scores(earlier)).any()


def test_nothing_is_read_where_nothing_is_asked_for():
    tree = jax.eval_shape(
        lambda tokens: build_tree(reading("nothing").models, params("nothing"), tokens, GEOMETRY),
        jax.ShapeDtypeStruct((SHAPE.history,), jnp.int32),
    )
    assert tree.states == ()


@pytest.mark.parametrize("reads", ["states", "attention"])
def test_a_policy_asks_for_a_base_model_that_shows_what_it_reads(reads):
    class Opaque:
        """Everything but what is asked for."""

        vocab_size = dim = 4
        init = embed = logits = None

    models = dataclasses.replace(reading(reads).models, base=Opaque())
    tree = trees.init(capacity=32, dim=4, block_size=2, max_lod=1)
    message = (
        rf"lens\.reads {reads} needs a base model with a method `{reads}` .* got Opaque: set lens\.reads to nothing"
    )
    with pytest.raises(ValueError, match=message):
        decision.with_states(models, {"base": {}}, tree)
    assert decision.with_states(dataclasses.replace(reading("nothing").models, base=Opaque()), {}, tree) is tree

    class Silent:
        """A policy that does not say what it reads."""

        init = apply = None

    assert decision.with_states(dataclasses.replace(models, lens=Silent()), {}, tree) is tree


def test_what_lensnet_reads_has_the_width_that_the_models_were_built_for():
    config = CONFIG.base
    widths = {"nothing": 0, "states": config.dim, "attention": 2 * config.layers * config.heads}
    for reads, width in widths.items():
        assert reading(reads).models.lens.state_dim == width
