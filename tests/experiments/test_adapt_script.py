"""`experiments.studies.adapt`: which runs it makes, what its picks are, and what it writes."""

import csv
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import adapt
from experiments.studies.adapt import Arguments
from lensjax import _settings
from lensjax.context.geometry import Geometry
from lensjax.evaluation import rivals
from lensjax.runs.store import config_file
from lensjax.training.steps import adaptation
from tests import reference
from tests.small import SMALL, batch, jit


def run_folders(folder, seeds=(3, 4), **changes):
    """Folders that hold the configurations of runs."""
    runs = [folder / f"run-{place}" for place in range(len(seeds))]
    for run, seed in zip(runs, seeds, strict=True):
        run.mkdir()
        config = _settings.replace(SMALL, seed=seed, **{"context.rollouts": 3, **changes})
        (run / "config.json").write_text(config_file.to_json(config))
    return tuple(runs)


def test_every_run_is_trained_on_with_a_hypernetwork(tmp_path):
    runs = run_folders(tmp_path, base_run="elsewhere", **{"online.steps": 7})
    for budget, length in ((None, SMALL.hyper.context_end), (2, 0.5)):
        configs = adapt.plan(Arguments(runs, tmp_path / "out", steps=20, budget=budget))
        assert [config.seed for config in configs] == [3, 4]
        assert len({config.output_dir for config in configs}) == 2
        for config, run in zip(configs, runs, strict=True):
            assert (config.start_from, config.base_run) == (str(run), None)
            assert (config.steps, config.online.steps, config.trainable) == (20, 0, ("lens", "hypernet"))
            assert config.hyper.context_start == config.hyper.context_end == length


