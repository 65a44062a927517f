"""The files of a corpus: a folder, a file or a glob, each real file once, whatever names and links lead to it.

Below the folder that `data.path` names, links to folders are not followed, so that there is no way round in a circle.
What the program itself has written is no text: folders of runs, of sweeps and of token files are left out. So are
hidden files, unless a pattern asks for them. What cannot be read is an error, for it would be another corpus.

In a glob `**` stands for any number of folders. A name that is there is taken as it stands, brackets and all, and only
what follows is a pattern.
"""

import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from lensjax.runs.store.paths import absolute

EVERYTHING = ("**",)
_WAYS_OUT = "make it readable, or take it out of there"


@dataclass(frozen=True)
class Found:
    """Files below a folder, and what was left out of them."""

    root: Path
    files: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    """Links to folders."""
    own: list[Path] = field(default_factory=list)
    """Folders that the program has written, and links into such."""


def find(pattern: str) -> Found:
    """Finds the files of a folder, a file or a glob; in no order.

    Raises:
      ValueError: there is no such place, it is no file and no folder, something of it cannot be read, or it is in the
        folder of a run.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from lensjax.runs.data.files import find
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = Path(folder, "a[1].txt").write_text("text")
      ...     Path(folder, "round").symlink_to(".")
      ...     [path.name for path in find(f"{folder}/**/*.txt").files]
      ['a[1].txt']
    """
    root, parts = _resolved(pattern)
    found = Found(root if parts else root.parent)
    folder = found.root.resolve()
    for one in (folder, *folder.parents):
        if _is_own(one):
            _refuse(pattern, f"is in {str(one)!r}, which a run has written: name a folder of text")
    try:
        if parts:
            _search(found, parts, pattern)
        else:
            _take(found, root, pattern)
    except OSError as error:
        _refuse(pattern, f"cannot be read: {error.filename!r}: {error.strerror}; {_WAYS_OUT}")
    return found


def each_once(root: Path, paths: list[Path]) -> dict[str, Path]:
    """Real files by their names below a folder; of several names, one that is no link, and comes first.

    Names are in normal form C, as Linux writes them and macOS does not. Where two files then have one name, the second
    one's ends with a zero, see `base_name`.
    """
    names: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()
    relative = [(path.is_symlink(), _normal(path.relative_to(root).as_posix()), path) for path in paths]
    for _, name, path in sorted(relative):
        status = path.stat()
        real = (status.st_dev, status.st_ino)
        if real not in seen:
            seen.add(real)
            while name in names:
                name += "\0"
            names[name] = path
    return names


def base_name(name: str) -> str:
    """A name without what tells it from another file's."""
    return name.rstrip("\0")


def _resolved(pattern: str) -> tuple[Path, tuple[str, ...]]:
    """A file, or a folder and the parts of the names below it that are asked for."""
    path = absolute(pattern, name="data.path") if pattern.startswith("~") else Path(pattern)
    status, known = _status(path, pattern), 0
    if status is not None:
        known = len(path.parts)
    while known < len(path.parts) and _status(Path(*path.parts[: known + 1]), pattern) is not None:
        known += 1
    root, parts = Path(*path.parts[:known]), path.parts[known:]
    if parts and not any(char in parts[0] for char in "*?["):
        missing = root / parts[0]
        if missing.is_symlink():
            _refuse(
                pattern, f"does not exist: {str(missing)!r} is a link to {os.readlink(missing)!r}, where nothing is"
            )
        where = "" if missing == path else f" ({str(missing)!r} is missing)"
        _refuse(pattern, f"does not exist{where}; expected a folder, a file or a glob")
    if ".." in parts:
        _refuse(pattern, "has .. behind a pattern: write the folder that is meant")
    kind = os.stat(root).st_mode
    if stat.S_ISDIR(kind):
        return root, parts or EVERYTHING
    if stat.S_ISREG(kind) and not parts:
        return root, ()
    what = "a file" if stat.S_ISREG(kind) else "neither a file nor a folder, but a device, a pipe or a socket"
    _refuse(pattern, f"cannot be read: {str(root)!r} is {what}; expected a folder, a file or a glob")


def _status(path: Path, pattern: str) -> os.stat_result | None:
    """None where nothing is."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        _refuse(pattern, f"cannot be read: {getattr(error, 'strerror', None) or error}")


def _search(found: Found, parts: tuple[str, ...], pattern: str) -> None:
    """Walks through the folders below a root once, however many ways a pattern could lead to each."""
    wanted = [_normal(part) for part in parts]
    waiting = [(found.root, _reached(wanted, {0}))]
    while waiting:
        folder, at = waiting.pop()
        with os.scandir(folder) as entries:
            inside = list(entries)
        for entry in inside:
            then = _reached(wanted, set(_after(wanted, at, _normal(entry.name))))
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                if then - {len(wanted)}:
                    (found.own.append(path) if _is_own(path) else waiting.append((path, then)))
            elif entry.is_symlink() and path.is_dir():
                found.links.extend([path] if then else [])
            elif len(wanted) in then:
                _take(found, path, pattern)


def _take(found: Found, path: Path, pattern: str) -> None:
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        _refuse(pattern, f"cannot be read: {str(path)!r} is a link to {target!r}, where nothing is: delete that link")
    if path.is_symlink() and any(map(_is_own, path.resolve().parents)):
        found.own.append(path)
        return
    status = path.stat()
    if stat.S_ISREG(status.st_mode) and status.st_size:
        if not os.access(path, os.R_OK):
            _refuse(pattern, f"cannot be read: {str(path)!r}: Permission denied; {_WAYS_OUT}")
        found.files.append(path)


def _reached(wanted: list[str], at: set[int]) -> set[int]:
    """Places in a pattern, with those behind a `**`, which may stand for nothing."""
    for place, part in enumerate(wanted):
        if place in at and part == "**":
            at = at | {place + 1}
    return at


def _after(wanted: list[str], at: set[int], name: str) -> Iterator[int]:
    """Where a name leads from each place in a pattern."""
    for place in at - {len(wanted)}:
        part = wanted[place]
        if name.startswith(".") and not part.startswith("."):
            continue
        if part == "**":
            yield place
        elif fnmatchcase(name, part):
            yield place + 1


def _is_own(folder: Path) -> bool:
    """Whether a run or a sweep has written a folder, or it is one of token files."""
    if all(os.path.isfile(folder / name) for name in ("tokens.bin", "manifest.json")):
        return True
    config, environment = (_content(folder / name) for name in ("config.json", "environment.json"))
    if b'"lensjax"' in environment and b'"packages"' in environment:
        return True
    # A configuration alone may be somebody's preset.
    has_begun = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", ".lock"))
    return has_begun and all(key in config for key in (b'"format"', b'"output_dir"', b'"seed"'))


def _content(path: Path) -> bytes:
    """What is in a small file; nothing where there is none, or where it cannot be read."""
    try:
        return path.read_bytes() if os.path.isfile(path) and path.stat().st_size < 2**20 else b""
    except OSError:
        return b""


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _refuse(pattern: str, problem: str) -> NoReturn:
    raise ValueError(f"data.path {pattern!r} {problem}")
