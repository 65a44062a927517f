"""Checkpoints that are damaged, or do not fit, are refused."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.runs.store import checkpoint
from tests.toy_state import make_state


def without_lens(state):
    return replace(state, params={"base": state.params["base"]})


MISMATCHES = {
    "dtype": (lambda s: replace(s, step=jnp.float32(0)), r"holds step as int32\[\], not float32\[\]"),
    "shape": (lambda s: replace(s, step=jnp.zeros(2, jnp.int32)), r"holds step as int32\[\], not int32\[2\]"),
    "empty shape": (
        lambda s: replace(s, params=s.params | {"lens": s.params["lens"] | {"none": jnp.zeros((0, 5), jnp.int8)}}),
        r"holds params/lens/none as int8\[0, 4\], not int8\[0, 5\]",
    ),
    "key for array": (
        lambda s: replace(s, step=jax.random.key(0)),
        r"holds step as int32\[\], not key<fry>\[\]",
    ),
    "unexpected": (without_lens, "holds an unexpected params/lens/none, holds an unexpected params/lens/scale"),
    "lacks": (lambda s: replace(s, params=s.params | {"gist": jnp.ones(2)}), "it lacks params/gist;"),
    "many": (lambda s: {"a": s}, r"lacks a/step.* and \d+ more differences; use the configuration"),
}


@pytest.mark.parametrize(("change", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_another_tree_is_refused(tmp_path, change, message):
    folder = checkpoint.save(tmp_path, 0, make_state())
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.restore(tmp_path, 0, change(make_state()))
    assert str(folder) in str(error.value)


BAD_SAVES = {
    "step is there": (dict(step=5, tree={"a": np.ones(1)}), "5 is there already; restore it, or delete it"),
    "negative step": (dict(step=-1, tree={"a": np.ones(1)}), "got -1"),
    "keep": (dict(step=6, tree={"a": np.ones(1)}, keep=0), "a keep of at least 1, got 6 and 0"),
    "number": (dict(step=6, tree={"a": {"b": 1.0}}), "leaf a/b is not an array: .* got 1.0"),
    "ambiguous name": (
        dict(step=6, tree={"a/b": np.ones(1), "a": {"b": np.ones(1)}}),
        "expected no / in its keys",
    ),
    "tuple": (
        dict(step=6, tree={"a": np.ones(1)}, data_state={"x": (1, 2)}),
        r"must be JSON .*got \{'x': \(1, 2\)",
    ),
    "bytes": (dict(step=6, tree={"a": np.ones(1)}, data_state=b"x"), "data_state must be JSON"),
    "infinity": (dict(step=6, tree={"a": np.ones(1)}, data_state=float("inf")), "data_state must be JSON"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_SAVES.values(), ids=BAD_SAVES)
def test_bad_saves_are_refused_before_anything_is_written(tmp_path, arguments, message):
    checkpoint.save(tmp_path, 5, {"a": np.zeros(1)})
    before = checkpoint._checksums(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, **arguments)
    assert checkpoint._checksums(tmp_path) == before


def test_missing_step_names_those_that_are_there(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint .*7; steps in that directory: none"):
        checkpoint.restore(tmp_path, 7, {"a": np.zeros(1)})
    for step in (5, 6):
        checkpoint.save(tmp_path, step, {"a": np.zeros(1)})
    with pytest.raises(ValueError, match=r"no checkpoint .*7; steps in that directory: 5, 6"):
        checkpoint.restore(tmp_path, 7, {"a": np.zeros(1)})


# Damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_to_any_file_is_noticed(tmp_path, damage):
    state = make_state()
    checkpoint.save(tmp_path, 1, state)
    folder = checkpoint.save(tmp_path, 2, state)
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(names) > 5 and {"SHA256SUMS", "manifest.json"} < {str(name) for name in names}
    for name in names:
        damage(folder / name)
        with pytest.raises(ValueError, match=r"2 is damaged: .*; delete that folder to resume from step 1") as error:
            checkpoint.restore(tmp_path, 2, state)
        assert str(folder) in str(error.value)
        shutil.rmtree(folder)
        shutil.copytree(backup, folder)
        checkpoint.restore(tmp_path, 2, state)  # the copy is sound: it was the damage that was noticed


def test_damage_messages(tmp_path):
    folder = checkpoint.save(tmp_path, 1, make_state())

    def check(message):
        with pytest.raises(
            ValueError, match=f"1 is damaged: {message}; delete that folder to start anew where this phase"
        ):
            checkpoint.restore_subtree(tmp_path, 1, {}, path=())

    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"data_state": 1}))
    check("manifest.json is not as it was written")
    (folder / "manifest.json").unlink()
    check("manifest.json is missing")
    (folder / "SHA256SUMS").unlink()
    check("SHA256SUMS is missing")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sums_are_those_of_sha256sum(tmp_path):
    folder = checkpoint.save(tmp_path, 1, make_state())
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
