import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from experiments.rlan import pictures, rules, train
from experiments.rlan.config import RlanConfig
from experiments.rlan.model import GridConfig
from experiments.rlan.rules import RulesConfig
from lensjax.models.hyperlora import PRESETS, HyperLoRAConfig
from lensjax.runs.store import checkpoint, run_folder
from lensjax.runs.store.log import read_rows
from lensjax.training.optim.optimizer import OptimizerConfig
from tests.runs import saved_arrays

TINY = RlanConfig(
    steps=4,
    batch_size=2,
    logging_steps=2,
    eval_steps=2,
    save_steps=2,
    eval_batches=1,
    vote_batches=1,
    vote_permutations=1,
    equivariance_views=1,
    grid=GridConfig(dim=8, steps=2),
    rules=RulesConfig(size=3, pairs=2),
    hyperlora=HyperLoRAConfig(rank=2),
    optimizer=OptimizerConfig(warmup_steps=1),
)


def start(folder, *, resume=False):
    return train.run(replace(TINY, output_dir=str(folder)), resume=resume, console=Console(file=io.StringIO()))


def rows_of(folder):
    return [{name: row[name] for name in row if not name.startswith("perf/")} for row in read_rows(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlan") / "run"
    return folder, start(folder)


@pytest.mark.slow
def test_a_run_leaves_everything_behind(finished):
    folder, summary = finished
    files = {"config.json", "environment.json", "metrics.jsonl", "summary.json", "predictions.png"}
    assert files <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "summary.json").read_text()) == summary
    named = {"exact", "exact_zeroed", "exact_foreign", "exact_copy", "exact_table", "loo_accuracy", "loo_lift"}
    named |= {
        "lora_diversity",
        "lora_magnitude_output_head",
        "exact_mean_view",
        "pass@1",
        "pass@2",
        "pass@3",
        "loo_skipped_ratio",
    }
    assert named <= summary.keys() and summary["pass@1"] <= summary["pass@2"] <= summary["pass@3"]
    assert summary["lora_diversity"] > 0 and summary["split"] == "test"
    training = [row for row in rows_of(folder) if "loss" in row]
    assert [row["step"] for row in training] == [2, 4] and training[0]["phase"] == "meta"
    assert {"loo_loss", "loo_accuracy", "loo_skipped_ratio", "equivariance_loss", "equiv_delta_norm"} <= training[
        0
    ].keys()
    assert checkpoint.steps(run_folder.checkpoint_dir(folder, "meta")) == [2, 4]


@pytest.mark.slow
def test_balanced_families_are_measured_one_by_one(tmp_path, monkeypatch):
    """Each on its own test rules: cells moved, where copies and tables are right by chance, and objects recoloured."""
    monkeypatch.setattr(train, "votes", lambda *arguments: {})  # slow to compile
    families = RulesConfig(families=("roll", "rank"), size=6, pairs=2, balanced=True)
    config = replace(TINY, rules=families, eval_batches=8, output_dir=str(tmp_path / "run"))
    summary = train.run(config, console=Console(file=io.StringIO()))
    scores = {
        f"{metric}{arm}" for metric in ("exact", "pixel") for arm in ("", "_zeroed", "_foreign", "_copy", "_table")
    }
    assert {name for name in summary if "/" in name} == {f"{name}/{x}" for name in ("roll", "rank") for x in scores}
    assert summary["roll/pixel_copy"] < 0.2 < 0.6 < summary["rank/pixel_copy"]
    assert summary["pixel_copy"] == pytest.approx(
        (summary["roll/pixel_copy"] + summary["rank/pixel_copy"]) / 2, abs=0.05
    )
    unbalanced = replace(config, rules=replace(families, balanced=False))
    assert config.balanced_families == ("roll", "rank") and unbalanced.balanced_families == ()
    assert replace(config, tasks="arc").balanced_families == ()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_bit(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "votes", lambda *arguments: {})  # slow to compile
    whole, summary = finished
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    shutil.rmtree(run_folder.checkpoint_dir(folder, "meta") / "4")
    (folder / "summary.json").unlink()
    config, resume = train.parse(["--resume", str(folder)])
    assert resume and config == replace(TINY, output_dir=str(folder))
    resumed = start(folder, resume=True)
    assert saved_arrays(folder, "meta", 4) == saved_arrays(whole, "meta", 4)
    assert rows_of(folder) == rows_of(whole)
    assert all(summary[name] == value for name, value in resumed.items() if not name.endswith("seconds"))
    assert "exact" in resumed


@pytest.mark.slow
def test_the_command_line(finished, tmp_path):
    folder, _ = finished
    config, resume = train.parse(["rlan_stable", "--seed", "3", "--hyperlora.rank", "4"])
    assert not resume and config.hyperlora == replace(PRESETS["rlan_stable"], rank=4) and config.seed == 3
    for words, message in (
        (["--output-dir", str(folder)], "is not empty"),
        (["unknown"], "no preset unknown; there are: rlan_stable, rlan_stable_safe"),
        (["--resume", str(tmp_path)], "holds no run"),
        (["--resume", str(folder), "--seed", "1"], "a run folder and nothing else"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(words)
    with pytest.raises(ValueError, match=r"rules.pairs must be at least 2 to leave one example out, got 1"):
        replace(TINY, rules=RulesConfig(pairs=1))


def test_wrong_cells_are_dotted(tmp_path):
    answer = rules.padded(np.asarray([[1, 2], [3, 4]]), 3)
    row = {"support": answer[None, None].repeat(2, axis=1), "query": np.stack([answer, answer])}
    figure = pictures.predictions([row | {"A": answer, "B": np.where(answer == 4, 5, answer)}], tmp_path / "x.png")
    assert [ax.get_title() for ax in figure.axes] == ["input 1", "output 1", "question", "answer", "A", "B"]
    assert [sum(len(c.get_offsets()) for c in ax.collections) for ax in figure.axes] == [0, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"one task or more"):
        pictures.predictions([], tmp_path / "y.png")
