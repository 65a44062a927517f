"""Questions asked of the library, each a program: `python -m experiments.train`."""

import contextlib
import os
import signal
import sys
from importlib.util import find_spec
from typing import Any

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells say it."""
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


def end(*signal_and_frame: Any, advice: str = "") -> None:
    """Ends the process with one line, at once: whatever is written can be interrupted anywhere.

    As an exception, Ctrl-C would be lost where callbacks of C++ swallow it, and tear JAX down under its own threads.
    """
    with contextlib.suppress(Exception):
        sys.stdout.write(_SHOW_CURSOR if sys.stdout.isatty() else "")
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, "; ".join(filter(None, ("interrupted", advice))).encode(errors="backslashreplace") + b"\n")
    os._exit(INTERRUPTED)


if sys.argv[:1] == ["-m"] and (missing := [name for name in ("jax", "rich", "tyro") if find_spec(name) is None]):
    sys.exit(
        f"error: {sys.executable} has no {missing[0]}: use .venv/bin/python, which make venv makes, or "
        "pip install -e '.[train,plots,scripts]'"
    )

# In a process that is one of the programs, from now on: its imports take seconds, and Ctrl-C may come then.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
