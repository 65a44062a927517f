"""The documents in one file: its text, or its rows, by what its name ends with.

    .jsonl .ndjson      an object a line, UTF-8; a document a row
    .parquet .arrow     a row is a document, read a few at a time (extra `data`)
    anything else       the file is a document; what is no UTF-8 becomes U+FFFD
    .gz .zst            text or lines, packed (zstd: extra `data`)

Of a folder that `datasets.save_to_disk` has written, the Arrow files that its `state.json` names are read. The text of
a row stands in `data.text_column`; with a dot, as in `document.text`, in an object in the row. A row without text is an
error and one with an empty text no document. What is damaged is an error too, that names file and row: a part of it
would be another corpus.
"""

import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

from lensjax._settings import shown

PACKED = (".gz", ".zst")
LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")
_AT_ONCE = 128
"""Rows of a table in memory."""
_STREAM_ENDS = b"\xff\xff\xff\xff\0\0\0\0"


class Document(NamedTuple):
    """A text with a name."""

    id: str
    """Of its row; otherwise the file's name without what says that it is packed, and of a row `#` and its number."""
    text: str
    read: int
    """Bytes of the file that are read with it, about."""


class _Row(NamedTuple):
    number: int
    values: Any
    read: int


class _Fault(Exception):
    """What is wrong with a row, and what to do."""


def is_plain(name: str) -> bool:
    """Whether a file is a document as it stands."""
    return not name.lower().endswith((*PACKED, *LINES, *TABLES))


def members(paths: Sequence[Path]) -> list[Path]:
    """Files of a corpus without what `datasets.save_to_disk` has put beside its data.

    Raises:
      ValueError: the description of a data set cannot be read, or a file of it is missing.
    """
    there = set(paths)
    sets = {path.parent for path in paths if path.name == "state.json" and path.with_name("dataset_info.json") in there}
    data = {folder / name for folder in sets for name in _data_files(folder / "state.json")}
    for path in sorted(data - there):
        raise ValueError(f"data.path: {str(path.parent)!r} is a data set without {path.name}: save it to disk again")
    beside = {path for path in paths if path.parent in sets} - data
    beside |= {folder.parent / "dataset_dict.json" for folder in sets}
    return [path for path in paths if path not in beside]


def _data_files(state: Path) -> list[str]:
    try:
        return [one["filename"] for one in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"data.path: {str(state)!r} names no files of a data set: save it to disk again") from error


def documents(path: Path, name: str, *, text_column: str, id_column: str | None) -> Iterator[Document]:
    r"""Reads the documents of a file, one after the other; few are in memory at once.

    Args:
      path: the file.
      name: of the file, for ids.
      text_column: where in a row the text stands.
      id_column: where its id stands; None for the file's name and the row's number.

    Raises:
      ValueError: the file is damaged, or a row has no text or no id; names file, row and fix.
      ImportError: the extra `data` is not installed.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from lensjax.runs.data.formats import documents
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder, "a.jsonl")
      ...     _ = path.write_text('{"body": {"text": "one"}}\n{"body": {"text": "two"}}\n')
      ...     [one[:2] for one in documents(path, "a.jsonl", text_column="body.text", id_column=None)]
      [('a.jsonl#1', 'one'), ('a.jsonl#2', 'two')]
    """
    inner = _unpacked(name)
    ending = Path(inner).suffix.lower()
    number = 0
    with _reading(path) as progress:
        if ending == ".tar":
            raise _Fault("is one of an archive: unpack it into a folder")
        if ending not in (*LINES, *TABLES):
            with _opened(path) as (file, _):
                text = file.read().decode("utf-8", "replace")
            yield Document(inner, text, path.stat().st_size)
            return
        columns = [text_column, *([] if id_column is None else [id_column])]
        rows = _tabled(path, columns, ending) if ending in TABLES else _lined(path)
        for number, values, read in rows:
            progress.row = number
            try:
                text = _text(_found(values, text_column, "data.text_column"), text_column)
                if text:
                    own = f"{inner}#{number}" if id_column is None else _id(values, id_column)
                    yield Document(own, text, read)
            except _Fault as fault:
                _refuse(path, number, str(fault))


def _unpacked(name: str) -> str:
    """The name of what is packed."""
    return name[: -len(Path(name).suffix)] if name.lower().endswith(PACKED) else name


class _Progress:
    row = 0


@contextmanager
def _reading(path: Path) -> Iterator[_Progress]:
    """What libraries raise of a damaged file, as one error that says after which row."""
    progress = _Progress()
    try:
        yield progress
    except ImportError as error:
        raise ImportError(f"data.path: {str(path)!r} needs pyarrow: pip install 'lensjax[data]'") from error
    except _Fault as fault:
        _refuse(path, progress.row + 1, str(fault))
    except _damage() as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        where = f" after row {progress.row}" if progress.row else ""
        raise ValueError(
            f"data.path: {str(path)!r} is damaged or cut short{where} ({problem}): fetch or write it again"
        ) from error


