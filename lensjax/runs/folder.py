"""A run's folder, made or opened by one process alone, with the log in it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
from rich.console import Console

from lensjax.models.nn.attend import Choice
from lensjax.runs.engine import devices, numerics, recovery
from lensjax.runs.store import checkpoint, identity, lock, run_folder, sinks
from lensjax.runs.store.identity import Identity
from lensjax.runs.store.lock import Lock
from lensjax.runs.store.log import RunLogger, read_rows
from lensjax.runs.store.run_folder import RunConfig
from lensjax.runs.store.sinks import LoggingConfig


class Settings(RunConfig, Protocol):
    """What is read of a run's configuration, such as `lensjax.Config`; all of it is part of what run it is."""

    @property
    def save_steps(self) -> int: ...  # noqa: D102
    @property
    def logging(self) -> LoggingConfig: ...  # noqa: D102


@dataclass(frozen=True)
class Claim:
    """What a process may write in a run's folder, and under which name."""

    identity: Identity
    """Goes into every checkpoint."""
    require: Callable[[], None]
    """Raises `FileNotFoundError` where the folder is no longer that of the run; called in all processes at once."""


@contextmanager
def open_run(
    config: Settings,
    steps: Mapping[str, str],
    *,
    resume: bool,
    console: Console,
    data: str | None = None,
    weights: Callable[[], str | None] = lambda: None,
    attention: Choice | None = None,
) -> Iterator[tuple[Path, RunLogger, Claim]]:
    """Makes or opens the folder of a run, in the first process, and the log in it; no other run can while it is open.

    Args:
      config: the run's.
      steps: all phases that a run of this kind has, in their order, each with the setting of its number of steps.
      resume: go on with a run: damaged checkpoints are moved aside, and rows after the newest one are dropped.
      console: is told the folder, and what changed since the start before.
      data: digest of what the run reads; None where its config says it all.
      weights: the digest of what it begins with; asked where no checkpoint says so.
      attention: what computes it, to be told with the device.

    Yields:
      The folder, the log, and what checkpoints are written with.

    Raises:
      BlockingIOError: another process has the folder; names it.
      ImportError: the extra of one of `logging.sinks` is not installed.
      ValueError: it is another run than that of the newest checkpoint; see also `lensjax.runs.store.run_folder`.
      OSError: see `lensjax.runs.store.run_folder`.
    """
    folder, phases = Path(config.output_dir), tuple(steps)
    held: list[Lock] = []
    notes: list[str] = []

    def take() -> None:
        (run_folder.config_path if resume else run_folder.require_free)(folder)
        folder.mkdir(parents=True, exist_ok=True)
        held.append(lock.take(folder))
        if not held[0].is_exclusive:
            notes.append(f"the file system has no locks: see to it that no other process goes on with {folder}")
        (run_folder.open_run if resume else run_folder.create_run)(folder, config)

    def require() -> None:
        devices.in_first(lambda: held[0].require())

    sinks.require_installed(config.logging)
    try:
        devices.in_first(take)
        device = ", ".join([jax.default_backend(), *([str(attention)] if attention else [])])
        console.out(f"run folder {folder}, {device}, seed {config.seed}", highlight=False)
        plan = recovery.plan(folder, phases) if resume else None
        restored = None if plan is None else plan.restored
        stored = None if restored is None else _stored(folder, *restored)
        began_with = weights() if stored is None else stored["weights"]
        own = identity.of(config, data=data, weights=began_with)
        if restored is not None:
            if stored is not None:
                notes += _allowed_changes(folder, stored, own, restored[0], steps)
            _require_checkpoints(folder, restored, config.save_steps, phases)
            devices.in_first(lambda: notes.extend(run_folder.add_environment(folder, config)))
        notes += numerics.set_aside()
        for note in notes:
            console.out(note, highlight=False)
        own_folder, values = folder if devices.is_first() else None, identity.flat(config)
        with RunLogger(own_folder, resume=restored, phases=phases, logging=config.logging, values=values) as logger:
            if plan is not None:  # all is as it should be: only now the folder is changed
                repairs: list[str] = []
                devices.in_first(lambda: repairs.extend(plan.repair()))
                for line in repairs:
                    console.out(line, highlight=False)
            yield folder, logger, Claim(own, require)
        require()
    finally:
        for one in held:
            one.release()


def require_unused(output_dir: str | Path) -> None:
    """Looks, in the first process, whether no other process goes on with a run.

    Raises:
      BlockingIOError: one does; names it.
    """
    devices.in_first(lambda: lock.require_free(Path(output_dir)))


def _stored(folder: Path, phase: str, step: int) -> Identity | None:
    """The identity in the checkpoint to go on from; None where there is no checkpoint."""
    return checkpoint.identity(run_folder.checkpoint_dir(folder, phase), step) if step else None


def _allowed_changes(folder: Path, stored: Identity, own: Identity, phase: str, steps: Mapping[str, str]) -> list[str]:
    """Sentences on what changed since the newest checkpoint and leaves the run the same one."""
    allowed, refused = identity.compare(stored, own, phase=phase, steps=steps)
    if refused:
        raise ValueError(
            f"{folder} is not the run that its newest checkpoint was written by: {'; '.join(refused)}. Put back what "
            f"changed (settings are in {folder}/config.json), or start a new run; more steps, other folders, "
            "logging, logging_steps, save_steps and other devices are allowed"
        )
    return allowed


def _require_checkpoints(folder: Path, restored: tuple[str, int], save_steps: int, phases: tuple[str, ...]) -> None:
    """Without any checkpoint a run begins again, unless its rows tell that it had saved one."""
    if restored != (phases[0], 0):
        return
    rows = read_rows(folder)
    later = [row for row in rows if row["phase"] != rows[0]["phase"] or row["step"] > save_steps]
    if later:
        raise FileNotFoundError(
            f"{folder}/checkpoints holds no checkpoint, and metrics.jsonl goes to {later[-1]['phase']} step "
            f"{later[-1]['step']}: put the checkpoints back (is their disk mounted?), or start a new run"
        )
