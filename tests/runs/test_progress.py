"""A bar on a terminal alone, as wide as fits; a plain line now and then elsewhere."""

import contextlib
import io
import os
import pty
import re

import pytest
from rich.console import Console

from lensjax.runs.engine.progress import StepBar, has_bars, work_bar
from tests.toy_run import Run


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_m10_a_log_holds_no_bars_even_with_forced_colours(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    run = Run(tmp_path / "run", monkeypatch)
    assert Console(file=run.output).is_terminal  # what rich believes
    run.start()
    assert "lens" in run.output.getvalue() and "\x1b" not in run.output.getvalue()


def test_m10_a_terminal_has_bars(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        assert has_bars(Console(file=terminal))
    os.close(reader)
    assert not has_bars(Console(file=io.StringIO()))


class Clock:
    """Seconds, which pass when they are told to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_file_gets_a_plain_line_a_minute():
    output, clock = io.StringIO(), Clock()
    with StepBar(Console(file=output, width=40), "lens", 100, done=20, clock=clock) as bar:
        for step in range(21, 26):
            clock.now += 25
            if step == 24:
                bar.show({"nll_policy": 1.25, "nll_baseline": 1.5, "hit_rate": 0.5})
            bar.advance()
    # 3 steps in 75 s, 77 left; then the clock has to pass 135 s.
    assert output.getvalue() == "lens 23 of 100  25.0 s/step  32:05 left\n"
    with StepBar(Console(file=output), "lens", 20_000, done=0, clock=clock) as bar:
        bar.show({"nll_policy": 1.25, "nll_baseline": 1.5, "hit_rate": 0.5})
        for _ in range(130):
            clock.now += 0.5
            bar.advance()
    assert output.getvalue().splitlines()[1:] == [
        "lens 120 of 20000  2.0 steps/s  2:45:40 left  nll_policy 1.250  nll_baseline 1.500"
    ]


def drawn() -> list[str]:
    """What a terminal is sent for a bar, by line, escapes left out."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal, StepBar(Console(file=terminal), "lens", 1000, done=0) as bar:
        bar.show({"nll_policy": 1.25, "nll_baseline": 1.5})
        for _ in range(10):
            bar.advance()
        bar._bars.refresh()
    raw = ""
    with contextlib.suppress(OSError):  # which is how a terminal ends whose other side is closed
        while piece := os.read(reader, 2**16):
            raw += piece.decode()
    os.close(reader)
    assert ("\x1b[3" in raw) is ("NO_COLOR" not in os.environ)
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)) if line.strip()]


@pytest.mark.parametrize("colours", [True, False])
@pytest.mark.parametrize("columns", [24, 40, 70, 80, 120])
def test_a_bar_fits_into_its_terminal(monkeypatch, columns, colours):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    lines = drawn()
    assert lines and max(map(len, lines)) <= columns
    assert "10/1000" in lines[-1]
    assert ("steps/s" in lines[-1]) is (columns >= 60)
    assert ("nll_policy 1.250" in lines[-1]) is (columns >= 76)
    assert ("nll_policy 1.250  nll_baseline 1.500" in lines[-1]) is (columns >= 100)


def test_work_without_a_terminal_says_nothing(capfd):
    with work_bar("tokens", 10) as count:
        count(10)
    assert capfd.readouterr() == ("", "")
