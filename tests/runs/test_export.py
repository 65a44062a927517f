"""Exports: what is written, read back to the bit, and refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import lensjax as lx
from lensjax._settings import replace
from lensjax.models import BaseModel, checkpoints
from lensjax.runs import card, export, load, pretrained
from lensjax.runs.store import tensors
from tests.runs import ROOT, TINY, bits, cheap_programs, start, tiny_config, write_corpus

SUMMARY = {"split": "test", "sequences": 8, "nll_policy": 1.25, "nll_oracle": "n/a", "seconds": 1.0}


@pytest.fixture(scope="module")
def run():
    """As a run of the tiny configuration would begin."""
    config = replace(TINY, output_dir="/home/me/runs/mine", **{"data.cache": "/home/me/cache"})
    models = config.build_models()
    params = {name: getattr(models, name).init(jax.random.key(3)) for name in ("base", "gist", "lens")}
    return lx.Trained(config, models, params, SUMMARY)


def test_an_export_is_read_back_to_the_bit(run, tmp_path):
    folder = lx.export(run, tmp_path / "new" / "mine")
    names = {"README.md", "config.json", "summary.json", *(f"{name}.safetensors" for name in run.params)}
    assert {path.name for path in folder.iterdir()} == names
    again = lx.load(folder)
    assert bits(again.params) == bits(run.params) and again.summary == SUMMARY and again.models == run.models
    assert again.config == replace(run.config, output_dir="mine", **{"data.cache": "cache"})
    assert list((tmp_path / "new").iterdir()) == [folder]


def test_nothing_in_an_export_is_code_or_a_place_on_this_machine(run, tmp_path):
    folder = lx.export(run, tmp_path / "mine")
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"/home/me" not in content
        if path.suffix == ".safetensors":  # the length of a header, and the header, which is JSON
            size = int.from_bytes(content[:8], "little")
            assert set(json.loads(content[8 : 8 + size])) >= set(tensors._named(run.params[path.stem]))


# The base model


def write_llama(folder: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors (extra hf) is not installed")
    keys = {"model_type": "llama", "vocab_size": 256, "hidden_size": 8, "intermediate_size": 12, "rms_norm_eps": 1e-5}
    keys |= {"num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keys))
    config, random = checkpoints.read_config(folder), np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (256, 8), "model.norm.weight": (8,)}
    block = {"input_layernorm": (8,), "post_attention_layernorm": (8,), "mlp.down_proj": (8, 12)}
    block |= {f"mlp.{name}_proj": (12, 8) for name in ("gate", "up")}
    block |= {f"self_attn.{name}_proj": (8, 8) for name in "qkvo"}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in block.items()}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.save_file(arrays, folder / "model.safetensors")
    assert BaseModel(config)
    return folder


@pytest.fixture
def on_llama(run, tmp_path):
    config = replace(run.config, **{"checkpoint.path": str(write_llama(tmp_path / "llama"))})
    config = pretrained.resolve(replace(config, **{"gist.heads": 2}))
    models = config.build_models()
    parts = {name: getattr(models, name).init(jax.random.key(4)) for name in ("gist", "lens")}
    return lx.Trained(config, models, {"base": pretrained.load_base(config), **parts}, {})


def test_a_base_model_of_others_is_named_and_not_copied(on_llama, tmp_path):
    folder = lx.export(on_llama, tmp_path / "mine")
    assert not (folder / "base.safetensors").exists()
    again = lx.load(folder)
    assert bits(again.params) == bits(on_llama.params) and again.config.checkpoint == on_llama.config.checkpoint
    digest = on_llama.config.checkpoint.sha256
    assert digest is not None and digest in (folder / "README.md").read_text()
    (tmp_path / "llama").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.path .*llama is not there: put the weights back, or"):
        lx.load(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "llama"), str(tmp_path / "moved")))
    assert bits(lx.load(folder).params) == bits(on_llama.params)


def test_a_base_model_that_the_run_has_changed_is_in_the_export(on_llama, tmp_path):
    on_llama.params["base"] = jax.tree.map(lambda leaf: leaf * 1.5, on_llama.params["base"])
    folder = lx.export(on_llama, tmp_path / "mine")
    (tmp_path / "llama").rename(tmp_path / "gone")
    assert bits(lx.load(folder).params) == bits(on_llama.params)
    assert "The base model is in here." in (folder / "README.md").read_text()


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_starts_from_an_export(on_llama, tmp_path, changed):
    if changed:
        on_llama.params["base"] = jax.tree.map(lambda leaf: leaf * 1.5, on_llama.params["base"])
    folder = lx.export(on_llama, tmp_path / "mine")
    config = replace(on_llama.config, start_from=str(folder))
    start = load.load_start(config, on_llama.models)
    assert start is not None and bits(start) == bits(on_llama.params)
    # What the file of others does not hold the run keeps.
    assert load._reads_base_from_file(config) is not changed


# The card


def test_the_card_has_the_tables_of_the_run_with_their_commands(run, tmp_path):
    program = "/home/me/src/lensjax/experiments"
    environment = {"command": [f"{program}/train.py", "demo", "--output-dir", "/home/me/runs/mine"]}
    (tmp_path / "environment.json").write_text(json.dumps([{}, environment]))
    row = {"policy": "lensnet_2", "information": "causal", "budget_ratio": 4, "entries": 7, "hit_rate": 0.5}
    row |= {"nll": 1.5, "nll_ci_low": 1.25, "nll_ci_high": 1.75, "minus_recency": [-0.5, -0.75, -0.25]}
    report = {"sequences": 32, "window": 32, "split": "test", "rows": [row], "anti_theater": []}
    report["environment"] = {"command": [f"{program}/evaluate.py", "/home/me/runs/mine", "--budgets", "4"]}
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    (tmp_path / "other.json").write_text('{"rows": 3}')
    text = card.text(lx.Trained(run.config, run.models, run.params, SUMMARY, tmp_path), run.config, "mine", run.params)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "lensjax"
    assert "python -m experiments.train demo --output-dir mine\n" in body
    assert "python -m experiments.evaluate mine --budgets 4\n" in body
    assert "| lensnet_2 | causal | 4x | 7 | 1.5000 [1.2500, 1.7500] | -0.5000 [-0.7500, -0.2500] | 0.500 |" in body
    assert "| nll_policy | 1.2500 |" in body and "nll_oracle" not in body and "/home/me/src" not in body
    assert "| steps | pretrain 4, lens 5 |" in body and "were not measured" not in body
    assert "## Limits" in body and "None" not in body


def test_a_card_says_what_was_not_measured(run):
    unfinished = lx.Trained(run.config, run.models, run.params, {})
    text = card.text(unfinished, run.config, "mine", run.params)
    assert "exported before it had measured itself" in text and "Other policies were not measured beside it" in text


# What is refused


def test_a_folder_with_something_in_it_is_refused(run, tmp_path):
    (tmp_path / "mine").mkdir()
    lx.export(run, tmp_path / "mine")
    with pytest.raises(FileExistsError, match=r"mine is not empty: name another folder to export to"):
        lx.export(run, tmp_path / "mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        lx.export(run, tmp_path / "mine" / "README.md")


def test_what_fails_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(card, "text", fail)
    with pytest.raises(OSError, match="no space left"):
        export.export(run, tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def damaged(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def renamed(path):
    content = path.read_bytes()
    assert b"kernel" in content
    path.write_bytes(content.replace(b"kernel", b"colonel"[:6], 1))


DAMAGE = {
    "cut": (lambda path: damaged(path, -1), r"lens\.safetensors is no whole safetensors file .*: export or fetch"),
    "empty": (lambda path: damaged(path, 0), r"lens\.safetensors is no whole safetensors file"),
    "gone": (lambda path: path.with_name("gist.safetensors").unlink(), r"gist\.safetensors is missing: export the run"),
    "a name": (renamed, r"lens\.safetensors is of another model than config\.json beside it says: .*colone.* alone"),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04N."), r"lens\.safetensors is no whole safetensors file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_export_is_refused(run, tmp_path, damage, message):
    folder = lx.export(run, tmp_path / "mine")
    damage(folder / "lens.safetensors")
    with pytest.raises(ValueError, match=message):
        lx.load(folder)


def test_models_of_other_sizes_are_refused(run, tmp_path):
    folder = lx.export(run, tmp_path / "mine")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"mlp_dim": 8', '"mlp_dim": 16'))
    with pytest.raises(ValueError, match=r"base\.safetensors: .* must be float32\[.*\] by config\.json beside it, got"):
        lx.load(folder)


# All of it


MEASURE = """
import sys
import jax, numpy as np
import lensjax as lx
from lensjax.evaluation import held_out
from lensjax.runs.data import batches

