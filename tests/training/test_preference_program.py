"""What is read off the program of `train_step`, which is traced and not compiled."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lensjax.training.metrics import HISTOGRAMS
from lensjax.training.steps import preference
from lensjax.training.steps.train_state import init_train_state
from tests.small import FULL, LENS, OTHER, SMALL, Run, batch

PARTS = ("base", "gist", "lens")
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(PARTS, size)]

REPORT = {
    *("loss", "grad_norm", "lr", "temperature", "context_length"),
    *("nll_baseline", "nll_rollout_mean", "nll_rollout_best"),
    *("reward_mean", "reward_std", "frac_reward_zero_std"),
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    *(f"mc/adv_delta_{name}" for name in ("mean", "p95", "std")),
    *("mc/adv_ema_mean", "mc/adv_ema_std", *HISTOGRAMS),
    *(f"mc/preference_corr_{name}" for name in ("mean", "max", "min", "defined_share")),
    *("mc/preference_agreement", "mc/preference_agreement_lod_only", "mc/preference_pair_count"),
    *("mc/preference_tie_share", "mc/distinct_share", "mc/edit_wish_rate"),
    *("mc/policy_score_abs_mean", "mc/policy_score_std_mean"),
    *("mc/lens_loss", "mc/preference_loss", "mc/rank_loss", "mc/budget_loss", "mc/smooth_loss"),
    *("mc/lod_loss/0", "mc/lod_loss/1", "mc/lod_loss/2"),
}
KL, JOINT = {"kl", "mc/kl_loss"}, {"token_loss", "gist_delta_loss"}


@pytest.mark.parametrize(("run", "extra"), [(LENS, set()), (FULL, KL | JOINT), (OTHER, KL | JOINT)])
def test_the_names_of_the_report(run, extra):
    step = functools.partial(preference.train_step, recipe=run.recipe, models=run.models)
    _, report = jax.eval_shape(step, run.state(), batch(), run.frozen())
    assert set(report) == REPORT | extra
    shapes = {name: (len(HISTOGRAMS[name]) - 1,) if name in HISTOGRAMS else () for name in report}
    assert {name: value.shape for name, value in report.items()} == shapes
    assert all(value.dtype == jnp.float32 for value in report.values())


@pytest.mark.parametrize("trainable", SUBSETS, ids="+".join)
def test_a_state_holds_what_is_trained_for_every_choice_of_trainable_parts(trainable):
    """Read off the program: every leaf of the state's parameters is computed anew, and nothing else comes out of it."""
    static = {"recipe": replace(LENS.recipe, trainable=trainable), "models": LENS.models}
    state, frozen = init_train_state(jax.random.key(0), **static)
    assert set(state.params) == set(trainable) and set(frozen) == set(PARTS) - set(trainable)
    step = functools.partial(preference.train_step, **static)
    program, (after, _) = jax.make_jaxpr(step, return_shape=True)(state, batch(), frozen)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert names == [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(after)]
    passed = {
        name: before is outcome
        for name, before, outcome in zip(names, program.jaxpr.invars, program.jaxpr.outvars, strict=False)
    }
    assert not any(is_passed for name, is_passed in passed.items() if name.startswith(".params"))
    results = set(map(id, program.jaxpr.outvars))
    given = program.jaxpr.invars[len(names) + 1 :]
    assert len(given) == len(jax.tree.leaves(frozen)) and not any(id(leaf) in results for leaf in given)


class CountingLens:
    """A policy that notes each application when a program is traced."""

    def __init__(self):
        self.applied = 0

    def init(self, key):
        return {"weight": jax.random.normal(key, (SMALL.base.dim,))}

    def apply(self, params, entries):
        self.applied += 1
        return jnp.where(entries.valid, jnp.tanh(entries.embeddings @ params["weight"]), 0.0)


@pytest.mark.parametrize(("weight", "applications"), [(0.0, 1), (0.1, 2)])
def test_without_divergence_there_is_no_anchor_and_no_second_pass(weight, applications):
    lens = CountingLens()
    run = Run(lambda config: replace(config.build_models(), lens=lens), **{"hyper.kl_weight": weight})
    state = run.state()
    assert (state.anchor is None) == (weight == 0)
    jax.eval_shape(
        functools.partial(preference.train_step, recipe=run.recipe, models=run.models), state, batch(), run.frozen()
    )
    assert lens.applied == applications
