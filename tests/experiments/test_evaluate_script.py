"""The table of all policies: a whole small run, its files, and what is refused before anything is measured."""

import csv
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments import evaluate, train
from lensjax.context.working import WorkingContext
from lensjax.evaluation import compare, rivals
from lensjax.evaluation.compare import Comparison, Measured
from lensjax.runs.engine import devices
from tests.runs import cheap_programs, contents, tiny_config, write_corpus

pytestmark = pytest.mark.slow

COLUMNS = (
    "task,policy,information,reads,budget_ratio,entries,seed,nll,nll_ci_low,nll_ci_high,"
    "key_nll,key_nll_ci_low,key_nll_ci_high,key_tokens,"
    "gap_closed_oracle,gap_closed_full,hit_rate,swap_rate,"
    "anti_theater_divergence,anti_theater_ablation,anti_theater_correlation,anti_theater_counterfactual,"
    "anti_theater_all_passed,changed_edits"
)
POLICIES = [
    *("recency", "uniform", "random", "recent_random", "key_norm", "snapkv", "bm25", "lookup"),
    *("lensnet_1", "lensnet_4", "snapkv_hindsight", "bm25_hindsight", "best_of_2", "oracle"),
]
NAMES = [*POLICIES[:10], "lensnet_foreign", *POLICIES[10:]]
CHECKS = ("divergence", "ablation", "correlation", "counterfactual")
QUICK = ("--sequences", "4", "--batch-size", "2", "--draws", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trained runs of two seeds on recall, and one on text."""
    folder = tmp_path_factory.mktemp("runs")
    with cheap_programs():
        for seed in (0, 1):
            train.run(tiny_config(folder / f"recall-{seed}", seed=seed))
        train.run(tiny_config(folder / "text", write_corpus(folder / "corpus")))
        train.run(tiny_config(folder / "base", steps=0))
    return folder


def _on_key(loss, tokens):
    """As many key tokens as the first token says, up to 3; twice the loss on these."""
    count = tokens[0] % 4
    return jnp.where(count > 0, 2 * loss, jnp.nan), count


def known_measure(models, params, tokens, answers, key, *, length, draws, oracle_rounds, recipe):
    """A policy's loss is its place in the table, plus the number of the sequence."""
    share, nothing = tokens.mean(dtype=jnp.float32) / 256, jnp.full((), jnp.nan)

    def one(name, place):
        moves = jnp.full((), 0.25 if name.startswith("lensnet") else jnp.nan)
        hit = jnp.full((), jnp.nan if answers is None else 0.5)
        loss = 20.0 - place + share
        return Measured(loss, *_on_key(loss, tokens), hit, moves, 4 * moves, jnp.full(2, length))

    history, whole = tokens[: recipe.context.history], 5.0 + share
    entries = jnp.full(2, recipe.context.history)
    policies = {name: one(name, place) for place, name in enumerate(POLICIES)}
    return Comparison(
        policies={**policies, "full": Measured(whole, *_on_key(whole, tokens), *[nothing] * 3, entries)},
        focus=WorkingContext(history, history, history > 0),
        divergence=jnp.full((), 0.5),
        correlation=jnp.full((), jnp.nan if answers is None else 0.75),
        is_key=tokens > 0,
    )


def known_measure_foreign(models, params, tokens, answers, found, foreign, *, length, recipe):
    """Three nats worse than the own focus, and as much changed as the two sequences are different ones."""
    loss, nothing = 20.0 - 9 + 3.0 + tokens.mean(dtype=jnp.float32) / 256, jnp.full((), jnp.nan)
    history = tokens[: recipe.context.history]
    is_own = jnp.all(found.focus.start == history)
    changed = jnp.where(is_own & jnp.any(foreign.start != history), 1.0, 0.0)
    return Measured(loss, *_on_key(loss, tokens), *[nothing] * 3, jnp.full(2, length)), changed


@pytest.fixture
def known(monkeypatch):
    """Losses that are known."""
    monkeypatch.setattr(compare, "measure", known_measure)
    monkeypatch.setattr(compare, "measure_foreign", known_measure_foreign)
    for program in (evaluate.compiled_measure, evaluate._compiled_foreign):
        program.cache_clear()
    yield
    for program in (evaluate.compiled_measure, evaluate._compiled_foreign):
        program.cache_clear()


def rows_of(path):
    with path.open(newline="") as file:
        assert file.readline().strip() == COLUMNS
        file.seek(0)
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_is_measured_from_its_checkpoint(runs, capsys):
    folder = runs / "recall-0"
    before = contents(folder)
    rows = evaluate.evaluate(evaluate.Arguments((folder,), budgets=(2,), sequences=4, batch_size=2, draws=2))
    table = rows_of(folder / "evaluation.csv")
    known = {*NAMES, "recency_sink", "snapkv_next", "lookup_next", "lensnet_fresh", "answer"}
    assert [row["policy"] for row in table] == [*sorted(known, key=rivals.order), "full"]
    assert {(row["entries"], row["budget_ratio"]) for row in table[:-1]} == {("15", "2")}
    assert all(math.isfinite(float(row["nll"])) for row in table) and len(rows) == len(table)
    assert {path.name for path in set(contents(folder)) - set(before)} == {
        f"evaluation.{x}" for x in ("csv", "json", "png")
    }
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*NAMES, *CHECKS, "faithfulness of lensnet_4"))
    (checked,) = [row for row in table if row["changed_edits"]]
    assert checked["policy"] == "lensnet_4"
    assert 0 <= float(checked["anti_theater_divergence"]) <= 1 and 0 <= float(checked["changed_edits"]) <= 1


