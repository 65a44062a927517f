"""Text of a run: which documents, in which split, and the tokens of a split in one row.

Where a file of `data.path` is packed, or holds its documents in rows, the whole corpus is read as `documents` says, one
document at a time. Otherwise each file is a document, and what follows is how they are split.

Each FAMILY of files with text in common (see `families`) belongs to one split: a hash of the name of its first file
decides, and so for most files, which share little with any other, a hash of their own name. The split depends neither
on the machine nor on the order of the files, and no window of a held-out file, or of a near-duplicate of it, is ever
trained on. Adding a file changes the split of others where it joins two families, or comes first in one.

With `data.split_by folder` the folders `train`, `validation` and `test` say it instead, so that whole works are held
out.
"""

import functools
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lensjax._settings import require
from lensjax.runs.data import documents
from lensjax.runs.data.documents import Files
from lensjax.runs.data.families import families
from lensjax.runs.data.files import base_name, each_once, find
from lensjax.runs.data.formats import is_plain, members
from lensjax.runs.data.resemblance import alike, sketch
from lensjax.runs.data.splits import SPLITS, Split, digest, split_of
from lensjax.runs.data.task import DataConfig, Windows
from lensjax.runs.data.token_files import open_tokens
from lensjax.runs.data.tokenizers import Tokenizer, read_tokenizer

Stamp = tuple[int, int]
"""Size and time of a file, while which it does not change."""
SEPARATOR = b"\0"
"""Stands between two files of a split that is read as bytes."""

_NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__")


def token_row(config: Windows, split: Split) -> np.ndarray:
    """All tokens of a split, document after document.

    Bytes of files are packed in memory, with `SEPARATOR` between two files. Tokens of a tokenizer, or of rows, are
    mapped from a file, which is made first where there is none (see `token_files`); each document ends with the
    end-of-text token.

    Args:
      config: the run; read are `data` and `base.vocab_size`.
      split: which documents.

    Returns:
      Ids uint8[n], uint16[n] or uint32[n].

    Raises:
      ValueError: the tokenizer cannot be read or has more tokens than the base model, or its file is damaged; see
        `corpus_files`.
    """
    data, names = config.data, _names(config.data)
    rows = _rows(data, names)
    tokenizer = None if data.tokenizer is None else read_tokenizer(data.tokenizer)
    if tokenizer is not None:
        require(
            config.base.vocab_size >= tokenizer.vocab_size,
            f"base.vocab_size must be at least {tokenizer.vocab_size}, the vocabulary of data.tokenizer "
            f"{data.tokenizer!r}, got {config.base.vocab_size}",
        )
    if rows:
        return _mapped_rows(rows, _rows_key(rows, data), data)[split]
    files = _members(data, names, split)
    paths, stamps = tuple(path for _, path, _ in files), tuple(stamp for *_, stamp in files)
    return _packed(paths, stamps) if tokenizer is None else _mapped(paths, stamps, tokenizer, data.cache)


# A run asks for the same tokens in each of its phases: they are read, or checked, the first time.


@functools.lru_cache(maxsize=len(SPLITS))
def _packed(paths: tuple[Path, ...], _stamps: object) -> np.ndarray:
    """The bytes of texts in memory."""
    return np.frombuffer(SEPARATOR.join(path.read_bytes() for path in paths), np.uint8)


@functools.lru_cache(maxsize=len(SPLITS))
def _mapped(paths: tuple[Path, ...], _stamps: object, tokenizer: Tokenizer, cache: str) -> np.ndarray:
    """The token file of texts."""
    return open_tokens(paths, tokenizer, cache)


@functools.lru_cache(maxsize=1)
def _mapped_rows(files: Files, key: str, data: DataConfig) -> dict[Split, np.ndarray]:
    """The tokens of all splits."""
    folder = Path(data.cache).expanduser() / key
    return documents.open_splits(folder, files, data, read_tokenizer(data.tokenizer))


def _rows_key(files: Files, data: DataConfig) -> str:
    sums = [(name, _sha256(path, _stamp(path))) for name, path in files]
    return documents.key(sums, data, read_tokenizer(data.tokenizer))


def _rows(data: DataConfig, names: dict[str, Path]) -> Files:
    """Files that are read as `documents` says: all of a corpus, where one of them is packed or holds rows."""
    if data.task != "text" or all(map(is_plain, names)):
        return ()
    return tuple(sorted((base_name(name), path) for name, path in names.items()))


def described(data: DataConfig, split: Split) -> str:
    """What a split is made of, for messages."""
    names = _names(data)
    if rows := _rows(data, names):
        return f"the rows of {len(rows)} files"
    found = f"{len(corpus_files(data, split))} of {len(names)} files"
    if data.split_by == "folder":
        return found
    count = len(set(_families(tuple((name, path, _stamp(path)) for name, path in names.items())).values()))
    return found if count == len(names) else f"{found}, in {count} families of alike ones"


