"""A run whose steps cost next to nothing: interrupted, gone on with, started from another, stopped early, broken."""

import dataclasses
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lensjax.runs import load
from lensjax.runs.config import PHASES
from lensjax.runs.engine import loop
from lensjax.runs.fit import fit
from lensjax.runs.store import checkpoint
from lensjax.runs.store.log import read_rows
from lensjax.training.steps import distill, online, preference, pretrain
from tests.runs import (
    ALL,
    Killed,
    all_saved_are_finite,
    assert_saved,
    bits,
    cheap_programs,
    contents,
    go_on,
    hook_run,
    outcome,
    request_stop,
    saved_arrays,
    saved_part,
    start,
    tiny_config,
)


@pytest.fixture(scope="module")
def cheap():
    with cheap_programs():
        yield


@pytest.fixture(scope="module")
def whole(cheap, tmp_path_factory):
    """The folder of a run through all phases that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    start(tiny_config(folder, **ALL))
    return folder


# Where a run is interrupted, one time after the other: place, phase and step (see `hook_run`).
KILLS = [
    ("step", "pretrain", 1),  # before the first checkpoint
    ("in save", "pretrain", 2),
    ("saved", "pretrain", 4),  # between the phases
    ("step", "gists", 3),
    ("saved", "gists", 5),
    ("step", "distill", 1),  # before the phase has a checkpoint
    ("in save", "distill", 2),
    ("saved", "distill", 5),
    ("step", "lens", 1),
    ("step", "lens", 4),
    ("saved", "lens", 5),
    ("step", "online", 1),
    ("in save", "online", 4),
    ("saved", "online", 5),  # all done but for the summary
]
STOPS = [("step", "pretrain", 3), ("in save", "pretrain", 4), ("step", "distill", 3), ("step", "lens", 1)]
STOPS += [("step", "online", 5)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "places"), [("killed", KILLS), ("stopped", STOPS)])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(whole, tmp_path, monkeypatch, kind, places):
    pending = list(places)

    def hook(*at):
        if at in pending:
            pending.remove(at)
            if kind == "killed":
                raise Killed
            request_stop()

    hook_run(monkeypatch.setattr, hook)
    folder = tmp_path / "run"
    for attempt, (_, phase, step) in enumerate(places):
        with pytest.raises(Killed if kind == "killed" else loop.Interrupted) as end:
            go_on(folder) if attempt else start(tiny_config(folder, **ALL))
        assert pending == places[attempt + 1 :] and not (folder / "summary.json").exists()
        if kind == "stopped":
            assert end.value.code == 143
            assert checkpoint.latest_step(folder / "checkpoints" / phase) == step
    go_on(folder)
    assert outcome(folder) == outcome(whole)


def test_load_gives_what_fit_gave(cheap, tmp_path):
    trained = fit(tiny_config(tmp_path / "run"), console=Console(file=io.StringIO()))
    loaded = load.load(tmp_path / "run")
    assert (loaded.config, loaded.summary) == (trained.config, trained.summary)
    assert loaded.params.keys() == {"base", "gist", "lens"}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained.params)
    assert loaded.session(budget=20).config == dataclasses.replace(trained.config.session, budget=20)


@pytest.fixture
def starts(monkeypatch):
    """The state with which each phase of a run begins."""
    seen, run_phase = {}, loop.run_phase

    def spy(phase, state, *arguments, **keywords):
        seen[phase.name] = jax.device_get(state)  # the run gives its buffers away
        return run_phase(phase, state, *arguments, **keywords)

    monkeypatch.setattr(loop, "run_phase", spy)
    return seen


def test_each_phase_begins_with_the_lensnet_of_the_one_before(cheap, tmp_path, starts):
    trained = fit(tiny_config(tmp_path / "run", **ALL, **{"hyper.kl_weight": 0.5}), console=Console(file=io.StringIO()))
    taught, preferred = (saved_arrays(tmp_path / "run", phase, 5) for phase in ("distill", "lens"))
    first = starts["lens"]
    assert_saved(first.params["lens"], taught, "lens")
    assert_saved(first.anchor, taught, "lens")
    before = jax.tree.leaves(starts["distill"].params["lens"])
    assert int(first.step) == 0
    assert any((a != b).any() for a, b in zip(before, jax.tree.leaves(first.anchor), strict=True))
    assert_saved(starts["online"].params["lens"], preferred, "lens")
    rows = read_rows(tmp_path / "run")
    assert [row["phase"] for row in rows if "loss" in row] == [phase for phase in PHASES for _ in range(5)][1:]
    # Held-out losses after 3 steps and at the end.
    held_out = [(row["phase"], row["step"]) for row in rows if "eval/nll_policy" in row]
    assert held_out == [(phase, step) for phase in PHASES[2:] for step in (3, 5)]
    jax.tree.map(np.testing.assert_array_equal, load.load(tmp_path / "run").params, trained.params)


def test_each_phase_of_each_seed_reads_batches_of_its_own(cheap, tmp_path, monkeypatch):
    first, run_phase = {}, loop.run_phase

    def spy(phase, state, rows, **keywords):
        position = rows.get_state()
        first[keywords["config"].seed, phase.name] = next(rows)["tokens"].tobytes()
        rows.set_state(position)
        return run_phase(phase, state, rows, **keywords)

    monkeypatch.setattr(loop, "run_phase", spy)
    for seed in (0, 1):
        start(tiny_config(tmp_path / str(seed), seed=seed, **ALL))
    assert len(set(first.values())) == len(first) == 10


@pytest.mark.parametrize("trainable", [("lens",), ("lens", "gist")])
def test_a_gistnet_that_was_trained_is_read_by_all_phases_behind_it(cheap, tmp_path, starts, trainable):
    folder = tmp_path / "run"
    fit(tiny_config(folder, trainable=trainable, **{"gists.steps": 4}), console=Console(file=io.StringIO()))
    taught = saved_arrays(folder, "gists", 4)
    assert [name for name in starts] == ["pretrain", "gists", "lens"]
    assert set(starts["gists"].params) == {"gist"} and int(starts["gists"].step) == 0
    before, held = bits(starts["gists"].params["gist"]), saved_part(folder, "gist")
    assert before != held
    if "gist" in trainable:
        assert_saved(starts["lens"].params["gist"], taught, "gist")
    else:
        assert_saved(load.load(folder).params["gist"], taught, "gist")
    rows = [row for row in read_rows(folder) if row["phase"] == "gists" and "eval/gists/nll" in row]
    assert [row["step"] for row in rows] == [3, 4]


def test_without_a_kl_term_there_is_no_anchor(cheap, tmp_path, starts):
    start(tiny_config(tmp_path / "run", **{"distill.steps": 3}))
    assert starts["lens"].anchor is None


def test_a_run_may_end_with_what_a_teacher_taught(cheap, tmp_path, monkeypatch):
    """Without preferences; interrupted, and gone on with."""
    trained = fit(tiny_config(tmp_path / "whole", steps=0, **{"distill.steps": 5}), console=Console(file=io.StringIO()))
    assert {row["phase"] for row in read_rows(tmp_path / "whole")} == {"pretrain", "distill"}
    loaded = load.load(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained.params)
    assert_saved(loaded.params["lens"], saved_arrays(tmp_path / "whole", "distill", 5), "lens")
    assert "nll_policy" in trained.summary and trained.summary["steps"] == 0
    pending = [("saved", "pretrain", 4), ("step", "distill", 3), ("saved", "distill", 5)]

    def hook(*at):
        if at in pending:
            pending.remove(at)
            raise Killed

    hook_run(monkeypatch.setattr, hook)
    for resume in (False, True, True):
        with pytest.raises(Killed):
            fit(
                tiny_config(tmp_path / "cut", steps=0, **{"distill.steps": 5}),
                resume=resume,
                console=Console(file=io.StringIO()),
            )
    go_on(tmp_path / "cut")
    assert pending == [] and outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(whole):
    before = outcome(whole)
    go_on(whole)
    assert outcome(whole) == before


def test_another_seed_gives_another_run(whole, tmp_path):
    start(tiny_config(tmp_path / "run", seed=1, **ALL))
    ours, others = outcome(whole)["saved"], outcome(tmp_path / "run")["saved"]
    for phase in PHASES:
        assert ours[phase].keys() == others[phase].keys()
        assert ours[phase]["key"] != others[phase]["key"]
        assert ours[phase]["position"] == others[phase]["position"]


def test_a_folder_in_use_is_never_written_to(whole):
    before = contents(whole)
    with pytest.raises(FileExistsError, match=r"is not empty: choose another --output-dir, or go on .* --resume"):
        start(tiny_config(whole))
    assert contents(whole) == before


def test_a_patient_run_gives_its_best_models(cheap, tmp_path, monkeypatch):
    """What `cheap_programs` measures grows with every step: the first evaluation is the best one."""
    folder = tmp_path / "run"
    pending = [("saved", "pretrain", 2), ("saved", "lens", 2)]

    def hook(*at):
        if at in pending:
            pending.remove(at)
            raise Killed

    hook_run(monkeypatch.setattr, hook)
    config = tiny_config(folder, eval_steps=1, **{"stopping.patience": 1})
    with pytest.raises(Killed):
        start(config)
    with pytest.raises(Killed):
        go_on(folder)
    summary = go_on(folder)
    stops = {name: summary[name] for name in summary if name.endswith(("_stopped_at", "_kept_step"))}
    assert stops == {"pretrain_stopped_at": 2, "pretrain_kept_step": 1, "lens_stopped_at": 2, "lens_kept_step": 1}
    assert max(row["step"] for row in read_rows(folder)) == 2
    params = load.load(folder).params
    for phase, part in (("lens", "lens"), ("pretrain", "base")):
        assert_saved(params[part], saved_arrays(folder, phase, 1), part)
    assert bits(params["gist"]) == saved_part(folder, "gist")


def test_steps_0_only_pretrains_and_serves_as_a_base_run(whole, tmp_path):
    summary = start(tiny_config(tmp_path / "base", steps=0))
    assert {row["phase"] for row in read_rows(tmp_path / "base")} == {"pretrain"}
    assert checkpoint.steps(tmp_path / "base" / "checkpoints" / "pretrain") == [2, 4]
    assert not (tmp_path / "base" / "checkpoints" / "lens").exists()
    assert summary["steps"] == 0 and "nll_full" in summary and "nll_policy" not in summary
    config = tiny_config(tmp_path / "run", base_run=str(tmp_path / "base"))
    base = load.load_start(config, config.build_models())
    assert base is not None
    # The other run's GistNet has learned on.
    for name, folder in (("base", whole), ("gist", tmp_path / "base")):
        assert bits(base[name]) == saved_part(folder, name)


def test_undefined_values_are_strict_json(whole):
    summary = json.loads((whole / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["preference_corr_mean"] == "n/a"
    assert math.isfinite(summary["nll_policy"])


@pytest.mark.parametrize(
    ("phase", "step", "advice"),
    [
        ("pretrain", 4, "the last good checkpoint is {folder}/checkpoints/pretrain/2"),
        ("distill", 3, "the last good checkpoint is {folder}/checkpoints/distill/2"),
        ("lens", 1, "there is no checkpoint of this phase yet"),
        ("online", 3, "the last good checkpoint is {folder}/checkpoints/online/2"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run(cheap, tmp_path, monkeypatch, phase, step, advice):
    name = "train_step" if phase == "lens" else f"{phase}_step"
    module = {"pretrain": pretrain, "distill": distill, "lens": preference, "online": online}[phase]
    good = getattr(module, name)

    def bad(state, batch, frozen, **kwargs):
        after, metrics = good(state, batch, frozen, **kwargs)
        is_bad = after.step >= step
        params = jax.tree.map(lambda leaf: jnp.where(is_bad, math.nan, leaf), after.params)
        loss = jnp.where(is_bad, math.nan, metrics["loss"])
        return dataclasses.replace(after, params=params), metrics | {"loss": loss}

    monkeypatch.setattr(module, name, bad)
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError) as end:
        start(tiny_config(folder, **ALL))
    assert str(end.value).startswith(f"phase {phase}, step {step}: loss = nan; {advice.format(folder=folder)}")
    assert all_saved_are_finite(folder)
    assert not (folder / "summary.json").exists()
