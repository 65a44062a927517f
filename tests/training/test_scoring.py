import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.models.decision import build_tree, policy_scores
from lensjax.training.scoring import local_rollouts
from lensjax.training.steps import difficulty
from tests import reference
from tests.small import FULL, OTHER, SMALL, Run, batch, jit

CONTEXT, GEOMETRY = SMALL.context, SMALL.geometry


@functools.cache
def observed(run=OTHER, step=4):
    """A batch of variants under a base model whose loss the reference can compute, and the policy's scores."""
    state = run.state(step=step, high_lod_share=0.5)
    scored, scores, _ = run.observe(state, batch())
    length = int(difficulty.current_length(state.step, state.hyper, recipe=run.recipe))
    return state, length, scored, np.asarray(scores)


def rows(scored):
    """(sequence, variant, that variant) of all that are scored."""
    for b, v in np.ndindex(scored.nll.shape):
        yield b, v, jax.tree.map(lambda leaf, b=b, v=v: leaf[b, v], scored)


@pytest.mark.parametrize("step", [4, 11])
def test_recency_comes_first_and_all_variants_hold_the_invariants(step):
    _, length, scored, _ = observed(step=step)
    assert scored.nll.shape == (3, CONTEXT.rollouts + 1)
    for _, v, one in rows(scored):
        first = GEOMETRY.history - length if v == 0 else 0
        holds = contexts.invariants(one.contexts, GEOMETRY, length=length, first_token=first)
        assert all(holds.values()), (v, holds)
        assert v > 0 or not one.contexts.lod.any()


def test_losses_are_those_of_the_reference():
    state, _, scored, _ = observed()
    base, gist = jax.device_get(state.params["base"]), OTHER.frozen()["gist"]
    pool = jax.jit(OTHER.models.gist.apply)

    def gist_of_block(children):
        return np.asarray(pool(gist, jnp.asarray(children[None], jnp.float32))[0], np.float64)

    for b, v, one in rows(scored):
        tokens = np.asarray(batch()["tokens"][b])
        expected = reference.variant_loss(
            functools.partial(reference.logits_at_end, base),
            base["table"][tokens],
            gist_of_block,
            reference.entries_of(one.contexts),
            tokens,
            horizon=CONTEXT.horizon,
            block_size=GEOMETRY.block_size,
        )
        assert float(one.nll) == pytest.approx(expected, rel=1e-4), (b, v)
    assert np.std(scored.nll) > 1e-3


def test_duplicates_are_marked():
    # Every rollout collapses all blocks once, but the aggressive one in the last place.
    length = GEOMETRY.history - GEOMETRY.blocks(1) * (GEOMETRY.block_size - 1)
    state = OTHER.state(step=11, high_lod_share=0.0, context_end=length / GEOMETRY.history)
    scored, _, _ = OTHER.observe(state, batch())
    assert scored.distinct.tolist() == [[True, True, False, True]] * 3
    cuts = jax.vmap(jax.vmap(lambda one: contexts.to_cut(one, GEOMETRY)))(scored.contexts)
    np.testing.assert_array_equal(cuts[:, 1], cuts[:, 2])
    assert (np.asarray(cuts[:, 1]).max(1) == 1).all() and (np.asarray(cuts[:, 3]).max(1) == 2).all()
    np.testing.assert_array_equal(scored.nll[:, 1], scored.nll[:, 2])


@pytest.mark.parametrize("edits", [0, 1])
def test_rollouts_that_are_recency_are_duplicates(edits):
    # The whole history: there is nothing to collapse.
    run = Run(**{"context.local_edits": edits, "hyper.context_start": 1.0})
    scored, _, _ = run.observe(run.state(), batch())
    assert (scored.contexts.length == GEOMETRY.history).all() and not scored.contexts.lod.any()
    assert scored.distinct.tolist() == [[True, False, False, False]] * 3


LOCAL = Geometry(history=48, block_size=2, max_lod=3, recent_tokens=7)


@functools.cache
def draw_local(edits):
    draw = functools.partial(local_rollouts, rollouts=5, edits=edits, geometry=LOCAL, capacity=48)
    return jit(jax.vmap(draw, in_axes=(0, None, None)))


