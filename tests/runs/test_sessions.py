"""Sessions on the disk."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lensjax as lx
from lensjax.evaluation import streams
from lensjax.session import Session
from tests.session.streams import STREAM, assert_same, read_at_once, session_of

ROOT = Path(__file__).parents[2]
GO_ON = """
import sys, hashlib, numpy as np, lensjax as lx
session, state = lx.load_session(sys.argv[1])
state, losses = session.append(state, np.load(sys.argv[2]))
lx.save_session(session, state, sys.argv[3])
print(hashlib.sha256(losses.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A session in the middle of an interval, past what it forgets, and the folder that it was saved in."""
    session, folder = session_of("plain"), tmp_path_factory.mktemp("session") / "folder"
    state, _ = session.append(session.init(), STREAM[:46])
    assert state.history.forgotten > 0 and state.read % session.config.interval
    assert lx.save_session(session, state, folder) == folder
    return session, state, folder


def test_a_session_that_was_loaded_goes_on_to_the_bit(saved):
    session, state, folder = saved
    loaded, again = lx.load_session(folder)
    assert loaded.models == session.models and loaded.config == session.config
    assert_same((again, loaded.params), (state, session.params))
    _, last, losses = read_at_once("plain")
    found, left = loaded.append(again, STREAM[46:])
    np.testing.assert_array_equal(left, losses[46:])
    assert_same(found, last)
    assert_same(session.append(state, STREAM[46:])[0], last)  # and so does the one that was saved


def test_history_in_several_blocks_and_with_some_of_them_gone(tmp_path, monkeypatch):
    session, (_, last, expected) = session_of("plain"), read_at_once("plain")
    monkeypatch.setattr("lensjax.session.history.BLOCK", 4)
    state, _ = session.append(session.init(), STREAM[:62])
    assert state.history.tokens.first > 0 and len(state.history.tokens.blocks) > 2
    lx.save_session(session, state, tmp_path / "new")
    _, again = lx.load_session(tmp_path / "new")
    assert_same(again, state)
    after, losses = session.append(again, STREAM[62:])
    assert_same((after.view, losses), (last.view, expected[62:]))


@pytest.mark.slow
def test_stopped_in_one_process_and_gone_on_with_in_others(tmp_path, programs):
    """Three stops; what is read in between is one stream."""
    session, place, folder = session_of("omission"), 0, tmp_path / "0"
    _, last, losses = read_at_once("omission")
    lx.save_session(session, session.init(), folder)
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(programs)}
    for number, end in enumerate((19, 33, 60, len(STREAM)), start=1):
        np.save(tmp_path / "tokens.npy", STREAM[place:end])
        words = [sys.executable, "-c", GO_ON, folder, tmp_path / "tokens.npy", tmp_path / str(number)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == hashlib.sha256(losses[place:end].tobytes()).hexdigest()
        place, folder = end, tmp_path / str(number)
    assert_same(lx.load_session(folder)[1], last)


def test_a_folder_that_holds_something_is_left_alone(saved, tmp_path):
    session, state, folder = saved
    (tmp_path / "file").write_text("")
    for taken in (folder, tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=f"folder {taken} is not empty: choose another one for the session"):
            lx.save_session(session, state, taken)


def test_damage_is_said(saved, tmp_path):
    session, state, _ = saved
    folder = lx.save_session(session, state, tmp_path / "new")
    (manifest,) = folder.glob("*/manifest.json")
    manifest.write_text(manifest.read_text().replace('"read": 46', '"read": 45'))
    with pytest.raises(ValueError, match=rf"session {folder} is damaged: manifest\.json is not as it was written; sav"):
        lx.load_session(folder)
    with pytest.raises(FileNotFoundError, match="nowhere holds no session: name the folder"):
        lx.load_session(tmp_path / "nowhere")


def test_a_policy_in_the_place_of_lensnet_is_asked_for(saved, tmp_path):
    session = session_of("plain")
    other = Session(session.models, session.params, session.config, policy=streams.collapse_oldest)
    folder = lx.save_session(other, other.init(), tmp_path / "new")
    with pytest.raises(ValueError, match="was read with a policy in LensNet's place: pass it as policy"):
        lx.load_session(folder)
    assert lx.load_session(folder, policy=streams.collapse_oldest)[0].steps.policy is streams.collapse_oldest
    with pytest.raises(ValueError, match="was read without a policy in LensNet's place: leave out policy"):
        lx.load_session(saved[2], policy=streams.collapse_oldest)


def test_models_of_somebody_else_are_not_saved(saved, tmp_path):
    session, state, _ = saved
    models = dataclasses.replace(session.models, lens=dataclasses.replace(session.models.lens, state_dim=3))
    odd = Session(models, session.params, session.config)
    with pytest.raises(ValueError, match=r"session\.models must be those of build_models to be saved with a session"):
        lx.save_session(odd, state, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_parameters_keep_their_types(tmp_path):
    session = session_of("plain")
    halved = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), {"base": session.params["base"]})
    other = Session(session.models, {**session.params, **halved}, session.config)
    lx.save_session(other, other.init(), tmp_path / "new")
    assert_same(lx.load_session(tmp_path / "new")[0].params, other.params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(other.params["base"])} == {"bfloat16"}
