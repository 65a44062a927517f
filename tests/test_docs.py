"""What the documents say is so: their tables, links, examples, commands and names."""

import csv
import importlib
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import tyro
from matplotlib.figure import Figure

import experiments.train
import lensjax
from experiments.quiet_star import train as quiet_star_train
from experiments.rlan import train as rlan_train
from lensjax import plots
from lensjax.evaluation import rivals

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("**/*.md"))]
TEXT = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
NAMES = ("policy", "pick")
"""Columns that name who chose a context."""
PARSERS = {
    "experiments.train": experiments.train.parse,
    "experiments.quiet_star.train": quiet_star_train.parse,
    "experiments.rlan.train": rlan_train.parse,
}


# Tables


def tables():
    for path in sorted(DOCS.glob("**/*.csv")):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        if column := next((name for name in NAMES if name in rows[0]), None):
            yield pytest.param(rows, column, id=path.name)


TABLES = list(tables())


@pytest.mark.parametrize(("rows", "column"), TABLES)
def test_every_table_of_policies_says_what_they_may_know(rows, column):
    assert all(row["information"] == rivals.information(row[column]) for row in rows)


def test_there_are_tables_of_policies():
    assert TABLES


# Links


def anchors(text):
    """Of all headings, as a page of GitHub or of a site has them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXT)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT[page]):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_and_picture_is_linked():
    linked = set()
    for page, text in TEXT.items():
        linked |= {((ROOT / page).parent / link.split("#")[0]).resolve() for link in re.findall(r"\]\(([^)]+)\)", text)}
    files = {path for path in DOCS.glob("**/*") if path.is_file() and path != DOCS / "index.md"}
    makers = {path for path in files if DOCS / "site" in path.parents}  # of the site
    assert not sorted(files - linked - makers)


def test_every_kind_of_picture_has_a_page():
    drawn = {
        f"{module.__name__}.{name}"
        for info in pkgutil.iter_modules(plots.__path__, "lensjax.plots.")
        for module in [importlib.import_module(info.name)]
        for name, function in vars(module).items()
        if getattr(function, "__module__", "") == module.__name__ and not name.startswith("_")
        if inspect.isfunction(function) and function.__annotations__["return"] is Figure and name != "new_figure"
    }
    pages = "".join(text for page, text in TEXT.items() if page.startswith("docs/pictures/"))
    assert drawn and not {name for name in drawn if name not in pages}


# Examples and commands


def examples():
    for page, text in TEXT.items():
        # The cells of a notebook are run together (`test_notebooks`).
        if page.startswith("docs/") and not page.startswith("docs/notebooks/"):
            for index, example in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)):
                yield pytest.param(example, id=f"{page}-{index}")


@pytest.mark.slow
@pytest.mark.parametrize("example", list(examples()))
def test_the_example_runs(example):
    exec(compile(example, "docs", "exec"), {"__name__": "docs"})


def commands():
    """Programs with the words after them; a comment, or two spaces, ends a command."""
    for text in TEXT.values():
        for program, words in re.findall(r"python -m (experiments\.[\w.]+)(.*)", text):
            yield program, re.split(r"  |#|`", words)[0]


COMMANDS = sorted(set(commands()))


def test_every_program_that_is_named_exists():
    missing = {name for name, _ in COMMANDS if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()}
    assert COMMANDS and not missing


OTHERS = [pair for pair in COMMANDS if pair[0] not in PARSERS and pair[1].strip()]


@pytest.mark.parametrize(("program", "words"), OTHERS)
def test_every_command_of_another_program_is_understood(program, words):
    tyro.cli(importlib.import_module(program).Arguments, args=shlex.split(words))


@pytest.mark.parametrize(("program", "words"), [pair for pair in COMMANDS if pair[0] in PARSERS])
def test_every_command_of_a_training_program_is_understood(program, words):
    arguments = shlex.split(words)
    if "--resume" not in arguments:  # which reads a run
        PARSERS[program](arguments)


def test_every_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    texts = [*TEXT.values(), *(path.read_text() for path in (ROOT / ".github").glob("workflows/*.yml"))]
    command = r"(?:`|^ *|run: |&& )make ([a-z-]+)(?=`|$|  | &| [A-Z])"
    named = {name for text in texts for name in re.findall(command, text, flags=re.MULTILINE)}
    assert {"demo", "test", "lint", "docs"} <= named
    assert not sorted(named - targets)


# Names


def test_the_page_of_names_is_the_front_door():
    names = re.findall(r"^\| `(\w+)`", TEXT["docs/api.md"], flags=re.MULTILINE)
    assert sorted(names) == sorted(lensjax.__all__)


def test_every_module_is_in_the_table():
    rows = "\n".join(line.split("|")[1] for line in TEXT["docs/modules.md"].splitlines() if line.startswith("|"))
    package = Path(lensjax.__file__).parent
    paths = {path.relative_to(package).with_suffix("").as_posix() for path in package.glob("**/*.py")}
    modules = {path for path in paths if not path.endswith("__init__")}
    named = set(re.findall(r"`([\w/]+[^/])`", rows))
    assert modules == named, sorted(modules ^ named)
