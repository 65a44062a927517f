import copy
import csv
import dataclasses
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments.studies import stream as script
from experiments.studies import stream_watch
from experiments.studies.stream_watch import Watch
from lensjax.context import working as contexts
from lensjax.context.working import MISSING
from lensjax.evaluation import streams
from lensjax.models import build_models
from lensjax.plots import curves
from lensjax.runs import config as configs
from lensjax.runs.config import DataConfig
from lensjax.runs.data import batches as data
from lensjax.runs.data import splits
from lensjax.runs.engine import loop
from lensjax.runs.store import checkpoint
from lensjax.runs.store import folder as run_folder
from lensjax.session import Session
from lensjax.training import nll
from tests.runs import contents, run_script, tiny_config, write_corpus

INTERVAL, TOKENS, HISTORY = 4, 441, 30
FILES = ("config.json", "environment.json", "metrics.jsonl", "summary.json", "stream_start.png")
QUALITY_FILES = ("quality.csv", "quality.png")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """The folder of a run on text with a checkpoint of all models."""
    root = tmp_path_factory.mktemp("text")
    config = tiny_config(root / "run", write_corpus(root / "corpus"))
    for path in data.corpus_files(config.data, "test"):
        path.write_text(3 * path.read_text())
    models, folder = build_models(config), run_folder.create_run(config.output_dir, config)
    params = {name: getattr(models, name).init(jax.random.key(5)) for name in ("base", "gist", "lens")}
    checkpoint.save(loop.checkpoint_dir(folder, "lens"), 7, {"params": params, "step": jnp.int32(7)})
    return folder


@pytest.fixture(scope="module")
def arguments(text_run):
    return script.Arguments(
        run=text_run, tokens=TOKENS, interval=INTERVAL, output_dir=text_run.parent / "stream", seed=3
    )


@pytest.fixture(scope="module")
def done(arguments):
    """A session that is compiled, and what it left."""
    session, _ = prepared = script._prepare(arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "_DPI", 40)
        patch.setattr(stream_watch, "FIRST_STEPS", 12)
        patch.setattr(script, "_prepare", lambda _: prepared)
        patch.setattr(script, "Session", lambda *given, **options: kept(Session(*given, **options)))
        return session, script.stream(arguments)


SESSIONS = []


def kept(session):
    """The rivals' sessions are as slow to compile as the first."""
    SESSIONS.append(session)
    return session


def again(monkeypatch, session):
    """Lets a second command read the same stream with models that are compiled already."""
    monkeypatch.setattr(curves, "_DPI", 20)
    monkeypatch.setattr(script, "_prepare", lambda _: (session, tokens_of(session)))
    monkeypatch.setattr(script, "_compare", lambda *_: pytest.fail("a broken session was compared"))


def tokens_of(session):
    return script.stream_tokens(session.config, TOKENS)


def test_what_is_left_in_the_folder(done, arguments):
    session, summary = done
    assert {path.name for path in arguments.output_dir.iterdir()} == {*FILES, *QUALITY_FILES}
    for name in ("stream_start.png", "quality.png"):
        assert (arguments.output_dir / name).read_bytes().startswith(b"\x89PNG")
    assert configs.load(arguments.output_dir / "config.json") == session.config
    assert json.loads((arguments.output_dir / "summary.json").read_text(), parse_constant=pytest.fail) == summary
    stored = configs.load(arguments.run / "config.json")
    changed = {"context.horizon": INTERVAL, "context.window": stored.context.history + INTERVAL}
    expected = configs.replace(stored, seed=3, output_dir=str(arguments.output_dir), **changed)
    assert session.config == expected
    saved = checkpoint.restore_subtree(
        loop.checkpoint_dir(arguments.run, "lens"), 7, session.params["lens"], path=("params", "lens")
    )
    jax.tree.map(np.testing.assert_array_equal, session.params["lens"], saved)


