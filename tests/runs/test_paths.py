"""Paths mean the same wherever they are given and whoever reads them."""

import os
from dataclasses import replace as changed
from pathlib import Path

import pytest

import lensjax as lx
from experiments import train
from lensjax._settings import replace
from lensjax.runs.config import Config
from lensjax.runs.store import config_file, paths, run_folder
from tests.runs import cheap_programs, start, tiny_config


@pytest.fixture(scope="module")
def cheap():
    with cheap_programs():
        yield


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home, and another folder to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def stored(folder):
    return config_file.load(run_folder.config_path(folder), Config)


def test_d8_1_an_output_folder_from_a_home_on(cheap, home):
    start(tiny_config(Path("~/x")))
    assert (home / "x" / "summary.json").is_file() and not Path("~").exists()
    assert stored(home / "x").output_dir == str(home / "x")
    assert lx.load("~/x").config.output_dir == str(home / "x")


def test_d8_2_d8_3_base_runs_and_resumed_ones_from_a_home_on(cheap, home):
    start(tiny_config("~/base", steps=0))
    start(tiny_config("runs/a", base_run="~/base"))
    run = home.parent / "work" / "runs" / "a"
    assert (stored(run).base_run, stored(run).output_dir) == (str(home / "base"), str(run))
    start(tiny_config("~/b", start_from="runs/a"))
    assert stored(home / "b").start_from == str(run)
    for words in (["--resume", "~/b"], ["--resume=~/b"]):
        config, resume = train.parse(words)
        assert resume and config.output_dir == str(home / "b")


def test_d8_a_relative_run_goes_on_from_elsewhere(cheap, home, monkeypatch):
    start(tiny_config("base", steps=0))
    start(tiny_config("a", base_run="base"))
    run = Path("a").absolute()
    monkeypatch.chdir(home)
    config, _ = train.parse(["--resume", os.path.relpath(run)])
    start(config, resume=True)
    assert stored(run).data.cache == str(run.parent / "runs" / ".tokens")


def test_d8_all_paths_of_a_configuration_are_resolved(home):
    text = {"data.task": "text", "data.path": "~/notes/**/*.md", "data.tokenizer": "~/t.json", "data.cache": "~/c"}
    config = replace(Config(), output_dir="o", base_run="~/b", **text)
    resolved = paths.resolved(config)
    assert (resolved.output_dir, resolved.base_run) == (str(home.parent / "work" / "o"), str(home / "b"))
    assert resolved.data == changed(
        config.data, path=f"{home}/notes/**/*.md", tokenizer=f"{home}/t.json", cache=f"{home}/c"
    )
    weights = paths.resolved(replace(Config(), **{"checkpoint.path": "~/w.gguf"}))
    assert weights.checkpoint.path == f"{home}/w.gguf" and paths.resolved(weights) == weights


@pytest.mark.parametrize("name", paths.NAMES)
def test_d8_5_nobodys_home_is_named_with_its_field(name):
    is_data = {"data.task": "text", "data.path": "."} if name.startswith("data.") else {}
    config = replace(Config(), **{**is_data, name: "~nosuchuser/x"})
    with pytest.raises(
        ValueError, match=f"^{name} is '~nosuchuser/x', and ~nosuchuser is no user's home: write"
    ) as told:
        paths.resolved(config)
    assert "\n" not in str(told.value)


def test_d8_5_on_the_command_line(home):
    with pytest.raises(SystemExit, match=r"^error: data.path is '~nosuchuser/x', and ~nosuchuser is no user's home"):
        train.main(["--data.task", "text", "--data.path", "~nosuchuser/x", "--output-dir", "o"])
    with pytest.raises(SystemExit, match=r"^error: --resume is '~nosuchuser/x'"):
        train.main(["--resume", "~nosuchuser/x"])
    assert not list(Path().iterdir())


def test_an_empty_path_is_no_folder(home):
    with pytest.raises(ValueError, match="base_run must name a file or folder, got an empty string"):
        paths.resolved(replace(Config(), base_run=""))
