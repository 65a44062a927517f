"""Writes the models of a run as files to share: safetensors, `config.json` and a model card.

    python -m experiments.export runs/demo shared/demo

The card has the tables of `experiments.evaluate` that are in the run's folder.
"""

from pathlib import Path

import tyro
from rich.console import Console

import lensjax as lx
from experiments import command
from lensjax._settings import settings


@settings()
class Arguments:
    """What to export, and where to."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    folder: tyro.conf.Positional[Path]
    """A folder that is not there, or empty."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(export, Arguments, words, description=__doc__)


def export(arguments: Arguments) -> Path:
    """Exports, and says where to."""
    folder = lx.export(lx.load(arguments.run), arguments.folder)
    Console().out(f"models and model card are in {folder}", highlight=False)
    return folder


if __name__ == "__main__":
    main()
