"""One device or many: the same numbers, and a run that goes on with another number of them."""

import functools
import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lensjax import _settings
from lensjax.runs.engine import devices
from lensjax.runs.store import checkpoint, config_file
from lensjax.runs.store.log import read_rows
from tests import quick
from tests.runs import TINY, run_script

STEPS = 20
EIGHT = _settings.replace(
    TINY, steps=STEPS, batch_size=8, save_steps=10, **{"pretrain.batch_size": 8, "hyper.kl_weight": 0.1}
)
# Short sums in every order round alike; what Adam makes of a gradient near 0 does not.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def test_state_is_whole_on_all_devices_or_split_where_it_can_be():
    mesh = devices.make_mesh({"batch_size": 4})
    assert mesh.size == 2
    state = {"odd": jnp.ones((3, 5)), "both": jnp.ones((4, 6)), "scalar": jnp.int32(1), "key": jax.random.key(0)}
    whole, split = (devices.place(state, mesh, split=split) for split in (False, True))
    assert all(leaf.sharding.spec == PartitionSpec() for leaf in whole.values())
    specs = {name: leaf.sharding.spec for name, leaf in split.items()}
    nowhere = PartitionSpec()
    assert specs == {"odd": nowhere, "both": PartitionSpec(None, devices.AXIS), "scalar": nowhere, "key": nowhere}
    assert split["both"].addressable_shards[0].data.shape == (4, 3)
    np.testing.assert_array_equal(split["both"], state["both"])


def test_each_device_has_its_rows():
    mesh = devices.make_mesh({})
    rows = np.arange(8).reshape(4, 2)
    shared = devices.share_out(rows, mesh)
    assert [shard.data.tolist() for shard in shared.addressable_shards] == [rows[:2].tolist(), rows[2:].tolist()]
    assert shared.sharding == devices.batch_spec((4, 2), jnp.int32, mesh).sharding


def test_a_batch_that_cannot_be_shared_out_is_refused():
    message = r"pretrain.batch_size must be a multiple of the 2 devices that share a batch, got 3: change it"
    with pytest.raises(ValueError, match=message):
        devices.make_mesh({"batch_size": 2, "pretrain.batch_size": 3})


def test_a_batch_is_whole_again_on_the_host():
    rows = np.arange(8).reshape(4, 2)
    whole = devices.to_host({"rows": devices.share_out(rows, devices.make_mesh({})), "other": rows})
    assert all(isinstance(array, np.ndarray) and array.tolist() == rows.tolist() for array in whole.values())


def test_one_process_needs_no_other(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    devices.join()
    assert devices.is_first() and devices.largest(-3) == -3
    acted = []
    devices.in_first(lambda: acted.append(1))
    assert acted == [1]
    with pytest.raises(OSError, match="disk full"):
        devices.in_first(functools.partial(_fail, OSError("disk full")))


def _fail(error):
    raise error


def test_process_numbers_that_are_none_are_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers, got two and None"):
        devices.join()


@pytest.fixture(scope="module")
def train(tmp_path_factory, programs):
    """Trains on a number of devices, of one process or shared by several; returns the run's folder."""

    def start(name, count, *words, processes=1, interrupt=None, **changes):
        folder = tmp_path_factory.getbasetemp() / name
        if not words:
            file = folder.with_suffix(".json")
            file.write_text(config_file.to_json(_settings.replace(EIGHT, output_dir=str(folder), **changes)))
            words = (file,)
        devices = f"--xla_force_host_platform_device_count={count // processes}"
        flags = {"XLA_FLAGS": f"{quick.FLAGS} {devices}"}
        if processes > 1:
            flags |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}

        def run(process):
            # The signal reaches the last process alone; all must stop.
            own = interrupt if process == processes - 1 else None
            return run_script(*words, cache=programs, interrupt=own, JAX_PROCESS_ID=str(process), **flags)

        with ThreadPoolExecutor() as pool:
            done = list(pool.map(run, range(processes)))
        expected = 0 if interrupt is None else 128 + signal.SIGTERM
        assert all(one.returncode == expected for one in done), [one.stderr[-2000:] for one in done]
        assert not any("run folder" in one.stdout for one in done[1:])
        return folder

    return start


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def on_one(train):
    return train("one", 1)


def assert_same(folder, other):
    ours, theirs = (arrays(run) for run in (folder, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name, **CLOSE)
    losses = [[row["loss"] for row in read_rows(run) if "loss" in row] for run in (folder, other)]
    assert len(losses[0]) == STEPS + EIGHT.pretrain.steps
    np.testing.assert_allclose(*losses, **CLOSE)


def arrays(folder):
    """Parameters after the last step."""
    directory = folder / "checkpoints" / "lens"
    manifest = json.loads((directory / str(STEPS) / "manifest.json").read_text())["arrays"]
    names = [name.split("/") for name in manifest if name.startswith("params/")]
    like: dict = {}
    for parts in names:
        spec, level = manifest["/".join(parts)], like
        for part in parts[1:-1]:
            level = level.setdefault(part, {})
        level[parts[-1]] = jax.ShapeDtypeStruct(spec["shape"], spec["dtype"])
    found = checkpoint.restore_subtree(directory, STEPS, like, path=("params",))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(on_one, train):
    assert_same(train("eight", 8), on_one)


@pytest.mark.slow
def test_a_run_of_split_parameters_goes_on_with_more_devices(on_one, train):
    # With fewer: see the run of two processes below.
    folder = train("from-one", 1, interrupt=("saved", "lens", 10, signal.SIGTERM), shard_parameters=True)
    assert checkpoint.latest_step(folder / "checkpoints" / "lens") in (10, 11)
    train("from-one", 8, "--resume", folder)
    assert_same(folder, on_one)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(on_one, train):
    assert_same(train("processes", 2, processes=2), on_one)


@pytest.mark.slow
def test_a_run_of_two_processes_stops_and_goes_on_in_one(on_one, train):
    at = ("saved", "lens", 10, signal.SIGTERM)
    folder = train("from-processes", 4, processes=2, interrupt=at, shard_parameters=True)
    assert checkpoint.latest_step(folder / "checkpoints" / "lens") in (10, 11)
    train("from-processes", 1, "--resume", folder)
    assert_same(folder, on_one)
