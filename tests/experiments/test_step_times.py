"""The times of the objectives' steps, on a shape that takes no time."""

import csv

import jax
import pytest

from experiments.bench import step_times as script
from lensjax import _settings
from lensjax.runs.store import config_file
from tests.small import SMALL

pytestmark = pytest.mark.slow


def test_every_objective_is_timed(tmp_path, monkeypatch):
    (tmp_path / "small.json").write_text(config_file.to_json(SMALL))
    monkeypatch.setattr(script, "OBJECTIVES", ("spans", "copg"))
    monkeypatch.setattr(script, "_step", lambda config: lambda: len(config.objective.name) * config.batch_size)
    file = tmp_path / "times.csv"
    script.main(["--preset", str(tmp_path / "small.json"), "--repetitions", "3", "--csv", str(file)])
    with file.open() as table:
        rows = list(csv.DictReader(table))
    assert [row["objective"] for row in rows] == ["spans", "copg", "own edits"]
    assert float(rows[0]["ratio"]) == 1 and all(float(row["step_ms"]) > 0 for row in rows)


@pytest.mark.parametrize(("changes", "names"), [({}, "mc/lens_loss"), ({"online.steps": 3}, "rl/total_loss")])
def test_steps_are_those_of_training(changes, names):
    state, report = jax.eval_shape(script._step(_settings.replace(SMALL, **changes)))
    assert names in report and state.step.shape == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--csv", "{tmp}/there"], "there exists: name"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, words, message):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(SystemExit, match=message):
        script.main([word.replace("{tmp}", str(tmp_path)) for word in words])
    assert (tmp_path / "there").read_text() == "mine"


def test_no_repetition_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--repetitions", "0"])
    assert "repetitions must be at least 1, got 0" in capsys.readouterr().err
