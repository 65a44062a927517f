"""One run, one process: a lock on a run's folder, which the death of its process releases."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FILE = ".lock"
"""In the run's folder. A killed process leaves it; what is locked is for the operating system to say."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_WRITING = 0.1
"""Seconds in which whoever has taken a lock has written its name."""


@dataclass(frozen=True)
class Lock:
    """A run's folder in the hands of this process."""

    folder: Path
    descriptor: int
    is_exclusive: bool
    """False where the file system has no locks."""

    def require(self) -> None:
        """Looks whether the folder is still the one that was locked.

        Raises:
          FileNotFoundError: it was deleted, moved, or replaced by another one.
        """
        mine = os.fstat(self.descriptor)
        try:
            there = (self.folder / FILE).stat()
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise FileNotFoundError(
                f"{self.folder} is no longer the folder of this run: it was deleted, moved or replaced while the run "
                "went on. Nothing more is written there; put it back and go on by --resume, or start anew"
            )

    def release(self) -> None:
        """Lets others have the folder; so does the end of the process."""
        try:
            self.require()
            # Whoever has opened the file before, and locks it behind, sees that it is not the folder's any more.
            (self.folder / FILE).unlink()
        except OSError:
            pass
        finally:
            os.close(self.descriptor)


def take(folder: Path) -> Lock:
    """Locks a run's folder, which is there.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from lensjax.runs.store.lock import take
      >>> with tempfile.TemporaryDirectory() as name:
      ...     lock = take(Path(name))
      ...     lock.require()
      ...     lock.release()

    Raises:
      BlockingIOError: another process has it; names that process.
    """
    while True:
        # Python closes it in programs that this process starts, so that none of them holds the lock on.
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock = Lock(folder, descriptor, _flock(folder, descriptor))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            lock.require()
        except FileNotFoundError:
            os.close(descriptor)  # the folder was made anew in between
        except BaseException:
            os.close(descriptor)
            raise
        else:
            return lock


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Locks a folder, which is there, for as long as one is inside it.

    Raises:
      BlockingIOError: see `take`.
    """
    lock = take(folder)
    try:
        yield
    finally:
        lock.release()


def require_free(folder: Path) -> None:
    """Looks whether a folder could be locked, without doing so; a folder without a lock could.

    Raises:
      BlockingIOError: another process has it; names that process.
    """
    try:
        descriptor = os.open(folder / FILE, os.O_RDWR)
    except OSError:
        return
    try:
        _flock(folder, descriptor)
    finally:
        os.close(descriptor)


def _flock(folder: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        time.sleep(_WRITING)
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "of unknown number"
        raise BlockingIOError(
            f"{folder} is in use by process {holder}: wait until it has ended, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True
