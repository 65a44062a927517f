"""One whole run: pretrain a base model or take one, train LensNet, measure it, and leave everything in its folder."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from rich.console import Console

from lensjax._numerics import may_be_nan
from lensjax.evaluation import held_out
from lensjax.models import HyperLoRAModel, Models, Params, hyperlora
from lensjax.plots.maps import VariantMap
from lensjax.runs import gists, load, pretrained, results, sizes
from lensjax.runs.config import STEPS, Config
from lensjax.runs.data import batches as data
from lensjax.runs.engine import devices, loop, numerics
from lensjax.runs.folder import Claim, open_run, require_unused
from lensjax.runs.inputs import Inputs
from lensjax.runs.load import Trained
from lensjax.runs.store import paths, run_folder
from lensjax.runs.store.log import RunLogger
from lensjax.training.steps import adaptation, distill, online, preference, pretrain
from lensjax.training.steps.gists import init_gists_state
from lensjax.training.steps.train_state import TrainState, init_train_state
from lensjax.training.steps.update import Learner, all_parts

Batches = list[dict[str, Array]]
Tree = TypeVar("Tree")
Learning = tuple[TrainState, dict[str, Params]]
"""What LensNet's training has come to: its state, and the parts that are frozen."""
Report = Callable[[TrainState, dict[str, Params], Batches], dict[str, float]]

# Streams of randomness that must not touch: each is folded into the run's seed.
PRETRAIN_STREAM, LENS_STREAM, ONLINE_STREAM, DISTILL_STREAM, GISTS_STREAM, EVALUATION_SEED = 0, 1, 2, 3, 4, 2026
ONLINE_SEED, DISTILL_SEED, GISTS_SEED = 2**32, 2**33, 2**34
"""Above all seeds of the other phases' data."""
HEADLINE = (
    *("nll_policy", "nll_policy_adapted", "nll_baseline", "nll_rollout_mean"),
    *("mc/preference_agreement", "hit_rate"),
)
"""Held-out metrics to show while LensNet is trained."""


@numerics.fixed()
def fit(config: Config, *, resume: bool = False, console: Console | None = None) -> Trained:
    """Trains a run from its first phase to its last, and writes its folder (extras `train` and `plots`).

    Args:
      config: the run.
      resume: go on with the run in `config.output_dir`, from its newest checkpoint.
      console: shows the progress; None for the terminal.

    Returns:
      What it has come to, with the summary of its measurements.

    Raises:
      ValueError: the data or the run that it starts from do not fit, memory does not hold it, or what it is to go on
        with is another run. Nothing was written then.
      FileExistsError: the folder is not empty, and `resume` is False.
      BlockingIOError: another process works in that folder.
    """
    started = time.perf_counter()
    console = console or Console(quiet=not devices.is_first())
    config = pretrained.resolve(paths.resolved(config))
    if resume:
        require_unused(config.output_dir)
    models = config.build_models()
    hypernet, mesh = config.build_hypernet(models), _make_mesh(config)
    sizes.require_room(config, models, hypernet, devices=mesh.size)
    # Reads all data first: an empty corpus must not leave a folder behind.
    inputs = Inputs(config, mesh, seeds=_data_seeds(config), held_out_seed=EVALUATION_SEED)
    start = load.load_start(config, models, own=Path(config.output_dir) if resume else None)
    with open_run(
        config,
        STEPS,
        resume=resume,
        console=console,
        data=data.digest(config),
        weights=lambda: load.digest(config, start),
        attention=config.choose_attention(),
    ) as (folder, logger, claim):
        job = _Job(config, models, hypernet, mesh, console, claim)
        params, seconds, summary = start or {}, 0.0, dict[str, Any]()
        if start is None:
            report = _pretrain_evaluator(job)
            params, seconds = _pretrain(job, inputs, report, folder, logger)
            summary |= report(params, inputs.test)
        if config.trains_lens:
            (state, frozen), more, measured = _train(job, inputs, params, folder, logger)
            seconds, summary, params = seconds + more, summary | measured, {**frozen, **state.params}
        if config.stopping.patience is not None:
            summary |= results.stops(folder)
        whole = time.perf_counter() - started
        summary = results.summary(config, summary, training_seconds=seconds, seconds=whole)
        claim.require()
        devices.in_first(lambda: run_folder.write_summary(folder, summary))
        maps: list[VariantMap] = []
        if config.trains_lens:
            key = jax.random.key(EVALUATION_SEED)
            maps = results.variant_maps(state, inputs.test[0], key, frozen, config=config, models=models)
        devices.in_first(lambda: results.draw(folder, maps, logger))
    results.print_summary(console, folder, summary)
    return Trained(config, models, params, summary, folder)


