"""Runs whose checkpoints are damaged, gone, copied, or cannot be written."""

import io
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lensjax._settings import replace
from lensjax.runs import load
from lensjax.runs.config import Config
from lensjax.runs.engine import loop
from lensjax.runs.fit import fit
from lensjax.runs.store import checkpoint, config_file, run_folder
from lensjax.runs.store.checkpoint import DamagedError
from tests.runs import Killed, cheap_programs, contents, go_on, hook_run, outcome, saved_arrays, start, tiny_config


@pytest.fixture(scope="module")
def cheap():
    with cheap_programs():
        yield


@pytest.fixture(scope="module")
def whole(cheap, tmp_path_factory):
    """What a run gives that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    start(tiny_config(folder))
    return outcome(folder)


def killed_at(folder: Path, *place: object, **changes: object) -> Path:
    """A run that was killed there (see `hook_run`)."""

    def hook(*at):
        if at == place:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        hook_run(patch.setattr, hook)
        with pytest.raises(Killed):
            start(tiny_config(folder, **changes))
    return folder


@pytest.fixture(scope="module")
def killed(cheap, tmp_path_factory):
    """A run with checkpoints at 2 and 4 of pretraining and at 2 and 4 of LensNet's."""
    return killed_at(tmp_path_factory.mktemp("killed") / "run", "step", "lens", 5)


@pytest.fixture
def run(killed, tmp_path):
    return Path(shutil.copytree(killed, tmp_path / "run"))


def told(folder: Path) -> str:
    """Goes on with a run; what it says."""
    config, output = config_file.load(run_folder.config_path(folder), Config), io.StringIO()
    fit(replace(config, output_dir=str(folder)), resume=True, console=Console(file=output, width=500))
    return output.getvalue()


def phase_dir(run_dir: Path, phase: str) -> Path:
    return run_folder.checkpoint_dir(run_dir, phase)


