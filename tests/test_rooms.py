"""The rooms of the house: arrows between them run downwards only, and no modules stand in a circle.

`python -m tests.test_rooms` prints how many rooms, arrows, arrows up and circles there are.
"""

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

import lensjax

ROOT = Path(__file__).parents[1]
# Where it is imported from, which may be an installed wheel.
LIBRARY = Path(lensjax.__file__).parents[1]
GROUND, FRONT = "ground", "front door"
# From the ground up: a room imports from those before it.
ORDER = (GROUND, "losses", "context", "models", "training", "session", "evaluation", "plots", "runs", FRONT)
ON_THE_GROUND = ("_settings", "_numerics", "_version")
# What is pure knows nothing of the outside world.
PURE = ("losses", "context", "models", "training", "session", "evaluation")

Graph = Mapping[str, set[str]]


def modules(root: Path, package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name; a package's name stands for its `__init__.py`."""
    paths = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def imports(name: str, paths: Mapping[str, Path]) -> set[str]:
    """What a module imports, at its top or inside of a function.

    `from a import b` is an import of the module `a.b` where there is one, and of `a` where there is none.
    """
    here = name if paths[name].name == "__init__.py" else name.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(paths[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here.split(".")[: len(here.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inside = {alias.name: f"{source}.{alias.name}" for alias in node.names}
            names |= {whole if whole in paths else source for whole in inside.values()}
    return names - {name}


def graph(root: Path, package: str) -> dict[str, set[str]]:
    """All that each module of a package imports."""
    paths = modules(root, package)
    return {name: imports(name, paths) for name in paths}


def room_of(name: str) -> str:
    """The room that a module is in."""
    _, *inside = name.split(".")
    return FRONT if not inside else GROUND if inside[0] in ON_THE_GROUND else inside[0]


def arrows(edges: Graph) -> dict[tuple[str, str], list[str]]:
    """Pairs of rooms, one of which imports from the other, and the imports that make the arrow."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for name, others in edges.items():
        for other in sorted(others & edges.keys()):
            if room_of(name) != room_of(other):
                pairs.setdefault((room_of(name), room_of(other)), []).append(f"{name} imports {other}")
    return pairs


def arrows_up(edges: Graph) -> list[str]:
    """Imports from a room that stands above."""
    pairs = arrows(edges)
    return [one for (room, other), those in pairs.items() if ORDER.index(room) < ORDER.index(other) for one in those]


def circles(edges: Graph) -> list[set[str]]:
    """Groups of modules each of which imports, by way of others, every other one of the group."""

    def reach(name: str) -> set[str]:
        seen, waiting = set(), [name]
        while waiting:
            new = (edges[waiting.pop()] & edges.keys()) - seen
            seen |= new
            waiting += new
        return seen

    reached = {name: reach(name) for name in edges}
    groups = {frozenset(one for one in reached[name] if name in reached[one]) for name in edges}
    return [set(group) for group in groups if group]


def strangers(edges: Graph) -> list[str]:
    """Imports of what is built on the library, or tests it."""
    outside = ("experiments", "tests")
    return [f"{name} imports {one}" for name, others in edges.items() for one in others if one.split(".")[0] in outside]


def describe(edges: Graph) -> str:
    rooms = {room_of(name) for name in edges}
    inside = sum(len(others & edges.keys()) for others in edges.values())
    return (
        f"{len(rooms)} rooms, {len(arrows(edges))} arrows between them, {len(arrows_up(edges))} arrows up, "
        f"{len(circles(edges))} circles ({len(edges)} modules, {inside} imports of one another)"
    )


LENSJAX = graph(LIBRARY, "lensjax")


def test_there_are_few_rooms_and_each_has_its_floor():
    print(f"\n{describe(LENSJAX)}")
    rooms = {room_of(name) for name in LENSJAX}
    assert rooms == set(ORDER) and len(rooms) <= 12


def test_no_arrow_points_up():
    assert arrows_up(LENSJAX) == []


def test_no_modules_stand_in_a_circle():
    assert circles(LENSJAX) == []


def test_the_library_knows_neither_experiments_nor_tests():
    assert strangers(LENSJAX) == []


def test_what_is_pure_does_not_know_the_outside_world():
    outside = {"runs", "plots", FRONT}
    assert not [pair for pair in arrows(LENSJAX) if pair[0] in PURE and pair[1] in outside]
    devices = ("grain", "orbax", "rich", "tensorboardX", "matplotlib", "tyro")
    worldly = {name for name, others in LENSJAX.items() if any(one.split(".")[0] in devices for one in others)}
    assert {room_of(name) for name in worldly} == {"runs", "plots"}


def test_the_tests_mirror_the_house():
    rooms = {room for room in ORDER if (LIBRARY / "lensjax" / room).is_dir()}
    parts = {path.name for path in (ROOT / "experiments").iterdir() if path.is_dir()} | {
        "experiments",
        "faults",
        "fuzz",
        "kill",
    }
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert rooms <= folders <= rooms | parts


# What the tests above would notice.

HOUSE = {
    "house/__init__.py": "from house.context import tree",
    "house/_settings.py": "import math",
    "house/losses.py": "from house import _settings",
    "house/context/__init__.py": "",
    "house/context/tree.py": "from house.losses import loss\nimport house._settings",
    "house/training/__init__.py": "",
    "house/training/steps/__init__.py": "",
    "house/training/steps/update.py": "from house.context import tree",
}


def built(folder: Path, **changes: str) -> dict[str, set[str]]:
    for name, text in {**HOUSE, **{f"{name}.py": text for name, text in changes.items()}}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return graph(folder, "house")


def test_a_house_without_a_fault_has_none(tmp_path):
    edges = built(tmp_path)
    assert arrows_up(edges) == circles(edges) == strangers(edges) == []
    assert set(arrows(edges)) == {
        ("losses", GROUND),
        ("context", GROUND),
        ("context", "losses"),
        ("training", "context"),
        (FRONT, "context"),
    }
    assert describe(edges).startswith("5 rooms, 5 arrows between them, 0 arrows up, 0 circles (8 modules, 5 imports")


@pytest.mark.parametrize(
    "text",
    [
        "from house.training.steps import update",
        "import house.training.steps.update as step",
        "from ..training.steps.update import anything",
        "def later():\n    from house.training.steps.update import anything",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.training.steps import update",
    ],
)
def test_an_arrow_up_is_noticed_in_whatever_form(tmp_path, text):
    edges = built(tmp_path, **{"house/context/tree": text})
    assert arrows_up(edges) == ["house.context.tree imports house.training.steps.update"]
    assert circles(edges) == [{"house.context.tree", "house.training.steps.update"}]


def test_a_circle_inside_of_a_room_is_noticed(tmp_path):
    edges = built(
        tmp_path,
        **{
            "house/context/tree": "from . import nodes",
            "house/context/nodes": "from house.context.edits import swap",
            "house/context/edits": "import house.context.tree",
        },
    )
    assert arrows_up(edges) == []
    assert circles(edges) == [{"house.context.tree", "house.context.nodes", "house.context.edits"}]


def test_an_import_of_what_is_built_on_the_house_is_noticed(tmp_path):
    edges = built(tmp_path, **{"house/losses": "from experiments.train import main\nimport tests"})
    assert sorted(strangers(edges)) == ["house.losses imports experiments.train", "house.losses imports tests"]


def test_the_front_door_is_above_all_rooms(tmp_path):
    assert arrows_up(built(tmp_path, **{"house/losses": "import house"})) == ["house.losses imports house"]


if __name__ == "__main__":
    print(describe(LENSJAX))
    for problem in [*arrows_up(LENSJAX), *strangers(LENSJAX), *map(str, circles(LENSJAX))]:
        print(problem)
