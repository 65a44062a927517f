import json
import os
import platform
import shutil
import subprocess
import sys

import jax
import pytest

from lensjax._settings import replace
from lensjax.runs.config import Config
from lensjax.runs.store import run_folder
from lensjax.runs.store.config_file import load
from tests.runs import TINY

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.mark.parametrize("exists", [False, True])
def test_create_writes_config_and_environment(tmp_path, monkeypatch, exists):
    monkeypatch.setattr(sys, "argv", ["experiments/train.py", "--seed", "7"])
    monkeypatch.setenv("XLA_FLAGS_TEST", "1")
    config = replace(Config(), **{"seed": 7, "hyper.temperature": 0.5})
    if exists:
        (tmp_path / "a" / "run").mkdir(parents=True)
    folder = run_folder.create_run(tmp_path / "a" / "run", config)
    assert folder == tmp_path / "a" / "run"
    assert load(folder / "config.json", Config) == config
    (environment,) = json.loads((folder / "environment.json").read_text())
    assert environment["seed"] == 7
    assert environment["command"] == ["experiments/train.py", "--seed", "7"]
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["jax"] == jax.__version__
    packages = {"lensjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"}
    assert set(environment["packages"]) == packages
    assert all(environment["packages"].values())
    assert environment["devices"] == [device.device_kind for device in jax.devices()]
    assert environment["backend"] == jax.default_backend() and environment["cpu_count"] == os.cpu_count()
    assert environment["variables"]["XLA_FLAGS_TEST"] == "1"
    assert all(name.startswith(("JAX_", "XLA_")) for name in environment["variables"])


def test_create_refuses_a_folder_in_use(tmp_path):
    run_folder.create_run(tmp_path / "run", Config())
    before = (tmp_path / "run" / "config.json").read_bytes()
    message = r"run is not empty: choose another --output-dir, or go on with that run by --resume .*run"
    with pytest.raises(FileExistsError, match=message):
        run_folder.create_run(tmp_path / "run", Config(seed=1))
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is not a folder: choose another --output-dir"):
        run_folder.create_run(tmp_path / "file", Config())


def test_open_accepts_the_same_config_even_in_a_moved_folder(tmp_path):
    config = Config(output_dir=str(tmp_path / "run"), trainable=("base", "lens"))
    folder = run_folder.create_run(config.output_dir, config)
    assert run_folder.open_run(folder, config) == folder
    moved = folder.rename(tmp_path / "moved")
    assert run_folder.open_run(moved, replace(config, output_dir=str(moved))) == moved


def test_open_names_every_difference(tmp_path):
    config = replace(Config(), **{"steps": 60, "hyper.temperature": 2.0, "data.max_files": 4})
    run_folder.create_run(tmp_path, config)
    with pytest.raises(ValueError, match="another configuration") as error:
        run_folder.open_run(
            tmp_path, replace(config, **{"steps": 50, "hyper.temperature": 3.0, "data.max_files": None})
        )
    message = str(error.value)
    assert "steps is 60 in the run and 50 now" in message
    assert "hyper.temperature is 2.0 in the run and 3.0 now" in message
    assert "data.max_files is 4 in the run and None now" in message
    assert message.count(" in the run ") == 3 and str(tmp_path) in message


def test_open_refuses_a_folder_without_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"holds no run .*name the folder of a run"):
            run_folder.open_run(folder, Config())
    (tmp_path / "config.json").write_text('{"format": 2, "sede": 1}')
    with pytest.raises(ValueError, match="unknown key sede"):
        run_folder.open_run(tmp_path, Config())


@needs_git
def test_git_state_is_that_of_the_code_that_runs(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    code = tmp_path / "code.py"
    code.write_text("1")
    monkeypatch.setattr(run_folder, "__file__", str(code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_folder._git_state() is None  # no repository
    git("init", "--quiet")
    (tmp_path / "other.py").write_text("1")
    git("add", "other.py")
    git("commit", "--quiet", "--no-verify", "--message", "other")
    assert run_folder._git_state() is None  # a repository, which does not hold the code
    git("add", "code.py")
    git("commit", "--quiet", "--no-verify", "--message", "code")
    commit = git("rev-parse", "HEAD")
    assert run_folder._git_state() == {"commit": commit, "is_dirty": False}
    (tmp_path / "untracked").write_text("1")
    assert run_folder._git_state() == {"commit": commit, "is_dirty": False}
    code.write_text("2")
    assert run_folder._git_state() == {"commit": commit, "is_dirty": True}


def test_git_state_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_folder._git_state() is None


@pytest.mark.parametrize("left", [["environment.json"], [".lock", ".tmp-config.json"], [".lock", "environment.json"]])
def test_d9_1_a_folder_whose_run_never_began_is_free(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    assert not run_folder.has_begun(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"holds no run \(config.json is missing\): it never began; start it wit"
    ):
        run_folder.config_path(tmp_path)
    run_folder.create_run(tmp_path, Config())
    assert run_folder.has_begun(tmp_path)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_d9_1_the_config_is_what_makes_a_folder_a_run(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def environment(config):
        raise Killed

    monkeypatch.setattr(run_folder, "environment", environment)
    with pytest.raises(Killed):
        run_folder.create_run(tmp_path / "run", Config())
    assert run_folder.open_run(tmp_path / "run", Config()) == tmp_path / "run"


def test_d9_1_advice_on_a_folder_without_a_run_is_not_to_resume_it(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"is not empty: choose another --output-dir$"):
        run_folder.create_run(tmp_path, Config())


def test_e7_each_start_has_its_entry_and_says_what_differs(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    run_folder.create_run(tmp_path, Config())
    assert run_folder.add_environment(tmp_path, Config()) == []
    monkeypatch.setattr(sys, "argv", ["another"])
    monkeypatch.setenv("XLA_FLAGS", "--xla")
    monkeypatch.setattr(run_folder, "__version__", "9.9")
    told = run_folder.add_environment(tmp_path, Config())
    assert told[1] == "variables.XLA_FLAGS is --xla now and was unset"
    assert len(told) == 2 and told[0].startswith("packages.lensjax is 9.9 now and was 0.")
    entries = json.loads((tmp_path / "environment.json").read_text())
    assert [entry["command"][0] for entry in entries][-1] == "another" and len(entries) == 3


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", "\udcff"])
def test_e7_a_damaged_list_of_starts_stops_no_run(tmp_path, text):
    run_folder.create_run(tmp_path, Config())
    (tmp_path / "environment.json").write_text(text, errors="surrogateescape")
    assert run_folder.add_environment(tmp_path, Config()) == []
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


@pytest.mark.parametrize("text", ["", "5", "[5]", "[" * 100_000])
def test_damaged_files_of_notes_stop_no_run(tmp_path, text):
    config = Config(output_dir=str(tmp_path / "run"))
    folder = run_folder.create_run(tmp_path / "run", config)
    (folder / "environment.json").write_text(text)
    (folder / "summary.json").write_text(text)
    assert run_folder.add_environment(folder, config) == [] and run_folder.read_summary(folder) == {}
    assert len(json.loads((folder / "environment.json").read_text())) == 1


def test_a_folder_without_a_run_names_one_around_it(tmp_path):
    run = run_folder.create_run(tmp_path / "runs" / "mine", TINY)
    for near in (tmp_path / "runs", run / "checkpoints"):
        near.mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=rf"holds no run .*: name the folder of a run, such as {run}$"):
            run_folder.config_path(near)
    with pytest.raises(FileNotFoundError, match=r"name the folder of a run$"):
        run_folder.config_path(tmp_path)
