"""`experiments.studies.recognise`: embeddings and a probe, beside what is worked out by hand."""

import csv

import numpy as np
import pytest

from experiments import train
from experiments.studies import recognise
from lensjax import _settings
from lensjax.runs.config import Config
from lensjax.runs.data.recall import RecallSource
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file
from tests.runs import cheap_programs, tiny_config, write_corpus


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with cheap_programs():
        train.run(tiny_config(folder / "recall", steps=0))
        train.run(tiny_config(folder / "text", write_corpus(folder / "corpus"), steps=0))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(recognise, "BATCH", 64)
    monkeypatch.setattr(recognise, "HELD_OUT", 256)


def by_hand(folder, query, seed):
    """Share of sequences in which the gist that resembles the query most stands for the block that it begins."""
    config = config_file.load(folder / "config.json", Config)
    shape = {"context.horizon": config.context.block_size - query, "context.recent_tokens": query}
    config = _settings.replace(config, **{"data.query": query}, **shape)
    models = config.build_models()
    params = load_params(folder, config, models, ("base", "gist"))
    right = []
    for example in (RecallSource(config.context, 256, "test", seed, query)[i] for i in range(256)):
        embeddings = np.asarray(models.base.embed(params["base"], example["tokens"]), np.float64)
        gists = np.asarray(models.gist.apply(params["gist"], embeddings[:28].reshape(7, 4, -1).astype("f")))
        unit = [rows / np.sqrt((rows**2).mean(axis=1, keepdims=True)) for rows in (gists, embeddings[28 : 28 + query])]
        right.append(np.argmax((unit[0] @ unit[1].T).sum(axis=1)) == example["answers"][0] // 4)
    return np.mean(right)


@pytest.mark.slow
def test_embeddings_are_compared_as_they_are_and_then_through_a_probe(runs):
    arguments = recognise.Arguments(run=runs / "recall", queries=(2, 1), seeds=(0, 1), steps=60)
    rows = recognise.probe(arguments)
    assert [(row["query"], row["seed"]) for row in rows] == [(2, 0), (2, 1), (1, 0), (1, 1)]
    for row in rows[1:3]:
        assert row["embeddings"] == pytest.approx(by_hand(runs / "recall", row["query"], row["seed"]), abs=0.01)
    assert any(row["probe"] != row["embeddings"] for row in rows) and all(0 <= row["probe"] <= 1 for row in rows)
    with (runs / "recall" / "recognise.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["probe"]) for row in written] == pytest.approx([row["probe"] for row in rows], rel=1e-5)
    with pytest.raises(SystemExit, match=r"recognise\.csv exists: move it away"):
        recognise.main(["--run", str(runs / "recall")])


def test_a_run_on_text_is_refused(runs):
    with pytest.raises(SystemExit, match=r"text has data\.task 'text': expected a run on recall"):
        recognise.main(["--run", str(runs / "text")])
    assert not (runs / "text" / "recognise.csv").exists()