def _damage() -> tuple[type[Exception], ...]:
    """What is raised of files that are not whole; by pyarrow, where it has been loaded."""
    arrow = sys.modules.get("pyarrow")
    return (EOFError, OSError, zlib.error, *([] if arrow is None else [arrow.ArrowException]))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The bytes of a file, unpacked, and the file that says how far they are read."""
    name = path.name.lower()
    with path.open("rb") as raw:
        if name.endswith(".gz"):
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
        elif name.endswith(".zst"):
            import pyarrow

            yield cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))), raw
        else:
            yield raw, raw


def _lined(path: Path) -> Iterator[_Row]:
    with _opened(path) as (file, raw):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode().removeprefix("\ufeff"))
            except UnicodeDecodeError as error:
                _refuse(path, number, f"is not UTF-8 ({error.reason} at byte {error.start}): write it as UTF-8")
            except (ValueError, RecursionError) as error:
                _refuse(path, number, f"is not JSON ({error}): mend or delete that line, or fetch the file again")
            yield _Row(number, values, raw.tell())


def _tabled(path: Path, columns: list[str], ending: str) -> Iterator[_Row]:
    size, number = path.stat().st_size, 0
    if path.name.lower().endswith(PACKED):
        raise _Fault(f"of a packed {ending} cannot be read, which is packed inside: unpack the file")
    for batch, of_all in _parquet(path, columns) if ending == ".parquet" else _arrow(path, columns):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_one(batch, i, path, number + i + 1) for i in range(batch.num_rows)]
        for values in rows:
            number += 1
            yield _Row(number, values, int(size * of_all))


def _parquet(path: Path, columns: list[str]) -> Iterator[tuple[Any, float]]:
    """Batches of a few rows, and the share of the file that is read with each."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        heads, done = _heads(file.schema_arrow.names, columns), 0
        for batch in file.iter_batches(_AT_ONCE, columns=heads):
            done += batch.num_rows
            yield batch, done / file.metadata.num_rows


def _arrow(path: Path, columns: list[str]) -> Iterator[tuple[Any, float]]:
    """As `_parquet`, of a stream, which `datasets` writes, or a file of record batches."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(max(0, file.size() - len(_STREAM_ENDS)))
            if file.read() != _STREAM_ENDS:  # what is cut between two batches would pass for a whole one
                raise EOFError("it has no end")
            file.seek(0)
            reader = batches = pyarrow.ipc.open_stream(file)
        heads = _heads(reader.schema.names, columns)
        for batch in batches:
            part = batch.select(heads)
            for first in range(0, part.num_rows, _AT_ONCE):
                yield part.slice(first, _AT_ONCE), file.tell() / file.size()


def _heads(names: list[str], columns: list[str]) -> list[str]:
    """The columns of a table that hold the wanted ones."""
    for column, setting in zip(columns, ("data.text_column", "data.id_column"), strict=False):
        if column not in names and column.partition(".")[0] not in names:
            raise _Fault(f"has no {column!r}, but {_listed(names)}: set {setting}")
    return list(dict.fromkeys(column if column in names else column.partition(".")[0] for column in columns))


def _one(batch: Any, index: int, path: Path, number: int) -> Any:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        _refuse(path, number, f"is not UTF-8 ({error.reason} at byte {error.start}): write it as UTF-8")


def _found(values: Any, column: str, setting: str) -> Any:
    """What stands in a column of a row, which may be that of an object in it."""
    if not isinstance(values, dict):
        raise _Fault(f"is {shown(values)}: expected an object with a key {column!r}")
    if column in values:
        return values[column]
    head, _, rest = column.partition(".")
    if head not in values:
        raise _Fault(f"has no {column!r}, but {_listed(list(values))}: set {setting}, or mend the row")
    if not rest:
        return values[head]
    if values[head] is None:
        raise _Fault(f"has null for {head!r}, and {setting} asks for {column!r} in it: {_DROP}")
    return _found(values[head], rest, setting)


_DROP = "drop that row, or give it a text"


def _text(value: Any, column: str) -> str:
    if isinstance(value, bytes):  # a column of bytes may hold text
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            reason = f"({error.reason} at byte {error.start}): write it as UTF-8"
            raise _Fault(f"has bytes for {column!r} that are not UTF-8 {reason}") from error
    if value is None:
        raise _Fault(f"has null for {column!r}: {_DROP}")
    if not isinstance(value, str):
        raise _Fault(f"has {shown(value)} for {column!r}: expected text; set data.text_column to a column of text")
    return _whole(value, column)


def _id(values: Any, column: str) -> str:
    value = _found(values, column, "data.id_column")
    if isinstance(value, bool) or not isinstance(value, str | int):
        what = "null" if value is None else shown(value)
        raise _Fault(f"has {what} for {column!r}: expected a text or a whole number that names the document")
    return _whole(str(value), column)


def _whole(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Fault(f"has half a character at place {error.start} of {column!r}: mend or drop that row") from error
    return text


def _listed(names: list[str]) -> str:
    most = 8
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _refuse(path: Path, row: int, problem: str) -> NoReturn:
    raise ValueError(f"data.path: row {row} of {os.fspath(path)!r} {problem}")
