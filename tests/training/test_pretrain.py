import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import working as contexts
from lensjax.evaluation import held_out
from lensjax.models.decision import build_tree, split
from lensjax.training import nll
from lensjax.training.steps import pretrain
from tests import reference
from tests.small import Run, batch, jit

STEPS, RATE = 12, 0.01
PLAIN, JOINT = (
    Run(**{"pretrain.rollout_weight": weight, "pretrain.steps": STEPS, "pretrain.learning_rate": RATE})
    for weight in (0.0, 0.5)
)
BOTH = pytest.mark.parametrize("run", [PLAIN, JOINT], ids=["full windows", "rollouts too"])


@functools.cache
def compiled(run):
    step = functools.partial(pretrain.pretrain_step, recipe=run.recipe, settings=run.config.pretrain, models=run.models)
    return jit(step, donate_argnums=0)


def fresh(run, seed=0):
    settings = run.config.pretrain
    return pretrain.init_pretrain_state(jax.random.key(seed), recipe=run.recipe, settings=settings, models=run.models)


@functools.cache
def history(run):
    """The first state, the last one, and the reports of a short run on one batch."""
    (state, frozen), reports = fresh(run), []
    first = jax.tree.map(jnp.copy, state)
    for _ in range(STEPS):
        state, report = compiled(run)(state, batch(), frozen)
        reports.append({name: float(value) for name, value in report.items()})
    return first, state, reports


@BOTH
def test_the_loss_falls_on_a_repeated_batch(run):
    *_, reports = history(run)
    for name in ("loss", "token_loss", *(["rollout_loss"] if run is JOINT else [])):
        # The rollouts join in the middle, and add to the loss.
        first = reports[STEPS // 2 if run is JOINT and name != "token_loss" else 0][name]
        assert reports[-1][name] < first - (0.2 if name == "token_loss" else 0.02), name


@BOTH
def test_gists_are_trained_only_where_rollouts_are_read(run):
    first, last, _ = history(run)
    pairs = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), first.params, last.params)
    assert all(jax.tree.leaves(pairs))
    assert set(first.params) == set(last.params) == ({"base", "gist"} if run is JOINT else {"base"})
    assert set(fresh(run)[1]) == (set() if run is JOINT else {"gist"})


@BOTH
def test_the_report(run):
    *_, reports = history(run)
    rollouts = {"rollout_loss"} if run is JOINT else set()
    for report in reports:
        assert set(report) == {"loss", "token_loss", "grad_norm", "lr"} | rollouts
        assert np.isfinite(list(report.values())).all()
        weighted = run.config.pretrain.rollout_weight * report.get("rollout_loss", 0.0)
        assert report["loss"] == pytest.approx(report["token_loss"] + weighted, rel=1e-6)
    assert [report["lr"] for report in reports[:3]] == pytest.approx([RATE / 3, 2 * RATE / 3, RATE], rel=1e-5)
    assert reports[-1]["lr"] == pytest.approx(RATE / 10, rel=1e-4)


def test_its_loss_is_that_of_evaluation():
    first, _, reports = history(PLAIN)
    horizon = PLAIN.recipe.context.horizon
    measure = jit(functools.partial(held_out.pretrain_eval_step, horizon=horizon, models=PLAIN.models))
    measured = measure(first.params, batch())
    assert float(measured["nll_full"]) == pytest.approx(reports[0]["token_loss"], rel=1e-5)
    of_a_row = jit(functools.partial(nll.sequence_nll, PLAIN.models.base, first.params["base"]))
    losses = [of_a_row(row) for row in batch()["tokens"]]
    assert float(measured["nll_full"]) == pytest.approx(float(np.mean(losses)), rel=1e-5)
    tail = np.asarray(losses)[:, -horizon:]
    assert float(measured["nll_full_tail"]) == pytest.approx(float(tail.mean()), rel=1e-5)


def test_it_is_one_program_and_repeats_to_the_bit(compiles):
    def run():
        state, frozen = fresh(JOINT, seed=1)
        for index in range(3):
            state, _ = compiled(JOINT)(state, batch(index), frozen)
        return state

    once = run()
    with compiles() as names:
        again = run()
    assert names == []
    chex.assert_trees_all_equal(again, once)
    assert int(once.step) == 3


def test_each_step_draws_other_rollouts():
    losses = []
    first = history(JOINT)[0]
    for step in (6, 7, 8):
        state = replace(jax.tree.map(jnp.copy, first), step=jnp.asarray(step, jnp.int32))
        _, report = compiled(JOINT)(state, batch(), {})
        losses.append(float(report["rollout_loss"]))
    assert len(set(losses)) == 3


def test_rollouts_are_read_from_the_middle_on():
    *_, reports = history(JOINT)
    assert [report["rollout_loss"] > 0 for report in reports] == [False] * (STEPS // 2) + [True] * (STEPS // 2)


def test_the_loss_of_a_rollout_is_that_of_every_token_that_follows_one():
    """Against the ordinary loss where nothing is collapsed, and a slow loop over what is read elsewhere."""
    models, params, geometry = JOINT.models, fresh(JOINT)[0].params, JOINT.recipe.geometry
    tokens, horizon = batch()["tokens"][0], JOINT.recipe.context.horizon
    window = split(tokens, horizon=horizon)

    @jit
    def measure(params, cut):
        context = contexts.from_cut(cut, geometry, capacity=geometry.history)
        entries = contexts.materialise(build_tree(models, params, window.history, geometry), context)
        loss = nll.entry_nll(models.base, params["base"], entries, tokens, horizon=horizon)
        read = nll.reading(models.base, params["base"], entries, window.horizon).entries
        logits = models.base.logits(params["base"], read, jnp.arange(read.spans.shape[0]))
        return loss, context, jax.nn.log_softmax(logits)

    loss, *_ = measure(params, jnp.zeros(geometry.history, jnp.int32))
    whole = jit(functools.partial(nll.sequence_nll, models.base, params["base"]))(tokens)
    assert float(loss) == pytest.approx(float(whole.mean()), rel=1e-5)

    cut = np.zeros(geometry.history, np.int32)
    cut[4:8], cut[10:12] = 2, 1
    loss, context, logs = measure(params, cut)
    behind = [(token, 0) for token in range(geometry.history, len(tokens) - 1)]
    read = [*reference.entries_of(context), *behind]
    expected = [-float(logs[row, tokens[start + 1]]) for row, (start, lod) in enumerate(read) if lod == 0]
    assert len(expected) == len(tokens) - 1 - 6  # of 35 tokens with one behind them, 6 are in gists
    assert float(loss) == pytest.approx(float(np.mean(expected)), rel=1e-5)


def test_the_state_is_donated_but_for_rates_that_are_set_anew():
    state, frozen = fresh(JOINT)
    compiled(JOINT)(state, batch(), frozen)
    kept = [path for path, leaf in jax.tree.leaves_with_path(state) if not leaf.is_deleted()]
    assert all("hyperparams" in jax.tree_util.keystr(path) for path in kept) and len(kept) == 2
