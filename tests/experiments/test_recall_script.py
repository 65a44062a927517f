"""`experiments.studies.recall`: which runs it makes, what it writes, and how it goes on when it is interrupted."""

import csv
import json
import math
import re

import pytest

from experiments.studies import recall
from lensjax import _settings
from lensjax.evaluation import rivals
from lensjax.runs.config import Config
from lensjax.runs.store import config_file, paths
from tests.runs import TINY, Killed, cheap_programs, contents, hook_run, outcome, request_stop

PRESET = """
from lensjax._settings import replace
from tests.runs import TINY

CONFIG = replace(TINY, steps=4)
"""
ARMS = ("both", "worse_only")


@pytest.fixture(scope="module")
def cheap():
    with cheap_programs():
        yield


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "tiny.py"
    path.write_text(PRESET)
    return path


@pytest.fixture(scope="module")
def whole(cheap, preset, tmp_path_factory):
    """The folder of a comparison that nobody interrupted."""
    folder = tmp_path_factory.mktemp("recall") / "whole"
    recall.main(["--output-dir", str(folder), "--preset", str(preset), "--seeds", "0", "1"])
    return folder


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.slow
def test_the_comparison_runs_each_arm_for_each_seed_on_one_base_model(whole):
    runs = ("base", "both-0", "both-1", "worse_only-0", "worse_only-1")
    assert {path.name for path in whole.iterdir()} == {*runs, "summary.json", "policies.csv"}
    stored = {name: config_file.load(whole / name / "config.json", Config) for name in runs}
    expected = paths.resolved(_settings.replace(TINY, steps=4))
    assert stored["base"] == _settings.replace(expected, steps=0, output_dir=str(whole / "base"))
    for arm in ARMS:
        for seed in (0, 1):
            assert stored[f"{arm}-{seed}"] == _settings.replace(
                expected,
                seed=seed,
                output_dir=str(whole / f"{arm}-{seed}"),
                base_run=str(whole / "base"),
                **{"objective.targets": arm},
            )


@pytest.mark.slow
def test_the_summary_has_a_list_over_seeds_for_each_arm(whole):
    summary = summary_of(whole)
    assert (summary["task"], summary["split"], summary["seeds"], summary["steps"]) == ("recall", "test", [0, 1], 4)
    for arm in ARMS:
        assert summary[arm].keys() >= {
            *("hit_rate", "hit_rate_random", "nll_policy", "nll_recency", "nll_random", "nll_oracle"),
            *("agreement", "agreement_lod_only"),
        }
        runs = [summary_of(whole / f"{arm}-{seed}") for seed in (0, 1)]
        assert summary[arm]["hit_rate"] == [run["hit_rate"] for run in runs]
        assert summary[arm]["nll_recency"] == [run["nll_baseline"] for run in runs]
        assert summary[arm]["nll_random"] == [run["nll_rollout_mean"] for run in runs]
        assert summary[arm]["nll_oracle"] == [run["nll_oracle"] for run in runs]
        assert summary["training_seconds"][arm] == [run["training_seconds"] for run in runs]
    assert summary["both"]["hit_rate"][0] != summary["both"]["hit_rate"][1]
    assert summary["base_nll_full_tail"] == summary_of(whole / "base")["nll_full_tail"]


@pytest.mark.slow
def test_the_summary_sets_lensnet_beside_every_policy_and_says_what_each_may_know(whole):
    summary = summary_of(whole)
    assert summary["query"] == TINY.data.query
    policies, told = summary["policies"], summary["information"]
    assert {"recency", "random", "bm25", "lookup", "snapkv", "lensnet_4", "lensnet_fresh", "answer"} <= set(policies)
    assert told == {name: rivals.information(name) for name in policies} and told["answer"] == "hindsight"
    for name, row in policies.items():
        assert all(math.isfinite(loss) for loss in row["nll"]) and len(row["nll"]) == len(row["hit_rate"]) == 2
        # The seeds are LensNet's: who does not ask it chooses the same each time.
        assert name.startswith(("lensnet", "oracle")) or len(set(row["nll"])) == 1
    assert policies["answer"]["hit_rate"] == policies["lookup"]["hit_rate"] == [1, 1]
    with (whole / "policies.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy"], row["seed"]) for row in rows] == [(name, seed) for name in policies for seed in "01"]
    assert all(row["information"] == told[row["policy"]] for row in rows)


