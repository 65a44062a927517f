"""`experiments.train` in a process of its own: what a whole run leaves, and how it ends when it is interrupted."""

import json
import math
import re
import signal
from pathlib import Path

import jax
import pytest

import lensjax as lx
from lensjax.runs.config import Config
from lensjax.runs.store import checkpoint, config_file, paths
from lensjax.runs.store.log import read_rows
from tests.runs import TINY, all_saved_are_finite, bits, outcome, run_script, saved_arrays, tiny_config, write_corpus

ALL = {"distill.steps": 5, "online.steps": 5}
TRAINED = ("distill", "lens", "online")
SUMMARY_KEYS = {
    "nll_baseline",
    "nll_rollout_mean",
    "nll_rollout_best",
    "preference_agreement",
    "preference_agreement_lod_only",
    "preference_corr_mean",
    "preference_pair_count",
    "steps",
    "seconds",
    "seed",
}


@pytest.fixture(scope="module")
def real(tmp_path_factory, programs):
    """A finished run on text files through all phases, with a curriculum, and what it printed."""
    folder = tmp_path_factory.mktemp("real")
    curriculum = {"hyper.context_start": 0.95, "optimizer.curriculum_steps": 3}
    config = tiny_config(folder / "run", write_corpus(folder / "corpus"), **curriculum, **ALL)
    (folder / "config.json").write_text(config_file.to_json(config))
    done = run_script(folder / "config.json", cache=programs, JAX_LOG_COMPILES="1")
    assert done.returncode == 0, done.stderr
    return folder / "run", done


@pytest.mark.slow
def test_the_folder_of_a_run(real):
    folder, done = real
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "environment.json", "metrics.jsonl", "summary.json"),
        *("tensorboard", "checkpoints", "training.png", "maps.png"),
    }
    for name in ("training.png", "maps.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and (folder / name).stat().st_size > 10_000
    assert config_file.load(folder / "config.json", Config) == paths.resolved(
        config_file.load(folder.parent / "config.json", Config)
    )
    assert {path.name for path in (folder / "tensorboard").iterdir()} == {"pretrain", *TRAINED}
    assert checkpoint.steps(folder / "checkpoints" / "pretrain") == [2, 4]
    for phase in TRAINED:
        assert checkpoint.steps(folder / "checkpoints" / phase) == [2, 4, 5]
    assert all_saved_are_finite(folder)
    assert done.stdout.splitlines()[0] == f"run folder {folder}, {jax.default_backend()}, attention xla, seed 0"
    assert done.stdout.splitlines()[-1] == f"pictures, metrics and checkpoints are in {folder}"


@pytest.mark.slow
def test_the_summary_of_a_run(real):
    folder, _ = real
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["task"], summary["split"], summary["steps"], summary["seed"]) == ("text", "test", 5, 0)
    assert summary["sequences"] == TINY.batch_size * TINY.eval_batches
    # Nothing is a key token to a model that has hardly been trained.
    undefined = {"preference_corr_mean", "nll_policy_key", "nll_baseline_key"}
    numbers = [value for name, value in summary.items() if name not in {"task", "split"} | undefined]
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
    assert summary["nll_policy_key"] == "n/a" and summary["key_token_share"] == 0
    # A model that knows nothing loses ln(256) nats per token, and this one has hardly been trained.
    for name in ("nll_full", "nll_baseline", "nll_rollout_mean", "nll_rollout_best", "nll_policy"):
        assert abs(summary[name] - math.log(256)) < 0.3
    assert summary["nll_rollout_best"] <= summary["nll_rollout_mean"]
    assert 0 < summary["preference_pair_count"] <= summary["sequences"] * TINY.objective.max_pairs
    assert 0 < summary["training_seconds"] < summary["seconds"]


