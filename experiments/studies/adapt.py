"""Does LensNet do better on a document when its weights are adapted to that document, from a few measured variants?

    python -m experiments.studies.adapt runs/recall-long/0 runs/recall-long/1 --output-dir runs/adapt/recall

The LensNet of each run is trained on, and with it a hypernetwork that adapts it (`lensjax.training.steps.adaptation`).
On test documents, all at one number of entries, what LensNet picks by itself is compared with what it picks adapted to
variants that were measured one horizon before the cursor, with deltas of zero, and with another document's. For as many
passes of the base model one may also credit spans with the losses of the variants that showed them. What knows the
losses at the cursor itself is named so: a bound, in hindsight. Leaves a run folder for each run that is named,
`picks.csv`, `report.md`, `effects.csv` and `effects.png`.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from rich.console import Console

from experiments import command
from experiments.studies.recall import run_once
from experiments.tables import write_csv
from lensjax import _settings
from lensjax._numerics import may_be_nan
from lensjax._settings import Bound, PositiveInt, settings
from lensjax.context import allocator, refocus
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext
from lensjax.evaluation import baselines, effects, rivals
from lensjax.evaluation.answers import shows_in_full
from lensjax.evaluation.effects import Measured
from lensjax.models import HyperLoRAModel, Models, Params, hyperlora
from lensjax.models.decision import build_tree, policy, split
from lensjax.models.hyperlora import Deltas
from lensjax.plots import style
from lensjax.plots.effects import forest
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.fit import EVALUATION_SEED
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file, files, run_folder
from lensjax.training import nll
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch, ScoredVariants, score_variants
from lensjax.training.steps import adaptation

PLAIN, ADAPTED, ZEROED, FOREIGN, CREDIT = "plain", "adapted", "zeroed", "foreign", "credit"
BEST, BEST_PLAIN, BEST_ADAPTED = "best_hindsight", "best_or_plain_hindsight", "best_or_adapted_hindsight"
CREDIT_HINDSIGHT = "credit_hindsight"
DEFAULTS = (PLAIN, FOREIGN, CREDIT)
"""What differences are taken to: LensNet itself, deltas for nothing in particular, and as many passes without them."""
COLUMNS = ("hit_rate",)


@settings()
class Arguments:
    """What to run; finished runs in the folder are kept and interrupted ones go on."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs that trained a LensNet, each with a seed of its own."""
    output_dir: Path
    steps: PositiveInt = 300
    """Steps of training, of LensNet by preferences and of the hypernetwork."""
    budget: PositiveInt | None = None
    """History over entries, in training and measuring; None as the run's config says at the end of its curriculum."""
    measured: tuple[Annotated[int, Bound(2, 1024)], ...] = (8, 32)
    """Variants of a test document's past that are measured, one table each; those of 8 are not the first of 32."""
    split: Literal["test", "validation"] = "test"
    """Choose settings on validation, report test."""
    resume: bool = False
    """Go on in a folder that is there already."""


