"""The notebooks run as the scripts that they are, and pages and notebooks hold these scripts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
SOURCES = [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob("*.py"))]


def cells(source):
    """Code by cell, without markdown."""
    parts = re.split(r"^# %%", source.read_text(), flags=re.MULTILINE)[1:]
    return [part.strip() for part in parts if not part.startswith(" [markdown]")]


def test_there_are_three_notebooks():
    assert len(SOURCES) == 3


@pytest.mark.parametrize("source", SOURCES)
def test_page_and_notebook_are_of_this_source(source):
    page = source.with_suffix(".md").read_text()
    assert [code.strip() for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)] == cells(source)
    notebook = json.loads(source.with_suffix(".ipynb").read_text())
    code = ["".join(cell["source"]).strip() for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code == cells(source)
    assert not any(output["output_type"] == "error" for cell in notebook["cells"] for output in cell.get("outputs", []))
    assert str(Path.home()) not in json.dumps(notebook)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES)
def test_a_notebook_runs_from_its_first_cell_to_its_last(source, tmp_path):
    env = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(FOLDER.parents[1])}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(source)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
