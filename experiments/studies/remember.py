"""A stream longer than the context, and a question at its end: can a policy learn what to keep from one late reward?

    python -m experiments.train tracking --distill.steps 0 --output-dir runs/remember/base
    python -m experiments.studies.remember --base-run runs/remember/base --output-dir runs/remember/late

The stream is variable tracking with a few chains, whose statements all come before the last `supo.window` ones: who
keeps the last statements alone has nothing to answer with, and who keeps the first ones has little. What is dropped is
gone. Every seed trains a LensNet on the late reward (`late`), and one on per-step rewards (`steps`), which need a
measurement after every refocus step. Both are measured on the same test streams, dropping as many statements as they
may in each step, the lowest scored first, beside policies that learn nothing and one that knows the answer. Leaves
`remember.csv`, `report.md` and what was measured of each policy, in `policies`.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

from experiments import command
from experiments.tables import write_csv
from lensjax import _settings
from lensjax._settings import BatchSize, PositiveInt, Seed, settings
from lensjax.evaluation import rivals
from lensjax.evaluation.statistics import Estimate, estimate
from lensjax.models import Models, Params
from lensjax.models.decision import split
from lensjax.runs.config import Config
from lensjax.runs.data.splits import Split
from lensjax.runs.data.tracking import TrackingSource
from lensjax.runs.fit import EVALUATION_SEED
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file, files, run_folder
from lensjax.training.scoring import Batch
from lensjax.training.steps import supo, trajectories
from lensjax.training.steps.supo import SupoConfig

LAST = "last"
"""What all are compared with."""
FIXED = (LAST, "first", "random", "answer")
"""Policies that look at nothing: the last statements, the first, any, and those that will be asked for."""


@settings()
class Arguments:
    """What to train and to measure."""

    base_run: Path
    """Run folder on tracking, whose base model and GistNet are used as they are."""
    output_dir: Path
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    arms: tuple[Literal["late", "steps"], ...] = ("late", "steps")
    chains: PositiveInt = 4
    """Chains in a stream, one of which will be asked for."""
    batch_size: BatchSize = 4
    """Streams in a training batch [B]."""
    examples: BatchSize = 512
    """Test streams."""
    supo: SupoConfig = dataclasses.field(default_factory=SupoConfig)
    resume: bool = False
    """Go on with an interrupted study: policies that were measured are not trained again."""


class Measured(NamedTuple):
    """How one policy did on each of Q test streams."""

    nll: np.ndarray
    """float32[Q]: mean loss of the answer, nats per token."""
    right: np.ndarray
    """bool[Q]: whether the base model's answer is the right one, all tokens of it."""
    kept: np.ndarray
    """float32[Q]: share of the statements needed that were there in the end."""