def main(words: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    command.program(compare, Arguments, words, description=__doc__)


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
            for name, (each, hits) in measure(Path(config.output_dir)).items():
                losses[count].setdefault(name, []).append(each)
                scores = {"nll": float(each.mean()), "hit_rate": float(hits.mean())}
                known = {"information": rivals.information(name)}
                rows.append({"measured": count, "pick": name, **known, "seed": config.seed, **scores})
    _report(arguments, rows, losses)
    return rows


def plan(arguments: Arguments) -> list[Config]:
    """The configuration of every training; all of them are checked here.

    Raises:
      ValueError: seeds repeat or are fewer than two, or a value is not valid.
      FileNotFoundError: a folder holds no run.
    """
    stored = [config_file.load(run_folder.config_path(run), Config) for run in arguments.runs]
    seeds = [config.seed for config in stored]
    if len(set(seeds)) < max(2, len(seeds)):
        raise ValueError(f"expected two or more runs of different seeds, got seeds {seeds}: train more of them")
    counts = arguments.measured
    if not counts or min(counts) < 2 or len(set(counts)) < len(counts):
        raise ValueError(f"measured must name one or more different counts of 2 or more variants, got {counts}")
    if stored[0].batch_size < 2:
        raise ValueError(f"{arguments.runs[0]} has batch_size 1: another document's deltas need batches of 2 or more")
    own: dict[str, Any] = {"steps": arguments.steps, "base_run": None, "trainable": ("lens", "hypernet")}
    own["online.steps"] = 0
    configs = []
    for run, config in zip(arguments.runs, stored, strict=True):
        end = config.hyper.context_end if arguments.budget is None else 1 / arguments.budget
        lengths = {"hyper.context_start": end, "hyper.context_end": end}
        folder = str(arguments.output_dir / f"seed-{config.seed}")
        configs.append(_settings.replace(config, **own, **lengths, start_from=str(run), output_dir=folder))
    return configs


def causal(
    models: Models,
    hypernet: HyperLoRAModel,
    params: dict[str, Params],
    histories: Array,
    keys: Array,
    *,
    recipe: Recipe,
) -> dict[str, WorkingContext]:
    """What each way of choosing makes of a batch of histories, with no look at what is behind the cursor.

    Args:
      models: the models.
      hypernet: the hypernetwork.
      params: of all four parts.
      histories: int32[B, C].
      keys: PRNG keys [B], consumed.
      recipe: `context.rollouts` variants are measured of a document's past, for each of which the base model reads it
        once.

    Returns:
      By name; leading axis B. `credit` knows the losses that the deltas know.
    """
    geometry, length, past = recipe.geometry, recipe.budget, recipe.past

    def measured(history: Array, key: Array) -> ScoredVariants:
        share = recipe.hyper.high_lod_share
        return adaptation.score_support(models, params, history, key, past.budget, share, recipe=recipe)

    def one(
        history: Array, key: Array, support: ScoredVariants, deltas: Deltas, foreign: Deltas
    ) -> dict[str, WorkingContext]:
        tree, allocator_key = build_tree(models, params, history, geometry), jax.random.fold_in(key, 1)

        def by(lens: Params) -> WorkingContext:
            score_fn, settings = policy(models.lens, lens, tree), recipe.focus
            walk = refocus.cold_start(score_fn, length, geometry, capacity=length, settings=settings, key=allocator_key)
            return jax.tree.map(lambda leaf: leaf[-1], walk)

        lenses = {
            PLAIN: params["lens"],
            ADAPTED: adaptation.adapted(params["lens"], deltas),
            ZEROED: adaptation.adapted(params["lens"], hyperlora.zeroed(deltas)),
            FOREIGN: adaptation.adapted(params["lens"], foreign),
        }
        picked = jax.vmap(by)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *lenses.values()))
        picks = {name: jax.tree.map(lambda leaf, i=i: leaf[i], picked) for i, name in enumerate(lenses)}
        return picks | {CREDIT: _by_scores(past_credit(support, recipe=recipe), recipe)}

    support = jax.vmap(measured)(histories, keys)
    deltas = jax.vmap(lambda one: adaptation.document_deltas(models, hypernet, params, one, past.geometry))(support)
    foreign = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), deltas)
    return jax.vmap(one)(histories, keys, support, deltas, foreign)


def pick(
    models: Models,
    hypernet: HyperLoRAModel,
    params: dict[str, Params],
    batch: Batch,
    key: Array,
    *,
    recipe: Recipe,
) -> dict[str, tuple[Array, Array]]:
    """What a batch of documents costs with each way of choosing, and with those that know what variants cost.

    Args:
      models: static.
      hypernet: static.
      params: of all four parts.
      batch: `tokens` int32[B, T]; where answers are known also `answers` int32[B, A].
      key: PRNG key of the measured variants, consumed.
      recipe: static; `context.rollouts` variants are measured for each way, at the cursor or before it.

    Returns:
      By name, float32[B] nats per token on the horizon and float32[B] whether the answers are shown in full (NaN where
      there are none). Beside `causal`, in hindsight: the best of the variants measured at the cursor itself, the better
      one of it and what LensNet picks, and the credit of their losses.
    """
    context, geometry, share = recipe.context, recipe.geometry, recipe.hyper.high_lod_share
    plain = replace(context, reward="mean")

    def one(
        row: Array, answers: Array | None, key: Array, picks: dict[str, WorkingContext]
    ) -> dict[str, tuple[Array, Array]]:
        window = split(row, horizon=context.horizon)
        tree = build_tree(models, params, window.history, geometry)
        scored = score_variants(
            key, params, row, recipe.budget, share, models=models, context=plain, capacity=recipe.capacity
        )
        picks = picks | {CREDIT_HINDSIGHT: _by_scores(credit(scored, geometry), recipe)}

        def hits(variants: WorkingContext) -> Array:
            if answers is None:
                return jnp.full(variants.start.shape[:1], jnp.nan)
            shown = jax.vmap(lambda variant: shows_in_full(variant, answers, geometry))(variants)
            return shown.astype(jnp.float32)

        variants = jax.tree.map(lambda *leaves: jnp.stack(leaves), *picks.values())
        losses, _ = nll.variant_nll(models.base, params["base"], tree, variants, window.horizon, geometry)
        shown = hits(variants)
        report = {name: (losses[place], shown[place]) for place, name in enumerate(picks)}
        ranked = jnp.where(adaptation.known_variants(scored), scored.nll, jnp.inf)
        best = jnp.argmin(ranked)
        report[BEST] = (ranked[best], hits(scored.contexts)[best])
        for name, other in ((BEST_PLAIN, PLAIN), (BEST_ADAPTED, ADAPTED)):
            is_better = report[other][0] < report[BEST][0]
            report[name] = jax.tree.map(lambda a, b, c=is_better: jnp.where(c, a, b), report[other], report[BEST])
        return report

    tokens, keys = batch["tokens"], jax.random.split(key, batch["tokens"].shape[0])
    histories = split(tokens, horizon=context.horizon).history
    picks = causal(models, hypernet, params, histories, keys, recipe=recipe)
    return jax.vmap(one)(tokens, batch.get("answers"), keys, picks)


