"""A run whose numbers are not finite stops, and goes on from what was good."""

import functools
import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from lensjax.runs.store import checkpoint
from tests.toy_run import CONFIG, Run, faulty_step


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Run(tmp_path / "run", monkeypatch)


@pytest.mark.parametrize(
    ("faults", "changes", "message", "saved"),
    [
        ({"loss": (5, math.nan)}, {}, "phase lens, step 5: loss = nan; the last good checkpoint is {folder}/3", [3]),
        ({"loss": (1, math.nan)}, {}, "phase lens, step 1: loss = nan; there is no checkpoint of this phase yet", []),
        (
            {"loss": (4, math.inf), "mc/rank_loss": (4, math.nan), "grad_norm": (6, math.nan)},
            {},
            "phase lens, step 4: loss = inf, mc/rank_loss = nan; the last good checkpoint is {folder}/3",
            [3],
        ),
        # Nothing is logged before the checkpoint: what is saved must have been looked at.
        (
            {"grad_norm": (2, -math.inf)},
            {"logging_steps": 100, "eval_steps": 100},
            "phase lens, step 2: grad_norm = -inf; there is no checkpoint",
            [],
        ),
        # Nothing is logged or saved before the evaluation, which must not be of parameters that went bad.
        (
            {"loss": (2, math.nan)},
            {"logging_steps": 100, "save_steps": 100},
            "phase lens, step 2: loss = nan; there is no checkpoint",
            [],
        ),
        # Only the last step is bad, and nothing but the end of the phase looks at it.
        (
            {"loss": (7, math.nan)},
            {"logging_steps": 100, "eval_steps": 100},
            "phase lens, step 7: loss = nan; the last good checkpoint is {folder}/6",
            [3, 6],
        ),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(run, faults, changes, message, saved):
    run.config = replace(CONFIG, **changes)
    evaluated = []
    with pytest.raises(FloatingPointError) as error:
        run.start(
            step=functools.partial(faulty_step, faults=faults),
            evaluate=lambda state: evaluated.append(int(state.step)) or {"nll": 1.0},
        )
    assert str(error.value).startswith(message.format(folder=run.checkpoints))
    assert checkpoint.steps(run.checkpoints) == saved
    first = min(step for step, _ in faults.values())
    assert all(step < first for step in evaluated)


def test_a_held_out_loss_that_is_not_finite_stops_the_run(run):
    def evaluate(state):
        return {"nll": math.nan if int(state.step) == 6 else 1.0}

    with pytest.raises(FloatingPointError, match=r"phase lens, step 6: eval/nll = nan; the last good .*/lens/3"):
        run.start(evaluate=evaluate)
    assert checkpoint.steps(run.checkpoints) == [3]


def test_histograms_pass_the_check_of_every_step(run):
    step = functools.partial(faulty_step, faults={"mc/adv_histogram": (1, np.ones(42, np.float32))})
    run.start(step=step)
    assert run.rows() and not any("mc/adv_histogram" in row for row in run.rows())


def test_undefined_correlations_do_not_stop_the_run(run):
    name = "mc/preference_corr_mean"
    step = functools.partial(faulty_step, faults={name: (1, math.nan)})
    run.start(step=step, evaluate=lambda state: {name: math.nan})
    assert {row.get(name, row.get(f"eval/{name}")) for row in run.rows()} == {"n/a"}
    text = (run.folder / "metrics.jsonl").read_text()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())


def test_a_run_with_a_fault_goes_on_from_the_good_checkpoint(run, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError):
        run.start(step=functools.partial(faulty_step, faults={"loss": (5, math.nan)}))
    assert "nan" in [row.get("loss") for row in run.rows()]
    run.start()
    whole = Run(tmp_path / "whole", monkeypatch)
    whole.start()
    assert run.result() == whole.result()


def test_d14_1_what_is_undefined_is_no_fault_where_jax_looks_for_nan(run):
    faults = {"mc/preference_corr_mean": (1, math.nan)}
    with jax.debug_nans(True):
        run.start(step=functools.partial(faulty_step, faults=faults))
    assert {row["mc/preference_corr_mean"] for row in run.rows() if "loss" in row} == {"n/a"}


def test_d14_1_what_is_a_fault_is_named_where_jax_looks_for_nan(run):
    faults = {"loss": (4, math.nan)}
    with (
        jax.debug_nans(True),
        pytest.raises(FloatingPointError, match=r"^phase lens, step 4: loss = nan; the last good"),
    ):
        run.start(step=functools.partial(faulty_step, faults=faults))


@pytest.mark.parametrize(
    ("damage", "there"),
    [
        (lambda lines: [], 0),
        (None, 0),
        (lambda lines: [*lines[:-1], lines[-1][:-1]], 3),
        (lambda lines: [lines[0], *lines[2:]], 3),
        (lambda lines: [lines[0], *lines], 5),
        (lambda lines: [lines[0].replace("loss", "lost"), *lines[1:]], 4),
    ],
    ids=["emptied", "deleted", "cut", "a line taken out", "a line twice", "another word"],
)
def test_e3_d9_5_lost_rows_and_strange_ones_are_said(run, damage, there):
    run.config = replace(CONFIG, logging_steps=1)
    with pytest.raises(InterruptedError):
        run.start(hook=_fail_at("batch", 4))
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 4  # three steps and an evaluation
    path.unlink()
    if damage is not None:
        path.write_text("".join(damage(lines)))
    run.start()
    what = {4: "not all of them are as they were written", 5: "others were added by hand"}.get(there, "the others are")
    said = f"warning: metrics.jsonl holds {there} of the 4 rows of phase lens up to step 3: {what}"
    assert said in run.output.getvalue()
    run.start()  # it is said once
    assert run.output.getvalue().count("warning") == 1


def _fail_at(*where):
    def hook(*at):
        if at == where:
            raise InterruptedError

    return hook
