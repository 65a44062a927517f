"""Questions asked of the library, each a program: `python -m experiments.train`."""

import sys
from types import TracebackType


def _say_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # this process is one of the programs: its imports take seconds, and Ctrl-C may come then
    sys.excepthook = _say_one_line
