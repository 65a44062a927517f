"""Inputs of all kinds, each in a forked process, and what is wrong with what came of them."""

import hashlib
import importlib
import multiprocessing
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from tests.fuzz import kinds

LIMIT = 20
"""Seconds of computing that an input may take: on a machine with other work the clock says nothing."""
PATIENCE = 120.0
"""Seconds by the clock: one that waits for something does not compute."""
USAGE = 2
"""The exit code of a command line that is none; its message is a box of several lines."""
UNKNOWN = "LENSJAX_TRACEBACK=1 shows"
"""In the line that the programs end with on an exception that is none of their messages."""
NOTES = (".lock", "environment.json")
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Case:
    """One input."""

    shown: str
    """What a person would type or write to see the same."""
    act: Callable[[], object]
    """The program, called in a process of its own whose working folder is the case's."""
    leaves: Path | None = None
    """What must be as it was before (mostly: not there) where the program fails; None where all may change."""
    expects: object = None
    """Whatever `Kind.check` wants to know."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    case: Case
    folder: Path
    code: int | None
    """The exit code, minus a signal's number, or None where the limit was passed."""
    output: str
    errors: str
    seconds: float
    changed: list[str]
    """Files and folders of `case.leaves` that are not as they were before."""


class Kind(Protocol):
    """A kind of inputs."""

    @property
    def name(self) -> str: ...

    def make(self, rng: random.Random, folder: Path) -> Case:
        """Draws an input, and writes the files that it names below an empty folder."""
        ...

    def check(self, outcome: Outcome) -> str:
        """What is wrong with a program that ended with exit code 0; empty where it did what was asked."""
        ...


def all_kinds() -> list[Kind]:
    """The kinds of `tests/fuzz/kinds/`, by name."""
    modules = (
        importlib.import_module(f"{kinds.__name__}.{found.name}") for found in pkgutil.iter_modules(kinds.__path__)
    )
    return sorted((module.KIND for module in modules), key=lambda kind: kind.name)


@dataclass(frozen=True)
class Report:
    """What came of many inputs."""

    counts: dict[str, Counter[str]]
    """By kind: how many were accepted, refused, and wrong."""
    faults: list[str]
    """One for each wrong input: how to see it again, and what is wrong."""


def fuzz(
    chosen: Iterable[Kind],
    numbers: Iterable[int],
    *,
    seed: int,
    jobs: int = 2,
    tell: Callable[[str], object] = lambda line: None,
) -> Report:
    """Runs the inputs of some numbers of every kind.

    Args:
      chosen: the kinds.
      numbers: of the inputs; each is drawn by seed, kind and number alone.
      seed: of all.
      jobs: processes at a time.
      tell: is told of each fault as it comes.
    """
    chosen, numbers = list(chosen), list(numbers)
    counts: dict[str, Counter[str]] = {kind.name: Counter() for kind in chosen}
    faults = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:

        def made() -> Iterator[tuple[tuple[Kind, int], Case, Path]]:
            for number in numbers:
                for kind in chosen:
                    folder = Path(temporary, kind.name, str(number))
                    folder.mkdir(parents=True)
                    yield (kind, number), kind.make(random.Random(f"{seed}/{kind.name}/{number}"), folder), folder

        for ((kind, number), case), outcome in run_each(made(), jobs=jobs, computing=LIMIT):
            wrong = verdict(kind, outcome)
            counts[kind.name]["wrong" if wrong else "accepted" if outcome.code == 0 else "refused"] += 1
            if wrong:
                faults.append(f"--seed {seed} --only {kind.name}:{number}  {case.shown}\n    {wrong}")
                tell(faults[-1])
            shutil.rmtree(outcome.folder, ignore_errors=True)
    return Report(counts, faults)


