"""Breaks single lines of the library and says which breakages the tests notice.

    python -m tests.mutants                               60 of them, against the gate
    python -m tests.mutants --marker '' --only 7 31       two of them, against all tests

A breakage changes one operator, comparison, constant or call on one line. Which ones are drawn depends on the seed and
on the code alone. Each is made in a copy of the repository; tests of the file's own room run first, and the first test
that fails ends the run. Survivors are printed with their line: either no test looks there, or nothing changes.
"""

import argparse
import ast
import csv
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SWAPPED: dict[type, str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.FloorDiv: "*",
    ast.Mod: "*",
}
TOKENS: dict[type, str] = {
    **{ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.BitAnd: "&", ast.BitOr: "|", ast.FloorDiv: "//"},
    **{ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Mod: "%"},
}
CALLS = {"minimum": "maximum", "maximum": "minimum", "sum": "mean", "mean": "sum", "argmin": "argmax", "any": "all"}


@dataclass(frozen=True)
class Mutant:
    """One breakage."""

    path: str
    """File, from the repository's root."""
    line: int
    before: str
    after: str


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All breakages of a file, in the order of its lines; annotations, docstrings and messages are left alone."""
    source = path.read_text()
    lines = source.splitlines()
    tree = ast.parse(source)
    left_alone = {id(inner) for node in ast.walk(tree) for part in _types(node) for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in left_alone:
            continue
        for line, start, end, text in _edits(node, lines):
            before = lines[line - 1]
            after = before[:start] + text + before[end:]
            if after != before:
                yield Mutant(str(path.relative_to(ROOT)), line, before, after)


def _types(node: ast.AST) -> list[ast.expr]:
    """Parts of a node that say types, and defaults of settings: a wrong one is another choice, no fault."""
    if isinstance(node, ast.AnnAssign):
        return [node.annotation, *([node.value] if isinstance(node.value, ast.Constant) else [])]
    if isinstance(node, ast.arg) and node.annotation:
        return [node.annotation]
    if isinstance(node, ast.FunctionDef) and node.returns:
        return [node.returns]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        return node.args[1:]
    return []


def _edits(node: ast.AST, lines: list[str]) -> Iterator[tuple[int, int, int, str]]:
    """Line, first and last column and new text of each change to a node; operands on two lines are left alone."""
    pairs: list[tuple[ast.expr, type, ast.expr]] = []
    if isinstance(node, ast.BinOp):
        pairs = [(node.left, type(node.op), node.right)]
    elif isinstance(node, ast.Compare):
        pairs = [(a, type(op), b) for a, op, b in zip((node.left, *node.comparators), node.ops, node.comparators)]  # noqa: B905
    for left, operator, right in pairs:
        is_type = isinstance(right, ast.Constant) and (right.value is None or isinstance(right.value, str))
        if operator in SWAPPED and left.end_lineno == right.lineno and not is_type:
            start = left.end_col_offset or 0
            between = lines[right.lineno - 1][start : right.col_offset]
            place = start + between.find(TOKENS[operator])
            if TOKENS[operator] in between:
                yield right.lineno, place, place + len(TOKENS[operator]), SWAPPED[operator]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        yield node.lineno, node.col_offset, node.end_col_offset or 0, str(node.value + 1)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
        end = node.func.end_col_offset or 0
        yield node.func.end_lineno or 0, end - len(node.func.attr), end, CALLS[node.func.attr]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield node.lineno, node.col_offset, node.operand.col_offset, ""


def draw(count: int, seed: int) -> list[Mutant]:
    """Breakages of different lines, spread over the files as their lines are."""
    found = [mutant for path in sorted((ROOT / "lensjax").rglob("*.py")) for mutant in mutants_of(path)]
    rng = random.Random(seed)
    rng.shuffle(found)
    places: dict[tuple[str, int], Mutant] = {}
    for mutant in found:
        if "Annotated[" not in mutant.before:
            places.setdefault((mutant.path, mutant.line), mutant)
    return list(places.values())[:count]


def own_tests(mutant: Mutant) -> list[str]:
    """The tests that mirror a file's room, those named like the file first."""
    path = Path(mutant.path)
    room = path.parts[1] if len(path.parts) > 2 else ""
    files = sorted((ROOT / "tests" / room).glob("test_*.py"))
    named = [file for file in files if path.stem in file.stem]
    return [str(file.relative_to(ROOT)) for file in (*named, *(file for file in files if file not in named))]


def is_caught(mutant: Mutant, folder: Path, marker: str, workers: str, *, own: bool) -> str:
    """Which tests notice a breakage in a copy of the repository: "own", "others", or "" for none."""
    path = folder / mutant.path
    lines = path.read_text().splitlines()
    lines[mutant.line - 1] = mutant.after
    path.write_text("\n".join(lines) + "\n")
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker]
    try:
        for name, tests in (("own", own_tests(mutant)), ("others", ["-n", workers, "--dist", "worksteal"])):
            if own and name == "others":
                return ""
            if tests and subprocess.run([*pytest, *tests], cwd=folder, capture_output=True).returncode:
                return name
        return ""
    finally:
        lines[mutant.line - 1] = mutant.before
        path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--marker", default="not slow", help="of the tests to run, as pytest's -m")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--own", action="store_true", help="run the tests of the file's own room alone")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the breakages to try")
    parser.add_argument("--csv", type=Path, help="where the table goes")
    parser.add_argument("--list", action="store_true", help="show the breakages and run nothing")
    arguments = parser.parse_args()
    drawn = draw(arguments.count, arguments.seed)
    chosen = range(len(drawn)) if arguments.only is None else arguments.only
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        for part in ("lensjax", "experiments", "tests", "docs"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (*ROOT.glob("*.*"), ROOT / "Makefile"):
            if file.is_file():
                shutil.copy(file, folder)
        shutil.copytree(ROOT / ".github", folder / ".github")
        for number in chosen:
            mutant = drawn[number]
            caught = (
                ""
                if arguments.list
                else is_caught(mutant, folder, arguments.marker, arguments.workers, own=arguments.own)
            )
            rows.append({"number": number, **asdict(mutant), "caught": caught})
            verdict = "listed" if arguments.list else f"caught by {caught}" if caught else "SURVIVED"
            print(f"{number:3} {verdict:18} {mutant.path}:{mutant.line}: {mutant.after.strip()}", flush=True)
    if not arguments.list:
        print(f"{sum(bool(row['caught']) for row in rows)} of {len(rows)} caught")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
