"""Which checkpoints are whole, found and moved."""

import os
import shutil

import numpy as np
import pytest

from lensjax.runs.engine import loop, recovery
from lensjax.runs.store import checkpoint, run_folder
from lensjax.runs.store.checkpoint import DamagedError

PHASES = ("first", "second")


def fill(run_dir, phase, steps, *, best=None):
    directory = run_folder.checkpoint_dir(run_dir, phase)
    for step in steps:
        stopping = {} if best is None or best > step else {"stopping": {"score": 1.0, "step": best, "waited": 0}}
        checkpoint.save(directory, step, {"a": np.full(3, step)}, data_state=stopping, spare=best)
    return directory


def spoil(directory, *steps):
    for step in steps:
        (directory / str(step) / "SHA256SUMS").unlink()


def test_e1_several_damaged_checkpoints_in_a_row(tmp_path):
    directory = fill(tmp_path, "first", (1, 2, 3))
    spoil(directory, 2, 3)
    found = recovery.newest(directory)
    assert (found.step, found.kept) == (1, 1) and [damage.folder.name for damage in found.damages] == ["3", "2"]
    lines = recovery.plan(tmp_path, PHASES).repair()
    assert [line.partition(" is damaged: SHA256SUMS is missing; ")[2] for line in lines] == [
        f"it was moved to .damaged-{step}, and first goes on from step 1" for step in (3, 2)
    ]
    assert recovery.plan(tmp_path, PHASES).restored == ("first", 1)
    assert sorted(os.listdir(directory)) == [".damaged-2", ".damaged-3", "1"]
    assert recovery.plan(tmp_path, PHASES).repair() == []


def test_e1_a_whole_run_is_left_alone(tmp_path):
    directory = fill(tmp_path, "first", (1, 2), best=1)
    assert recovery.plan(tmp_path, PHASES).repair() == [] and recovery.plan(tmp_path / "nowhere", PHASES).repair() == []
    assert recovery.newest(directory) == recovery.Found(2, 1, ()) and loop.kept_step(directory) == 1


def test_e1_without_anything_whole_nothing_is_moved(tmp_path):
    spoil(fill(tmp_path, "first", (1,)), 1)
    second = fill(tmp_path, "second", (1,))
    shutil.rmtree(second)
    with pytest.raises(DamagedError, match="start anew where this phase begins"):
        recovery.plan(tmp_path, PHASES).repair()
    with pytest.raises(DamagedError):
        loop.kept_step(run_folder.checkpoint_dir(tmp_path, "first"))
    assert checkpoint.steps(run_folder.checkpoint_dir(tmp_path, "first")) == [1]


@pytest.mark.parametrize("is_gone", [False, True])
def test_e1_a_checkpoint_whose_best_step_is_lost_does_not_count(tmp_path, is_gone, caplog):
    directory = fill(tmp_path, "first", (1, 2, 3), best=2)
    if is_gone:
        shutil.rmtree(directory / "2")
    else:
        spoil(directory, 2)
    assert loop.kept_step(directory) == 1
    what = "is missing" if is_gone else "is damaged: SHA256SUMS is missing"
    assert f"3 is damaged: the checkpoint of its best step, 2, {what}; step 1 is read instead" in caplog.text
    assert len(recovery.plan(tmp_path, PHASES).repair()) == (1 if is_gone else 2)
    assert checkpoint.steps(directory) == [1]
