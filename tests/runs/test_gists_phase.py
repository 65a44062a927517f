"""The phase of a run that trains GistNet, and where a GistNet begins beside a base model that was trained elsewhere."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from lensjax.runs import gists, load
from lensjax.runs.data import batches as data
from lensjax.runs.fit import fit
from lensjax.runs.store import checkpoint, run_folder
from lensjax.runs.store.log import read_rows
from tests.runs import tiny_config


def run(folder, **changes):
    return fit(tiny_config(folder, **changes), console=Console(file=io.StringIO()))


def named(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def test_a_fresh_gistnet_begins_about_the_mean_of_the_text(tmp_path):
    config = tiny_config(tmp_path, **{"gist.start": "scaled"})
    models = config.build_models()
    params = {name: getattr(models, name).init(jax.random.key(1)) for name in ("base", "gist", "lens")}
    found = gists.centred(config, models, params, seed=3)
    some = data.fixed_batches(config, "train", batch_size=2, count=gists.CENTRE_BATCHES, seed=3)
    tokens = np.concatenate([batch["tokens"].ravel() for batch in some])
    expected = np.asarray(params["base"]["embedding"]["embedding"])[tokens].mean(axis=0)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found["gist"]["centre"], expected, atol=1e-6)
    assert {**found, "gist": {**found["gist"], "centre": 0}} == {**params, "gist": {**params["gist"], "centre": 0}}
    plain = tiny_config(tmp_path)
    assert gists.centred(plain, plain.build_models(), params, seed=3) is params


@pytest.mark.slow
def test_a_run_trains_its_gistnet_and_loads_it(tmp_path):
    """With the real programs, beside the base model of another run that omits."""
    omitting = {"context.omit": True, "gist.start": "scaled"}
    run(tmp_path / "base", steps=0, **omitting)
    changes = {**omitting, "base_run": str(tmp_path / "base"), "gists.steps": 4, "gists.lora_rank": 2}
    taught = run(tmp_path / "run", **changes)
    rows = [row for row in read_rows(tmp_path / "run") if row["phase"] == "gists"]
    assert len([row for row in rows if "gists/divergence" in row]) == 4
    assert all(np.isfinite(row["eval/gists/nll"]) for row in rows if "eval/gists/nll" in row)
    loaded = load.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, taught.params)
    models = taught.config.build_models()
    before = load.load_params(tmp_path / "base", taught.config, models, ("base", "gist"))
    moved = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()),
        before,
        {name: loaded.params[name] for name in before},
    )
    assert all(jax.tree.leaves(moved["gist"]))
    changed = {name for name, is_moved in named(moved["base"]).items() if is_moved}
    assert changed == {f"transformer/block_0/attention/{name}/kernel" for name in ("query", "value")}
    # The change is stored, not the changed model; a run that goes on makes it anew.
    held = checkpoint.parts(run_folder.checkpoint_dir(tmp_path / "run", "gists"), 4, path=("params",))
    assert held == {"gist", "lora"}
    kept = load.load_params(tmp_path / "run", taught.config, models, ("base",), adapted=False)["base"]
    jax.tree.map(np.testing.assert_array_equal, kept, before["base"])
    again = fit(taught.config, resume=True, console=Console(file=io.StringIO()))
    jax.tree.map(np.testing.assert_array_equal, again.params, taught.params)
