"""What gists are worth to a base model that was trained without them, beside leaving the same tokens out.

    python -m experiments.studies.gists --config smol --output-dir runs/gists
    python -m experiments.studies.gists --run runs/demo --steps 400 --seeds 0 1 2 --output-dir runs/demo-gists

At equal entries: the last tokens of a history and nothing else (recency), or fewer of them behind a gist of every
block before. Gists are the mean of a block, that mean at the norm of a token (about the mean embedding of text, or of
the vocabulary), the block's middle token, or what a GistNet makes of it that begins at the scaled mean and is trained
through the frozen base model (`training.steps.gists`). Two controls: the same tokens without the gists
(`recency_short`), and with the gists of another window (`gistnet_foreign`), which say nothing of this one. Losses are
those of the horizon, on held-out windows; intervals are paired. Writes `gists.csv` and `gists.json`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

from experiments import command
from experiments.studies.gists_table import TRAINED, UNTRAINED, Losses, Row, print_table, shorter, table
from experiments.tables import write_csv, write_json
from experiments.train import load_preset
from lensjax import _settings
from lensjax._settings import (
    BatchSize,
    Bound,
    Layers,
    NonNegative,
    Positive,
    PositiveInt,
    Seed,
    at_least,
    require,
    settings,
)
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.tree import TreeState
from lensjax.context.working import Entries, WorkingContext
from lensjax.models import Models, Params, gistnet
from lensjax.models.decision import split
from lensjax.models.gistnet import GistConfig
from lensjax.runs import load, pretrained
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.fit import EVALUATION_SEED, LENS_STREAM, stream
from lensjax.runs.store import config_file, run_folder
from lensjax.training import nll
from lensjax.training.steps import gists
from lensjax.training.steps.gists import GistTrainingConfig

CENTRE_WINDOWS = 64
"""Windows to train on whose tokens give the centre of scaled gists."""


@settings()
class Arguments:
    """Whose base model, how much of it is read, and how GistNet is trained."""

    config: str = "smol"
    """Configuration that names a checkpoint or a base run."""
    run: Path | None = None
    """Run whose base model is taken, and its configuration, instead of `config`."""
    output_dir: Path = Path("runs/gists")
    path: str | None = None
    """Text, instead of that of the configuration."""
    cache: str | None = None
    """Where its token files are, likewise."""
    history: PositiveInt = 512
    horizon: PositiveInt = 32
    block_size: Annotated[int, at_least(2)] = 8
    recent_tokens: PositiveInt = 8
    """Last tokens that stay in full in every cut that GistNet is trained on."""
    ratios: tuple[PositiveInt, ...] = (2, 4)
    """Tokens of the history to one entry."""
    windows: Annotated[int, Bound(2, 2**20)] = 48
    """Held-out windows."""
    split: Literal["validation", "test"] = "test"
    """Where these are from; settings are chosen on validation."""
    steps: PositiveInt = 80
    """Training steps of GistNet."""
    batch_size: BatchSize = 2
    seeds: tuple[Seed, ...] = (0,)
    """Of GistNet and of the windows that it is trained on."""
    layers: Layers = 1
    """Transformer layers of GistNet."""
    learning_rate: Positive = 1e-4
    kl_weight: NonNegative = 1.0
    at_once: PositiveInt | None = None
    """Sequences of a batch whose activations are held at a time."""

    def _check(self) -> None:
        for name in ("seeds", "ratios"):
            values = getattr(self, name)
            require(0 < len(values) == len(set(values)), f"{name} must name one or more different ones, got {values}")


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(run, Arguments, words, description=__doc__)


def run(arguments: Arguments) -> list[Row]:
    """The whole study; returns the rows of `gists.csv`."""
    console, began = Console(), time.perf_counter()
    command.check_free(arguments.output_dir, resume=False)
    config = study_config(arguments)
    models, geometry = config.build_models(), gists.gist_geometry(config.recipe)
    lengths = {ratio: geometry.length(geometry.history // ratio, name=f"ratio {ratio}") for ratio in arguments.ratios}
    batches = data.fixed_batches(config, arguments.split, batch_size=1, count=arguments.windows, seed=EVALUATION_SEED)
    windows = _tokens(batches)
    text = _tokens(data.fixed_batches(config, "train", batch_size=1, count=CENTRE_WINDOWS, seed=EVALUATION_SEED))
    readers = {seed: _batches(config, arguments, seed) for seed in arguments.seeds}
    base = load_base(arguments, config, models)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    centres = centres_of(models, base, text)

    found = _stacked(_per_window(untrained, models, geometry, lengths, base, centres, windows))
    training, taught = dict[str, list[Row]](), list[dict[str, np.ndarray]]()
    for seed, reader in readers.items():
        key = stream(dataclasses.replace(config, seed=seed), LENS_STREAM)
        params = {"base": base, "gist": gistnet.centred(models.gist.init(key), centres[0][None])}
        gist, training[str(seed)] = train(
            arguments, config, models, params, reader, jax.random.fold_in(key, 1), console
        )
        taught.append(_stacked(_per_window(of_gistnet, models, geometry, lengths, base, gist, windows)))
    found |= {name: np.stack([one[name] for one in taught]) for name in taught[0]}
    rows = table(found, geometry, lengths)
    write_csv(rows, arguments.output_dir / "gists.csv")
    report = {
        "arguments": {name: _plain(value) for name, value in dataclasses.asdict(arguments).items()},
        "sha256": config.checkpoint.sha256,
        "parameters": {name: _size(part) for name, part in (("base", base), ("gist", gist))},
        "seconds": round(time.perf_counter() - began, 1),
        "training": training,
        "table": rows,
        "losses": {name: values.tolist() for name, values in found.items()},
    }
    write_json(report, arguments.output_dir / "gists.json")
    print_table(console, rows)
    return rows


def study_config(arguments: Arguments) -> Config:
    """The configuration with the study's windows and GistNet; reads no weights."""
    if arguments.run is not None:
        config = config_file.load(run_folder.config_path(arguments.run), Config)
    else:
        config = load_preset(arguments.config)
        require(
            not config.pretrains, f"{arguments.config} names no base model: set checkpoint.path in it, or pass --run"
        )
        config = pretrained.resolve(config)
    longest = 1 / min(arguments.ratios)
    changes: dict[str, Any] = {
        "context.window": arguments.history + arguments.horizon,
        "context.horizon": arguments.horizon,
        "context.block_size": arguments.block_size,
        "context.recent_tokens": arguments.recent_tokens,
        "context.max_lod": 1,
        "hyper.context_start": longest,
        "hyper.context_end": longest,
        "optimizer.name": "adamw",
        "optimizer.warmup_steps": min(10, arguments.steps // 4),
    }
    changes |= {"data.path": arguments.path} if arguments.path is not None else {}
    changes |= {"data.cache": arguments.cache} if arguments.cache is not None else {}
    gist = GistConfig(start="scaled", layers=arguments.layers, heads=config.gist.heads)
    return _settings.replace(config, gist=gist, **changes)


def load_base(arguments: Arguments, config: Config, models: Models) -> Params:
    """Parameters of the base model, on the device."""
    if arguments.run is not None:
        return load.load_params(arguments.run, config, models, ("base",))["base"]
    if config.checkpoint.path is not None:
        return pretrained.load_base(config)
    return load.load_params(Path(str(config.base_run or config.start_from)), config, models, ("base",))["base"]


def centres_of(models: Models, base: Params, text: np.ndarray) -> tuple[Array, Array]:
    """Mean embeddings float32[D], of the tokens int32[n, T] of a text and of the vocabulary."""
    return (
        models.base.embed(base, text.reshape(-1)).mean(axis=0),
        models.base.embed(base, jnp.arange(models.base.vocab_size)).mean(axis=0),
    )


def oldest_as_gists(length: int, geometry: Geometry) -> WorkingContext:
    """A gist of every block but for the last tokens: `length` entries, `shorter` of which are in full."""
    cut = jnp.where(jnp.arange(geometry.history) < geometry.history - shorter(length, geometry), 1, 0)
    return contexts.from_cut(cut, geometry, capacity=length)


def untrained(
    models: Models,
    geometry: Geometry,
    lengths: Mapping[int, int],
    base: Params,
    centres: tuple[Array, Array],
    tokens: Array,
    other: Array,
) -> dict[str, Array]:
    """Losses of one window, float32[], of the full context and of all that need no training, by policy and ratio."""
    del other
    window = split(tokens, horizon=tokens.shape[0] - geometry.history)
    leaves = models.base.embed(base, window.history)
    kinds: dict[str, Callable[[Array], Array]] = {
        "gists_mean": lambda children: children.mean(axis=1),
        "gists_scaled": lambda children: gistnet.scaled(children.mean(axis=1), centres[0], geometry.block_size),
        "gists_scaled_vocabulary": lambda children: gistnet.scaled(
            children.mean(axis=1), centres[1], geometry.block_size
        ),
        "gists_middle": lambda children: children[:, geometry.block_size // 2],
    }
    made = {name: _tree(leaves, kind, geometry) for name, kind in kinds.items()}
    full = contexts.in_full(leaves, jnp.arange(geometry.history))
    report = {"full/1": nll.token_nll(models.base, base, full, window.horizon).mean()}
    for ratio, length in lengths.items():
        recent = [contexts.recency(count, geometry, capacity=length) for count in (length, shorter(length, geometry))]
        seen = [contexts.materialise(made["gists_mean"], one) for one in recent]
        seen += [contexts.materialise(one, oldest_as_gists(length, geometry)) for one in made.values()]
        losses = _losses(models, base, seen, window.horizon)
        report |= {f"{name}/{ratio}": losses[place] for place, name in enumerate(UNTRAINED)}
    return report


def of_gistnet(
    models: Models,
    geometry: Geometry,
    lengths: Mapping[int, int],
    base: Params,
    gist: Params,
    tokens: Array,
    other: Array,
) -> dict[str, Array]:
    """Losses of one window, float32[], with GistNet's gists of it and of another window, by policy and ratio."""
    window = split(tokens, horizon=tokens.shape[0] - geometry.history)
    own, foreign = (
        _tree(models.base.embed(base, row[: geometry.history]), lambda x: models.gist.apply(gist, x), geometry)
        for row in (tokens, other)
    )
    foreign = dataclasses.replace(own, levels=(own.levels[0], foreign.levels[1]))
    report = dict[str, Array]()
    for ratio, length in lengths.items():
        seen = [contexts.materialise(one, oldest_as_gists(length, geometry)) for one in (own, foreign)]
        losses = _losses(models, base, seen, window.horizon)
        report |= {f"{name}/{ratio}": losses[place] for place, name in enumerate(TRAINED)}
    return report


def train(
    arguments: Arguments,
    config: Config,
    models: Models,
    params: dict[str, Params],
    reader: Any,
    key: Array,
    console: Console,
) -> tuple[Params, list[Row]]:
    """GistNet after its steps, and what each of them reported."""
    fields = ("steps", "learning_rate", "kl_weight", "at_once")
    settings = GistTrainingConfig(**{name: getattr(arguments, name) for name in fields})
    state, frozen = gists.init_gists_state(key, recipe=config.recipe, params=params)
    step, log = _compiled_step(config, settings, models), list[Row]()
    for index in range(arguments.steps):
        state, report = step(state, next(reader), frozen)
        log.append({name: float(value) for name, value in report.items()})
        if (index + 1) % max(arguments.steps // 10, 1) == 0:
            parts = ", ".join(f"{name} {log[-1][name]:.3f}" for name in ("gists/token_loss", "gists/divergence"))
            console.out(f"step {index + 1} of {arguments.steps}: {parts}", highlight=False)
    return state.params["gist"], log


@functools.cache
def _compiled_step(config: Config, settings: GistTrainingConfig, models: Models) -> Callable[..., Any]:
    step = functools.partial(gists.gists_step, recipe=config.recipe, settings=settings, models=models)
    return jax.jit(step, donate_argnums=0)


def _losses(models: Models, base: Params, seen: list[Entries], horizon: Array) -> Array:
    """Mean loss of a horizon behind each of several contexts."""
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
    return jax.vmap(lambda one: nll.token_nll(models.base, base, one, horizon))(rows).mean(axis=1)


def _tree(leaves: Array, kind: Callable[[Array], Array], geometry: Geometry) -> TreeState:
    return trees.build(leaves, kind, block_size=geometry.block_size, max_lod=1)


def _tokens(batches: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([batch["tokens"] for batch in batches])


def _batches(config: Config, arguments: Arguments, seed: int) -> Any:
    return data.make_iterator(config, "train", seed=2 * seed + LENS_STREAM, batch_size=arguments.batch_size)


def _per_window(
    measure: Callable[..., dict[str, Array]],
    models: Models,
    geometry: Geometry,
    lengths: Mapping[int, int],
    base: Params,
    other: Any,
    windows: np.ndarray,
) -> list[dict[str, Array]]:
    """A report of each window; its stranger is the window before it."""
    one = jax.jit(functools.partial(measure, models, geometry, lengths))
    strangers = np.roll(windows, 1, axis=0)
    return [jax.device_get(one(base, other, *pair)) for pair in zip(windows, strangers, strict=True)]


def _stacked(reports: list[dict[str, Array]]) -> Losses:
    return {name: np.asarray([report[name] for report in reports], np.float64) for name in reports[0]}


def _size(params: Params) -> int:
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
