"""A test of the machinery on a task with known answers: does the policy learn which span the query asks for?

    make recall
    python -m experiments.studies.recall --output-dir runs/recall-2 --query 4

The first tokens of an earlier block come again: the query. The rest of the block comes behind the cursor, and is what
is scored. A rule solves it without learning, to look the query up (`lookup`); whether a policy can be taught to by
preferences alone is the question. One base model is pretrained and shared; then LensNet is trained with span targets on
both variants of a pair (`both`) and on the worse one alone (`worse_only`), everything else equal, for each seed. Prints
two tables, of the arms and of all policies, and writes `summary.json`, for each arm and policy lists over seeds, and
`policies.csv`.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import command
from experiments.evaluate import compiled_measure
from experiments.tables import write_csv, write_json
from experiments.train import load_preset, run
from lensjax import _settings
from lensjax._settings import Count, PositiveInt, Seed, settings
from lensjax.evaluation import rivals
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.fit import EVALUATION_SEED
from lensjax.runs.load import load_params
from lensjax.runs.store import run_folder

DRAWS = 8
"""Contexts of each random policy."""
ARMS: tuple[Literal["both", "worse_only"], ...] = ("both", "worse_only")
COLUMNS = {
    "hit_rate": "hit_rate",
    "hit_rate_random": "hit_rate_random",
    "nll_policy": "nll_policy",
    "nll_recency": "nll_baseline",
    "nll_random": "nll_rollout_mean",
    "nll_oracle": "nll_oracle",
    "agreement": "preference_agreement",
    "agreement_lod_only": "preference_agreement_lod_only",
}


@settings()
class Arguments:
    """What to run; finished runs in the folder are kept and interrupted ones go on."""

    output_dir: Path = Path("runs/recall")
    preset: str = "recall"
    """Name or path of the config that all runs start from."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    resume: bool = False
    """Go on in a folder that is there already."""
    steps: Count | None = None
    """LensNet training steps of each run; None takes the preset's."""
    query: PositiveInt | None = None
    """Tokens of the repeated block before the cursor; the rest of it is scored. None takes the preset's."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(compare, Arguments, words, description=__doc__)


def compare(arguments: Arguments) -> dict[str, Any]:
    """Runs every arm for every seed, and returns what `summary.json` holds."""
    started = time.perf_counter()
    folder, console = arguments.output_dir, Console()
    command.check_free(folder, resume=arguments.resume)
    base, lens = _configs(arguments)
    base_summary = run_once(base, console)
    results = {run: run_once(config, console) for run, config in lens.items()}
    by_arm = {arm: [results[arm, seed] for seed in arguments.seeds] for arm in ARMS}
    summary: dict[str, Any] = {
        arm: {column: [run[name] for run in runs] for column, name in COLUMNS.items()} for arm, runs in by_arm.items()
    }
    policies = _policies({seed: lens["both", seed] for seed in arguments.seeds}, console)
    summary |= {
        "policies": policies,
        "information": {name: rivals.information(name) for name in policies},
        "task": base.data.task,
        "query": base.data.query,
        "split": "test",
        "seeds": list(arguments.seeds),
        "steps": by_arm["both"][0]["steps"],
        "compression": by_arm["both"][0]["compression"],
        "base_nll_full_tail": base_summary["nll_full_tail"],
        "training_seconds": {arm: [run["training_seconds"] for run in runs] for arm, runs in by_arm.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(summary, folder / "summary.json")
    write_csv(policy_rows(policies, arguments.seeds, base), folder / "policies.csv")
    _print_table(console, summary)
    _print_policies(console, policies, base)
    return summary


def _policies(runs: dict[int, Config], console: Console) -> dict[str, dict[str, list[float]]]:
    """Loss and hit rate of every policy on the test sequences, by name; lists over the seeds of LensNet."""
    config = next(iter(runs.values()))
    models = config.build_models()
    measure = compiled_measure(config.recipe, models, config.budget, DRAWS, 0)
    batches = data.fixed_batches(
        config, "test", batch_size=config.batch_size, count=config.eval_batches, seed=EVALUATION_SEED
    )
    policies: dict[str, dict[str, list[float]]] = {}
    for seed, run_config in runs.items():
        console.out(f"policies beside LensNet of seed {seed}", highlight=False)
        params = load_params(Path(run_config.output_dir), run_config, models, ("base", "gist", "lens"))
        keys = [jax.random.fold_in(jax.random.key(EVALUATION_SEED), index) for index in range(len(batches))]
        parts = [
            jax.device_get(
                measure(params, batch["tokens"], batch["answers"], jax.random.split(key, len(batch["tokens"])))
            )
            for batch, key in zip(batches, keys, strict=True)
        ]
        for name in sorted(parts[0], key=rivals.order):
            row = policies.setdefault(name, {"nll": [], "hit_rate": []})
            row["nll"].append(float(np.mean([part[name].nll for part in parts])))
            row["hit_rate"].append(float(np.mean([part[name].hit for part in parts])))
    return policies


def policy_rows(
    policies: dict[str, dict[str, list[float]]], seeds: Sequence[int], config: Config
) -> list[dict[str, Any]]:
    """One row a policy and seed."""
    return [
        {"policy": name, "information": rivals.information(name), "reads": _reads(name, config), "seed": seed}
        | {column: values[place] for column, values in row.items()}
        for name, row in policies.items()
        for place, seed in enumerate(seeds)
    ]


def _reads(name: str, config: Config) -> int:
    seen = rivals.lens_rows(config.lens, config.geometry, config.budget)
    return rivals.reads(name, history=config.context.history, horizon=config.context.horizon, rows=seen)


def _configs(arguments: Arguments) -> tuple[Config, dict[tuple[str, int], Config]]:
    """The base model's run, and LensNet's by arm and seed: all of them are checked before the first one starts."""
    preset = load_preset(arguments.preset)
    if preset.data.task != "recall":
        raise ValueError(f"preset {arguments.preset} has data.task {preset.data.task!r}: expected one for recall")
    if not arguments.seeds or len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(f"seeds must name one or more different seeds, got {arguments.seeds}")
    if arguments.steps is not None:
        preset = _settings.replace(preset, steps=arguments.steps)
    if arguments.query is not None:
        scored = preset.context.block_size - arguments.query
        sizes = {"context.horizon": scored, "context.recent_tokens": arguments.query}
        preset = _settings.replace(preset, **{"data.query": arguments.query}, **sizes)
    base = _settings.replace(preset, steps=0, base_run=None, output_dir=str(arguments.output_dir / "base"))
    lens: dict[tuple[str, int], Config] = {
        (arm, seed): _settings.replace(
            preset,
            seed=seed,
            output_dir=str(arguments.output_dir / f"{arm}-{seed}"),
            base_run=base.output_dir,
            **{"objective.targets": arm},
        )
        for seed in arguments.seeds
        for arm in ARMS
    }
    return base, lens


def run_once(config: Config, console: Console) -> dict[str, Any]:
    """A run, from its summary if it is finished, and from its last checkpoint if it was interrupted."""
    folder = Path(config.output_dir)
    if summary := run_folder.read_summary(folder):
        run_folder.open_run(folder, config)  # the summary of another configuration would be no answer
        return summary
    return run(config, resume=(folder / "config.json").is_file(), console=console)


def _print_table(console: Console, summary: dict[str, Any]) -> None:
    """One row a metric, so that it fits into a log of 80 columns."""
    title = f"recall, {summary['compression']:.1f}x, seeds {summary['seeds']}, held-out test sequences"
    table = Table("mean (range over seeds)", *ARMS, title=title)
    for column in COLUMNS:
        values = [np.asarray(summary[arm][column]) for arm in ARMS]
        table.add_row(column, *(f"{x.mean():.3f} ({x.min():.3f}..{x.max():.3f})" for x in values))
    console.print(table)


def _print_policies(console: Console, policies: dict[str, dict[str, list[float]]], config: Config) -> None:
    heads = ("policy", "information", "reads", "shows the answer", "nats per token")
    table = Table(*heads, title="mean (range over seeds)")
    for name, row in policies.items():
        cells = (np.asarray(row[column]) for column in ("hit_rate", "nll"))
        known = (rivals.information(name), str(_reads(name, config)))
        table.add_row(name, *known, *(f"{x.mean():.3f} ({x.min():.3f}..{x.max():.3f})" for x in cells))
    console.print(table)


if __name__ == "__main__":
    main()
