"""What stands around every program: a console that may go away, Ctrl-C, and one line for whatever goes wrong."""

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import experiments
import lensjax
from lensjax.runs.engine import peers

TRACEBACK = "LENSJAX_TRACEBACK"
"""Environment variable: 1 shows the traceback of what went wrong."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE = "no space left on device"
_LONGEST, _SHORT = 1000, 240  # characters of a message
_ROOTS = (Path(lensjax.__file__).parent, Path(__file__).parent)


@contextmanager
def errors_end() -> Iterator[None]:
    """Inside it, whatever goes wrong ends the process with one line, and a console that goes away is none.

    Exit codes are 1 after an error and 130 after Ctrl-C. `LENSJAX_TRACEBACK=1` shows the traceback above the line.
    """
    with _lasting("stdout"), _lasting("stderr"):
        try:
            yield
        except KeyboardInterrupt as error:
            print("; ".join(("interrupted", *_notes(error))), file=sys.stderr)
            peers.leave(experiments.INTERRUPTED)
            sys.exit(experiments.INTERRUPTED)
        except Exception as error:
            if os.environ.get(TRACEBACK) == "1":
                traceback.print_exception(error)
            line = f"error: {describe(error)}"
            peers.leave(1, line)
            sys.exit(line)


@contextmanager
def advising(advice: Callable[[], str]) -> Iterator[None]:
    """Inside it, the line ends with advice, where there is any, after Ctrl-C, on a full disk, or without the others."""
    before = signal.getsignal(signal.SIGINT)
    if before is experiments.end:
        signal.signal(signal.SIGINT, lambda *_: experiments.end(advice=advice()))
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        is_to_go_on = isinstance(error, KeyboardInterrupt) or _is_full(error) or _is_left_alone(error)
        if is_to_go_on and (line := advice()):
            error.add_note(line)
        raise
    finally:
        if before is experiments.end:
            signal.signal(signal.SIGINT, before)


def describe(error: Exception) -> str:
    """One line for an exception.

    The library's own messages are for people and stand as they are. An exception of another kind, or of other code,
    comes with its name and the place in this code that it passed through last.
    """
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if _is_full(error):
        name = getattr(error, "filename", None)
        return "; ".join((f"{_NO_SPACE}: {name}" if name else _NO_SPACE, "free some", *_notes(error)))
    if isinstance(error, MemoryError) or (type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in text):
        return "; ".join(("out of memory: make batch, context or models smaller", *_notes(error)))
    if _is_left_alone(error):
        told = text if len(text) <= _SHORT else f"{text[:_SHORT]} ..."
        return "; ".join(
            (f"another process of this run is gone or cannot be reached: see its line ({told})", *_notes(error))
        )
    if _is_ours(error):
        return "; ".join((text, *_notes(error)))
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    name, *where = type(error).__name__, *_where(error.__traceback__), f"{TRACEBACK}=1 shows the rest"
    return "; ".join((f"{name}: {text}" if text else name, *_notes(error))) + f" ({'; '.join(where)})"


def _is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in _FULL or _NO_SPACE in str(error).lower()


def _is_left_alone(error: BaseException) -> bool:
    """Whether devices of several processes could not speak to each other: Gloo does so on CPUs, NCCL on GPUs."""
    return type(error).__name__ == "JaxRuntimeError" and any(name in str(error) for name in ("Gloo", "NCCL"))


def _is_ours(error: Exception) -> bool:
    """Whether a message was written for people: those of the system, and what this code raises itself."""
    if isinstance(error, OSError | ImportError | FloatingPointError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    is_named = type(error) is ValueError or type(error).__module__.partition(".")[0] in ("lensjax", "experiments")
    return is_named and bool(frames) and _place(frames[-1]) is not None


def _where(trace: TracebackType | None) -> list[str]:
    """The last line of this code that an exception passed through, and the path that was in hand there, or above."""
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    lines = list(zip(frames, traceback.extract_tb(trace), strict=True))
    own = [(frame, place) for frame, line in reversed(lines) if (place := _place(line)) is not None]
    paths = [value for frame, _ in own for value in reversed(frame.f_locals.values()) if isinstance(value, Path)]
    return [place for _, place in own[:1]] + [f"at {path}" for path in paths[:1]]


def _place(frame: traceback.FrameSummary) -> str | None:
    path = Path(frame.filename)
    roots = [root for root in _ROOTS if path.is_relative_to(root) and frame.filename != __file__]
    return f"{path.relative_to(roots[0].parent)}:{frame.lineno}" if roots else None


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception on its way; JAX adds paragraphs of its own."""
    return [note for note in getattr(error, "__notes__", ()) if "\n" not in note and not note.startswith("--")]


@contextmanager
def _lasting(name: str) -> Iterator[None]:
    """Makes `sys.stdout` or `sys.stderr` a stream that can be written to whatever becomes of the console."""
    there: TextIO | None = getattr(sys, name)  # None where it was closed before the start
    redirect: Any = {"stdout": contextlib.redirect_stdout, "stderr": contextlib.redirect_stderr}[name]
    with contextlib.nullcontext(there) if there else open(os.devnull, "w", encoding="utf-8") as stream:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        with redirect(_Lasting(stream)):
            yield


class _Lasting:
    """A text stream that goes on without its reader."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_reader():
            self._stream.flush()

    @contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # what is buffered, and what comes, goes nowhere
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
