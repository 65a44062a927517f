"""`config.json`: written and read back equal, by the version that wrote it."""

import dataclasses
import json
import re

import pytest

from lensjax import _settings
from lensjax.models.lensnet import LensConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.runs.store import config_file
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig

CHANGED = Config(
    output_dir="runs/other",
    seed=7,
    trainable=("gist", "lens"),
    base_run="runs/base",
    lens=LensConfig(dim=32, head="mlp"),
    context=ContextConfig(window=128, block_size=4, max_lod=3, horizon=16, recent_tokens=20),
    hyper=Hyperparameters(learning_rate=3e-4, kl_weight=0.25, context_start=0.9),
    data=DataConfig(task="text", path="texts/*.txt", max_files=10),
)


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["default", "changed"])
def test_json_round_trip(config):
    text = config_file.to_json(config)
    assert config_file.from_json(text, Config) == config
    assert hash(config_file.from_json(text, Config)) == hash(config)


def test_json_lists_every_field_and_its_format():
    written = json.loads(config_file.to_json(CHANGED))
    assert written.pop("format") == config_file.FORMAT == 2
    assert set(written) == {field.name for field in dataclasses.fields(Config)}
    assert set(written["hyper"]) == {field.name for field in dataclasses.fields(Hyperparameters)}


def test_missing_keys_take_their_defaults_and_whole_floats_stay_floats():
    raw = {"format": 2, "seed": 3, "hyper": {"temperature": 2}, "context": {"rollouts": 2}}
    config = config_file.from_json(json.dumps(raw), Config)
    assert config == _settings.replace(Config(), **{"seed": 3, "hyper.temperature": 2.0, "context.rollouts": 2})
    assert type(config.hyper.temperature) is float


def test_load_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(config_file.to_json(CHANGED))
    assert config_file.load(path, Config) == CHANGED
    path.write_text('{"format": 2, "seeds": 1}')
    with pytest.raises(ValueError, match=re.escape(f"{path}: unknown key seeds")):
        config_file.load(path, Config)


@pytest.mark.parametrize("written", [{}, {"format": 0}, {"format": 1}, {"format": "2"}, {"format": None}])
def test_a_file_of_another_format_is_refused_with_what_to_do(written):
    text = json.dumps({**written, "seed": 1})
    with pytest.raises(ValueError) as error:
        config_file.from_json(text, Config, source="runs/old/config.json")
    assert str(error.value) == (
        f"runs/old/config.json has format {written.get('format')!r}, and this version of lensjax reads format 2: use "
        "the version that environment.json beside it names, or run it again"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config is not JSON"),
        ("[1]", "config: expected an object with keys of Config, got [1]"),
        ('{"format": 2, "sede": 1}', "config: unknown key sede; known keys: adaptation, attention, base, base_run"),
        ('{"format": 2, "sede": 1, "stepps": 2}', "config: unknown keys sede, stepps"),
        ('{"format": 2, "hyper": {"temprature": 1}}', "config: unknown key hyper.temprature"),
        ('{"format": 2, "hyper": 3}', "config: hyper must be an object with keys of Hyperparameters, got 3"),
        ('{"format": 2, "steps": "10"}', "config: steps must be a whole number at least 0, got '10'"),
        ('{"format": 2, "steps": 1.5}', "config: steps must be a whole number at least 0, got 1.5"),
        ('{"format": 2, "steps": true}', "config: steps must be a whole number at least 0, got True"),
        ('{"format": 2, "base": {"tied": 1}}', "config: base.tied must be True or False, got 1"),
        (
            '{"format": 2, "hyper": {"temperature": "hot"}}',
            "config: hyper.temperature must be a number above 0, got 'hot'",
        ),
        (
            '{"format": 2, "hyper": {"temperature": null}}',
            "config: hyper.temperature must be a number above 0, got None",
        ),
        ('{"format": 2, "data": {"max_files": "all"}}', "config: data.max_files must be a whole number"),
        ('{"format": 2, "trainable": "lens"}', "config: trainable must be a tuple, each one of base"),
    ],
)
def test_bad_json_is_refused_with_the_place(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_file.from_json(text, Config)
