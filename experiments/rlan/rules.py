"""A procedural set of tasks: each is a rule, shown by examples on random grids. Rules are held out by their names.

A hash decides which split a RULE belongs to, for good: what is measured on the test split are rules that were never
trained on, under any seed. Training must not permute colours: that would turn one rule into another one, held out.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import grain
import numpy as np

from experiments.rlan import grids, objects
from experiments.rlan.grids import COLOURS, PADDING
from lensjax._settings import Bound, Repeats, require, settings
from lensjax.runs.data import splits
from lensjax.runs.data.splits import Split

Family = Literal["swap", "recolour", "cycle", "double", "shift", "roll", "turn", "flood", "rank", "border"]
SPLITS: tuple[Split, ...] = get_args(Split)
FAMILIES: tuple[Family, ...] = get_args(Family)
MOVES: tuple[Family, ...] = ("roll", "turn")
OBJECTS: tuple[Family, ...] = ("flood", "rank", "border")
"""With `MOVES`, the families that no table of colours answers; both need grids of `objects.SMALLEST_SIDE` or more."""


@settings("rules")
class RulesConfig:
    """What tasks there are."""

    families: tuple[Family, ...] = ("swap", "recolour")
    """`swap` exchanges two of the colours 1 to 9 (36 rules), `recolour` makes two of them any others (2268), `cycle`
    moves three of them on (168), `double` exchanges two and two others (378); `shift` swaps and then moves all cells by
    one in a direction (144), which changes with a turn or mirror. `roll` moves all cells by an offset around the edges
    (35), `turn` turns or mirrors the grid and may swap two colours (259). On grids of objects, `flood` gives the
    background the colour of the largest or smallest one and its objects others (242), `rank` each object a colour
    by its size (504), `border` one by whether it touches the border (110)."""
    balanced: bool = False
    """Tasks of all families equally often, instead of those of all rules."""
    size: Annotated[int, Bound(1, 64)] = 5
    """Side of the square that holds a grid [S]; the grids fill it."""
    pairs: Repeats = 3
    """Examples of a task [N]."""
    queries: Repeats = 1
    """Further inputs of a task [Q], to be answered from its examples."""

    def _check(self) -> None:
        require(bool(self.families), f"rules.families must name one or more of {', '.join(FAMILIES)}, got ()")
        require(
            self.size >= objects.SMALLEST_SIDE or not set(self.families) & {*MOVES, *OBJECTS},
            f"rules.size must be {objects.SMALLEST_SIDE} or more for the families {', '.join(MOVES + OBJECTS)}, "
            f"got {self.size}",
        )


def noise(random: np.random.Generator, side: int) -> np.ndarray:
    """A grid int32[S, S] of independent colours."""
    return random.integers(COLOURS, size=(side, side), dtype=np.int32)


@dataclass(frozen=True)
class Rule:
    """What is done to a grid, and on which grids it is shown."""

    name: str
    apply: Callable[[np.ndarray], np.ndarray]
    """The answer to an input int32[S, S] without padding; pure."""
    draw: Callable[[np.random.Generator, int], np.ndarray] = noise
    """An input of a side."""


def rules(families: tuple[Family, ...], split: Split) -> list[Rule]:
    """The rules of a split, in the order of their families and names."""
    makers: dict[Family, Callable[[], list[Rule]]] = {
        "swap": _swaps,
        "recolour": _recolourings,
        "cycle": _cycles,
        "double": _doubles,
        "shift": _shifts,
        "roll": _rolls,
        "turn": _turns,
        "flood": _floods,
        "rank": _ranks,
        "border": _borders,
    }
    return [rule for family in FAMILIES if family in families for rule in makers[family]() if _is_of(rule, split)]


@dataclass(frozen=True)
class RuleSource:
    """Tasks without end; task i is a pure function of (config, split, seed, i).

    Each rule of the split comes once in so many tasks as there are rules, in an order of its own each time; balanced,
    families take turns, and that is so within each of them.
    """

    config: RulesConfig
    split: Split
    seed: int

    @functools.cached_property
    def _groups(self) -> list[list[Rule]]:
        """Rules that are equally frequent; the groups take turns."""
        families = self.config.families
        return [
            rules(group, self.split) for group in ([(f,) for f in families] if self.config.balanced else [families])
        ]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `support` int32[N, 2, S, S] and `query` int32[Q, 2, S, S]: inputs and outputs."""
        stream = [self.seed, SPLITS.index(self.split)]
        turn, group = divmod(index, len(self._groups))
        rules = self._groups[group]
        epoch, place = divmod(turn, len(rules))
        rule = rules[np.random.default_rng([*stream, 0, epoch]).permutation(len(rules))[place]]
        random = np.random.default_rng([*stream, 1, index])
        count, side = self.config.pairs + self.config.queries, self.config.size
        inputs = np.stack([rule.draw(random, side) for _ in range(count)])
        tasks = np.stack([inputs, np.stack([rule.apply(grid) for grid in inputs])], axis=1)
        return {"support": tasks[: self.config.pairs], "query": tasks[self.config.pairs :]}


