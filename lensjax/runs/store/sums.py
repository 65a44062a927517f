"""`SHA256SUMS`: a checksum of every file of a folder, in the format of `sha256sum --check`."""

import hashlib
import re
from pathlib import Path

NAME = "SHA256SUMS"


def checksums(folder: Path) -> dict[str, str]:
    """Maps each file under a folder, except for the list of sums, to its SHA-256."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: _sum(folder / name) for name in names if name != NAME}


def to_text(sums: dict[str, str]) -> str:
    """What the file holds."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def fault(folder: Path, *, required: str) -> str | None:
    """What is wrong with the files that a folder's list names; None where all are as they were written.

    Others, which a file manager or a file system has put there, are no fault.

    Args:
      folder: with its list.
      required: a file that the list must name; the last one of it, so that a list that was cut is noticed.
    """
    try:
        lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        return f"{NAME} is missing"
    expected = {}
    for number, line in enumerate(lines, start=1):
        entry = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if entry is None:
            return f"line {number} of {NAME} is not a checksum"
        expected[entry[2]] = entry[1]
    if required not in expected:
        return f"{NAME} does not list {required}"
    for name, digest in sorted(expected.items()):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sum(folder / name) != digest:
            return f"{name} is not as it was written"
    return None


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
