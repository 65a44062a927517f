"""The objective against a slow reference, on random variants and random scores; no model is called."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax import losses
from lensjax.context.working import Entries
from lensjax.runs import config as configs
from lensjax.training.metrics import MAY_BE_UNDEFINED
from lensjax.training.objective import lens_objective
from lensjax.training.optim.moving import EmaMoments
from lensjax.training.scoring import ScoredVariants
from tests import reference, slow_objective
from tests.small import SMALL, jit

SHAPE, CAPACITY, VARIANTS, BATCH = SMALL.context, SMALL.context_capacity, SMALL.context.rollouts + 1, 3
CHOICES = [("both", "entry"), ("both", "pair"), ("worse_only", "entry"), ("worse_only", "pair")]
KEY = jax.random.key(4)
EMPTY = EmaMoments(*(np.asarray(x, np.float32) for x in (1.0, 0.0, 1.0)))
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


def one_update(mean, variance):
    """Moments after one update with decay 0.9."""
    return EmaMoments(*(np.asarray(x, np.float32) for x in (0.9, mean, variance)))


def random_sequence(rng, *, with_duplicate):
    """The baseline and random cuts of one length, with losses as if measured."""
    length = int(rng.integers(SHAPE.geometry.shortest, CAPACITY + 1))
    cuts = [[(token, 0) for token in range(SHAPE.history - length, SHAPE.history)]]
    cuts += [reference.random_cut(SHAPE.geometry, length, rng) for _ in range(VARIANTS - 1)]
    distinct = np.ones(VARIANTS, bool)
    if with_duplicate:
        cuts[-1], distinct[-1] = cuts[1], False
    contexts = [reference.context_of(cut, window=SHAPE.history, capacity=CAPACITY) for cut in cuts]
    contexts = jax.tree.map(lambda *rows: np.stack(rows), *contexts)
    spans = np.where(contexts.valid, SHAPE.block_size**contexts.lod, 0).astype(np.float32)
    unread = np.full(spans.shape, np.nan, np.float32)
    entries = Entries(unread[..., None], unread[..., None], unread, contexts.lod, spans, unread, contexts.valid)
    losses = (2 + 0.5 * rng.standard_normal(VARIANTS)).astype(np.float32)
    return ScoredVariants(contexts, distinct, entries, losses)


def random_case(seed):
    """Scored variants of a batch, and scores of a policy and of its anchor that hold garbage at padding."""
    rng = np.random.default_rng(seed)
    rows = [random_sequence(rng, with_duplicate=b == 0) for b in range(BATCH)]
    scored = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    scores, anchor = rng.uniform(-0.9, 0.9, (2, BATCH, VARIANTS, CAPACITY)).astype(np.float32)
    return scored, np.where(scored.contexts.valid, scores, 7), np.where(scored.contexts.valid, anchor, -7)


@functools.cache
def objective(targets, granularity, local_edits=0, name="spans", group="sequence", keep=None, pair_weights="none"):
    changes = {
        "objective.name": name,
        "objective.group": group,
        "objective.keep": keep,
        "objective.pair_weights": pair_weights,
        "objective.targets": targets,
        "objective.granularity": granularity,
        "objective.max_pairs": 4,
    }
    changes |= {"context.local_edits": local_edits}
    config = configs.replace(SMALL, **changes)

    def call(scored, scores, anchor, normaliser, budget, hyper, key=KEY):
        return lens_objective(
            scored,
            scores,
            anchor,
            key,
            normaliser=normaliser,
            budget=budget,
            temperature=hyper.temperature,
            hyper=hyper,
            config=config,
        )

    return config, call


@functools.cache
def compiled(*choice, **choices):
    config, call = objective(*choice, **choices)
    return config, jit(call)


def as_arrays(hyper):
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), hyper)


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), is_first=st.booleans(), swept=st.fixed_dictionaries(SWEPT))
@pytest.mark.parametrize(
    "choice",
    [
        *CHOICES,
        ("both", "entry", 2),
        ("both", "entry", 0, "spans", "sequence", 3),
        ("both", "entry", 0, "mse"),
        ("both", "entry", 0, "span_advantages"),
        ("both", "entry", 2, "span_advantages", "sequence", 3),
        ("both", "entry", 0, "spans", "sequence", None, "importance"),
        ("both", "entry", 2, "mse", "sequence", None, "importance"),
    ],
    ids=lambda c: "-".join(map(str, c)),
)
def test_the_objective_is_the_slow_reference(choice, seed, is_first, swept):
    config, call = compiled(*choice)
    config = replace(config, hyper=replace(config.hyper, **swept))
    scored, scores, anchor = random_case(seed)
    output = call(
        scored,
        scores,
        anchor,
        EMPTY if is_first else one_update(0.1, 0.3),
        EMPTY if is_first else one_update(-0.2, 0.06),
        as_arrays(config.hyper),
    )
    expected = slow_objective.objective(
        scored,
        scores,
        anchor,
        advantage_moments=None if is_first else (0.1, 0.3),
        balance_average=None if is_first else -0.2,
        temperature=config.hyper.temperature,
        config=config,
    )
    found = {name: float(value) for name, value in output.metrics.items()}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    assert float(output.loss) == found["mc/lens_loss"]
    assert not [name for name, value in found.items() if np.isnan(value) and name not in MAY_BE_UNDEFINED]


HYPER = {
    "kl_weight": 0.2,
    "beta": 1.3,
    "reward_temperature": 0.4,
    "cpl_bias": 0.7,
    "temperature": 0.6,
    "rpo_weight": 0.3,
}
OVER_GROUPS = {
    "copg": {"beta": 1.3},
    "cpl": {"alpha": 1.3, "bias": 0.7},
    "disco": {"tau": 0.6},
    "info_nca": {"alpha": 0.4, "beta": 1.3},
    "info_nce": {"tau": 0.6},
    "rpo": {"beta": 1.3, "weight": 0.3},
}


def groups_of(scored, scores, anchor, config):
    """(relative value, reward) of the variants that are compared, of each sequence that holds a preference."""
    found = []
    for b in range(BATCH):
        one = jax.tree.map(lambda leaf, b=b: leaf[b], scored)
        own, reference_policy = (slow_objective.Row(one, policy[b], None, config) for policy in (scores, anchor))
        group = [(own.value(v) - reference_policy.value(v), -float(one.losses[v])) for v in own.compared]
        found += [group] if len({reward for _, reward in group}) > 1 else []
    return found


def without_preference_in_the_second(scored):
    return replace(scored, losses=scored.losses * np.asarray([[1], [0], [1]], np.float32))


@pytest.mark.parametrize(
    ("name", "local_edits", "keep"), [*((name, 0, None) for name in OVER_GROUPS), ("copg", 2, None), ("copg", 0, 2)]
)
def test_an_objective_over_groups_takes_the_place_of_the_preference_term(name, local_edits, keep):
    config, call = compiled("both", "entry", local_edits, name, keep=keep)
    scored, scores, anchor = random_case(3)
    scored = without_preference_in_the_second(scored)
    hyper = as_arrays(replace(config.hyper, **HYPER))
    found = call(scored, scores, anchor, EMPTY, EMPTY, hyper).metrics
    groups = groups_of(scored, scores, anchor, config)
    expected = [getattr(reference, name)(group, **OVER_GROUPS[name]) for group in groups]
    assert len(expected) == 2
    assert float(found["mc/preference_loss"]) == pytest.approx(np.mean(expected), rel=1e-4)
    _, call = compiled("both", "entry", local_edits, keep=keep)
    other = call(scored, scores, anchor, EMPTY, EMPTY, hyper).metrics
    for metric in set(found) - {"mc/preference_loss", "mc/lens_loss"}:
        np.testing.assert_allclose(found[metric], other[metric], rtol=1e-5, err_msg=metric)
    rest = [float(one["mc/lens_loss"] - one["mc/preference_loss"]) for one in (found, other)]
    assert rest[0] == pytest.approx(rest[1], abs=1e-4)


@pytest.mark.parametrize("name", ["copg", "info_nce", "rpo"])
def test_the_variants_of_a_batch_are_one_group_relative_to_their_sequence(name):
    config, call = compiled("both", "entry", 0, name, "batch")
    scored, scores, anchor = random_case(3)
    scored = without_preference_in_the_second(scored)
    found = call(scored, scores, anchor, EMPTY, EMPTY, as_arrays(replace(config.hyper, **HYPER))).metrics
    groups = groups_of(scored, scores, anchor, config)
    together = [tuple(one - np.mean(group, axis=0)) for group in groups for one in group]
    expected = getattr(reference, name)(together, **OVER_GROUPS[name])
    assert float(found["mc/preference_loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_rankings_are_drawn_from_the_key(group):
    config, call = compiled("both", "entry", 0, "pg_rank", group)
    scored, scores, _ = random_case(4)
    # Two sequences of equal variants and values draw different rankings.
    scored, scores = jax.tree.map(lambda leaf: leaf.at[1].set(leaf[2]), jax.tree.map(jnp.asarray, (scored, scores)))
    terms = {}
    for seed in (0, 0, 1):
        key = jax.random.key(seed)
        term = call(scored, scores, None, EMPTY, EMPTY, as_arrays(config.hyper), key).metrics["mc/preference_loss"]
        assert terms.setdefault(seed, float(term)) == float(term)
    assert terms[0] != terms[1]
    if group == "sequence":
        rows = [
            slow_objective.Row(jax.tree.map(lambda x, b=b: x[b], scored), scores[b], None, config) for b in range(3)
        ]
        each = [
            losses.pg_rank(
                jnp.asarray([row.value(v) for v in range(VARIANTS)], jnp.float32),
                -scored.losses[b],
                scored.distinct[b],
                beta=1.0,
                key=key,
                samples=config.objective.rankings,
            )
            for b, (row, key) in enumerate(zip(rows, jax.random.split(jax.random.key(0), BATCH), strict=True))
        ]
        assert terms[0] == pytest.approx(np.mean(each), rel=1e-3, abs=1e-5) and each[1] != each[2]


def test_without_a_kl_term_values_are_relative_to_nothing():
    """In a sweep an arm without a weight for it has the anchor's scores all the same."""
    config, call = compiled("both", "entry", 0, "copg")
    scored, scores, anchor = random_case(3)
    hyper = as_arrays(replace(config.hyper, **(HYPER | {"kl_weight": 0.0})))
    found, alone = (call(scored, scores, given, EMPTY, EMPTY, hyper).loss for given in (anchor, None))
    assert float(found) == pytest.approx(float(alone), rel=1e-6)


