"""`experiments.studies.gists`: what gists are worth beside leaving the same tokens out."""

import csv
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import gists as script
from experiments.studies.gists_table import TRAINED, UNTRAINED, shorter, table
from lensjax import _settings
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.evaluation.statistics import estimate
from lensjax.runs.store import checkpoint, run_folder
from lensjax.training import nll
from tests import reference
from tests.runs import TINY, contents
from tests.small import jit

# Eight blocks of four, of which the last is never a gist; 14 entries are six gists and eight tokens.
GEOMETRY = Geometry(history=32, block_size=4, max_lod=1, recent_tokens=4)
LENGTHS = {2: 14}
CONFIG = _settings.replace(TINY, **{"gist.start": "scaled", "gist.layers": 1})


@functools.cache
def models_and_params():
    models, random = CONFIG.build_models(), np.random.default_rng(1)
    shapes = {part: jax.eval_shape(getattr(models, part).init, jax.random.key(0)) for part in ("base", "gist")}
    return models, jax.tree.map(
        lambda leaf: 0.4 * random.normal(size=leaf.shape).astype("f") + (leaf.ndim == 1), shapes
    )


def windows(count=2):
    return np.random.default_rng(0).integers(0, 256, (count, 36)).astype(np.int32)


@functools.cache
def loss_of():
    """Loss of a horizon int32[4] behind some vectors at their places."""
    models, params = models_and_params()

    @jit
    def loss(embeddings, places, horizon):
        return nll.token_nll(models.base, params["base"], contexts.in_full(embeddings, places), horizon).mean()

    return lambda vectors, places, horizon: float(
        loss(np.asarray(vectors, np.float32), np.asarray(places, np.float32), horizon)
    )


@functools.cache
def measured():
    """The reports of a window, with another one as its stranger."""
    models, params = models_and_params()
    own, other = windows()
    centres = script.centres_of(models, params["base"], np.array([[1, 2, 1]]))
    reports = {}
    for measure, extra in ((script.untrained, centres), (script.of_gistnet, params["gist"])):
        one = jit(functools.partial(measure, models, GEOMETRY, LENGTHS))
        reports |= jax.device_get(one(params["base"], extra, own, other))
    return reports


def test_what_is_in_full_and_what_is_a_gist_by_hand():
    assert shorter(14, GEOMETRY) == 8 and shorter(32, GEOMETRY) == 32 and shorter(29, GEOMETRY) == 28
    shown = reference.entries_of(script.oldest_as_gists(14, GEOMETRY))
    assert shown == [(4 * block, 1) for block in range(6)] + [(token, 0) for token in range(24, 32)]


def test_the_losses_of_all_that_need_no_training():
    models, params = models_and_params()
    found = measured()
    tokens = windows()[0]
    leaves = np.asarray(models.base.embed(params["base"], tokens[:32]))
    blocks, tail, horizon = leaves[:24].reshape(6, 4, -1), leaves[24:], tokens[32:]
    every = np.asarray(models.base.embed(params["base"], jnp.arange(256)))
    text, vocabulary = (2 * every[1] + every[2]) / 3, every.mean(axis=0)
    gists = {
        "gists_mean": blocks.mean(axis=1),
        "gists_scaled": text + 2 * (blocks.mean(axis=1) - text),
        "gists_scaled_vocabulary": vocabulary + 2 * (blocks.mean(axis=1) - vocabulary),
        "gists_middle": blocks[:, 2],
    }
    places = [*(4 * np.arange(6) + 1.5), *range(24, 32)]
    expected = {f"{name}/2": loss_of()([*rows, *tail], places, horizon) for name, rows in gists.items()}
    expected["recency/2"] = loss_of()(leaves[18:], range(18, 32), horizon)
    expected["recency_short/2"] = loss_of()(tail, range(24, 32), horizon)
    expected["full/1"] = loss_of()(leaves, range(32), horizon)
    assert set(expected) == {"full/1", *(f"{name}/2" for name in UNTRAINED)}
    assert len({round(loss, 4) for loss in expected.values()}) == 7
    for name, loss in expected.items():
        assert float(found[name]) == pytest.approx(loss, rel=1e-4), name


def test_foreign_gists_stand_before_the_own_tokens():
    models, params = models_and_params()
    found = measured()
    own, other = windows()
    tail = np.asarray(models.base.embed(params["base"], own[24:32]))
    places = [*(4 * np.arange(6) + 1.5), *range(24, 32)]
    gist = jit(models.gist.apply)
    for name, tokens in zip(TRAINED, (own, other), strict=True):
        rows = gist(params["gist"], np.asarray(models.base.embed(params["base"], tokens[:24])).reshape(6, 4, -1))
        expected = loss_of()([*np.asarray(rows), *tail], places, own[32:])
        assert float(found[f"{name}/2"]) == pytest.approx(expected, rel=1e-4), name
    assert abs(found["gistnet/2"] - found["gistnet_foreign/2"]) > 1e-4


