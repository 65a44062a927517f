"""Does LensNet do better on a document when its weights are adapted to that document, from a few measured variants?

    python experiments/adapt.py runs/recall-long/0 runs/recall-long/1 runs/recall-long/2 --output-dir runs/adapt/recall

The LensNet of each run is trained on, and with it a hypernetwork that adapts it (`lensjax.adaptation`). On test
documents, all at one number of entries, what LensNet picks by itself is compared with what it picks adapted, with
deltas of zero, and with another document's. Measuring costs passes of the base model; for as many, one may also take
the best variant measured, or credit spans with the losses of the variants that show them. Leaves a run folder for each
run given, `picks.csv`, `report.md`, `effects.csv` and `effects.png`.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from rich.console import Console

from experiments import command
from experiments import train as runs
from experiments.evaluate import write_csv
from experiments.recall import run_once
from lensjax import adaptation, data, effects, evaluation, focus, forest, hyperlora, nll, policies, run_folder
from lensjax import config as configs
from lensjax import context as contexts
from lensjax.config import Config
from lensjax.context import WorkingContext
from lensjax.decision import build_tree
from lensjax.effects import Measured
from lensjax.hyperlora import Deltas
from lensjax.models import Models, Params, build_models
from lensjax.variants import Batch, ScoredVariants, score_variants

PLAIN, ADAPTED, ZEROED, FOREIGN, CREDIT = "plain", "adapted", "zeroed", "foreign", "credit"
BEST, BEST_PLAIN, BEST_ADAPTED = "best", "best_or_plain", "best_or_adapted"
DEFAULTS = (PLAIN, FOREIGN, BEST_PLAIN)
"""What differences are taken to: LensNet itself, deltas for nothing in particular, and as many passes without them."""
COLUMNS = ("hit_rate",)


@dataclass(frozen=True)
class Arguments:
    """What to run; finished runs in the folder are kept and interrupted ones go on."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs that trained a LensNet, each with a seed of its own."""
    output_dir: Path
    steps: int = 300
    """Steps of training, of LensNet by preferences and of the hypernetwork."""
    budget: int | None = None
    """Window over entries, in training and measuring; None as the run's config says at the end of its curriculum."""
    measured: tuple[int, ...] = (8, 32)
    """Variants of a test document that are measured, one table each; those of 8 are not the first of those of 32."""
    split: Literal["test", "validation"] = "test"
    """Choose settings on validation, report test."""
    resume: bool = False
    """Go on in a folder that is there already."""


