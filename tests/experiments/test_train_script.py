import dataclasses
import io
import json
import math
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments import train as script
from lensjax.models import build_models
from lensjax.runs import config as configs
from lensjax.runs.config import Config
from lensjax.runs.engine import loop
from lensjax.runs.store import checkpoint
from lensjax.runs.store import folder as run_folder
from lensjax.runs.store.log import read_rows
from lensjax.training.steps import online, preference, pretrain
from tests.runs import (
    TINY,
    Killed,
    all_saved_are_finite,
    cheap_programs,
    contents,
    hook_run,
    outcome,
    request_stop,
    run_script,
    saved_arrays,
    tiny_config,
    write_corpus,
)

PRESETS = sorted(path.stem for path in script.PRESETS.glob("*.py"))
SUMMARY_KEYS = {
    "nll_baseline",
    "nll_rollout_mean",
    "nll_rollout_best",
    "preference_agreement",
    "preference_agreement_lod_only",
    "preference_corr_mean",
    "preference_pair_count",
    "steps",
    "seconds",
    "seed",
}


# Presets and the command line


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_configs(name):
    preset = script.load_preset(name)
    assert isinstance(preset, Config)
    assert configs.from_json(configs.to_json(preset)) == preset
    assert script.parse([name]) == (preset, False)
    assert script.load_preset(str(script.PRESETS / f"{name}.py")) == preset
    build_models(preset)


def test_presets_write_to_folders_of_their_own():
    assert {"demo", "recall"} <= set(PRESETS)
    assert len({script.load_preset(name).output_dir for name in PRESETS}) == len(PRESETS)


def test_flags_change_single_fields():
    config, resume = script.parse(["recall", "--seed", "3", "--hyper.kl-weight", "0.5", "--trainable", "gist", "lens"])
    expected = configs.replace(
        script.load_preset("recall"), **{"seed": 3, "hyper.kl_weight": 0.5, "trainable": ("gist", "lens")}
    )
    assert (config, resume) == (expected, False)
    assert script.parse([]) == (Config(), False)
    assert script.parse(["--data.max-files", "5"])[0] == configs.replace(Config(), **{"data.max_files": 5})


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
    flags = {name.replace("_", "-") for name in run_folder._flat(Config())}
    assert flags <= set(re.findall(r"--([a-z0-9.-]+)", shown))


