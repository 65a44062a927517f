"""Were two streams read the same, to the bit?

    python -m experiments.studies.stream_same runs/stream-long/unbroken runs/stream-long/stopped

Compares the SHA-256 that `experiments.studies.stream` leaves for each percent of a stream.
"""

import json
from pathlib import Path

import tyro
from rich.console import Console

from experiments import command
from lensjax._settings import settings


@settings()
class Arguments:
    """What to compare."""

    one: tyro.conf.Positional[Path]
    """Folder of a stream that was read."""
    other: tyro.conf.Positional[Path]
    """Likewise."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(compare, Arguments, words, description=__doc__)


def compare(arguments: Arguments) -> None:
    """Says that they are the same.

    Raises:
      ValueError: they are not, or one is longer.
    """
    one, other = (_rows(folder) for folder in (arguments.one, arguments.other))
    different = [number for number, pair in enumerate(zip(one, other, strict=False), start=1) if pair[0] != pair[1]]
    if different or len(one) != len(other):
        raise ValueError(
            f"{arguments.one} has {len(one)} percent of a stream, {arguments.other} {len(other)}; "
            f"{len(different)} of them differ{f', first {different[0]} %' if different else ''}"
        )
    Console().out(f"all {len(one)} percent are the same to the bit, {one[-1][0]:,} tokens", highlight=False)


def _rows(folder: Path) -> list[tuple[int, str]]:
    """Tokens read and digest at the end of each percent."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["tokens_read"], row["sha256"]) for row in rows]


if __name__ == "__main__":
    main()