def test_logistic_with_the_divergence_from_a_fixed_policy_is_hypo():
    """2406.01462: the preferences' loss plus lambda KL, and nothing else."""
    config, call = compiled("both", "entry", 0, "logistic")
    alone = {name: 0.0 for name in ("rank_weight", "budget_weight", "smooth_weight")}
    hyper = replace(config.hyper, beta=1.3, kl_weight=0.7, temperature=0.6, **alone)
    scored, scores, anchor = random_case(5)
    output = call(scored, scores, anchor, EMPTY, EMPTY, as_arrays(hyper))
    preference = np.mean([reference.logistic(group, beta=1.3) for group in groups_of(scored, scores, anchor, config)])
    rows = [
        slow_objective.Row(jax.tree.map(lambda leaf, b=b: leaf[b], scored), scores[b], anchor[b], config)
        for b in range(BATCH)
    ]
    divergence = np.mean([row.kl(v, 0.6) for row in rows for v in row.distinct])
    assert divergence > 0.01
    assert float(output.loss) == pytest.approx(preference + 0.7 * divergence, rel=1e-4)


def test_the_balance_of_each_variant_is_given_back_for_the_moving_average():
    scored, scores, anchor = random_case(0)
    config, call = compiled("both", "entry")
    balance = call(scored, scores, anchor, EMPTY, EMPTY, as_arrays(config.hyper)).balance
    for b, v in np.argwhere(scored.distinct):
        row = slow_objective.Row(jax.tree.map(lambda leaf, b=b: leaf[b], scored), scores[b], None, config)
        assert float(balance[b, v]) == pytest.approx(row.balance(v), abs=1e-5)


