"""Arrays by name in a folder, through orbax."""

import functools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays into a folder that is not there yet.

    Raises:
      OSError: the system refused it, such as for a full disk; names the folder.
    """
    # orbax has no arrays without elements, and no trees without arrays.
    present = {name: array for name, array in arrays.items() if array.size}
    if present:
        with _orbax(folder) as (orbax, place):
            orbax.save(place, present)


def read(folder: Path) -> dict[str, np.ndarray]:
    """Reads what `write` has written, but for the arrays without elements.

    Raises:
      OSError: the system refused it; names the folder.
      ValueError: it is not what `write` has written.
    """
    if not folder.exists():
        return {}
    with _orbax(folder) as (orbax, place):
        try:
            return dict(orbax.restore(place))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} does not hold arrays: {error}") from error


@contextmanager
def _orbax(folder: Path) -> Iterator[tuple[ocp.Checkpointer, Path]]:
    """orbax, quiet and for this process alone, and a path to the folder that it understands."""
    process = jax.process_index()
    # It would otherwise wait for the other processes at every call.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=str(process)
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with _quiet(), _no_pattern(folder) as place, ocp.Checkpointer(handler, multiprocessing_options=alone) as orbax:
        try:
            yield orbax, place
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            _drop_late_answers()
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error


@contextmanager
def _no_pattern(folder: Path) -> Iterator[Path]:
    """A path to a folder that cannot be taken for a pattern, as orbax does with the one that it is given."""
    if re.search(r"[][*?\\]", str(folder)) is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lensjax-") as place:
        link = Path(place) / "parent"
        link.symlink_to(folder.parent, target_is_directory=True)
        yield link / folder.name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from logging, with the tracebacks of several threads, what it raises anyway."""
    logger = logging.getLogger("absl")

    def is_shown(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


@functools.cache
def _drop_late_answers() -> None:
    """From now on says nothing of writes that end after orbax gave up on the first that failed."""
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
