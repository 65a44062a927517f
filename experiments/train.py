"""Pretrains a base model (or takes one), trains LensNet by preferences, by its own edits, or by both, and measures it.

    python -m experiments.train demo                              the standard library of this Python
    python -m experiments.train recall --seed 1                   the task with known answers
    python -m experiments.train --data.task text --data.path 'notes/**/*.md' --output-dir runs/notes
    python -m experiments.train --resume runs/notes               go on with an interrupted run
    python -m experiments.train recall --init runs/a --seed 2     start from the models of another run
    python -m experiments.train recall --init runs/a --steps 0 --online.steps 200     and go on with its own edits alone

Several processes, started with the same words, train together where `JAX_COORDINATOR_ADDRESS` asks for it (BUILD.md).

The first argument names a file of `experiments/presets/` (or is the path of such a file, or of a run's
`config.json`); flags change single fields. Everything that a run makes is in its own folder.
"""

import functools
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
from jax import Array
from jax.sharding import Mesh
from rich.console import Console

from experiments import command
from lensjax.evaluation import held_out
from lensjax.models import Models, Params, build_models
from lensjax.plots import curves
from lensjax.plots.maps import VariantMap, lod_maps
from lensjax.runs import config as configs
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.engine import devices, loop
from lensjax.runs.store import checkpoint
from lensjax.runs.store import folder as run_folder
from lensjax.runs.store import log as run_logging
from lensjax.training.steps import online, preference, pretrain

Batches = list[dict[str, Array]]
Kind = TypeVar("Kind")

PRESETS = Path(__file__).parent / "presets"
# Streams of randomness that must not touch: each is folded into the run's seed.
PRETRAIN_STREAM, LENS_STREAM, ONLINE_STREAM, EVALUATION_SEED = 0, 1, 2, 2026
MAPPED_SEQUENCES = 4
ONLINE_SEED = 2**32
"""Above all seeds of the other phases' data."""
HEADLINE = (
    "nll_policy",
    "nll_policy_adapted",
    "nll_baseline",
    "nll_rollout_mean",
    "mc/preference_agreement",
    "hit_rate",
)
"""Held-out metrics to show while LensNet is trained."""


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    command.execute(arguments, parse, run)


def parse(words: list[str]) -> tuple[Config, bool]:
    """Reads the command line: a config, and whether it is that of a run to go on with."""
    return command.parse(words, Config(), load_preset=load_preset, description=__doc__)


def load_preset(name: str) -> Config:
    """The config of a name in `experiments/presets/`, of a Python file with `CONFIG`, or of a JSON file."""
    path = Path(name) if Path(name).suffix in (".py", ".json") else PRESETS / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.py")))
        raise FileNotFoundError(f"no config {path}; name a file, or one of: {known}")
    if path.suffix == ".json":
        return configs.load(path)
    return load_object(path, "CONFIG", Config)


def load_object(path: Path, name: str, kind: type[Kind]) -> Kind:
    """What a Python file defines under a name.

    Raises:
      ValueError: it defines nothing of that kind.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not isinstance(found, kind):
        raise ValueError(f"{path} must define {name}, a {kind.__module__}.{kind.__qualname__}; got {found!r}")
    return found


def run(config: Config, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """One whole run; returns what `summary.json` holds."""
    started = time.perf_counter()
    console = console or Console(quiet=not devices.is_first())
    models = build_models(config)
    batch_sizes = {"batch_size": config.batch_size}
    if config.base_run is None and config.init is None:
        batch_sizes["pretrain.batch_size"] = config.pretrain.batch_size
    mesh = devices.make_mesh(batch_sizes)
    inputs = _Inputs(config, mesh)  # reads all data first: an empty corpus must not leave a folder behind
    taken = load_start(config, models)
    with command.open_run(config, run_logging.PHASES, resume=resume, console=console) as (folder, logger):
        surroundings = {"run_dir": folder, "config": config, "mesh": mesh, "logger": logger, "console": console}
        params, seconds = taken or {}, 0.0
        summary: dict[str, Any] = {}
        maps: list[VariantMap] = []
        if taken is None:
            pretrain_report = _pretrain_evaluator(config, models)
            params, seconds = _pretrain(config, models, inputs, pretrain_report, surroundings)
            summary |= pretrain_report(params, inputs.test)
        if config.steps or config.online.steps:
            report = _evaluator(config, models)
            state = preference.init_train_state(
                stream(config, LENS_STREAM), config=config, models=models, params=params
            )
            for steps, train_by in ((config.steps, _by_preferences), (config.online.steps, _by_episodes)):
                if steps:
                    state, phase_seconds = train_by(config, models, state, inputs, report, surroundings)
                    seconds += phase_seconds
            summary |= report(state, inputs.test)
            maps = _variant_maps(state, config, models, inputs)
    if config.stopping.patience is not None:
        summary |= _stops(folder)
    summary = _summary(config, summary, training_seconds=seconds, seconds=time.perf_counter() - started)
    devices.in_first(lambda: _write_results(folder, summary, maps))
    _print_summary(console, folder, summary)
    return summary


class _Inputs:
    """All data of a run, checked and in memory before the run's folder is made."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        share = (jax.process_index(), jax.process_count())
        batches = functools.partial(
            data.fixed_batches,
            config,
            batch_size=config.batch_size,
            count=config.eval_batches,
            seed=EVALUATION_SEED,
            share=share,
        )
        self.validation, self.test = (
            jax.tree.map(lambda rows: devices.share_out(rows, mesh), batches(split)) for split in ("validation", "test")
        )
        self.pretrain = data.make_iterator(
            config,
            "train",
            seed=2 * config.seed + PRETRAIN_STREAM,
            batch_size=config.pretrain.batch_size,
            pretraining=True,
            share=share,
        )
        self.lens, self.online = (
            data.make_iterator(config, "train", seed=seed, batch_size=config.batch_size, share=share)
            for seed in (2 * config.seed + LENS_STREAM, ONLINE_SEED + config.seed)
        )


