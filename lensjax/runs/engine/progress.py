"""How far it is: a bar on a terminal, a plain line now and then where there is none."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

EVERY = 60.0
"""Seconds between two lines where there is no terminal."""
_SPEED_FROM, _METRICS_FROM = 60, (76, 100)
"""Columns of a terminal from which on there is room for speed and time left, and for one metric or two."""


def has_bars(console: Console) -> bool:
    """Whether progress bars can be seen. In a file they would be escapes, whatever `FORCE_COLOR` says of colours.

    Example:
      >>> import io
      >>> from rich.console import Console
      >>> from lensjax.runs.engine.progress import has_bars
      >>> has_bars(Console(file=io.StringIO(), force_terminal=True))
      False
    """
    return console.is_terminal and console.file.isatty()


class StepBar:
    """What a phase shows while it runs: steps, steps per second, time left, and metrics.

    Args:
      console: a terminal, which gets a bar, or else a line every `EVERY` seconds.
      title: of the phase.
      steps: of the whole phase.
      done: steps that an earlier start has done.
      clock: seconds, for tests.
    """

    def __init__(
        self, console: Console, title: str, steps: int, *, done: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._title, self._steps, self._done = console, title, steps, done
        self._first, self._clock, self._metrics = done, clock, ""
        self._since = self._told = clock()
        self._bars = Progress(*_columns(console.width), console=console, transient=True, disable=not has_bars(console))
        self._task = self._bars.add_task(title, total=steps, completed=done, speed="", metrics="")

    def advance(self) -> None:
        """Another step is done."""
        self._done += 1
        now = self._clock()
        if has_bars(self._console):
            self._bars.update(self._task, completed=self._done, speed=self._speed(now), metrics=self._metrics)
        elif now - self._told >= EVERY:
            self._told = now
            left = (self._steps - self._done) * (now - self._since) / (self._done - self._first)
            parts = (f"{self._done} of {self._steps}", self._speed(now), f"{_duration(left)} left", self._metrics)
            self._console.out(f"{self._title} {'  '.join(filter(None, parts))}", highlight=False)

    def show(self, metrics: Mapping[str, float]) -> None:
        """The metrics to show from now on: the first two, on a narrow terminal fewer."""
        room = sum(self._console.width >= width for width in _METRICS_FROM) if has_bars(self._console) else 2
        self._metrics = "  ".join(f"{name} {value:.3f}" for name, value in list(metrics.items())[:room])

    def __enter__(self) -> "StepBar":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def _speed(self, now: float) -> str:
        """Mean speed of this start."""
        rate = (self._done - self._first) / max(now - self._since, 1e-9)
        return f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"


def _columns(width: int) -> list[ProgressColumn]:
    """What fits side by side into the columns of a terminal."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(_bar_width(width))]
    columns += [MofNCompleteColumn()]
    if width >= _SPEED_FROM:
        columns += [TextColumn("{task.fields[speed]}"), TimeRemainingColumn()]
    if width >= _METRICS_FROM[0]:
        columns += [TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis"))]
    return columns


def _bar_width(width: int) -> int:
    return min(40, max(8, width // 6))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def work_bar(title: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar on the error stream for work that is done once; what it yields is called with the size of each part."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(_bar_width(console.width)), TaskProgressColumn())
    more = (TimeRemainingColumn(),) if console.width >= _SPEED_FROM else ()
    with Progress(*columns, *more, console=console, transient=True, disable=not has_bars(console)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda part: progress.advance(task, part)
