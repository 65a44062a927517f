"""What a session's reading of a stream leaves: a summary, a row for each percent, a map, its rivals, and faults."""

import copy
import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments.studies import stream as script
from experiments.studies import stream_rivals as rivals
from experiments.studies import stream_watch
from experiments.studies.stream_watch import Watch
from lensjax import _settings
from lensjax.context import working as contexts
from lensjax.context.working import MISSING
from lensjax.evaluation import streams
from lensjax.plots import style
from lensjax.runs.config import Config
from lensjax.runs.data import corpus as data
from lensjax.runs.store import checkpoint, config_file, run_folder
from lensjax.session import Session
from lensjax.training import nll
from tests.runs import tiny_config, write_corpus

INTERVAL, TOKENS, HISTORY = 4, 441, 30
FILES = ("config.json", "environment.json", "metrics.jsonl", "summary.json", "stream_start.png", "cost.png")
QUALITY_FILES = ("quality.csv", "quality.png")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """The folder of a run on text with a checkpoint of all models."""
    root = tmp_path_factory.mktemp("text")
    config = tiny_config(root / "run", write_corpus(root / "corpus"))
    for path in data.corpus_files(config.data, "test"):
        path.write_text(3 * path.read_text())
    models, folder = config.build_models(), run_folder.create_run(config.output_dir, config)
    params = {name: getattr(models, name).init(jax.random.key(5)) for name in ("base", "gist", "lens")}
    checkpoint.save(run_folder.checkpoint_dir(folder, "lens"), 7, {"params": params, "step": jnp.int32(7)})
    return folder


@pytest.fixture(scope="module")
def arguments(text_run):
    return script.Arguments(
        run=text_run, tokens=TOKENS, interval=INTERVAL, output_dir=text_run.parent / "stream", seed=3
    )


@pytest.fixture(scope="module")
def done(arguments):
    """The run, a session that is compiled, and what it left."""
    config, session, _ = prepared = script._prepare(arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "_DPI", 40)
        patch.setattr(stream_watch, "FIRST_STEPS", 12)
        patch.setattr(script, "_prepare", lambda _: prepared)
        patch.setattr(rivals, "Session", lambda *models, **options: kept(Session(*models, **options)))
        return config, session, script.stream(arguments)


SESSIONS = []


def kept(session):
    """The rivals' sessions are as slow to compile as the first."""
    SESSIONS.append(session)
    return session


def again(monkeypatch, config, session):
    """Lets a second command read the same stream with models that are compiled already."""
    monkeypatch.setattr(style, "_DPI", 20)
    monkeypatch.setattr(script, "_prepare", lambda _: (config, session, tokens_of(config)))
    monkeypatch.setattr(rivals, "compare", lambda *_: pytest.fail("a broken session was compared"))


def tokens_of(config):
    return script.stream_tokens(config, TOKENS)


@pytest.mark.slow
def test_what_is_left_in_the_folder(done, arguments):
    config, session, summary = done
    assert {path.name for path in arguments.output_dir.iterdir()} == {*FILES, *QUALITY_FILES}
    for name in ("stream_start.png", "cost.png", "quality.png"):
        assert (arguments.output_dir / name).read_bytes().startswith(b"\x89PNG")
    assert config_file.load(arguments.output_dir / "config.json", Config) == config
    assert json.loads((arguments.output_dir / "summary.json").read_text(), parse_constant=pytest.fail) == summary
    stored = config_file.load(arguments.run / "config.json", Config)
    changed = {"context.horizon": INTERVAL, "context.window": stored.context.history + INTERVAL}
    expected = _settings.replace(stored, seed=3, output_dir=str(arguments.output_dir), **changed)
    assert config == expected and session.config == expected.session
    saved = checkpoint.restore_subtree(
        run_folder.checkpoint_dir(arguments.run, "lens"), 7, session.params["lens"], path=("params", "lens")
    )
    jax.tree.map(np.testing.assert_array_equal, session.params["lens"], saved)