# Every row: a command line in which {tmp} is a folder, and what the one message must say.
BAD_COMMANDS = [
    ("--sede 1", "Unrecognized options: --sede"),
    ("recall demo", "Unrecognized options: demo"),
    ("--steps ten", "invalid literal for int() with base 10: 'ten'"),
    ("--dtype float16", "invalid choice 'float16' for argument '--dtype'. Expected one of ('float32', 'bfloat16')"),
    (
        "--data.task web",
        "invalid choice 'web' for argument '--data.task'. Expected one of ('stdlib', 'text', 'recall', 'tracking')",
    ),
    (
        "--trainable head",
        "invalid choice 'head' for argument '--trainable'. Expected one of ('base', 'gist', 'lens', 'hyper')",
    ),
    ("--trainable lens lens", "trainable names a part twice: ('lens', 'lens')"),
    ("--steps 10", "steps must be above optimizer.warmup_steps 20, got 10"),
    ("--batch-size 0", "batch_size must be at least 1, got 0"),
    ("--hyper.learning-rate -1", "above 0, got -1.0"),
    ("--hyper.learning-rate nan", "above 0, got nan"),
    ("--hyper.context-end 0.05", "context_end asks for 11 entries, .* the nearest reachable lengths are 14 and 21"),
    ("--context.recent-tokens 0", "recent_tokens must be at least 1, got 0"),
    (
        "--context.window 40",
        "window must hold at least one block, the recent tokens and the horizon: expected at least 48, got 40",
    ),
    ("--base.vocab-size 100", "text is read as bytes: base.vocab_size must be at least 256, got 100"),
    ("--base.dim 60", "base.dim must be a multiple of 2 * heads = 8 (rotary pairs), got 60"),
    ("--steps 0 --base-run {tmp}/base", "steps is 0 and base_run is '{tmp}/base': .* raise steps or drop base_run"),
    ("--base-run a --init b", "base_run 'a' and init 'b' both give a base model: name one of them"),
    ("--data.task text", "data.path must name a folder or a glob when data.task is text, got none"),
    ("--data.path {tmp}", "data.path is read only when data.task is text: set --data.task text, got 'stdlib'"),
    ("--data.task text --data.path {tmp}/empty", "no file with text in it under {tmp}/empty"),
    ("--data.task text --data.path {tmp}/none", "'{tmp}/none' does not exist; expected a folder, a file or a glob"),
    ("--data.task text --data.path {tmp}/one.txt", "holds 0 bytes in 0 files, and one window takes 256. .* add files"),
    (
        "--data.task text --data.path {tmp}/corpus --context.window 64 --batch-size 50",
        "holds 4 windows of 64 tokens, and 400 are needed; lower batch_size, eval_batches or context.window",
    ),
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
    ("recall --init {tmp}/base", "{tmp}/base has no checkpoint: let it finish its pretraining first"),
    ("recall --init {tmp}/none", "{tmp}/none holds no run (config.json is missing): name the folder of a run"),
    ("recall --init {tmp}/base --lens.layers 1", "lens of init {tmp}/base is .*layers=2.*layers=1.*: use the same"),
    ("recall --init {tmp}/base --context.max-lod 2", "max_lod of init {tmp}/base is 1, this run has 2: use the same"),
    ("nosuch", "no config .*nosuch.py; name a file, or one of: demo, recall"),
    ("{tmp}/none.json", "no config {tmp}/none.json; name a file, or one of: demo, recall"),
    ("{tmp}/torn.json", "{tmp}/torn.json is not JSON"),
    ("{tmp}/typo.json", "{tmp}/typo.json: unknown key stepps; known keys: adaptation, base, base_run"),
    ("{tmp}/empty.py", "{tmp}/empty.py must define CONFIG, a lensjax.runs.config.Config; got None"),
    ("{tmp}/dict.py", "{tmp}/dict.py must define CONFIG, a lensjax.runs.config.Config; got {'steps': 3}"),
    (
        "recall --output-dir {tmp}/base",
        "{tmp}/base is not empty: choose another --output-dir, or go on .* --resume {tmp}/base",
    ),
    ("recall --output-dir {tmp}/one.txt", "{tmp}/one.txt is not empty: choose another --output-dir"),
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
    (folder / "typo.json").write_text('{"stepps": 3}')
    (folder / "empty.py").write_text("")
    (folder / "dict.py").write_text("CONFIG = {'steps': 3}")
    return folder


@pytest.mark.parametrize(("command", "message"), BAD_COMMANDS, ids=[command for command, _ in BAD_COMMANDS])
def test_bad_command_lines_are_refused_before_anything_is_written(bad_files, command, message, capsys, monkeypatch):
    def files():
        return {path: path.read_bytes() if path.is_file() else b"" for path in bad_files.rglob("*")}

    monkeypatch.setenv("COLUMNS", "400")
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


# A run whose steps cost next to nothing: what the script itself does


@pytest.fixture(scope="module")
def cheap():
    with cheap_programs():
        yield


def start(config, **kwargs):
    return script.run(config, console=Console(file=io.StringIO()), **kwargs)


def go_on(folder):
    config, resume = script.parse(["--resume", str(folder)])
    return start(config, resume=resume)


OWN_EDITS = {"online.steps": 5}


@pytest.fixture(scope="module")
def whole(cheap, tmp_path_factory):
    """The folder of a run through all phases that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    start(tiny_config(folder, **OWN_EDITS))
    return folder


# Where a run is interrupted, one time after the other: place, phase and step (see `hook_run`).
KILLS = [
    ("step", "pretrain", 1),  # before the first checkpoint
    ("in save", "pretrain", 2),
    ("saved", "pretrain", 4),  # between the phases
    ("step", "lens", 1),  # before the second phase has a checkpoint
    ("step", "lens", 4),
    ("saved", "lens", 5),
    ("step", "online", 1),
    ("in save", "online", 4),
    ("saved", "online", 5),  # all done but for the summary
]
STOPS = [("step", "pretrain", 3), ("in save", "pretrain", 4), ("step", "lens", 1), ("step", "online", 5)]


@pytest.mark.parametrize(("kind", "places"), [("killed", KILLS), ("stopped", STOPS)])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(whole, tmp_path, monkeypatch, kind, places):
    pending = list(places)

    def hook(*at):
        if at in pending:
            pending.remove(at)
            if kind == "killed":
                raise Killed
            request_stop()

    hook_run(monkeypatch.setattr, hook)
    folder = tmp_path / "run"
    for attempt, (_, phase, step) in enumerate(places):
        with pytest.raises(Killed if kind == "killed" else loop.Interrupted) as end:
            go_on(folder) if attempt else start(tiny_config(folder, **OWN_EDITS))
        assert pending == places[attempt + 1 :] and not (folder / "summary.json").exists()
        if kind == "stopped":
            assert end.value.code == 143
            assert checkpoint.latest_step(folder / "checkpoints" / phase) == step
    go_on(folder)
    assert outcome(folder) == outcome(whole)


def test_resuming_a_finished_run_changes_nothing(whole):
    before = outcome(whole)
    go_on(whole)
    assert outcome(whole) == before


def test_another_seed_gives_another_run(whole, tmp_path):
    start(tiny_config(tmp_path / "run", seed=1, **OWN_EDITS))
    ours, others = outcome(whole)["saved"], outcome(tmp_path / "run")["saved"]
    for phase in ("pretrain", "lens", "online"):
        assert ours[phase].keys() == others[phase].keys()
        assert ours[phase]["key"] != others[phase]["key"]
        assert ours[phase]["position"] == others[phase]["position"]


def test_a_folder_in_use_is_never_written_to(whole):
    before = contents(whole)
    with pytest.raises(FileExistsError, match=r"is not empty: choose another --output-dir, or go on .* --resume"):
        start(tiny_config(whole))
    with pytest.raises(SystemExit, match="is not empty"):
        script.main([str(whole / "config.json")])
    assert contents(whole) == before


def test_a_base_run_is_taken_and_left_as_it_is(cheap, whole, tmp_path, monkeypatch):
    before = contents(whole)
    pending = [("step", "lens", 1), ("step", "lens", 3)]

    def hook(*at):
        if at in pending:
            pending.remove(at)
            raise Killed

    hook_run(monkeypatch.setattr, hook)
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        start(tiny_config(folder, seed=8, base_run=str(whole)))
    with pytest.raises(Killed):
        go_on(folder)
    go_on(folder)
    assert contents(whole) == before
    given, taken = saved_arrays(whole, "pretrain", 4), saved_arrays(folder, "lens", 5)
    names = {name for name in taken if name.startswith(("params/base/", "params/gist/"))}
    assert {name.split("/")[1] for name in names} == {"base", "gist"}
    assert all(taken[name] == given[name] for name in names)
    assert not (folder / "checkpoints" / "pretrain").exists()
    assert [row["step"] for row in read_rows(folder) if "loss" in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("changes", "phase"), [({}, "lens"), ({"steps": 0, **OWN_EDITS}, "online")])
def test_init_starts_from_the_models_of_another_run(cheap, whole, tmp_path, monkeypatch, changes, phase):
    before, given = contents(whole), saved_arrays(whole, "online", 5)
    started = []
    make = script.train.init_train_state

    def spy(*arguments, **keywords):
        state = make(*arguments, **keywords)
        started.append(jax.device_get(state))  # the run gives its buffers away
        return state

    monkeypatch.setattr(script.train, "init_train_state", spy)
    start(tiny_config(tmp_path / "run", seed=8, init=str(whole), **changes))
    leaves = jax.tree_util.tree_leaves_with_path(started[0].params)
    assert {path[0].key for path, _ in leaves} == {"base", "gist", "lens"}
    for path, leaf in leaves:
        name = "params/" + jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.tobytes() == given[name], name
    assert int(started[0].step) == 0 and contents(whole) == before
    assert {row["phase"] for row in read_rows(tmp_path / "run")} == {phase}


def test_a_patient_run_gives_its_best_models(cheap, tmp_path, monkeypatch):
    """What `cheap_programs` measures grows with every step: the first evaluation is the best one."""
    folder = tmp_path / "run"
    pending = [("saved", "pretrain", 2), ("saved", "lens", 2)]

    def hook(*at):
        if at in pending:
            pending.remove(at)
            raise Killed

    hook_run(monkeypatch.setattr, hook)
    config = tiny_config(folder, eval_steps=1, **{"stopping.patience": 1})
    with pytest.raises(Killed):
        start(config)
    with pytest.raises(Killed):
        go_on(folder)
    summary = go_on(folder)
    stops = {name: summary[name] for name in summary if name.endswith(("_stopped_at", "_kept_step"))}
    assert stops == {"pretrain_stopped_at": 2, "pretrain_kept_step": 1, "lens_stopped_at": 2, "lens_kept_step": 1}
    assert max(row["step"] for row in read_rows(folder)) == 2
    params = script.load_params(folder, build_models(config), ("base", "gist", "lens"))
    best = saved_arrays(folder, "lens", 1) | {
        name: value for name, value in saved_arrays(folder, "pretrain", 1).items() if name.startswith("params/")
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "params/" + jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.tobytes() == best[name], name


def test_init_needs_a_lensnet(whole, tmp_path):
    start(tiny_config(tmp_path / "base", steps=0))
    with pytest.raises(ValueError, match=r"base has no checkpoint of LensNet: let it train first \(steps above 0\)"):
        start(tiny_config(tmp_path / "run", init=str(tmp_path / "base")))
    assert not (tmp_path / "run").exists()


def test_steps_0_only_pretrains_and_serves_as_a_base_run(whole, tmp_path):
    summary = start(tiny_config(tmp_path / "base", steps=0))
    assert {row["phase"] for row in read_rows(tmp_path / "base")} == {"pretrain"}
    assert checkpoint.steps(tmp_path / "base" / "checkpoints" / "pretrain") == [2, 4]
    assert not (tmp_path / "base" / "checkpoints" / "lens").exists()
    assert summary["steps"] == 0 and "nll_full" in summary and "nll_policy" not in summary
    config = tiny_config(tmp_path / "run", base_run=str(tmp_path / "base"))
    base = script.load_start(config, build_models(config))
    assert base is not None
    expected = saved_arrays(whole, "pretrain", 4)
    leaves = jax.tree_util.tree_leaves_with_path(base)
    names = {"params/" + jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert names.keys() == {name for name in expected if name.startswith("params/")}
    assert all(leaf.tobytes() == expected[name] for name, leaf in names.items())


def test_undefined_values_are_strict_json(whole):
    summary = json.loads((whole / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["preference_corr_mean"] == "n/a"
    assert math.isfinite(summary["nll_policy"])


@pytest.mark.parametrize(
    ("phase", "step", "advice"),
    [
        ("pretrain", 4, "the last good checkpoint is {folder}/checkpoints/pretrain/2"),
        ("lens", 1, "there is no checkpoint of this phase yet"),
        ("online", 3, "the last good checkpoint is {folder}/checkpoints/online/2"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_command(cheap, tmp_path, monkeypatch, phase, step, advice):
    module, name = {
        "pretrain": (pretrain, "pretrain_step"),
        "lens": (preference, "train_step"),
        "online": (online, "online_step"),
    }[phase]
    good = getattr(module, name)

    def bad(state, batch, **kwargs):
        after, metrics = good(state, batch, **kwargs)
        is_bad = after.step >= step
        params = jax.tree.map(lambda leaf: jnp.where(is_bad, math.nan, leaf), after.params)
        loss = jnp.where(is_bad, math.nan, metrics["loss"])
        return dataclasses.replace(after, params=params), metrics | {"loss": loss}

    monkeypatch.setattr(module, name, bad)
    folder = tmp_path / "run"
    (tmp_path / "config.json").write_text(configs.to_json(tiny_config(folder, **OWN_EDITS)))
    with pytest.raises(SystemExit) as end:
        script.main([str(tmp_path / "config.json")])
    message = f"error: phase {phase}, step {step}: loss = nan; {advice.format(folder=folder)}"
    assert str(end.value.code).startswith(message)
    assert all_saved_are_finite(folder)
    assert not (folder / "summary.json").exists()


# The real thing, in a process of its own


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs that the processes of all tests share."""
    return tmp_path_factory.getbasetemp() / "compiled"


@pytest.fixture(scope="module")
def real(tmp_path_factory, cache):
    """A finished run on text files through all phases, with a curriculum, and what it printed."""
    folder = tmp_path_factory.mktemp("real")
    curriculum = {"hyper.context_start": 0.95, "optimizer.curriculum_steps": 3}
    config = tiny_config(folder / "run", write_corpus(folder / "corpus"), **curriculum, **OWN_EDITS)
    (folder / "config.json").write_text(configs.to_json(config))
    done = run_script(folder / "config.json", cache=cache, JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_LOG_COMPILES="1")
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_the_folder_of_a_run(real):
    folder, done = real
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "environment.json", "metrics.jsonl", "summary.json"),
        *("tensorboard", "checkpoints", "training.png", "maps.png"),
    }
    for name in ("training.png", "maps.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and (folder / name).stat().st_size > 10_000
    assert configs.load(folder / "config.json") == configs.load(folder.parent / "config.json")
    assert {path.name for path in (folder / "tensorboard").iterdir()} == {"pretrain", "lens", "online"}
    assert checkpoint.steps(folder / "checkpoints" / "pretrain") == [2, 4]
    for phase in ("lens", "online"):
        assert checkpoint.steps(folder / "checkpoints" / phase) == [2, 4, 5]
    assert all_saved_are_finite(folder)
    assert done.stdout.splitlines()[0] == f"run folder {folder}, {jax.default_backend()}, seed 0"
    assert done.stdout.splitlines()[-1] == f"pictures, metrics and checkpoints are in {folder}"


def test_the_summary_of_a_run(real):
    folder, _ = real
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["task"], summary["split"], summary["steps"], summary["seed"]) == ("text", "test", 5, 0)
    assert summary["sequences"] == TINY.batch_size * TINY.eval_batches
    numbers = [value for name, value in summary.items() if name not in ("task", "split", "preference_corr_mean")]
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
    # A model that knows nothing loses ln(256) nats per token, and this one has hardly been trained.
    for name in ("nll_full", "nll_baseline", "nll_rollout_mean", "nll_rollout_best", "nll_policy"):
        assert abs(summary[name] - math.log(256)) < 0.3
    assert summary["nll_rollout_best"] <= summary["nll_rollout_mean"]
    assert 0 < summary["preference_pair_count"] <= summary["sequences"] * TINY.objective.max_pairs
    assert 0 < summary["training_seconds"] < summary["seconds"]


