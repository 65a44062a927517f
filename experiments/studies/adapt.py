"""Does LensNet do better on a document when its weights are adapted to that document, from a few measured variants?

    python -m experiments.studies.adapt runs/recall-long/0 runs/recall-long/1 runs/recall-long/2 --output-dir runs/adapt/recall

The LensNet of each run is trained on, and with it a hypernetwork that adapts it (`lensjax.training.steps.adaptation`). On test
documents, all at one number of entries, what LensNet picks by itself is compared with what it picks adapted to variants
that were measured one horizon before the cursor, with deltas of zero, and with another document's. For as many passes
of the base model one may also credit spans with the losses of the variants that showed them. What knows the losses at
the cursor itself is named so: a bound, in hindsight. Leaves a run folder for each run given, `picks.csv`, `report.md`,
`effects.csv` and `effects.png`.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
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
from experiments.studies.recall import run_once
from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.context.working import WorkingContext
from lensjax.evaluation import baselines, effects, held_out, rivals
from lensjax.evaluation.effects import Measured
from lensjax.models import Models, Params, build_models, hyperlora
from lensjax.models.decision import build_tree, policy_contexts, split
from lensjax.models.hyperlora import Deltas
from lensjax.plots import effects as forest
from lensjax.runs import config as configs
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.store import folder as run_folder
from lensjax.training import nll
from lensjax.training.scoring import Batch, ScoredVariants, score_variants
from lensjax.training.steps import adaptation

PLAIN, ADAPTED, ZEROED, FOREIGN, CREDIT = "plain", "adapted", "zeroed", "foreign", "credit"
BEST, BEST_PLAIN, BEST_ADAPTED = "best_hindsight", "best_or_plain_hindsight", "best_or_adapted_hindsight"
CREDIT_HINDSIGHT = "credit_hindsight"
DEFAULTS = (PLAIN, FOREIGN, CREDIT)
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
    """History over entries, in training and measuring; None as the run's config says at the end of its curriculum."""
    measured: tuple[int, ...] = (8, 32)
    """Variants of a test document's past that are measured, one table each; those of 8 are not the first of 32."""
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
                scores = {"nll": float(found.mean()), "hit_rate": float(hits.mean())}
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
    stored = [configs.load(run_folder.config_file(run)) for run in arguments.runs]
    seeds = [config.seed for config in stored]
    if len(set(seeds)) < max(2, len(seeds)):
        raise ValueError(f"expected two or more runs of different seeds, got seeds {seeds}: train more of them")
    counts = arguments.measured
    if not counts or min(counts) < 2 or len(set(counts)) < len(counts):
        raise ValueError(f"measured must name one or more different counts of 2 or more variants, got {counts}")
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


def causal(
    models: Models, params: dict[str, Params], histories: Array, keys: Array, *, config: Config
) -> dict[str, WorkingContext]:
    """What each way of choosing makes of a batch of histories, with no look at what is behind the cursor.

    Args:
      models: the models.
      params: of all four parts.
      histories: int32[B, C].
      keys: PRNG keys [B], consumed.
      config: `context.rollouts` variants are measured of a document's past, for each of which the base model reads it
        once.

    Returns:
      By name; leading axis B. `credit` knows the losses that the deltas know.
    """
    length, past_length = _length(config), _length(config.past)

    def measured(history: Array, key: Array) -> ScoredVariants:
        share = config.hyper.lod2_share
        return adaptation.score_support(models, params, history, key, past_length, share, config=config)

    def one(
        history: Array, key: Array, support: ScoredVariants, deltas: Deltas, foreign: Deltas
    ) -> dict[str, WorkingContext]:
        tree, allocator_key = build_tree(models, params, history, config), jax.random.fold_in(key, 1)

        def by(lens: Params) -> WorkingContext:
            walk = policy_contexts(models, lens, tree, length, config=config, capacity=length, key=allocator_key)
            return jax.tree.map(lambda leaf: leaf[-1], walk)

        lenses = {
            PLAIN: params["lens"],
            ADAPTED: adaptation.adapted(params["lens"], deltas),
            ZEROED: adaptation.adapted(params["lens"], hyperlora.zeroed(deltas)),
            FOREIGN: adaptation.adapted(params["lens"], foreign),
        }
        picked = jax.vmap(by)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *lenses.values()))
        made = {name: jax.tree.map(lambda leaf, i=i: leaf[i], picked) for i, name in enumerate(lenses)}
        return made | {CREDIT: _by_scores(past_credit(support, config=config), config)}

    support = jax.vmap(measured)(histories, keys)
    deltas = jax.vmap(lambda one: adaptation.document_deltas(models, params, one, config=config))(support)
    foreign = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), deltas)
    return jax.vmap(one)(histories, keys, support, deltas, foreign)


