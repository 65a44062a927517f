"""`experiments.studies.curriculum`: which runs it makes, when a target is reached, and what it writes."""

import csv
import json

import pytest

from experiments.studies import curriculum
from experiments.studies.curriculum import Arguments
from lensjax import _settings
from tests.runs import TINY, cheap_programs

PRESET = """
from lensjax._settings import replace
from tests.runs import TINY

CONFIG = replace(TINY, steps=4, **{"context.rollouts": 4, "context.local_edits": 1, "context.omit": True})
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "tiny.py"
    path.write_text(PRESET)
    return str(path)


def test_every_arm_costs_the_same_passes(preset, tmp_path):
    base, lens = curriculum.configs(Arguments(output_dir=tmp_path, preset=preset, seeds=(0, 1), start=0.5, end=0.4))
    assert base.steps == 0 and len(lens) == 12 and [seed for _, seed in lens] == [0] * 6 + [1] * 6
    assert {curriculum.passes_per_step(config) for config in lens.values()} == {2 * 5}
    assert lens["own", 1].context.own_rollouts == lens["adversary", 0].context.proposed_rollouts == 2
    climbs = {arm for (arm, _), config in lens.items() if config.curriculum.climbs}
    assert climbs == {"self_play", "adversary", "own_self_play"}
    assert lens["none", 0].hyper.context_start == lens["none", 0].hyper.context_end == 0.4
    assert {config.budget for config in lens.values()} == {base.budget}


@pytest.mark.parametrize(("target", "passes"), [(0.2, 0), (0.4, 20 * 6), (0.9, None)])
def test_passes_are_those_before_the_first_measurement_that_reaches_the_target(monkeypatch, target, passes):
    more = {"eval/nll_policy": 1.0, "eval/nll_baseline": 2.0, "eval/mc/preference_agreement": 0.5}
    rows = [{"phase": "lens", "step": step, "eval/hit_rate": rate, **more} for step, rate in ((10, 0.1), (20, 0.5))]
    rows += [{"phase": "lens", "step": 30, "eval/hit_rate": 0.3, **more}, {"phase": "lens", "step": 40}]
    monkeypatch.setattr(curriculum, "read_rows", lambda folder: [{"phase": "pretrain", "step": 1}, *rows])
    before = dict.fromkeys(curriculum.MEASURED, 0.25)
    measured = {0: before} | curriculum.measurements(TINY)
    assert list(measured) == [0, 10, 20, 30]
    found = curriculum.outcome(TINY, measured, target)
    assert (found["passes"], found["hit_rate"], found["level"]) == (passes, 0.3, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seeds": (1, 1)}, "seeds must name"), ({"arms": ()}, "arms must name"), ({"preset": "demo"}, "one for recall")],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        curriculum.configs(_settings.replace(Arguments(), **changes))


@pytest.mark.slow
def test_the_study_runs_with_one_command(preset, tmp_path):
    folder = tmp_path / "study"
    words = ["--preset", preset, "--seeds", "0", "1", "--end", "0.4", "--target", "0.0"]
    words += ["--steps", "4", "--eval-steps", "2"]
    with cheap_programs():
        curriculum.main(["--output-dir", str(folder), *words])
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["tells"]) == {"none", "own"}
    assert all(0 <= one["shown"] <= 1 and 0 <= one["differ"] <= 1 for one in summary["tells"].values())
    assert len(summary["untrained"]["hit_rate"]) == 2 and (folder / "curriculum.png").stat().st_size > 5000
    assert list(summary["arms"]) == ["fixed", "none", "self_play", "adversary", "own", "own_self_play"]
    assert all(passes is not None for of in summary["arms"].values() for passes in of["passes"])
    with (folder / "curriculum.csv").open() as file:
        rows = [(row["arm"], row["seed"]) for row in csv.DictReader(file)]
    assert rows == [(arm, seed) for arm in summary["arms"] for seed in ("0", "1")]
