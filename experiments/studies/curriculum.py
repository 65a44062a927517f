"""Does a curriculum that fights back reach 8x on recall with fewer passes of the base model than a fixed one?

    python -m experiments.studies.curriculum
    python -m experiments.studies.curriculum --steps 2000 --seeds 5 6 7 8 9 --output-dir runs/curriculum-2

One base model is pretrained and shared. Then LensNet is trained by preferences alone, in each arm for each seed:
`fixed`, whose length falls with the steps; `none`, as short as at the end from the first step on; `self_play`, whose
length falls while the policy is right often enough; `adversary`, the same with half of the rollouts proposed by an
adversary; `own` and `own_self_play`, `fixed` and `self_play` with half of the rollouts drawn by the policy. All but
`none` go from `--start` to `--end` of the history, with as many rollouts a step, so that a step costs every arm the
same passes. What is measured at the end's length, on held-out sequences, before the first step and as training goes on:
how many passes it took until the policy showed the answer as often as `--target` says, and what it came to. Passes of
LensNet are not counted. Prints a table, and what the rollouts of `none` and `own` could teach; writes `summary.json`,
`curriculum.csv`, one row an arm and seed, and `curriculum.png`.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table

from experiments import command
from experiments.studies.recall import run_once
from experiments.tables import write_csv, write_json
from experiments.train import load_preset
from lensjax import _settings
from lensjax._settings import Count, PositiveInt, Seed, Share, require, settings
from lensjax.evaluation import statistics
from lensjax.evaluation.answers import shows_in_full
from lensjax.models import Models, Params
from lensjax.plots import style
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.fit import EVALUATION_SEED, LENS_STREAM, evaluator, stream
from lensjax.runs.load import load_start
from lensjax.runs.store.log import read_rows
from lensjax.training.scoring import score_variants
from lensjax.training.steps.train_state import init_train_state

MEASURED = {
    "hit_rate": "hit_rate",
    "nll_policy": "nll_policy",
    "nll_baseline": "nll_baseline",
    "agreement": "mc/preference_agreement",
}
"""What is measured, by the names of `held_out.eval_step`."""
Arm = Literal["fixed", "none", "self_play", "adversary", "own", "own_self_play"]


@settings()
class Arguments:
    """What to run; finished runs in the folder are kept and interrupted ones go on."""

    output_dir: Path = Path("runs/curriculum")
    preset: str = "recall_long"
    """Name or path of the config that all runs start from; its rollouts must be local for `own`."""
    arms: tuple[Arm, ...] = ("fixed", "none", "self_play", "adversary", "own", "own_self_play")
    """The first is what the others are compared with."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    resume: bool = False
    """Go on in a folder that is there already."""
    steps: Count = 200
    """LensNet training steps of each run."""
    eval_steps: PositiveInt = 25
    """Steps from one held-out measurement to the next: how exactly the passes are known."""
    start: Share = 0.25
    """Length of a working context at the mildest, as a fraction of the history."""
    end: Share = 0.125
    """And at the hardest, at which all is measured."""
    target: Share = 0.95
    """Share of the held-out sequences whose answer is to be shown."""
    success_target: Share = 0.7
    """Of the ladder."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(compare, Arguments, words, description=__doc__)


def compare(arguments: Arguments) -> dict[str, Any]:
    """Runs every arm for every seed, and returns what `summary.json` holds."""
    console = Console()
    command.check_free(arguments.output_dir, resume=arguments.resume)
    base, lens = configs(arguments)
    run_once(base, console)
    before, told = untrained(lens), {arm: tells(lens, arm) for arm in arguments.arms if arm in ("none", "own")}
    rows: list[dict[str, Any]] = []
    ways: dict[str, list[list[float]]] = {arm: [] for arm in arguments.arms}
    for (arm, seed), config in lens.items():
        run_once(config, console)
        measured = {0: before[seed]} | measurements(config)
        ways[arm].append([one["hit_rate"] for one in measured.values()])
        rows.append({"arm": arm, "seed": seed} | outcome(config, measured, arguments.target))
    rows.sort(key=lambda row: arguments.arms.index(row["arm"]))
    summary = {
        "target": arguments.target,
        "passes_per_step": passes_per_step(base),
        "steps": arguments.steps,
        "seeds": list(arguments.seeds),
        "untrained": {name: [one[name] for one in before.values()] for name in MEASURED},
        "tells": told,
        "arms": {arm: _of_arm([row for row in rows if row["arm"] == arm]) for arm in arguments.arms},
        "differences": _differences(rows, arguments),
    }
    write_json(summary, arguments.output_dir / "summary.json")
    write_csv(rows, arguments.output_dir / "curriculum.csv")
    with style.attempt(arguments.output_dir / "curriculum.png") as path:
        picture({arm: np.asarray(way) for arm, way in ways.items()}, list(measured), arguments.target, path)
    _print(console, summary)
    return summary


def configs(arguments: Arguments) -> tuple[Config, dict[tuple[str, int], Config]]:
    """The base model's run, and LensNet's by arm and seed: all of them are checked before the first one starts."""
    for name in ("arms", "seeds"):
        values = getattr(arguments, name)
        require(0 < len(values) == len(set(values)), f"{name} must name one or more different {name}, got {values}")
    preset = load_preset(arguments.preset)
    require(
        preset.data.task == "recall",
        f"preset {arguments.preset} has data.task {preset.data.task!r}: expected one for recall",
    )
    ends = {"hyper.context_start": arguments.start, "hyper.context_end": arguments.end}
    preset = _settings.replace(preset, **ends, **{"distill.steps": 0})
    folder, half = arguments.output_dir, preset.context.rollouts // 2
    base = _settings.replace(preset, steps=0, base_run=None, output_dir=str(folder / "base"))
    climbs = {"curriculum.name": "self_play", "hyper.success_target": arguments.success_target}
    changes: dict[str, dict[str, Any]] = {
        "fixed": {},
        "none": {"hyper.context_start": arguments.end},
        "self_play": climbs,
        "adversary": {**climbs, "context.proposed_rollouts": half},
        "own": {"context.own_rollouts": half},
        "own_self_play": {**climbs, "context.own_rollouts": half},
    }
    lens: dict[tuple[str, int], Config] = {
        (arm, seed): _settings.replace(
            preset,
            seed=seed,
            steps=arguments.steps,
            eval_steps=arguments.eval_steps,
            base_run=base.output_dir,
            output_dir=str(folder / f"{arm}-{seed}"),
            **changes[arm],
        )
        for seed in arguments.seeds
        for arm in arguments.arms
    }
    return base, lens


def passes_per_step(config: Config) -> int:
    """Contexts that the base model reads in one training step: of each sequence, recency and the rollouts."""
    return config.batch_size * (config.context.rollouts + 1)


def untrained(lens: Mapping[tuple[str, int], Config]) -> dict[int, dict[str, float]]:
    """What is measured of LensNet as each seed's runs find it, before their first step."""
    configs = {seed: config for (_, seed), config in lens.items()}
    first = next(iter(lens.values()))
    models, batches = first.build_models(), _held_out(first)
    params, report = load_start(first, models), evaluator(first, models)
    found = {}
    for seed, config in configs.items():
        key = stream(config, LENS_STREAM)
        state, frozen = init_train_state(key, recipe=first.recipe, models=models, params=params)
        row = report(state, frozen, batches)
        found[seed] = {name: row[place] for name, place in MEASURED.items()}
    return found


