"""Progress bars are shown on a terminal alone."""

import io
import os
import pty

import pytest
from rich.console import Console

from lensjax.runs.engine.progress import has_bars
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
