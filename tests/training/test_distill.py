"""Stage one: LensNet learns what a teacher knows, and nothing but LensNet learns."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.context import nodes, refocus
from lensjax.context import working as contexts
from lensjax.models import LensModel, Models
from lensjax.models.decision import build_tree, policy, split
from lensjax.training import key_tokens, teachers
from lensjax.training.steps import distill
from lensjax.training.teachers import DistillConfig
from tests import reference
from tests.small import OMITTING, SMALL, batch, jit
from tests.training.copier import Copier, Mean, copied

VOCABULARY = 40
# Eight blocks of four, the last of which is protected; two others can be shown.
CONFIG = _settings.replace(
    SMALL,
    **{
        "base.vocab_size": VOCABULARY,
        "lens.reads": "attention",
        "lens.pointer": False,
        "context.window": 35,
        "context.horizon": 3,
        "context.block_size": 4,
        "context.max_lod": 1,
        "context.recent_tokens": 4,
        "context.omit": True,
        "hyper.context_end": 12 / 32,
        "optimizer.curriculum_steps": None,
        "optimizer.schedule": "constant",
        "distill.steps": 60,
        "distill.learning_rate": 0.01,
        "distill.looks": 3,
    },
)
RECIPE, SETTINGS, GEOMETRY = CONFIG.recipe, CONFIG.distill, CONFIG.geometry
MODELS = Models(Copier(VOCABULARY), Mean(), LensModel(CONFIG.lens, VOCABULARY, 1, state_dim=2))


def windows(seed, size=16):
    """Tokens [B, T] whose horizon copies a block, and the blocks."""
    blocks = np.random.default_rng(seed).integers(0, 7, size)
    rows = [np.concatenate(copied(VOCABULARY, 32, block, 1000 * seed + i)) for i, block in enumerate(blocks)]
    return {"tokens": jnp.asarray(np.stack(rows))}, blocks


def without_need(seed=0):
    """Tokens that never come again: nothing far back helps."""
    return np.random.default_rng(seed).permutation(VOCABULARY)[:35].astype(np.int32)


FROZEN = {"base": {}, "gist": {}}  # no model here has parameters but LensNet


@functools.cache
def fresh():
    params = {"base": {}, "gist": {}, "lens": MODELS.lens.init(jax.random.key(0))}
    state, frozen = distill.init_distill_state(jax.random.key(1), recipe=RECIPE, params=params)
    assert frozen == FROZEN
    return state


def state_with(**lens):
    """A fresh state with other parameters of LensNet."""
    start = fresh()
    return replace(start, params={**start.params, "lens": {**start.params["lens"], **lens}})


@functools.cache
def compiled(settings=SETTINGS):
    return jit(functools.partial(distill.distill_step, recipe=RECIPE, settings=settings, models=MODELS))


@functools.cache
def trained():
    state, reports = fresh(), []
    for index in range(SETTINGS.steps):
        state, report = compiled()(state, windows(index)[0], FROZEN)
        reports.append(jax.device_get(report))
    return state, reports


def found_at_the_cold_start(state):
    """How often the context of a cold start shows the block that the horizon copies."""

    @jit
    @jax.vmap
    def pick(tokens):
        tree = build_tree(MODELS, FROZEN, tokens[:32], GEOMETRY)
        score = policy(MODELS.lens, state.params["lens"], tree)
        return refocus.cold_start(score, CONFIG.budget, GEOMETRY, capacity=CONFIG.budget, settings=CONFIG.focus)

    (rows, blocks) = windows(999, 64)
    last = jax.tree.map(lambda leaf: leaf[:, -1], pick(rows["tokens"]))
    shown = [reference.entries_of(jax.tree.map(lambda leaf, i=i: leaf[i], last)) for i in range(64)]
    return np.mean([(4 * block, 0) in entries for entries, block in zip(shown, blocks, strict=True)])


def test_the_loss_falls_and_the_picks_of_a_cold_start_become_right():
    state, reports = trained()
    losses = [report["loss"] for report in reports]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.2 * np.mean(losses[:5])
    assert found_at_the_cold_start(fresh()) < 0.5 and found_at_the_cold_start(state) > 0.9
    agreement = [report["distill/top_agreement"] for report in reports]
    assert np.mean(agreement[-5:]) > np.mean(agreement[:5]) + 0.2 and (np.asarray(agreement) <= 1).all()


def test_steps_are_one_program_and_the_rate_is_that_of_the_stage(compiles):
    state = fresh()
    compiled()(state, windows(0)[0], FROZEN)
    with compiles() as names:
        for index in range(3):
            state, _ = compiled()(state, windows(index)[0], FROZEN)
    assert names == [] and int(state.step) == 3
    # After a warm-up of two steps.
    rates = [report["lr"] for report in trained()[1]]
    np.testing.assert_allclose(rates[:3], [0.01 / 3, 0.02 / 3, 0.01], rtol=1e-5)
    assert max(rates) == rates[-1]


@jit
def gains(row):
    return key_tokens.token_gain(MODELS.base, {}, split(row, horizon=3), short=RECIPE.short).gain


@functools.partial(jit, static_argnames="teacher")
def seen_at(params, row, need, key, *, teacher):
    """What each token is worth, and two contexts with LensNet's scores."""
    window = split(row, horizon=3)
    worth = teachers.worth(MODELS.base, {}, window, GEOMETRY, teacher=teacher, weights=need)
    score = policy(MODELS.lens, params["lens"], build_tree(MODELS, params, window.history, GEOMETRY))
    seen = distill._contexts(key, score, RECIPE, looks=SETTINGS.looks)
    return worth, seen, jax.vmap(score)(seen)


