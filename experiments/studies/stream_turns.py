"""Does a token cost more late in a stream than early? Two saved sessions of it read on, in turns.

    python -m experiments.studies.stream_turns runs/stream-long/stopped/session-10 runs/stream-long/stopped/session-91

A stream takes so long that others use the machine more at one end of it than at the other; in turns both sessions meet
the same. Counted is the time of all cores that this process had.
"""

import time
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from experiments import command
from lensjax._settings import PositiveInt, settings
from lensjax.runs import sessions


@settings()
class Arguments:
    """What to compare."""

    early: tyro.conf.Positional[Path]
    """Folder of a session."""
    late: tyro.conf.Positional[Path]
    """Folder of a session of the same models and shapes that has read more."""
    turns: PositiveInt = 16
    intervals: PositiveInt = 20
    """Of each session in each turn."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(compare, Arguments, words, description=__doc__)


def compare(arguments: Arguments) -> np.ndarray:
    """CPU microseconds a token, float[turns, 2], printed with the ratio of late to early."""
    session, early = sessions.load(arguments.early)
    other, late = sessions.load(arguments.late)
    if other.models != session.models or other.config != session.config:
        raise ValueError(f"{arguments.late} has other models or another shape than {arguments.early}")
    count = arguments.intervals * session.config.interval
    random = np.random.default_rng(0)
    found = np.zeros((arguments.turns + 1, 2))
    for turn in found:
        tokens = random.integers(session.models.base.vocab_size, size=count)
        for place, state in enumerate((early, late)):
            started = time.process_time()
            session.append(state, tokens)
            turn[place] = 1e6 * (time.process_time() - started) / count
    found, console = found[1:], Console()  # the first turn compiles
    for name, state, values in (("early", early, found[:, 0]), ("late", late, found[:, 1])):
        low, middle, high = np.percentile(values, [25, 50, 75])
        console.out(f"{name:<6} {state.read:>12,} tokens read: {middle:.1f} [{low:.1f}, {high:.1f}]", highlight=False)
    low, middle, high = np.percentile(found[:, 1] / found[:, 0], [25, 50, 75])
    console.out(f"late over early, median and quartiles: {middle:.3f} [{low:.3f}, {high:.3f}]", highlight=False)
    return found


if __name__ == "__main__":
    main()
