"""Files that are there whole or not at all, whatever ends the process or the machine."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Writes a file of UTF-8 that takes its name when it is complete and on the disk; what was there is replaced.

    Args:
      path: the file; its folder is there.
      text: the whole of it.

    Raises:
      OSError: nothing could be written, such as on a full disk; names the file. What was there is as it was.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from lensjax.runs.store.files import write_text
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(f"{folder}/a.json", "{}")
    ...     Path(folder, "a.json").read_text()
    '{}'
    """
    path = Path(path)
    hidden = path.with_name(f".tmp-{path.name}")
    with naming(path):
        try:
            with hidden.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            rename(hidden, path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise


def rename(source: Path, target: Path) -> None:
    """Renames within a folder, and returns when the disk knows of it."""
    source.replace(target)
    sync(target.parent)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing, and returns when the disk knows of them."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all below it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system that name no file, such as a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
