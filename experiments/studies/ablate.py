"""Trains LensNet under many settings and seeds on one frozen base model, and reports what each setting changes.

    python -m experiments.studies.ablate recall --base-run runs/recall/base --output-dir runs/ablation
    python -m experiments.studies.ablate recall --base-run runs/recall/base --output-dir runs/ablation --resume

The first argument names a file of `experiments/sweeps/` (or is the path of such a file) that defines `SWEEP`. Settings
that differ in hyperparameters only are arms of one compiled program; each other difference makes one more program. All
arms of a seed see the same data in the same order. Arms are trained in chunks, spread over all devices (on a CPU its
cores) of all processes: what is interrupted loses the chunk in flight, and `--resume` trains only what is missing.
Leaves `arms.csv`, one row an arm, and what each setting changes: `report.md`, `effects.csv` and `effects.png`.
"""

import contextlib
import functools
import itertools
import json
import math
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments import command
from experiments.studies import ablate_arms
from experiments.studies.ablate_arms import Arm
from experiments.tables import write_csv
from experiments.train import load_object, load_preset
from lensjax import _settings
from lensjax._settings import PositiveInt, settings
from lensjax.evaluation import compare, effects
from lensjax.models import Params
from lensjax.plots import style
from lensjax.plots.effects import forest
from lensjax.runs import sweep
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.engine import devices
from lensjax.runs.load import load_start
from lensjax.runs.store import files, identity, lock, paths, run_folder
from lensjax.runs.store.identity import Identity
from lensjax.runs.sweep import Sweep

SWEEPS = Path(__file__).parents[1] / "sweeps"
METRICS = {
    "preference_agreement": "mc/preference_agreement",
    "preference_agreement_lod_only": "mc/preference_agreement_lod_only",
    "preference_corr_mean": "mc/preference_corr_mean",
    "swap_rate": "mc/swap_rate",
    "policy_score_abs_mean": "mc/policy_score_abs_mean",
    "adv_delta_mean": "mc/adv_delta_mean",
    "adv_delta_std": "mc/adv_delta_std",
    "hit_rate": "hit_rate",
}
"""Columns of the table, and the held-out metrics that they show; a task without a metric has no such column."""
REPORTED = (
    *("gap_closed_oracle", "hit_rate", "preference_agreement", "preference_agreement_lod_only"),
    *("preference_corr_mean", "swap_rate"),
)
"""Further columns of the report, where the table has them."""

Row = dict[str, Any]
UNTRAINED = {"steps": 0}
"""How the control appears among the settings: the LensNet that the default starts from, of each seed. What training
has not made better than that has learned nothing."""


@settings()
class Arguments:
    """What to run."""

    sweep: tyro.conf.Positional[str]
    """Name in `experiments/sweeps/`, or path, of a Python file that defines SWEEP."""
    base_run: Path
    """Run folder whose base model and GistNet all arms share."""
    output_dir: Path
    chunk: PositiveInt = 32
    """Arms trained at a time, at most."""
    at_once: PositiveInt | None = None
    """Arms computed together (`vmap`), for accelerators; None computes one after the other."""
    resume: bool = False
    """Go on with an interrupted sweep."""


