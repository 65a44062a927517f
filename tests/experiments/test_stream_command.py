"""Which stream `experiments.studies.stream` reads, with which models, and command lines that it refuses."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import stream as script
from lensjax import _settings
from lensjax.runs.config import Config
from lensjax.runs.data import corpus as data
from lensjax.runs.data import splits
from lensjax.runs.data.task import DataConfig
from lensjax.runs.store import checkpoint, run_folder
from tests.runs import contents, run_script, tiny_config, write_corpus

FILES = ("config.json", "environment.json", "metrics.jsonl", "summary.json", "stream_start.png", "cost.png")


def test_text_is_read_file_by_file_and_once(tmp_path):
    config = tiny_config(tmp_path / "run", write_corpus(tmp_path / "corpus"))
    texts = [path.read_bytes() for path in data.corpus_files(config.data, "test")]
    whole = b"\0".join(texts)
    assert bytes(script.stream_tokens(config, 200).tolist()) == whole[:200] and len(texts) == 2
    assert bytes(script.stream_tokens(config, len(whole)).tolist()) == whole
    with pytest.raises(
        ValueError, match=f"tokens must be at most {len(whole)}, .* got {len(whole) + 1}: lower it, add"
    ):
        script.stream_tokens(config, len(whole) + 1)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("The only file.")
    assert splits.split_of("a.txt") == "train"
    with pytest.raises(ValueError, match="tokens must be at most 0, those of the test split"):
        script.stream_tokens(_settings.replace(config, **{"data.path": str(tmp_path / "one")}), 5)


def test_recall_is_random_blocks_of_which_some_come_again():
    def blocks(seed):
        config = Config(seed=seed, data=DataConfig(task="recall"))
        tokens = script.stream_tokens(config, 12_001)
        assert tokens.shape == (12_001,) and tokens.dtype == np.int32
        return [tuple(block) for block in tokens[:-1].reshape(1500, 8).tolist()]

    one, reach = blocks(0), 224 // 8
    assert one == blocks(0) != blocks(1)
    again = [block in one[max(i - reach, 0) : i] for i, block in enumerate(one)]
    assert np.mean(again) == pytest.approx(0.5, abs=0.05)
    assert {token for block in one for token in block} == set(range(256))


def test_windows_that_have_nothing_to_do_with_each_other_are_no_stream():
    config = _settings.replace(script.FRESH, data=DataConfig(task="tracking"))
    with pytest.raises(ValueError, match=r"data.task 'tracking' is of windows .* expected a run on text or on recall"):
        script.stream_tokens(config, 5)


def test_fresh_models_need_no_run(tmp_path):
    config, session, tokens = script._prepare(script.Arguments(output_dir=tmp_path / "run", seed=4))
    assert config == _settings.replace(script.FRESH, seed=4, output_dir=str(tmp_path / "run"))
    assert (session.config.interval, session.config.budget, len(tokens)) == (32, 127, 100_000)
    assert session.config.geometry.history == 2**24
    leaves = [leaf for name in ("base", "gist", "lens") for leaf in jax.tree.leaves(session.params[name])]
    assert leaves and not list(tmp_path.iterdir())


# Every row: a command line in which {tmp} is a folder, and what the one message must say.
BAD_COMMANDS = [
    ("--tokens 3199", "tokens must be at least 3200, .* an interval of 32, .* got 3199: raise it or lower interval"),
    ("--run {tmp}/early --interval 1 --tokens 99", "tokens must be at least 100, .* got 99: raise it"),
    ("--run {tmp}/early --interval 500 --tokens 10528", "tokens must be at least 50000"),
    ("--interval 0", "interval must be at least 1, got 0"),
    (
        "--history 512",
        "session.geometry.history must hold the 2097152 tokens .* got 512: raise it, or lower max_lod",
    ),
    ("--seed -1", "seed must be .*, got -1"),
    ("--run {tmp}/early --until 50 --interval 4", "until and resume are for fresh models, .*: leave out run"),
    ("--until 101", "until must be in [1, 100], got 101"),
    ("--resume", "holds no session to resume: read until some percent of the stream first"),
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
    checkpoint.save(
        run_folder.checkpoint_dir(tmp_path / "base", "pretrain"),
        4,
        {"params": {"base": jnp.zeros(1), "gist": jnp.zeros(1)}},
    )
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
    # What the first steps have said is a few numbers more.
    first, *later = summary["device_bytes"].values()
    assert len(set(later)) == 1 and 0 <= later[0] - first < 1000