@pytest.mark.parametrize(("edits", "length"), [(1, 30), (3, 30), (3, 16)])
def test_local_rollouts_are_swaps_away_from_the_first(edits, length):
    drawn, distinct = draw_local(edits)(jax.random.split(jax.random.key(edits), 40), length, 0.4)
    cuts = np.asarray(jax.vmap(jax.vmap(lambda one: contexts.to_cut(one, LOCAL)))(drawn))
    states = jax.vmap(jax.vmap(lambda cut: allocator.from_cut(cut, LOCAL).collapsed))(cuts)
    flipped = np.asarray(states != states[:, :1])
    expanded, collapsed = (flipped & (np.asarray(states) == to) for to in (False, True))
    # A swap expands one node and collapses another: the length stays.
    assert (expanded.sum(-1) == collapsed.sum(-1)).all() and 0 < expanded.sum(-1).max() <= edits
    assert (drawn.length == length).all() and (cuts[..., -LOCAL.recent_tokens :] == 0).all()
    same = (cuts[:, :, None] == cuts[:, None]).all(-1)
    np.testing.assert_array_equal(distinct, ~np.tril(same, k=-1).any(-1))
    assert np.asarray(distinct).mean() > 0.5


def test_local_rollouts_may_open_and_close_every_block():
    drawn, _ = draw_local(3)(jax.random.split(jax.random.key(0), 200), 30, 0.4)
    cuts = np.asarray(jax.vmap(jax.vmap(lambda one: contexts.to_cut(one, LOCAL)))(drawn))
    first, others = cuts[:, :1, :-8:2], cuts[:, 1:, :-8:2]
    assert ((first > 0) & (others == 0)).any((0, 1)).all() and ((first == 0) & (others > 0)).any((0, 1)).all()


def test_a_config_with_local_edits_draws_local_rollouts():
    run = Run(**{"context.local_edits": 1})
    scored, _, _ = run.observe(run.state(), batch())
    cuts = jax.vmap(jax.vmap(lambda one: contexts.to_cut(one, GEOMETRY)))(scored.contexts)
    changed = (np.asarray(cuts[:, 2:]) != np.asarray(cuts[:, 1:2])).sum(-1)
    assert 0 < changed.max() <= 2 * GEOMETRY.block_size**GEOMETRY.max_lod


def test_the_tree_holds_the_embeddings_and_the_gists_of_the_models():
    state, *_ = observed()
    tokens = batch()["tokens"][0, : GEOMETRY.history]
    tree = jax.jit(functools.partial(build_tree, OTHER.models, geometry=GEOMETRY))(
        {**OTHER.frozen(), **state.params}, tokens
    )
    leaves = np.asarray(state.params["base"]["table"])[np.asarray(tokens)]
    np.testing.assert_array_equal(tree.levels[0], leaves)
    pairs = jnp.asarray(leaves.reshape(-1, GEOMETRY.block_size, leaves.shape[-1]))
    np.testing.assert_allclose(tree.levels[1], OTHER.models.gist.apply(OTHER.frozen()["gist"], pairs), rtol=1e-5)
    assert len(tree.levels) == GEOMETRY.max_lod + 1


def test_scores_of_a_batch_are_those_of_each_context():
    state, _, scored, scores = observed()
    for b, v, one in rows(scored):
        entries = one.entries
        alone = OTHER.policy_scores(state.params["lens"], entries)
        np.testing.assert_allclose(scores[b, v], alone, rtol=1e-4, atol=1e-6)
        assert not scores[b, v][~np.asarray(entries.valid)].any()
    assert np.abs(scores).max() < 1


def test_no_gradient_of_scores_reaches_what_they_read():
    state, _, scored, _ = observed(FULL)
    entries = jax.tree.map(lambda leaf: leaf[0, :2], scored.entries)

    def total(params, embeddings):
        return policy_scores(FULL.models.lens, params, replace(entries, embeddings=embeddings)).sum()

    lens, embeddings = jit(jax.grad(total, argnums=(0, 1)))(state.params["lens"], entries.embeddings)
    assert not np.asarray(embeddings).any()
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(lens))