@pytest.mark.slow
def test_the_summary(done, arguments):
    config, session, summary = done
    steps = TOKENS // INTERVAL
    told = {name: summary[name] for name in ("task", "tokens", "seed", "interval", "history", "entries", "run")}
    assert told == {
        **{"task": "text", "tokens": TOKENS, "seed": 3, "interval": INTERVAL, "history": HISTORY, "entries": 21},
        "run": str(arguments.run),
    }
    assert (summary["refocus_steps"], summary["illegal_steps"], summary["first_illegal_step"]) == (steps, 0, None)
    assert (summary["broken_invariants"], summary["losses_not_finite"]) == ([], 0)
    _, losses = session.append(session.init(), tokens_of(config))
    assert len(summary["nll_by_tenth"]) == 10
    assert np.mean(summary["nll_by_tenth"]) == pytest.approx(losses.mean(), rel=1e-3)
    assert losses.mean() == pytest.approx(math.log(256), abs=0.1)
    places = ["1 %", *(f"{percent} %" for percent in range(10, 101, 10))]
    assert list(summary["device_bytes"]) == list(summary["process_bytes"]) == list(summary["history_bytes"]) == places
    assert len(summary["microseconds_by_tenth"]) == len(summary["cpu_microseconds_by_tenth"]) == 10
    assert summary["peak_process_bytes"] >= max(summary["process_bytes"].values())
    assert all(number > 10_000 for number in summary["device_bytes"].values())
    assert summary["late_over_early"] == pytest.approx(
        summary["microseconds_per_token_late"] / summary["microseconds_per_token_early"]
    )
    assert summary["tokens_per_second"] > 0 and 0 < summary["swap_rate"] < 1


@pytest.mark.slow
def test_a_row_for_each_percent(done, arguments):
    config, session, summary = done
    rows = [json.loads(line) for line in (arguments.output_dir / "metrics.jsonl").read_text().splitlines()]
    ends = [row["tokens_read"] for row in rows]
    assert [row["percent"] for row in rows] == list(range(1, 101)) and ends[-1] == TOKENS
    assert all(end % INTERVAL == 0 for end in ends[:-1])
    counts = np.diff(ends, prepend=0)
    assert set(counts) <= {INTERVAL, 2 * INTERVAL, INTERVAL + TOKENS % INTERVAL, 2 * INTERVAL + TOKENS % INTERVAL}
    steps = []
    _, losses = session.append(session.init(), tokens_of(config), on_refocus=lambda *step: steps.append(step[1]))
    parts = np.split(losses, ends[:-1])
    np.testing.assert_allclose([row["nll"] for row in rows], [part.mean() for part in parts], rtol=1e-5)
    assert sum(row["swaps"] for row in rows) == sum(int(report.swaps) for report in steps) > 0
    rates = [row["swap_rate"] * row["refocus_steps"] for row in rows]
    assert sum(rates) == pytest.approx(sum(float(report.swap_rate) for report in steps), rel=1e-5)
    seconds = np.array([row["seconds"] for row in rows])
    late = 1e6 * seconds[90:].sum() / counts[90:].sum()
    early = 1e6 * seconds[1:10].sum() / counts[1:10].sum()
    assert (summary["microseconds_per_token_late"], summary["microseconds_per_token_early"]) == pytest.approx(
        (late, early)
    )


@pytest.mark.slow
def test_what_is_drawn(done, monkeypatch):
    config, session, _ = done
    monkeypatch.setattr(stream_watch, "FIRST_STEPS", 12)
    geometry = session.config.geometry
    watch, seen = Watch(session), []
    state, tokens, losses = session.init(), tokens_of(config)[:80], []
    for part in (tokens[:24], tokens[24:40], tokens[40:]):
        state, part_losses = session.append(
            state, part, on_refocus=lambda *step: (watch.look(*step), seen.append(step))
        )
        watch.collect(part_losses)
        losses += part_losses.tolist()
    assert watch.entries.tolist() == [int(state.context.length) for state, _ in seen] and len(seen) == 20
    np.testing.assert_array_equal(watch.token_losses, np.reshape(losses, (20, INTERVAL)).astype(np.float32))
    np.testing.assert_allclose(watch.losses, np.mean(np.reshape(losses, (20, INTERVAL)), axis=1), rtol=1e-5)
    drawn = watch.map_of_first_steps("title")
    assert drawn.cursors.tolist() == [INTERVAL * step for step in range(1, 13)] and drawn.cuts.shape == (12, HISTORY)
    np.testing.assert_array_equal(drawn.nll, watch.losses[:12])
    for place, (state, report) in enumerate(seen[:12]):
        held = state.history.held
        assert drawn.first[place] == state.history.forgotten == drawn.cursors[place] - held
        np.testing.assert_array_equal(drawn.cuts[place, :held], contexts.to_cut(state.context, geometry)[:held])
        assert (drawn.cuts[place, held:] == MISSING).all() and drawn.swap_rate[place] == float(report.swap_rate)


# Quality

# The history is full at the cursors 32, 36, ... 436; the last 100 of these are 20 stretches of 5.
CURSORS = range(40, 437, INTERVAL)
RIVALS = ("session", "sliding_window", "collapse_oldest", "random_scores", "whole_window")


def rows_by_policy(summary):
    return {row["policy"]: row for row in summary["quality"]}