def test_the_advantage_of_a_span_by_hand():
    """Two variants of a sequence, 1 nat apart, that differ in two blocks of two tokens each."""
    config, call = objective("both", "entry", 0, "span_advantages")
    recent = [(token, 0) for token in range(4, SHAPE.history)]
    one, other = [(0, 1), (2, 0), (3, 0), *recent], [(0, 0), (1, 0), (2, 1), *recent]
    cuts = [one, other, one, one]
    contexts = [reference.context_of(cut, window=SHAPE.history, capacity=SHAPE.history) for cut in cuts]
    contexts = jax.tree.map(lambda *rows: np.stack(rows)[None], *contexts)
    spans = np.where(contexts.valid, SHAPE.block_size**contexts.lod, 0).astype(np.float32)
    entries = Entries(spans[..., None], spans[..., None], spans, contexts.lod, spans, spans, contexts.valid)
    distinct = np.asarray([[True, True, False, False]])
    scored = ScoredVariants(contexts, distinct, entries, np.asarray([[1.0, 2.0, np.nan, np.nan]], np.float32))
    alone = {name: 0.0 for name in ("rank_weight", "budget_weight", "smooth_weight")}
    hyper = as_arrays(replace(config.hyper, **alone))
    loss = jit(jax.value_and_grad(lambda s: call(scored, s, None, EMPTY, EMPTY, hyper).loss))
    scores = np.zeros((1, 4, SHAPE.history), np.float32)
    scores[0, 0, :3], scores[0, 1, :3] = [-0.5, 0.25, 0.75], [1.0, -1.0, 0.5]
    value, gradient = loss(scores)
    # The first is better: less of tokens 0 and 1, more of 2 and 3, on both sides by the tokens covered, of 8 in all.
    asked = [2 * 0.5 + 0.25 + 0.75, -1.0 + 1.0 + 2 * 0.5]
    assert float(value) == pytest.approx(-sum(asked) / 8, rel=1e-5)
    expected = np.zeros((2, SHAPE.history))
    expected[:, :3] = np.asarray([[2, -1, -1], [1, 1, -2]]) / 8
    np.testing.assert_allclose(gradient[0, :2], expected, rtol=1e-5)
    assert not gradient[0, 2:].any()
    # To repeat the level says nothing.
    assert float(loss(np.where(contexts.lod > 0, 0.75, -0.25).astype(np.float32))[0]) == pytest.approx(0, abs=1e-7)