def test_the_summary(done, arguments):
    session, summary = done
    steps = TOKENS // INTERVAL
    told = {name: summary[name] for name in ("task", "tokens", "seed", "interval", "history", "entries", "run")}
    assert told == {
        **{"task": "text", "tokens": TOKENS, "seed": 3, "interval": INTERVAL, "history": HISTORY, "entries": 21},
        "run": str(arguments.run),
    }
    assert (summary["refocus_steps"], summary["illegal_steps"], summary["first_illegal_step"]) == (steps, 0, None)
    assert (summary["broken_invariants"], summary["losses_not_finite"]) == ([], 0)
    _, losses = session.append(session.init(), tokens_of(session))
    assert len(summary["nll_by_tenth"]) == 10
    assert np.mean(summary["nll_by_tenth"]) == pytest.approx(losses.mean(), rel=1e-3)
    assert losses.mean() == pytest.approx(math.log(256), abs=0.1)
    places = ["1 %", *(f"{percent} %" for percent in range(10, 101, 10))]
    assert list(summary["device_bytes"]) == list(summary["process_bytes"]) == places
    assert all(number > 10_000 for number in summary["device_bytes"].values())
    assert summary["late_over_early"] == pytest.approx(
        summary["microseconds_per_token_late"] / summary["microseconds_per_token_early"]
    )
    assert summary["tokens_per_second"] > 0 and 0 < summary["swap_rate"] < 1


def test_a_row_for_each_percent(done, arguments):
    session, summary = done
    rows = [json.loads(line) for line in (arguments.output_dir / "metrics.jsonl").read_text().splitlines()]
    ends = [row["tokens_read"] for row in rows]
    assert [row["percent"] for row in rows] == list(range(1, 101)) and ends[-1] == TOKENS
    assert all(end % INTERVAL == 0 for end in ends[:-1])
    counts = np.diff(ends, prepend=0)
    assert set(counts) <= {INTERVAL, 2 * INTERVAL, INTERVAL + TOKENS % INTERVAL, 2 * INTERVAL + TOKENS % INTERVAL}
    steps = []
    _, losses = session.append(session.init(), tokens_of(session), on_refocus=lambda *step: steps.append(step[1]))
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


def test_what_is_drawn(done, monkeypatch):
    session, _ = done
    monkeypatch.setattr(stream_watch, "FIRST_STEPS", 12)
    watch, seen = Watch(session), []
    state, tokens, losses = session.init(), tokens_of(session)[:80], []
    for part in (tokens[:24], tokens[24:40], tokens[40:]):
        state, part_losses = session.append(
            state, part, on_refocus=lambda *step: (watch.look(*step), seen.append(jax.tree.map(jnp.copy, step)))
        )
        watch.collect(part_losses)
        losses += part_losses.tolist()
    assert watch.entries.tolist() == [int(state.context.length) for state, _ in seen] and len(seen) == 20
    np.testing.assert_allclose(watch.losses, np.mean(np.reshape(losses, (20, INTERVAL)), axis=1), rtol=1e-5)
    drawn = watch.map_of_first_steps("title")
    assert drawn.cursors.tolist() == [INTERVAL * step for step in range(1, 13)] and drawn.cuts.shape == (12, HISTORY)
    np.testing.assert_array_equal(drawn.nll, watch.losses[:12])
    for place, (state, report) in enumerate(seen[:12]):
        held = int(state.tree.length)
        assert drawn.first[place] == int(state.forgotten) == drawn.cursors[place] - held
        np.testing.assert_array_equal(drawn.cuts[place, :held], contexts.to_cut(state.context, window=HISTORY)[:held])
        assert (drawn.cuts[place, held:] == MISSING).all() and drawn.swap_rate[place] == float(report.swap_rate)


# Quality

# The history is full at the cursors 32, 36, ... 436; the last 100 of these are 20 stretches of 5.
CURSORS = range(40, 437, INTERVAL)
RIVALS = ("session", "sliding_window", "collapse_oldest", "random_scores", "whole_window")


