"""A procedural set of tasks: each is a rule, shown by examples on random grids. Rules are held out by their names.

A hash decides which split a RULE belongs to, for good: what is measured on the test split are rules that were never
trained on, under any seed. Training must not permute colours: that would turn one rule into another one, held out.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import grain
import numpy as np

from experiments.rlan.grids import COLOURS, PADDING
from lensjax import splits
from lensjax.sections import require, require_positive
from lensjax.splits import Split

Family = Literal["swap", "recolour", "cycle", "double", "shift"]
SPLITS: tuple[Split, ...] = get_args(Split)
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class RulesConfig:
    """What tasks there are."""

    families: tuple[Family, ...] = ("swap", "recolour")
    """`swap` exchanges two of the colours 1 to 9 (36 rules), `recolour` makes two of them any others (2268), `cycle`
    moves three of them on (168), `double` exchanges two and two others (378); `shift` swaps and then moves all cells by
    one in a direction (144), which changes with a turn or mirror."""
    size: int = 5
    """Side of the square that holds a grid [S]; the grids fill it."""
    pairs: int = 3
    """Examples of a task [N]."""
    queries: int = 1
    """Further inputs of a task [Q], to be answered from its examples."""

    def __post_init__(self) -> None:
        require_positive(self, "size", "pairs", "queries")
        is_known = bool(self.families) and set(self.families) <= set(FAMILIES)
        require(is_known, f"rules.families must name one or more of {', '.join(FAMILIES)}, got {self.families}")


@dataclass(frozen=True)
class Rule:
    """A colour map, and a shift of all cells around the edges."""

    name: str
    colours: tuple[int, ...]
    """What each colour becomes."""
    shift: tuple[int, int] = (0, 0)

    def apply(self, grid: np.ndarray) -> np.ndarray:
        """The answer to an input [S, S] without padding."""
        return np.roll(np.asarray(self.colours, np.int32)[grid], self.shift, axis=(0, 1))


def rules(families: tuple[Family, ...], split: Split) -> list[Rule]:
    """The rules of a split, in the order of their families and names."""
    makers: dict[Family, Callable[[], list[Rule]]] = {
        "swap": _swaps,
        "recolour": _recolourings,
        "cycle": _cycles,
        "double": _doubles,
        "shift": _shifts,
    }
    return [rule for family in FAMILIES if family in families for rule in makers[family]() if _is_of(rule, split)]


@dataclass(frozen=True)
class RuleSource:
    """Tasks without end; task i is a pure function of (config, split, seed, i).

    Each rule of the split comes once in so many tasks as there are rules, in an order of its own each time.
    """

    config: RulesConfig
    split: Split
    seed: int

    @functools.cached_property
    def _rules(self) -> list[Rule]:
        return rules(self.config.families, self.split)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `support` int32[N, 2, S, S] and `query` int32[Q, 2, S, S]: inputs and outputs."""
        stream = [self.seed, SPLITS.index(self.split)]
        epoch, place = divmod(index, len(self._rules))
        rule = self._rules[np.random.default_rng([*stream, 0, epoch]).permutation(len(self._rules))[place]]
        random = np.random.default_rng([*stream, 1, index])
        count, side = self.config.pairs + self.config.queries, self.config.size
        inputs = random.integers(COLOURS, size=(count, side, side), dtype=np.int32)
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
    pairs = itertools.combinations(range(1, COLOURS), 2)
    return [Rule(f"swap {a} {b}", _mapped({a: b, b: a})) for a, b in pairs]


def _recolourings() -> list[Rule]:
    return [
        Rule(f"recolour {a} {b} to {c} {d}", _mapped({a: c, b: d}))
        for a, b in itertools.combinations(range(1, COLOURS), 2)
        for c, d in itertools.product(range(1, COLOURS), repeat=2)
        if c != a and d != b and (c, d) != (b, a)
    ]


def _cycles() -> list[Rule]:
    triples = [(a, b, c) for a, b, c in itertools.permutations(range(1, COLOURS), 3) if a == min(a, b, c)]
    return [Rule(f"cycle {a} {b} {c}", _mapped({a: b, b: c, c: a})) for a, b, c in triples]


def _doubles() -> list[Rule]:
    pairs = itertools.combinations(itertools.combinations(range(1, COLOURS), 2), 2)
    return [
        Rule(f"double {a} {b} {c} {d}", _mapped({a: b, b: a, c: d, d: c}))
        for (a, b), (c, d) in pairs
        if not {a, b} & {c, d}
    ]


def _shifts() -> list[Rule]:
    ways = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}
    return [Rule(f"{swap.name} {way}", swap.colours, step) for swap in _swaps() for way, step in ways.items()]


def _mapped(changes: dict[int, int]) -> tuple[int, ...]:
    return tuple(changes.get(colour, colour) for colour in range(COLOURS))