def test_the_table_pairs_windows_and_seeds():
    random = np.random.default_rng(0)
    found = {f"{name}/2": random.normal(size=5) for name in UNTRAINED} | {"full/1": random.normal(size=5)}
    for seeds in (1, 3):
        found |= {f"{name}/2": random.normal(size=(seeds, 5)) for name in TRAINED}
        rows = {row["policy"]: row for row in table(found, GEOMETRY, LENGTHS)}
        assert list(rows) == ["full", *UNTRAINED, *TRAINED]
        assert [rows[name]["entries"] for name in ("full", "recency", "recency_short", "gistnet")] == [32, 14, 8, 14]
        assert [rows[name]["gists"] for name in ("full", "recency", "recency_short", "gistnet")] == [0, 0, 0, 6]
        own = found["gistnet/2"] if seeds == 3 else found["gistnet/2"][0]
        expected = estimate(own - found["recency/2"])
        found_here = [rows["gistnet"][f"minus_recency{end}"] for end in ("", "_low", "_high")]
        assert found_here == pytest.approx([expected.mean, *expected.interval])
        foreign = found["gistnet_foreign/2"] if seeds == 3 else found["gistnet_foreign/2"][0]
        assert rows["gistnet"]["minus_gistnet_foreign"] == pytest.approx(float((own - foreign).mean()))
        assert (
            rows["recency"]["minus_recency"] == rows["full"]["minus_recency"] == ""
            and rows["gistnet"]["seeds"] == seeds
        )


# The command, on a run whose base model is tiny.


def save_run(folder):
    run_folder.create_run(folder, _settings.replace(TINY, output_dir=str(folder)))
    checkpoint.save(run_folder.checkpoint_dir(folder, "pretrain"), 4, {"params": models_and_params()[1]})
    return folder


SIZE = ["--history", "30", "--horizon", "2", "--block-size", "4", "--recent-tokens", "4", "--ratios", "2"]
SIZE += ["--windows", "3", "--steps", "4", "--seeds", "0", "1"]


@pytest.mark.slow
def test_what_is_written_and_that_it_repeats(tmp_path, capsys):
    run = save_run(tmp_path / "run")
    before = contents(run)
    words = ["--run", str(run), *SIZE, "--output-dir"]
    for name in ("first", "second"):
        script.main([*words, str(tmp_path / name)])
    assert contents(run) == before
    reports = [json.loads((tmp_path / name / "gists.json").read_text()) for name in ("first", "second")]
    assert reports[0]["losses"] == reports[1]["losses"] and reports[0]["training"] == reports[1]["training"]
    report = reports[0]
    assert {seed: len(steps) for seed, steps in report["training"].items()} == {"0": 4, "1": 4}
    assert np.shape(report["losses"]["gistnet/2"]) == (2, 3) and np.shape(report["losses"]["recency/2"]) == (3,)
    assert report["losses"]["gistnet/2"][0] != report["losses"]["gistnet/2"][1]
    rows = list(csv.DictReader((tmp_path / "first" / "gists.csv").read_text().splitlines()))
    assert [row["policy"] for row in rows] == ["full", *UNTRAINED, *TRAINED]
    for row in rows:
        losses = report["losses"][f"{row['policy']}/{row['ratio']}"]
        assert float(row["nll"]) == pytest.approx(np.mean(losses), rel=1e-5)
    printed = capsys.readouterr().out
    assert printed.count("minus foreign") == 2 * (len(UNTRAINED) + 1) and "step 4 of 4" in printed


def test_nothing_is_written_where_something_is_wrong(tmp_path):
    run = save_run(tmp_path / "run")
    before, words = contents(run), ["--run", str(run), *SIZE, "--output-dir"]
    with pytest.raises(SystemExit, match=r"error: .*run is not empty: choose another --output-dir"):
        script.main([*words, str(run)])
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"error: .*nowhere holds no run"):
        script.main(["--run", str(tmp_path / "nowhere"), "--output-dir", out])
    with pytest.raises(SystemExit, match=r"error: ratio 4 asks for 7 entries, which no cut of 30 tokens reaches"):
        script.main([*words, out, "--ratios", "2", "4"])
    with pytest.raises(
        SystemExit, match=r"error: recall names no base model: set checkpoint\.path in it, or pass --run"
    ):
        script.main(["--config", "recall", *SIZE, "--output-dir", out])
    assert contents(run) == before and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="windows must be in"):
        script.Arguments(windows=1)
    with pytest.raises(ValueError, match="ratios must name one or more different ones"):
        script.Arguments(ratios=(2, 2))
