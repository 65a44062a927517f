"""LensNet adapted to a document: what the hypernetwork reads, what it may not know, and what it trains."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import adaptation, evaluation, hyperlora, objective, preferences, train
from lensjax import config as configs
from lensjax.config import LensConfig
from lensjax.models import LensModel
from lensjax.variants import policy_scores
from tests import slow_objective
from tests.small import SMALL, Run, batch, jit

HYPER = Run(
    trainable=("lens", "hyper"), **{"context.rollouts": 4, "adaptation.init_scale": 1.0, "hyper.rank_weight": 0.3}
)


@pytest.fixture(scope="module")
def scored():
    """Three documents, scored; their losses differ by tenths of nats."""
    return HYPER.observe(HYPER.state(), batch())[0]


def row(tree, place=0):
    return jax.tree.map(lambda leaf: leaf[place], tree)


def same(one, other):
    """To the bit."""
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


left_out = jit(lambda params, one: adaptation.leave_one_out_scores(HYPER.models, params, one, config=HYPER.config))
whole = jit(lambda params, one: adaptation.document_deltas(HYPER.models, params, one, config=HYPER.config))


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


def test_edit_features_weigh_entries_as_values_do(scored):
    one, shape = row(scored), HYPER.config.context
    scores = np.random.default_rng(1).normal(size=one.entries.valid.shape).astype(np.float32)
    scores = np.where(one.entries.valid, scores, 0.0)
    expected = preferences.variant_values(
        scores,
        one.contexts,
        window=shape.window,
        block_size=shape.block_size,
        max_lod=shape.max_lod,
        recent_tokens=shape.recent_tokens,
    )
    free = one.contexts.start < shape.window - shape.recent_tokens
    for v in range(len(expected)):
        entries = jax.tree.map(lambda leaf, v=v: leaf[v], one.entries)
        found = adaptation.edit_features(scores[v][:, None], entries, max_lod=shape.max_lod, free=free[v])
        np.testing.assert_allclose(found, expected[v][None], rtol=1e-5, atol=1e-6)


def test_the_baseline_and_duplicates_are_not_known(scored):
    one = dataclasses.replace(row(scored), distinct=jnp.asarray([True, True, False, True, True]))
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


# What it may not know


def test_nothing_of_a_held_out_variant_reaches_its_scores(scored):
    params, one = HYPER.state().params, row(scored)
    before = left_out(params, one)
    assert before[0].shape == (2, 5, one.entries.valid.shape[1])
    for held, other in ((0, 1), (1, 0)):
        losses = one.losses.at[1 + held].add(0.3)
        after = left_out(params, dataclasses.replace(one, losses=losses))
        np.testing.assert_array_equal(after[0][held], before[0][held])
        assert not np.array_equal(after[0][other], before[0][other])
        # Nor what it shows: only its own row of scores is of its own entries.
        moved = dataclasses.replace(one.entries, embeddings=one.entries.embeddings.at[1 + held].add(1.0))
        after = left_out(params, dataclasses.replace(one, entries=moved))
        assert same(row(after[1], held), row(before[1], held))
        assert not same(row(after[1], other), row(before[1], other))


def test_all_rollouts_are_read_for_a_document(scored):
    params, one = HYPER.state().params, row(scored)
    before = whole(params, one)
    for variant, is_known in enumerate([False, True, True, True, True]):
        after = whole(params, dataclasses.replace(one, losses=one.losses.at[variant].add(0.3)))
        assert same(after, before) != is_known


def test_deltas_of_zero_leave_lensnet_as_it_is(scored):
    params, one = HYPER.state().params, row(scored)
    score = jit(lambda lens: policy_scores(HYPER.models, lens, one.entries))
    deltas = whole(params, one)
    plain = score(params["lens"])
    np.testing.assert_array_equal(score(adaptation.adapted(params["lens"], hyperlora.zeroed(deltas))), plain)
    assert not np.array_equal(score(adaptation.adapted(params["lens"], deltas)), plain)


# What it trains


def test_the_loss_is_that_of_the_pairs_with_the_held_out_variant(scored):
    state = HYPER.state()
    random = np.random.default_rng(2)
    scores = np.tanh(random.normal(size=(3, 2, *scored.entries.valid.shape[1:]))).astype(np.float32)
    scores = np.where(scored.entries.valid[:, None], scores, 0.0)
    found, report = jit(
        lambda scores: objective.held_out_loss(
            scored,
            scores,
            scores[:, 0],
            normaliser=state.normaliser,
            temperature=0.7,
            hyper=state.hyper,
            config=HYPER.config,
        )
    )(scores)
    terms = [
        slow_objective.held_out_pairs(row(scored, slice(b, b + 1)), scores[b, held][None], 1 + held, 0.7, HYPER.config)
        for b in range(3)
        for held in range(2)
    ]
    preference, rank, wins = (list(itertools.chain(*values)) for values in zip(*terms, strict=True))
    assert len(wins) > 6
    expected = np.mean(preference) + HYPER.config.hyper.rank_weight * np.mean(rank)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(report["adapted_agreement"], np.mean(wins), rtol=1e-5)


def test_lensnet_begins_and_learns_as_it_does_without_a_hypernetwork(scored):
    params = HYPER.state().params
    assert same(params["lens"], Run(**{"context.rollouts": 4}).state().params["lens"])

    def total(params):
        return jnp.sum(adaptation.leave_one_out_scores(HYPER.models, params, row(scored), config=HYPER.config)[0])

    grads = jit(jax.grad(total))({name: params[name] for name in ("lens", "hyper")})
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["lens"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(grads["hyper"]))


def test_the_hypernetwork_learns_what_pays():
    state, losses = HYPER.state(step=2, learning_rate=3e-3), []
    for _ in range(12):
        # The same rollouts, judged alike, each time.
        after, report = HYPER.train_step(jax.tree.map(jnp.copy, state), batch())
        state = dataclasses.replace(state, params=after.params, opt_state=after.opt_state)
        losses.append(float(report["adapted_loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert float(report["lora_diversity"]) > 0
    assert {"adapted_agreement", "plain_agreement", "lora_magnitude"} <= set(report)


def test_what_it_picks_is_measured_beside_what_lensnet_picks():
    step = jit(
        lambda state, rows, key: evaluation.eval_step(state, rows, key, config=HYPER.config, models=HYPER.models)
    )
    rows = batch() | {"answer": jnp.asarray([0, 2, 4], jnp.int32)}
    state, key = HYPER.state(), jax.random.key(0)
    report = step(state, rows, key)
    assert {"nll_policy_adapted", "hit_rate_adapted"} <= set(report)
    assert float(report["nll_policy_adapted"]) != float(report["nll_policy"])
    nothing = dict(state.params, hyper=jax.tree.map(jnp.zeros_like, state.params["hyper"]))
    report = step(dataclasses.replace(state, params=nothing), rows, key)
    assert float(report["nll_policy_adapted"]) == float(report["nll_policy"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context.rollouts": 2}, "context.rollouts must be at least 3, got 2"),
        ({"adaptation.held_out": 5, "context.rollouts": 4}, "must be at least 5, got 4"),
        ({"objective.name": "grpo", "context.rollouts": 4}, "set objective.name to spans, got grpo"),
        (
            {"objective.pair_weights": "importance", "context.rollouts": 3},
            "set objective.pair_weights to none, got importance",
        ),
        ({"adaptation.rank": 0}, "rank must be"),
        ({"adaptation.max_norm": 0.0}, "adaptation.max_norm must be finite and above 0, got 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        configs.replace(SMALL, trainable=("lens", "hyper"), **changes)


def test_without_a_hypernetwork_there_are_no_deltas(scored):
    with pytest.raises(ValueError, match="name hyper in trainable"):
        adaptation.document_deltas(Run().models, HYPER.state().params, row(scored), config=SMALL)
    with pytest.raises(ValueError, match="params may hold base, gist, lens, got hyper"):
        train.init_train_state(jax.random.key(0), config=SMALL, models=Run().models, params={"hyper": {}})
