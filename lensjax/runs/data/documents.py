"""Text in rows or packed, of any size: which document is in which split, and their tokens in mapped files.

Two passes over the files, which are in the order of their names, and in both one document at a time is in memory. The
first looks for families: documents that are equal, or nearly (see `resemblance`), and what is joined by a chain of such
pairs. The smallest id of a family, in the order of Python's strings, decides: all of it is in the split of that id's
SHA-256. So the split of most documents is a function of their own id, wherever they stand, and adding one changes that
of others only where it joins two families, or has the smallest id of one. With `data.split_by folder` the first folder
of a file's name says it, and a family in two of them is refused.

The second pass writes the ids, by split and in the order of the files:

    <cache>/<key>/<split>/      as in `token_files`

The key is a hash of the tokenizer, of the files, and of the settings that say what is a document and where it goes: a
run that goes on hashes the files, and reads no row again.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np

from lensjax._settings import require
from lensjax.runs.data import formats, resemblance, token_files
from lensjax.runs.data.families import joined
from lensjax.runs.data.formats import Document
from lensjax.runs.data.splits import SPLITS, Split, digest, split_of
from lensjax.runs.data.task import DataConfig
from lensjax.runs.data.tokenizers import Tokenizer
from lensjax.runs.engine.progress import work_bar

FORMAT = 1
"""Of the rule by which documents go to splits; to be raised where it changes."""
_OUT = len(SPLITS)
"""In the place of a split, for what `data.max_files` leaves out."""

Files = tuple[tuple[str, Path], ...]
"""Names and paths, in the order of the names."""
Count = Callable[[float], None]


def open_splits(folder: Path, files: Files, data: DataConfig, tokenizer: Tokenizer) -> dict[Split, np.ndarray]:
    """Maps the ids of all documents into memory, by split, after making the files of them where there are none.

    Args:
      folder: of the token files, named by their `key`.
      files: what documents are in.
      data: where in a row text and id are, what is held out, and how many documents are read.
      tokenizer: what makes ids of text.

    Returns:
      Ids uint8[n], uint16[n] or uint32[n], read-only; each document ends with the end-of-text token.

    Raises:
      ValueError: a document cannot be read (see `formats.documents`), is in two folders that are splits, or a file of
        tokens was changed.
    """
    if not folder.exists():
        with token_files.making(folder) as hidden:
            _write(hidden, files, data, tokenizer, _splits(files, data, hidden))
    return {split: token_files.read(folder / split) for split in SPLITS}


def key(sums: Sequence[tuple[str, str]], data: DataConfig, tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits that differ where the tokens of a split do.

    Args:
      sums: name and SHA-256 of each file, in the order of the names.
      data: as in `open_splits`.
      tokenizer: as in `open_splits`.
    """
    settings = [FORMAT, token_files.FORMAT, tokenizer.digest, tokenizer.end_of_text]
    settings += [data.text_column, data.id_column, data.split_by, data.max_files]
    return hashlib.sha256(json.dumps([settings, sums]).encode()).hexdigest()[:32]


def _documents(files: Files, data: DataConfig, count: Count) -> Iterator[tuple[str, Document]]:
    """All documents, each with the name of its file."""
    for name, path in files:
        read = 0
        for one in formats.documents(path, name, text_column=data.text_column, id_column=data.id_column):
            yield name, one
            count(one.read - read)
            read = one.read
        count(path.stat().st_size - read)


def _splits(files: Files, data: DataConfig, scratch: Path) -> np.ndarray:
    """The number of each document's split uint8[documents], in their order; `scratch` is a folder to write to."""
    ids: list[str] = []
    folders: list[str] = []
    first: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    # On the disk, for these are most of what is known of short documents.
    with tempfile.TemporaryFile(dir=scratch) as file, _bar("families of", files) as count:
        for index, (name, one) in enumerate(_documents(files, data, count)):
            content = one.text.encode()
            ids.append(one.id)
            folders.append(name.partition("/")[0])
            before = first.setdefault(hashlib.sha256(content).digest(), index)
            pairs += [(before, index)] if before != index else []
            file.write(resemblance.sketch(io.BytesIO(content)).tobytes())
        file.flush()
        if ids:
            pairs += resemblance.alike(np.memmap(file, np.uint32, "r", shape=(len(ids), resemblance.BINS)))
    if data.split_by == "folder":
        for i, j in pairs:
            require(
                folders[i] == folders[j],
                f"data.split_by folder: {ids[i]!r} in {folders[i]} and {ids[j]!r} in {folders[j]} are the same text, "
                "or nearly, and one of them is held out: delete one, or move it to the other's folder",
            )
        splits = np.array([SPLITS.index(folder) for folder in folders], np.uint8)
    else:
        splits = _by_family(ids, joined(len(ids), pairs))
    return splits if data.max_files is None else _fewer(splits, ids, data.max_files)


def _by_family(ids: list[str], families: list[int]) -> np.ndarray:
    names: dict[int, str] = {}
    for id, family in zip(ids, families, strict=True):
        names[family] = min(id, names.get(family, id))
    return np.array([SPLITS.index(split_of(names[family])) for family in families], np.uint8)


def _fewer(splits: np.ndarray, ids: list[str], most: int) -> np.ndarray:
    """The first of each split in the order of their ids' hashes."""
    kept = np.full_like(splits, _OUT)
    for split in range(len(SPLITS)):
        inside = sorted(np.flatnonzero(splits == split).tolist(), key=lambda index: digest(ids[index]))
        kept[inside[:most]] = split
    return kept


def _write(folder: Path, files: Files, data: DataConfig, tokenizer: Tokenizer, splits: np.ndarray) -> None:
    with ExitStack() as stack, _bar("tokens of", files) as count:
        writers = [stack.enter_context(token_files.Writer(folder / split, tokenizer)) for split in SPLITS]
        for (_, one), split in zip(_documents(files, data, count), splits.tolist(), strict=True):
            if split != _OUT:
                writers[split].add(one.text)


def _bar(title: str, files: Files) -> AbstractContextManager[Count]:
    return work_bar(f"{title} {len(files)} files", sum(path.stat().st_size for _, path in files))
