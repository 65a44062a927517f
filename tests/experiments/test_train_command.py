"""Presets, flags, and command lines that `experiments.train` refuses before anything is written."""

import dataclasses
import re
import subprocess
import sys

import pytest

from experiments import evaluate
from experiments import train as script
from lensjax import _settings
from lensjax.runs import sizes
from lensjax.runs.config import Config
from lensjax.runs.engine import loop
from lensjax.runs.store import config_file, identity, run_folder
from tests.runs import ROOT, tiny_config, write_corpus

PRESETS = sorted(path.stem for path in script.PRESETS.glob("*.py"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_configs(name):
    preset = script.load_preset(name)
    assert isinstance(preset, Config)
    assert config_file.from_json(config_file.to_json(preset), Config) == preset
    assert script.parse([name]) == (preset, False)
    assert script.load_preset(str(script.PRESETS / f"{name}.py")) == preset
    preset.build_models()


def test_presets_write_to_folders_of_their_own():
    assert {"demo", "recall"} <= set(PRESETS)
    assert len({script.load_preset(name).output_dir for name in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("name", ["demo", "notes", "recall_long", "stdlib", "tracking"])
def test_presets_that_omit_distil_from_recency_and_know_what_comes_first(name):
    preset = script.load_preset(name)
    assert preset.context.omit and preset.context.max_lod == 1
    assert preset.distill.steps > 0 and preset.steps == preset.online.steps == 0 and preset.trains_lens
    assert (preset.focus.start, preset.lens.recency) == ("recency", True)
    # A quarter of the history, beside a map of the rest.
    assert preset.budget < preset.context.history / 3.5 and preset.capacity == preset.budget
    assert preset.pretrain.steps > 0 and preset.pretrain.rollout_weight > 0


def test_flags_change_single_fields():
    config, resume = script.parse(["recall", "--seed", "3", "--hyper.kl-weight", "0.5", "--trainable", "gist", "lens"])
    expected = _settings.replace(
        script.load_preset("recall"), **{"seed": 3, "hyper.kl_weight": 0.5, "trainable": ("gist", "lens")}
    )
    assert (config, resume) == (expected, False)
    assert script.parse([]) == (Config(), False)
    assert script.parse(["--data.max-files", "5"])[0] == _settings.replace(Config(), **{"data.max_files": 5})


def test_the_config_file_of_a_run_is_a_preset(tmp_path):
    config = tiny_config(tmp_path / "run", seed=4, **{"hyper.temperature": 0.3, "optimizer.curriculum_steps": 2})
    folder = run_folder.create_run(config.output_dir, config)
    assert script.parse([str(folder / "config.json")]) == (config, False)
    changed, _ = script.parse([str(folder / "config.json"), "--output-dir", "elsewhere"])
    assert changed == dataclasses.replace(config, output_dir="elsewhere")
    assert script.parse(["--resume", str(folder)]) == (config, True)
    moved = folder.rename(tmp_path / "moved")
    assert script.parse(["--resume", str(moved)]) == (dataclasses.replace(config, output_dir=str(moved)), True)


def test_help_names_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "--resume runs/notes" in shown
    flags = {name.replace("_", "-") for name in identity.flat(Config())}
    assert flags <= set(re.findall(r"--([a-z0-9.-]+)", shown))


# Every row: a command line in which {tmp} is a folder, and what the one message must say.
BAD_COMMANDS = [
    ("--sede 1", "Unrecognized options: --sede"),
    ("recall demo", "demo is no flag: a preset comes first, and alone"),
    ("--steps ten", "invalid literal for int() with base 10: 'ten'"),
    ("--dtype float16", "invalid choice 'float16' for argument '--dtype'. Expected one of ('float32', 'bfloat16')"),
    (
        "--data.task web",
        "invalid choice 'web' for argument '--data.task'. Expected one of ('stdlib', 'text', 'recall', 'tracking', "
        "'suite')",
    ),
    (
        "--trainable head",
        "invalid choice 'head' for argument '--trainable'. Expected one of ('base', 'gist', 'lens', 'hypernet')",
    ),
    ("--trainable lens lens", "trainable must name one or more different parts .* got ('lens', 'lens')"),
    ("--steps 10", "steps must be above optimizer.warmup_steps 20, got 10"),
    ("--batch-size 0", "batch_size must be in [1, 65536], got 0"),
    ("--hyper.learning-rate -1", "hyper.learning_rate must be above 0, got -1.0"),
    ("--hyper.learning-rate nan", "hyper.learning_rate must be finite and above 0, got nan"),
    (
        "--hyper.context-end 0.05",
        "hyper.context_end asks for 11 entries, .* the nearest reachable lengths are 14 and 21",
    ),
    ("--context.recent-tokens 0", "context.recent_tokens must be at least 1, got 0"),
    (
        "--context.window 40",
        "context.window must hold a block, context.recent_tokens and context.horizon, at least 48, got 40",
    ),
    ("--base.vocab-size 100", "base.vocab_size must be at least 256 for text, which is read as bytes, got 100"),
    ("--base.dim 60", "base.dim must be a multiple of 2 * base.heads = 8 (rotary pairs), got 60"),
    ("--steps 0 --base-run {tmp}/base", "steps is 0 and base_run is '{tmp}/base': .* raise steps or drop base_run"),
    ("--base-run a --start-from b", "base_run 'a' and start_from 'b' both give a base model: name one of them"),
    ("--data.task text", "data.path must name a folder or a glob where data.task is text, got None"),
    ("--data.path {tmp}", "data.path is read only where data.task is text: set data.task text, got 'stdlib'"),
    ("--data.task text --data.path {tmp}/empty", "no file with text in it under {tmp}/empty"),
    ("--data.task text --data.path {tmp}/none", "'{tmp}/none' does not exist; expected a folder, a file or a glob"),
    (
        "--data.task text --data.path {tmp}/one.txt",
        "holds 0 tokens in 0 of 1 files, and one window takes 256. .* add files",
    ),
    (
        "--data.task text --data.path {tmp}/corpus --context.window 64 --batch-size 50",
        "holds 4 windows of 64 tokens, and 400 are needed; lower batch_size",
    ),
    (
        "--data.tokenizer {tmp}/none",
        "data.tokenizer '{tmp}/none' does not exist: name a tokenizer.json, its folder, or",
    ),
    ("--data.tokenizer {tmp}/one.txt", "data.tokenizer '{tmp}/one.txt' cannot be read: "),
    ("recall --data.tokenizer {tmp}/none", "data.tokenizer is of text: set data.task to text or stdlib, got 'recall'"),
    ("--data.split-by folder", "data.split_by folder is of a folder of text: set data.task text, got 'stdlib'"),
    ("recall --context.window 100", "recall needs context.window as a multiple of block_size 8, got 100"),
    ("recall --context.horizon 8", "context.horizon must be block_size - query = 6, got 8"),
    ("recall --base.vocab-size 1", "recall needs 7 blocks that differ .* raise base.vocab_size or"),
    ("recall --base-run {tmp}/none", "{tmp}/none holds no run (config.json is missing): name the folder of a run"),
    (
        "recall --base-run {tmp}/base --base.layers 1",
        "base of base_run {tmp}/base is .*layers=2.*layers=1.*: use the same",
    ),
    (
        "recall --base-run {tmp}/base --gist.layers 1",
        "gist of base_run {tmp}/base is .*layers=0.*layers=1.*: use the same",
    ),
    (
        "recall --base-run {tmp}/base --context.block-size 16 --context.horizon 14",
        "context.block_size of base_run {tmp}/base is 8, this run has 16: use the same",
    ),
    ("recall --base-run {tmp}/base", "{tmp}/base has no checkpoint: let it finish its pretraining first"),
    ("recall --start-from {tmp}/base", "{tmp}/base has no checkpoint: let it finish its pretraining first"),
    ("recall --start-from {tmp}/none", "{tmp}/none holds no run (config.json is missing): name the folder of a run"),
    (
        "recall --start-from {tmp}/base --lens.layers 1",
        "lens of start_from {tmp}/base is .*layers=2.*layers=1.*: use the same",
    ),
    (
        "recall --start-from {tmp}/base --context.max-lod 2",
        "max_lod of start_from {tmp}/base is 1, this run has 2: use the same",
    ),
    ("nosuch", "no config .*nosuch.py; name a file, or one of: demo, notes, recall"),
    ("{tmp}/none.json", "no config {tmp}/none.json; name a file, or one of: demo, notes, recall"),
    ("{tmp}/torn.json", "{tmp}/torn.json is not JSON"),
    ("{tmp}/typo.json", "{tmp}/typo.json: unknown key stepps; known keys: adaptation, attention, base"),
    ("{tmp}/old.json", "{tmp}/old.json has format None, and this version of lensjax reads format 2: use the version"),
    ("{tmp}/empty.py", "{tmp}/empty.py must define CONFIG, a lensjax.runs.config.Config; got None"),
    ("{tmp}/dict.py", "{tmp}/dict.py must define CONFIG, a lensjax.runs.config.Config; got {'steps': 3}"),
    (
        "recall --output-dir {tmp}/base",
        "{tmp}/base is not empty: choose another --output-dir, or go on .* --resume {tmp}/base",
    ),
    ("recall --output-dir {tmp}/one.txt", "{tmp}/one.txt is not a folder: choose another --output-dir"),
    ("recall --output-dir {tmp}/one.txt/run", "Not a directory: '{tmp}/one.txt/run'"),
    ("--resume", "--resume takes a run folder and nothing else, got: --resume"),
    (
        "--resume {tmp}/base --steps 900",
        "--resume takes a run folder and nothing else, got: --resume {tmp}/base --steps",
    ),
    ("recall --resume {tmp}/base", "--resume takes a run folder and nothing else, got: recall --resume {tmp}/base"),
    ("--resume {tmp}/empty", "{tmp}/empty holds no run (config.json is missing): name the folder of a run"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """What the bad command lines name."""
    folder = tmp_path_factory.mktemp("bad")
    write_corpus(folder / "corpus")
    (folder / "empty").mkdir()
    run_folder.create_run(folder / "base", script.load_preset("recall"))
    (folder / "one.txt").write_text("text " * 200)
    (folder / "torn.json").write_text('{"steps": ')
    (folder / "typo.json").write_text('{"format": 2, "stepps": 3}')
    (folder / "old.json").write_text('{"steps": 3}')
    (folder / "empty.py").write_text("")
    (folder / "dict.py").write_text("CONFIG = {'steps': 3}")
    return folder


@pytest.mark.parametrize(("command", "message"), BAD_COMMANDS, ids=[command for command, _ in BAD_COMMANDS])
def test_bad_command_lines_are_refused_before_anything_is_written(bad_files, command, message, capsys, monkeypatch):
    def files():
        return {path: path.read_bytes() if path.is_file() else b"" for path in bad_files.rglob("*")}

    monkeypatch.setenv("COLUMNS", "400")
    # Whether there is room is asked before all of this, and takes a second: `tests/faults/test_values.py` does.
    monkeypatch.setattr(sizes, "require_room", lambda *args, **kwargs: None)
    monkeypatch.setattr(loop, "run_phase", lambda *args, **kwargs: pytest.fail("the run was started"))
    before = files()
    words = command.replace("{tmp}", str(bad_files)).split()
    if "--resume" not in words and "--output-dir" not in words:
        words += ["--output-dir", str(bad_files / "run")]
    with pytest.raises(SystemExit) as end:
        script.main(words)
    if isinstance(end.value.code, str):  # printed by Python, with exit status 1
        told = end.value.code
        assert re.fullmatch("error: [^\n]+", told)
    else:
        assert end.value.code == 2
        told = " ".join(capsys.readouterr().err.split())
    assert re.search(re.escape(message.replace("{tmp}", str(bad_files))).replace(r"\.\*", ".*"), told), told
    assert files() == before


def test_m1_m2_resume_takes_an_equals_sign_and_the_config_file(tmp_path):
    config = dataclasses.replace(Config(), output_dir=str(tmp_path / "run"))
    folder = run_folder.create_run(config.output_dir, config)
    for words in (
        [f"--resume={folder}"],
        ["--resume", str(folder / "config.json")],
        [f"--resume={folder}/config.json"],
        ["--resume", f"{folder}/"],
    ):
        assert script.parse(words) == (config, True)


@pytest.mark.parametrize("words", [["--resume="], ["--resume=a", "b"], ["--resume", "--resume"], ["a", "--resume=b"]])
def test_m1_resume_takes_one_folder(words):
    with pytest.raises(ValueError, match=r"^--resume (takes a run folder and nothing else|must name a file or folder)"):
        script.parse(words)


def test_m5_a_file_is_no_output_folder(capsys):
    with pytest.raises(SystemExit, match=r"^error: /dev/null is not a folder: choose another --output-dir$"):
        script.main(["recall", "--output-dir", "/dev/null"])


@pytest.mark.parametrize("words", [["--seed", "1", "recall"], ["--seed=1", "recall", "--steps", "300"]])
def test_m6_a_preset_that_comes_late_is_told_so(words):
    with pytest.raises(ValueError, match=r"^recall is no flag: a preset comes first, and alone; flags follow it$"):
        script.parse(words)


def test_a_python_without_the_packages_is_told_which_one_has_them():
    done = subprocess.run(
        [sys.executable, "-S", "-m", "experiments.train", "demo"], cwd=ROOT, env={}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "has no jax: use .venv/bin/python, which make venv makes, or pip install" in done.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_contexts_of_the_budgets_that_an_evaluation_takes_by_itself(name):
    geometry = script.load_preset(name).context.geometry
    for ratio in evaluate.Arguments(runs=()).budgets:
        assert geometry.length(geometry.history // ratio) > geometry.recent_tokens