def rows_by_policy(summary):
    return {row["policy"]: row for row in summary["quality"]}


def test_the_losses_that_are_compared(done):
    session, summary = done
    rows, tokens = rows_by_policy(summary), tokens_of(session)
    assert tuple(rows) == RIVALS and {row["information"] for row in rows.values()} == {"causal"}
    states = []
    own = session.append(
        session.init(3), tokens, on_refocus=lambda state, _: states.append(jax.tree.map(jnp.copy, state))
    )[1]
    scored = slice(CURSORS[0], CURSORS[-1] + INTERVAL)
    expected = {"session": own[scored].mean()}
    for rival, name in zip(SESSIONS, ("collapse_oldest", "random_scores"), strict=True):
        assert rival._policy is getattr(streams, name) and rival.config == session.config
        expected[name] = rival.append(rival.init(3), tokens)[1][scored].mean()
    entries = {int(state.read): int(state.context.length) for state in states}
    whole = jax.jit(lambda window: nll.sequence_losses(session.models.base, session.params["base"], window)[-INTERVAL:])
    for name, lengths in (("sliding_window", entries), ("whole_window", dict.fromkeys(entries, HISTORY))):
        horizons = [whole(tokens[c - lengths[c] : c + INTERVAL]) for c in CURSORS]
        expected[name] = np.mean(horizons)
    assert {name: row["nats"] for name, row in rows.items()} == pytest.approx(expected, rel=1e-5)
    held = [entries[cursor] for cursor in CURSORS]
    assert rows["session"]["entries"] == rows["random_scores"]["entries"] == pytest.approx(np.mean(held))
    assert rows["whole_window"]["entries"] == HISTORY


def test_a_sliding_window_has_the_entries_of_the_context_that_was_decided_at_its_cursor(done, tmp_path, monkeypatch):
    session, _ = done
    asked = []
    monkeypatch.setattr(script, "POLICIES", {})
    monkeypatch.setattr(script, "stream_quality", lambda *_: None)
    monkeypatch.setattr(script, "_of_windows", lambda *given: asked.append(given[2:]) or np.zeros(len(given[2])))
    steps = TOKENS // INTERVAL
    watch = SimpleNamespace(entries=np.arange(1, steps + 1), losses=np.arange(float(steps)))  # step s is number s - 1
    script._compare(session, tokens_of(session), watch, "", tmp_path)
    (cursors, entries), (_, whole) = asked
    assert cursors.tolist() == list(CURSORS) and set(whole) == {HISTORY}
    np.testing.assert_array_equal(entries * INTERVAL, cursors)


