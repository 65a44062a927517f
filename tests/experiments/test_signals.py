"""`experiments.studies.signals`: what each cell trains, how its rate is chosen, and what is written."""

import csv
import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.studies import signals as script
from lensjax import _settings
from lensjax.runs.data import batches as data
from lensjax.runs.fit import EVALUATION_SEED, LENS_STREAM, stream
from lensjax.runs.store import checkpoint, config_file, run_folder
from lensjax.training import nll
from lensjax.training.steps import distill, preference
from lensjax.training.steps.train_state import init_train_state
from tests.runs import TINY, contents
from tests.small import jit

# Of the 30 tokens before the cursor the base model reads 18.
PRESET = _settings.replace(
    TINY,
    **{
        "context.omit": True,
        "context.window": 32,
        "context.horizon": 2,
        "context.recent_tokens": 2,
        "hyper.context_start": 18 / 30,
        "hyper.context_end": 18 / 30,
        "focus.steps": 2,
        "optimizer.warmup_steps": 0,
        "optimizer.curriculum_steps": None,
        "data.query": 2,
    },
)
RATES, SEEDS = (1e-3, 3e-2), (3, 8)
METHODS = ("preferences", "distilled", "both")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A preset, and a run whose base model is as it was drawn."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "preset.json").write_text(config_file.to_json(PRESET))
    base = replace(PRESET, output_dir=str(folder / "base"))
    run_folder.create_run(base.output_dir, base)
    checkpoint.save(run_folder.checkpoint_dir(folder / "base", "pretrain"), 4, {"params": base_params(base)})
    return folder


def base_params(config):
    models = config.build_models()
    return {name: getattr(models, name).init(jax.random.key(5)) for name in ("base", "gist")}


def arguments(workplace, output_dir, **changes):
    settings = {
        **{"base_run": str(workplace / "base"), "output_dir": output_dir, "preset": str(workplace / "preset.json")},
        **{"steps": 2, "batch_size": 2, "rollouts": 2, "seeds": SEEDS, "learning_rates": RATES, "sequences": 4},
        **{"views": ("entries", "map and attention"), "starts": ("recency",)},
    }
    return script.Arguments(**settings | changes)


def words(of):
    """The same on a command line."""
    flags = {name.replace("_", "-"): value for name, value in vars(of).items()}
    lists = {name: value if isinstance(value, tuple) else (value,) for name, value in flags.items()}
    return [word for name, values in lists.items() for word in (f"--{name}", *map(str, values))]


# The grid, with training and measuring that cost nothing.

# Losses by learning rate and seed. Validation of the first seed alone is for the higher rate.
VALIDATION = {(RATES[0], 3): 3.0, (RATES[1], 3): 2.0, (RATES[0], 8): 1.0, (RATES[1], 8): 4.0}
TEST = {(RATES[0], 3): 0.5, (RATES[1], 3): 5.0, (RATES[0], 8): 0.25, (RATES[1], 8): 7.0}


@pytest.fixture
def cheap(monkeypatch):
    """What was asked for: (config, rate) of every training, (split, rate, seed) of every measurement."""
    seen = SimpleNamespace(trained=[], measured=[])

    def train(config, models, base, *, rate):
        seen.trained.append((config, rate))
        return rate, config.seed

    def measurer(config, models):
        def measure(params, split):
            assert set(params) == {"base", "gist", "lens"}
            seen.measured.append((split, *params["lens"]))
            loss = (VALIDATION if split == "validation" else TEST)[params["lens"]]
            noise = np.asarray([-0.5, 0.0, 0.5, 0.0])
            return {"lensnet": loss + noise, "recency": np.full(4, 6.0), "hit": np.asarray([1.0, 0.0, 1.0, 1.0])}

        return measure

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "measurer", measurer)
    monkeypatch.setattr(script, "fixed", lambda config, of, split: split)
    return seen


def test_a_row_for_each_cell_and_seed(workplace, tmp_path, cheap):
    rows = script.run(arguments(workplace, tmp_path / "out"))
    names = [(row["signal"], row["view"], row["start"], row["seed"]) for row in rows]
    views = ("entries", "map and attention")
    assert names == [(method, view, "recency", seed) for view in views for method in METHODS for seed in SEEDS]
    with (tmp_path / "out" / "signals.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [{name: float(row[name]) for name in ("nll", "minus_recency")} for row in written] == [
        {name: row[name] for name in ("nll", "minus_recency")} for row in rows
    ]
    assert list(written[0]) == [
        *("signal", "view", "start", "reads", "seed", "learning_rate", "steps", "sequences"),
        *("tokens_preferences", "tokens_distilled", "nll", "nll_recency"),
        *("minus_recency", "minus_recency_low", "minus_recency_high", "hit_rate", "validation_nll"),
    ]
    # Of 18 tokens and 3 gists; of the attention to all 30 tokens besides.
    assert [row["reads"] for row in rows] == [18] * 6 + [18 + 3 + 30] * 6
    for row in rows:
        assert (row["nll"], row["nll_recency"]) == (TEST[row["learning_rate"], row["seed"]], 6.0)
        assert row["minus_recency"] == row["nll"] - 6 and row["hit_rate"] == 0.75
        assert row["minus_recency_low"] < row["minus_recency"] < row["minus_recency_high"]
        assert (row["steps"], row["sequences"]) == (2, 4)