def main(words: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    arguments = tyro.cli(Arguments, args=words, description=__doc__)
    with command.errors_end():
        compare(arguments)


def compare(arguments: Arguments) -> list[dict[str, Any]]:
    """Trains on from every run, and returns the rows of `picks.csv`."""
    folder, console = arguments.output_dir, Console()
    command.check_free(folder, resume=arguments.resume)
    trained = plan(arguments)
    measurers = {count: _measurer(trained[0], count, arguments.split) for count in arguments.measured}
    rows: list[dict[str, Any]] = []
    losses: dict[int, dict[str, list[np.ndarray]]] = {count: {} for count in arguments.measured}
    for config in trained:
        run_once(config, console)
        for count, measure in measurers.items():
            for name, (found, hits) in measure(Path(config.output_dir)).items():
                losses[count].setdefault(name, []).append(found)
                hit_rate = float(hits.mean()) if config.data.task == "recall" else math.nan
                scores = {"nll": float(found.mean()), "hit_rate": hit_rate}
                rows.append({"measured": count, "pick": name, "seed": config.seed, **scores})
    _report(arguments, rows, losses)
    return rows


def plan(arguments: Arguments) -> list[Config]:
    """The configuration of every training; all of them are checked here.

    Raises:
      ValueError: seeds repeat or are fewer than two, or a value is not valid.
      FileNotFoundError: a folder holds no run.
    """
    stored = [configs.load(run_folder.config_file(run)) for run in arguments.runs]
    seeds = [config.seed for config in stored]
    if len(set(seeds)) < max(2, len(seeds)):
        raise ValueError(f"expected two or more runs of different seeds, got seeds {seeds}: train more of them")
    counts = arguments.measured
    if not counts or min(counts) < 3 or len(set(counts)) < len(counts):
        raise ValueError(f"measured must name one or more different counts of 3 or more variants, got {counts}")
    if stored[0].batch_size < 2:
        raise ValueError(f"{arguments.runs[0]} has batch_size 1: another document's deltas need batches of 2 or more")
    own: dict[str, Any] = {"steps": arguments.steps, "base_run": None, "trainable": ("lens", "hyper")}
    own["online.steps"] = 0
    found = []
    for run, config in zip(arguments.runs, stored, strict=True):
        end = config.hyper.context_end if arguments.budget is None else 1 / arguments.budget
        lengths = {"hyper.context_start": end, "hyper.context_end": end}
        folder = str(arguments.output_dir / f"seed-{config.seed}")
        found.append(configs.replace(config, **own, **lengths, init=str(run), output_dir=folder))
    return found


def pick(
    models: Models, params: dict[str, Params], batch: Batch, key: Array, *, config: Config
) -> dict[str, tuple[Array, Array]]:
    """What each way of choosing makes of a batch of documents.

    Args:
      models: static.
      params: of all four parts.
      batch: `tokens` int32[B, T]; for recall also `answer` int32[B].
      key: PRNG key of the measured variants, consumed.
      config: static; `context.rollouts` variants of a document are measured, for each of which the base model reads it
        once.

    Returns:
      By name, float32[B] nats per token on the horizon and bool[B] whether the answer is shown in full (False where
      there is none). `best*` and `credit` know the losses of the same variants as the deltas do; `best_or_*` chooses
      between them and what LensNet picks, which is one more pass.
    """
    tokens = batch["tokens"]
    answers = batch.get("answer", jnp.full(tokens.shape[:1], -1, jnp.int32))
    length = config.context.geometry.length_of_fraction(config.hyper.context_end)
    keys = jax.random.split(key, tokens.shape[0])
    share = jnp.asarray(config.hyper.lod2_share, jnp.float32)
    scored = jax.vmap(lambda row, own: score_variants(models, params, row, own, length, share, config=config))(
        tokens, keys
    )
    deltas = jax.vmap(lambda one: adaptation.document_deltas(models, params, one, config=config))(scored)
    foreign = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), deltas)

    def one(
        row: Array, answer: Array, own: Array, scored: ScoredVariants, deltas: Deltas, foreign: Deltas
    ) -> dict[str, Any]:
        tree = build_tree(models, params, row, config)
        known = adaptation.known_variants(scored)

        def by_lens(lens: Params) -> WorkingContext:
            walk = evaluation.policy_contexts(
                models, {"lens": lens}, tree, length, config=config, capacity=length, key=jax.random.fold_in(own, 1)
            )
            return jax.tree.map(lambda leaf: leaf[-1], walk)

        lenses = {
            PLAIN: params["lens"],
            ADAPTED: adaptation.adapted(params["lens"], deltas),
            ZEROED: adaptation.adapted(params["lens"], hyperlora.zeroed(deltas)),
            FOREIGN: adaptation.adapted(params["lens"], foreign),
        }
        geometry = config.context.geometry
        credited = policies.by_scores(credit(scored, config=config), length, geometry)
        stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
        picked = jax.vmap(by_lens)(stack(*lenses.values()))
        variants = jax.tree.map(
            lambda many, one: jnp.concatenate([many, one[None]]),
            picked,
            focus.to_context(credited, geometry, capacity=length),
        )
        found, _ = nll.variant_losses(models.base, params["base"], tree, variants, row, horizon=config.context.horizon)
        shows = jax.vmap(lambda context: evaluation.shows_in_full(context, jnp.maximum(answer, 0), config))
        hits = shows(variants) & (answer >= 0)
        report = {name: (found[place], hits[place]) for place, name in enumerate((*lenses, CREDIT))}
        ranked = jnp.where(known, scored.losses, jnp.inf)
        best = jnp.argmin(ranked)
        report[BEST] = (ranked[best], (shows(scored.contexts) & (answer >= 0))[best])
        for name, other in ((BEST_PLAIN, PLAIN), (BEST_ADAPTED, ADAPTED)):
            is_better = report[other][0] < report[BEST][0]
            report[name] = jax.tree.map(lambda a, b, c=is_better: jnp.where(c, a, b), report[other], report[BEST])
        return report

    return jax.vmap(one)(tokens, answers, keys, scored, deltas, foreign)