def test_the_table_says_what_was_measured(runs, known, capsys):
    evaluate.main([str(runs / "recall-1"), "--name", "known", "--budgets", "2", "1", *QUICK])
    table = rows_of(runs / "recall-1" / "known.csv")
    assert [row["policy"] for row in table] == [*NAMES, "full", *NAMES]
    first = {row["policy"]: row for row in table[: len(NAMES) + 1]}
    recency, oracle, random = (float(first[name]["nll"]) for name in ("recency", "oracle", "random"))
    assert recency - oracle == pytest.approx(13, abs=1e-4)
    assert float(first["bm25"]["gap_closed_oracle"]) == pytest.approx(6 / 13, abs=1e-4)
    assert first["recency"]["gap_closed_oracle"] == "0"
    assert (first["lensnet_4"]["swap_rate"], first["random"]["swap_rate"]) == ("0.25", "")
    assert {row["entries"] for row in table if row["entries"] != "15"} == {"30"}
    assert (first["full"]["budget_ratio"], first["full"]["entries"]) == ("1", "30")
    knowing = {name for name, row in first.items() if row["information"] == "hindsight"}
    assert knowing == {"snapkv_hindsight", "bm25_hindsight", "best_of_2", "oracle"}
    for row in first.values():
        assert float(row["nll_ci_low"]) <= float(row["nll"]) <= float(row["nll_ci_high"])

    assert {row["reads"] for row in first.values()} == {"0", "15", "30", "32"}

    report = json.loads((runs / "recall-1" / "known.json").read_text(), parse_constant=pytest.fail)
    details = {row["policy"]: row for row in report["rows"] if row["against_budget"] == 2}
    # Every sequence shifts all policies alike: the paired interval of a difference has no width.
    assert details["oracle"]["minus_random"] == pytest.approx([oracle - random] * 3, abs=1e-4)
    # So does every key token, by twice as much.
    assert details["oracle"]["key_minus_recency"] == pytest.approx([2 * (oracle - recency)] * 3, abs=1e-4)
    assert details["oracle"]["key_tokens"] > 0
    assert details["lensnet_1"]["residency"] == 1 and details["bm25"]["residency"] is None
    assert (report["split"], report["sequences"], report["window"]) == ("test", 4, 32)
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES) and "recall at 2x, 15 of 30 entries, seed 1" in out


