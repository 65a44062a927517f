"""Values that nobody meant, from presets, sweeps and files: each is refused by name before anything is written."""

import json
import math
import re
from dataclasses import replace as with_fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.process import describe
from experiments.studies import ablate
from experiments.train import load_preset
from experiments.train import main as train
from lensjax import _settings
from lensjax.context.geometry import Geometry
from lensjax.runs import sizes
from lensjax.runs.config import Config
from lensjax.runs.engine import devices, memory
from lensjax.runs.fit import fit
from lensjax.runs.store import config_file
from lensjax.runs.sweep import Sweep
from lensjax.session import SessionConfig
from lensjax.training.hyperparameters import Hyperparameters
from tests.runs import TINY, tiny_config

PRESET = """import numpy as np
import lensjax as lx

CONFIG = lx.Config({})
"""


def refusal(act):
    with pytest.raises(ValueError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


# Hyperparameters, whatever stands beside them.


@pytest.mark.parametrize(
    "rate", [np.float32(1e-3), np.float64(1e-3), jnp.float32(1e-3), jnp.full(3, 1e-3), 1e-3], ids=repr
)
def test_d5_1_a_neighbour_switches_no_check_off(rate):
    message = refusal(lambda: Hyperparameters(learning_rate=rate, temperature=-1.0, clip=7.0))
    assert message == "hyper.temperature must be above 0, got -1.0"


@pytest.mark.parametrize("value", ["0", True, b"1", [1.0], object(), np.array(["1"]), jnp.array([True]), 1j])
def test_d5_2_what_is_no_number_is_refused(value):
    assert refusal(lambda: Hyperparameters(temperature=value)).startswith("hyper.temperature must be a number above 0")


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, np.float32(-1), jnp.float32(-1), jnp.array([1.0, -1.0])])
def test_d5_2_arrays_are_held_to_the_bound_where_their_values_are_known(value):
    assert refusal(lambda: Hyperparameters(temperature=value)).startswith("hyper.temperature must be ")


def test_d5_1_transformations_put_in_what_they_want():
    hyper = jax.tree.map(jnp.float32, Hyperparameters())
    doubled = jax.jit(lambda one: with_fields(one, temperature=2 * one.temperature))(hyper)
    assert float(doubled.temperature) == 2.0
    assert jax.tree.map(lambda leaf: "name", hyper).margin == "name"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(hyper)]
    assert paths[0] == ".learning_rate" and len(paths) == len(jax.tree.leaves(hyper))


# Presets are Python.


@pytest.mark.parametrize(
    ("fields", "steps"), [("steps=np.int64(50)", 50), ("output_dir=__import__('pathlib').Path('a')", 1000)]
)
def test_d5_4_a_preset_may_use_numpy(tmp_path, fields, steps):
    file = tmp_path / "preset.py"
    file.write_text(PRESET.format(fields))
    config = load_preset(str(file))
    assert config.steps == steps
    assert config_file.from_json(config_file.to_json(config), Config) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PRESET.format("steps=5.5"), "4: ValueError: steps must be a whole number at least 0, got 5.5"),
        (PRESET.format("trainable=['lens']"), "4: ValueError: trainable must be a tuple, each one of base, gist, lens"),
        (PRESET.format("stepps=5"), "4: TypeError: "),
        ("x = (1,\ny = 2\n", "1: SyntaxError: '(' was never closed"),
        ("import nowhere_to_be_found\n", "1: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("\n\nraise RuntimeError('two\\nlines')\n", "3: RuntimeError: two lines"),
        ("import sys\nsys.exit('bye')\n", "2: SystemExit: bye"),
        ("def f(): return f()\nf()\n", "1: RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_m9_a_preset_s_own_error_names_file_and_line(tmp_path, text, message, monkeypatch, capsys):
    file = tmp_path / "preset.py"
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train([str(file)])
    assert str(ended.value).startswith(f"error: {file}:{message}")
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["preset.py"]


# Sweeps are Python, too.


def test_d5_8_seeds_of_numpy_are_seeds():
    assert Sweep("recall", seeds=np.arange(2)).seeds == (0, 1)
    assert Sweep("recall", seeds=[np.int64(3)]).seeds == (3,)
    assert Sweep("recall", seeds=range(2), grid={"hyper.margin": np.ones(2, np.float32)}).grid == {
        "hyper.margin": (1.0, 1.0)
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 3}, "seeds must be a sequence of values, got 3"),
        ({"seeds": "012"}, "seeds must be a sequence of values, got '012'"),
        ({"seeds": (0.5,)}, "seeds must be whole numbers, got 0.5"),
        ({"seeds": np.zeros((2, 2), int)}, "seeds must be whole numbers, got [0, 0]"),
        (
            {"one_at_a_time": {"hyper.temperature": 0.5}},
            "one_at_a_time of hyper.temperature must be a sequence of values, got 0.5",
        ),
        ({"grid": {"hyper.margin": ()}}, "grid of hyper.margin must name one or more values, got none"),
        ({"grid": ["hyper.margin"]}, "grid of a sweep must give values by the names of fields, got ['hyper.margin']"),
        ({"together": {"hyper.margin": 1}}, "together must be a sequence of values, got {'hyper.margin': 1}"),
        ({"together": [{"seed": 1}]}, "together of a sweep cannot change seed, which the sweep itself gives each arm"),
        ({"changes": None}, "changes of a sweep must give values by the names of fields, got None"),
    ],
)
def test_d5_9_a_sweep_s_error_names_the_field(fields, message):
    assert refusal(lambda: Sweep("recall", **fields)) == message


