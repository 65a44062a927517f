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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from lensjax._settings import require
from lensjax.runs.data.tokenizers import Tokenizer
from lensjax.runs.engine.progress import work_bar

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
      Ids of as few bytes as the vocabulary takes: uint8[n], uint16[n] or uint32[n]; read-only.

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
        sizes = [path.stat().st_size for path in paths]
        with (
            making(folder) as hidden,
            work_bar(f"tokens of {len(paths)} files", sum(sizes)) as count,
            Writer(hidden, tokenizer) as writer,
        ):
            for path, size in zip(paths, sizes, strict=True):
                writer.add(path.read_bytes().decode("utf-8", "replace"))
                count(size)
    return read(folder)


def _key(paths: Sequence[Path], tokenizer: Tokenizer) -> str:
    whole = hashlib.sha256(f"{FORMAT} {tokenizer.digest} {tokenizer.end_of_text}".encode())
    for path in paths:
        whole.update(bytes.fromhex(sha256_of(path)))
    return whole.hexdigest()[:32]


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes its name when all is in it; what is left of a failure is removed.

    Raises:
      ValueError: it cannot be made there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"data.cache {str(folder.parent)!r} is no folder to write to ({error.strerror}): name another one"
        ) from error
    try:
        yield hidden
        try:
            hidden.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


class Writer:
    """Writes the ids of documents, one after the other, and at the end the manifest; use it in a `with` statement.

    Args:
      folder: where to; made where it is not there.
      tokenizer: what makes ids of text.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = np.dtype(
            "<u1" if tokenizer.vocab_size <= 2**8 else "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
        )
        self._file = (folder / _TOKENS).open("wb")
        self._checksum = hashlib.sha256()
        self._tokens = self._documents = 0

    def add(self, text: str) -> None:
        """Writes a document, with the end-of-text token behind it."""
        ids = np.append(self._tokenizer.encode(text), self._tokenizer.end_of_text).astype(self._dtype)
        self._file.write(ids.data)
        self._checksum.update(ids.data)
        self._tokens, self._documents = self._tokens + len(ids), self._documents + 1

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if error is not None:
            return
        manifest = {"format": FORMAT, "tokens": self._tokens, "documents": self._documents, "dtype": self._dtype.name}
        manifest |= {"end_of_text": self._tokenizer.end_of_text, "tokenizer": self._tokenizer.digest}
        manifest |= {"sha256": self._checksum.hexdigest()}
        with (self._folder / _MANIFEST).open("w") as file:
            file.write(json.dumps(manifest, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(folder: Path) -> np.ndarray:
    """Maps the ids in a folder that was made before; reads all of it once, to compare the checksum.

    Raises:
      ValueError: it is not as it was made.
    """
    path, again = folder / _TOKENS, f"delete {folder} to have it made again"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        count, dtype, expected = manifest["tokens"], np.dtype(manifest["dtype"]).newbyteorder("<"), manifest["sha256"]
        found = sha256_of(path)
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} (data.cache) is damaged ({error}): {again}") from error
    require(found == expected, f"{path} (data.cache) has SHA-256 {found}, and {expected} was written: {again}")
    whole = path.stat().st_size == count * dtype.itemsize and dtype.kind == "u"
    require(whole, f"{folder} (data.cache) is damaged ({_TOKENS} is not of {count} {dtype.name}): {again}")
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,))) if count else np.empty(0, dtype)
