"""Progress bars: on a terminal, and nowhere else."""

from rich.console import Console


def has_bars(console: Console) -> bool:
    """Whether progress bars can be seen. In a file they would be escapes, whatever `FORCE_COLOR` says of colours.

    Example:
      >>> import io
      >>> has_bars(Console(file=io.StringIO(), force_terminal=True))
      False
    """
    return console.is_terminal and console.file.isatty()
