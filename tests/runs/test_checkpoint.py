"""Checkpoints come back as they were saved, whole or not at all."""

import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.runs.store import checkpoint
from tests.toy_state import assert_same_bits, make_state

ROOT = Path(__file__).parents[2]


# Round trips


@pytest.mark.parametrize("abstract", [False, True])
def test_round_trip_is_exact(tmp_path, abstract):
    state, data_state = make_state(), {"next_index": 7, "nested": [1, "x", None, {"y": 0.1}]}
    folder = checkpoint.save(tmp_path / "new" / "lens", 3, state, data_state=data_state)
    assert folder == tmp_path / "new" / "lens" / "3" and folder.is_dir()
    like = jax.eval_shape(lambda: state) if abstract else jax.tree.map(jnp.zeros_like, replace(state, key=0))
    if not abstract:
        like = replace(like, key=jax.random.split(jax.random.key(0), 2))
    restored, restored_data = checkpoint.restore(tmp_path / "new" / "lens", 3, like)
    assert_same_bits(restored, state)
    assert restored_data == data_state


@settings(max_examples=8)
@given(
    raw=st.binary(min_size=8, max_size=64),
    dtype=st.sampled_from(["float32", "float64", "int8", "uint32", "int64", "float16", jnp.bfloat16]),
)
def test_any_bits_of_numpy_arrays(tmp_path_factory, raw, dtype):
    size = np.dtype(dtype).itemsize
    array = np.frombuffer(raw[: len(raw) // size * size], dtype)
    directory = tmp_path_factory.mktemp("bits")
    checkpoint.save(directory, 0, {"a": array, "scalar": array[:1].reshape(())})
    restored, data_state = checkpoint.restore(directory, 0, {"a": array, "scalar": array[:1].reshape(())})
    assert_same_bits(restored, {"a": array, "scalar": array[:1].reshape(())})
    assert data_state is None


def test_other_key_implementations(tmp_path):
    tree = {"key": jax.random.key(1, impl="rbg")}
    checkpoint.save(tmp_path, 0, tree)
    assert_same_bits(checkpoint.restore(tmp_path, 0, jax.eval_shape(lambda: tree))[0], tree)
    with pytest.raises(ValueError, match=r"holds key as key<rbg>\[\], not key<fry>\[\]"):
        checkpoint.restore(tmp_path, 0, {"key": jax.random.key(1)})


def test_restored_state_needs_no_second_compile(tmp_path, compiles):
    @jax.jit
    def step(state):
        return replace(state, step=state.step + 1, key=jax.vmap(lambda key: jax.random.fold_in(key, 1))(state.key))

    state = step(make_state())
    checkpoint.save(tmp_path, 0, state)
    restored, _ = checkpoint.restore(tmp_path, 0, state)
    expected = step(state)
    with compiles() as names:
        actual = step(restored)
    assert "jit(step)" not in names
    assert_same_bits(actual, expected)


def test_leaves_take_the_placement_of_like(tmp_path):
    tree = {"here": jnp.ones(3), "there": jax.device_put(jnp.ones(3), jax.devices()[0]), "host": np.ones(3)}
    checkpoint.save(tmp_path, 0, tree)
    restored, _ = checkpoint.restore(tmp_path, 0, tree)
    assert not restored["here"].committed
    assert restored["there"].committed and restored["there"].sharding == tree["there"].sharding
    assert type(restored["host"]) is np.ndarray


def test_subtree(tmp_path):
    state = make_state()
    checkpoint.save(tmp_path, 3, state)
    base = checkpoint.restore_subtree(tmp_path, 3, state.params["base"], path=("params", "base"))
    assert_same_bits(base, state.params["base"])
    moments = checkpoint.restore_subtree(tmp_path, 3, state.opt[0], path=("opt", "0"))
    assert_same_bits(moments, state.opt[0])
    assert_same_bits(checkpoint.restore_subtree(tmp_path, 3, state, path=()), state)
    with pytest.raises(ValueError, match="3 does not fit: it lacks params/bas/b, lacks params/bas/w; use the config"):
        checkpoint.restore_subtree(tmp_path, 3, state.params["base"], path=("params", "bas"))


# Steps


def test_keeps_the_newest(tmp_path):
    assert checkpoint.latest_step(tmp_path / "nowhere") is None and checkpoint.steps(tmp_path) == []
    for step in (2, 10, 9, 100, 30):
        checkpoint.save(tmp_path, step, {"a": jnp.int32(step)}, keep=3)
    assert checkpoint.steps(tmp_path) == [10, 30, 100] and checkpoint.latest_step(tmp_path) == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "100", "30"]
    for step in (10, 30, 100):
        assert checkpoint.restore(tmp_path, step, {"a": jnp.int32(0)})[0]["a"] == step


def test_spares_a_step_however_old(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, {"a": jnp.int32(step)}, keep=2, spare=2 if step < 6 else 5)
        assert 2 in checkpoint.steps(tmp_path) or step in (1, 6)
    assert checkpoint.steps(tmp_path) == [5, 6]
    checkpoint.save(tmp_path, 7, {"a": jnp.int32(7)}, keep=1, spare=5)
    assert checkpoint.steps(tmp_path) == [5, 7]
    assert checkpoint.restore(tmp_path, 5, {"a": jnp.int32(0)})[0]["a"] == 5


def test_data_state_alone(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": jnp.int32(1)}, data_state={"next_index": 7})
    assert checkpoint.data_state(tmp_path, 1) == {"next_index": 7}
    (tmp_path / "1" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json is not as it was written"):
        checkpoint.data_state(tmp_path, 1)


def test_no_thread_outlives_a_call(tmp_path):
    before = threading.active_count()
    checkpoint.save(tmp_path, 0, make_state())
    checkpoint.restore(tmp_path, 0, make_state())
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)  # a thread that was told to end takes a moment
    assert threading.active_count() <= before


# Interruption


class Killed(BaseException):
    """Stands for a signal: no handler of the code under test may catch it."""


def kill(*args, **kwargs):
    raise Killed


@pytest.mark.parametrize("stage", ["orbax", "manifest", "rename", "prune", "delete"])
def test_a_save_cut_short_leaves_whole_checkpoints_alone(tmp_path, monkeypatch, stage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"a": jnp.int32(step)}, keep=2)
    with monkeypatch.context() as patch:
        if stage == "orbax":
            patch.setattr(ocp.Checkpointer, "save", kill)
        elif stage == "manifest":
            patch.setattr(Path, "write_text", kill)
        elif stage == "rename":
            patch.setattr(Path, "rename", kill)
        elif stage == "prune":
            patch.setattr(checkpoint, "steps", kill)
        else:
            patch.setattr(checkpoint.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, 3, {"a": jnp.int32(3)}, keep=2)
    done = {"prune": [1, 2, 3], "delete": [2, 3]}.get(stage, [1, 2])
    assert checkpoint.steps(tmp_path) == done
    for step in done:
        assert checkpoint.restore(tmp_path, step, {"a": jnp.int32(0)})[0]["a"] == step
    checkpoint.save(tmp_path, 4, {"a": jnp.int32(4)}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(done[-1]), "4"]


SAVER = """
import sys
import jax.numpy as jnp
from lensjax.runs.store import checkpoint
step = checkpoint.latest_step(sys.argv[1]) or 0
while True:
    step += 1
    checkpoint.save(sys.argv[1], step, {"a": jnp.full((300, 300), step), "b": jnp.int32(step)}, data_state=step)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path):
    like = {"a": jnp.zeros((300, 300), jnp.int32), "b": jnp.int32(0)}
    moments, reported = random.Random(0), 0
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", SAVER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as process:
            for _ in range(2):
                reported = int(process.stdout.readline())
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        assert checkpoint.latest_step(tmp_path) >= reported
        for step in checkpoint.steps(tmp_path):
            restored, data_state = checkpoint.restore(tmp_path, step, like)
            assert data_state == step and restored["b"] == step and (restored["a"] == step).all()
    assert reported >= 10