def test_the_metrics_of_a_run(real):
    rows = read_rows(real[0])
    steps = [(row["phase"], row["step"], "eval" if "loss" not in row else "train") for row in rows]
    both = [("train",), ("train",), ("train", "eval"), ("train",), ("train", "eval")]
    assert steps == [("pretrain", step, kind) for step, kinds in enumerate(both[:3], 1) for kind in kinds] + [
        ("pretrain", 4, "train"),
        ("pretrain", 4, "eval"),
        *((phase, step, kind) for phase in ("lens", "online") for step, kinds in enumerate(both, 1) for kind in kinds),
    ]
    lengths = [row["context_length"] for row in rows if "context_length" in row]
    assert lengths == [27, 24, 21, 21, 21]


def test_each_program_compiles_once_in_a_whole_run(real):
    compiled = re.findall(r"Compiling jit\((\w+)\)", real[1].stderr)
    programs = ("pretrain_step", "pretrain_eval_step", "train_step", "online_step", "eval_step", "variant_maps")
    assert {name: compiled.count(name) for name in programs} == dict.fromkeys(programs, 1)


def test_a_base_model_that_is_not_trained_stays_frozen(real):
    before, after = saved_arrays(real[0], "pretrain", 4), saved_arrays(real[0], "online", 5)
    earlier = saved_arrays(real[0], "lens", 2)
    frozen = {name for name in after if name.startswith(("params/base/", "params/gist/"))}
    lens = {name for name in after if name.startswith("params/lens/")}
    assert frozen and all(after[name] == before[name] for name in frozen)
    assert lens and all(after[name] != earlier[name] for name in lens)


