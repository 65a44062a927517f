"""What the README shows must work as it stands there."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from lensjax.runs.fit import fit
from tests.runs import cheap_programs, tiny_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["session", "rollouts"])
def test_the_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with cheap_programs():
        for folder in re.findall(r'"(runs/[^"]+)"', example):
            fit(tiny_config(Path(folder)), console=Console(quiet=True))
    exec(compile(example, "README.md", "exec"), {})


def test_it_is_read_in_a_minute():
    assert len(README.split()) <= 700


def test_every_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= {name for pair in named for name in pair if name} <= targets
