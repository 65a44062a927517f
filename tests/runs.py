"""Whole runs that are as small as they can be, what came out of them, and interruptions at a chosen place."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lensjax._settings import replace
from lensjax.evaluation import held_out
from lensjax.models import build_models
from lensjax.models.base_lm import BaseConfig
from lensjax.models.gistnet import GistConfig
from lensjax.models.lensnet import LensConfig
from lensjax.plots import curves
from lensjax.runs import config as run_config
from lensjax.runs import load, results, sizes
from lensjax.runs.config import PHASES, Config
from lensjax.runs.data import splits
from lensjax.runs.data.task import DataConfig
from lensjax.runs.engine import loop
from lensjax.runs.fit import fit
from lensjax.runs.store import arrays, checkpoint, config_file, run_folder
from lensjax.runs.store.log import read_rows
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.recipe import Part
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps import distill, gists, online, preference, pretrain
from lensjax.training.steps.pretrain import PretrainConfig

ROOT = Path(__file__).parents[1]

# Checkpoints at 2 and 4 of pretraining, at 2, 4 and 5 of LensNet's.
TINY = Config(
    steps=5,
    batch_size=2,
    logging_steps=1,
    eval_steps=3,
    eval_batches=2,
    save_steps=2,
    base=BaseConfig(dim=8, layers=1, heads=2, kv_heads=1, mlp_dim=8, conv_width=2),
    gist=GistConfig(heads=2),
    lens=LensConfig(dim=8, layers=1, heads=2, mlp_dim=8),
    context=ContextConfig(window=32, block_size=4, max_lod=1, horizon=2, recent_tokens=4, rollouts=2),
    optimizer=OptimizerConfig(warmup_steps=1),
    data=DataConfig(task="recall"),
    pretrain=PretrainConfig(steps=4, batch_size=2),
)


def tiny_config(output_dir: Path, corpus: Path | None = None, **changes: Any) -> Config:
    """The recall task, or the text files of `corpus`."""
    config = replace(TINY, output_dir=str(output_dir), **changes)
    return config if corpus is None else replace(config, data=DataConfig(task="text", path=str(corpus)))


def write_corpus(folder: Path) -> Path:
    """A folder of small text files, some of which are in each split."""
    folder.mkdir()
    missing = {"train": 6, "validation": 2, "test": 2}
    for name in (f"{i}.txt" for i in range(1000)):
        split = splits.split_of(name)
        if missing[split]:
            missing[split] -= 1
            (folder / name).write_text(f"{name} is in {split}. " * 6)
    assert not any(missing.values())
    return folder


OWN_EDITS = {"online.steps": 5}
ALL = {"gists.steps": 5, "distill.steps": 5, **OWN_EDITS}
"""What makes a run of every phase."""


def start(config: Config, **keywords: Any) -> dict[str, Any]:
    """A whole run, told to nobody; its summary."""
    return fit(config, console=Console(file=io.StringIO()), **keywords).summary


def go_on(folder: Path) -> dict[str, Any]:
    """The run in a folder from its newest checkpoint on, as `--resume` does."""
    config = config_file.load(run_folder.config_path(folder), Config)
    return start(replace(config, output_dir=str(folder)), resume=True)


class Killed(BaseException):
    """Raised where a process would be killed: nothing catches it, so the files are left as they are."""


def request_stop() -> None:
    """Sends SIGTERM to this process; without a handler it would be the end of all tests."""
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "nothing handles SIGTERM"
    signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def cheap_programs() -> Iterator[None]:
    """Replaces what the scripts compile: a step moves one array, by an amount that tells the order of all batches."""

    def step(state: Any, batch: Any, frozen: Any, *, part: str, **static: Any) -> Any:
        noise = jax.random.normal(jax.random.fold_in(state.key, state.step))
        shift = jnp.mean(batch["tokens"].astype(jnp.float32)) + noise
        part = part if part in state.params else min(state.params)
        (first, *others), structure = jax.tree.flatten(state.params[part])
        params = {**state.params, part: jax.tree.unflatten(structure, [0.5 * first + shift, *others])}
        after = dataclasses.replace(state, step=state.step + 1, params=params)
        return after, {"loss": shift, "lr": jnp.float32(0.1)}

    def eval_step(key: jax.Array, state: Any, batch: Any, frozen: Any, **static: Any) -> Any:
        value = jnp.sum(jax.tree.leaves({**frozen, **state.params}["lens"])[0]) + jax.random.normal(key)
        return dict.fromkeys(_MEASURED, value) | {"mc/preference_corr_mean": jnp.float32(jnp.nan)}

    def gists_eval_step(key: jax.Array, params: Any, batch: Any, **static: Any) -> Any:
        value = jnp.sum(jax.tree.leaves(params["gist"])[0]) + jax.random.normal(key)
        return dict.fromkeys(("loss", "gists/nll", "gists/divergence"), value)

    def pretrain_eval_step(params: Any, batch: Any, **static: Any) -> Any:
        return dict.fromkeys(("nll_full", "nll_full_tail"), jnp.sum(jax.tree.leaves(params["base"])[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "pretrain_step", functools.partial(step, part="base"))
        patch.setattr(gists, "gists_step", functools.partial(step, part="gist"))
        patch.setattr(gists, "gists_eval_step", gists_eval_step)
        patch.setattr(distill, "distill_step", functools.partial(step, part="lens"))
        patch.setattr(preference, "train_step", functools.partial(step, part="lens"))
        patch.setattr(online, "online_step", functools.partial(step, part="lens"))
        patch.setattr(held_out, "eval_step", eval_step)
        patch.setattr(held_out, "pretrain_eval_step", pretrain_eval_step)
        patch.setattr(run_config, "build_models", functools.cache(build_models))
        # What the steps would need: it traces them, for nothing.
        patch.setattr(sizes, "require_room", lambda *arguments, **static: None)
        patch.setattr(results, "variant_maps", lambda *arguments, **static: [])
        patch.setattr(curves, "training_curves", lambda rows, path: None)
        yield


_MEASURED = (
    *("nll_policy", "nll_baseline", "nll_rollout_mean", "nll_oracle", "hit_rate", "hit_rate_random"),
    *("mc/preference_agreement", "mc/preference_agreement_lod_only"),
)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file under a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that must be the same to the bit however often a run was interrupted."""
    rows = [{name: row[name] for name in row if not name.startswith("perf/")} for row in read_rows(run_dir)]
    summary = json.loads((run_dir / "summary.json").read_text())
    kept = {name: summary[name] for name in summary if not name.endswith("seconds")}
    last = {phase: checkpoint.latest_step(run_folder.checkpoint_dir(run_dir, phase)) for phase in PHASES}
    saved = {phase: saved_arrays(run_dir, phase, step) for phase, step in last.items() if step is not None}
    return {"rows": rows, "summary": kept, "last": last, "saved": saved}


