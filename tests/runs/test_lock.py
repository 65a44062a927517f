"""One run, one process: who has a folder, and what releases it."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lensjax._settings import replace
from lensjax.runs.folder import open_run
from lensjax.runs.store import lock
from tests.runs import ROOT, cheap_programs, contents, go_on, hook_run, run_script, start, tiny_config

_HOLD = """
import sys, time
from pathlib import Path
from lensjax.runs.store import lock
held = lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def cheap():
    with cheap_programs():
        yield


@pytest.fixture(scope="module")
def finished(cheap, tmp_path_factory):
    """A run that is at its end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    start(tiny_config(folder))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished, tmp_path / "run")


def test_d6_1_a_second_process_is_told_who_has_the_run(run):
    with subprocess.Popen([sys.executable, "-c", _HOLD, run], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = contents(run)
        with pytest.raises(BlockingIOError, match=f"run is in use by process {other.pid} on .*: wait until"):
            go_on(run)
        assert contents(run) == before
        with pytest.raises(FileExistsError, match="is not empty"):
            start(tiny_config(run))
        other.send_signal(signal.SIGKILL)
    go_on(run)  # death has released it
    assert not (run / lock.FILE).exists()


def test_d6_2_a_run_that_goes_on_is_refused_to_another_of_its_process(run, monkeypatch):
    shutil.rmtree(run / "checkpoints" / "lens" / "5")
    told = []

    def hook(place, phase, step):
        if place == "step":
            with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} ") as refused:
                go_on(run)
            told.append(refused)

    hook_run(monkeypatch.setattr, hook)
    go_on(run)
    assert len(told) == 1


def test_d6_of_two_that_begin_at_once_one_gets_the_folder(tmp_path):
    both, done = threading.Barrier(2), threading.Barrier(2)

    def attempt(_):
        both.wait()
        try:
            held = lock.take(tmp_path)
        except BlockingIOError:
            held = None
        done.wait()
        if held is not None:
            held.release()
        return held is not None

    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            assert sorted(pool.map(attempt, range(2))) == [False, True]
    assert not (tmp_path / lock.FILE).exists()


def test_d6_a_file_system_without_locks_is_said(run, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(lock._NO_LOCKS[0], "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    held = lock.take(run)
    assert not held.is_exclusive
    held.release()


def test_d6_a_lock_lasts_as_long_as_its_run_is_open(cheap, tmp_path):
    class Told:
        def out(self, text, **_):
            pass

    config = tiny_config(tmp_path / "run")
    with open_run(config, {"lens": "steps"}, resume=False, console=Told()) as (folder, _, claim):
        with pytest.raises(BlockingIOError, match="in use"):
            lock.require_free(folder)
        claim.require()
    lock.require_free(folder)
    with pytest.raises(FileExistsError, match=r"not empty: .* --resume"):
        start(replace(config, seed=3))


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_e6_a_run_whose_folder_is_gone_stops(cheap, tmp_path, monkeypatch, how):
    folder = tmp_path / "run"

    def hook(place, phase, step):
        if (place, phase, step) == ("step", "lens", 3) and not (tmp_path / "moved").exists():
            if how == "deleted":
                shutil.rmtree(folder)
                return
            folder.rename(tmp_path / "moved")
            if how == "replaced":
                shutil.copytree(tmp_path / "moved", folder)

    hook_run(monkeypatch.setattr, hook)
    with pytest.raises(FileNotFoundError, match="is no longer the folder of this run: it was deleted, moved or repl"):
        start(tiny_config(folder))
    assert not (folder / "summary.json").exists()
    assert not (folder / "checkpoints" / "lens" / "4").exists()
    if how != "replaced":
        assert not folder.exists()
    if how == "moved":
        go_on(tmp_path / "moved")


@pytest.mark.slow
def test_d6_1_two_processes_on_one_run(tmp_path, programs):
    config = tmp_path / "run"
    with cheap_programs():
        start(tiny_config(config))
    shutil.rmtree(config / "checkpoints" / "lens" / "5")
    held = lock.take(config)
    refused = run_script("--resume", config, cache=programs)
    assert refused.returncode == 1 and f"is in use by process {os.getpid()} on" in refused.stderr
    assert refused.stderr.count("\n") == 1
    held.release()
    assert run_script("--resume", config, cache=programs).returncode == 0