def test_a_query_of_another_length_changes_what_is_scored():
    base, lens = recall._configs(recall.Arguments(query=5))
    for config in (base, *lens.values()):
        assert (config.data.query, config.context.recent_tokens, config.context.horizon) == (5, 5, 3)


@pytest.mark.slow
def test_the_table_shows_both_arms(whole, preset, capsys):
    recall.main(["--output-dir", str(whole), "--preset", str(preset), "--seeds", "0", "1", "--resume"])
    table = capsys.readouterr().out
    for word in (*ARMS, "hit_rate", "hit_rate_random", "nll_policy", "agreement_lod_only"):
        assert word in table
    for column, values in summary_of(whole)["both"].items():
        assert f"{sum(values) / 2:.3f}" in table, column


@pytest.mark.slow
def test_a_folder_in_use_is_never_written_to(whole, preset):
    before = contents(whole)
    with pytest.raises(SystemExit, match=r"error: .*whole is not empty: choose another --output-dir, or pass --resume"):
        recall.main(["--output-dir", str(whole), "--preset", str(preset)])
    assert contents(whole) == before


@pytest.mark.slow
def test_resume_finishes_what_is_missing_and_nothing_else(whole, cheap, preset, tmp_path, monkeypatch):
    """Killed in the second of three runs, stopped in the third."""
    folder, steps = tmp_path / "run", []

    def hook(place, phase, step):
        if place == "step":
            steps.append((phase, step))
            if len(steps) == 4 + 3:
                raise Killed
            if len(steps) == 4 + 3 + 2 + 1:
                request_stop()

    hook_run(monkeypatch.setattr, hook)
    words = ["--output-dir", str(folder), "--preset", str(preset), "--seeds", "0"]
    with pytest.raises(Killed):
        recall.main(words)
    finished = contents(folder / "base")
    with pytest.raises(SystemExit) as end:
        recall.main([*words, "--resume"])
    assert end.value.code == 143 and not (folder / "summary.json").exists()
    finished |= contents(folder / "both-0")
    recall.main([*words, "--resume"])
    assert steps[7:] == [("lens", step) for step in (3, 4, 1, 2, 3, 4)]
    assert contents(folder / "base") | contents(folder / "both-0") == finished
    for name in ("base", "both-0", "worse_only-0"):
        assert outcome(folder / name) == outcome(whole / name)
    recall.main([*words, "--resume"])
    assert len(steps) == 13


@pytest.mark.slow
def test_results_of_another_configuration_are_not_taken(whole, preset):
    before = contents(whole)
    words = ["--output-dir", str(whole), "--preset", str(preset), "--resume"]
    with pytest.raises(SystemExit, match=r"cannot resume .*both-0 .*: steps is 4 in the run and 3 now"):
        recall.main([*words, "--seeds", "0", "1", "--steps", "3"])
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--preset demo", "preset demo has data.task 'stdlib': expected one for recall"),
        ("--preset nosuch", "no config .*nosuch.py; name a file, or one of: demo, notes, recall"),
        ("--query 8", "context.horizon must be at least 1, got 0"),
        ("--steps 3", "steps must be above optimizer.warmup_steps 20, got 3"),
        ("--steps 0", "there is nothing to do; raise steps or drop base_run"),
        ("--seeds 1 1", "seeds must name one or more different seeds, got (1, 1)"),
        ("--seeds", "seeds must name one or more different seeds, got ()"),
        ("--seeds -1", "seeds must be .*, got (-1,)"),
        ("--output-dir {tmp}/file", "{tmp}/file"),
        ("--sedes 1", "Unrecognized options: --sedes"),
    ],
)
def test_bad_command_lines_are_refused_before_anything_is_written(tmp_path, command, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(recall, "run", lambda *args, **kwargs: pytest.fail("a run was started"))
    (tmp_path / "file").write_text("")
    words = command.replace("{tmp}", str(tmp_path)).split()
    with pytest.raises(SystemExit) as end:
        recall.main(words if "--output-dir" in words else [*words, "--output-dir", str(tmp_path / "run")])
    told = end.value.code if isinstance(end.value.code, str) else " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2 or re.fullmatch("error: [^\n]+", told)
    assert re.search(re.escape(message.replace("{tmp}", str(tmp_path))).replace(r"\.\*", ".*"), told), told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        recall.main(["--help"])
    assert end.value.code == 0 and "--seeds" in capsys.readouterr().out
