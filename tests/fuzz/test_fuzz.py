"""The fuzzers: their oracle notices what it must, and 300 inputs have no fault."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.runner import Case, Outcome, verdict
from tests.runs import ROOT


class Anything:
    name = "anything"

    def make(self, rng, folder):
        raise NotImplementedError

    def check(self, outcome):
        return "not what was asked for" if outcome.output == "wrong" else ""


RIGHT = [
    (0, "", "", []),
    (0, "", "warning of a library\n", []),
    (1, "", "error: steps must be at least 1\n", []),
    (1, "", "warning: the newest checkpoint is damaged\nerror: no other\n", []),
    (2, "", "a box\nof lines\n", []),
]
WRONG = [
    (None, "", "", [], "busy"),
    (-11, "", "", [], "signal 11"),
    (0, "wrong", "", [], "not what was asked for"),
    (0, "", "Traceback (most recent call last)\n", [], "a traceback"),
    (1, "", "", [], "without a line"),
    (1, "", "error: \n", [], "without a line"),
    (1, "", "one\nerror: two\n", [], "more than one line"),
    (1, "", "error: KeyError: 'x' (LENSJAX_TRACEBACK=1 shows the rest)\n", [], "nobody meant"),
    (1, "", "error: steps must be at least 1\n", ["x/config.json"], "left or changed x/config.json"),
]


@pytest.mark.parametrize(("code", "output", "errors", "changed"), RIGHT)
def test_what_is_right(code, output, errors, changed):
    outcome = Outcome(Case("x", print), Path("x"), code, output, errors, 1.0, changed)
    assert verdict(Anything(), outcome) == ""


@pytest.mark.parametrize(("code", "output", "errors", "changed", "expected"), WRONG)
def test_what_is_wrong(code, output, errors, changed, expected):
    outcome = Outcome(Case("x", print), Path("x"), code, output, errors, 1.0, changed)
    assert expected in verdict(Anything(), outcome)


@pytest.mark.slow
@pytest.mark.parametrize("count", [25, pytest.param(300, marks=pytest.mark.long)])
def test_inputs_have_no_fault(count):
    """In a process of its own: this one has started JAX, and cannot be forked any more."""
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(count), "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
