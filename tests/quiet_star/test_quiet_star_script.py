import io
import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.quiet_star import compare, pictures, train
from experiments.quiet_star.config import BakeConfig, QuietStarConfig, RLConfig
from experiments.quiet_star.model import ModelConfig
from lensjax.runs.engine import loop
from lensjax.runs.engine.stopping import StoppingConfig
from lensjax.runs.store import checkpoint, run_folder
from lensjax.runs.store.log import read_rows
from lensjax.training.optim.optimizer import OptimizerConfig
from tests.runs import saved_arrays

# A rate that harms at once: the first evaluation stays the best one.
TINY = QuietStarConfig(
    batch_size=4,
    logging_steps=1,
    eval_steps=2,
    save_steps=2,
    eval_batches=1,
    model=ModelConfig(dim=8, layers=1, heads=2, mlp_dim=8),
    bake=BakeConfig(steps=4),
    rl=RLConfig(episodes=6, warmup_episodes=2, thoughts=2, value_hidden=8),
    optimizer=OptimizerConfig(warmup_steps=1),
    stopping=StoppingConfig(patience=1, min_improvement=1e9),
)
METRICS = (
    *("episode", "reward", "avg_reward_100", "policy_loss", "value_loss", "entropy", "entropy_coefficient"),
    *("advantages", "kl_divergence", "total_loss", "num_thoughts", "coherence", "learning_rate"),
)
NAMES = (*compare.ROWS, "rl/anti_theater_all_passed")
"""What is measured on held-out questions; `measure.report` is tested by itself."""


def start(folder, *, resume=False, **changes):
    config = replace(TINY, output_dir=str(folder), **changes)
    return train.run(config, resume=resume, console=Console(file=io.StringIO()))


def rows_of(folder):
    return [{name: row[name] for name in row if not name.startswith("perf/")} for row in read_rows(folder)]


@pytest.fixture(scope="module", autouse=True)
def cheap_measurements():
    """What is measured says which parameters and questions it was measured on; the real one is slow to compile."""

    def evaluator(config, model, batches):
        def measured(params, split):
            weights = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(jax.device_get(params)))
            tokens = sum(int(batch["prompt"][0, 0]) for batch in batches(split))
            return dict.fromkeys(NAMES, weights + tokens) | {"rl/anti_theater_correlation": float("nan")}

        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluator", evaluator)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet") / "0"
    return folder, start(folder)


@pytest.mark.slow
def test_a_run_leaves_everything_behind(finished):
    folder, summary = finished
    files = {"config.json", "environment.json", "metrics.jsonl", "summary.json", "training.png", "tensorboard"}
    assert files <= {path.name for path in folder.iterdir()}
    np.testing.assert_equal(json.loads((folder / "summary.json").read_text()), summary)
    rows = rows_of(folder)
    assert {f"rl/{name}" for name in METRICS} <= next(row for row in rows if "rl/reward" in row).keys()
    measured = [row for row in rows if "eval/accuracy_sampled" in row]
    assert [(row["phase"], row["step"]) for row in measured] == [("bake", 2), ("bake", 4), ("rl", 2), ("rl", 4)]
    assert all(row["eval/rl/anti_theater_correlation"] == "n/a" for row in measured)
    assert {*NAMES, *(f"baked_{name}" for name in NAMES)} <= summary.keys()


