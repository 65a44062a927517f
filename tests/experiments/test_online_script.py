"""`experiments.studies.online`: which runs it makes, and what it writes."""

import csv
from pathlib import Path

import pytest

from experiments.studies import online
from experiments.studies.online import Arguments
from lensjax import _settings
from lensjax.runs.store import config_file
from tests.small import SMALL


def base_run(folder, **changes):
    """A folder that holds the configuration of a run."""
    folder.mkdir()
    (folder / "config.json").write_text(config_file.to_json(_settings.replace(SMALL, **changes)))
    return folder


def test_every_arm_has_its_steps_and_its_start(tmp_path):
    arguments = Arguments(base_run(tmp_path / "base"), tmp_path / "arms", seeds=(3, 4), steps=20)
    arms = online.plan(arguments)
    assert [len(by_seed) for by_seed in arms.values()] == [2] * len(arms)
    start, on, alone = arms[online.START], arms[online.ON], arms[online.ALONE]
    for place, seed in enumerate((3, 4)):
        assert all(by_seed[place].seed == seed for by_seed in arms.values())
        assert (start[place].steps, start[place].online.steps) == (20, 0)
        assert (alone[place].steps, alone[place].online.steps) == (0, 40)
        assert start[place].base_run == alone[place].base_run == str(tmp_path / "base")
        for name in online.OWN_EDITS:
            assert (arms[name][place].steps, arms[name][place].online.steps) == (0, 20)
        for by_seed in (on, *(arms[name] for name in online.OWN_EDITS)):
            assert by_seed[place].start_from == start[place].output_dir
    folders = [config.output_dir for by_seed in arms.values() for config in by_seed]
    assert len(set(folders)) == len(folders)


def test_only_the_arms_that_are_named_are_made(tmp_path):
    arguments = Arguments(base_run(tmp_path / "base"), tmp_path / "arms", arms=("one_step", "preferences"))
    assert list(online.plan(arguments)) == [online.START, online.ON, "one_step"]


def test_groups_see_as_many_episodes(tmp_path):
    arms = online.plan(Arguments(base_run(tmp_path / "base", batch_size=4), tmp_path / "arms"))
    for by_seed in arms.values():
        config = by_seed[0]
        assert config.batch_size * config.online.episodes == 4
        assert config.batch_size * config.eval_batches == 4 * SMALL.eval_batches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (0,)}, r"two or more different seeds, got \(0,\)"),
        ({"seeds": (1, 1)}, "two or more different seeds"),
        ({"arms": ()}, "arms must name one or more of those to compare with start"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, changes, message):
    arguments = Arguments(base_run(tmp_path / "base"), tmp_path / "arms", **changes)
    with pytest.raises(ValueError, match=message):
        online.compare(arguments)
    assert not (tmp_path / "arms").exists()


def test_a_base_run_that_is_measured_on_one_batch_is_refused(tmp_path):
    source = base_run(tmp_path / "base", eval_batches=1)
    with pytest.raises(ValueError, match="eval_batches of base_run must be 2 or more, got 1"):
        online.compare(Arguments(source, tmp_path / "arms"))


def test_a_base_run_of_another_task_is_refused(tmp_path):
    source = base_run(tmp_path / "base", **{"data.task": "stdlib", "base.vocab_size": 256})
    with pytest.raises(ValueError, match="is of task stdlib: expected one of recall"):
        online.compare(Arguments(source, tmp_path / "arms"))


def test_a_folder_in_use_is_not_written_to(tmp_path):
    (tmp_path / "arms").mkdir()
    (tmp_path / "arms" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: choose another --output-dir, or pass --resume"):
        online.compare(Arguments(base_run(tmp_path / "base"), tmp_path / "arms"))


def test_the_tables_say_what_was_measured(tmp_path, monkeypatch):
    # 12 and 30 seconds for 20 and 40 steps; every arm is better than the one before it by 0.1 nats and a little noise.
    arguments = Arguments(base_run(tmp_path / "base"), tmp_path / "arms", seeds=(0, 1, 2), steps=20)
    order = {
        Path(config.output_dir): rank
        for rank, by_seed in enumerate(online.plan(arguments).values())
        for config in by_seed
    }

    def run_once(config, console):
        Path(config.output_dir).mkdir(parents=True)
        return {"training_seconds": 12.0 if config.online.steps <= 20 else 30.0}

    def measure(folder):
        noise, fixed = 0.01 * int(folder.name[-1]), {"nll_baseline": 2.0, "nll_oracle": 0.0, "hit_rate": 0.5}
        return [{"nll_policy": 1.0 - 0.1 * order[folder] + noise * batch, **fixed} for batch in range(4)]

    monkeypatch.setattr(online, "run_once", run_once)
    monkeypatch.setattr(online, "_on_test", lambda config: measure)
    rows = online.compare(arguments)
    arms = list(online.plan(arguments))
    assert [(row["arm"], row["seed"]) for row in rows] == [(name, seed) for seed in (0, 1, 2) for name in arms]
    second = rows[len(arms) + 1]
    assert second["nll"] == pytest.approx(1.0 - 0.1 + 0.01 * 1.5)
    assert second["gap_closed_oracle"] == pytest.approx((2.0 - second["nll"]) / 2.0)
    assert {row["arm"]: row["seconds_per_step"] for row in rows} == {
        name: 0.75 if name == online.ALONE else 0.6 for name in arms
    }
    with (tmp_path / "arms" / "arms.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    with (tmp_path / "arms" / "effects.csv").open() as file:
        differences = {row["value"]: float(row["difference"]) for row in csv.DictReader(file)}
    assert differences == pytest.approx({"": 0.0} | {name: -0.1 * rank for rank, name in enumerate(arms) if rank})
    report = (tmp_path / "arms" / "report.md").read_text()
    assert all(f"differences to: {name}\n" in report for name in (online.START, online.ON, online.GAE, online.GROUP))
    assert (tmp_path / "arms" / "effects.png").stat().st_size > 0
