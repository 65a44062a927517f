"""Rounds of random interruptions; `python -m tests.kill --rounds 100` plays more."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_interrupted_runs_come_out_as_if_nothing_had_happened(rounds, programs):
    """In a process of its own: this one has started JAX, and cannot be forked any more."""
    command = [sys.executable, "-m", "tests.kill", "--rounds", str(rounds), "--seed", "0"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(programs)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