def pick(
    models: Models, params: dict[str, Params], batch: Batch, key: Array, *, config: Config
) -> dict[str, tuple[Array, Array]]:
    """What a batch of documents costs with each way of choosing, and with those that know what variants cost.

    Args:
      models: static.
      params: of all four parts.
      batch: `tokens` int32[B, T]; where answers are known also `answers` int32[B, A].
      key: PRNG key of the measured variants, consumed.
      config: static; `context.rollouts` variants are measured for each way, at the cursor or before it.

    Returns:
      By name, float32[B] nats per token on the horizon and float32[B] whether the answers are shown in full (NaN where
      there are none). Beside `causal`, in hindsight: the best of the variants measured at the cursor itself, the better
      one of it and what LensNet picks, and the credit of their losses.
    """

    def one(
        row: Array, answers: Array | None, key: Array, made: dict[str, WorkingContext]
    ) -> dict[str, tuple[Array, Array]]:
        window = split(row, horizon=config.context.horizon)
        tree = build_tree(models, params, window.history, config)
        scored = score_variants(models, params, row, key, _length(config), config.hyper.lod2_share, config=config)
        made = made | {CREDIT_HINDSIGHT: _by_scores(credit(scored, config=config), config)}

        def hits(variants: WorkingContext) -> Array:
            if answers is None:
                return jnp.full(variants.start.shape[:1], jnp.nan)
            shown = jax.vmap(lambda variant: held_out.shows_in_full(variant, answers, config))(variants)
            return shown.astype(jnp.float32)

        variants = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made.values())
        losses, _ = nll.variant_losses(models.base, params["base"], tree, variants, window.horizon)
        shown = hits(variants)
        report = {name: (losses[place], shown[place]) for place, name in enumerate(made)}
        ranked = jnp.where(adaptation.known_variants(scored), scored.losses, jnp.inf)
        best = jnp.argmin(ranked)
        report[BEST] = (ranked[best], hits(scored.contexts)[best])
        for name, other in ((BEST_PLAIN, PLAIN), (BEST_ADAPTED, ADAPTED)):
            is_better = report[other][0] < report[BEST][0]
            report[name] = jax.tree.map(lambda a, b, c=is_better: jnp.where(c, a, b), report[other], report[BEST])
        return report

    tokens, keys = batch["tokens"], jax.random.split(key, batch["tokens"].shape[0])
    made = causal(models, params, split(tokens, horizon=config.context.horizon).history, keys, config=config)
    return jax.vmap(one)(tokens, batch.get("answers"), keys, made)


def credit(scored: ScoredVariants, *, config: Config) -> Array:
    """How far the loss of variants falls with the detail that they give to each token of their history; float32[C].

    The statistic that the hypernetwork reads (`adaptation.document_context`), of tokens instead of features.
    """
    window = config.context.history
    cuts = jax.vmap(lambda context: contexts.to_cut(context, window=window))(scored.contexts)
    detail = 1.0 - 2.0 * cuts.astype(jnp.float32) / config.context.max_lod
    return adaptation.document_context(detail, -scored.losses, adaptation.known_variants(scored))[window:]


def past_credit(support: ScoredVariants, *, config: Config) -> Array:
    """`credit` at the earlier cursor, as credit of the history at the true one; float32[C].

    Tokens in between, of which no variant was measured, have neither credit nor blame.
    """
    return jnp.pad(credit(support, config=config.past), (0, config.context.horizon))


def _length(config: Config) -> int:
    """Entries of every context."""
    return config.context.geometry.length_of_fraction(config.hyper.context_end)


def _by_scores(scores: Array, config: Config) -> WorkingContext:
    length, geometry = _length(config), config.context.geometry
    return allocator.to_context(baselines.by_scores(scores, length, geometry), geometry, capacity=length)


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
    command = f"python -m experiments.studies.adapt {' '.join(words)}"

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
            pick = one.value or default
            table.append({"measured": count, "to": default, "information": rivals.information(pick), **row})
        if (count, default) == (arguments.measured[0], PLAIN):
            forest.forest(found, folder / "effects.png", default=settings, title=title)
    write_csv(rows, folder / "picks.csv")
    write_csv(table, folder / "effects.csv")
    (folder / "report.md").write_text("\n".join([_legend(losses[arguments.measured[0]]), *reports]))


def _legend(names: Iterable[str]) -> str:
    """A table of what each way of choosing knows; Markdown, ending in a newline."""
    rows = [f"| `{name}` | {rivals.information(name)} |" for name in names]
    return "\n".join(["| pick | information |", "| --- | --- |", *rows, ""])


if __name__ == "__main__":
    main()