def verdict(kind: Kind, outcome: Outcome) -> str:
    """What is wrong with an outcome; empty where nothing is."""
    tail = outcome.errors[-2000:]
    if outcome.code in (None, -signal.SIGXCPU):
        return f"still busy after {LIMIT} s of computing, or {PATIENCE:.0f} s of waiting"
    if "Traceback (most recent call last)" in outcome.errors + outcome.output:
        return f"a traceback: {tail}"
    if UNKNOWN in outcome.errors:
        return f"an error that nobody meant for a person: {tail}"
    if outcome.code == 0:
        return kind.check(outcome)
    if outcome.code < 0:
        return f"died by signal {-outcome.code}: {tail}"
    lines = [line for line in outcome.errors.splitlines() if line.strip()]
    if outcome.code != USAGE and not (lines and re.match(r"error: \S", lines[-1])):
        return f"exit code {outcome.code} without a line of error: {tail}"
    if outcome.code != USAGE and len(lines) > 1 + sum(line.startswith("warning: ") for line in lines):
        return f"more than one line: {tail}"
    return f"left or changed {', '.join(outcome.changed[:5])} after {tail}" if outcome.changed else ""


def run_alone(case: Case, folder: Path, *, limit: float = PATIENCE) -> Outcome:
    """Runs one case in a forked process, which is killed after some seconds."""
    (((_, _), outcome),) = run_each([("", case, folder)], jobs=1, limit=limit)
    return outcome


def run_each(
    made: Iterable[tuple[Any, Case, Path]], *, jobs: int, limit: float = PATIENCE, computing: int | None = None
) -> Iterator[tuple[tuple[Any, Case], Outcome]]:
    """Runs cases in forked processes, a few at a time.

    Args:
      made: of every case a label, the case, and its folder.
      jobs: processes at a time.
      limit: seconds by the clock after which one is killed.
      computing: seconds of computing after which one is killed.

    Yields:
      Label, case and outcome, in the order in which they end.
    """
    busy: list[_Busy] = []
    waiting = iter(made)
    while True:
        while len(busy) < jobs and (item := next(waiting, None)) is not None:
            busy.append(_Busy(*item, limit, computing))
        if not busy:
            return
        soonest = min(one.ends for one in busy)
        connection.wait([one.process.sentinel for one in busy], timeout=max(0.0, soonest - time.monotonic()))
        for one in [one for one in busy if one.is_over()]:
            busy.remove(one)
            yield (one.label, one.case), one.outcome()


class _Busy:
    """A case in its process."""

    def __init__(self, label: Any, case: Case, folder: Path, limit: float, computing: int | None) -> None:
        self.label, self.case, self._folder = label, case, folder
        self._before = fingerprint(case.leaves)
        self._streams = [folder.with_name(f"{folder.name}.{name}") for name in ("output", "errors")]
        self.process = FORK.Process(target=_act, args=(case.act, folder, self._streams, computing))
        sys.stdout.flush()
        sys.stderr.flush()
        self._began = time.monotonic()
        self.ends = self._began + limit
        self.process.start()

    def is_over(self) -> bool:
        return not self.process.is_alive() or time.monotonic() >= self.ends

    def outcome(self) -> Outcome:
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        self.process.join()
        output, errors = (path.read_text(errors="replace") if path.exists() else "" for path in self._streams)
        after = fingerprint(self.case.leaves)
        paths = sorted(self._before.keys() | after.keys())
        changed = [path for path in paths if self._before.get(path) != after.get(path)]
        return Outcome(self.case, self._folder, code, output, errors, time.monotonic() - self._began, changed)


def _act(act: Callable[[], object], folder: Path, streams: Sequence[Path], computing: int | None) -> None:
    if computing is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (computing, computing + 5))
    for number, path in enumerate(streams, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.chdir(folder)
    try:
        act()
    finally:
        sys.stdout.flush()


def fingerprint(path: Path | None) -> dict[str, str]:
    """Every file and folder at or below a path, with a sum of what it holds; empty where there is nothing.

    Who had a run's folder, and from where, may be noted in it at any time.
    """
    if path is None or not path.exists():
        return {}
    below = [path, *path.rglob("*")] if path.is_dir() else [path]
    kept = (one for one in below if one.name not in NOTES)
    return {str(one): hashlib.sha256(one.read_bytes()).hexdigest() if one.is_file() else "" for one in kept}
