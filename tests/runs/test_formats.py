"""Documents of one file in every format, and what is said of a damaged one."""

import gzip
import json
import sys

import pytest

from lensjax.runs.data import formats
from lensjax.runs.data.formats import documents
from tests.formats import NEEDS_ARROW, WRITERS, lines, write_jsonl

ROWS = [{"id": 100 + i, "text": f"Text {i} is über.\n", "meta": {"text": f"inner {i}"}} for i in range(20)]
ARROW_IS_ABSENT = "pyarrow (extra data) is not installed"


def read(path, name="", *, text_column="text", id_column=None):
    return list(documents(path, name or path.name, text_column=text_column, id_column=id_column))


def write(folder, kind, rows):
    if kind in NEEDS_ARROW:
        pytest.importorskip("pyarrow", reason=ARROW_IS_ABSENT)
    WRITERS[kind](folder, rows)
    return formats.members(sorted(folder.iterdir()))


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_rows_are_in_every_format(tmp_path, kind):
    paths = write(tmp_path, kind, ROWS)
    found = [one for path in paths for one in read(path, id_column="id")]
    assert [(one.id, one.text) for one in found] == [(str(row["id"]), row["text"]) for row in ROWS]
    assert [one.text for path in paths for one in read(path, text_column="meta.text")] == [
        row["meta"]["text"] for row in ROWS
    ]
    for path in paths:
        one = read(path, f"sub/{path.name}")
        unpacked = path.name.removesuffix(".gz").removesuffix(".zst")
        assert [row.id for row in one] == [f"sub/{unpacked}#{i + 1}" for i in range(len(one))]
        assert [row.read for row in one] == sorted(row.read for row in one)
        assert 0 < one[-1].read <= path.stat().st_size


def test_lines_by_hand(tmp_path):
    path = tmp_path / "a.NDJSON"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "x.y": 1}\n\n  \n{"text": ""}\r\n{"text": "\\u00e4\\n"}')
    assert [one[:2] for one in read(path)] == [("a.NDJSON#1", "a"), ("a.NDJSON#5", "ä\n")]
    path.write_text('{"x.y": "whole", "x": {"y": "part"}}\n')
    assert [one.text for one in read(path, text_column="x.y")] == ["whole"]


def test_text_may_be_packed_and_keeps_its_name(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"caf\xe9 is no UTF-8"))
    (tmp_path / "b.txt").write_text("plain")
    assert read(tmp_path / "a.txt.gz", "x/a.txt.gz")[0][:2] == ("x/a.txt", "caf\ufffd is no UTF-8")
    assert read(tmp_path / "b.txt")[0] == ("b.txt", "plain", 5)
    assert [formats.is_plain(name) for name in ("a.txt", "a.json", "A.GZ", "a.jsonl", "a.Parquet")] == [
        *(True, True, False, False, False)
    ]


@pytest.mark.parametrize("kind", ["large_string", "binary", "dictionary", "file"])
def test_arrow_has_text_in_several_types(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow", reason=ARROW_IS_ABSENT)
    column = pyarrow.array([row["text"] for row in ROWS])
    if kind in ("large_string", "binary"):
        column = column.cast(getattr(pyarrow, kind)())
    table = pyarrow.table(
        {"other": [None] * len(ROWS), "text": column.dictionary_encode() if kind == "dictionary" else column}
    )
    opened = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, opened(file, table.schema) as writer:
        writer.write_table(table)
    assert [one.text for one in read(tmp_path / "a.arrow")] == [row["text"] for row in ROWS]


@pytest.mark.slow
def test_what_datasets_itself_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; it is needed for this test alone")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": whole, "test": whole.select([3, 1])}).save_to_disk(tmp_path / "two")
    found = formats.members(sorted(path for path in tmp_path.rglob("*") if path.is_file()))
    assert {path.suffix for path in found} == {".arrow"} and len(found) == 5
    ids = {path.parent.relative_to(tmp_path).as_posix(): [] for path in found}
    for path in found:
        ids[path.parent.relative_to(tmp_path).as_posix()] += [one.id for one in read(path, id_column="id")]
    every = [str(row["id"]) for row in ROWS]
    assert ids == {"one": every, "two/train": every, "two/test": ["103", "101"]}


# What is wrong, where, and what to do


def replaced(place, **changes):
    return [row | (changes if i == place else {}) for i, row in enumerate(ROWS)]