@dataclass(frozen=True)
class _Job:
    """What all phases of a run share."""

    config: Config
    models: Models
    hypernet: HyperLoRAModel | None
    mesh: Mesh
    console: Console
    claim: Claim

    def run(
        self, phase: loop.Phase, state: Any, frozen: dict[str, Params], rows: Any, folder: Path, logger: RunLogger
    ) -> tuple[Any, float]:
        """One phase: the state after it, and its seconds. What it does not train is in the folder before it starts."""
        self.claim.require()
        load.keep_frozen(folder, self.config, frozen, identity=self.claim.identity)
        return loop.run_phase(
            phase,
            state,
            rows,
            frozen=frozen,
            run_dir=folder,
            config=self.config,
            mesh=self.mesh,
            logger=logger,
            console=self.console,
            claim=self.claim,
        )

    def place(self, tree: Tree) -> Tree:
        """A state or parameters where a phase would put them: one program then measures before, in and after it."""
        return devices.place(tree, self.mesh, split=self.config.shard_parameters)


def _make_mesh(config: Config) -> Mesh:
    batch_sizes = {"batch_size": config.batch_size}
    if config.pretrains:
        batch_sizes["pretrain.batch_size"] = config.pretrain.batch_size
    return devices.make_mesh(batch_sizes)


def _data_seeds(config: Config) -> dict[str, int]:
    """Of the training data of each phase."""
    return {
        "pretrain": 2 * config.seed + PRETRAIN_STREAM,
        "gists": GISTS_SEED + config.seed,
        "distill": DISTILL_SEED + config.seed,
        "lens": 2 * config.seed + LENS_STREAM,
        "online": ONLINE_SEED + config.seed,
    }


def stream(config: Config, number: int) -> Array:
    """The PRNG key of one of a run's streams of randomness."""
    return jax.random.fold_in(jax.random.key(config.seed), number)


def _pretrain(
    job: _Job,
    inputs: Inputs,
    report: Callable[[dict[str, Params], Batches], dict[str, float]],
    folder: Path,
    logger: RunLogger,
) -> tuple[dict[str, Params], float]:
    config, models = job.config, job.models
    settings, recipe = config.pretrain, config.recipe
    phase = loop.Phase(
        name="pretrain",
        steps=settings.steps,
        batch_size=settings.batch_size,
        step=functools.partial(pretrain.pretrain_step, recipe=recipe, settings=settings, models=models),
        evaluate=lambda state: report({**frozen, **state.params}, inputs.validation),
        headline=("nll_full", "nll_full_tail"),
        monitor="nll_full",
    )
    key = stream(config, PRETRAIN_STREAM)
    state: Learner
    state, frozen = job.place(pretrain.init_pretrain_state(key, recipe=recipe, settings=settings, models=models))
    state, seconds = job.run(phase, state, frozen, inputs.training["pretrain"], folder, logger)
    return {**frozen, **state.params}, seconds


def _train(
    job: _Job, inputs: Inputs, params: dict[str, Params], folder: Path, logger: RunLogger
) -> tuple[Learning, float, dict[str, float]]:
    """LensNet's phases: the last state, their seconds, and what is measured of it on the test split."""
    config, report, seconds = job.config, evaluator(job.config, job.models, job.hypernet), 0.0
    key, recipe, models = stream(config, LENS_STREAM), config.recipe, job.models
    if job.hypernet is None:
        learning = init_train_state(key, recipe=recipe, models=models, params=params)
    else:
        learning = adaptation.init_adaptation_state(
            key, recipe=recipe, models=models, hypernet=job.hypernet, params=params
        )
    if "gist" not in params:
        own = gists.centred(config, models, _known(learning), seed=EVALUATION_SEED)
        learning = _with(learning, "gist", own["gist"])
    learning = job.place(learning)
    stages = (
        (config.gists.steps, _by_next_tokens),
        (config.distill.steps, _by_teacher),
        (config.steps, _by_preferences),
        (config.online.steps, _by_episodes),
    )
    for steps, train_by in stages:
        if steps:
            learning, more = train_by(job, learning, inputs, report, folder, logger)
            seconds += more
    return learning, seconds, report(*learning, inputs.test)


def _known(learning: Learning) -> dict[str, Params]:
    """Parameters of base model, GistNet and LensNet."""
    params = all_parts(*learning)
    return {name: params[name] for name in ("base", "gist", "lens")}


def _with(learning: Learning, name: str, part: Params) -> Learning:
    """The same with other parameters of one part, whether it is trained by preferences or not."""
    state, frozen = learning
    if name in frozen:
        return state, {**frozen, name: part}
    return replace(state, params={**state.params, name: part}), frozen