def test_d5_9_an_arm_s_error_names_the_field(tmp_path):
    plan = Sweep("recall", one_at_a_time={"hyper.temperature": ("0.5",)})
    message = refusal(lambda: ablate._arms(plan, tmp_path))
    assert message == "hyper.temperature must be a number above 0, got '0.5'"


# Files are JSON.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2, "hyper": {"margin": Infinity}}', "x.json is not JSON: Infinity is no number of JSON"),
        ('{"format": 2, "hyper": {"margin": NaN}}', "x.json is not JSON: NaN is no number of JSON"),
        ('{"format": 2, "seed": 1, "seed": 2}', "x.json is not JSON: the key seed comes twice in one object"),
        ("[" * 100_000, "x.json is not JSON: maximum recursion depth exceeded"),
        ('{"format": 2, "seed": 1' + "0" * 5000 + "}", "x.json is not JSON: Exceeds the limit"),
    ],
)
def test_d17_4_files_are_json(text, message):
    assert refusal(lambda: config_file.from_json(text, Config, source="x.json")).startswith(message)


def test_d17_5_an_integer_of_400_digits_is_no_float():
    text = '{"format": 2, "hyper": {"margin": 1' + "0" * 400 + "}}"
    message = refusal(lambda: config_file.from_json(text, Config, source="x.json"))
    assert message.startswith("x.json: hyper.margin must be finite and at least 0, got 1000")
    assert len(message) < 400


def test_d17_4_every_config_that_is_accepted_is_written_as_json():
    text = config_file.to_json(_settings.replace(Config(), **{"optimizer.clip_norm": 3e38, "focus.margin": 1}))
    assert json.loads(text)["focus"]["margin"] == 1.0 and "Infinity" not in text


# Sizes that cannot be.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context.max_lod": 1_000_000}, "context.max_lod must be in [1, 30], got 1000000"),
        ({"batch_size": 1_000_000}, "batch_size must be in [1, 65536], got 1000000"),
        ({"steps": 3_000_000_000}, "steps must be at most 2147483647, got 3000000000"),
        ({"context.rollouts": 2**31 - 1}, "context.rollouts must be in [1, 1024], got 2147483647"),
    ],
)
def test_e2_fields_have_upper_bounds(changes, message):
    assert refusal(lambda: _settings.replace(TINY, **changes)) == message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lens.dim": 1_000_000}, r"phase lens takes at least .*\(parameters and optimizer state"),
        ({"base.dim": 2**20}, r"phase pretrain takes at least .*\(parameters and optimizer state"),
        ({"eval_batches": 2**16, "batch_size": 2**16}, r"phase pretrain takes at least .*\(held-out batches"),
        ({"context.window": 2**31 - 4}, "phase pretrain takes at least .*a batch"),
        ({"steps": 0, "distill.steps": 5, "lens.dim": 2**20}, "phase distill takes at least"),
        ({"online.steps": 5, "steps": 0, "lens.dim": 2**20}, "phase online takes at least"),
        ({"gists.steps": 5, "gist.layers": 1, "base.dim": 2**18}, "phase pretrain takes at least"),
    ],
)
def test_e2_what_memory_cannot_hold_is_one_sentence_before_anything_is_made(tmp_path, changes, what):
    message = refusal(lambda: fit(tiny_config(tmp_path / "run", **changes)))
    assert re.search(what, message), message
    assert re.search(r"GiB of memory on a device, which has [\d.]+ GiB \(.*\): lower the sizes of base", message)
    assert not (tmp_path / "run").exists()


def test_e2_activations_count_and_devices_share_them(monkeypatch):
    config = _settings.replace(TINY, steps=0)
    models = config.build_models()
    monkeypatch.setattr(memory, "there", lambda: 60_000)
    with pytest.raises(ValueError, match=r"phase pretrain takes at least .*\(activations"):
        sizes.require_room(config, models, None, devices=1)
    sizes.require_room(_settings.replace(config, shard_parameters=True), models, None, devices=2)


def test_e2_a_session_of_any_length_is_checked_at_once():
    geometry = Geometry(history=2**31 - 1, block_size=2, max_lod=30, recent_tokens=8)
    assert SessionConfig(geometry, budget=100, interval=16).capacity == 116
    assert refusal(lambda: Geometry(10**30, 2, 1, 1)).startswith(
        "Geometry.history must be at most 2147483647, got 1000"
    )


@pytest.mark.parametrize("omit", [False, True])
def test_e2_the_shortest_budget_of_a_session_is_that_of_any_part_of_its_history(omit):
    for history in range(20, 90):
        geometry = Geometry(history, block_size=3, max_lod=1 if omit else 3, recent_tokens=4, omit=omit)
        parts = [with_fields(geometry, history=length).shortest for length in range(4, history + 1)]
        for budget, is_fine in ((max(parts), True), (max(parts) - 1, False)):
            try:
                SessionConfig(geometry, budget=budget, interval=1)
            except ValueError as error:
                assert not is_fine or "session.budget" not in str(error), (history, error)
            else:
                assert is_fine


def test_d14_7_without_jit_there_is_no_run(tmp_path):
    with jax.disable_jit(), pytest.raises(ValueError, match=r"JAX_DISABLE_JIT .*: unset it, or set it to 0"):
        fit(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    devices.make_mesh({"batch_size": 2})


def test_e2_what_a_device_cannot_allocate_is_one_line():
    try:
        jnp.zeros((2**20, 2**26)).block_until_ready()
    except Exception as error:
        assert describe(error) == "out of memory: make batch, context or models smaller"
    else:
        pytest.skip("there are 256 TiB")
