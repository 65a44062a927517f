"""Checkpoints in folders with any name, beside files of strangers, on disks that are full."""

import errno
import logging
import os
import re
import resource
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.runs.store import arrays, checkpoint, sums
from tests.toy_state import assert_same_bits, make_state


def step_of(directory, step):
    return checkpoint.restore(directory, step, {"a": jnp.int32(0)})[0]["a"]


@pytest.mark.parametrize(
    "name", ["a[1]", "lr=0.1,seed=[0]", "work [2024]/runs", "a\\b", "[!x]", "a*", "**", "a?", "]["]
)
def test_d1_1_any_name_of_a_folder(tmp_path, name):
    state, directory = make_state(), tmp_path / name / "lens"
    for step in (1, 2):
        checkpoint.save(directory, step, state, keep=1)
    assert_same_bits(checkpoint.restore(directory, 2, state)[0], state)
    assert [path.name for path in directory.iterdir()] == ["2"]


def test_d1_1_a_pattern_finds_no_other_folder(tmp_path):
    for name, value in (("run1", 1), ("run*", 2)):
        checkpoint.save(tmp_path / name, 3, {"a": jnp.int32(value)})
    assert (step_of(tmp_path / "run1", 3), step_of(tmp_path / "run*", 3)) == (1, 2)
    shutil.move(tmp_path / "run1", tmp_path / "run[1]")
    assert step_of(tmp_path / "run[1]", 3) == 1


def test_d1_what_does_not_read_back_does_not_count(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"a": jnp.int32(1)}, keep=1)
    read = arrays.read
    for fault in (lambda path: {}, lambda path: {name: array + 1 for name, array in read(path).items()}):
        monkeypatch.setattr(arrays, "read", fault)
        with pytest.raises(ValueError, match="was written and does not read back: a is not what it was"):
            checkpoint.save(tmp_path, 2, {"a": jnp.int32(2)}, keep=1)
        monkeypatch.setattr(arrays, "read", read)
        assert os.listdir(tmp_path) == ["1"] and step_of(tmp_path, 1) == 1


