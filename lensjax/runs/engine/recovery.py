"""Which checkpoints of a run are whole, and how it goes on where the newest ones are not."""

import logging
from dataclasses import dataclass
from pathlib import Path

from lensjax.runs.store import checkpoint, run_folder
from lensjax.runs.store.checkpoint import DamagedError


@dataclass(frozen=True)
class Found:
    """What can be read of the checkpoints in a directory."""

    step: int | None
    """The newest one that is whole; None where there is none."""
    kept: int | None
    """The step whose parameters are the phase's result so far: with patience that of its best evaluation."""
    damages: tuple[DamagedError, ...]
    """What is wrong with newer ones, the newest first."""

    def warn(self) -> None:
        """Logs what is wrong, and what is read instead."""
        instead = "there is none before it" if self.step is None else f"step {self.step} is read instead"
        for damage in self.damages:
            logging.getLogger(__name__).warning("checkpoint %s is damaged: %s; %s", damage.folder, damage.what, instead)


def newest(directory: Path) -> Found:
    """Looks for the newest checkpoint that is whole, and so is the one that it keeps as its best.

    Raises:
      ValueError: a checkpoint lies under the number of another one.
    """
    damages: list[DamagedError] = []
    for step in reversed(checkpoint.steps(directory)):
        try:
            return Found(step, _kept(directory, step), tuple(damages))
        except DamagedError as damage:
            damages.append(damage)
    return Found(None, None, tuple(damages))


@dataclass(frozen=True)
class Plan:
    """How a run goes on."""

    restored: tuple[str, int]
    """Phase and step of the newest checkpoint that is whole, of the last phase that has one; step 0 of the first phase
    where none has."""
    found: dict[str, Found]
    """By the name of a phase or of a frozen part."""

    def repair(self) -> list[str]:
        """Renames the damaged checkpoints, so that they count no more, in a run that no other process works on.

        Returns:
          What was damaged, where it is now, and what happens instead: a line for each.
        """
        lines = []
        for name, one in self.found.items():
            then = "is made anew" if one.step is None else f"goes on from step {one.step}"
            for damage in one.damages:
                aside = checkpoint.set_aside(damage.folder.parent, int(damage.folder.name))
                what = f"checkpoint {damage.folder} is damaged: {damage.what}"
                lines.append(f"warning: {what}; it was moved to {aside.name}, and {name} {then}")
        return lines


def plan(run_dir: Path, phases: tuple[str, ...]) -> Plan:
    """Looks for what a run can go on from; nothing is written.

    Args:
      run_dir: the folder of the run.
      phases: all that a run of this kind has, in their order.

    Returns:
      `Plan`.

    Raises:
      DamagedError: there are checkpoints, and no phase has one that is whole.
      ValueError: see `newest`.
    """
    found = {phase: newest(run_folder.checkpoint_dir(run_dir, phase)) for phase in phases}
    restored = [(phase, one.step) for phase, one in found.items() if one.step is not None]
    damages = [damage for one in found.values() for damage in one.damages]
    if damages and not restored:
        raise damages[0]
    frozen = run_folder.frozen_dir(run_dir, "*").parent
    found |= {f"the frozen {path.name}": newest(path) for path in sorted(frozen.glob("*"))}
    return Plan(restored[-1] if restored else (phases[0], 0), found)


def _kept(directory: Path, step: int) -> int:
    saved = checkpoint.data_state(directory, step)
    if not isinstance(saved, dict) or "stopping" not in saved:
        return step
    best = int(saved["stopping"]["step"])
    folder = directory.absolute() / str(step)
    if best not in checkpoint.steps(directory):
        raise DamagedError(folder, f"the checkpoint of its best step, {best}, is missing")
    try:
        checkpoint.data_state(directory, best)
    except DamagedError as damage:
        raise DamagedError(folder, f"the checkpoint of its best step, {best}, is damaged: {damage.what}") from damage
    return best