def main(words: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    command.program(ablate, Arguments, words, description=__doc__, several=True)


def ablate(arguments: Arguments) -> list[Row]:
    """Runs the sweep and returns the rows of `arms.csv`; all arms are checked before the first one is trained.

    Of several processes each trains arms on its devices; the first one has the folder, and the rows.
    """
    console = Console(quiet=not devices.is_first())
    plan = load_sweep(arguments.sweep)
    arms = _arms(plan, arguments.base_run)
    groups = [_Group(members, _start(members[0].config)) for members in _by_structure(arms)]
    first, folder = arms[0].config, arguments.output_dir
    own = identity.of(first, data=data.digest(first), weights=identity.digest(groups[0].params))
    swept = list(dict.fromkeys(name for arm in arms for name in arm.setting))
    table: list[Row] = []
    with contextlib.ExitStack() as held:

        def open_() -> None:
            _open(arguments, plan, arms, own)
            held.enter_context(lock.holding(folder))
            for change in run_folder.add_environment(folder, first):
                console.out(change, highlight=False)
            (folder / "arms").mkdir(exist_ok=True)

        def close() -> None:
            table.extend(_row(arm, bounds[_measured_on(arm.config)], swept, folder) for arm in arms)
            write_csv(table, folder / "arms.csv")
            _report(arguments, plan, arms, table, swept)

        devices.in_first(open_)
        bounds = _trained(arguments, groups, console)
        devices.in_first(close)
    console.out(f"{len(arms)} arms are in {folder}/arms.csv, what they say in report.md", highlight=False)
    return table


def _trained(arguments: Arguments, groups: Sequence["_Group"], console: Console) -> dict[Hashable, tuple[float, float]]:
    """Trains all arms that are not there, and measures what bounds the loss of each."""
    bounds: dict[Hashable, tuple[float, float]] = {}
    for group in groups:
        for chunk in group.chunks(arguments.chunk):
            # All processes train a chunk or none: a file that the first has written may be news to another.
            if devices.largest(int(not all(arm.file(arguments.output_dir).is_file() for arm in chunk))):
                ablate_arms.train(chunk, group.params, arguments.output_dir, at_once=arguments.at_once, console=console)
        for arm in group.arms:
            if (key := _measured_on(arm.config)) not in bounds:
                bounds[key] = ablate_arms.bounds(arm.config, group.params)
        # Compiled programs stay mapped into memory, and a process may hold only so many mappings.
        jax.clear_caches()
    return bounds


def load_sweep(name: str) -> Sweep:
    """The sweep of a name in `experiments/sweeps/`, or of a Python file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it defines no `SWEEP`.
    """
    path = paths.absolute(name, name="the sweep") if Path(name).suffix == ".py" else SWEEPS / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SWEEPS.glob("*.py")))
        raise FileNotFoundError(f"no sweep {path}; name a Python file, or one of: {known}")
    return load_object(path, "SWEEP", Sweep)


def _arms(plan: Sweep, base_run: Path) -> list[Arm]:
    """Every setting with every seed, the default first, and last what the default starts from.

    Raises:
      ValueError: a setting is not valid, has patience, or is measured on one batch alone.
    """
    default = _settings.replace(load_preset(plan.preset), **plan.changes, base_run=str(base_run))
    arms = [
        Arm(setting, _settings.replace(default, seed=seed, output_dir="-", **setting))
        for setting in plan.settings()
        for seed in plan.seeds
    ]
    for arm in arms:
        if arm.config.stopping.patience is not None:
            raise ValueError(
                "arms are compared after the same number of steps: stopping.patience must be None in a sweep, "
                f"got {arm.config.stopping.patience}"
            )
        if arm.config.eval_batches < 2:
            raise ValueError(
                f"intervals are over held-out batches: eval_batches must be 2 or more, got {arm.config.eval_batches}"
            )
    return arms + [replace(arm, setting=UNTRAINED, is_trained=False) for arm in arms[: len(plan.seeds)]]


def _by_structure(arms: Sequence[Arm]) -> list[list[Arm]]:
    groups: dict[Hashable, list[Arm]] = {}
    for arm in arms:
        groups.setdefault((arm.is_trained, sweep.structure(arm.config)), []).append(arm)
    return list(groups.values())