def test_the_rate_is_that_of_the_first_seed_on_validation_and_test_is_measured_once(workplace, tmp_path, cheap):
    rows = script.run(arguments(workplace, tmp_path / "out", views=("entries",)))
    assert {row["learning_rate"] for row in rows} == {RATES[1]}
    assert {row["validation_nll"] for row in rows} == {2.0}
    of_cell = [
        *(("validation", rate, 3) for rate in RATES),
        *(("test", RATES[1], seed) for seed in SEEDS),
    ]
    assert cheap.measured == of_cell * 3
    trained = [(config.seed, rate) for config, rate in cheap.trained]
    assert trained == [*((3, rate) for rate in RATES), (8, RATES[1])] * 3


def test_cells_share_everything_but_what_they_are_called_by(workplace, tmp_path, cheap):
    of = arguments(workplace, tmp_path / "out", views=tuple(script.VIEWS), starts=tuple(script.STARTS), seeds=(3,))
    script.run(replace(of, steps=7, learning_rates=RATES[:1]))
    configs = [config for config, _ in cheap.trained]
    shared = {"base_run": of.base_run, "batch_size": 2, "context.rollouts": 2, "seed": 3}
    expected = [
        _settings.replace(PRESET, **shared, steps=preferred, **{"distill.steps": distilled}, **view, **start)
        for view in script.VIEWS.values()
        for start in script.STARTS.values()
        for distilled, preferred in ((0, 7), (7, 0), (3, 4))
    ]
    assert configs == expected and len(set(configs)) == 4 * 2 * 3
    seen = [(config.lens.map, config.lens.reads, config.lens.recency, config.focus.start) for config in configs[::3]]
    assert seen == [
        (shown, reads, start == "recency", start)
        for shown, reads in ((False, "nothing"), (True, "nothing"), (True, "states"), (True, "attention"))
        for start in ("uniform", "recency")
    ]


def test_the_table_shows_mean_and_range_over_seeds(workplace, tmp_path, cheap, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    script.main(words(arguments(workplace, tmp_path / "out")))
    shown = capsys.readouterr().out
    # 5 and 7, minus 6 of recency.
    assert shown.count("+0.000 (-1.000 to +1.000)") == 2 * 3 and "map and attention, recency: " in shown


def test_tokens_by_hand():
    # Three contexts of 18 tokens, each with all but the last of a horizon of 2.
    # The teacher reads 31 tokens twice, and 9, half of a context, with one of the horizon.
    config = _settings.replace(PRESET, **{"context.rollouts": 2})
    assert script.tokens_read(config) == (3 * 19, 2 * 31 + 10)
    assert script.tokens_read(_settings.replace(config, **{"context.rollouts": 5})) == (6 * 19, 72)


# Refused.


def test_a_base_run_is_needed(workplace, tmp_path, capsys, cheap):
    with pytest.raises(SystemExit) as end:
        script.main(["--output-dir", str(tmp_path / "out")])
    assert end.value.code == 2 and "--base-run" in capsys.readouterr().err
    nowhere = arguments(workplace, tmp_path / "out", base_run=str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"error: .*nowhere holds no run"):
        script.main(words(nowhere))
    assert not cheap.trained


def test_another_base_model_is_refused(workplace, tmp_path, cheap):
    preset = tmp_path / "other.json"
    preset.write_text(config_file.to_json(_settings.replace(PRESET, **{"base.layers": 2})))
    with pytest.raises(SystemExit, match=r"error: base of base_run .*this run has .*: use the same"):
        script.main(words(arguments(workplace, tmp_path / "out", preset=str(preset))))
    assert not cheap.trained


def test_a_folder_in_use_is_refused_and_an_empty_one_is_free(workplace, tmp_path, cheap):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"error: .* is not empty: choose another --output-dir"):
        script.main(words(arguments(workplace, tmp_path)))
    assert {path.name: text for path, text in contents(tmp_path).items()} == {"mine.txt": b"mine"}
    assert not cheap.trained
    (tmp_path / "empty").mkdir()
    assert len(script.run(arguments(workplace, tmp_path / "empty", views=("map",)))) == len(METHODS) * len(SEEDS)


# Training.