def main(words: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    command.program(remember, Arguments, words, description=__doc__)


def remember(arguments: Arguments) -> list[dict[str, Any]]:
    """Trains and measures all policies, and returns the rows of `remember.csv`, one a policy and seed."""
    if len(set(arguments.seeds)) < max(2, len(arguments.seeds)):
        raise ValueError(f"seeds must name two or more different seeds, got {arguments.seeds}")
    folder, console = arguments.output_dir, Console()
    config, models, params = _start(arguments)
    command.check_free(folder, resume=arguments.resume)
    _open(arguments)
    test = _streams(arguments, config, "test", EVALUATION_SEED, range(arguments.examples))
    measure = jax.jit(functools.partial(_measure, models=models, config=config, settings=arguments.supo))
    found: dict[str, list[Measured]] = {}
    rows: list[dict[str, Any]] = []

    def result(name: str, seed: int) -> dict[str, Any]:
        """What `policies` holds of a policy: its measurements, and what a step of its training took."""
        key = jax.random.key(seed)
        own, fixed, passes, seconds = params | {"lens": models.lens.init(jax.random.fold_in(key, 0))}, None, 0, 0.0
        if name in FIXED:
            fixed = _worth(name, test, config, jax.random.fold_in(key, 1))
        elif name in arguments.arms:
            chosen = dataclasses.replace(arguments.supo, reward=name)
            own["lens"], seconds = _train(arguments, chosen, config, models, own, seed)
            measured = 1 if name == "late" else chosen.refocus_steps + 1
            passes = arguments.batch_size * chosen.trajectories * measured
        values = {part: array.tolist() for part, array in zip(Measured._fields, measure(own, test, fixed), strict=True)}
        return {**values, "passes_per_step": passes, "seconds_per_step": seconds / arguments.supo.steps}

    for seed in arguments.seeds:
        for name in (*FIXED, "untrained", *arguments.arms):
            file = folder / "policies" / f"{name}-{seed}.json"
            if not file.is_file():
                files.write_text(file, json.dumps(result(name, seed)) + "\n")
            stored = json.loads(file.read_text())
            one = Measured(*(np.asarray(stored.pop(part)) for part in Measured._fields))
            found.setdefault(name, []).append(one)
            means = {"nll": one.nll.mean(), "accuracy": one.right.mean(), "kept": one.kept.mean()}
            known = {"policy": name, "information": rivals.information(name)}
            rows.append({**known, "seed": seed, **{key: float(mean) for key, mean in means.items()}, **stored})
            console.out(", ".join(f"{key} {value}" for key, value in rows[-1].items()), highlight=False)
    write_csv(rows, folder / "remember.csv")
    files.write_text(folder / "report.md", _report(arguments, found, rows))
    return rows


def _open(arguments: Arguments) -> None:
    """Makes the study's folder, or checks that it was begun with the same arguments."""
    folder = arguments.output_dir
    given = {
        name: value for name, value in dataclasses.asdict(arguments).items() if name not in ("output_dir", "resume")
    }
    text, file = json.dumps(given, indent=2, default=str) + "\n", folder / "config.json"
    if file.is_file() and (before := file.read_text()) != text:
        changed = sorted(name for name, value in json.loads(text).items() if json.loads(before).get(name) != value)
        raise ValueError(
            f"{folder} was begun with other values of {', '.join(changed)}: choose another --output-dir, or take the "
            "change back"
        )
    (folder / "policies").mkdir(parents=True, exist_ok=True)
    files.write_text(file, text)


def _start(arguments: Arguments) -> tuple[Config, Models, dict[str, Params]]:
    """The base run's configuration, with a LensNet that sees the context alone, and its models."""
    stored = config_file.load(run_folder.config_path(arguments.base_run), Config)
    if stored.data.task != "tracking":
        raise ValueError(f"base_run {arguments.base_run} is of task {stored.data.task}: expected one of tracking")
    # A fresh LensNet shall not know that what is recent matters, which is wrong here.
    config = _settings.replace(stored, **{"lens.reads": "nothing", "lens.recency": False})
    trajectories.check(config.geometry, arguments.supo)
    if arguments.supo.steps <= config.optimizer.warmup_steps:
        raise ValueError(
            f"supo.steps must be above optimizer.warmup_steps {config.optimizer.warmup_steps} of base_run, got "
            f"{arguments.supo.steps}"
        )
    models = config.build_models()
    _source(arguments, config, "test", 0)
    return config, models, load_params(arguments.base_run, stored, models, ("base", "gist"))


def _source(arguments: Arguments, config: Config, split: Split, seed: int) -> TrackingSource:
    return TrackingSource(
        config.context,
        config.base.vocab_size,
        split,
        seed,
        config.data.hops,
        chains=arguments.chains,
        quiet=arguments.supo.window,
    )


def _streams(arguments: Arguments, config: Config, split: Split, seed: int, indices: range) -> Batch:
    """`tokens` int32[B, T] and `answers` int32[B, hops] of some examples."""
    source = _source(arguments, config, split, seed)
    examples = [source[index] for index in indices]
    return {name: jnp.stack([jnp.asarray(one[name]) for one in examples]) for name in ("tokens", "answers")}


def _train(
    arguments: Arguments, chosen: SupoConfig, config: Config, models: Models, params: dict[str, Params], seed: int
) -> tuple[Params, float]:
    """LensNet after training, and the seconds that it took, the first step (and its compilation) left out."""
    key = jax.random.fold_in(jax.random.key(seed), 2)
    state, frozen = supo.init_supo_state(key, recipe=config.recipe, params=params)
    step: Callable[..., Any] = jax.jit(
        functools.partial(supo.supo_step, recipe=config.recipe, settings=chosen, models=models), donate_argnums=0
    )
    size, began = arguments.batch_size, time.monotonic()
    for index in range(chosen.steps):
        batch = _streams(arguments, config, "train", seed, range(index * size, (index + 1) * size))
        state, report = step(state, {"tokens": batch["tokens"]}, frozen)
        if not np.isfinite(report["loss"]):
            raise FloatingPointError(f"the loss of {chosen.reward}, seed {seed}, is not finite at step {index + 1}")
        began = time.monotonic() if index == 0 else began
    return state.params["lens"], (time.monotonic() - began) * chosen.steps / max(chosen.steps - 1, 1)


def _worth(name: str, test: Batch, config: Config, key: Array) -> Array:
    """What each token of each stream is worth to a policy that looks at nothing: float32[Q, C]."""
    shape, size = (len(test["tokens"]), config.context.history), config.context.block_size
    block = jnp.arange(shape[1], dtype=jnp.int32) // size
    if name == "random":
        return jnp.repeat(jax.random.uniform(key, (shape[0], -(-shape[1] // size))), size, axis=1)[:, : shape[1]]
    if name == "answer":
        needed = (block[None, None] == test["answers"][..., None] // size).any(axis=1)
        return needed.astype(jnp.float32)
    age = block.astype(jnp.float32)
    return jnp.broadcast_to(age if name == LAST else -age, shape)


def _measure(
    params: dict[str, Params],
    test: Batch,
    fixed: Array | None,
    *,
    models: Models,
    config: Config,
    settings: SupoConfig,
) -> tuple[Array, Array, Array]:
    """LensNet, or a policy of fixed worth float32[Q, C], on all test streams, one after the other."""

    def one(tokens: Array, answers: Array, worth: Array | None) -> tuple[Array, Array, Array]:
        def look_up(context: Any, _: Any) -> Array:
            assert worth is not None
            return jnp.take(worth, context.start, mode="clip")

        window = split(tokens, horizon=config.context.horizon)
        score = None if worth is None else look_up
        late = dataclasses.replace(settings, reward="late")
        played = trajectories.run(models, params, window, None, config.geometry, settings=late, score=score)
        kept = played.held[-1][answers // config.context.block_size].astype(jnp.float32)
        return played.nll[-1], jnp.all(played.matches), jnp.mean(kept)

    return jax.lax.map(lambda example: one(*example), (test["tokens"], test["answers"], fixed), batch_size=64)


def _report(arguments: Arguments, found: dict[str, list[Measured]], rows: list[dict[str, Any]]) -> str:
    """The table: means over seeds and streams, intervals of the differences to the last statements."""
    last = np.stack([one.nll for one in found[LAST]])
    lines = [
        "# What to keep of a stream, learned from one late reward",
        "",
        f"`python -m experiments.studies.remember --base-run {arguments.base_run} --output-dir {arguments.output_dir} "
        f"--seeds {' '.join(map(str, arguments.seeds))} --chains {arguments.chains} --batch-size "
        f"{arguments.batch_size} --examples {arguments.examples} --supo.steps {arguments.supo.steps} --supo.window "
        f"{arguments.supo.window} --supo.refocus-steps {arguments.supo.refocus_steps} --supo.draws "
        f"{arguments.supo.draws}`",
        "",
        f"{len(arguments.seeds)} seeds, {arguments.examples} test streams; nats per token of the answer, paired 95 % "
        "intervals over seeds and streams.",
        "",
        "| policy | information | answered | needed statements kept | nats per token "
        f"| minus `{LAST}` | base-model passes a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, measured in found.items():
        nll = np.stack([one.nll for one in measured])
        right, kept = (np.stack([one[place] for one in measured]).mean() for place in (1, 2))
        difference = "" if name == LAST else _shown(estimate(nll - last))
        passes = next(row["passes_per_step"] for row in rows if row["policy"] == name)
        known = rivals.information(name)
        cells = (f"`{name}`", known, f"{right:.3f}", f"{kept:.3f}", f"{nll.mean():.3f}", difference, passes or "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _shown(one: Estimate) -> str:
    return f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


if __name__ == "__main__":
    main()
