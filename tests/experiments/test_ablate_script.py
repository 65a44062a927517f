"""`experiments.studies.ablate`: its arms, what it writes, what it refuses, and what is lost when it is killed."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train as train_script
from experiments.studies import ablate as script
from experiments.studies import ablate_arms
from lensjax import _settings
from lensjax.runs.fit import LENS_STREAM, evaluator, stream
from lensjax.runs.load import load_start
from lensjax.runs.store import config_file, lock
from lensjax.runs.store.log import read_rows
from lensjax.runs.sweep import Sweep
from lensjax.training.steps.train_state import init_train_state
from tests.runs import ROOT, TINY, contents

SWEEP = """
from lensjax.runs.sweep import Sweep

SWEEP = Sweep(preset="{preset}", seeds=(0, 4), one_at_a_time={{"hyper.temperature": (0.5, 2.0)}})
"""
ARMS = 8
"""Three settings and the control, with two seeds each."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A preset, the base run of it, and a sweep."""
    folder = tmp_path_factory.mktemp("ablate")
    preset = folder / "preset.json"
    preset.write_text(config_file.to_json(TINY))
    train_script.run(_settings.replace(TINY, steps=0, output_dir=str(folder / "base")))
    (folder / "small.py").write_text(SWEEP.format(preset=preset))
    return folder


def arguments(workplace, output_dir, **changes):
    return script.Arguments(
        **{"sweep": str(workplace / "small.py"), "base_run": workplace / "base", "output_dir": output_dir} | changes
    )


@pytest.fixture(scope="module")
def whole_and_compiled(workplace, compiles):
    folder = workplace / "whole"
    with compiles() as names:
        script.ablate(arguments(workplace, folder, chunk=4))
    return folder, names


@pytest.fixture(scope="module")
def whole(whole_and_compiled):
    return whole_and_compiled[0]


def table(folder: Path):
    with (folder / "arms.csv").open() as file:
        return list(csv.DictReader(file))


def name_of(row):
    return row["hyper.temperature"], row["steps"], row["seed"]


@pytest.mark.slow
def test_one_row_an_arm(whole):
    rows = table(whole)
    assert [name_of(row) for row in rows] == [
        (temperature, steps, seed)
        for temperature, steps in (("1", "5"), ("0.5", "5"), ("2", "5"), ("1", "0"))
        for seed in ("0", "4")
    ]
    assert {"nll", "gap_closed_oracle", "swap_rate", "diverged", "steps"} <= set(rows[0])
    assert all(np.isfinite(float(row[name])) for row in rows for name in ("nll", "gap_closed_oracle", "swap_rate"))
    assert {row["diverged"] for row in rows} == {"False"}
    assert len({row["policy_score_abs_mean"] for row in rows}) == ARMS


@pytest.mark.slow
def test_the_control_is_lensnet_as_training_finds_it(whole, workplace):
    config = _settings.replace(TINY, base_run=str(workplace / "base"), seed=4)
    models = config.build_models()
    key, params = stream(config, LENS_STREAM), load_start(config, models)
    state, frozen = init_train_state(key, recipe=config.recipe, models=models, params=params)
    batches = jax.tree.map(jnp.asarray, ablate_arms._held_out(config))
    expected = evaluator(config, models)(state, frozen, batches)
    (control,) = [row for row in table(whole) if name_of(row) == ("1", "0", "4")]
    # A few steps leave what is picked as it was, but no score.
    assert float(control["nll"]) == pytest.approx(float(expected["nll_policy"]), rel=1e-5)
    score = "policy_score_abs_mean"
    assert float(control[score]) == pytest.approx(float(expected[f"mc/{score}"]), rel=1e-5)


