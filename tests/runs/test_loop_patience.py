"""With patience a run ends where it no longer improves, and gives back its best state."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from lensjax.runs.data import batches as data
from lensjax.runs.engine import loop
from lensjax.runs.engine.stopping import StoppingConfig
from lensjax.runs.store import checkpoint
from tests.runs import Killed, request_stop
from tests.toy_run import CONFIG, Run, init_state, start_and_interrupt, toy_step


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Run(tmp_path / "run", monkeypatch)


# Held-out losses by step: the best one is that of step 4, and of the two after it none is better.
SCHEDULE = {2: 3.0, 4: 1.5, 6: 2.0, 8: 1.75, 10: 0.5, 12: 0.25}
PATIENT = replace(CONFIG, steps=12, logging_steps=5, eval_steps=2, save_steps=1, stopping=StoppingConfig(patience=2))


def by_schedule(state):
    return {"nll": SCHEDULE[int(state.step)]}


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(replace(state, key=jax.random.key_data(state.key)))]


def by_hand(steps):
    """The state after some steps."""
    state, batches, step = init_state(), data.make_iterator(CONFIG, "train", seed=3, batch_size=2), jax.jit(toy_step)
    for _ in range(steps):
        state, _ = step(state, {"tokens": next(batches)["tokens"]}, {})
    return state


def waited(run):
    """The newest checkpoint, and what it knows of the evaluations before it."""
    newest = checkpoint.latest_step(run.checkpoints)
    return newest, checkpoint.data_state(run.checkpoints, newest).get("stopping")


def test_patience_ends_a_run_and_gives_back_its_best_state(run):
    run.config = PATIENT
    state, seconds = run.start(evaluate=by_schedule)
    assert bits(state) == bits(by_hand(4))
    # The best checkpoint is there beside the three newest; the one that was the best before it is not.
    assert checkpoint.steps(run.checkpoints) == [4, 6, 7, 8]
    assert waited(run) == (8, {"score": 1.5, "step": 4, "waited": 2})
    assert loop.kept_step(run.checkpoints) == 4
    assert run.output.getvalue().splitlines()[-1] == "lens ended at step 8 of 12 and keeps step 4, nll 1.500"
    before = run.rows()
    again, same = run.start(evaluate=by_schedule, step=None)  # there is nothing to compile
    assert bits(again) == bits(state) and run.rows() == before and waited(run)[0] == 8
    assert same == checkpoint.data_state(run.checkpoints, 8)["seconds"] <= seconds


def test_what_improves_is_saved_though_no_save_is_due(run):
    run.config = replace(PATIENT, save_steps=100)
    state, _ = run.start(evaluate=by_schedule)
    assert bits(state) == bits(by_hand(4))
    assert checkpoint.steps(run.checkpoints) == [2, 4, 8]


def test_patience_that_does_not_run_out_gives_back_the_best_state_too(run):
    run.config = replace(PATIENT, steps=9, eval_steps=4, save_steps=100, stopping=StoppingConfig(patience=3))
    state, _ = run.start(evaluate=lambda state: {"nll": {4: 2.0, 8: 1.0, 9: 1.5}[int(state.step)]})
    assert bits(state) == bits(by_hand(8)) and checkpoint.steps(run.checkpoints) == [4, 8, 9]
    again, _ = run.start(step=None)
    assert bits(again) == bits(state)


def test_a_small_improvement_is_none_where_more_is_asked_for(run):
    run.config = replace(PATIENT, stopping=StoppingConfig(patience=2, min_improvement=1.5))
    state, _ = run.start(evaluate=by_schedule)
    assert bits(state) == bits(by_hand(2)) and waited(run) == (6, {"score": 3.0, "step": 2, "waited": 2})


@pytest.mark.parametrize("kind", ["killed", "stopped"])
@pytest.mark.parametrize("place", ["batch", "evaluate", "in save", "saved"])
def test_a_patient_run_that_is_interrupted_at_every_step_stops_at_the_same_one(tmp_path, monkeypatch, kind, place):
    whole, run = Run(tmp_path / "whole", monkeypatch, PATIENT), Run(tmp_path / "run", monkeypatch, PATIENT)
    expected, done = whole.start(evaluate=by_schedule)[0], set()

    def kill():
        raise Killed

    while True:
        try:
            interrupt = kill if kind == "killed" else request_stop
            state, _ = start_and_interrupt(run, place, interrupt, done, evaluate=by_schedule)
            break
        except (Killed, loop.Interrupted):
            assert max(done) <= 8
    assert len(done) == (4 if place == "evaluate" else 8)
    assert bits(state) == bits(expected)
    assert run.rows() == whole.rows() and waited(run) == waited(whole)


@pytest.mark.parametrize("report", [{"loss": 1.0}, {"nll": math.nan}])
def test_an_evaluation_without_the_metric_to_monitor_is_refused(run, monkeypatch, report):
    monkeypatch.setattr("lensjax.runs.store.log.check_finite", lambda rows, advice: None)
    run.config = PATIENT
    with pytest.raises(ValueError, match=r"phase lens monitors nll, and its evaluation gives no such number: \{'"):
        run.start(evaluate=lambda state: report)


def test_without_patience_nothing_is_monitored(run):
    run.start(evaluate=lambda state: {"loss": 1.0})
    assert checkpoint.data_state(run.checkpoints, 7).keys() == {"batches", "rows", "seconds"}
    assert loop.kept_step(run.checkpoints) == 7 and loop.kept_step(run.folder) is None