@dataclass(frozen=True)
class _Group:
    """Arms that one program can train, and the models they share."""

    arms: list[Arm]
    params: dict[str, Params]

    def chunks(self, size: int) -> Iterator[list[Arm]]:
        # Of one size, or nearly: most chunks then share what is compiled.
        count = math.ceil(len(self.arms) / size)
        edges = [len(self.arms) * index // count for index in range(count + 1)]
        for first, last in itertools.pairwise(edges):
            yield self.arms[first:last]


def _start(config: Config) -> dict[str, Params]:
    start = load_start(config, config.build_models())
    assert start is not None
    return start


def _open(arguments: Arguments, plan: Sweep, arms: Sequence[Arm], own: Identity) -> None:
    """Makes the sweep's folder, or checks that it is one of the same sweep, with the same data and base model."""
    folder, file = arguments.output_dir, arguments.output_dir / "sweep.json"
    described = {"plan": asdict(plan), "arms": {arm.name: arm.setting for arm in arms}, "identity": own}
    command.check_free(folder, resume=arguments.resume)
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(file, json.dumps(described, indent=2) + "\n")
        return
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no sweep (sweep.json is missing): name the folder of a sweep")
    stored, now = json.loads(file.read_text()), json.loads(json.dumps(described))
    if "identity" in stored and (changes := identity.different(stored["identity"], own)):
        raise ValueError(
            f"{folder} was begun with another preset, base run or data: {'; '.join(changes)}. Choose another "
            "--output-dir, or take the change back"
        )
    if any(stored.get(key) != now[key] for key in ("plan", "arms")):
        raise ValueError(
            f"{folder} was begun with another sweep or preset than {arguments.sweep} is now: "
            "choose another --output-dir, or take the change back"
        )


def _row(arm: Arm, bounds: tuple[float, float], swept: Sequence[str], folder: Path) -> Row:
    stored = json.loads(arm.file(folder).read_text())
    metrics, diverged = stored["metrics"], stored["diverged"]
    gap = None if diverged else compare.gap_closed(metrics["nll_policy"], *bounds)
    row: Row = {name: arm.setting.get(name, _value(arm.config, name)) for name in swept}
    row |= {"seed": arm.config.seed, "nll": metrics["nll_policy"], "gap_closed_oracle": gap}
    row |= {column: metrics[name] for column, name in METRICS.items() if name in metrics}
    return row | {"diverged": diverged, "steps": arm.config.steps if arm.is_trained else 0}


def _measured_on(config: Config) -> Hashable:
    """What recency and the search depend on: arms that have it in common are measured against one pair of bounds."""
    batches = (config.data, config.batch_size, config.eval_batches, config.dtype)
    return (*batches, config.context.geometry, config.context.horizon, config.hyper.context_end)


def _report(arguments: Arguments, plan: Sweep, arms: Sequence[Arm], table: Sequence[Row], swept: Sequence[str]) -> None:
    """Compares every setting with the default."""
    folder = arguments.output_dir
    columns = [name for name in REPORTED if name in table[0]]
    stored = [json.loads(arm.file(folder).read_text()) for arm in arms]
    count, measured = len(plan.seeds), []
    for first in range(0, len(arms), count):
        rows, arms_files = table[first : first + count], stored[first : first + count]
        others = {name: np.asarray([math.nan if row[name] is None else row[name] for row in rows]) for name in columns}
        diverged = np.asarray([row["diverged"] for row in rows])
        nothing = [math.nan] * arms[first].config.eval_batches
        losses = np.asarray([one["nll_by_batch"] or nothing for one in arms_files])
        measured.append(effects.Measured(arms[first].setting, losses, others, diverged))
    differences = effects.effects(measured)
    title = f"{plan.preset}: {len(measured)} settings, {count} seeds"
    command = (
        f"python -m experiments.studies.ablate {arguments.sweep} --base-run {arguments.base_run} --output-dir {folder}"
    )
    default = {name: _value(arms[0].config, name) for name in swept}
    report = effects.markdown(differences, default=default, title=title, columns=columns, command=command)
    files.write_text(folder / "report.md", report)
    write_csv([_effect_row(one) for one in differences], folder / "effects.csv")
    if len(differences) > 1:
        with style.attempt(folder / "effects.png") as path:
            forest(differences, path, default=default, title=title)


def _effect_row(one: effects.Effect) -> Row:
    row = asdict(one)
    return row | row.pop("others")


def _value(config: Any, name: str) -> Any:
    """The field of a dotted name."""
    return functools.reduce(getattr, name.split("."), config)


if __name__ == "__main__":
    # Each core of a CPU becomes a device with arms of its own: one arm cannot keep several busy.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    main()
