"""Where a run's folder has each part: what a phase trains in its checkpoints, and what none has trained once, apart."""

import io
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from lensjax.runs import load
from lensjax.runs.config import Config
from lensjax.runs.fit import fit
from lensjax.runs.store import checkpoint, run_folder
from lensjax.runs.store.log import read_rows
from lensjax.training.steps.train_state import init_train_state
from tests.runs import (
    ALL,
    OWN_EDITS,
    Killed,
    assert_saved,
    bits,
    cheap_programs,
    contents,
    go_on,
    hook_run,
    outcome,
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
    """The folder of a run through all phases."""
    folder = tmp_path_factory.mktemp("whole")
    start(tiny_config(folder, **ALL))
    return folder


def held(folder):
    """Parts by the checkpoints that hold them: those of a phase by its name, those apart as `frozen`."""
    found = {
        path.name: checkpoint.parts(path, checkpoint.latest_step(path), path=("params",)) for path in phases(folder)
    }
    apart = folder / "checkpoints" / "frozen"
    return found | {"frozen": {path.name for path in apart.iterdir()} if apart.exists() else set()}


def phases(folder):
    return [path for path in (folder / "checkpoints").iterdir() if path.name != "frozen"]


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_each_checkpoint_holds_what_its_phase_trains(whole):
    assert held(whole) == {
        "pretrain": {"base"},
        "gists": {"gist"},
        "distill": {"lens"},
        "lens": {"lens"},
        "online": {"lens", "value"},
        "frozen": {"gist"},
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainable": ("base",)}, {"pretrain": {"base"}, "lens": {"base"}, "frozen": {"gist", "lens"}}),
        ({"trainable": ("base", "gist", "lens")}, {"pretrain": {"base"}, "lens": {"base", "gist", "lens"}}),
        (
            {"trainable": ("lens", "base"), "distill.steps": 5},
            {"pretrain": {"base"}, "distill": {"lens"}, "lens": {"base", "lens"}, "frozen": {"gist"}},
        ),
        (
            {"pretrain.rollout_weight": 0.5, **OWN_EDITS},
            {"pretrain": {"base", "gist"}, "lens": {"lens"}, "online": {"lens", "value"}},
        ),
    ],
)
def test_whatever_is_trained_a_run_is_loaded_as_it_ended(cheap, tmp_path, changes, expected):
    folder = tmp_path / "run"
    trained = fit(tiny_config(folder, **changes), console=Console(file=io.StringIO()))
    assert held(folder) == {"frozen": {"gist"} if "gist" not in expected["pretrain"] else set(), **expected}
    jax.tree.map(np.testing.assert_array_equal, load.load(folder).params, trained.params)


def test_a_checkpoint_is_as_small_as_what_is_trained_however_large_the_base_model(cheap, whole, tmp_path):
    large = tmp_path / "base"
    start(tiny_config(large, steps=0, **{"base.vocab_size": 50_000}))
    folder = tmp_path / "run"
    start(tiny_config(folder, base_run=str(large), **{"base.vocab_size": 50_000}))
    base = sum(leaf.size for leaf in jax.tree.leaves(load.load(folder).params["base"]))
    lens = sum(leaf.size for leaf in jax.tree.leaves(load.load(folder).params["lens"]))
    assert base > 100 * lens
    # Parameters and two moments of four bytes each; beside them the manifest, and orbax's own files.
    saved = size(folder / "checkpoints" / "lens" / "5")
    assert saved < 3 * 4 * lens + 100_000 < 4 * base
    assert size(folder / "checkpoints" / "frozen" / "base") > 4 * base * 0.8, "random numbers hardly pack"


