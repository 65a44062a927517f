"""Progress bars: on a terminal, and nowhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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


@contextmanager
def progress_bar(console: Console, title: str, steps: int, *, done: int) -> Iterator[Callable[[], None]]:
    """A bar of so many steps; what it yields is called after each further one. A file shows evaluations instead."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not has_bars(console)) as progress:
        task = progress.add_task(title, total=steps, completed=done)
        yield lambda: progress.advance(task)
