"""Tables as CSV files and reports as JSON, whole or not at all."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lensjax.runs.store import files


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a table; its columns are the keys of the rows.

    Raises:
      ValueError: there is no row; nothing is written.
    """
    if not rows:
        raise ValueError(f"a table has one or more rows, and there is none for {path}")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    files.write_text(path, text.getvalue())


def write_json(value: Any, path: Path) -> None:
    """Writes a report; numbers that JSON does not have, which are not finite, are null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    files.write_text(path, json.dumps(finite, indent=2) + "\n")