def slow_loss(state, tokens, settings):
    """Of a batch, sequence by sequence and node by node."""
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), len(tokens))
    blocks, total, masses = GEOMETRY.blocks(1), 0.0, []
    for row, key in zip(tokens, keys, strict=True):
        need = jnp.maximum(gains(row), 0.0)
        worth, seen, scores = jax.device_get(
            seen_at({**FROZEN, **state.params}, row, need, key, teacher=settings.teacher)
        )
        of_blocks = np.asarray(worth, np.float64)[: 4 * blocks].reshape(blocks, 4).mean(axis=1)
        targets = np.maximum(of_blocks, 0.0) ** settings.sharpness
        losses = []
        for index in range(len(scores)):
            entries = reference.entries_of(jax.tree.map(lambda leaf, index=index: leaf[index], seen))
            each = np.asarray(scores[index, : len(entries)], np.float64)
            logits = np.arctanh(np.clip(each, -1 + 1e-6, 1 - 1e-6))
            pooled = [reference.node_score((4 * block, 1), entries, logits, 4) for block in range(blocks)]
            losses.append(reference.listwise_distillation(pooled, targets, temperature=settings.temperature))
        masses.append(targets.sum())
        total += masses[-1] * np.mean(losses)
    return total / sum(masses), masses


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, replace(SETTINGS, teacher="gradient", temperature=0.2), replace(SETTINGS, sharpness=2.0)],
    ids=["attention", "gradient", "sharp"],
)
def test_the_loss_of_a_batch_is_the_mean_over_sequences_by_what_each_has_to_say(settings):
    state = replace(fresh(), step=jnp.int32(7))
    tokens = windows(3, 4)[0]["tokens"]
    # The third has nothing to say, and the first half a need: what is predicted last does not come from its block.
    tokens = tokens.at[2].set(without_need()).at[0, -1].set(int(tokens[0, 0]))
    report = compiled(settings)(state, {"tokens": tokens}, FROZEN)[1]
    expected, masses = slow_loss(state, tokens, settings)
    assert float(report["loss"]) == pytest.approx(expected, rel=1e-3)
    assert masses[2] < 0.1 * min(masses[1], masses[3])
    if settings.teacher == "attention":
        assert masses[0] < 0.9 * masses[1]


LOOKS = SETTINGS.looks


def likes_old(context):
    return -context.start.astype(jnp.float32) / 32


def test_the_contexts_are_those_of_each_look_and_cuts_of_all_lengths():
    draw = jit(jax.vmap(lambda key: distill._contexts(key, likes_old, RECIPE, looks=LOOKS)))
    seen = draw(jax.random.split(jax.random.key(0), 200))
    assert LOOKS > 1 and seen.start.shape[1] == LOOKS + 1
    lengths = np.asarray(contexts.entry_count(seen, GEOMETRY))
    assert (lengths[:, :LOOKS] == CONFIG.budget).all()
    settings = {"capacity": RECIPE.capacity, "settings": RECIPE.focus}
    own = refocus.cold_start(likes_old, CONFIG.budget, GEOMETRY, **settings)
    # What the last look makes is not looked at.
    jax.tree.map(lambda leaf, each: np.testing.assert_array_equal(leaf[199, :LOOKS], each[:LOOKS]), seen, own)
    assert (own.start[0] != own.start[1]).any()
    assert set(lengths[:, -1]) == set(range(4, RECIPE.capacity + 1, 4)), "whole blocks beside the tail"
    recency = _settings.replace(CONFIG, **{"focus.start": "recency"}).recipe
    first = jit(lambda key: distill._contexts(key, likes_old, recency, looks=1))(jax.random.key(0))
    cold = jax.tree.map(lambda leaf: leaf[0], first)
    read = reference.read(reference.entries_of(cold), GEOMETRY)
    assert read == [(token, 0) for token in range(32 - CONFIG.budget, 32)]