def tells(lens: Mapping[tuple[str, int], Config], arm: str) -> dict[str, float]:
    """What the rollouts of an arm could teach an untrained LensNet at the end's length.

    Returns:
      `shown`, the share of them that show the answer, and `differ`, the share of windows in which some do, some do not.
    """
    configs = [config for (name, _), config in lens.items() if name == arm]
    first, shown = configs[0], []
    models, rows = first.build_models(), _held_out(first)
    start = load_start(first, models)
    assert start is not None
    shows = jax.jit(jax.vmap(functools.partial(_shows, models, first), (0, None, 0, 0)))
    for config in configs:
        params = start | {"lens": models.lens.init(stream(config, LENS_STREAM))}
        for index, row in enumerate(rows):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), index), config.batch_size)
            shown.append(np.asarray(shows(keys, params, row["tokens"], row["answers"])))
    every = np.concatenate(shown)
    return {"shown": float(every.mean()), "differ": float(np.mean(every.any(axis=1) & ~every.all(axis=1)))}


def _shows(
    models: Models, config: Config, key: Array, params: dict[str, Params], tokens: Array, answers: Array
) -> Array:
    """bool[N]: which of the rollouts of a history show the answer."""
    drawn = score_variants(
        key,
        params,
        tokens,
        config.budget,
        config.hyper.high_lod_share,
        models=models,
        context=config.context,
        capacity=config.recipe.capacity,
        own_temperature=config.hyper.own_temperature,
    )
    return jax.vmap(lambda one: shows_in_full(one, answers, config.context.geometry))(drawn.contexts)[1:]