def saved_arrays(run_dir: Path, phase: str, step: int) -> dict[str, Any]:
    """Bytes of every array of a checkpoint by name, and the position in the data."""
    folder = run_folder.checkpoint_dir(run_dir, phase) / str(step)
    raw = arrays.read(folder / "arrays")
    position = json.loads((folder / "manifest.json").read_text())["data_state"]["batches"]
    return {name: array.tobytes() for name, array in raw.items()} | {"position": position}


def bits(tree: Any) -> dict[str, bytes]:
    """Bytes of every leaf by its path."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in pairs}


def saved_part(folder: Path, part: Part) -> dict[str, bytes]:
    """Bytes of a part of a run, wherever its folder has it."""
    config = config_file.load(run_folder.config_path(folder), Config)
    return bits(load.load_params(folder, config, config.build_models(), (part,))[part])


def assert_saved(tree: Any, saved: dict[str, Any], part: str) -> None:
    """Whether a part's parameters are those of `saved_arrays`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = f"params/{part}/" + jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.tobytes() == saved[name], name


def all_saved_are_finite(run_dir: Path) -> bool:
    """Whether no checkpoint holds a NaN or an infinity; there must be at least one."""
    folders = [path for path in (run_dir / "checkpoints").glob("*/*") if path.name.isdecimal()]
    trees = [arrays.read(folder / "arrays") for folder in folders]
    return bool(trees) and all(jnp.isfinite(array).all() for tree in trees for array in tree.values())


Hook = Callable[[str, str, int], None]


def hook_run(setattr_: Callable[[Any, str, Any], None], hook: Hook) -> None:
    """Calls `hook(place, phase, step)` after the update ("step"), within a save ("in save") and after it ("saved")."""
    take, save, checksums = loop._Recorder.take, checkpoint.save, checkpoint._checksums

    def hooked_take(self: Any, step: int, *args: Any, **kwargs: Any) -> None:
        take(self, step, *args, **kwargs)
        hook("step", self._phase, step)

    def hooked_save(directory: Path, step: int, *args: Any, **kwargs: Any) -> None:
        save(directory, step, *args, **kwargs)
        hook("saved", directory.name, step)

    def hooked_checksums(folder: Path) -> dict[str, str]:
        if folder.name.startswith("."):  # all is written, nothing is final
            hook("in save", folder.parent.name, int(folder.name.rpartition("-")[2]))
        return checksums(folder)

    setattr_(loop._Recorder, "take", hooked_take)
    setattr_(checkpoint, "save", hooked_save)
    setattr_(checkpoint, "_checksums", hooked_checksums)


_INTERRUPTED = """
import os, sys
from importlib import import_module
from tests.runs import hook_run
script, place, phase, step, number = sys.argv[1:6]
hook_run(setattr, lambda *at: at == (place, phase, int(step)) and os.kill(os.getpid(), int(number)))
import_module(f"experiments.{script}").main(sys.argv[6:])
"""


def run_script(
    *arguments: str | Path,
    cache: Path,
    script: str = "train",
    interrupt: tuple[str, str, int, int] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a script of experiments/ in a process of its own, as strictly as the tests run.

    Args:
      arguments: its command line.
      cache: folder in which compiled programs are kept for the next call.
      script: name of the script.
      interrupt: place, phase and step (see `hook_run`) at which the process gets a signal, and the signal's number.
      environment: variables to set.
    """
    start = ["-m", f"experiments.{script}"] if interrupt is None else ["-c", _INTERRUPTED, script, *map(str, interrupt)]
    strict = {"PYTHONWARNINGS": "error", "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **strict, **cached, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