def spoil(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut_arrays(folder: Path) -> None:
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


DAMAGES: list[Callable[[Path], None]] = [spoil, empty, cut_arrays, lambda folder: (folder / "SHA256SUMS").unlink()]


@pytest.mark.parametrize("damage", DAMAGES, ids=["manifest", "empty", "arrays", "sums"])
def test_e1_a_damaged_newest_checkpoint_is_named_and_moved_and_the_one_before_is_used(whole, run, damage):
    damage(phase_dir(run, "lens") / "4")
    said = told(run)
    assert f"warning: checkpoint {phase_dir(run, 'lens') / '4'} is damaged: " in said
    assert "it was moved to .damaged-4, and lens goes on from step 2" in said
    assert (phase_dir(run, "lens") / ".damaged-4").is_dir()
    assert outcome(run) == whole


def test_e1_a_run_that_is_refused_is_left_as_it_is(run):
    spoil(phase_dir(run, "lens") / "4")
    (run / "metrics.jsonl").write_text("{\n" + (run / "metrics.jsonl").read_text())
    before = contents(run / "checkpoints")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        go_on(run)
    assert contents(run / "checkpoints") == before


def test_e1_the_first_checkpoint_of_a_later_phase(whole, run):
    shutil.rmtree(phase_dir(run, "lens") / "4")
    spoil(phase_dir(run, "lens") / "2")
    assert "it was moved to .damaged-2, and lens is made anew" in told(run)
    assert outcome(run) == whole


@pytest.mark.parametrize("steps", [(4,), (2, 4)])
def test_e1_damage_in_a_phase_whose_successor_is_whole(whole, run, steps):
    for step in steps:
        spoil(phase_dir(run, "pretrain") / str(step))
    said, first = told(run), 2 if steps == (4,) else 0
    assert said.count("is damaged") == len(steps) and f"pretrain is trained again from step {first}: its later" in said
    assert outcome(run) == whole


def test_e1_a_phase_that_is_trained_again_may_be_interrupted(whole, run):
    spoil(phase_dir(run, "pretrain") / "4")

    def hook(*at):
        if at == ("step", "pretrain", 3):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        hook_run(patch.setattr, hook)
        with pytest.raises(Killed):
            go_on(run)
    assert "pretrain is trained again from step 2" in told(run)
    assert outcome(run) == whole


def test_e1_a_phase_without_checkpoints_writes_no_row_twice(whole, run):
    shutil.rmtree(phase_dir(run, "pretrain"))
    assert "pretrain is trained again from step 0: its later checkpoints are damaged or gone" in told(run)
    assert outcome(run) == whole


def test_e1_a_run_stops_where_nothing_is_whole(cheap, tmp_path):
    folder = killed_at(tmp_path / "run", "step", "pretrain", 3)
    spoil(phase_dir(folder, "pretrain") / "2")
    before = contents(folder)
    with pytest.raises(
        DamagedError, match=r"2 is damaged: .*; delete that folder to start anew where this phase begins"
    ):
        go_on(folder)
    after = contents(folder)
    assert all(after[path] == content for path, content in before.items() if "checkpoints" in path.parts)


@pytest.mark.slow
def test_e1_other_programs_read_the_checkpoint_before(whole, run, tmp_path, caplog):
    expected = load.load(killed_without(run, "lens", 4, tmp_path / "before"))
    spoil(phase_dir(run, "lens") / "4")
    before = contents(run)
    loaded = load.load(run)
    assert str(phase_dir(run, "lens") / "4") in caplog.text and "step 2 is read instead" in caplog.text
    saved = saved_arrays(run, "lens", 2)
    first = next(name for name in saved if name.startswith("params/lens/"))
    assert load_bytes(loaded, first) == load_bytes(expected, first) == saved[first]
    assert contents(run) == before
    start(tiny_config(tmp_path / "next", start_from=str(run)))
    start(tiny_config(tmp_path / "other", base_run=str(run)))


def killed_without(run: Path, phase: str, step: int, folder: Path) -> Path:
    shutil.copytree(run, folder)
    shutil.rmtree(phase_dir(folder, phase) / str(step))
    return folder


def load_bytes(trained, name: str) -> bytes:
    leaf = trained.params
    for part in name.split("/")[1:]:
        leaf = leaf[part]
    return leaf.tobytes()


def test_e1_an_earlier_base_model_than_lensnet_was_trained_on_is_not_taken_for_it(run):
    spoil(phase_dir(run, "pretrain") / "4")
    with pytest.raises(DamagedError, match=r"pretrain/4 is damaged: .*; delete that folder to resume from step 2"):
        load.load(run)


@pytest.mark.slow
def test_e1_the_frozen_parts_of_a_run_are_taken_from_its_base_run_again(whole, run, tmp_path):
    config = {"base_run": str(run)}
    start(tiny_config(tmp_path / "whole", **config))
    folder = killed_at(tmp_path / "next", "step", "lens", 5, **config)
    spoil(run_folder.frozen_dir(folder, "base") / "0")
    assert "moved to .damaged-0, and the frozen base is made anew" in told(folder)
    assert outcome(folder) == outcome(tmp_path / "whole")


PATIENT = {"stopping.patience": 3, "eval_steps": 1, "steps": 8, "save_steps": 1}


@pytest.mark.slow
def test_e1_a_damaged_best_checkpoint(cheap, tmp_path):
    start(tiny_config(tmp_path / "whole", **PATIENT))
    folder = killed_at(tmp_path / "run", "saved", "lens", 4, **PATIENT)
    best = loop.kept_step(phase_dir(folder, "lens"))
    if best == 4:
        spoil(phase_dir(folder, "lens") / "4")
    else:
        shutil.rmtree(phase_dir(folder, "lens") / str(best))
    assert f"{phase_dir(folder, 'lens') / '4'} is damaged" in told(folder)
    assert outcome(folder) == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_d1_2_a_run_in_a_folder_whose_name_is_a_pattern(whole, cheap, tmp_path):
    folder = killed_at(tmp_path / "lr=0.1,seed=[0]", "step", "lens", 5)
    go_on(folder)
    assert outcome(folder) == whole


@pytest.mark.slow
def test_d1_5_patience_in_a_folder_whose_name_is_a_pattern(cheap, tmp_path):
    for name in ("p", "p [x]\\"):
        start(tiny_config(tmp_path / name, **{"stopping.patience": 1, "eval_steps": 1}))
    assert outcome(tmp_path / "p [x]\\") == outcome(tmp_path / "p")


def test_d4_9_a_run_does_not_go_on_from_a_copy(run):
    shutil.copytree(phase_dir(run, "lens") / "4", phase_dir(run, "lens") / "40")
    before = contents(run / "checkpoints")
    with pytest.raises(ValueError, match=r"40 is that of step 4, as its manifest\.json says, and not of step 40"):
        go_on(run)
    assert contents(run / "checkpoints") == before


def test_d7_strangers_disturb_no_run(whole, run):
    (phase_dir(run, "lens") / "4" / ".DS_Store").write_bytes(b"\0")
    (phase_dir(run, "lens") / "9").write_text("")
    (phase_dir(run, "lens") / "0040").mkdir()
    assert "damaged" not in told(run)
    assert outcome(run) == whole


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that cannot be closed
def test_d15_a_run_that_finds_the_disk_full_goes_on_when_there_is_room(whole, cheap, tmp_path, monkeypatch):
    folder, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def hook(*at):
        if at == ("step", "lens", 4):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    with monkeypatch.context() as patch:
        hook_run(patch.setattr, hook)
        try:
            with pytest.raises(OSError, match="File too large"):
                start(tiny_config(folder))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    go_on(folder)
    assert outcome(folder) == whole
    assert checkpoint.steps(phase_dir(folder, "lens")) == [2, 4, 5]
