"""One table of several sweeps: what each setting changed in each of them.

    python -m experiments.studies.ablate_table runs/literature/recall runs/literature/tracking runs/literature/text

Prints Markdown: a row a setting, a column a sweep, in it the difference to the sweep's default in nats per token and
its 95 % interval, bold where it is told from 0 after Holm's correction over all settings of all these sweeps.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from experiments import command
from lensjax._settings import settings
from lensjax.evaluation.effects import DEFAULT, holm
from lensjax.evaluation.statistics import LEVEL

UNTRAINED = "untrained"
"""The row of the control that `ablate` adds."""
SHARES = ("context.own_rollouts", "context.proposed_rollouts")
"""Settings whose value is a share of `context.rollouts`, which is each sweep's own."""


@settings()
class Arguments:
    """Which sweeps."""

    sweeps: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that `experiments.studies.ablate` has written."""


@dataclass(frozen=True)
class Cell:
    """What one setting changed in one sweep."""

    text: str
    p: float | None
    """Two-sided, of no difference; None for the default, and where fewer than two seeds count."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(show, Arguments, words, description=__doc__)


def show(arguments: Arguments) -> str:
    """Prints the table and returns it."""
    table = markdown([folder.name for folder in arguments.sweeps], [read(folder) for folder in arguments.sweeps])
    Console(soft_wrap=True).out(table, highlight=False)
    return table


def read(folder: Path) -> dict[str, Cell]:
    """The cells of a sweep by setting, the default first.

    Raises:
      FileNotFoundError: the folder holds no finished sweep.
    """
    file = folder / "effects.csv"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no finished sweep (effects.csv is missing): name the folder of one")
    with file.open(newline="") as lines:
        return {_name(row): Cell(_text(row), float(row["p"]) if row["p"] else None) for row in csv.DictReader(lines)}


def _name(row: dict[str, str]) -> str:
    if row["knob"] == DEFAULT:
        return DEFAULT
    parts = dict(zip(row["knob"].split(" + "), row["value"].split(", "), strict=True))
    if parts == {"steps": "0"}:
        return UNTRAINED
    # Steps make arms cost the same, and a share of the rollouts is another number where there are more of them.
    own = {"steps": None} | {knob: "n" for knob in SHARES}
    named = {knob: own.get(knob, value) for knob, value in parts.items()}
    return ", ".join(f"{knob} {value}" for knob, value in named.items() if value is not None)


def _text(row: dict[str, str]) -> str:
    if row["knob"] == DEFAULT:
        return f"{float(row['mean']):.3f}"
    if not row["difference_low"]:
        return f"{float(row['difference']):+.3f}"
    mean, low, high = (float(row[f"difference{end}"]) for end in ("", "_low", "_high"))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def markdown(names: list[str], sweeps: list[dict[str, Cell]]) -> str:
    """The table, its rows in the order of the first sweep."""
    keys = list(dict.fromkeys(key for sweep in sweeps for key in sweep))
    tested = [
        (key, index) for key in keys for index, sweep in enumerate(sweeps) if key in sweep and sweep[key].p is not None
    ]
    corrected = dict(zip(tested, holm([sweeps[index][key].p or 0.0 for key, index in tested]), strict=True))
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for key in keys:
        cells = [_cell(sweep.get(key), corrected.get((key, index))) for index, sweep in enumerate(sweeps)]
        lines.append(f"| {key if key == DEFAULT else f'`{key}`'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(cell: Cell | None, p: float | None) -> str:
    if cell is None:
        return ""
    return f"**{cell.text}**" if p is not None and p < LEVEL else cell.text


if __name__ == "__main__":
    main()