def stream(config: Config, number: int) -> Array:
    """The PRNG key of one of a run's streams of randomness."""
    return jax.random.fold_in(jax.random.key(config.seed), number)


def _pretrain(
    config: Config,
    models: Models,
    inputs: _Inputs,
    report: Callable[[dict[str, Params], Batches], dict[str, float]],
    surroundings: dict[str, Any],
) -> tuple[dict[str, Params], float]:
    phase = loop.Phase(
        name="pretrain",
        steps=config.pretrain.steps,
        batch_size=config.pretrain.batch_size,
        step=functools.partial(pretrain.pretrain_step, config=config, models=models),
        evaluate=lambda state: report(state.params, inputs.validation),
        headline=("nll_full", "nll_full_tail"),
        monitor="nll_full",
    )
    state = pretrain.init_pretrain_state(stream(config, PRETRAIN_STREAM), config=config, models=models)
    state, seconds = loop.run_phase(phase, state, inputs.pretrain, **surroundings)
    return state.params, seconds


def _by_preferences(
    config: Config,
    models: Models,
    state: preference.TrainState,
    inputs: _Inputs,
    report: Callable[[preference.TrainState, Batches], dict[str, float]],
    surroundings: dict[str, Any],
) -> tuple[preference.TrainState, float]:
    phase = loop.Phase(
        name="lens",
        steps=config.steps,
        batch_size=config.batch_size,
        step=functools.partial(preference.train_step, config=config, models=models),
        evaluate=lambda state: report(state, inputs.validation),
        headline=HEADLINE,
        monitor="nll_policy",
    )
    return loop.run_phase(phase, state, inputs.lens, **surroundings)


def _by_episodes(
    config: Config,
    models: Models,
    state: preference.TrainState,
    inputs: _Inputs,
    report: Callable[[preference.TrainState, Batches], dict[str, float]],
    surroundings: dict[str, Any],
) -> tuple[preference.TrainState, float]:
    """Goes on with the LensNet of a state; what is measured is measured as before."""
    state = devices.place(state, surroundings["mesh"], split=config.shard_parameters)

    def with_lens(found: online.OnlineState) -> preference.TrainState:
        return replace(state, params={**state.params, "lens": found.params["lens"]})

    phase = loop.Phase(
        name="online",
        steps=config.online.steps,
        batch_size=config.batch_size,
        step=functools.partial(online.online_step, config=config, models=models),
        evaluate=lambda found: report(with_lens(found), inputs.validation),
        headline=HEADLINE,
        monitor="nll_policy",
    )
    start = online.init_online_state(stream(config, ONLINE_STREAM), config=config, params=state.params)
    found, seconds = loop.run_phase(phase, start, inputs.online, **surroundings)
    return with_lens(found), seconds


def _evaluator(config: Config, models: Models) -> Callable[[preference.TrainState, Batches], dict[str, float]]:
    """Held-out metrics of a state, always on the same rollouts of a batch; compiled once for all splits."""
    step = jax.jit(functools.partial(held_out.eval_step, config=config, models=models))
    keys = [jax.random.fold_in(jax.random.key(EVALUATION_SEED), i) for i in range(config.eval_batches)]
    return lambda state, batches: held_out.mean_over_batches(
        step(state, batch, key) for batch, key in zip(batches, keys, strict=True)
    )


def _pretrain_evaluator(config: Config, models: Models) -> Callable[[dict[str, Params], Batches], dict[str, float]]:
    step = jax.jit(functools.partial(held_out.pretrain_eval_step, config=config, models=models))
    return lambda params, batches: held_out.mean_over_batches(step(params, batch) for batch in batches)