@pytest.mark.slow
def test_the_losses_that_are_compared(done):
    config, session, summary = done
    rows, tokens = rows_by_policy(summary), tokens_of(config)
    assert tuple(rows) == RIVALS and {row["information"] for row in rows.values()} == {"causal"}
    states = []
    own = session.append(session.init(3), tokens, on_refocus=lambda state, _: states.append(state))[1]
    scored = slice(CURSORS[0], CURSORS[-1] + INTERVAL)
    expected = {"session": own[scored].mean()}
    for rival, name in zip(SESSIONS, ("collapse_oldest", "random_scores"), strict=True):
        assert rival.steps.policy is getattr(streams, name) and rival.config == session.config
        expected[name] = rival.append(rival.init(3), tokens)[1][scored].mean()
    entries = {state.read: int(state.context.length) for state in states}
    whole = jax.jit(lambda window: nll.sequence_nll(session.models.base, session.params["base"], window)[-INTERVAL:])
    for name, lengths in (("sliding_window", entries), ("whole_window", dict.fromkeys(entries, HISTORY))):
        horizons = [whole(tokens[c - lengths[c] : c + INTERVAL]) for c in CURSORS]
        expected[name] = np.mean(horizons)
    assert {name: row["nats"] for name, row in rows.items()} == pytest.approx(expected, rel=1e-5)
    held = [entries[cursor] for cursor in CURSORS]
    assert rows["session"]["entries"] == rows["random_scores"]["entries"] == pytest.approx(np.mean(held))
    assert rows["whole_window"]["entries"] == HISTORY


@pytest.mark.slow
def test_a_sliding_window_has_the_entries_of_the_context_that_was_decided_at_its_cursor(done, tmp_path, monkeypatch):
    config, session, _ = done
    windows = []
    monkeypatch.setattr(rivals, "POLICIES", {})
    monkeypatch.setattr(rivals, "stream_quality", lambda *_: None)
    monkeypatch.setattr(rivals, "_of_windows", lambda *of: windows.append(of[3:]) or np.zeros((len(of[3]), INTERVAL)))
    steps = TOKENS // INTERVAL
    losses = np.arange(float(steps * INTERVAL)).reshape(steps, INTERVAL)
    # Step s is number s - 1.
    watch = SimpleNamespace(entries=np.arange(1, steps + 1), losses=losses.mean(axis=1), token_losses=losses)
    rows = rivals.compare(config, session, tokens_of(config), watch, "", tmp_path)
    assert rows[0]["nats"] == np.arange(float(CURSORS[0]), CURSORS[-1] + INTERVAL).mean()
    (cursors, entries), (_, whole) = windows
    assert cursors.tolist() == list(CURSORS) and set(whole) == {HISTORY}
    np.testing.assert_array_equal(entries * INTERVAL, cursors)