@pytest.mark.slow
def test_the_metrics_of_a_run(real):
    rows = read_rows(real[0])
    steps = [(row["phase"], row["step"], "eval" if "loss" not in row else "train") for row in rows]
    both = [("train",), ("train",), ("train", "eval"), ("train",), ("train", "eval")]
    assert steps == [("pretrain", step, kind) for step, kinds in enumerate(both[:3], 1) for kind in kinds] + [
        ("pretrain", 4, "train"),
        ("pretrain", 4, "eval"),
        *((phase, step, kind) for phase in TRAINED for step, kinds in enumerate(both, 1) for kind in kinds),
    ]
    lengths = [row["context_length"] for row in rows if "context_length" in row]
    assert lengths == [27, 24, 21, 21, 21]


@pytest.mark.slow
def test_each_program_compiles_once_in_a_whole_run(real):
    compiled = re.findall(r"Compiling jit\((\w+)\)", real[1].stderr)
    programs = ("pretrain_step", "pretrain_eval_step", "distill_step", "train_step", "online_step")
    programs += ("eval_step", "variant_maps")
    assert {name: compiled.count(name) for name in programs} == dict.fromkeys(programs, 1)


@pytest.mark.slow
def test_a_base_model_that_is_not_trained_stays_frozen(real):
    earlier, after = saved_arrays(real[0], "lens", 2), saved_arrays(real[0], "online", 5)
    lens = {name for name in after if name.startswith("params/lens/")}
    assert lens and all(after[name] != earlier[name] for name in lens)
    # What is not trained is not saved again.
    assert not [name for name in (*earlier, *after) if name.startswith(("params/base/", "params/gist/"))]


@pytest.mark.slow
def test_a_base_run_gives_its_base_model(real, programs, tmp_path):
    folder, _ = real
    before = outcome(folder)
    words = [folder / "config.json", "--output-dir", tmp_path / "run", "--base-run", folder, "--seed", "1"]
    done = run_script(*words, cache=programs)
    assert done.returncode == 0, done.stderr
    assert outcome(folder) == before
    theirs, ours = (lx.load(run).params for run in (folder, tmp_path / "run"))
    for name in ("base", "gist"):
        assert bits(ours[name]) == bits(theirs[name])
    assert bits(ours["lens"]) != bits(theirs["lens"])
    assert not (tmp_path / "run" / "checkpoints" / "pretrain").exists()


@pytest.mark.slow
def test_a_learning_rate_that_explodes_stops_the_command(real, programs, tmp_path):
    folder, _ = real
    words = [folder / "config.json", "--output-dir", tmp_path / "run", "--base-run", folder]
    words += ["--hyper.learning-rate", "1e38"]
    done = run_script(*words, cache=programs)
    assert done.returncode == 1
    assert re.search(r"^error: phase lens, step \d: .* = (nan|inf|-inf)[,;].* checkpoint", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


# Both kinds of signals in one run; the first kill comes in the last save of the first phase.
SIGNALS = [
    ("in save", "pretrain", 4, signal.SIGKILL),
    ("step", "distill", 3, signal.SIGTERM),
    ("step", "lens", 3, signal.SIGTERM),
]


@pytest.mark.slow
def test_a_run_that_gets_signals_ends_as_if_nothing_had_happened(programs, tmp_path):
    """Real programs, in processes that a signal ends."""
    config = tiny_config(tmp_path / "whole", **{"distill.steps": 5})
    (tmp_path / "config.json").write_text(config_file.to_json(config))
    whole = run_script(tmp_path / "config.json", cache=programs)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "run"
    words: list[str | Path] = [tmp_path / "config.json", "--output-dir", folder]
    for place, phase, step, number in SIGNALS:
        interrupt = (place, phase, step, int(number))
        done = run_script(*words, cache=programs, interrupt=interrupt)
        if number == signal.SIGTERM:
            assert done.returncode == 143, done.stderr
            assert f"stopped at {phase} step {step}; go on with --resume {folder}\n" in done.stdout
            assert (folder / "checkpoints" / phase / str(step)).is_dir()
        else:
            assert done.returncode == -signal.SIGKILL, done.stderr
        words = ["--resume", folder]
    done = run_script(*words, cache=programs)
    assert done.returncode == 0, done.stderr
    assert outcome(folder) == outcome(tmp_path / "whole")