BAD_ROWS = {
    "null": ({"text": None}, {}, r"row 14 of '.*' has null for 'text': drop that row, or give it a text"),
    "nested null": (
        {"meta": None},
        {"text_column": "meta.text"},
        "row 14 of .* has null for 'meta', and data.text_column asks",
    ),
    "null id": ({"id": None}, {"id_column": "id"}, "row 14 of .* has null for 'id': expected a text or a whole number"),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("changes", "columns", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_without_text_is_named(tmp_path, kind, changes, columns, message):
    paths = write(tmp_path, kind, replaced(13, **changes))
    message = message.replace("row 14", "row 4") if kind == "dataset" else message  # of the second file
    with pytest.raises(ValueError, match=message):
        [one for path in paths for one in read(path, **columns)]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, kind):
    (path, *_) = write(tmp_path, kind, ROWS)
    with pytest.raises(
        ValueError, match=r"row 1 of '.*' has no 'body', but 'id', 'text', 'meta': set data.text_column"
    ):
        read(path, text_column="body")
    with pytest.raises(ValueError, match=r"row 1 of '.*' has no 'name', but 'id', 'text', 'meta': set data.id_column"):
        read(path, id_column="name")
    with pytest.raises(ValueError, match=r"row 1 of '.*' has no 'body', but 'text': set data.text_column"):
        read(path, text_column="meta.body")
    with pytest.raises(
        ValueError, match=r"row 1 of '.*' has 100 for 'id': expected text; set data.text_column to a col"
    ):
        read(path, text_column="id")


BAD_LINES = {
    "not UTF-8": (b'{"text": "caf\xe9"}', r"row 21 of .* is not UTF-8 \(.* at byte 13\): write it as UTF-8"),
    "not JSON": (b'{"text": "a"', "row 21 of .* is not JSON .*: mend or delete that line, or fetch the file again"),
    "too deep": (b"[" * 100_000, "row 21 of .* is not JSON"),
    "no object": (b'["text"]', "row 21 of .* is .'text'.: expected an object with a key 'text'"),
    "half a character": (
        b'{"text": "a\\ud800"}',
        "row 21 of .* has half a character at place 1 of 'text': mend or drop",
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS) + line)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_bytes_of_a_table_that_are_no_text_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason=ARROW_IS_ABSENT)
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array([*[row["text"].encode() for row in ROWS], b"caf\xe9"])
    for column in (raw, pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())):
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(
            ValueError, match=r"row 21 of .* not UTF-8 \(unexpected end of data at byte 3\): write it as"
        ):
            read(tmp_path / "a.parquet")


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def overwrite(path, first, last):
    path.write_bytes(path.read_bytes()[:first] + bytes(last - first) + path.read_bytes()[last:])


DAMAGE = {
    "gzip cut": ("gzip", lambda path: cut(path, -9)),
    "no gzip": ("gzip", lambda path: path.write_bytes(b"none of it" + path.read_bytes())),
    "gzip overwritten": ("gzip", lambda path: overwrite(path, 40, 80)),
    "zstd cut": ("zstd", lambda path: cut(path, -9)),
    "no zstd": ("zstd", lambda path: path.write_bytes(b"none of it" + path.read_bytes())),
    "parquet cut": ("parquet", lambda path: cut(path, -9)),
    "parquet overwritten": ("parquet", lambda path: overwrite(path, 4, 400)),
    "dataset cut between batches": ("dataset", lambda path: cut(path, -8)),
    "dataset cut": ("dataset", lambda path: cut(path, 200)),
    "dataset empty": ("dataset", lambda path: path.write_bytes(b"")),
}


@pytest.mark.parametrize(("kind", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_never_read_in_part(tmp_path, kind, damage):
    (path, *_) = write(tmp_path, kind, ROWS)
    damage(path)
    with pytest.raises(
        ValueError, match=rf"data.path: '.*{path.name}' is damaged or cut short.*: fetch or write it again"
    ):
        read(path)


def test_what_is_packed_in_a_way_that_is_not_read_is_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"any"))
    with pytest.raises(ValueError, match=r"a\.tar\.gz' is one of an archive: unpack it into a folder"):
        read(tmp_path / "a.tar.gz")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"any"))
    with pytest.raises(ValueError, match=r"a\.parquet\.gz' of a packed \.parquet cannot be read.*unpack the file"):
        read(tmp_path / "a.parquet.gz")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"any")
    with pytest.raises(ImportError, match=rf"data.path: '.*{name}' needs pyarrow: pip install 'lensjax.data.'"):
        read(tmp_path / name)
    write_jsonl(tmp_path, ROWS)
    assert len(read(tmp_path / "rows.jsonl")) == len(ROWS)


def test_a_data_set_whose_files_are_not_all_there_is_refused(tmp_path):
    paths = write(tmp_path, "dataset", ROWS)
    assert [path.name for path in paths] == [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"is a data set without data-00001-of-00002\.arrow: save it to disk again"):
        formats.members(sorted(tmp_path.iterdir()))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [1]}))
    with pytest.raises(ValueError, match=r"state\.json' names no files of a data set"):
        formats.members(sorted(tmp_path.iterdir()))
