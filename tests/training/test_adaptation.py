"""LensNet adapted to a document: what the hypernetwork reads, what it may not know, and what it trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import refocus
from lensjax.evaluation import held_out
from lensjax.models import LensModel, hyperlora
from lensjax.models.decision import build_tree, policy, policy_scores, split
from lensjax.models.lensnet import LensConfig
from lensjax.training import agreement, objective
from lensjax.training.objective import Statistics
from lensjax.training.scoring import score_variants
from lensjax.training.steps import adaptation
from lensjax.training.steps.train_state import init_train_state
from tests import slow_objective
from tests.small import SMALL, Run, batch, jit


class AdaptedRun(Run):
    """A run that has a hypernetwork."""

    @functools.cached_property
    def hypernet(self):
        return self.config.build_hypernet(self.models)

    @functools.cached_property
    def static(self):
        return {"recipe": self.recipe, "models": self.models, "hypernet": self.hypernet}

    @functools.cached_property
    def train_step(self):
        return jit(functools.partial(adaptation.adaptation_step, **self.static), donate_argnums=0)

    @functools.cache  # noqa: B019
    def _fresh(self, seed):
        return adaptation.init_adaptation_state(jax.random.key(seed), **self.static)


CHANGES = {"context.rollouts": 4, "adaptation.init_scale": 1.0, "hyper.rank_weight": 0.3}
HYPER = AdaptedRun(trainable=("lens", "hypernet"), **CHANGES)
RECIPE, CONTEXT = HYPER.recipe, HYPER.recipe.context
PAST = RECIPE.past.geometry


@pytest.fixture(scope="module")
def scored():
    """Three documents, scored at the cursor; their losses differ by tenths of nats."""
    return HYPER.observe(HYPER.state(), batch())[0]


@pytest.fixture(scope="module")
def support():
    """The same documents, scored one horizon before the cursor."""
    return measure_supports(HYPER.params(), batch()["tokens"])


def row(tree, place=0):
    return jax.tree.map(lambda leaf: leaf[place], tree)


def same(one, other):
    """To the bit."""
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def supports(params, tokens):
    """The supports of int32[B, T]."""
    measure = functools.partial(adaptation.score_support, HYPER.models, params, recipe=RECIPE)
    histories = split(tokens, horizon=CONTEXT.horizon).history
    keys = jax.random.split(jax.random.key(5), tokens.shape[0])
    return jax.vmap(lambda history, key: measure(history, key, 16, 0.3))(histories, keys)


measure_supports = jit(supports)


def document_deltas(params, one):
    return adaptation.document_deltas(HYPER.models, HYPER.hypernet, params, one, PAST)


deltas_of = jit(document_deltas)


# What it reads


def test_a_context_by_hand():
    # Known: features 1 and 3, losses 2 and 1. Their mean is 2, differences -1 and 1 (size 1), rewards -1/2 and 1/2 with
    # a spread of 1/2. What paid: ((-1)(-1) + (1)(1)) / 2 * 0.5 / (0.5 + 0.02).
    edits, rewards = jnp.asarray([[1.0], [9.0], [3.0]]), jnp.asarray([-2.0, 100.0, -1.0])
    found = adaptation.document_context(edits, rewards, jnp.asarray([True, False, True]))
    np.testing.assert_allclose(found, [2.0, 0.5 / 0.52], rtol=1e-5)


def test_a_constant_reward_says_nothing_and_a_shift_changes_nothing():
    random = np.random.default_rng(0)
    edits, rewards = random.normal(size=(5, 3)).astype(np.float32), random.normal(size=5).astype(np.float32)
    where = np.asarray([1, 1, 0, 1, 1], bool)
    np.testing.assert_allclose(adaptation.document_context(edits, np.full(5, 3, np.float32), where)[3:], 0, atol=1e-6)
    first, second = (adaptation.document_context(edits, rewards + shift, where) for shift in np.float32([0, 7]))
    np.testing.assert_allclose(first, second, atol=1e-5)
    alike = adaptation.document_context(np.ones((5, 3), np.float32), rewards, where)
    assert np.isfinite(alike).all() and not alike[3:].any()


def test_edit_features_weigh_entries_as_values_do(support):
    one = row(support)
    scores = np.random.default_rng(1).normal(size=one.entries.valid.shape).astype(np.float32)
    scores = np.where(one.entries.valid, scores, 0.0)
    expected = agreement.variant_values(scores, one.contexts, PAST)
    free = one.contexts.start < PAST.tail
    for v in range(len(expected)):
        entries = jax.tree.map(lambda leaf, v=v: leaf[v], one.entries)
        found = adaptation.edit_features(scores[v][:, None], entries, max_lod=PAST.max_lod, free=free[v])
        np.testing.assert_allclose(found, expected[v][None], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_a_support_keeps_in_full_is_no_choice_of_its_variants(support):
    params, one = HYPER.params(), row(support)
    found = jit(lambda one: adaptation.document_edits(HYPER.models, params["lens"], one, PAST))(one)
    for v in range(len(found)):
        entries = jax.tree.map(lambda leaf, v=v: leaf[v], one.entries)
        _, features = HYPER.models.lens.apply_with_features(params["lens"], entries)
        free = entries.valid & (one.contexts.start[v] < PAST.tail)
        expected = adaptation.edit_features(features, entries, max_lod=PAST.max_lod, free=free)
        np.testing.assert_allclose(found[v], expected, rtol=1e-4, atol=1e-5)


def test_the_baseline_and_duplicates_are_not_known(support):
    one = dataclasses.replace(row(support), distinct=jnp.asarray([True, True, False, True, True]))
    np.testing.assert_array_equal(adaptation.known_variants(one), [False, True, False, True, True])


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_hidden_and_output_layers_are_targets(head):
    lens = LensModel(LensConfig(dim=8, layers=2, heads=2, mlp_dim=12, head=head), 4, 2)
    params = lens.init(jax.random.key(0))
    names = [name for name, *_ in lens.targets]
    last = "head/kernel" if head == "linear" else "head/down/kernel"
    assert sorted(names) == sorted([last, *(f"transformer/block_{i}/mlp/down/kernel" for i in range(2))])
    deltas = {name: hyperlora.Delta(jnp.ones((n, 1)), jnp.ones((1, m))) for name, n, m in lens.targets}
    changed = hyperlora.adapt(params, deltas)
    moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, changed)), strict=True)]
    assert sum(moved) == 3


def test_all_rollouts_of_the_support_are_read(support):
    params, one = HYPER.params(), row(support)
    before = deltas_of(params, one)
    for variant, is_known in enumerate([False, True, True, True, True]):
        after = deltas_of(params, dataclasses.replace(one, nll=one.nll.at[variant].add(0.3)))
        assert same(after, before) != is_known


def test_the_support_is_measured_one_horizon_before_the_cursor(support):
    ends = jnp.max(jnp.where(support.contexts.valid, support.contexts.start, -1), axis=-1)
    np.testing.assert_array_equal(ends, PAST.history - 1)
    tokens, params = batch()["tokens"], HYPER.params()
    for place, is_scored in ((-CONTEXT.horizon - 1, True), (-CONTEXT.horizon, False)):
        after = measure_supports(params, tokens.at[:, place].set((tokens[:, place] + 1) % 4))
        assert bool((after.nll != support.nll).all()) == is_scored
        # What variants show ends before it.
        assert same(after.entries, support.entries)


# What it may not know


@jit
def causal_parts(params, tokens):
    """Deltas, adapted scores of the variants, and adapted picks of the first of int32[B, T]."""
    deltas = document_deltas(params, row(supports(params, tokens)))
    lens = adaptation.adapted(params["lens"], deltas)
    scored = score_variants(
        jax.random.key(1), params, tokens[0], 16, 0.3, models=HYPER.models, context=CONTEXT, capacity=RECIPE.capacity
    )
    history = split(tokens[0], horizon=CONTEXT.horizon).history
    tree = build_tree(HYPER.models, params, history, RECIPE.geometry)
    score_fn = policy(HYPER.models.lens, lens, tree)
    picks = refocus.cold_start(score_fn, 16, RECIPE.geometry, capacity=16, settings=RECIPE.focus)
    return {"deltas": deltas, "scores": policy_scores(HYPER.models.lens, lens, scored.entries), "picks": picks}


def test_nothing_behind_the_cursor_reaches_deltas_scores_or_picks():
    params, tokens = HYPER.params(), batch()["tokens"]
    before = causal_parts(params, tokens)
    changed = {
        "horizon": tokens.at[:, CONTEXT.history :].set((tokens[:, CONTEXT.history :] + 1) % 4),
        "end of the history": tokens.at[:, CONTEXT.history - 1].set((tokens[:, CONTEXT.history - 1] + 1) % 4),
        "beginning": tokens.at[:, 0].set((tokens[:, 0] + 1) % 4),
    }
    after = {name: causal_parts(params, other) for name, other in changed.items()}
    assert same(after["horizon"], before)
    for name in ("end of the history", "beginning"):
        for part in ("deltas", "scores"):
            assert not same(after[name][part], before[part]), (name, part)
    # Not every token that changes moves a pick.
    assert not all(same(one["picks"], before["picks"]) for one in after.values())


def test_deltas_of_zero_leave_lensnet_as_it_is(scored, support):
    params, one = HYPER.params(), row(scored)
    score = jit(lambda lens: policy_scores(HYPER.models.lens, lens, one.entries))
    deltas = deltas_of(params, row(support))
    plain = score(params["lens"])
    np.testing.assert_array_equal(score(adaptation.adapted(params["lens"], hyperlora.zeroed(deltas))), plain)
    assert not np.array_equal(score(adaptation.adapted(params["lens"], deltas)), plain)


# What it trains


def test_the_loss_is_that_of_the_pairs_at_the_cursor(scored):
    state, random = HYPER.state(), np.random.default_rng(2)
    scores = np.tanh(random.normal(size=scored.entries.valid.shape)).astype(np.float32)
    scores = np.where(scored.entries.valid, scores, 0.0)
    earlier = Statistics(state.normaliser, state.demand, 0.7)
    loss = functools.partial(objective.pair_loss, recipe=RECIPE)
    found, agreement = jit(loss)(jax.random.key(0), scored, scores, earlier, state.hyper)
    expected = slow_objective.objective(
        scored, scores, None, advantage_moments=None, balance_average=None, temperature=0.7, recipe=RECIPE
    )
    total = expected["mc/preference_loss"] + RECIPE.hyper.rank_weight * expected["mc/rank_loss"]
    np.testing.assert_allclose(found, total, rtol=1e-5)
    np.testing.assert_allclose(agreement, expected["mc/preference_agreement"], rtol=1e-5)


@pytest.mark.slow
def test_lensnet_begins_and_learns_as_it_does_without_a_hypernetwork(scored):
    params = HYPER.params()
    assert same(params["lens"], Run(**{"context.rollouts": 4}).params()["lens"])

    def total(params):
        support = row(supports(params, batch()["tokens"]))
        deltas = document_deltas(params, support)
        return jnp.sum(
            policy_scores(HYPER.models.lens, adaptation.adapted(params["lens"], deltas), row(scored).entries)
        )

    # Nor does the base model learn from what is measured for it.
    for part, gradient in jit(jax.grad(total))(params).items():
        assert any(leaf.any() for leaf in jax.tree.leaves(gradient)) == (part == "hypernet"), part


@pytest.mark.slow
def test_the_hypernetwork_learns_what_pays():
    state, losses = HYPER.state(step=2, learning_rate=3e-3), []
    for _ in range(12):
        # The same rollouts, weighed alike, each time.
        after, report = HYPER.train_step(jax.tree.map(jnp.copy, state), batch(), HYPER.frozen())
        state = dataclasses.replace(state, params=after.params, opt_state=after.opt_state)
        losses.append(float(report["adapted_loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert float(report["lora_diversity"]) > 0
    assert {"adapted_agreement", "lora_magnitude"} <= set(report)


@pytest.mark.slow
def test_what_it_picks_is_measured_beside_what_lensnet_picks():
    step = jit(functools.partial(held_out.adaptation_eval_step, **HYPER.static))
    rows = batch() | {"answers": jnp.asarray([[0], [2], [4]], jnp.int32)}
    state, key = HYPER.state(), jax.random.key(0)
    report = step(key, state, rows, HYPER.frozen())
    assert {"nll_policy_adapted", "hit_rate_adapted"} <= set(report)
    assert float(report["nll_policy_adapted"]) != float(report["nll_policy"])
    nothing = dict(state.params, hypernet=jax.tree.map(jnp.zeros_like, state.params["hypernet"]))
    report = step(key, dataclasses.replace(state, params=nothing), rows, HYPER.frozen())
    assert float(report["nll_policy_adapted"]) == float(report["nll_policy"])


def test_only_a_recipe_that_names_it_takes_a_hypernetwork_and_such_a_one_must_have_it():
    init = functools.partial(init_train_state, jax.random.key(0), models=HYPER.models)
    with pytest.raises(ValueError, match="params may hold base, gist, lens and trainable parts, got hypernet"):
        init(recipe=SMALL.recipe, params={"hypernet": {}})
    with pytest.raises(ValueError, match=r"params must hold hypernet, which recipe\.trainable names"):
        init(recipe=RECIPE)