def load_start(config: Config, models: Models) -> dict[str, Params] | None:
    """What the run that `config.base_run` or `config.init` names gives this one; None where neither does.

    Raises:
      FileNotFoundError: there is no run in that folder.
      ValueError: its models have another shape, or it has no checkpoint of them.
    """
    key = "base_run" if config.init is None else "init"
    source = getattr(config, key)
    if source is None:
        return None
    folder = Path(source)
    stored = configs.load(run_folder.config_file(folder))
    same = [
        ("base", stored.base, config.base),
        ("gist", stored.gist, config.gist),
        ("context.block_size", stored.context.block_size, config.context.block_size),
    ]
    if key == "init":
        same += [
            ("lens", stored.lens, config.lens),
            ("context.max_lod", stored.context.max_lod, config.context.max_lod),
        ]
    for name, theirs, ours in same:
        if theirs != ours:
            raise ValueError(f"{name} of {key} {folder} is {theirs}, this run has {ours}: use the same")
    return load_params(folder, models, ("base", "gist") if key == "base_run" else ("base", "gist", "lens"))


def load_params(
    folder: Path, models: Models, parts: Sequence[Literal["base", "gist", "lens", "hyper"]]
) -> dict[str, Params]:
    """Parameters that a run has come to: of its newest checkpoint, or with patience of its best.

    Raises:
      ValueError: there is none, or LensNet is asked for and was not trained yet.
    """
    phase, _ = command.restore_point(folder, run_logging.PHASES)
    directory = loop.checkpoint_dir(folder, phase)
    step = loop.kept_step(directory)
    if step is None:
        raise ValueError(f"{folder} has no checkpoint: let it finish its pretraining first")
    if "lens" in parts and phase == "pretrain":
        raise ValueError(f"{folder} has no checkpoint of LensNet: let it train first (steps above 0)")
    like = {name: jax.eval_shape(getattr(models, name).init, jax.random.key(0)) for name in parts}
    return {
        name: checkpoint.restore_subtree(directory, step, part, path=("params", name)) for name, part in like.items()
    }


def _variant_maps(state: preference.TrainState, config: Config, models: Models, inputs: _Inputs) -> list[VariantMap]:
    """What the baseline, the rollouts and the policy show of a few held-out sequences."""
    compute = jax.jit(functools.partial(held_out.variant_maps, config=config, models=models))
    batch = {name: value[:MAPPED_SEQUENCES] for name, value in devices.to_host(inputs.test[0]).items()}
    arrays = devices.to_host(compute(state, batch["tokens"], jax.random.key(EVALUATION_SEED)))
    labels = ["recency", *(f"rollout {i + 1}" for i in range(config.context.rollouts)), "LensNet's pick"]
    answers = batch["answers"].tolist() if "answers" in batch else []
    return [
        VariantMap(
            title=f"held-out sequence {i + 1}",
            cuts=arrays["cuts"][i],
            scores=arrays["scores"][i],
            nll=arrays["nll"][i],
            labels=labels,
            recent_tokens=config.context.recent_tokens,
            block_size=config.context.block_size,
            answer=tuple((first, first + config.context.block_size) for first in answers[i]) if answers else (),
        )
        for i in range(len(batch["tokens"]))
    ]


def _write_results(folder: Path, summary: dict[str, Any], maps: list[VariantMap]) -> None:
    """The pictures and the summary of a finished run."""
    if maps:
        lod_maps(maps, folder / "maps.png")
    curves.training_curves(run_logging.read_rows(folder), folder / "training.png")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _summary(config: Config, report: Mapping[str, float], *, training_seconds: float, seconds: float) -> dict[str, Any]:
    """Held-out test metrics under short names, and what they came from."""
    short = {name.removeprefix("mc/"): value for name, value in report.items()}
    undefined = {name: run_logging.UNDEFINED for name, value in short.items() if math.isnan(value)}
    end = config.context.geometry.length_of_fraction(config.hyper.context_end)
    return {
        "task": config.data.task,
        "split": "test",
        "sequences": config.batch_size * config.eval_batches,
        "steps": config.steps,
        "seed": config.seed,
        "context_length": end,
        "compression": config.context.history / end,
        "seconds": round(seconds, 1),
        "training_seconds": round(training_seconds, 1),
        **short,
        **undefined,
    }


def _stops(folder: Path) -> dict[str, int]:
    """Where the phases of a run stopped, and the steps whose parameters they kept."""
    found: dict[str, int] = {}
    for phase in run_logging.PHASES:
        directory = loop.checkpoint_dir(folder, phase)
        last, kept = checkpoint.latest_step(directory), loop.kept_step(directory)
        if last is not None and kept is not None:
            found |= {f"{phase}_stopped_at": last, f"{phase}_kept_step": kept}
    return found


def _print_summary(console: Console, folder: Path, summary: dict[str, Any]) -> None:
    shown = [
        *("nll_full", "nll_policy", "nll_baseline", "nll_rollout_mean", "nll_rollout_best", "nll_oracle", "hit_rate"),
        *("preference_agreement", "preference_agreement_lod_only", "preference_corr_mean", "seconds"),
    ]
    for name in shown:
        if isinstance(summary.get(name), float):
            console.out(f"  {name:<32}{summary[name]:>9.3f}", highlight=False)
    console.out(f"pictures, metrics and checkpoints are in {folder}", highlight=False)


if __name__ == "__main__":
    main()