def _by_next_tokens(
    job: _Job, learning: Learning, inputs: Inputs, report: Report, folder: Path, logger: RunLogger
) -> tuple[Learning, float]:
    """Gives a state a GistNet that was trained through the base model, and a base model that was adapted to it."""
    key, known, rank = stream(job.config, GISTS_STREAM), _known(learning), job.config.gists.lora_rank
    start, frozen = init_gists_state(key, recipe=job.config.recipe, params=known, lora_rank=rank)
    phase = gists.phase(job.config, job.models, known["base"], inputs.validation, jax.random.key(EVALUATION_SEED))
    after, seconds = job.run(phase, start, frozen, inputs.training["gists"], folder, logger)
    if rank:
        learning = _with(learning, "base", jax.jit(hyperlora.adapt)(known["base"], after.params["lora"]))
    return _with(learning, "gist", after.params["gist"]), seconds


def _by_teacher(
    job: _Job, learning: Learning, inputs: Inputs, report: Report, folder: Path, logger: RunLogger
) -> tuple[Learning, float]:
    """Gives a state a LensNet that has learned from a teacher; it is the anchor's, too."""
    config, models, settings = job.config, job.models, job.config.distill

    def with_lens(after: Learner) -> Learning:
        state, frozen = _with(learning, "lens", after.params["lens"])
        anchor = None if state.anchor is None else jax.tree.map(jnp.copy, after.params["lens"])
        return replace(state, anchor=anchor), frozen

    phase = loop.Phase(
        name="distill",
        steps=settings.steps,
        batch_size=config.batch_size,
        step=functools.partial(distill.distill_step, recipe=config.recipe, settings=settings, models=models),
        evaluate=lambda after: report(*with_lens(after), inputs.validation),
        headline=HEADLINE,
        monitor="nll_policy",
    )
    start, frozen = distill.init_distill_state(
        stream(config, DISTILL_STREAM), recipe=config.recipe, params=_known(learning)
    )
    after, seconds = job.run(phase, start, frozen, inputs.training["distill"], folder, logger)
    return with_lens(after), seconds


def _by_preferences(
    job: _Job, learning: Learning, inputs: Inputs, report: Report, folder: Path, logger: RunLogger
) -> tuple[Learning, float]:
    config, recipe, models, (state, frozen) = job.config, job.config.recipe, job.models, learning
    step: Callable[..., Any] = functools.partial(preference.train_step, recipe=recipe, models=models)
    if job.hypernet is not None:
        step = functools.partial(adaptation.adaptation_step, recipe=recipe, models=models, hypernet=job.hypernet)
    phase = loop.Phase(
        name="lens",
        steps=config.steps,
        batch_size=config.batch_size,
        step=step,
        evaluate=lambda state: report(state, frozen, inputs.validation),
        headline=HEADLINE,
        monitor="nll_policy",
    )
    state, seconds = job.run(phase, state, frozen, inputs.training["lens"], folder, logger)
    return (state, frozen), seconds


def _by_episodes(
    job: _Job, learning: Learning, inputs: Inputs, report: Report, folder: Path, logger: RunLogger
) -> tuple[Learning, float]:
    """Goes on with the LensNet of a state; what is measured is measured as before."""
    config, models, settings = job.config, job.models, job.config.online

    def with_lens(after: online.OnlineState) -> Learning:
        return _with(learning, "lens", after.params["lens"])

    phase = loop.Phase(
        name="online",
        steps=settings.steps,
        batch_size=config.batch_size,
        step=functools.partial(online.online_step, recipe=config.recipe, settings=settings, models=models),
        evaluate=lambda after: report(*with_lens(after), inputs.validation),
        headline=HEADLINE,
        monitor="nll_policy",
    )
    start, frozen = online.init_online_state(
        stream(config, ONLINE_STREAM), recipe=config.recipe, settings=settings, models=models, params=_known(learning)
    )
    after, seconds = job.run(phase, start, frozen, inputs.training["online"], folder, logger)
    return with_lens(after), seconds


def evaluator(config: Config, models: Models, hypernet: HyperLoRAModel | None = None) -> Report:
    """Held-out metrics of a state, always on the same rollouts of a batch; compiled once for all splits."""
    measure: Callable[..., Any] = functools.partial(held_out.eval_step, recipe=config.recipe, models=models)
    if hypernet is not None:
        measure = functools.partial(
            held_out.adaptation_eval_step, recipe=config.recipe, models=models, hypernet=hypernet
        )
    step = may_be_nan(jax.jit(measure))
    keys = [jax.random.fold_in(jax.random.key(EVALUATION_SEED), i) for i in range(config.eval_batches)]
    return lambda state, frozen, batches: held_out.mean_over_batches(
        step(key, state, batch, frozen) for batch, key in zip(batches, keys, strict=True)
    )


def _pretrain_evaluator(job: _Job) -> Callable[[dict[str, Params], Batches], dict[str, float]]:
    horizon, models = job.config.context.horizon, job.models
    step = jax.jit(functools.partial(held_out.pretrain_eval_step, horizon=horizon, models=models))
    return lambda params, batches: held_out.mean_over_batches(step(params, batch) for batch in batches)