def dataset(config: RulesConfig, split: Split, *, seed: int) -> grain.MapDataset:
    """The tasks of a split as a grain data set."""
    return grain.MapDataset.source(RuleSource(config, split, seed))


def padded(grid: np.ndarray, side: int) -> np.ndarray:
    """A grid of any shape in the top left of a square of padding, int32[S, S].

    Raises:
      ValueError: it does not fit.
    """
    if grid.ndim != 2 or max(grid.shape) > side:
        raise ValueError(f"expected a grid of at most {side} x {side}, got {grid.shape}")
    square = np.full((side, side), PADDING, np.int32)
    square[: grid.shape[0], : grid.shape[1]] = grid
    return square


def _is_of(rule: Rule, split: Split) -> bool:
    return splits.split_of(rule.name, train=0.7, validation=0.1) == split


def _swaps() -> list[Rule]:
    return [_mapping(f"swap {a} {b}", {a: b, b: a}) for a, b in _PAIRS]


def _recolourings() -> list[Rule]:
    return [
        _mapping(f"recolour {a} {b} to {c} {d}", {a: c, b: d})
        for a, b in _PAIRS
        for c, d in itertools.product(range(1, COLOURS), repeat=2)
        if c != a and d != b and (c, d) != (b, a)
    ]


def _cycles() -> list[Rule]:
    triples = [(a, b, c) for a, b, c in itertools.permutations(range(1, COLOURS), 3) if a == min(a, b, c)]
    return [_mapping(f"cycle {a} {b} {c}", {a: b, b: c, c: a}) for a, b, c in triples]


def _doubles() -> list[Rule]:
    return [
        _mapping(f"double {a} {b} {c} {d}", {a: b, b: a, c: d, d: c})
        for (a, b), (c, d) in itertools.combinations(_PAIRS, 2)
        if not {a, b} & {c, d}
    ]


def _shifts() -> list[Rule]:
    ways = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}
    return [_mapping(f"swap {a} {b} {way}", {a: b, b: a}, shift=step) for a, b in _PAIRS for way, step in ways.items()]


def _rolls() -> list[Rule]:
    offsets = itertools.product(range(objects.SMALLEST_SIDE), repeat=2)  # all there are on the smallest grid
    return [
        _mapping(f"roll {down} {right}", {}, shift=(down, right)) for down, right in offsets if (down, right) != (0, 0)
    ]


def _turns() -> list[Rule]:
    swaps: dict[str, dict[int, int]] = {"": {}} | {f" swap {a} {b}": {a: b, b: a} for a, b in _PAIRS}
    return [
        Rule(f"turn {element}{name}", functools.partial(grids.view, index=element, permutation=_table(swap)))
        for element in range(1, grids.DIHEDRAL)
        for name, swap in swaps.items()
    ]


def _floods() -> list[Rule]:
    return [
        Rule(
            f"flood {name} {_said(itself)} {_said(others)}",
            functools.partial(objects.flood, rank=rank, itself=itself, others=others),
            objects.draw,
        )
        for name, rank in (("largest", 0), ("smallest", -1))
        for itself, others in itertools.product(_BECOMES, repeat=2)
    ]


def _ranks() -> list[Rule]:
    return [
        Rule(f"rank {a} {b} {c}", functools.partial(objects.by_rank, colours=(a, b, c)), objects.draw)
        for a, b, c in itertools.permutations(range(1, COLOURS), objects.OBJECTS)
    ]


def _borders() -> list[Rule]:
    return [
        Rule(
            f"border {_said(touching)} {_said(within)}",
            functools.partial(objects.by_border, touching=touching, within=within),
            objects.draw,
        )
        for touching, within in itertools.permutations(_BECOMES, 2)
    ]


def _said(colour: int | None) -> str:
    return "same" if colour is None else str(colour)


def _mapping(name: str, changes: Mapping[int, int], *, shift: tuple[int, int] = (0, 0)) -> Rule:
    """A colour map, and a shift of all cells around the edges."""
    return Rule(name, functools.partial(_mapped, table=_table(changes), shift=shift))


def _mapped(grid: np.ndarray, *, table: np.ndarray, shift: tuple[int, int]) -> np.ndarray:
    return np.roll(table[grid], shift, axis=(0, 1))


def _table(changes: Mapping[int, int]) -> np.ndarray:
    """What each colour becomes, int32[10]."""
    return np.asarray([changes.get(colour, colour) for colour in range(COLOURS)], np.int32)


_PAIRS = tuple(itertools.combinations(range(1, COLOURS), 2))
_BECOMES = (None, *range(COLOURS))
"""What an object may become; None leaves it as it is."""
