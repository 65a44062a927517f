"""`experiments.studies.remember`: all policies on the same streams, and what it writes."""

import csv

import numpy as np
import pytest

from experiments import train
from experiments.studies import remember
from experiments.studies.remember import Arguments
from lensjax.runs.store import config_file
from lensjax.training.steps.supo import SupoConfig
from tests.runs import cheap_programs, tiny_config

# Seven statements of four tokens, a question of two and its answer.
TRACKING = {"data.task": "tracking", "data.hops": 2, "context.recent_tokens": 2, "context.omit": True}
SUPO = SupoConfig(steps=2, trajectories=2, window=3, refocus_steps=4, draws=1)


def arguments(folder, base, **changes):
    given = {"seeds": (0, 1), "chains": 2, "batch_size": 2, "examples": 12, "supo": SUPO}
    return Arguments(base, folder / "out", **{**given, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a base run and a study of it, and the study's rows."""
    folder = tmp_path_factory.mktemp("remember")
    with cheap_programs():
        train.run(tiny_config(folder / "base", steps=0, **TRACKING))
    return folder, remember.remember(arguments(folder, folder / "base"))


@pytest.mark.slow
def test_all_policies_are_measured_on_the_same_streams(whole):
    folder, rows = whole
    names = ["last", "first", "random", "answer", "untrained", "late", "steps"]
    assert [(row["policy"], row["seed"]) for row in rows] == [(name, seed) for seed in (0, 1) for name in names]
    assert {row["policy"] for row in rows if row["information"] == "hindsight"} == {"answer"}
    kept = {name: np.mean([row["kept"] for row in rows if row["policy"] == name]) for name in names}
    assert kept["answer"] == 1 and kept["last"] == 0 and 0 < kept["random"] < 1
    # One measurement of each of four trajectories, or one more than there are refocus steps.
    assert [row["passes_per_step"] for row in rows[:7]] == [0, 0, 0, 0, 0, 4, 20]
    assert all(np.isfinite(row["nll"]) for row in rows)
    with (folder / "out" / "remember.csv").open(newline="") as file:
        assert [row["policy"] for row in csv.DictReader(file)] == names * 2
    report = (folder / "out" / "report.md").read_text()
    assert all(f"| `{name}` |" in report for name in names) and "--supo.window 3" in report


@pytest.mark.slow
def test_an_interrupted_study_goes_on_with_what_is_missing(whole, tmp_path, monkeypatch):
    base, trained, train_one = whole[0] / "base", [], remember._train

    def dies(arguments, chosen, *rest):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(chosen.reward)
        return train_one(arguments, chosen, *rest)

    monkeypatch.setattr(remember, "_train", dies)
    with pytest.raises(KeyboardInterrupt):
        remember.remember(arguments(tmp_path, base))
    trained.clear()
    with pytest.raises(ValueError, match="was begun with other values of chains: choose"):
        remember.remember(arguments(tmp_path, base, chains=1, resume=True))
    rows = remember.remember(arguments(tmp_path, base, resume=True))
    assert trained == ["late", "steps"]
    for row, expected in zip(rows, whole[1], strict=True):
        assert row | {"seconds_per_step": 0} == expected | {"seconds_per_step": 0}


BAD = {
    "seeds": ({"seeds": (1, 1)}, {}, "seeds must name two or more different seeds"),
    "task": ({}, {"data.task": "recall", "context.omit": False}, "is of task recall: expected one of tracking"),
    "steps": ({"supo": SupoConfig(steps=1, window=3)}, {}, "supo.steps must be above optimizer.warmup_steps 1 .* 1"),
    "window": ({"supo": SupoConfig(steps=2, window=7)}, {}, "supo.window must be below the 7 blocks"),
    "chains": ({"chains": 3}, {}, "chains of 2 statements must fit into 4: at most 2, got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_before_anything_is_written(name, tmp_path):
    changes, of_base, message = BAD[name]
    base = tmp_path / "base"
    base.mkdir()
    config = tiny_config(base, steps=0, **{**TRACKING, **of_base})
    (base / "config.json").write_text(config_file.to_json(config))
    with pytest.raises(ValueError, match=message):
        remember.remember(arguments(tmp_path, base, **changes))
    assert not (tmp_path / "out").exists()