# Where gradients go.


@functools.cache
def gradients():
    """Of the whole loss with respect to scores, anchor scores and the measured losses."""
    config, call = objective("both", "entry")
    hyper = as_arrays(replace(config.hyper, kl_weight=1.0, smooth_weight=1.0))

    def loss(scores, anchor, losses, scored):
        return call(replace(scored, losses=losses), scores, anchor, EMPTY, EMPTY, hyper).loss

    scored, scores, anchor = random_case(1)
    return scored, jit(jax.grad(loss, argnums=(0, 1, 2)))(scores, anchor, scored.losses, scored)


def test_only_scores_before_the_protected_tail_are_trained():
    scored, (scores, _, _) = gradients()
    contexts = scored.contexts
    is_free = contexts.valid & (contexts.start < SHAPE.history - SHAPE.recent_tokens) & scored.distinct[..., None]
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
    config, call = compiled("both", "entry")
    scored = replace(scored, losses=np.full_like(scored.losses, np.log(VARIANTS)))
    report = call(scored, scores, anchor, EMPTY, EMPTY, as_arrays(config.hyper)).metrics
    assert report["mc/preference_tie_share"] == 1
    assert report["frac_reward_zero_std"] == 1
    zero = ["mc/preference_pair_count", "mc/preference_loss", "mc/rank_loss", "mc/preference_corr_defined_share"]
    zero += [f"mc/lod_loss/{lod}" for lod in range(SHAPE.max_lod + 1)]
    zero += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    assert [float(report[name]) for name in zero] == [0] * len(zero)
    undefined = {name for name, value in report.items() if np.isnan(value)}
    assert undefined == {name for name in MAY_BE_UNDEFINED if name.startswith("mc/")}


@pytest.mark.parametrize("content", [np.nan, np.inf])
def test_a_broken_loss_or_score_is_not_hidden(content):
    scored, scores, anchor = random_case(3)
    config, call = compiled("both", "entry")
    hyper = as_arrays(config.hyper)
    broken = scores.copy()
    broken[1, 1, 0] = content
    assert not np.isfinite(call(scored, broken, anchor, EMPTY, EMPTY, hyper).loss)
    losses = scored.losses.copy()
    losses[1, 1] = content
    output = call(replace(scored, losses=losses), scores, anchor, EMPTY, EMPTY, hyper)
    assert np.isnan(output.loss) and not np.isfinite(output.metrics["nll_rollout_mean"])


@pytest.mark.parametrize(
    ("name", "group", "keep"),
    [("spans", "sequence", None), ("spans", "sequence", 3), ("logistic", "sequence", 3), ("disco", "batch", None)],
)
def test_only_losses_that_count_are_read_and_none_of_them_vanishes(name, group, keep):
    config, call = objective("both", "entry", 0, name, group, keep)
    scored, scores, anchor = random_case(3)
    normaliser, hyper = one_update(0.1, 0.3), as_arrays(replace(config.hyper, **HYPER))

    @jit
    def value_and_gradient(losses):
        def loss(scores):
            return call(replace(scored, losses=losses), scores, anchor, normaliser, EMPTY, hyper).loss

        return jax.value_and_grad(loss)(jnp.asarray(scores))

    masked = np.argwhere(~scored.distinct)
    assert len(masked) == 1
    expected = value_and_gradient(scored.losses)
    assert np.isfinite(expected[0]) and np.isfinite(expected[1]).all()
    for content in (np.nan, np.inf, -np.inf):
        for b, v in np.ndindex(scored.losses.shape):
            losses = scored.losses.copy()
            losses[b, v] = content
            found = value_and_gradient(losses)
            if [b, v] in masked.tolist():
                jax.tree.map(np.testing.assert_array_equal, found, expected)
            else:
                assert np.isnan(found[0])
    assert np.isnan(value_and_gradient(np.full_like(scored.losses, np.nan))[0])