def test_the_row_of_the_last_step_says_whether_its_focus_is_faithful(runs, known, capsys):
    words = [str(runs / "recall-1"), "--name", "faithful", "--budgets", "2", *QUICK]
    evaluate.main([*words, "--faithfulness.ablation", "9.5"])
    columns = [name for name in COLUMNS.split(",") if name.startswith("anti_theater_") or name == "changed_edits"]
    rows = {row["policy"]: [row[name] for name in columns] for row in rows_of(runs / "recall-1" / "faithful.csv")}
    # Recency loses 9 nats more, another sequence's focus 3; in batches of two it is always that of the other.
    numbers = [float(number) for number in rows.pop("lensnet_4")]
    assert numbers == pytest.approx([0.5, 9, 0.75, 3, 0, 1], abs=1e-5)
    assert all(row == [""] * len(columns) for row in rows.values())

    (check,) = json.loads((runs / "recall-1" / "faithful.json").read_text())["anti_theater"]
    assert check["passed"] == {**dict.fromkeys(CHECKS, True), "ablation": False, "all_passed": False}
    assert check["thresholds"]["ablation"] == 9.5
    assert check["intervals"]["counterfactual"] == pytest.approx([3, 3], abs=1e-4)
    out = capsys.readouterr().out
    assert "faithfulness of lensnet_4: failed" in out and "above 9.5: failed" in out
    assert "1.00 of the edits are changed" in out


def test_without_a_correlation_nothing_passes(runs, known, capsys):
    words = [str(runs / "text"), "--name", "faithful", "--budgets", "2", "--sequences", "2", "--batch-size", "2"]
    evaluate.main(words)
    (check,) = json.loads((runs / "text" / "faithful.json").read_text(), parse_constant=pytest.fail)["anti_theater"]
    assert check["anti_theater_correlation"] is check["intervals"]["correlation"] is None
    assert check["passed"] == {**dict.fromkeys(CHECKS, True), "correlation": False, "all_passed": False}
    assert "n/a" in capsys.readouterr().out


@pytest.mark.slow
def test_text_has_no_hits_and_runs_are_merged(runs, known, tmp_path):
    folders = [str(runs / "recall-0"), str(runs / "recall-1")]
    evaluate.main([*folders, "--name", "m", "--merged", str(tmp_path / "new" / "both"), "--budgets", "2", *QUICK])
    merged = rows_of(tmp_path / "new" / "both.csv")
    assert merged == rows_of(runs / "recall-0" / "m.csv") + rows_of(runs / "recall-1" / "m.csv")
    assert {row["seed"] for row in merged} == {"0", "1"} and (tmp_path / "new" / "both.png").is_file()
    evaluate.main([str(runs / "text"), "--budgets", "2", "--sequences", "2", "--batch-size", "2"])
    assert {row["hit_rate"] for row in rows_of(runs / "text" / "evaluation.csv")} == {""}


def test_any_number_of_devices_gives_the_same_table(runs, known, monkeypatch):
    words = [str(runs / "recall-1"), "--budgets", "2", "--sequences", "6", "--batch-size", "2", "--name"]
    evaluate.main([*words, "on-two"])  # three batches: one device measures the last one in vain
    assert devices.make_mesh({}).size == 2
    monkeypatch.setattr(devices, "make_mesh", lambda batch_sizes: Mesh(jax.devices()[:1], (devices.AXIS,)))
    evaluate.main([*words, "on-one"])
    one, two = (json.loads((runs / "recall-1" / f"on-{name}.json").read_text()) for name in ("one", "two"))
    assert one["rows"] == two["rows"] and one["anti_theater"] == two["anti_theater"]