def credit(scored: ScoredVariants, *, config: Config) -> Array:
    """How far the loss of a document's variants falls with the detail that they give to each token; float32[T].

    The statistic that the hypernetwork reads (`adaptation.document_context`), of tokens instead of features.
    """
    window = config.context.window
    cuts = jax.vmap(lambda context: contexts.to_cut(context, window=window))(scored.contexts)
    detail = 1.0 - 2.0 * cuts.astype(jnp.float32) / config.context.max_lod
    return adaptation.document_context(detail, -scored.losses, adaptation.known_variants(scored))[window:]


def _measurer(
    config: Config, measured: int, split: Literal["test", "validation"]
) -> Callable[[Path], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """What measures a finished run, always on the same variants of the same documents."""
    config = configs.replace(config, **{"context.rollouts": measured})
    models = build_models(config)
    step = jax.jit(functools.partial(pick, models, config=config))
    batches = data.fixed_batches(
        config,
        split,
        batch_size=config.batch_size,
        count=config.eval_batches,
        seed=runs.EVALUATION_SEED,
    )
    keys = [jax.random.fold_in(jax.random.key(runs.EVALUATION_SEED), place) for place in range(len(batches))]

    def measure(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        params = runs.load_params(folder, models, ("base", "gist", "lens", "hyper"))
        found = [jax.device_get(step(params, batch, key)) for batch, key in zip(batches, keys, strict=True)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)

    return measure


def _report(arguments: Arguments, rows: list[dict[str, Any]], losses: dict[int, dict[str, list[np.ndarray]]]) -> None:
    folder, seeds = arguments.output_dir, len(arguments.runs)
    given = {"steps": arguments.steps, "measured": " ".join(map(str, arguments.measured)), "split": arguments.split}
    if arguments.budget is not None:
        given["budget"] = arguments.budget
    words = [
        *map(str, arguments.runs),
        f"--output-dir {folder}",
        *(f"--{name} {value}" for name, value in given.items()),
    ]
    command = f"python experiments/adapt.py {' '.join(words)}"

    def measured(count: int, name: str, setting: dict[str, Any]) -> Measured:
        hits = [row["hit_rate"] for row in rows if (row["measured"], row["pick"]) == (count, name)]
        return Measured(setting, np.stack(losses[count][name]), {"hit_rate": np.asarray(hits)}, np.zeros(seeds, bool))

    reports, table = [], []
    for count, default in itertools.product(arguments.measured, DEFAULTS):
        others = [measured(count, name, {"pick": name}) for name in losses[count] if name != default]
        found = effects.effects([measured(count, default, {}), *others])
        title, settings = f"{count} variants measured, differences to: {default}", {"pick": default}
        reports.append(effects.markdown(found, default=settings, title=title, columns=COLUMNS, command=command))
        for one in found:
            row = {name: value for name, value in asdict(one).items() if name != "others"}
            table.append({"measured": count, "to": default, **row})
        if (count, default) == (arguments.measured[0], PLAIN):
            forest.forest(found, folder / "effects.png", default=settings, title=title)
    write_csv(rows, folder / "picks.csv")
    write_csv(table, folder / "effects.csv")
    (folder / "report.md").write_text("\n".join(reports))


if __name__ == "__main__":
    main()