def test_the_table_of_the_comparison(done, arguments):
    _, summary = done
    rows = rows_by_policy(summary)
    for other in ("session", "sliding_window"):
        assert [rows[other][f"minus_{other}{end}"] for end in script.ENDS] == [None] * 3
        for name in set(RIVALS) - {other}:
            mean, low, high = (rows[name][f"minus_{other}{end}"] for end in script.ENDS)
            assert mean == pytest.approx(rows[name]["nats"] - rows[other]["nats"], abs=1e-9) and low < mean < high
    with (arguments.output_dir / "quality.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    told = [{name: "" if value is None else str(value) for name, value in row.items()} for row in summary["quality"]]
    assert written == told and list(written[0]) == [
        *("policy", "information", "entries", "nats"),
        *("minus_session", "minus_session_low", "minus_session_high"),
        *("minus_sliding_window", "minus_sliding_window_low", "minus_sliding_window_high", "stretches"),
    ]


def test_differences_are_paired_by_stretches_of_the_stream():
    rng = np.random.default_rng(0)
    shared, noise = rng.normal(size=60) * 10, rng.normal(size=60) / 100
    losses = {"session": shared, "sliding_window": shared + 1 + noise}
    _, row = script.quality_rows(losses, {"session": 7.0, "sliding_window": 8.0})
    stretches = (1 + noise).reshape(20, 3).mean(axis=1)
    expected = scipy.stats.ttest_1samp(stretches, 0).confidence_interval(0.95)
    found = tuple(row[f"minus_session{end}"] for end in script.ENDS)
    assert found == pytest.approx((stretches.mean(), *expected), rel=1e-9)
    assert (row["entries"], row["stretches"]) == (8.0, 20) and found[2] - found[1] < 0.05


# Streams


def test_text_is_read_file_by_file_and_once(done, tmp_path):
    session, _ = done
    config = session.config
    texts = [path.read_bytes() for path in data.corpus_files(config.data, "test")]
    whole = b"\0".join(texts)
    assert bytes(tokens_of(session).tolist()) == whole[:TOKENS] and len(texts) == 2
    assert bytes(script.stream_tokens(config, len(whole)).tolist()) == whole
    with pytest.raises(
        ValueError, match=f"tokens must be at most {len(whole)}, .* got {len(whole) + 1}: lower it, add"
    ):
        script.stream_tokens(config, len(whole) + 1)
    (tmp_path / "a.txt").write_text("The only file.")
    assert splits.split_of("a.txt") == "train"
    with pytest.raises(ValueError, match="tokens must be at most 0, the bytes of the test split"):
        script.stream_tokens(configs.replace(config, **{"data.path": str(tmp_path)}), 5)


def test_recall_is_random_blocks_of_which_some_come_again():
    def blocks(seed):
        tokens = script.stream_tokens(configs.replace(script.FRESH, seed=seed), 12_000)
        return [tuple(block) for block in tokens.reshape(3000, 4).tolist()]

    one, reach = blocks(0), script.FRESH.context.history // script.FRESH.context.block_size
    assert one == blocks(0) != blocks(1)
    again = [block in one[max(i - reach, 0) : i] for i, block in enumerate(one)]
    assert np.mean(again) == pytest.approx(0.5, abs=0.05)
    assert {token for block in one for token in block} == set(range(256))


def test_windows_that_have_nothing_to_do_with_each_other_are_no_stream():
    config = configs.replace(script.FRESH, data=DataConfig(task="tracking"))
    with pytest.raises(ValueError, match=r"data.task 'tracking' is of windows .* expected a run on text or on recall"):
        script.stream_tokens(config, 5)


# Faults


def test_a_context_that_is_not_legal_is_an_error_that_names_the_first_step(done, arguments, tmp_path, monkeypatch):
    real = contexts.invariants

    def invariants(context, *, window, **options):
        return real(context, window=window, **options) | {"tail": (window != 12) & (window != 24)}

    monkeypatch.setattr(contexts, "invariants", invariants)
    again(monkeypatch, done[0])
    with pytest.raises(ValueError, match=r"contexts are not legal, first at refocus step 3 \(token 12\): tail; see"):
        script.stream(dataclasses.replace(arguments, output_dir=tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["illegal_steps"], summary["first_illegal_step"], summary["broken_invariants"]) == (2, 3, ["tail"])
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(FILES)


def test_every_step_is_compared_with_the_length_that_it_must_have(done):
    session, _ = done
    watch = Watch(session)

    def look(state, report):
        longer = dataclasses.replace(state.context, valid=state.context.valid.at[state.context.length].set(True))
        watch.look(dataclasses.replace(state, context=longer), report)

    _, losses = session.append(session.init(), tokens_of(session)[:40], on_refocus=look)
    found = watch.collect(losses)
    assert (found["refocus_steps"], found["illegal_steps"], found["first_illegal_step"]) == (10, 10, 1)
    assert found["broke_budget"] == 10 and found["broke_cache"] == found["broke_tail"] == 0


def test_losses_that_are_not_finite_are_an_error(done, arguments, tmp_path, monkeypatch):
    session = copy.copy(done[0])
    session.params = jax.tree.map(lambda leaf: jnp.full_like(leaf, math.nan), session.params)
    again(monkeypatch, session)
    with pytest.raises(FloatingPointError, match=f"{TOKENS - 1} losses are not finite: the models are broken"):
        script.stream(dataclasses.replace(arguments, output_dir=tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["losses_not_finite"] == TOKENS - 1 and summary["nll_by_tenth"] == [None] * 10


def test_fresh_models_need_no_run(tmp_path):
    session, tokens = script._prepare(script.Arguments(output_dir=tmp_path / "run", seed=4))
    assert session.config == configs.replace(script.FRESH, seed=4, output_dir=str(tmp_path / "run"))
    assert (session.interval, session.budget, len(tokens)) == (32, 128, 100_000)
    leaves = [leaf for name in ("base", "gist", "lens") for leaf in jax.tree.leaves(session.params[name])]
    assert leaves and not list(tmp_path.iterdir())


# Every row: a command line in which {tmp} is a folder, and what the one message must say.
BAD_COMMANDS = [
    ("--tokens 3199", "tokens must be at least 3200, .* an interval of 32, .* got 3199: raise it or lower interval"),
    ("--run {tmp}/early --interval 1 --tokens 99", "tokens must be at least 100, .* got 99: raise it"),
    ("--run {tmp}/early --interval 500 --tokens 10528", "tokens must be at least 50000"),
    ("--interval 0", "interval must be at least 1 token, got 0"),
    ("--interval 600", "context.window must hold the 640 tokens that are forgotten at once, .* or context.horizon"),
    ("--seed -1", "seed must be .*, got -1"),
    ("--run {tmp}/none", "{tmp}/none holds no run (config.json is missing): name the folder of a run"),
    ("--run {tmp}/early --interval 4", "{tmp}/early has no checkpoint: let it finish its pretraining first"),
    ("--run {tmp}/base --interval 4", "{tmp}/base has no checkpoint of LensNet: let it train first"),
    ("--output-dir {tmp}/base", "{tmp}/base is not empty: choose another --output-dir"),
    ("--output-dir {tmp}/file", "{tmp}/file is not empty: choose another --output-dir"),
    ("--token 5000", "Unrecognized options: --token"),
]


@pytest.mark.parametrize(("command", "message"), BAD_COMMANDS)
def test_bad_command_lines_are_refused_before_anything_is_written(tmp_path, command, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(script, "_read", lambda *_: pytest.fail("a stream was read"))
    (tmp_path / "file").write_text("")
    run_folder.create_run(tmp_path / "early", tiny_config(tmp_path / "early"))
    run_folder.create_run(tmp_path / "base", tiny_config(tmp_path / "base"))
    checkpoint.save(loop.checkpoint_dir(tmp_path / "base", "pretrain"), 4, {"params": jnp.zeros(1)})
    before = contents(tmp_path)
    words = command.replace("{tmp}", str(tmp_path)).split()
    with pytest.raises(SystemExit) as end:
        script.main(words if "--output-dir" in words else [*words, "--output-dir", str(tmp_path / "run")])
    told = end.value.code if isinstance(end.value.code, str) else " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2 or re.fullmatch("error: [^\n]+", told)
    assert re.search(re.escape(message.replace("{tmp}", str(tmp_path))).replace(r"\.\*", ".*"), told), told
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0 and "--interval" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_as_a_whole(tmp_path):
    done = run_script(
        "--tokens", "3300", "--output-dir", tmp_path / "run", script="studies.stream", cache=tmp_path / "compiled"
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(FILES)
    assert "quality" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done.stdout.splitlines()[0] == f"run folder {tmp_path / 'run'}, {jax.default_backend()}, seed 0"
    assert done.stdout.splitlines()[-1] == f"pictures and metrics are in {tmp_path / 'run'}"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["refocus_steps"], summary["illegal_steps"], summary["losses_not_finite"]) == (103, 0, 0)
    assert len(set(summary["device_bytes"].values())) == 1