def _held_out(config: Config) -> list[dict[str, Array]]:
    size, count = config.batch_size, config.eval_batches
    rows = data.fixed_batches(config, "validation", batch_size=size, count=count, seed=EVALUATION_SEED)
    return [{name: jnp.asarray(values) for name, values in row.items()} for row in rows]


def measurements(config: Config) -> dict[int, dict[str, float]]:
    """What a finished run measured on held-out sequences, by step."""
    rows = [row for row in read_rows(config.output_dir) if row["phase"] == "lens" and "eval/hit_rate" in row]
    return {row["step"]: {name: row[f"eval/{place}"] for name, place in MEASURED.items()} for row in rows}


def outcome(config: Config, measured: Mapping[int, Mapping[str, float]], target: float) -> dict[str, Any]:
    """What a run came to: passes until the target, None where it was missed, its last measurements and its level."""
    there = [step for step, one in measured.items() if one["hit_rate"] >= target]
    levels = [row["curriculum/level"] for row in read_rows(config.output_dir) if "curriculum/level" in row]
    return {
        "passes": there[0] * passes_per_step(config) if there else None,
        **measured[max(measured)],
        "level": levels[-1] if levels else None,
    }


@style.own_look()
def picture(ways: Mapping[str, np.ndarray], steps: Sequence[int], target: float, path: Path) -> None:
    """How often each arm shows the answer as its steps go by, mean over seeds and its 95 % interval."""
    figure = style.new_figure(2.4 * len(ways), 2.6)
    axes = np.atleast_1d(figure.subplots(1, len(ways), sharey=True)).ravel()
    for ax, (arm, way) in zip(axes, ways.items(), strict=True):
        ax.axhline(target, color=style.MUTED, linewidth=0.8, linestyle="--")
        if len(way) > 1:
            low, high = np.transpose([statistics.estimate(at).interval for at in way.T])
            ax.fill_between(steps, low, high, color=style.COLORS[0], alpha=0.25, linewidth=0)
        ax.plot(steps, way.mean(axis=0), color=style.COLORS[0], linewidth=1.4)
        style.dress(ax, arm, "step", "shows the answer" if ax is axes[0] else "")
    style.write(figure, path)


def _of_arm(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0] if name != "arm"}


def _differences(rows: list[dict[str, Any]], arguments: Arguments) -> dict[str, dict[str, float]]:
    """Hit rates beside those of the first arm, seed by seed; none with a single seed."""
    if len(arguments.seeds) < 2:
        return {}
    rates = {arm: np.asarray([row["hit_rate"] for row in rows if row["arm"] == arm]) for arm in arguments.arms}
    first, *others = arguments.arms
    return {arm: vars(statistics.estimate(rates[arm] - rates[first])) for arm in others}


def _print(console: Console, summary: dict[str, Any]) -> None:
    seeds = summary["seeds"]
    title = f"recall, {summary['steps']} steps of {summary['passes_per_step']} passes, seeds {seeds}, held out"
    heads = (f"passes until {summary['target']:.2f}", "reached", "shows the answer", "nats per token", "level")
    table = Table("arm", *heads, title=title)
    before = summary["untrained"]
    table.add_row("untrained", "", "", f"{np.mean(before['hit_rate']):.3f}", f"{np.mean(before['nll_policy']):.3f}", "")
    for arm, of in summary["arms"].items():
        there = [passes for passes in of["passes"] if passes is not None]
        levels = [level for level in of["level"] if level is not None]
        cells = (
            f"{np.mean(there):,.0f}" if there else "-",
            f"{len(there)} of {len(seeds)}",
            f"{np.mean(of['hit_rate']):.3f}",
            f"{np.mean(of['nll_policy']):.3f}",
            f"{np.mean(levels):.1f}" if levels else "-",
        )
        table.add_row(arm, *cells)
    console.print(table)
    for arm, one in summary["tells"].items():
        told = f"{one['shown']:.3f} of them show the answer; in {one['differ']:.3f} of the windows some do, some do not"
        console.out(f"rollouts of {arm}, untrained: {told}", highlight=False)
    for arm, one in summary["differences"].items():
        console.out(f"{arm}: shows the answer {one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}] more often")


if __name__ == "__main__":
    main()
