"""Which files a checkpoint consists of, and what identifies its weights."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lensjax._settings import require

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, and not a folder.

    Raises:
      ValueError: it is neither.
    """
    require(path.exists(), f"{path} does not exist: give a Hugging Face folder or a GGUF file")
    if path.is_dir():
        return False
    with path.open("rb") as file:
        start = file.read(4)
    require(
        start == b"GGUF",
        f"{path} is no GGUF file (it starts with {start!r}): give a GGUF file, or the folder that config.json is in",
    )
    return True


def weight_files(path: str | Path) -> list[Path]:
    """The files that hold a checkpoint's weights, in the order of their names.

    Raises:
      ValueError: there are none, or one that the index names is absent.
    """
    path = Path(path)
    if is_gguf(path):
        return [path]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        return sorted({path / name for name in weight_map(path).values()})
    pickles = [file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in sorted(path.glob(suffix))]
    if pickles:
        raise ValueError(
            f"{path} has its weights as pickles ({', '.join(pickles)}), which can run anything when they are read: "
            "convert them to safetensors"
        )
    raise ValueError(f"{path} has no weights: expected {SINGLE}, or {INDEX} and the files that it names")


def weight_map(path: Path) -> Mapping[str, str]:
    """The file of each tensor, as the index of a folder says.

    Raises:
      ValueError: the index is not one, or names a file that is absent.
    """
    index: Any = read_json(path / INDEX).get("weight_map")
    fine = isinstance(index, dict) and index != {} and all(isinstance(name, str) for name in index.values())
    require(fine, f"{path / INDEX} must have a weight_map from tensors to files")
    for name in sorted(set(index.values())):
        require(Path(name).name == name, f"{path / INDEX} names {name!r}, which is not a file beside it")
        require((path / name).is_file(), f"{path / INDEX} names {name}, which is absent: fetch the whole checkpoint")
    found: dict[str, str] = index
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
      ValueError: it does not exist or holds something else.
    """
    require(path.is_file(), f"{path} does not exist: the folder is none of Hugging Face, or not whole")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    require(isinstance(raw, dict), f"{path} must hold an object, got {type(raw).__name__}")
    return raw


def sha256(path: str | Path) -> str:
    """SHA-256 of a checkpoint's weights: of its one file, or of a list of its shards' own.

    The list is what `sha256sum` prints of the shards, in the order of their names.

    Raises:
      ValueError: there is no checkpoint.

    Example:
      >>> import pathlib, tempfile
      >>> from lensjax.models.checkpoints import sha256
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = (pathlib.Path(folder) / "model.safetensors").write_bytes(b"abc")
      ...     sha256(folder)[:8]
      'ba7816bf'
    """
    digests = {}
    for file in weight_files(path):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()
