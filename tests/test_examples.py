"""The examples in docstrings do what they say, as strictly as the tests run."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import lensjax

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples():
    """Every docstring with an example, each in a namespace of its own: it must import what it uses."""
    names = [module.name for module in pkgutil.walk_packages(lensjax.__path__, "lensjax.")]
    for name in ["lensjax", *names]:
        source = Path(importlib.util.find_spec(name).origin)
        if ">>>" in source.read_text():
            yield from doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), globs={})


@pytest.mark.parametrize("example", [one for one in examples() if one.examples], ids=lambda one: one.name)
def test_an_example_does_what_it_says(example):
    report: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(example, out=report.append)
    assert not report, "".join(report)
