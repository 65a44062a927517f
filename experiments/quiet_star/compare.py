"""Finished runs of a task side by side: a table over seeds for each arm, and the curves of all of them.

    python -m experiments.quiet_star.compare runs/quiet_star/pointer

Runs are the folders `<seed>` and `<arm>-<seed>` in the one that is named. Leaves `report.md`, `results.csv` and
`training.png` there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments import command
from experiments.quiet_star import measure, pictures
from experiments.tables import write_csv
from lensjax._settings import require
from lensjax.evaluation import faithfulness
from lensjax.plots import style
from lensjax.runs.store import files, run_folder
from lensjax.runs.store import log as run_logging
from lensjax.training.metrics import UNDEFINED

Summary = dict[str, Any]

MAIN = "own reward"
"""The arm of the folders that are named by a seed alone."""
BAKED = "baked"
"""Prefix of what was measured before REINFORCE; the table's first column."""
CHECKS = ("divergence", "ablation", "correlation", "counterfactual")
ROWS = {
    **{
        f"accuracy_{name}": f"accuracy, {label}"
        for name, label in zip(
            ("without", *measure.ARMS),
            ("no thought", "sampled thoughts", "greedy thoughts", "random thoughts", "another prompt's"),
            strict=True,
        )
    },
    "nll_without": "loss without a thought, nats",
    "nll_sampled": "loss with sampled thoughts, nats",
    "coherence_sampled": "coherence of sampled thoughts",
    "injected": "prompts that get thoughts",
    **{f"rl/anti_theater_{name}": name for name in CHECKS},
}
"""Measurements of the table, and what it calls them."""


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    folder: Annotated[Path, tyro.conf.Positional]


def main(words: list[str] | None = None) -> None:
    """Command line; bad values end it with one message, before anything is written."""
    command.program(lambda arguments: compare(arguments.folder), Arguments, words, description=__doc__)


def compare(folder: Path) -> dict[str, list[Summary]]:
    """Writes the table and the picture, and returns the summaries of each arm, in the order of their seeds.

    Raises:
      ValueError: there is no finished run.
    """
    seeds: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob(f"*/{run_folder.SUMMARY}")):
        if not run_folder.read_summary(path.parent):
            continue  # torn: the run is not finished
        arm, _, seed = path.parent.name.rpartition("-")
        seeds.setdefault(arm or MAIN, []).append((int(seed), path.parent))
    require(
        MAIN in seeds,
        f"no finished run in {folder}: expected folders named by seeds, each with a {run_folder.SUMMARY}",
    )
    runs = {arm: [path for _, path in sorted(seeds[arm])] for arm in sorted(seeds, key=lambda arm: (arm != MAIN, arm))}
    arms = {arm: [run_folder.read_summary(path) for path in paths] for arm, paths in runs.items()}
    write_csv(
        [{"arm": arm, **summary} for arm, of_seeds in arms.items() for summary in of_seeds], folder / "results.csv"
    )
    files.write_text(folder / "report.md", table(arms))
    with style.attempt(folder / "training.png") as picture:
        curves = {arm: [run_logging.read_rows(path) for path in paths] for arm, paths in runs.items()}
        pictures.training(curves, picture, title=f"{arms[MAIN][0]['task']}, validation split")
    return arms


def table(arms: Mapping[str, Sequence[Summary]]) -> str:
    """A Markdown table: mean and, of several seeds, range, as baked and after REINFORCE in each arm."""
    limits = faithfulness.FaithfulnessConfig()
    columns = {BAKED: [_baked(summary) for summary in arms[MAIN]], **arms}
    lines = [
        "| test split | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        "| seeds | " + " | ".join(", ".join(str(row["seed"]) for row in rows) for rows in columns.values()) + " |",
    ]
    for name, label in ROWS.items():
        limit = f" (above {getattr(limits, label)})" if label in CHECKS else ""
        lines.append(f"| {label}{limit} | " + " | ".join(_cell(rows, name) for rows in columns.values()) + " |")
    passed = [
        f"{sum(row['rl/anti_theater_all_passed'] for row in rows):.0f} of {len(rows)}" for rows in columns.values()
    ]
    lines.append("| seeds that pass all four | " + " | ".join(passed) + " |")
    return "\n".join(lines) + "\n"


def _baked(summary: Summary) -> Summary:
    prefix = f"{BAKED}_"
    return {"seed": summary["seed"]} | {
        name.removeprefix(prefix): value for name, value in summary.items() if name.startswith(prefix)
    }


def _cell(rows: Sequence[Summary], name: str) -> str:
    values = np.asarray([row[name] for row in rows if row[name] != UNDEFINED], float)
    if not values.size:
        return UNDEFINED
    spread = f" ({values.min():.3f} to {values.max():.3f})" if len(rows) > 1 else ""
    return f"{values.mean():.3f}{spread}"


if __name__ == "__main__":
    main()
