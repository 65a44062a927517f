"""Preferences, a policy's own edits, or first the ones and then the others: which LensNet is the better one?

    python -m experiments.train recall --steps 0 --output-dir runs/online/base
    python -m experiments.studies.online --base-run runs/online/base --output-dir runs/online/arms

Every seed trains a LensNet on preferences (`start`). From there it goes on with as many steps, on preferences or on its
own edits with one of three kinds of advantages, the last of them also with the credit and the amplification of R3L;
another one learns from its own edits alone, for as many steps in all. Differences of the loss at budget are paired: to
`start`, to going on with preferences, to GAE and to RLOO. Leaves a run folder an arm and seed, `arms.csv`, `report.md`,
`effects.csv` and `effects.png`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from experiments import command
from experiments.studies.recall import run_once
from experiments.tables import write_csv
from lensjax import _settings
from lensjax._numerics import may_be_nan
from lensjax._settings import PositiveInt, Seed, settings
from lensjax.evaluation import compare as comparison
from lensjax.evaluation import effects, held_out
from lensjax.evaluation.effects import Measured
from lensjax.plots import style
from lensjax.plots.effects import forest
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.fit import EVALUATION_SEED
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file, files, run_folder
from lensjax.training.metrics import Metrics
from lensjax.training.steps.train_state import init_train_state

START, ON, GAE, GROUP = "start", "preferences", "gae", "rloo"
"""The arm that the others go on from, the one that goes on as it began, the one on own edits with the defaults, and the
one whose episodes are each other's baseline."""
OWN_EDITS: Mapping[str, Mapping[str, Any]] = {
    GAE: {},
    "one_step": {"online.discount": 0.0},
    GROUP: {"online.advantages": "leave_one_out"},
    "diverging": {"online.advantages": "leave_one_out", "online.credit": "diverging"},
    "amplified": {"online.advantages": "leave_one_out", "online.amplification": 2.0},
}
"""Arms that go on with own edits."""
ALONE = "alone"
"""The arm that learns from own edits (GAE) from the first step on, for as many steps in all."""
COLUMNS = ("gap_closed_oracle", "hit_rate", "seconds_per_step")


@settings()
class Arguments:
    """What to run; finished runs in the folder are kept and interrupted ones go on."""

    base_run: Path
    """Run folder whose base model and GistNet all arms share; its configuration is that of all arms."""
    output_dir: Path
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    steps: PositiveInt = 150
    """Steps of each of the two halves."""
    arms: tuple[Literal["preferences", "gae", "one_step", "rloo", "diverging", "amplified", "alone"], ...] = (
        *("preferences", "gae", "one_step", "rloo", "diverging", "amplified"),
        "alone",
    )
    """What to compare with each other and with `start`."""
    resume: bool = False
    """Go on in a folder that is there already."""