@pytest.fixture
def small_disk():
    """No file may be larger than 1000 bytes: what a full disk does, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_d15_a_full_disk_is_one_short_error_and_leaves_what_was_there(tmp_path, caplog):
    noise = np.random.default_rng(0).normal(size=10_000)
    with pytest.raises(OSError, match="File too large: ") as error:
        checkpoint.save(tmp_path, 2, {"a": noise})
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / ".tmp-2" / "arrays")
    assert len(str(error.value)) < 300 and caplog.records == [] and os.listdir(tmp_path) == []


def test_d15_writes_that_end_late_are_not_heard_of(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    arrays._drop_late_answers.__wrapped__()
    others = SimpleNamespace(exc_value=ValueError("x"))
    for unraisable in (SimpleNamespace(exc_value=RuntimeError("Event loop is closed")), others):
        sys.unraisablehook(unraisable)
    assert heard == [others]


def test_d15_orbax_is_quiet_only_while_it_is_asked(tmp_path, caplog):
    checkpoint.save(tmp_path, 2, {"a": np.ones(3)})
    logging.getLogger("absl").warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]


STRANGERS = [".DS_Store", "arrays/.DS_Store", "arrays/d/.nfs000000001", "._manifest.json", "notes.txt", "arrays/x.bak"]


@pytest.mark.parametrize("name", STRANGERS)
def test_d7_1_a_file_of_a_stranger_is_no_damage(tmp_path, name):
    folder = checkpoint.save(tmp_path, 4, {"a": jnp.int32(4)})
    (folder / name).write_bytes(b"\0\1")
    assert step_of(tmp_path, 4) == 4


def test_d7_3_only_folders_named_by_whole_numbers_are_steps(tmp_path):
    for step in (2, 4):
        checkpoint.save(tmp_path, step, {"a": jnp.int32(step)})
    (tmp_path / "9").write_text("")
    for name in ("0005", "+6", "1e3", "７", "4.bak", " 8", "-1", "1_0"):  # noqa: RUF001
        (tmp_path / name).mkdir()
    assert checkpoint.steps(tmp_path) == [2, 4] and checkpoint.latest_step(tmp_path) == 4
    with pytest.raises(ValueError, match=r"file .*9 is there already; move it away"):
        checkpoint.save(tmp_path, 9, {"a": jnp.int32(9)})
    assert (tmp_path / "9").read_text() == ""


def test_d7_4_a_renamed_checkpoint_is_not_there(tmp_path):
    checkpoint.save(tmp_path, 4, {"a": jnp.int32(4)}).rename(tmp_path / "0004")
    assert checkpoint.steps(tmp_path) == []
    with pytest.raises(ValueError, match=r"no checkpoint .*4; steps in that directory: none"):
        step_of(tmp_path, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\0garbage\n", "line 1 of SHA256SUMS is not a checksum"),
        (b"", "SHA256SUMS does not list manifest.json"),
        (b"0" * 64 + b"  \n", "line 1 of SHA256SUMS is not a checksum"),
        (None, "SHA256SUMS does not list manifest.json"),  # the last line is cut off, and no more
    ],
)
def test_d7_6_sums_that_are_none(tmp_path, content, message):
    folder = checkpoint.save(tmp_path, 4, {"a": jnp.int32(4)})
    whole = (folder / sums.NAME).read_bytes()
    (folder / sums.NAME).write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]) if content is None else content)
    with pytest.raises(checkpoint.DamagedError, match=f"4 is damaged: {message};"):
        step_of(tmp_path, 4)


def test_d4_9_a_copy_under_another_number_is_refused(tmp_path):
    for step in (2, 4):
        checkpoint.save(tmp_path, step, {"a": jnp.int32(step)})
    shutil.copytree(tmp_path / "4", tmp_path / "40")
    for read in (step_of, checkpoint.data_state, checkpoint.identity):
        with pytest.raises(ValueError, match=r"40 is that of step 4, as its manifest\.json says") as error:
            read(tmp_path, 40)
        assert not isinstance(error.value, checkpoint.DamagedError)
    assert step_of(tmp_path, 4) == 4


def test_d18_1_a_part_that_is_one_array(tmp_path):
    tree = {"k": jnp.arange(3), "kk": {"k": jnp.ones(2), "key": jax.random.key(1)}}
    checkpoint.save(tmp_path, 1, tree)
    assert_same_bits(checkpoint.restore_subtree(tmp_path, 1, jnp.zeros(3, jnp.int32), path=("k",)), tree["k"])
    assert_same_bits(checkpoint.restore_subtree(tmp_path, 1, jax.random.key(0), path=("kk", "key")), tree["kk"]["key"])
    with pytest.raises(ValueError, match=r"it lacks kk, holds an unexpected kk/k"):
        checkpoint.restore_subtree(tmp_path, 1, jnp.zeros(3), path=("kk",))


@pytest.mark.parametrize("tree", [{}, (), {"a": {}}, {"a": jnp.zeros((0, 3))}, {"a": np.zeros(0), "b": ()}])
def test_d18_3_a_tree_without_numbers(tmp_path, tree):
    checkpoint.save(tmp_path, 1, tree, data_state=7)
    restored, data_state = checkpoint.restore(tmp_path, 1, tree)
    assert_same_bits(restored, tree)
    assert data_state == 7


def test_m11_leftovers_of_every_kind_go_with_the_next_save(tmp_path):
    (tmp_path / ".tmp-5").write_text("a file")
    (tmp_path / ".tmp-6").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / ".tmp-7").symlink_to(tmp_path / "kept")
    checkpoint.save(tmp_path, 5, {"a": jnp.int32(5)})
    assert sorted(os.listdir(tmp_path)) == ["5", "kept"]


def test_e8_arrays_of_another_checkpoint(tmp_path):
    key = jax.random.key(0)
    folder = checkpoint.save(tmp_path, 1, {"a": jnp.zeros(3), "key": key})
    others = [
        ({"a": jnp.zeros(4), "key": key}, "a in arrays is not the array"),
        ({"a": jnp.zeros(3, jnp.int32), "key": key}, "a in arrays is not the array"),
        ({"b": jnp.zeros(3), "key": key}, "a in arrays is not the array"),
        ({"a": jnp.zeros(3), "key": jnp.zeros(3)}, "key in arrays is not the array"),
    ]
    for number, (other, message) in enumerate(others):
        source = checkpoint.save(tmp_path / f"other{number}", 1, other)
        shutil.rmtree(folder / "arrays")
        shutil.copytree(source / "arrays", folder / "arrays")
        (folder / sums.NAME).write_text(sums.to_text(sums.checksums(folder)))
        with pytest.raises(checkpoint.DamagedError, match=message):
            checkpoint.restore(tmp_path, 1, {"a": jnp.ones(3), "key": key})


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"step": 1, "arrays": {"a": 1}, "data_state": null}'])
def test_e8_a_manifest_that_describes_nothing(tmp_path, manifest):
    folder = checkpoint.save(tmp_path, 1, {"a": jnp.zeros(3)})
    (folder / "manifest.json").write_text(manifest)
    (folder / sums.NAME).write_text(sums.to_text(sums.checksums(folder)))
    with pytest.raises(checkpoint.DamagedError, match=r"manifest\.json does not describe a checkpoint"):
        checkpoint.restore(tmp_path, 1, {"a": jnp.ones(3)})


def test_everything_is_on_the_disk_before_a_checkpoint_takes_its_name(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    folder = checkpoint.save(tmp_path / "lens", 1, make_state())
    written = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    hidden = {re.sub(r".*/\.tmp-1/?", "", path) for path in synced if "/.tmp-1" in path}
    assert written | {""} == hidden and {str(tmp_path), str(tmp_path / "lens")} <= synced


def test_the_identity_of_a_run_comes_back(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": np.ones(1)}, identity={"seed": 0, "data": "ab"})
    checkpoint.save(tmp_path, 2, {"a": np.ones(1)})
    assert checkpoint.identity(tmp_path, 1) == {"seed": 0, "data": "ab"} and checkpoint.identity(tmp_path, 2) is None
    with pytest.raises(ValueError, match="identity must be JSON"):
        checkpoint.save(tmp_path, 3, {"a": np.ones(1)}, identity={"x": (1,)})


def test_a_damaged_checkpoint_is_set_aside_as_often_as_need_be(tmp_path):
    for name in (".damaged-4", ".damaged-4-2", ".damaged-4-3"):
        checkpoint.save(tmp_path, 4, {"a": np.ones(1)})
        assert checkpoint.set_aside(tmp_path, 4) == tmp_path / name and (tmp_path / name).is_dir()
        assert checkpoint.steps(tmp_path) == []