@pytest.mark.slow
def test_the_report_compares_each_setting_with_the_default(whole):
    report = (whole / "report.md").read_text()
    for words in ("hyper.temperature = 0.5", "hyper.temperature = 2.0", "2 seeds", "Holm"):
        assert words in report
    assert (whole / "effects.png").stat().st_size > 5000
    with (whole / "effects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["knob"] for row in rows] == ["default", "hyper.temperature", "hyper.temperature", "steps"]
    by_arm = {(row["hyper.temperature"], row["seed"]): float(row["nll"]) for row in table(whole) if row["steps"] == "5"}
    for row in rows[1:-1]:
        value = f"{float(row['value']):g}"
        expected = np.mean([by_arm[value, seed] - by_arm["1", seed] for seed in ("0", "4")])
        assert float(row["difference"]) == pytest.approx(expected, abs=2e-5)


@pytest.mark.slow
def test_an_arm_is_the_run_of_the_training_script(whole, workplace):
    setting = {"hyper.temperature": 0.5}
    default = _settings.replace(TINY, base_run=str(workplace / "base"))
    run = _settings.replace(default, seed=4, output_dir=str(workplace / "alone"), **setting)
    train_script.run(run)
    last = [row for row in read_rows(workplace / "alone") if "eval/nll_policy" in row][-1]
    (arm,) = [json.loads(path.read_text()) for path in (whole / "arms").iterdir() if is_of(path, setting, 4)]
    for name in ("nll_policy", "nll_baseline", "mc/preference_agreement", "mc/swap_rate", "mc/policy_score_abs_mean"):
        assert arm["metrics"][name] == pytest.approx(last[f"eval/{name}"], abs=1e-6), name


def is_of(path, setting, seed):
    stored = json.loads(path.read_text())
    return stored["setting"] == setting and stored["seed"] == seed


KILLED = """
import os, signal
from experiments.studies import ablate, ablate_arms

done, steps = [], ablate_arms._steps

def dies(*arguments, **options):
    trained = steps(*arguments, **options)
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(trained)
    return trained

ablate_arms._steps = dies
ablate.main()
"""


@pytest.mark.slow
def test_what_is_killed_loses_the_chunk_in_flight_and_no_more(whole, workplace, monkeypatch):
    folder, trained, train = workplace / "killed", [], ablate_arms.train
    words = [str(workplace / "small.py"), "--base-run", workplace / "base", "--output-dir", folder, "--chunk", "4"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((folder / "arms").iterdir())) == 3 and not (folder / "arms.csv").exists()
    before = contents(folder / "arms")

    def spy(arms, *rest, **options):
        trained.append(len(arms))
        return train(arms, *rest, **options)

    monkeypatch.setattr(ablate_arms, "train", spy)
    script.ablate(arguments(workplace, folder, chunk=4, resume=True))
    assert trained == [3, 2]
    assert contents(folder / "arms").items() >= before.items()
    for name in ("arms.csv", "effects.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_one_compile_serves_all_chunks(whole_and_compiled):
    names = whole_and_compiled[1]
    # One for the steps and one for the evaluation; that of the control, which has fewer arms, is another.
    assert names.count("jit(on_devices)") == 3


@pytest.mark.slow
def test_an_arm_that_diverges_is_said_to_and_disturbs_no_other(whole, workplace):
    file, folder = workplace / "diverges.py", workplace / "diverges"
    file.write_text(
        (workplace / "small.py").read_text().replace("(0.5, 2.0)", '(0.5,), "hyper.learning_rate": (1e30,)')
    )
    script.ablate(arguments(workplace, folder, sweep=str(file), chunk=6))
    rows, expected = table(folder), {name_of(row): row for row in table(whole)}
    diverged = [row for row in rows if row["hyper.learning_rate"] == "1e+30"]
    assert [row["diverged"] for row in diverged] == ["True", "True"]
    assert [row["gap_closed_oracle"] for row in diverged] == ["", ""]
    others = [row for row in rows if row not in diverged]
    assert len(others) == 6
    for row in others:
        alone = expected[name_of(row)]
        assert row["diverged"] == "False"
        for name in ("nll", "swap_rate", "policy_score_abs_mean"):
            assert float(row[name]) == pytest.approx(float(alone[name]), rel=1e-5)
    assert "- `hyper.learning_rate = 1e+30`: 2 diverged" in (folder / "report.md").read_text()


def test_settings():
    plan = Sweep(
        preset="recall",
        one_at_a_time={"a": (1, 2), "b": (3,)},
        grid={"c": (4, 5), "d": (6, 7)},
        together=({"e": 1, "f": 8}, {"a": 1}),
    )
    assert plan.settings() == [
        *({}, {"a": 1}, {"a": 2}, {"b": 3}),
        *({"c": 4, "d": 6}, {"c": 4, "d": 7}, {"c": 5, "d": 6}, {"c": 5, "d": 7}),
        {"e": 1, "f": 8},
    ]
    assert Sweep(preset="recall", one_at_a_time={"a": (1, 1)}).settings() == [{}, {"a": 1}]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"seeds": ()}, "one or more different seeds"),
        ({"seeds": (1, 1)}, "one or more different seeds"),
    ],
)
def test_sweeps_that_make_no_sense(plan, message):
    with pytest.raises(ValueError, match=message):
        Sweep(preset="recall", **plan).settings()


