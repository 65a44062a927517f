"""Results are there whole, and before the pictures: what fails on the way to them, and what it leaves."""

import io
import json
import math

import jax
import pytest
from rich.console import Console

from experiments import evaluate, tables
from experiments.studies import recall
from lensjax.plots import curves, style
from lensjax.runs import fit as fit_module
from lensjax.runs import results
from lensjax.runs.store import files, run_folder
from tests.runs import Killed, cheap_programs, contents, outcome, start, tiny_config


def names(folder):
    return sorted(path.name for path in contents(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an unbroken run comes to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with cheap_programs():
        start(tiny_config(folder))
    return outcome(folder)


def fail(*args, **kwargs):
    raise RuntimeError("Failed to process string with tex because latex could not be found\nand more of it")


def test_d11_2_a_picture_that_fails_is_one_warning(tmp_path, monkeypatch, capsys, whole):
    with cheap_programs(), monkeypatch.context() as patch:
        patch.setattr(curves, "training_curves", fail)
        start(tiny_config(tmp_path / "run"))
    assert outcome(tmp_path / "run") == whole
    warning = f"warning: no picture {tmp_path}/run/training.png: Failed to process string with tex"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(warning) and "more" not in line


@pytest.mark.parametrize("place", ["variant_maps", "draw"])
def test_d11_the_summary_is_there_before_anything_is_drawn(tmp_path, monkeypatch, whole, place):
    def kill(*args, **kwargs):
        raise Killed

    with cheap_programs(), monkeypatch.context() as patch:
        patch.setattr(results, place, kill)
        with pytest.raises(Killed):
            start(tiny_config(tmp_path / "run"))
    assert outcome(tmp_path / "run") == whole


def test_d18_5_a_test_report_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    evaluator = fit_module.evaluator

    def broken(*args):
        report, calls = evaluator(*args), []

        def of_last(*state):
            calls.append(1)
            values = report(*state)
            is_test = len(calls) == 3  # after those at steps 3 and 5
            return values | {"nll_policy": math.inf, "mc/lens_loss": math.nan} if is_test else values

        return of_last

    monkeypatch.setattr(fit_module, "evaluator", broken)
    message = r"the test split gives nll_policy = inf, lens_loss = nan: .* checkpoints are in .*run/checkpoints$"
    with cheap_programs(), pytest.raises(FloatingPointError, match=message):
        start(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("torn", ["", '{"nll_policy": 1.', "[]"])
def test_e5_a_torn_summary_is_that_of_an_unfinished_run(tmp_path, whole, torn):
    folder = tmp_path / "run"
    config = tiny_config(folder)
    with cheap_programs():
        start(config)
        (folder / "summary.json").write_text(torn)
        assert run_folder.read_summary(folder) == {}
        recall.run_once(config, Console(file=io.StringIO()))
    assert outcome(folder) == whole


def test_d14_1_a_run_ends_well_where_jax_looks_for_nan(tmp_path, whole):
    with cheap_programs(), jax.debug_nans(True):
        summary = start(tiny_config(tmp_path / "run"))
    assert summary["preference_corr_mean"] == "n/a"
    assert outcome(tmp_path / "run") == whole


def test_e5_an_empty_run_folder_is_started(tmp_path, whole):
    (tmp_path / "run").mkdir()
    with cheap_programs():
        recall.run_once(tiny_config(tmp_path / "run"), Console(file=io.StringIO()))
    assert outcome(tmp_path / "run") == whole


ROWS = [{"policy": "recency", "nll": 1 / 3}]
REPORT = {"nll": math.nan, "low": -math.inf, "rows": (1, 2)}


@pytest.fixture
def output(tmp_path):
    return evaluate._Output(
        tmp_path, "evaluation", "--name", lambda *rows, **title: evaluate.quality.draw(*rows, **title)
    )


def test_e5_an_evaluation_that_was_killed_can_be_done_anew(tmp_path, monkeypatch, output):
    monkeypatch.setattr(evaluate.quality, "draw", lambda rows, path, **title: path.write_bytes(b"picture"))
    there = {"evaluation.csv": "table", "evaluation.json": "report", "evaluation.png": "picture"}
    write_text = files.write_text

    def killed_at(name):
        def write(path, *text):
            if path.name == name:
                raise Killed
            write_text(path, *text)

        return write

    for place, name in enumerate(there):
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_text", killed_at(name))
            if name.endswith("png"):
                patch.setattr(evaluate.quality, "draw", lambda rows, path, **title: killed_at(path.name)(path))
            with pytest.raises(Killed):
                output.write(ROWS, REPORT)
        assert [path.name for path in sorted(tmp_path.iterdir())][1:] == list(there)[:place]
        output.check_free()
    output.write(ROWS, REPORT)
    assert names(tmp_path) == sorted(there)
    with pytest.raises(FileExistsError, match=r"evaluation\.csv exists: pass another --name, or move it away"):
        output.check_free()


def test_d11_a_picture_that_fails_costs_no_evaluation(tmp_path, monkeypatch, capsys, output):
    monkeypatch.setattr(evaluate.quality, "draw", fail)
    output.write(ROWS, REPORT)
    assert capsys.readouterr().err.startswith(f"warning: no picture {tmp_path}/evaluation.png: Failed to process")
    assert names(tmp_path) == ["evaluation.csv", "evaluation.json"]
    with pytest.raises(FileExistsError):
        output.check_free()


def test_d12_1_no_budget_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="name one or more budgets"):
        evaluate.evaluate(evaluate.Arguments((tmp_path,), budgets=()))
    with pytest.raises(ValueError, match=r"there is none for .*evaluation\.csv"):
        tables.write_csv([], tmp_path / "evaluation.csv")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "a\\b", "", ".", "..", "x" * 250, "é" * 121])
def test_e8_a_name_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="--name must end in the name of a file without folders, of at most 240 bytes"):
        evaluate.evaluate(evaluate.Arguments((tmp_path,), name=name))
    assert contents(tmp_path) == {}


def test_d12_files_have_the_name_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_prepare", lambda run, arguments: run)
    monkeypatch.setattr(evaluate, "_evaluate_run", lambda job, *others: ROWS)
    monkeypatch.setattr(evaluate.quality, "draw", lambda rows, path, **title: path.touch())
    for name in ("lr=0.1", "three.seeds.csv", "研究"):
        evaluate.evaluate(evaluate.Arguments((tmp_path,), merged=tmp_path / "new" / name))
    asked = ("lr=0.1", "three.seeds", "研究")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"{a}.{b}" for a in asked for b in ("csv", "png")}


def test_reports_are_json(tmp_path):
    tables.write_json(REPORT, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"nll": None, "low": None, "rows": [1, 2]}


def test_a_warning_of_a_picture_has_one_line(tmp_path, capsys):
    for reason in ("", "one\ntwo"):
        with style.attempt(tmp_path / "a.png"):
            raise OSError(reason)
    assert capsys.readouterr().err == (
        f"warning: no picture {tmp_path}/a.png: OSError\nwarning: no picture {tmp_path}/a.png: one\n"
    )