def test_a_longer_window_than_in_training(runs, known):
    evaluate.main([str(runs / "recall-0"), "--name", "long", "--window", "64", "--budgets", "2", *QUICK])
    assert {row["entries"] for row in rows_of(runs / "recall-0" / "long.csv")} == {"29", "62"}
    report = json.loads((runs / "recall-0" / "long.json").read_text())
    assert (report["window"], report["window_in_training"]) == (64, 32)


def test_a_policy_that_misses_the_budget_is_an_error(runs, known, monkeypatch):
    measure = compare.measure

    def cheat(*args, **kwargs):
        report = measure(*args, **kwargs)
        bm25 = replace(report.policies["bm25"], entries=jnp.asarray([15, 16]))
        return replace(report, policies={**report.policies, "bm25": bm25})

    monkeypatch.setattr(compare, "measure", cheat)
    with pytest.raises(SystemExit, match="error: bm25 made contexts of 15 to 16 entries, not 15"):
        evaluate.main([str(runs / "recall-0"), "--name", "cheat", "--budgets", "2", *QUICK])
    assert not (runs / "recall-0" / "cheat.csv").exists()


def test_nan_is_an_error_that_names_the_policy(runs, known, monkeypatch):
    measure = compare.measure

    def broken(*args, **kwargs):
        report = measure(*args, **kwargs)
        snapkv = replace(report.policies["snapkv"], nll=jnp.float32(np.nan))
        return replace(report, policies={**report.policies, "snapkv": snapkv})

    monkeypatch.setattr(compare, "measure", broken)
    with pytest.raises(SystemExit, match="error: the loss of snapkv at 2x is not finite"):
        evaluate.main([str(runs / "recall-0"), "--name", "nan", "--budgets", "2", *QUICK])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{runs}/nothing", "holds no run"),
        ("{runs}/base --budgets 2", "has no checkpoint of LensNet: let it train first"),
        ("{runs}/recall-0 --budgets 16", "budget 16x asks for 1 entries, which no cut of 30 tokens reaches"),
        ("{runs}/recall-0 --budgets 2 2", "budgets must be different ratios of at least 1"),
        ("{runs}/recall-0 --budgets 0", "budgets must be at least 1, got (0,)"),
        (
            "{runs}/recall-0 --budgets 2 --sequences 5 --batch-size 2",
            "sequences must be a multiple of batch_size 2, got 5",
        ),
        ("{runs}/recall-0 --budgets 2 --draws 0", "draws must be in [1, 1024], got 0"),
        ("{runs}/recall-0 --budgets 2 --sequences 4 --batch-size 1", "batch_size must be in [2, 65536], got 1"),
        (
            "{runs}/text --suite --split validation --oracle-rounds 0",
            "--suite takes no --split, --oracle-rounds: leave it",
        ),
        ("{runs}/text --suite --faithfulness.ablation 0.5", "--suite takes no --faithfulness: leave it out"),
        ("{runs}/recall-0 --budgets 2 --window 6", "context.window must hold a block, context.recent_tokens and"),
        ("{runs}/text --budgets 2 --sequences 4096", "windows of 32 tokens, and 4096 are needed"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_one_message(runs, words, message, capsys):
    before = contents(runs)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*words.format(runs=runs).split(), "--name", "refused"])
    # 2 is what a flag ends with that no configuration can have.
    said = capsys.readouterr().err if stop.value.code == 2 else str(stop.value)
    assert message in said and (stop.value.code == 2 or said.startswith("error: "))
    assert contents(runs) == before


def test_a_table_is_never_overwritten(runs, known):
    words = [str(runs / "recall-0"), "--name", "once", "--budgets", "2", *QUICK]
    evaluate.main(words)
    before = contents(runs)
    with pytest.raises(SystemExit, match=r"once.csv exists: pass another --name"):
        evaluate.main(words)
    assert contents(runs) == before
