"""The site is made of files that are there, and asks for nothing from outside."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lensjax

ROOT = Path(__file__).parents[1]


def test_the_picture_of_the_tree_is_the_one_that_is_drawn():
    maker = ROOT / "docs" / "site" / "tree.py"
    spec = importlib.util.spec_from_file_location("tree", maker)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.picture() == module.PATH.read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The text of each page of the site, by path."""
    pytest.importorskip("mkdocs_autorefs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr
    return {path: path.read_text() for path in folder.glob("**/*.html")}


@pytest.mark.slow
def test_nothing_is_fetched_and_no_link_is_broken(pages):
    anchors = {path: set(re.findall(r'(?:id|name)="?([^">\s]+)', text)) for path, text in pages.items()}
    for path, text in pages.items():
        assert not re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="?https?:', text), path
        for link in set(re.findall(r'(?:src|href)="?([^\s">]+)', text)):
            if path.name == "404.html" or re.match("https?:|data:|javascript:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.is_file(), (path.name, link)
            assert not anchor or anchor in anchors[target], (path.name, link)


@pytest.mark.slow
def test_every_public_name_is_described(pages):
    described = {name for text in pages.values() for name in re.findall(r'id="?lensjax\.(\w+)[">\s]', text)}
    assert set(lensjax.__all__) <= described


@pytest.mark.slow
def test_the_sections_of_docstrings_are_understood(pages):
    sections = "Args|Attributes|Examples?|Raises|Returns"
    assert not [path.name for path, text in pages.items() if re.search(f"<p>({sections}):", text)]
