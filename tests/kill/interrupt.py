"""Interruptions of a process at one of its writes below a folder, of which an audit hook of Python tells."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link")
_NEEDS_ROOM = ("open", "os.mkdir")


def at_writes(folder: Path, act: Callable[[int, str, str], None]) -> None:
    """Calls `act(number, event, path)` before each write below a folder, from 1 on, as long as this process lives."""
    number, start = 0, str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event == "open":
            path, mode, flags = arguments
            is_write = bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else bool(set("wax+") & set(mode))
        elif event in _CHANGES:
            path, is_write = arguments[0], True
        else:
            return
        if is_write and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(start):
            number += 1
            act(number, event, os.fspath(path))

    sys.addaudithook(hook)


def die_at(write: int) -> Callable[[int, str, str], None]:
    """Kills the process at a write."""

    def act(number: int, event: str, path: str) -> None:
        if number == write:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def full_from(write: int) -> Callable[[int, str, str], None]:
    """Lets the disk be full from a write on."""

    def act(number: int, event: str, path: str) -> None:
        if number >= write and event in _NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return act


def count_into(file: Path) -> Callable[[int, str, str], None]:
    """Keeps in a file how many writes there were."""

    def act(number: int, event: str, path: str) -> None:
        file.write_text(str(number))

    return act
