"""A stream that is read with stops, and what compares two ways to read one."""

import json

import pytest

from experiments.studies import stream as script
from experiments.studies import stream_same, stream_turns
from lensjax.plots import style
from lensjax.runs.store import lock


def rows_in(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_streams_are_compared_percent_by_percent(tmp_path, capsys):
    rows = [{"tokens_read": 5 * number, "sha256": str(number), "seconds": number} for number in (1, 2, 3)]
    one = rows_in(tmp_path / "one", rows)
    stream_same.compare(stream_same.Arguments(one, rows_in(tmp_path / "two", [row | {"seconds": 9} for row in rows])))
    assert capsys.readouterr().out == "all 3 percent are the same to the bit, 15 tokens\n"
    other = rows_in(tmp_path / "three", [rows[0], rows[1] | {"sha256": "x"}, rows[2]])
    with pytest.raises(ValueError, match=r"1 of them differ, first 2 %"):
        stream_same.compare(stream_same.Arguments(one, other))
    with pytest.raises(ValueError, match=r"one has 3 percent of a stream, .*four 2; 0 of them differ"):
        stream_same.compare(stream_same.Arguments(one, rows_in(tmp_path / "four", rows[:2])))


@pytest.mark.slow
def test_a_stream_with_stops_is_the_unbroken_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(style, "_DPI", 20)
    size = {"tokens": 3300, "seed": 2}
    whole = script.stream(script.Arguments(**size, output_dir=tmp_path / "whole"))
    parts = {**size, "output_dir": tmp_path / "parts"}
    assert script.stream(script.Arguments(**parts, until=30)) == {}
    with pytest.raises(ValueError, match="holds the session of another stream: give the arguments"):
        script.stream(script.Arguments(**parts | {"seed": 3}, resume=True))
    with lock.holding(tmp_path / "parts"), pytest.raises(BlockingIOError, match="parts is in use by process"):
        script.stream(script.Arguments(**parts, resume=True))
    with pytest.raises(FileNotFoundError, match="other holds no session to resume"):
        script.stream(script.Arguments(**parts | {"output_dir": tmp_path / "other"}, resume=True))
    assert script.stream(script.Arguments(**parts, until=70, resume=True)) == {}
    summary = script.stream(script.Arguments(**parts, resume=True))
    assert {name: summary[name] for name in ("refocus_steps", "illegal_steps", "nll_by_tenth", "swap_rate")} == {
        name: whole[name] for name in ("refocus_steps", "illegal_steps", "nll_by_tenth", "swap_rate")
    }
    stream_same.compare(stream_same.Arguments(tmp_path / "whole", tmp_path / "parts"))
    left = [tmp_path / "parts" / f"session-{percent}" for percent in (30, 70)]
    assert stream_turns.compare(stream_turns.Arguments(*left, turns=2, intervals=1)).shape == (2, 2)
    assert "late over early, median and quartiles" in capsys.readouterr().out