def test_structures_are_separate_programs():
    plan = Sweep(
        preset="recall",
        seeds=(0,),
        one_at_a_time={"hyper.kl_weight": (0.5,), "objective.granularity": ("pair",), "context.rollouts": (2,)},
    )
    groups = script._by_structure(script._arms(plan, Path("base")))
    assert [[arm.setting for arm in group] for group in groups] == [
        [{}, {"hyper.kl_weight": 0.5}],
        [{"objective.granularity": "pair"}],
        [{"context.rollouts": 2}],
        [script.UNTRAINED],
    ]


RECALL = "from lensjax.runs.sweep import Sweep\nSWEEP = Sweep(preset='recall'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SWEEP = 3", "must define SWEEP, a lensjax.runs.sweep.Sweep; got 3"),
        (RECALL + ", one_at_a_time={'hyper.heat': (1,)})", "unknown config key hyper.heat"),
        (RECALL + ", one_at_a_time={'hyper.margin': (-1,)})", "hyper.margin must be at least 0, got -1"),
        (
            RECALL + ", changes={'objective.name': 'ipo'}, one_at_a_time={'hyper.kl_weight': (0.5,)})",
            "set objective.anchor to fixed, ema or stage, or hyper.kl_weight to 0",
        ),
        (
            RECALL + ", changes={'stopping.patience': 3})",
            "arms are compared after the same number of steps: stopping.patience must be None in a sweep, got 3",
        ),
        (RECALL + ", changes={'eval_batches': 1})", "eval_batches must be 2 or more, got 1"),
        (RECALL + ")", "holds no run .config.json is missing."),
    ],
)
def test_a_bad_sweep_ends_the_command_before_anything_is_written(text, message, tmp_path):
    (tmp_path / "sweep.py").write_text(text)
    words = [str(tmp_path / "sweep.py"), "--base-run", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        script.main(words)
    assert not (tmp_path / "out").exists()


def test_an_unknown_name_lists_the_sweeps():
    with pytest.raises(
        FileNotFoundError,
        match=r"no sweep .*none.py; name a Python file, or one of: .*, objectives, query, recall, stdlib, temp",
    ):
        script.load_sweep("none")


@pytest.mark.slow
def test_a_folder_in_use_and_a_changed_sweep_are_refused(whole, workplace):
    before = contents(whole)
    with pytest.raises(FileExistsError, match=r"is not empty: choose another --output-dir, or pass --resume"):
        script.ablate(arguments(workplace, whole))
    changed = workplace / "changed.py"
    changed.write_text((workplace / "small.py").read_text().replace("2.0", "3.0"))
    with pytest.raises(ValueError, match=r"was begun with another sweep or preset than .*changed.py is now"):
        script.ablate(arguments(workplace, whole, sweep=str(changed), resume=True))
    assert contents(whole) == before


@pytest.mark.slow
def test_d4_a_sweep_on_another_base_model_or_preset_is_refused(whole, workplace):
    before, other = contents(whole), workplace / "other"
    if not other.exists():
        train_script.run(_settings.replace(TINY, steps=0, seed=1, output_dir=str(other)))
    with pytest.raises(ValueError, match=r"the weights of the models that the run began with are others \(SHA-256"):
        script.ablate(arguments(workplace, whole, base_run=other, resume=True))
    preset, text = workplace / "preset.json", config_file.to_json(TINY)
    preset.write_text(config_file.to_json(_settings.replace(TINY, batch_size=4)))
    with pytest.raises(ValueError, match=r"another preset, base run or data: batch_size is 4 now and was 2\. Choose"):
        script.ablate(arguments(workplace, whole, resume=True))
    preset.write_text(text)
    with lock.holding(whole), pytest.raises(BlockingIOError, match="whole is in use by process"):
        script.ablate(arguments(workplace, whole, resume=True))
    assert contents(whole) == before


@pytest.mark.parametrize("name", sorted(path.stem for path in script.SWEEPS.glob("*.py")))
def test_the_sweeps_that_come_with_it_are_valid(name):
    plan = script.load_sweep(name)
    assert len(script._arms(plan, Path("base"))) == (len(plan.settings()) + 1) * len(plan.seeds)


def test_the_sweep_of_text_is_the_demo_by_preferences_alone():
    demo = script._arms(script.load_sweep("stdlib"), Path("base"))[0].config
    assert demo.context == train_script.load_preset("demo").context and demo.data.task == "stdlib"
    assert (demo.steps, demo.distill.steps, demo.base_run) == (100, 0, "base")
    assert demo.hyper.learning_rate == pytest.approx(3 * train_script.load_preset("demo").hyper.learning_rate)
