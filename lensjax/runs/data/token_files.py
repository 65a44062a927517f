"""Files of token ids: made once of a tokenizer and its texts, then mapped into memory, checked and never rewritten.

    <cache>/<key>/tokens.bin        ids of all documents, little-endian, each followed by the end-of-text token
    <cache>/<key>/manifest.json     how many, of which type, and the SHA-256 of tokens.bin

The key is a hash of the tokenizer and of the texts themselves, in their order: other texts make another file, and
moving or touching them none. A folder is written under another name and renamed when it is complete.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from lensjax._settings import require
from lensjax.runs.data.tokenizers import Tokenizer

FORMAT = 1
_TOKENS, _MANIFEST = "tokens.bin", "manifest.json"


def open_tokens(paths: Sequence[Path], tokenizer: Tokenizer, cache: str | Path) -> np.ndarray:
    """Maps the ids of texts into memory, after making the file of them where there is none.

    One document at a time is in memory while it is made, and of the file only what is looked at afterwards. What is no
    UTF-8 becomes U+FFFD.

    Args:
      paths: the documents, in their order.
      tokenizer: what makes ids of them.
      cache: folder of such files.

    Returns:
      Ids uint16[n] or, of vocabularies above 65,536, uint32[n]; read-only.

    Raises:
      ValueError: the file was changed after it had been made.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from lensjax.runs.data.token_files import open_tokens
      >>> from lensjax.runs.data.tokenizers import Bytes
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     text = Path(folder, "a.txt")
      ...     _ = text.write_text("hi")
      ...     open_tokens([text, text], Bytes(), folder).tolist()
      [104, 105, 0, 104, 105, 0]
    """
    folder = Path(cache).expanduser() / _key(paths, tokenizer)
    if not folder.exists():
        _make(folder, paths, tokenizer)
    return _map(folder)


def _key(paths: Sequence[Path], tokenizer: Tokenizer) -> str:
    whole = hashlib.sha256(f"{FORMAT} {tokenizer.digest} {tokenizer.end_of_text}".encode())
    for path in paths:
        with path.open("rb") as file:
            whole.update(_sha256(file).digest())
    return whole.hexdigest()[:32]


def _sha256(file: BinaryIO) -> Any:
    return hashlib.file_digest(cast(Any, file), "sha256")


def _make(folder: Path, paths: Sequence[Path], tokenizer: Tokenizer) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"data.cache {str(folder.parent)!r} is no folder to write to ({error.strerror}): name another one"
        ) from error
    try:
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        with (hidden / _TOKENS).open("w+b") as file:
            count = _write(file, paths, tokenizer, dtype)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            checksum = _sha256(file).hexdigest()
        manifest = {"format": FORMAT, "tokens": count, "documents": len(paths), "dtype": dtype.name}
        manifest |= {"end_of_text": tokenizer.end_of_text, "tokenizer": tokenizer.digest, "sha256": checksum}
        with (hidden / _MANIFEST).open("w") as file:
            file.write(json.dumps(manifest, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            hidden.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write(file: BinaryIO, paths: Sequence[Path], tokenizer: Tokenizer, dtype: np.dtype) -> int:
    """Writes the ids of all documents; returns how many."""
    from rich.console import Console
    from rich.progress import Progress

    from lensjax.runs.engine.progress import has_bars

    console = Console(stderr=True)
    count, sizes = 0, [path.stat().st_size for path in paths]
    with Progress(console=console, transient=True, disable=not has_bars(console)) as progress:
        bar = progress.add_task(f"tokens of {len(paths)} files", total=sum(sizes))
        for path, size in zip(paths, sizes, strict=True):
            ids = tokenizer.encode(path.read_bytes().decode("utf-8", "replace"))
            file.write(np.append(ids, tokenizer.end_of_text).astype(dtype).tobytes())
            count += len(ids) + 1
            progress.advance(bar, size)
    return count


def _map(folder: Path) -> np.ndarray:
    """The ids in a folder that was made before; reads all of it once, to compare the checksum."""
    path, again = folder / _TOKENS, f"delete {folder} to have it made again"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        count, dtype, expected = manifest["tokens"], np.dtype(manifest["dtype"]).newbyteorder("<"), manifest["sha256"]
        with path.open("rb") as file:
            found = _sha256(file).hexdigest()
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} (data.cache) is damaged ({error}): {again}") from error
    require(found == expected, f"{path} (data.cache) has SHA-256 {found}, and {expected} was written: {again}")
    whole = path.stat().st_size == count * dtype.itemsize and dtype.kind == "u"
    require(whole, f"{folder} (data.cache) is damaged ({_TOKENS} is not of {count} {dtype.name}): {again}")
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,))) if count else np.empty(0, dtype)
