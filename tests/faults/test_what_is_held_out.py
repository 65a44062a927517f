"""Whole runs on text: what a run writes is never read by it, and what is held out is never trained on."""

import pytest

from lensjax._settings import replace
from lensjax.runs.data.task import DataConfig
from tests.runs import (
    Killed,
    cheap_programs,
    contents,
    go_on,
    hook_run,
    outcome,
    request_stop,
    start,
    tiny_config,
    write_corpus,
)


@pytest.fixture(scope="module", autouse=True)
def cheap():
    with cheap_programs():
        yield


def killed(config, monkeypatch, *at, by):
    def hook(*place):
        if place == at:
            if by is Killed:
                raise Killed
            request_stop()

    with monkeypatch.context() as patch, pytest.raises((Killed, SystemExit)):
        hook_run(patch.setattr, hook)
        start(config)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "by"), [("", Killed), ("**/*", request_stop)])
def test_d2_1_a_run_in_its_corpus_goes_on_as_if_it_were_elsewhere(tmp_path, monkeypatch, pattern, by):
    for folder in ("apart", "within"):
        (tmp_path / folder).mkdir()
        write_corpus(tmp_path / folder / "n")
    here = {"data.path": str(tmp_path / "apart/n" / pattern)}
    start(config_of(tmp_path / "whole", **here))
    inside = tmp_path / "within/n/runs/a"
    here = {"data.path": str(tmp_path / "within/n" / pattern)}
    killed(config_of(inside, **here), monkeypatch, "step", "lens", 4, by=by)
    go_on(inside)
    assert outcome(inside) == outcome(tmp_path / "whole")
    # Nor does a second run read the first one.
    start(config_of(tmp_path / "within/n/runs/two", **here))
    assert outcome(tmp_path / "within/n/runs/two") == outcome(tmp_path / "whole")


def config_of(folder, **changes):
    return replace(tiny_config(folder, folder), **changes)


@pytest.mark.slow
def test_d3_1_links_change_no_run(tmp_path):
    notes = write_corpus(tmp_path / "notes")
    config = config_of(tmp_path / "a", **{"data.path": str(notes / "**/*.txt")})
    start(config)
    (notes / "sub").mkdir()
    for link in ("loop", "sub/back"):
        (notes / link).symlink_to(notes)
    start(replace(config, output_dir=str(tmp_path / "b")))
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "notes", "split_by": "folder"}, "no file with text in it under"),
        ({"path": "/dev/zero"}, "neither a file nor a folder"),
        ({"path": "notes/0.txt"}, "holds 0 tokens|does not exist"),
        ({"path": "notes", "max_files": 1}, "split 'test' holds"),
        ({"path": "~nosuchuser"}, "is no user's home"),
    ],
)
def test_d2_4_a_corpus_that_is_refused_leaves_no_folder(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "notes")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        start(replace(tiny_config(tmp_path / "run"), data=DataConfig(task="text", **data)))
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()
    assert "\n" not in str(error.value)