def _shown(value):
    """As a table shows it."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


@pytest.mark.slow
def test_the_table_of_the_comparison(done, arguments):
    _, _, summary = done
    rows = rows_by_policy(summary)
    for other in ("session", "sliding_window"):
        assert [rows[other][f"minus_{other}{end}"] for end in rivals.ENDS] == [None] * 3
        for name in set(RIVALS) - {other}:
            mean, low, high = (rows[name][f"minus_{other}{end}"] for end in rivals.ENDS)
            assert mean == pytest.approx(rows[name]["nats"] - rows[other]["nats"], abs=1e-9) and low < mean < high
    with (arguments.output_dir / "quality.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    told = [{name: _shown(value) for name, value in row.items()} for row in summary["quality"]]
    assert written == told and list(written[0]) == [
        *("policy", "information", "reads", "entries", "nats"),
        *("minus_session", "minus_session_low", "minus_session_high"),
        *("minus_sliding_window", "minus_sliding_window_low", "minus_sliding_window_high", "key_nats"),
        *("key_minus_sliding_window", "key_minus_sliding_window_low", "key_minus_sliding_window_high"),
        *("key_tokens", "stretches"),
    ]
    # A model that has learned nothing gains nothing from the whole history.
    assert {(row["key_tokens"], row["key_nats"], row["key_minus_sliding_window"]) for row in rows.values()} == {
        (0, None, None)
    }


ENTRIES, READS = {"session": 7.0, "sliding_window": 8.0}, {"session": 11, "sliding_window": 0}
NO_KEY = np.zeros((60, 2), bool)


def test_differences_are_paired_by_stretches_of_the_stream():
    rng = np.random.default_rng(0)
    shared, noise = rng.normal(size=(60, 2)) * 10, rng.normal(size=(60, 2)) / 100
    losses = {"session": shared, "sliding_window": shared + 1 + noise}
    _, row = rivals.quality_rows(losses, NO_KEY, ENTRIES, READS)
    stretches = (1 + noise).reshape(20, 6).mean(axis=1)
    expected = scipy.stats.ttest_1samp(stretches, 0).confidence_interval(0.95)
    mean, low, high = (row[f"minus_session{end}"] for end in rivals.ENDS)
    assert (mean, low, high) == pytest.approx((stretches.mean(), *expected), rel=1e-9)
    assert (row["reads"], row["entries"], row["stretches"]) == (0, 8.0, 20) and high - low < 0.05
    assert row["nats"] == pytest.approx((shared + 1 + noise).mean(), rel=1e-12)


def test_key_tokens_have_columns_of_their_own():
    losses = {"session": np.full((60, 2), 5.0), "sliding_window": np.full((60, 2), 6.0)}
    is_key = NO_KEY.copy()
    # Stretches are of three horizons: two key tokens in the first, and one in the third and in the last each.
    for place, own, other in (((0, 1), 1.0, 3.0), ((2, 0), 1.0, 5.0), ((6, 0), 2.0, 3.0), ((59, 1), 4.0, 6.0)):
        is_key[place], losses["session"][place], losses["sliding_window"][place] = True, own, other
    session, sliding = rivals.quality_rows(losses, is_key, ENTRIES, READS)
    assert (session["key_nats"], sliding["key_nats"], session["key_tokens"]) == (2.0, 4.25, 4)
    # Of each stretch that has one a mean: -3, -1 and -2.
    expected = scipy.stats.ttest_1samp([-3.0, -1.0, -2.0], 0).confidence_interval(0.95)
    found = [session[f"key_minus_sliding_window{end}"] for end in rivals.ENDS]
    assert found == pytest.approx([-2.0, *expected], rel=1e-9)
    assert [sliding[f"key_minus_sliding_window{end}"] for end in rivals.ENDS] == [None] * 3


def test_without_key_tokens_there_is_nothing_to_say_of_them():
    losses = dict(zip(ENTRIES, np.random.default_rng(0).normal(size=(2, 60, 2)), strict=True))
    columns = ("key_nats", *(f"key_minus_sliding_window{end}" for end in rivals.ENDS))
    for row in rivals.quality_rows(losses, NO_KEY, ENTRIES, READS):
        assert [row[name] for name in columns] == [None] * 4 and row["key_tokens"] == 0
    # In one stretch alone there is a mean, and no interval.
    is_key = NO_KEY.copy()
    is_key[3:6] = True
    for name, row in zip(losses, rivals.quality_rows(losses, is_key, ENTRIES, READS), strict=True):
        assert row["key_nats"] == pytest.approx(losses[name][3:6].mean()) and row["key_tokens"] == 6
        assert [row[name] for name in columns[1:]] == [None] * 3


# Faults


@pytest.mark.slow
def test_a_context_that_is_not_legal_is_an_error_that_names_the_first_step(done, arguments, tmp_path, monkeypatch):
    real = contexts.invariants

    def invariants(context, geometry, *, tokens, **options):
        return real(context, geometry, tokens=tokens, **options) | {"tail": (tokens != 12) & (tokens != 24)}

    monkeypatch.setattr(contexts, "invariants", invariants)
    again(monkeypatch, *done[:2])
    with pytest.raises(ValueError, match=r"contexts are not legal, first at refocus step 3 \(token 12\): tail; see"):
        script.stream(dataclasses.replace(arguments, output_dir=tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["illegal_steps"], summary["first_illegal_step"], summary["broken_invariants"]) == (2, 3, ["tail"])
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(FILES)


@pytest.mark.slow
def test_every_step_is_compared_with_the_length_that_it_must_have(done):
    config, session, _ = done
    watch = Watch(session)

    def look(state, report):
        longer = dataclasses.replace(state.context, valid=state.context.valid.at[state.context.length].set(True))
        watch.look(dataclasses.replace(state, view=dataclasses.replace(state.view, context=longer)), report)

    _, losses = session.append(session.init(), tokens_of(config)[:40], on_refocus=look)
    seen = watch.collect(losses)
    assert (seen["refocus_steps"], seen["illegal_steps"], seen["first_illegal_step"]) == (10, 10, 1)
    assert seen["broke_budget"] == 10 and seen["broke_cache"] == seen["broke_tail"] == 0


@pytest.mark.slow
def test_losses_that_are_not_finite_are_an_error(done, arguments, tmp_path, monkeypatch):
    config, session = done[0], copy.copy(done[1])
    session.params = jax.tree.map(lambda leaf: jnp.full_like(leaf, math.nan), session.params)
    again(monkeypatch, config, session)
    with pytest.raises(FloatingPointError, match=f"{TOKENS - 1} losses are not finite: the models are broken"):
        script.stream(dataclasses.replace(arguments, output_dir=tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["losses_not_finite"] == TOKENS - 1 and summary["nll_by_tenth"] == [None] * 10
