"""What the README shows must work as it stands there."""

import re
from pathlib import Path

import pytest

import lensjax

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "example", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL), ids=["session", "rollouts"]
)
def test_the_example_runs(example):
    exec(compile(example, "README.md", "exec"), {})


def test_every_target_and_file_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`", README)) | set(
        re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE)
    )
    assert {"demo", "test", "recall"} <= named <= targets
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links and all((ROOT / link).is_file() for link in links)


def test_every_module_is_in_the_table():
    rows = "\n".join(line.split("|")[1] for line in README.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`([a-z_]+)/?`", rows))
    package = Path(lensjax.__file__).parent
    modules = {path.stem for path in package.iterdir() if path.name[0] not in "_." and path.name != "py.typed"}
    assert modules <= named, sorted(modules - named)
