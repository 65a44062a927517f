"""Documents written in every format that rows are read from."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


def lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_jsonl(folder: Path, rows: Rows) -> None:
    (folder / "rows.jsonl").write_bytes(lines(rows))


def write_gzip(folder: Path, rows: Rows) -> None:
    half = len(rows) // 2  # two members, as of files that were put together
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines(rows[:half])) + gzip.compress(lines(rows[half:])))


def write_zstd(folder: Path, rows: Rows) -> None:
    import pyarrow

    with pyarrow.CompressedOutputStream(str(folder / "rows.jsonl.zst"), "zstd") as file:
        file.write(lines(rows))


def write_parquet(folder: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=7)


def write_dataset(folder: Path, rows: Rows) -> None:
    """What `datasets.Dataset.save_to_disk` leaves, with a file of the library's own cache beside it."""
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    half, names = len(rows) // 2, [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (table[:half], table[half:]), strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(part, max_chunksize=5)
    (folder / "cache-0123.arrow").write_bytes(b"no data")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "jsonl": write_jsonl,
    "gzip": write_gzip,
    "zstd": write_zstd,
    "parquet": write_parquet,
    "dataset": write_dataset,
}
NEEDS_ARROW = ("zstd", "parquet", "dataset")