@pytest.mark.slow
def test_a_phase_ends_early_and_gives_back_its_best_parameters(finished):
    """No evaluation is an improvement after the first: the live parameters go on moving, the best ones do not."""
    folder, summary = finished
    for phase in train.STEPS:
        assert checkpoint.steps(run_folder.checkpoint_dir(folder, phase)) == [2, 4]
        assert loop.kept_step(run_folder.checkpoint_dir(folder, phase)) == 2
    best, last = (saved_arrays(folder, "rl", step) for step in (2, 4))
    assert best["params/lm/thought/kernel"] != last["params/lm/thought/kernel"]
    model = train.build_model(TINY)
    like = jax.eval_shape(model.init, jax.random.key(0))
    kept = checkpoint.restore_subtree(run_folder.checkpoint_dir(folder, "rl"), 2, like, path=("params", "lm"))
    mesh = train.devices.make_mesh({"batch_size": TINY.batch_size})
    report = train.evaluator(TINY, model, train.held_out_questions(TINY, mesh))(kept, "test")
    assert summary["accuracy_sampled"] == report["accuracy_sampled"] != summary["baked_accuracy_sampled"]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_bit(finished, tmp_path):
    whole, summary = finished
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    shutil.rmtree(run_folder.checkpoint_dir(folder, "rl") / "4")
    (folder / "summary.json").unlink()
    config, resume = train.parse(["--resume", str(folder)])
    assert resume and config == replace(TINY, output_dir=str(folder))
    resumed = start(folder, resume=True)
    assert saved_arrays(folder, "rl", 4) == saved_arrays(whole, "rl", 4)
    np.testing.assert_equal(rows_of(folder), rows_of(whole))
    for name in summary.keys() - {"seconds", "bake_seconds", "rl_seconds"}:
        np.testing.assert_equal(resumed[name], summary[name])


@pytest.mark.slow
def test_another_run_goes_on_from_a_baked_model(finished, tmp_path):
    folder, summary = finished
    control = replace(TINY.rl, shuffle_rewards=True)
    found = start(tmp_path / "shuffled-0", start_from=str(folder), rl=control)
    assert not run_folder.checkpoint_dir(tmp_path / "shuffled-0", "bake").exists()
    for name in (name for name in summary if name.startswith("baked_")):
        np.testing.assert_equal(found[name], summary[name])
    for changes, message in (
        ({"start_from": str(tmp_path / "none")}, "holds no run"),
        ({"start_from": str(folder), "model": ModelConfig(dim=16)}, "model of start_from .* use the same"),
        ({"start_from": str(folder), "rl": RLConfig(episodes=0, warmup_episodes=0)}, "there is nothing to do"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            start(tmp_path / "other", **changes)
    assert not (tmp_path / "other").exists()
    # Both beside each other.
    shutil.copytree(folder, tmp_path / "0")
    arms = compare.compare(tmp_path)
    assert {arm: len(rows) for arm, rows in arms.items()} == {"own reward": 1, "shuffled": 1}
    assert {"report.md", "results.csv", "training.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_table_by_hand():
    names = [*compare.ROWS, "rl/anti_theater_all_passed"]
    one, other = ({"seed": seed} | {name: value for name in names} for seed, value in ((0, 0.0), (1, 1.0)))
    of_runs = [run | {f"baked_{name}": 0.25 for name in names} for run in (one, other)]
    lines = compare.table({"own reward": of_runs, "shuffled": [one]}).splitlines()
    assert lines[0] == "| test split | baked | own reward | shuffled |"
    assert lines[2] == "| seeds | 0, 1 | 0, 1 | 0 |"
    cells = "0.250 (0.250 to 0.250) | 0.500 (0.000 to 1.000) | 0.000 |"
    assert lines[3] == f"| accuracy, no thought | {cells}"
    undefined = {**one, "rl/anti_theater_correlation": "n/a"}
    assert "| n/a |" in compare.table({"own reward": of_runs, "shuffled": [undefined]})
    assert "| ablation (above 0.02) | " in lines[-4] and lines[-1].endswith("| 0 of 2 | 1 of 2 | 0 of 1 |")


def test_what_cannot_be_drawn_or_parsed(tmp_path):
    with pytest.raises(ValueError, match=r"one run or more that trained by REINFORCE, got arms none"):
        pictures.training({}, tmp_path / "x.png")
    with pytest.raises(SystemExit, match=r"no finished run in"):
        compare.main([str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no task unknown; there are: pointer, arithmetic"):
        train.main(["unknown"])
    config, resume = train.parse(["arithmetic", "--rl.reward", "accuracy"])
    assert not resume and (config.task.name, config.rl.reward) == ("arithmetic", "accuracy")