@pytest.mark.parametrize(
    ("seeds", "changes", "message"),
    [
        ((0,), {}, r"two or more runs of different seeds, got seeds \[0\]"),
        ((1, 1), {}, "two or more runs of different seeds"),
        ((0, 1), {"measured": ()}, "measured must name one or more"),
        ((0, 1), {"measured": (1,)}, r"measured must be in \[2, 1024\], got \(1,\)"),
        ((0, 1), {"measured": (4, 4)}, "different counts"),
        ((0, 1), {"budget": 60}, "hyper.context_start|context_start"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, seeds, changes, message):
    runs = run_folders(tmp_path, seeds)
    with pytest.raises(ValueError, match=message):
        adapt.compare(Arguments(runs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_foreign_deltas_need_another_document(tmp_path):
    with pytest.raises(ValueError, match="has batch_size 1: another document's deltas need batches of 2 or more"):
        adapt.plan(Arguments(run_folders(tmp_path, batch_size=1), tmp_path / "out"))


def test_a_folder_in_use_is_not_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: choose another --output-dir, or pass --resume"):
        adapt.compare(Arguments(run_folders(tmp_path), tmp_path / "out"))


# The deltas are large, so that they change what is picked.
LARGE = _settings.replace(
    SMALL,
    trainable=("lens", "hypernet"),
    **{"adaptation.init_scale": 30.0, "adaptation.max_norm": 30.0, "context.rollouts": 3, "focus.steps": 1},
)


@pytest.fixture(scope="module")
def step():
    """`pick` of one model, from a batch to losses and hits by name."""
    models, recipe = LARGE.build_models(), LARGE.recipe
    hypernet = LARGE.build_hypernet(models)
    key = jax.random.key(0)
    state, frozen = adaptation.init_adaptation_state(key, recipe=recipe, models=models, hypernet=hypernet)
    params = {**frozen, **state.params}
    compiled = jit(functools.partial(adapt.pick, models, hypernet, recipe=recipe))
    return lambda rows: jax.device_get(compiled(params, rows, jax.random.key(1)))


@pytest.mark.slow
def test_what_each_way_of_choosing_picks(step):
    picked = step(batch() | {"answers": jnp.asarray([[22], [14], [4]], jnp.int32)})
    losses, hits = ({name: one[part] for name, one in picked.items()} for part in (0, 1))
    np.testing.assert_array_equal(losses["zeroed"], losses["plain"])
    for name, other in itertools.combinations(("plain", "adapted", "foreign", "credit", "credit_hindsight"), 2):
        assert (losses[name] != losses[other]).any(), (name, other)
    best = losses["best_hindsight"]
    for name in ("plain", "adapted"):
        either = f"best_or_{name}_hindsight"
        np.testing.assert_array_equal(losses[either], np.minimum(best, losses[name]))
        chosen = np.where(losses[name] < best, hits[name], hits["best_hindsight"])
        np.testing.assert_array_equal(hits[either], chosen)
    assert {leaf.shape for leaf in (*losses.values(), *hits.values())} == {(3,)}
    assert {float(hit) for values in hits.values() for hit in values} == {0.0, 1.0}
    without = step(batch())
    assert all(np.isnan(hit).all() for _, hit in without.values())
    for name, (values, _) in without.items():
        np.testing.assert_allclose(values, losses[name], rtol=1e-5)


@pytest.mark.slow
def test_only_what_is_named_so_knows_what_is_behind_the_cursor(step):
    shape, tokens = LARGE.context, batch()["tokens"]

    def shown(tokens):
        """By name, which blocks each way of choosing shows in full, [blocks, B]."""
        answers = [jnp.full((3, 1), block * shape.block_size) for block in range(shape.geometry.blocks(1))]
        hits = [{name: hit for name, (_, hit) in step({"tokens": tokens, "answers": one}).items()} for one in answers]
        return {name: np.stack([one[name] for one in hits]) for name in hits[0]}

    before = shown(tokens)
    behind = shown(tokens.at[:, shape.history :].set((tokens[:, shape.history :] + 1) % 4))
    ahead = shown(tokens.at[:, : shape.history].set((tokens[:, : shape.history] + 1) % 4))
    for name in before:
        is_causal = rivals.information(name) == "causal"
        assert (behind[name] == before[name]).all() == is_causal, name
        assert (ahead[name] != before[name]).any(), name
    hindsight = {name for name in before if rivals.information(name) == "hindsight"}
    assert hindsight == {name for name in before if "best" in name or name == "credit_hindsight"} and len(before) == 9


GEOMETRY = Geometry(history=8, block_size=SMALL.context.block_size, max_lod=SMALL.context.max_lod, recent_tokens=2)


def test_credit_goes_to_what_the_better_variants_show():
    credit = np.asarray(adapt.credit(by_hand(), GEOMETRY))
    # The first rollout is the best and opens tokens 2 and 3, the last one the worst and opens 4 and 5.
    assert credit[2] == credit[3] > 0 and credit[4] == credit[5] < 0
    np.testing.assert_allclose(credit[[0, 1, 6, 7]], 0, atol=1e-6)


def test_credit_of_the_past_is_of_the_same_tokens():
    changes = {"context.window": 12, "context.horizon": 2, "context.recent_tokens": 2}
    config = _settings.replace(SMALL, **changes, **{"hyper.context_start": 1.0, "hyper.context_end": 1.0})
    credit = np.asarray(adapt.past_credit(by_hand(), recipe=config.recipe))
    assert credit.shape == (10,) and not credit[8:].any()
    np.testing.assert_array_equal(credit[:8], adapt.credit(by_hand(), GEOMETRY))


def by_hand():
    """Three rollouts of 8 tokens, and what they cost; the baseline is the first of them again."""
    cuts = [
        [(0, 1), (2, 0), (3, 0), (4, 1), (6, 0), (7, 0)],
        [(0, 0), (1, 0), (2, 1), (4, 1), (6, 0), (7, 0)],
        [(0, 1), (2, 1), (4, 0), (5, 0), (6, 0), (7, 0)],
    ]
    contexts = [reference.context_of(cut, window=8, capacity=6) for cut in (cuts[0], *cuts)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *contexts)
    return adapt.ScoredVariants(stacked, jnp.ones(4, bool), None, jnp.asarray([9.0, 1.0, 2.0, 3.0]))


def test_the_tables_say_what_was_measured(tmp_path, monkeypatch):
    arguments = Arguments(run_folders(tmp_path, (0, 1, 2)), tmp_path / "out", measured=(4, 6))
    names = ("plain", "adapted", "foreign", "credit", "best_hindsight")

    def measurer(config, count, split):
        def measure(folder):
            seed = int(folder.name[-1])
            return {
                name: (1.0 - 0.1 * rank - count / 100 + 0.01 * seed + np.arange(4) / 50, np.arange(4) < rank)
                for rank, name in enumerate(names)
            }

        return measure

    monkeypatch.setattr(adapt, "run_once", lambda config, console: Path(config.output_dir).mkdir(parents=True))
    monkeypatch.setattr(adapt, "_measurer", measurer)
    rows = adapt.compare(arguments)
    assert [(row["seed"], row["measured"], row["pick"]) for row in rows[:6]] == [
        *((0, 4, name) for name in names),
        (0, 6, "plain"),
    ]
    assert rows[1]["nll"] == pytest.approx(1.0 - 0.1 - 0.04 + 0.03) and rows[1]["hit_rate"] == 0.25
    with (tmp_path / "out" / "picks.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == 3 * 2 * 5
    with (tmp_path / "out" / "effects.csv").open() as file:
        table = list(csv.DictReader(file))
    for name, part in (("pick", kept), ("value", table)):
        assert {row[name] for row in part if row["information"] == "hindsight"} == {"best_hindsight"}
        assert {row["information"] for row in part if row[name] != "best_hindsight"} == {"causal"}
    differences = {(row["measured"], row["to"], row["value"]): float(row["difference"]) for row in table}
    assert differences["4", "plain", "adapted"] == pytest.approx(-0.1)
    assert differences["6", "foreign", "adapted"] == pytest.approx(0.1)
    report = (tmp_path / "out" / "report.md").read_text()
    for count in (4, 6):
        for name in ("plain", "foreign", "credit"):
            assert f"{count} variants measured, differences to: {name}\n" in report
    assert "--measured 4 6 --split test" in report
    assert "| `credit` | causal |\n| `best_hindsight` | hindsight |\n" in report
    assert (tmp_path / "out" / "effects.png").stat().st_size > 0