def corpus_files(data: DataConfig, split: Split) -> list[Path]:
    """Lists the files of one split, in the order of their names' hashes; empty and hidden files are left out.

    Unless folders say which split a file is in, files of all splits are read, to know which are alike. Each is a
    document: of rows there is no such list.

    Raises:
      ValueError: `split` is unknown, the path does not exist, or there is no file at all.
    """
    return [path for _, path, _ in _members(data, _names(data), split)]


def text_digest(data: DataConfig) -> str:
    """Hash of the tokenizer, and of the names and contents of the files of each split in their order."""
    names = _names(data)
    if rows := _rows(data, names):
        return _rows_key(rows, data)
    files = {
        split: [(name, _sha256(path, stamp)) for name, path, stamp in _members(data, names, split)] for split in SPLITS
    }
    return hashlib.sha256(json.dumps([read_tokenizer(data.tokenizer).digest, files]).encode()).hexdigest()


@functools.lru_cache(maxsize=100_000)
def _sha256(path: Path, _stamp: object) -> str:
    """Of a file's content. A run asks more than once: the answer is kept while the file does not change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names(data: DataConfig) -> dict[str, Path]:
    """All files by their names."""
    return each_once(*_stdlib_files()) if data.task == "stdlib" else _text_files(data)


def _members(data: DataConfig, names: dict[str, Path], split: Split) -> list[tuple[str, Path, Stamp]]:
    """Files of one split by their names, in their order."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    files = {name: (name, path, _stamp(path)) for name, path in names.items()}
    if data.task == "text":
        _require_memory(data, sum(size for *_, (size, _) in files.values()))
    if data.split_by == "folder":
        _require_apart(tuple(files.values()))
        splits = {name: name.split("/")[0] for name in names}
    else:
        family = _families(tuple(files.values()))
        splits = {name: split_of(base_name(family[name])) for name in names}
    inside = sorted((name for name in names if splits[name] == split), key=digest)
    return [files[name] for name in inside[: data.max_files]]


def _text_files(data: DataConfig) -> dict[str, Path]:
    """The user's own files by name, those outside of the three folders left out where folders are the splits."""
    found = find(str(data.path))
    files = members(found.files)
    names, where = dict[str, Path](), str(found.root)
    if data.split_by == "folder":
        where = f"{where}/{{{','.join(SPLITS)}}}"
        for folder in (found.root / split for split in SPLITS):
            names |= each_once(found.root, [path for path in files if path.is_relative_to(folder)])
    else:
        names = each_once(found.root, files)
    if not names:
        but = f"; links to folders are not followed, such as {str(found.links[0])!r}" if found.links else ""
        but += f"; folders of runs are no text, such as {str(found.own[0])!r}" if found.own else ""
        raise ValueError(f"no file with text in it under {where} (data.path {data.path!r}); expected at least one{but}")
    return names


def _require_memory(data: DataConfig, size: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(
        size <= memory or (data.split_by == "folder" and data.tokenizer is not None),
        f"data.path {data.path!r} holds {size / 2**30:,.1f} GiB of text, which is read whole, and there are "
        f"{memory / 2**30:,.1f} GiB of memory: name fewer files, write them as rows of JSON lines, or set "
        "data.split_by folder and data.tokenizer",
    )


@functools.lru_cache(maxsize=1)
def _require_apart(files: tuple[tuple[str, Path, Stamp], ...]) -> None:
    """Folders say what is held out: no document may be in two of them."""
    sketches, first, pairs = [], dict[str, int](), list[tuple[int, int]]()
    for i, (_, path, stamp) in enumerate(files):
        pairs.append((first.setdefault(_sha256(path, stamp), i), i))
        with path.open("rb") as file:
            sketches.append(sketch(file))
    for pair in (*pairs, *alike(sketches)):
        one, other = (files[i] for i in pair)
        require(
            one[0].split("/")[0] == other[0].split("/")[0],
            f"data.split_by folder: {str(one[1])!r} and {str(other[1])!r} are the same text, or nearly, and one of "
            "them is held out: delete one, or move it to the other's folder",
        )


@functools.lru_cache(maxsize=1)
def _families(files: tuple[tuple[str, Path, Stamp], ...]) -> dict[str, str]:
    """Families of files by name. A run asks for each split in turn: the answer is kept while no file changes."""
    return families({name: path.read_bytes() for name, path, _ in files})


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata* is written when an interpreter is built and differs from machine to machine.
    return root, [
        path
        for path in _walk(root, skip=_NOT_STDLIB)
        if path.suffix == ".py"
        and not path.name.startswith("_sysconfigdata")
        and os.access(path, os.R_OK)
        and path.is_file()
        and path.stat().st_size
    ]


def _walk(root: Path, skip: tuple[str, ...]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        yield from (Path(folder, name) for name in names if not name.startswith("."))
