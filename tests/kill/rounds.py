"""Rounds of interruptions, and whether the run came out as if there had been none."""

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lensjax.runs.store import checkpoint, lock
from tests.fuzz.runner import FORK, Case, Outcome, run_alone
from tests.kill import interrupt
from tests.kill.runs import TRAINERS, Trainer, essence

LIMIT = 300.0
"""Seconds of a process; one that is busy for longer hangs."""
MIX = ("train", "rlan", "train", "quiet_star", "train", "train", "train-whole", "train", "train", "train")
"""The trainers of rounds, in turns."""


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing interrupted."""

    essence: str
    writes: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """What came of all rounds."""

    counts: Counter[str]
    faults: list[str]


def rounds(
    count: int, *, seed: int, mix: tuple[str, ...] = MIX, tell: Callable[[str], object] = lambda line: None
) -> Report:
    """Interrupts `count` runs, each drawn by seed and number alone but for the moments that a clock decides.

    Args:
      count: rounds.
      seed: of all.
      mix: the trainers, in turns.
      tell: is told of each round as it ends.
    """
    counts: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        unbroken: dict[str, Unbroken] = {}
        for number in range(count):
            trainer, folder = TRAINERS[mix[number % len(mix)]], Path(temporary, str(number))
            if trainer.name not in unbroken:
                unbroken[trainer.name] = _unbroken(trainer, Path(temporary, trainer.name))
            one = _Round(trainer, unbroken[trainer.name], folder, random.Random(f"{seed}/{number}"), counts)
            wrong = one.play()
            line = f"round {number} of seed {seed}, {trainer.name}: {'; '.join(one.story)}"
            faults += [f"{line}\n    {wrong}"] if wrong else []
            tell(f"{line}: {wrong or 'the same'}")
            counts["rounds of " + trainer.name] += 1
            shutil.rmtree(folder)
    return Report(counts, faults)


def _unbroken(trainer: Trainer, folder: Path) -> Unbroken:
    """The second of two runs: what is compiled is then in the cache, as it will be in the rounds."""
    for name in ("first", "second"):
        (folder / name).mkdir(parents=True)
        run, writes = folder / name / "run", folder / f"{name}.writes"

        def act(run: Path = run, writes: Path = writes) -> None:
            interrupt.at_writes(run, interrupt.count_into(writes))
            trainer.start(run)

        outcome = _alone(act, folder / name)
        assert outcome.code == 0, outcome.errors
    return Unbroken(_essence_of(run), int(writes.read_text()), outcome.seconds)


def _essence_of(run: Path) -> str:
    """In a process of its own, since this one must not use JAX."""
    outcome = _alone(lambda: print(essence(run)), run.parent)
    assert outcome.code == 0, outcome.errors
    return outcome.output


def _alone(act: Callable[[], object], folder: Path, *, kill_after: float | None = None) -> Outcome:
    """A process to its end, or killed after some seconds."""
    return run_alone(Case("", act), folder, limit=LIMIT if kill_after is None else kill_after)


class _Round:
    """One run, interrupted again and again."""

    def __init__(
        self, trainer: Trainer, unbroken: Unbroken, folder: Path, rng: random.Random, counts: Counter[str]
    ) -> None:
        self._trainer, self._unbroken, self._rng, self._counts = trainer, unbroken, rng, counts
        self._folder, self._run = folder, folder / "run"
        self.story: list[str] = []
        folder.mkdir()

    def play(self) -> str:
        """What is wrong with what came out; empty where nothing is."""
        for _ in range(self._rng.choice((1, 1, 2, 3))):
            wrong = self._rng.choice((self._killed_at_a_write, self._killed_by_the_clock, self._out_of_room))()
            wrong = wrong or (self._locked() if self._rng.random() < 0.25 else "")
            wrong = wrong or (self._damaged() if self._rng.random() < 0.35 else "")
            if wrong:
                return wrong
        wrong = self._two_at_once() if self._rng.random() < 0.25 else ""
        if wrong:
            return wrong
        outcome = _alone(self._go_on, self._folder)
        if outcome.code != 0:
            return f"exit code {outcome.code} at the end: {outcome.errors[-1500:]}"
        return "" if _essence_of(self._run) == self._unbroken.essence else "another run than the unbroken one"

    def _go_on(self) -> None:
        """What a person does: go on, or start where the run never began."""
        (self._trainer.go_on if (self._run / "config.json").is_file() else self._trainer.start)(self._run)

    def _killed_at_a_write(self) -> str:
        write = self._rng.randint(1, self._unbroken.writes)

        def act() -> None:
            interrupt.at_writes(self._run, interrupt.die_at(write))
            self._go_on()

        self._note(f"killed at write {write}", "killed at a write")
        code = _alone(act, self._folder).code
        return "" if code in (0, -9) else f"exit code {code}"

    def _killed_by_the_clock(self) -> str:
        seconds = self._rng.uniform(0.1, 1.0) * self._unbroken.seconds
        self._note(f"killed after {seconds:.2f} s", "killed by the clock")
        outcome = _alone(self._go_on, self._folder, kill_after=seconds)
        return "" if outcome.code in (0, None) else f"exit code {outcome.code}: {outcome.errors[-1500:]}"

    def _out_of_room(self) -> str:
        write = self._rng.randint(1, self._unbroken.writes)

        def act() -> None:
            interrupt.at_writes(self._run, interrupt.full_from(write))
            self._trainer.program(self._go_on)

        self._note(f"disk full from write {write}", "full disk")
        outcome = _alone(act, self._folder)
        if outcome.code == 0:  # as where it went on from near its end
            return ""
        lines = outcome.errors.splitlines()
        if outcome.code != 1 or len(lines) != 1 or not lines[0].startswith("error: no space left on device"):
            return f"exit code {outcome.code} on a full disk: {outcome.errors[-1500:]}"
        return ""

    def _locked(self) -> str:
        """Another process has the run, and is killed in its turn."""
        if not (self._run / "config.json").is_file():
            return ""
        self._note("held by another", "held lock")
        taken = self._folder / "taken"

        def hold() -> None:
            lock.take(self._run)
            taken.touch()
            time.sleep(LIMIT)

        holder = FORK.Process(target=hold)
        holder.start()
        try:
            while not taken.exists():
                time.sleep(0.01)
            outcome = _alone(lambda: self._trainer.program(self._go_on), self._folder)
        finally:
            holder.kill()
            holder.join()
            taken.unlink()
        lines = outcome.errors.splitlines()
        said = len(lines) == 1 and f"in use by process {holder.pid}" in lines[0]
        return "" if outcome.code == 1 and said else f"did not say who has it: {outcome.code} {outcome.errors[-1500:]}"

    def _two_at_once(self) -> str:
        """Two processes go on with the run, one a moment after the other."""
        self._note("two at once", "two at once")
        errors = [self._folder / name for name in ("one.err", "other.err")]

        def act(path: Path) -> None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            self._trainer.program(self._go_on)

        both = [FORK.Process(target=act, args=(path,)) for path in errors]
        for process in both:
            process.start()
            time.sleep(self._rng.uniform(0, 0.5))
        for process in both:
            process.join(LIMIT)
            process.kill()
        said = ["in use by process" in path.read_text() for path in errors]
        codes = [process.exitcode for process in both]
        # The second may come when the first has ended: it finds a finished run, and changes nothing.
        is_right = codes == [0, 0] or sorted(zip(codes, said, strict=True)) == [(0, False), (1, True)]
        return "" if is_right else f"two at once ended with {codes}: {errors[0].read_text()} {errors[1].read_text()}"

    def _damaged(self) -> str:
        """The newest checkpoint of the last phase, where there is one before it."""
        there = sorted((path.stat().st_mtime, path) for path in (self._run / "checkpoints").glob("*/[0-9]*"))
        there = [(time, path) for time, path in there if path.parent.name != "frozen"]
        if not there:
            return ""
        directory = there[-1][1].parent
        steps = checkpoint.steps(directory)
        if len(steps) < 2:
            return ""
        folder = directory / str(steps[-1])
        file = self._rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        how = self._rng.choice(("deleted", "cut", "flipped"))
        held = file.read_bytes()
        if how == "deleted" or not held:
            file.unlink()
        elif how == "cut":
            file.write_bytes(held[: len(held) // 2])
        else:
            place = self._rng.randrange(len(held))
            file.write_bytes(held[:place] + bytes([held[place] ^ 255]) + held[place + 1 :])
        self._note(f"{file.relative_to(self._run)} {how}", "damaged checkpoint")
        return ""

    def _note(self, what: str, kind: str) -> None:
        self.story.append(what)
        self._counts[kind] += 1