@pytest.mark.slow
def test_a_base_run_gives_its_base_model(real, cache, tmp_path):
    folder, _ = real
    before = outcome(folder)
    words = [folder / "config.json", "--output-dir", tmp_path / "run", "--base-run", folder, "--seed", "1"]
    done = run_script(*words, cache=cache, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 0, done.stderr
    assert outcome(folder) == before
    given, taken = saved_arrays(folder, "pretrain", 4), saved_arrays(tmp_path / "run", "lens", 5)
    frozen = {name for name in taken if name.startswith(("params/base/", "params/gist/"))}
    assert frozen and all(taken[name] == given[name] for name in frozen)
    assert not (tmp_path / "run" / "checkpoints" / "pretrain").exists()


@pytest.mark.slow
def test_a_learning_rate_that_explodes_stops_the_command(real, cache, tmp_path):
    folder, _ = real
    words = [folder / "config.json", "--output-dir", tmp_path / "run", "--base-run", folder]
    words += ["--hyper.learning-rate", "1e38"]
    done = run_script(*words, cache=cache, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 1
    assert re.search(r"^error: phase lens, step \d: .* = (nan|inf|-inf)[,;].* checkpoint", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


# Both kinds of signals in one run; the kill comes in the last save of the first phase.
SIGNALS = [("in save", "pretrain", 4, signal.SIGKILL), ("step", "lens", 3, signal.SIGTERM)]


@pytest.mark.slow
def test_a_run_that_gets_signals_ends_as_if_nothing_had_happened(cache, tmp_path):
    """Real programs, in processes that a signal ends."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    config = tiny_config(tmp_path / "whole")
    (tmp_path / "config.json").write_text(configs.to_json(config))
    whole = run_script(tmp_path / "config.json", cache=cache, **quick)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "run"
    words: list[str | Path] = [tmp_path / "config.json", "--output-dir", folder]
    for place, phase, step, number in SIGNALS:
        interrupt = (place, phase, step, int(number))
        done = run_script(*words, cache=cache, interrupt=interrupt, **quick)
        if number == signal.SIGTERM:
            assert done.returncode == 143, done.stderr
            assert f"stopped at {phase} step {step}; go on with --resume {folder}\n" in done.stdout
            assert (folder / "checkpoints" / phase / str(step)).is_dir()
        else:
            assert done.returncode == -signal.SIGKILL, done.stderr
        words = ["--resume", folder]
    done = run_script(*words, cache=cache, **quick)
    assert done.returncode == 0, done.stderr
    assert outcome(folder) == outcome(tmp_path / "whole")
