"""A run's folder, made or opened, with the log in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console

from lensjax.runs.engine import devices, recovery
from lensjax.runs.store import run_folder
from lensjax.runs.store.log import RunLogger
from lensjax.runs.store.run_folder import RunConfig


@contextmanager
def open_run(
    config: RunConfig, phases: tuple[str, ...], *, resume: bool, console: Console
) -> Iterator[tuple[Path, RunLogger]]:
    """Makes or opens the folder of a run, in the first process, and the log in it.

    Args:
      config: the run's.
      phases: all that a run of this kind has, in their order.
      resume: go on with a run: damaged checkpoints are moved aside, and rows after the newest one are dropped.
      console: is told the folder.

    Yields:
      The folder, and the log.

    Raises:
      ValueError: see `lensjax.runs.store.run_folder`.
      OSError: likewise.
    """
    folder = Path(config.output_dir)
    devices.in_first(lambda: (run_folder.open_run if resume else run_folder.create_run)(folder, config))
    console.out(f"run folder {folder}, {jax.default_backend()}, seed {config.seed}", highlight=False)
    if resume:
        repairs: list[str] = []
        devices.in_first(lambda: repairs.extend(recovery.repair(folder, phases)))
        for line in repairs:
            console.out(line, highlight=False)
    restored = run_folder.restore_point(folder, phases) if resume else None
    with RunLogger(folder if devices.is_first() else None, resume=restored, phases=phases) as logger:
        yield folder, logger
