"""What JAX has compiled, kept for the next process that needs it: in the user's cache folder, where no run is.

A program that is read back is machine code, which must come from nobody else: a run's folder, which is data and may be
another's, is no place for it. JAX finds a program by all that made it, its own version and the kind of processor among
it; one that cannot be read is compiled again, with a warning of JAX.
"""

import os
import tempfile
from pathlib import Path

import jax

ROOM = 2 * 2**30
"""Bytes of the folder: at a start, those files go that nobody has used for the longest time."""
_SHORTEST = 0.2
"""Seconds: what compiles faster is not kept."""


def folder() -> Path:
    """Where programs are kept: `lensjax` in `XDG_CACHE_HOME`, which is `~/.cache` where it is not set.

    Raises:
      RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lensjax"


def keep() -> str | None:
    """Lets this process keep what it compiles, and read what others have kept.

    `JAX_COMPILATION_CACHE_DIR` names another folder, which is left to JAX; `JAX_ENABLE_COMPILATION_CACHE=0` keeps
    nothing.

    Returns:
      A sentence where the folder cannot be used, and everything is compiled as it comes; None where all is well.
    """
    settings = jax.config
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_room(place, ROOM)
        tempfile.TemporaryFile(dir=place).close()
    except (OSError, RuntimeError) as error:
        return f"compiled programs are not kept, every start compiles them again: {error}"
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
    return None


def make_room(place: Path, room: int) -> None:
    """Deletes the files of a folder that were used longest ago, until the others take at most so many bytes."""
    files = []
    for path in place.rglob("*"):
        if path.is_file():
            found = path.stat()
            files.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    for _, size, path in sorted(files, reverse=True):
        room -= size
        if room < 0:
            path.unlink(missing_ok=True)
