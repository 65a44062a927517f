"""Whether what is gone on with is the run that it was: configuration, data, weights, checkpoints."""

import io
import json
import shutil

import pytest
from rich.console import Console

from lensjax.runs.config import STEPS, Config
from lensjax.runs.fit import fit
from lensjax.runs.store import checkpoint, config_file, identity
from tests.runs import (
    Killed,
    cheap_programs,
    contents,
    go_on,
    hook_run,
    outcome,
    start,
    tiny_config,
    write_corpus,
)


@pytest.fixture(scope="module")
def cheap():
    with cheap_programs():
        yield


def killed(config, place=("step", "lens", 5)):
    """A run that is killed."""

    def hook(*at):
        if at == place:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        hook_run(patch.setattr, hook)
        with pytest.raises(Killed):
            start(config)


@pytest.fixture(scope="module")
def interrupted(cheap, tmp_path_factory):
    """A run on a corpus, killed with its newest checkpoint at 4 of 5, and the corpus."""
    folder = tmp_path_factory.mktemp("interrupted")
    corpus = write_corpus(folder / "corpus")
    killed(tiny_config(folder / "run", corpus))
    return folder


@pytest.fixture
def run(interrupted, tmp_path):
    """A copy of that run, with a corpus of its own."""
    shutil.copytree(interrupted / "corpus", tmp_path / "corpus")
    run = shutil.copytree(interrupted / "run", tmp_path / "run")
    edit(run, **{"data.path": str(tmp_path / "corpus")})
    return run


def edit(run, **changes):
    """Changes a run's `config.json` by hand."""
    file = run / "config.json"
    stored = json.loads(file.read_text())
    for name, value in changes.items():
        section = stored
        *sections, last = name.split(".")
        for one in sections:
            section = section[one]
        section[last] = value
    file.write_text(json.dumps(stored))


def resumed(run):
    """What a resumed run says."""
    console = Console(file=io.StringIO(), width=1000)
    config = config_file.load(run / "config.json", Config)
    fit(config.__class__(**{**vars(config), "output_dir": str(run)}), resume=True, console=console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        ("D4.1", {"seed": 7}, "seed is 7 now and was 0"),
        ("D4.3", {"hyper.learning_rate": 0.5}, r"hyper.learning_rate is 0.5 now and was 0.0\d+"),
        ("D4.4", {"steps": 3}, "steps is 3 now and was 5"),
        ("D4.5", {"data.task": "recall", "data.path": None}, "data.task is recall now and was text; the data are oth"),
        ("D4", {"pretrain.steps": 9}, r"pretrain.steps is 9 now and was 4 \(that phase is over, and later ones began"),
        ("D4", {"pretrain.learning_rate": 0.125, "eval_batches": 1}, r"eval_batches is 1 .*; pretrain.learning_rate i"),
        ("D4", {"trainable": ["gist", "lens"]}, r'trainable is \["gist", "lens"\] now and was \["lens"\]'),
    ],
)
def test_d4_1_to_d4_5_another_configuration_is_named(run, number, changes, message):
    edit(run, **changes)
    before = contents(run)
    with pytest.raises(ValueError, match=message) as error:
        go_on(run)
    told = str(error.value)
    assert "\n" not in told and str(run) in told and "more steps, other folders" in told
    assert contents(run) == before


def test_d4_7_files_that_were_rewritten_are_other_data(run):
    for name in sorted((run.parent / "corpus").iterdir())[:2]:
        name.write_text(name.read_text().upper())
    before = contents(run)
    with pytest.raises(ValueError, match=r"the data are others \(SHA-256 [0-9a-f]{64} now and [0-9a-f]{64} before\)"):
        go_on(run)
    assert contents(run) == before


def test_d4_a_corpus_that_moved_and_was_touched_is_the_same(run, interrupted):
    moved = (run.parent / "corpus").rename(run.parent / "elsewhere")
    for path in moved.iterdir():
        path.touch()
    edit(run, **{"data.path": str(moved), "logging_steps": 1, "save_steps": 3})
    told = resumed(run)
    assert f"data.path is {moved} now and was {interrupted}/corpus" in told
    assert "save_steps is 3 now and was 2" in told
    whole = run.parent / "whole"
    start(tiny_config(whole, moved))
    ours, theirs = outcome(run), outcome(whole)
    assert ours == theirs


def test_d4_more_steps_go_on(run):
    edit(run, steps=8)
    assert "steps is 8 now and was 5" in resumed(run)
    assert checkpoint.latest_step(run / "checkpoints" / "lens") == 8
    stored = checkpoint.identity(run / "checkpoints" / "lens", 8)
    assert stored["config"]["steps"] == 8
    edit(run, **{"online.steps": 5})  # one more phase
    assert "online.steps is 5 now and was 0" in resumed(run)
    edit(run, steps=9)
    with pytest.raises(ValueError, match=r"steps is 9 now and was 8 \(that phase is over"):
        go_on(run)


def test_d4_the_identity_is_in_every_checkpoint(run):
    config = config_file.load(run / "config.json", Config)
    for folder in (run / "checkpoints").rglob("manifest.json"):
        stored = checkpoint.identity(folder.parents[1], int(folder.parent.name))
        assert stored["config"].keys() == identity.flat(config).keys()
        assert stored["config"]["seed"] == 0 and len(stored["data"]) == 64 and stored["weights"] is None


def test_d4_a_checkpoint_without_an_identity_is_gone_on_with(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "identity", lambda directory, step: None)
    go_on(run)


def test_d9_2_a_base_run_that_moved_stops_nobody_who_has_its_models(cheap, tmp_path):
    start(tiny_config(tmp_path / "base", steps=0))
    killed(tiny_config(tmp_path / "run", base_run=str(tmp_path / "base")))
    stored = checkpoint.identity(tmp_path / "run" / "checkpoints" / "lens", 4)
    assert len(stored["weights"]) == 64
    start(tiny_config(tmp_path / "whole", base_run=str(tmp_path / "base")))
    (tmp_path / "base").rename(tmp_path / "moved")
    go_on(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match=f"base_run: {tmp_path}/base holds no run"):
        start(tiny_config(tmp_path / "new", base_run=str(tmp_path / "base")))
    assert not (tmp_path / "new").exists()


def test_d9_4_checkpoints_that_are_not_there_are_missed(run):
    (run / "checkpoints").rename(run.parent / "unmounted")
    before = contents(run)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint, and metrics.jsonl goes to lens step 4: put the"):
        go_on(run)
    (run / "checkpoints").mkdir()  # the place where they were mounted
    with pytest.raises(FileNotFoundError, match="is their disk mounted"):
        go_on(run)
    assert contents(run) == before


def test_d9_4_a_run_that_was_killed_before_it_saved_begins_again(cheap, tmp_path):
    killed(tiny_config(tmp_path / "run"), ("step", "pretrain", 2))
    edit(tmp_path / "run", seed=1)
    go_on(tmp_path / "run")
    start(tiny_config(tmp_path / "whole", seed=1))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(("key", "value"), [("eval_steps", 9), ("stopping.min_improvement", 0.5)])
def test_d4_with_patience_the_rhythm_of_evaluations_decides(key, value):
    before = identity.of(Config(), data=None, weights=None)
    before["config"]["stopping.patience"] = 3
    after = {**before, "config": {**before["config"], key: value}}
    allowed, refused = identity.compare(before, after, phase="lens", steps=STEPS)
    assert not allowed and refused == [f"{key} is {value} now and was {before['config'][key]}"]
