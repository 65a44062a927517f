"""`experiments.cluster`, and what several processes make of an evaluation and of a sweep."""

import csv
import json

import pytest

from experiments import cluster, train
from lensjax.runs.store import config_file
from tests.runs import ROOT, TINY, cheap_programs, tiny_config, write_corpus


def test_a_process_is_told_who_it_is(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_cpu_max_isa=AVX2")
    told = cluster.environment(3, 4, "localhost:1", devices=5)
    assert told["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=5"
    assert [told[f"JAX_{name}"] for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")] == [
        *("localhost:1", "4", "3")
    ]
    assert "JAX_COORDINATOR_ADDRESS" not in cluster.environment(0, 1, "localhost:1", devices=5)


def test_what_a_process_says_is_its_error_wherever_that_stands(tmp_path):
    log = tmp_path / "log"
    process = cluster.Process(0, None, log)
    for text, line in (("", "nothing"), ("a\nb\n", "b"), ("a\nerror: c\nnoise\n", "error: c")):
        log.write_text(text)
        assert process.line() == line


def test_losses_are_one_a_step(tmp_path):
    rows = [{"phase": "lens", "step": 1, "loss": 2.0}, {"phase": "lens", "step": 1, "eval/nll": 1.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cluster.losses(tmp_path) == {("lens", 1): 2.0}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    with pytest.raises(ValueError, match="has a step twice"):
        cluster.losses(tmp_path)


def test_a_program_of_one_process_refuses_to_be_one_of_several(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(SystemExit, match="error: this program runs in one process: unset JAX_COORDINATOR_ADDRESS"):
        cluster.main(["--output-dir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_run_loses_a_process_and_goes_on_without_it(tmp_path, capsys):
    cluster.main(["--output-dir", str(tmp_path / "cluster"), "--patience", "500"])
    out = capsys.readouterr().out
    assert "process 1 is killed" in out and out.count("error: another process of this run") == 3
    assert "losses are those of one process to" in out


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A run, and a sweep on its base model."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "preset.json").write_text(config_file.to_json(TINY))
    with cheap_programs():
        train.run(tiny_config(folder / "run"))
    settings = f"preset='{folder / 'preset.json'}', seeds=(0, 4), one_at_a_time={{'hyper.temperature': (0.5,)}}"
    (folder / "small.py").write_text(f"from lensjax.runs.sweep import Sweep\nSWEEP = Sweep({settings})\n")
    return folder


EVALUATE = """
import sys
from lensjax.evaluation import compare
from tests.experiments import test_evaluate_script as known
compare.measure, compare.measure_foreign = known.known_measure, known.known_measure_foreign
from experiments import evaluate
evaluate.main(sys.argv[1:])
"""


ASK = """
import sys
from lensjax.runs.data.suite import puzzles
for task in list(puzzles.TASKS)[2:]:
    del puzzles.TASKS[task]
from experiments import evaluate
evaluate.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.long
def test_several_processes_measure_what_one_measures(workplace, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = cluster.Arguments(output_dir=workplace, devices=1, patience=900)
    words = ("-c", EVALUATE, str(workplace / "run"), "--budgets", "2", "--sequences", "6", "--batch-size", "2")
    for count in (2, 1):
        cluster.go_on((*words, "--name", f"by-{count}"), count, arguments, name=f"evaluate-{count}")
    one, two = (json.loads((workplace / "run" / f"by-{count}.json").read_text()) for count in (1, 2))
    assert one["rows"] == two["rows"] and (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)


@pytest.mark.slow
@pytest.mark.long
def test_several_processes_ask_what_one_asks(workplace, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = workplace / "text"
    with cheap_programs():
        train.run(tiny_config(run, write_corpus(workplace / "corpus"), **{"context.window": 98, "eval_batches": 1}))
    arguments = cluster.Arguments(output_dir=workplace, devices=1, patience=900)
    words = ("-c", ASK, str(run), "--suite", "--budgets", "3", "--sequences", "6", "--batch-size", "2", "--draws", "2")
    for count in (2, 1):
        cluster.go_on((*words, "--name", f"by-{count}"), count, arguments, name=f"suite-{count}")
    one, two = (json.loads((run / f"by-{count}-suite.json").read_text()) for count in (1, 2))
    assert one["rows"] == two["rows"] and (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)


@pytest.mark.slow
@pytest.mark.long
def test_several_processes_train_the_arms_that_one_trains(workplace):
    arguments = cluster.Arguments(output_dir=workplace, devices=1, patience=900)
    words = ("-m", "experiments.studies.ablate", str(workplace / "small.py"), "--base-run", str(workplace / "run"))
    tables = []
    for count in (2, 1):
        folder = ("--output-dir", str(workplace / f"by-{count}"))
        cluster.go_on((*words, *folder), count, arguments, name=f"ablate-{count}")
        with (workplace / f"by-{count}" / "arms.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    assert len(tables[0]) == 4 and tables[0] == tables[1]