def credit(scored: ScoredVariants, geometry: Geometry) -> Array:
    """How far the loss of variants falls with the detail that they give to each token of their history; float32[C].

    The statistic that the hypernetwork reads (`adaptation.document_context`), of tokens instead of features.
    """
    cuts = jax.vmap(lambda context: contexts.to_cut(context, geometry))(scored.contexts)
    detail = 1.0 - 2.0 * cuts.astype(jnp.float32) / geometry.max_lod
    return adaptation.document_context(detail, -scored.nll, adaptation.known_variants(scored))[geometry.history :]


def past_credit(support: ScoredVariants, *, recipe: Recipe) -> Array:
    """`credit` at the earlier cursor, as credit of the history at the true one; float32[C].

    Tokens in between, of which no variant was measured, have neither credit nor blame.
    """
    return jnp.pad(credit(support, recipe.past.geometry), (0, recipe.context.horizon))


def _by_scores(scores: Array, recipe: Recipe) -> WorkingContext:
    length, geometry = recipe.budget, recipe.geometry
    return allocator.to_context(baselines.by_scores(scores, length, geometry), geometry, capacity=length)


def _measurer(
    config: Config, measured: int, split: Literal["test", "validation"]
) -> Callable[[Path], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """What measures a finished run, always on the same variants of the same documents."""
    config = _settings.replace(config, **{"context.rollouts": measured})
    models = config.build_models()
    hypernet = config.build_hypernet(models)
    assert hypernet is not None
    step = may_be_nan(jax.jit(functools.partial(pick, models, hypernet, recipe=config.recipe)))
    batches = data.fixed_batches(
        config,
        split,
        batch_size=config.batch_size,
        count=config.eval_batches,
        seed=EVALUATION_SEED,
    )
    keys = [jax.random.fold_in(jax.random.key(EVALUATION_SEED), place) for place in range(len(batches))]

    def measure(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        params = load_params(folder, config, models, ("base", "gist", "lens", "hypernet"))
        reports = [jax.device_get(step(params, batch, key)) for batch, key in zip(batches, keys, strict=True)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *reports)

    return measure


def _report(arguments: Arguments, rows: list[dict[str, Any]], losses: dict[int, dict[str, list[np.ndarray]]]) -> None:
    folder, seeds = arguments.output_dir, len(arguments.runs)
    flags = {"steps": arguments.steps, "measured": " ".join(map(str, arguments.measured)), "split": arguments.split}
    if arguments.budget is not None:
        flags["budget"] = arguments.budget
    words = [
        *map(str, arguments.runs),
        f"--output-dir {folder}",
        *(f"--{name} {value}" for name, value in flags.items()),
    ]
    command = f"python -m experiments.studies.adapt {' '.join(words)}"

    def measured(count: int, name: str, setting: dict[str, Any]) -> Measured:
        hits = [row["hit_rate"] for row in rows if (row["measured"], row["pick"]) == (count, name)]
        return Measured(setting, np.stack(losses[count][name]), {"hit_rate": np.asarray(hits)}, np.zeros(seeds, bool))

    reports, table = [], []
    for count, default in itertools.product(arguments.measured, DEFAULTS):
        others = [measured(count, name, {"pick": name}) for name in losses[count] if name != default]
        differences = effects.effects([measured(count, default, {}), *others])
        title, settings = f"{count} variants measured, differences to: {default}", {"pick": default}
        reports.append(effects.markdown(differences, default=settings, title=title, columns=COLUMNS, command=command))
        for one in differences:
            row = {name: value for name, value in asdict(one).items() if name != "others"}
            pick = one.value or default
            table.append({"measured": count, "to": default, "information": rivals.information(pick), **row})
        if (count, default) == (arguments.measured[0], PLAIN):
            picture = functools.partial(forest, differences, default=settings, title=title)
    write_csv(rows, folder / "picks.csv")
    write_csv(table, folder / "effects.csv")
    files.write_text(folder / "report.md", "\n".join([_legend(losses[arguments.measured[0]]), *reports]))
    with style.attempt(folder / "effects.png") as path:
        picture(path)


def _legend(names: Iterable[str]) -> str:
    """A table of what each way of choosing knows; Markdown, ending in a newline."""
    rows = [f"| `{name}` | {rivals.information(name)} |" for name in names]
    return "\n".join(["| pick | information |", "| --- | --- |", *rows, ""])


if __name__ == "__main__":
    main()