def losses(run, path):
    recipe, models = run.config.recipe, run.models
    config = lx.Config(data=type(run.config.data)(task="text", path=path), context=run.config.context)
    batch = batches.fixed_batches(config, "test", batch_size=2, count=1, seed=0)[0]
    state, frozen = lx.init_train_state(jax.random.key(0), recipe=recipe, models=models, params=run.params)
    step = jax.jit(lambda key: held_out.eval_step(key, state, batch, frozen, recipe=recipe, models=models))
    found = jax.device_get(step(jax.random.key(1)))
    return {name: np.asarray(value).tobytes().hex() for name, value in sorted(found.items()) if "nll" in name}

if __name__ == "__main__":
    print(losses(lx.load(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.slow
def test_a_fresh_process_measures_the_same_losses_to_the_bit(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    with cheap_programs():  # what matters is that parameters have moved
        start(tiny_config(tmp_path / "run", corpus))
    run = load.load(tmp_path / "run")
    folder = lx.export(run, tmp_path / "mine")
    (tmp_path / "run").rename(tmp_path / "away")
    (tmp_path / "measure.py").write_text(MEASURE)
    space: dict = {"__name__": "measure"}
    exec(MEASURE, space)
    own = space["losses"](run, str(corpus))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, tmp_path / "measure.py", folder, corpus],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(own) and len(own) > 4
    assert bits(load.load(folder).params) == bits(run.params)
