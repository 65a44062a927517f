import csv

import pytest

from experiments import recognise, train
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


def test_a_probe_learns_to_see_what_embeddings_alone_do_not_show(runs):
    arguments = recognise.Arguments(run=runs / "recall", queries=(2, 1), seeds=(0, 1), steps=60)
    rows = recognise.probe(arguments)
    assert [(row["query"], row["seed"]) for row in rows] == [(2, 0), (2, 1), (1, 0), (1, 1)]
    assert all(0 <= row["embeddings"] <= 1 and 0 <= row["probe"] <= 1 for row in rows)
    assert sum(row["probe"] for row in rows) > sum(row["embeddings"] for row in rows)
    with (runs / "recall" / "recognise.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["probe"]) for row in written] == pytest.approx([row["probe"] for row in rows], rel=1e-5)
    with pytest.raises(SystemExit, match=r"recognise\.csv exists: move it away"):
        recognise.main(["--run", str(runs / "recall")])


def test_a_run_on_text_is_refused(runs):
    with pytest.raises(SystemExit, match=r"text has data\.task 'text': expected a run on recall"):
        recognise.main(["--run", str(runs / "text")])
    assert not (runs / "text" / "recognise.csv").exists()