@pytest.mark.parametrize(
    ("method", "steps", "expected"),
    [
        ("preferences", 4, lambda lens: 16 * lens),
        ("distilled", 4, lambda lens: lens + 4),
        ("both", 4, lambda lens: 4 * (lens + 2)),
        ("both", 2, lambda lens: 2 * (lens + 1)),
    ],
    ids=["preferences", "distilled", "both", "both of two"],
)
def test_both_signals_take_half_of_the_steps_each_and_all_windows_are_fresh(
    workplace, tmp_path, monkeypatch, method, steps, expected
):
    """A step of the teacher adds 1 to LensNet, one of preferences doubles it."""
    read, rates = [], []

    def compiled(step, **static):
        def call(state, batch, frozen):
            assert set(frozen) == {"base", "gist"}
            read.append(batch["tokens"])
            is_taught = step is distill.distill_step
            rates.append(static["settings"].learning_rate if is_taught else float(state.hyper.learning_rate))
            assert is_taught or step is preference.train_step
            lens = jax.tree.map(lambda leaf: leaf + 1 if is_taught else 2 * leaf, state.params["lens"])
            return replace(state, params={**state.params, "lens": lens}), {}

        return call

    monkeypatch.setattr(script, "compiled", compiled)
    of = arguments(workplace, tmp_path, steps=steps)
    config = replace(script.cell_config(of, method, script.VIEWS["map"]), seed=8)
    models = config.build_models()
    found = script.train(config, models, base_params(config), rate=0.25)
    fresh, _ = init_train_state(stream(config, LENS_STREAM), recipe=config.recipe, models=models)
    for one, drawn in zip(jax.tree.leaves(found), jax.tree.leaves(fresh.params["lens"]), strict=True):
        np.testing.assert_allclose(one, expected(drawn), rtol=1e-6)
    assert rates == [0.25] * steps
    batches = data.make_iterator(config, "train", seed=2 * 8 + LENS_STREAM, batch_size=2)
    np.testing.assert_array_equal(read, [next(batches)["tokens"] for _ in range(steps)])
    assert len({batch.tobytes() for batch in read}) == steps


@pytest.mark.slow
def test_a_rate_that_is_data_is_that_of_a_recipe(workplace):
    config = script.cell_config(arguments(workplace, workplace), "preferences", script.VIEWS["map and attention"])
    models, base = config.build_models(), base_params(config)
    found = script.train(config, models, base, rate=RATES[1])
    recipe = replace(config.recipe, hyper=replace(config.hyper, learning_rate=RATES[1]))
    fresh, frozen = init_train_state(stream(config, LENS_STREAM), recipe=recipe, models=models, params=base)
    state = fresh
    step = jit(functools.partial(preference.train_step, recipe=recipe, models=models))
    batches = data.make_iterator(config, "train", seed=LENS_STREAM, batch_size=2)
    for _ in range(2):
        state, _ = step(state, next(batches), frozen)
    trained, drawn = state.params["lens"], fresh.params["lens"]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), found, trained)
    moved = [np.abs(one - other).max() for one, other in zip(*map(jax.tree.leaves, (trained, drawn)), strict=True)]
    assert max(moved) > RATES[0]


@pytest.mark.slow
def test_a_cell_at_its_smallest(workplace, tmp_path, monkeypatch):
    read, fixed_batches = [], data.fixed_batches

    def drawn(config, split, **options):
        read.append((split, options))
        return fixed_batches(config, split, **options)

    monkeypatch.setattr(data, "fixed_batches", drawn)
    monkeypatch.setattr(script, "METHODS", ("both",))
    of = arguments(workplace, tmp_path / "out", views=("map and attention",))
    rows = script.run(of)
    assert [(row["signal"], row["seed"]) for row in rows] == [("both", seed) for seed in SEEDS]
    (rate,) = {row["learning_rate"] for row in rows}
    assert rate in RATES and len({row["nll"] for row in rows}) == 2
    for row in rows:
        assert row["nll"] - row["minus_recency"] == pytest.approx(row["nll_recency"], rel=1e-5)
        assert row["nll_recency"] == rows[0]["nll_recency"] and 0 <= row["hit_rate"] <= 1
    options = {"batch_size": 2, "count": 2, "seed": EVALUATION_SEED}
    assert read == [("validation", options), ("test", options)]
    # What recency loses is that of the base model on the last 18 tokens of these windows.
    config = script.cell_config(of, "both", {})
    models, base = config.build_models(), base_params(config)
    loss = jit(lambda tokens: nll.sequence_nll(models.base, base["base"], tokens)[-2:].mean())
    windows = np.concatenate([batch["tokens"] for batch in fixed_batches(config, "test", **options)])
    assert rows[0]["nll_recency"] == pytest.approx(np.mean([loss(window[-20:]) for window in windows]), rel=1e-4)
