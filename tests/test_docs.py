"""What the documents' tables say of what each policy may know."""

import csv
from pathlib import Path

import pytest

from lensjax.evaluation import rivals

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ("policy", "pick")
"""Columns that name who chose a context."""


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