def main(words: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    command.program(compare, Arguments, words, description=__doc__)


def compare(arguments: Arguments) -> list[dict[str, Any]]:
    """Trains every arm with every seed, and returns the rows of `arms.csv`."""
    folder, console = arguments.output_dir, Console()
    command.check_free(folder, resume=arguments.resume)
    arms = plan(arguments)
    measure = _on_test(arms[START][0])
    rows: list[dict[str, Any]] = []
    losses: dict[str, list[np.ndarray]] = {name: [] for name in arms}
    for place, seed in enumerate(arguments.seeds):
        for name, by_seed in arms.items():
            config = by_seed[place]
            seconds = run_once(config, console)["training_seconds"]
            reports = measure(Path(config.output_dir))
            losses[name].append(np.asarray([report["nll_policy"] for report in reports]))
            mean = held_out.mean_over_batches(reports)
            nll = mean["nll_policy"]
            rows.append(
                {
                    "arm": name,
                    "seed": seed,
                    "nll": nll,
                    "gap_closed_oracle": comparison.gap_closed(nll, mean["nll_baseline"], mean["nll_oracle"]),
                    "hit_rate": mean["hit_rate"],
                    "seconds_per_step": seconds / (config.steps + config.online.steps),
                }
            )
    _report(arguments, rows, losses)
    return rows


def plan(arguments: Arguments) -> dict[str, list[Config]]:
    """The configuration of every arm, one a seed; all of them are checked here.

    Raises:
      ValueError: seeds repeat or are fewer than two, there are no arms, or the base run is not one of recall.
    """
    if len(set(arguments.seeds)) < max(2, len(arguments.seeds)):
        raise ValueError(f"seeds must name two or more different seeds, got {arguments.seeds}")
    if not arguments.arms:
        raise ValueError("arms must name one or more of those to compare with start, got none")
    stored = config_file.load(run_folder.config_path(arguments.base_run), Config)
    if stored.data.task != "recall":
        raise ValueError(f"base_run {arguments.base_run} is of task {stored.data.task}: expected one of recall")
    if stored.eval_batches < 2:
        raise ValueError(
            f"intervals are over test batches: eval_batches of base_run must be 2 or more, got {stored.eval_batches}"
        )
    steps, folder = arguments.steps, arguments.output_dir
    half = {"steps": 0, "online.steps": steps}
    # As many episodes a step, from half as many sequences.
    group = {"batch_size": stored.batch_size // 2, "eval_batches": 2 * stored.eval_batches, "online.episodes": 2}

    def arm(name: str, changes: Mapping[str, Any], *, goes_on: bool) -> list[Config]:
        more = group if changes.get("online.advantages") else {}
        by_seed = []
        for seed in arguments.seeds:
            key, start = ("start_from", folder / f"{START}-{seed}") if goes_on else ("base_run", arguments.base_run)
            own = {"base_run": None, "seed": seed, "output_dir": str(folder / f"{name}-{seed}"), key: str(start)}
            by_seed.append(_settings.replace(stored, **{**own, **more, **changes}))
        return by_seed

    arms = {
        START: arm(START, {"steps": steps}, goes_on=False),
        ON: arm(ON, {"steps": steps}, goes_on=True),
        **{name: arm(name, {**half, **changes}, goes_on=True) for name, changes in OWN_EDITS.items()},
        ALONE: arm(ALONE, {"steps": 0, "online.steps": 2 * steps}, goes_on=False),
    }
    return {name: by_seed for name, by_seed in arms.items() if name in (START, *arguments.arms)}


def _on_test(config: Config) -> Callable[[Path], list[Metrics]]:
    """What measures a finished run on the test batches of one configuration, a report a batch."""
    models = config.build_models()
    step = may_be_nan(jax.jit(functools.partial(held_out.eval_step, recipe=config.recipe, models=models)))
    batches = data.fixed_batches(
        config, "test", batch_size=config.batch_size, count=config.eval_batches, seed=EVALUATION_SEED
    )
    key = jax.random.key(EVALUATION_SEED)

    def measure(folder: Path) -> list[Metrics]:
        params = load_params(folder, config, models, ("base", "gist", "lens"))
        state, frozen = init_train_state(key, recipe=config.recipe, models=models, params=params)
        return [
            jax.device_get(step(jax.random.fold_in(key, index), state, batch, frozen))
            for index, batch in enumerate(batches)
        ]

    return measure


def _report(arguments: Arguments, rows: list[dict[str, Any]], losses: dict[str, list[np.ndarray]]) -> None:
    folder, seeds = arguments.output_dir, len(arguments.seeds)

    def measured(name: str, setting: dict[str, Any]) -> Measured:
        mine = [row for row in rows if row["arm"] == name]
        others = {column: np.asarray([row[column] for row in mine]) for column in COLUMNS}
        return Measured(setting, np.stack(losses[name]), others, np.zeros(seeds, bool))

    command = (
        f"python -m experiments.studies.online --base-run {arguments.base_run} --output-dir {folder} "
        f"--steps {arguments.steps} --seeds {' '.join(map(str, arguments.seeds))} --arms {' '.join(arguments.arms)}"
    )
    reports = []
    # The others say whether own edits beat more preferences, other advantages those of GAE, and R3L its own baseline.
    for default in (name for name in (START, ON, GAE, GROUP) if name in losses):
        others = [measured(name, {"arm": name}) for name in losses if name != default]
        differences = effects.effects([measured(default, {}), *others])
        title = f"recall, differences to: {default}"
        settings = {"arm": default}
        reports.append(effects.markdown(differences, default=settings, title=title, columns=COLUMNS, command=command))
        if default == START:
            from_start = differences
    rows_of_effects = [{k: v for k, v in asdict(one).items() if k != "others"} for one in from_start]
    write_csv(rows_of_effects, folder / "effects.csv")
    write_csv(rows, folder / "arms.csv")
    files.write_text(folder / "report.md", "\n".join(reports))
    with style.attempt(folder / "effects.png") as path:
        forest(from_start, path, default={"arm": START}, title=f"recall, differences to: {START}")


if __name__ == "__main__":
    main()