def test_a_run_stays_whole_when_the_run_that_it_came_from_goes(cheap, whole, tmp_path, monkeypatch):
    """Interrupted after its first step and after its first checkpoint, with no other run there any more."""
    changes = {"seed": 8, "distill.steps": 5}
    for key, kind in (("base_run", "base"), ("start_from", "start")):
        source, folder = tmp_path / f"source-{kind}", tmp_path / kind
        shutil.copytree(whole, source)
        pending = [("step", "distill", 3), ("step", "lens", 1)]

        def hook(*at, pending=pending):
            if at in pending:
                pending.remove(at)
                raise Killed

        with monkeypatch.context() as patch:
            hook_run(patch.setattr, hook)
            with pytest.raises(Killed):
                start(tiny_config(folder, **changes, **{key: str(source)}))
            shutil.rmtree(source)
            with pytest.raises(Killed):
                go_on(folder)
            go_on(folder)
        start(tiny_config(tmp_path / f"{kind}-whole", **changes, **{key: str(whole)}))
        assert outcome(folder)["saved"] == outcome(tmp_path / f"{kind}-whole")["saved"]
        for part in ("base", "gist", "lens"):
            assert saved_part(folder, part) == saved_part(tmp_path / f"{kind}-whole", part)


def test_frozen_parts_are_written_once(cheap, whole, tmp_path, monkeypatch):
    written, save = [], checkpoint.save

    def spy(directory, *arguments, **keywords):
        written.append(directory.relative_to(tmp_path / "run" / "checkpoints").as_posix())
        return save(directory, *arguments, **keywords)

    monkeypatch.setattr(checkpoint, "save", spy)
    start(tiny_config(tmp_path / "run", base_run=str(whole), **ALL | {"gists.steps": 0}))
    go_on(tmp_path / "run")
    assert [name for name in written if name.startswith("frozen")] == ["frozen/base", "frozen/gist"]


# Runs that start from another one


def test_a_base_run_is_taken_and_left_as_it_is(cheap, whole, tmp_path, monkeypatch):
    before = contents(whole)
    pending = [("step", "lens", 1), ("step", "lens", 3)]

    def hook(*at):
        if at in pending:
            pending.remove(at)
            raise Killed

    hook_run(monkeypatch.setattr, hook)
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        start(tiny_config(folder, seed=8, base_run=str(whole)))
    with pytest.raises(Killed):
        go_on(folder)
    go_on(folder)
    assert contents(whole) == before
    assert checkpoint.parts(run_folder.checkpoint_dir(folder, "lens"), 5, path=("params",)) == {"lens"}
    for name in ("base", "gist"):
        assert saved_part(folder, name) == saved_part(whole, name)
    assert not (folder / "checkpoints" / "pretrain").exists()
    assert [row["step"] for row in read_rows(folder) if "loss" in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "phase"),
    [
        ({}, "lens"),
        ({"steps": 0, "distill.steps": 3}, "distill"),
        ({"steps": 0, **OWN_EDITS}, "online"),
    ],
)
def test_start_from_takes_the_models_of_another_run(cheap, whole, tmp_path, monkeypatch, changes, phase):
    before, source = contents(whole), saved_arrays(whole, "online", 5)
    started = []
    make = init_train_state

    def spy(*arguments, **keywords):
        state, frozen = make(*arguments, **keywords)
        if not isinstance(state.key, jax.core.Tracer):  # shapes are asked before
            started.append((jax.device_get(state), frozen))  # the run gives its buffers away
        return state, frozen

    monkeypatch.setattr("lensjax.runs.fit.init_train_state", spy)
    start(tiny_config(tmp_path / "run", seed=8, start_from=str(whole), **changes))
    ((state, frozen),) = started
    assert_saved(state.params["lens"], source, "lens")
    for name in ("base", "gist"):
        assert bits(frozen[name]) == saved_part(whole, name)
    assert int(state.step) == 0 and contents(whole) == before
    assert {row["phase"] for row in read_rows(tmp_path / "run")} == {phase}


def test_start_from_needs_a_lensnet(whole, tmp_path):
    start(tiny_config(tmp_path / "base", steps=0))
    with pytest.raises(
        ValueError, match=r"base has no checkpoint of LensNet: let it train first \(--resume .*base, or steps above 0\)"
    ):
        start(tiny_config(tmp_path / "run", start_from=str(tmp_path / "base")))
    assert not (tmp_path / "run").exists()


def test_a_run_shows_no_parameters_where_it_is_printed():
    config = Config()
    assert "secret" not in repr(load.Trained(config, config.build_models(), {"secret": {}}, {}))