def test_a_window_without_need_teaches_nothing():
    class Blind(Copier):
        """Looks as `Copier` does, and says nothing."""

        def logits(self, params, entries, rows):
            return jnp.zeros((len(rows), self.vocab_size))

    models = replace(MODELS, base=Blind(VOCABULARY))
    step = jit(functools.partial(distill.distill_step, recipe=RECIPE, settings=SETTINGS, models=models))
    _, report = step(fresh(), windows(0)[0], FROZEN)
    assert float(report["loss"]) == float(report["grad_norm"]) == 0


def test_what_all_scores_have_in_common_changes_nothing_and_near_1_there_is_a_gradient():
    reports = {}
    # One look: where scores are rounded near 1, later looks are at other contexts.
    step = compiled(replace(SETTINGS, looks=1))
    for bias in (0.0, 3.0, 50.0):
        head = fresh().params["lens"]["head"]
        state = state_with(head={**head, "bias": head["bias"] + bias})
        reports[bias] = step(state, windows(0)[0], FROZEN)[1]
    for name in ("loss", "grad_norm"):
        assert float(reports[3.0][name]) == pytest.approx(float(reports[0.0][name]), rel=0.02)
    # tanh gives 1: as far as float32 can tell there is nothing to part.
    assert np.isfinite(float(reports[50.0]["loss"])) and float(reports[50.0]["grad_norm"]) == 0
    assert float(reports[0.0]["grad_norm"]) > 0.1


RUN = functools.partial(distill._one, recipe=OMITTING.recipe, settings=DistillConfig(steps=12), models=OMITTING.models)


def test_no_gradient_reaches_what_the_teacher_and_the_policy_read():
    params, tokens = OMITTING.params(), batch()["tokens"][0]
    gradient = jit(jax.grad(lambda params: RUN(jax.random.key(0), params, tokens)[0]))(params)
    sizes = {name: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(gradient[name])) for name in gradient}
    assert sizes["base"] == sizes["gist"] == 0 and sizes["lens"] > 0


def test_lensnet_alone_moves():
    static = {"recipe": OMITTING.recipe, "settings": DistillConfig(steps=12), "models": OMITTING.models}
    params = OMITTING.params()
    before, frozen = distill.init_distill_state(jax.random.key(0), recipe=OMITTING.recipe, params=params)
    assert frozen == {name: params[name] for name in ("base", "gist")}, "as they are"
    after, report = jit(functools.partial(distill.distill_step, **static))(before, batch(), frozen)
    assert set(after.params) == {"lens"}
    moved = jax.tree.map(lambda one, other: bool((one != other).any()), after.params["lens"], before.params["lens"])
    assert all(jax.tree.leaves(moved)), moved
    assert float(report["loss"]) > 0
    kept = "".join(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(before.opt_state))
    assert "lens" in kept and "base" not in kept and "gist" not in kept


def test_the_horizon_changes_what_is_taught_and_not_what_is_scored():
    tokens = windows(5, 2)[0]["tokens"]
    other = tokens.at[:, 32:].set(windows(6, 2)[0]["tokens"][:, 32:])

    @jit
    def both(tokens):
        window = split(tokens, horizon=3)
        worth = teachers.worth(MODELS.base, {}, window, GEOMETRY, teacher="attention")
        tree = build_tree(MODELS, FROZEN, window.history, GEOMETRY)
        seen = jax.tree.map(lambda leaf: leaf[0], distill._contexts(jax.random.key(0), likes_old, RECIPE, looks=1))
        return nodes.pool_tokens(worth, GEOMETRY), policy(MODELS.lens, fresh().params["lens"], tree)(seen)

    (taught, scored), (others_taught, others_scored) = both(tokens[0]), both(other[0])
    np.testing.assert_array_equal(scored, others_scored)
    assert (taught != others_taught).any()
