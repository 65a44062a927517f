"""A run on a checkpoint of other people: the weights stay where they are, and the run knows them by their digest."""

import dataclasses
import io
import json
import re
import shutil
from hashlib import sha256
from pathlib import Path

import jax
import pytest
from rich.console import Console

from lensjax._settings import replace
from lensjax.models import BaseModel, checkpoints
from lensjax.runs import gists, load, pretrained
from lensjax.runs.config import Config
from lensjax.runs.fit import EVALUATION_SEED, fit
from lensjax.runs.store import config_file, run_folder
from lensjax.runs.store.log import read_rows
from tests.runs import (
    OWN_EDITS,
    Killed,
    bits,
    cheap_programs,
    contents,
    go_on,
    hook_run,
    outcome,
    saved_part,
    start,
    tiny_config,
)

SIZES = {"vocab_size": 256, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def weights(monkeypatch):
    """Weights are drawn from what their file says: what reads real ones is tested where it is."""

    def load_params(path, config, dtype):
        seed = int.from_bytes((Path(path) / "model.safetensors").read_bytes())
        return BaseModel(config, dtype).init(jax.random.key(seed))

    monkeypatch.setattr(checkpoints, "load_params", load_params)
    with cheap_programs():
        yield


def write(folder, seed=7, **keys):
    """A checkpoint of a small Llama."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-5, **SIZES, **keys}))
    (folder / "model.safetensors").write_bytes(bytes([seed]))
    return folder


def on(path, output_dir, **changes):
    return tiny_config(output_dir, **{"checkpoint.path": str(path), **changes})


def digest(seed=7):
    return sha256(bytes([seed])).hexdigest()


def test_the_base_model_and_the_digest_are_those_of_the_checkpoint(tmp_path, monkeypatch):
    write(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    config = pretrained.resolve(on("model", "run", **{"base.gaussian_rope": True}))
    assert config.checkpoint.path == str(tmp_path / "model") and config.checkpoint.sha256 == digest()
    assert dataclasses.replace(config.base, gaussian_rope=False) == checkpoints.read_config("model")
    assert config.base.gaussian_rope and config.base.layers == 2
    assert pretrained.resolve(config) == config
    assert pretrained.resolve(tiny_config("run")) == tiny_config("run")


def test_a_run_pretrains_nothing_and_holds_no_copy(tmp_path):
    model, folder = write(tmp_path / "model"), tmp_path / "run"
    trained = fit(on(model, folder, **OWN_EDITS), console=Console(file=io.StringIO()))
    assert {row["phase"] for row in read_rows(folder)} == {"lens", "online"}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["frozen", "lens", "online"]
    assert [path.name for path in (folder / "checkpoints" / "frozen").iterdir()] == ["gist"]
    stored = config_file.load(run_folder.config_path(folder), Config)
    assert stored == trained.config and stored.base.layers == 2 and stored.checkpoint.sha256 == digest()
    assert bits(load.load(folder).params) == bits(trained.params)
    assert saved_part(folder, "base") == bits(checkpoints.load_params(model, stored.base, "float32"))


@pytest.mark.parametrize("trainable", [("lens",), ("base", "lens")])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(tmp_path, monkeypatch, trainable):
    model = write(tmp_path / "model")
    start(on(model, tmp_path / "whole", trainable=trainable))
    pending = [("step", "lens", 1), ("saved", "lens", 4)]

    def hook(*at):
        if at in pending:
            pending.remove(at)
            raise Killed

    hook_run(monkeypatch.setattr, hook)
    with pytest.raises(Killed):
        start(on(model, tmp_path / "cut", trainable=trainable))
    with pytest.raises(Killed):
        go_on(tmp_path / "cut")
    go_on(tmp_path / "cut")
    assert pending == [] and outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    for part in ("base", "gist", "lens"):
        assert saved_part(tmp_path / "cut", part) == saved_part(tmp_path / "whole", part)


def test_other_weights_are_refused_by_both_digests(tmp_path):
    model, folder = write(tmp_path / "model"), tmp_path / "run"
    start(on(model, folder))
    before = contents(folder)
    write(model, seed=8)
    message = (
        f"checkpoint.path {model} holds weights of SHA-256 {digest(8)}, and checkpoint.sha256 says {digest(7)}: put"
    )
    for read in (load.load, go_on):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(folder)
    with pytest.raises(ValueError, match=rf"checkpoint.sha256 is '{digest(7)}' in the run and '{digest(8)}' now"):
        start(on(model, folder), resume=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        start(on(model, tmp_path / "new", **{"checkpoint.sha256": digest(7)}))
    assert contents(folder) == before and not (tmp_path / "new").exists()


def test_weights_may_move_and_a_run_says_where_it_looked_for_them(tmp_path):
    model, folder = write(tmp_path / "model"), tmp_path / "run"
    start(on(model, folder))
    params = bits(load.load(folder).params)
    moved = model.rename(tmp_path / "elsewhere")
    for read in (load.load, go_on):
        with pytest.raises(FileNotFoundError, match=rf"checkpoint.path {model} is not there: .* in its config.json"):
            read(folder)
    start(on(moved, folder), resume=True)
    config_path = run_folder.config_path(folder)
    config_path.write_text(config_path.read_text().replace(str(model), str(moved)))
    assert bits(load.load(folder).params) == params


def test_a_run_starts_from_another_one_on_the_same_weights(tmp_path):
    model, source = write(tmp_path / "model"), tmp_path / "source"
    start(on(model, source))
    moved = shutil.copytree(model, tmp_path / "copy")
    shutil.rmtree(model)
    config = pretrained.resolve(on(moved, tmp_path / "run", seed=3, start_from=str(source)))
    found = load.load_start(config, config.build_models())
    assert bits(found["base"]) == bits(checkpoints.load_params(moved, config.base, "float32"))
    for part in ("gist", "lens"):
        assert bits(found[part]) == saved_part(source, part)
    start(config)
    shutil.rmtree(source)
    assert bits(load.load(tmp_path / "run").params["gist"]) == bits(found["gist"])
    assert not (tmp_path / "run" / "checkpoints" / "frozen" / "base").exists()


def test_a_base_model_that_the_other_run_has_changed_is_taken_as_it_is_there(tmp_path):
    model, source, folder = write(tmp_path / "model"), tmp_path / "source", tmp_path / "run"
    start(on(model, source, trainable=("base",)))
    changed = saved_part(source, "base")
    assert changed != bits(checkpoints.load_params(model, load.load(source).config.base, "float32"))
    start(on(model, folder, start_from=str(source)))
    shutil.rmtree(source)
    assert saved_part(folder, "base") == changed


def test_a_run_on_other_weights_or_on_none_gives_nothing_to_this_one(tmp_path):
    model, other = write(tmp_path / "model"), write(tmp_path / "other", seed=9)
    start(on(model, tmp_path / "source"))
    start_from = {"start_from": str(tmp_path / "source")}
    message = f"checkpoint.sha256 of start_from {tmp_path / 'source'} is {digest(7)}, this run has {digest(9)}: use the"
    with pytest.raises(ValueError, match=re.escape(message)):
        start(on(other, tmp_path / "run", **start_from))
    for key in ("start_from", "base_run"):
        with pytest.raises(ValueError, match=rf"checkpoint.sha256 of {key} .* is {digest(7)}, this run has None: use"):
            start(tiny_config(tmp_path / "run", **{key: str(tmp_path / "source")}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_run": "runs/a"}, "base_run 'runs/a' and checkpoint.path 'model' both give a base model"),
        (
            {"checkpoint.path": None, "checkpoint.sha256": "ab"},
            "checkpoint.sha256 is that of checkpoint.path, which is",
        ),
        ({"checkpoint.dtype": "float16"}, "checkpoint.dtype must be one of float32, bfloat16, got 'float16'"),
        (
            {"checkpoint.dtype": "bfloat16", "trainable": ("base",)},
            "checkpoint.dtype must be float32 where trainable names base",
        ),
        ({"steps": 0}, "steps is 0 and checkpoint.path is 'model': there is nothing to do"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(Config(), **{"checkpoint.path": "model", **changes})


@pytest.mark.parametrize(
    ("keys", "changes", "message"),
    [
        ({}, {"gist.heads": 3}, "base.dim must be a multiple of gist.heads 3, got 8"),
        ({"vocab_size": 100}, {"data.task": "stdlib"}, "base.vocab_size must be at least 256 for text"),
        ({"model_type": "mamba"}, {}, "model_type must be one of"),
    ],
)
def test_a_model_that_does_not_go_with_the_run_leaves_no_folder(tmp_path, keys, changes, message):
    model = write(tmp_path / "model", **keys)
    with pytest.raises(ValueError, match=re.escape(message)):
        start(on(model, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_scaled_gistnet_has_the_centre_of_the_runs_text(tmp_path):
    model = write(tmp_path / "model")
    trained = fit(on(model, tmp_path / "run", **{"gist.start": "scaled"}), console=Console(file=io.StringIO()))
    models, params = trained.models, trained.params
    expected = gists.centred(trained.config, models, params, seed=EVALUATION_SEED)["gist"]
    assert bits(params["gist"]) == bits(expected) and abs(params["gist"]["centre"]).max() > 1e-3
    assert saved_part(tmp_path / "run", "gist") == bits(expected)
