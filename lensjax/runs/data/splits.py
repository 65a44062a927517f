"""The splits of data into what is trained on, what settings are chosen on, and what is for tests."""

import hashlib
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_of(name: str, *, train: float = 0.9, validation: float = 0.05) -> Split:
    """Returns the split of anything that has a name, by the SHA-256 of that name.

    Args:
      name: of a file, its path from the corpus root, with forward slashes; of a rule or a task, whatever says it all.
      train: share of the names that are trained on.
      validation: share that settings are chosen on; the rest is for tests.
    """
    position = position_of(name)
    return "train" if position < train else "validation" if position < train + validation else "test"


def position_of(name: str) -> float:
    """Where a name stands between 0 and 1, by its SHA-256: below a share for so large a share of all names."""
    return int.from_bytes(digest(name)[:8], "big") / 2**64


def digest(name: str) -> bytes:
    """SHA-256 of a name."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
