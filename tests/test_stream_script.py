import copy
import dataclasses
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import stream as script
from lensjax import checkpoint, data, loop, plots, run_folder, splits
from lensjax import config as configs
from lensjax import context as contexts
from lensjax.context import MISSING
from lensjax.models import build_models
from tests.runs import contents, run_script, tiny_config, write_corpus

INTERVAL, TOKENS = 4, 433
FILES = ("config.json", "environment.json", "metrics.jsonl", "summary.json", "stream.png", "stream_start.png")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """The folder of a run on text with a checkpoint of all models."""
    root = tmp_path_factory.mktemp("text")
    config = tiny_config(root / "run", write_corpus(root / "corpus"))
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
        patch.setattr(plots, "_DPI", 40)
        patch.setattr(script, "EVEN_STEPS", 30)
        patch.setattr(script, "FIRST_STEPS", 12)
        patch.setattr(script, "_prepare", lambda _: prepared)
        return session, script.stream(arguments)


def again(monkeypatch, session):
    """Lets a second command read the same stream with models that are compiled already."""
    tokens = itertools.chain.from_iterable(script.token_pieces(session.config))
    monkeypatch.setattr(plots, "_DPI", 20)
    monkeypatch.setattr(script, "_prepare", lambda _: (session, tokens))


def tokens_of(session):
    return list(itertools.islice(itertools.chain.from_iterable(script.token_pieces(session.config)), TOKENS))


def test_what_is_left_in_the_folder(done, arguments):
    session, summary = done
    assert {path.name for path in arguments.output_dir.iterdir()} == set(FILES)
    for name in FILES[-2:]:
        assert (arguments.output_dir / name).read_bytes().startswith(b"\x89PNG")
    assert configs.load(arguments.output_dir / "config.json") == session.config
    assert json.loads((arguments.output_dir / "summary.json").read_text(), parse_constant=pytest.fail) == summary
    stored = configs.load(arguments.run / "config.json")
    changed = {"context.horizon": INTERVAL, "context.recent_tokens": INTERVAL + 1}
    expected = configs.replace(stored, seed=3, output_dir=str(arguments.output_dir), **changed)
    assert session.config == expected
    saved = checkpoint.restore_subtree(
        loop.checkpoint_dir(arguments.run, "lens"), 7, session.params["lens"], path=("params", "lens")
    )
    jax.tree.map(np.testing.assert_array_equal, session.params["lens"], saved)


def test_the_summary(done, arguments):
    session, summary = done
    steps = TOKENS // INTERVAL
    told = {name: summary[name] for name in ("task", "tokens", "seed", "interval", "window", "entries", "run")}
    assert told == {
        **{"task": "text", "tokens": TOKENS, "seed": 3, "interval": INTERVAL, "window": 32, "entries": 23},
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
    monkeypatch.setattr(script, "EVEN_STEPS", 5)
    monkeypatch.setattr(script, "FIRST_STEPS", 3)
    watch, seen = script._Watch(session, 80), []
    state, tokens, losses = session.init(), tokens_of(session)[:80], []
    for part in (tokens[:24], tokens[24:40], tokens[40:]):
        state, part_losses = session.append(
            state, part, on_refocus=lambda *step: (watch.look(*step), seen.append(jax.tree.map(jnp.copy, step)))
        )
        watch.collect(part_losses)
        losses += part_losses.tolist()
    assert watch.even_steps.tolist() == [1, 5, 10, 15, 20] and watch.first_steps.tolist() == [1, 2, 3]
    drawn = watch.map_of(watch.even_steps, "title")
    assert drawn.cursors.tolist() == [4, 20, 40, 60, 80]
    since = np.split(np.array(losses), [4, 20, 40, 60])
    np.testing.assert_allclose(drawn.nll, [part.mean() for part in since], rtol=1e-5)
    for place, step in enumerate(watch.even_steps):
        state, report = seen[step - 1]
        held = int(state.tree.length)
        assert drawn.first[place] == int(state.forgotten) == drawn.cursors[place] - held
        np.testing.assert_array_equal(drawn.cuts[place, :held], contexts.to_cut(state.context, window=32)[:held])
        assert (drawn.cuts[place, held:] == MISSING).all() and drawn.cuts.shape == (5, 32)
        assert drawn.swap_rate[place] == float(report.swap_rate)


def test_text_is_read_file_by_file_and_again(done, tmp_path):
    session, _ = done
    config = session.config
    texts = [path.read_bytes() for path in data.corpus_files(config.data, "test")]
    assert bytes(tokens_of(session)) == b"".join(text + b"\0" for text in texts * 9)[:TOKENS]
    (tmp_path / "a.txt").write_text("The only file.")
    assert splits.split_of("a.txt") == "train"
    with pytest.raises(ValueError, match="the test split holds no file: add files"):
        script.token_pieces(configs.replace(config, **{"data.path": str(tmp_path)}))


def test_recall_is_random_blocks_of_which_some_come_again():
    def blocks(seed):
        config = configs.replace(script.FRESH, seed=seed)
        return [tuple(block) for block in itertools.islice(script.token_pieces(config), 3000)]

    one, reach = blocks(0), script.FRESH.context.window // script.FRESH.context.block_size
    assert one == blocks(0) != blocks(1)
    again = [block in one[max(i - reach, 0) : i] for i, block in enumerate(one)]
    assert np.mean(again) == pytest.approx(0.5, abs=0.05)
    assert all(len(block) == 4 for block in one) and {token for block in one for token in block} == set(range(256))


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
    assert (tmp_path / "run" / "stream.png").is_file()


def test_every_step_is_compared_with_the_length_that_it_must_have(done):
    session, _ = done
    watch = script._Watch(session, TOKENS)

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
    assert (session.interval, session.budget) == (32, 128) and 0 <= next(tokens) < 256
    leaves = [leaf for name in ("base", "gist", "lens") for leaf in jax.tree.leaves(session.params[name])]
    assert leaves and not list(tmp_path.iterdir())


# Every row: a command line in which {tmp} is a folder, and what the one message must say.
BAD_COMMANDS = [
    ("--tokens 3199", "tokens must be at least 3200, .* an interval of 32, got 3199: raise it or lower interval"),
    ("--interval 0", "interval must be at least 1 token, got 0"),
    ("--interval 115", "budget of 128 entries, 115 of which .* raise hyper.context_end or"),
    ("--interval 600", "context.window must hold the recent tokens and at least one block"),
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
        "--tokens", "3300", "--output-dir", tmp_path / "run", script="stream", cache=tmp_path / "compiled"
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(FILES)
    assert done.stdout.splitlines()[0] == f"run folder {tmp_path / 'run'}, {jax.default_backend()}, seed 0"
    assert done.stdout.splitlines()[-1] == f"pictures and metrics are in {tmp_path / 'run'}"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["refocus_steps"], summary["illegal_steps"], summary["losses_not_finite"]) == (103, 0, 0)
    assert len(set(summary["device_bytes"].values())) == 1
