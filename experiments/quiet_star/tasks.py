"""Questions whose answers take several steps: a chain of lookups, and a sum told in words.

An instance is a prompt, and a table a step that says what follows what: the right thought is what comes after each step
but the last one, the answer what comes after all. A hash of the instance decides its split, for good: what is measured
on the test split was never trained on, under any seed.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np

from lensjax._settings import Share, settings
from lensjax.runs.data import splits
from lensjax.runs.data.splits import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TRAIN_SHARE, VALIDATION_SHARE = 0.7, 0.1

_NAMES, _THINGS = ("ann", "ben", "eva", "tom", "mia", "leo"), ("figs", "nuts", "pens", "hats", "cups", "keys")
_GAINS, _LOSSES = ("finds", "buys", "gets"), ("loses", "sells", "gives")
_VERBS = (*_GAINS, *_LOSSES)
WORDS = (*map(str, range(10)), *_NAMES, *_THINGS, *_VERBS, "has", "then", ".", "last", "digit", "?")
"""The vocabulary of the arithmetic task; a digit's token is its value."""
_TOKENS = {word: token for token, word in enumerate(WORDS)}
_NODES, _HOPS = 8, 3
"""Of the pointers: entries of the permutation, and how often it is followed."""
_SUMMANDS, _LARGEST = 3, 5
"""Of the arithmetic: how often something is added or taken away after the start, and how much at most."""


@settings("task")
class TaskConfig:
    """Which questions, and how good the traces are that the model is first trained on."""

    name: Literal["pointer", "arithmetic"] = "pointer"
    """`pointer` follows a permutation of 8 three times from a start; `arithmetic` tells of a start and three gains or
    losses in words, and asks for the last digit."""
    right_share: Share = 0.5
    """Share of the steps of a trace that are right; the others are drawn at random."""


@dataclass(frozen=True)
class Instance:
    """One question."""

    name: str
    """What its split is decided by."""
    prompt: np.ndarray
    """int32[P]."""
    start: int
    """What the first step begins with."""
    tables: np.ndarray
    """int32[L + 1, symbols]: what each step makes of each symbol."""

    @property
    def answer(self) -> int:
        """What all steps in a row make of the start."""
        return int(functools.reduce(lambda symbol, table: table[symbol], self.tables, self.start))

    def trace(self, random: np.random.Generator, right_share: float) -> np.ndarray:
        """Thought tokens int32[L], of which each follows from the one before it, or is drawn at random."""
        symbol, tokens = self.start, []
        for table in self.tables[:-1]:
            symbol = int(table[symbol] if random.random() < right_share else random.integers(len(table)))
            tokens.append(symbol)
        return np.asarray(tokens, np.int32)


@dataclass(frozen=True)
class Task:
    """A kind of questions."""

    vocab_size: int
    symbols: int
    """Tokens that traces and answers are made of: the first ones of the vocabulary."""
    prompt_length: int
    thought_length: int
    draw: Callable[[np.random.Generator], Instance]


def task_of(config: TaskConfig) -> Task:
    """The task that a configuration names."""
    return TASKS[config.name]


@dataclass(frozen=True)
class QuestionSource:
    """Questions without end; question i is a pure function of (config, split, seed, i)."""

    config: TaskConfig
    split: Split
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `prompt` int32[P], its `answer` int32, a `trace` int32[L], and the `conclusion` int32 of that."""
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        instance = _drawn(task_of(self.config), self.split, random)
        trace = instance.trace(random, self.config.right_share)
        return {
            "prompt": instance.prompt,
            "answer": np.asarray(instance.answer, np.int32),
            "trace": trace,
            "conclusion": instance.tables[-1][trace[-1]],
        }


def dataset(config: TaskConfig, split: Split, *, seed: int) -> grain.MapDataset:
    """The questions of a split as a grain data set."""
    return grain.MapDataset.source(QuestionSource(config, split, seed))


def split_of(instance: Instance) -> Split:
    """70 % train, 10 % validation, 20 % test."""
    return splits.split_of(instance.name, train=TRAIN_SHARE, validation=VALIDATION_SHARE)


def _drawn(task: Task, split: Split, random: np.random.Generator) -> Instance:
    while True:
        instance = task.draw(random)
        if split_of(instance) == split:
            return instance


def _pointers(random: np.random.Generator) -> Instance:
    """The values of all nodes, then the start. The permutation alone is the name: held out with all of its starts."""
    permutation, start = random.permutation(_NODES).astype(np.int32), int(random.integers(_NODES))
    name = "pointer " + " ".join(map(str, permutation))
    return Instance(name, np.append(permutation, np.int32(start)), start, np.stack([permutation] * _HOPS))


def _sums(random: np.random.Generator) -> Instance:
    """A start, gains and losses. The numbers and signs are the name: held out in whatever words."""
    # One call: each takes longer than all the rest.
    start, name, thing, *rest = random.integers(
        [10, len(_NAMES), len(_THINGS), *[len(_VERBS), _LARGEST] * _SUMMANDS]
    ).tolist()
    words = [_NAMES[name], "has", str(start), _THINGS[thing], "."]
    changes = []
    for verb, number in zip(rest[::2], rest[1::2], strict=True):
        words += ["then", _VERBS[verb], str(number + 1), "."]
        changes.append((number + 1) * (1 if verb < len(_GAINS) else -1))
    tokens = [_TOKENS[word] for word in (*words, "last", "digit", "?")]
    sums = (np.arange(10, dtype=np.int32)[None, :] + np.asarray(changes, np.int32)[:, None]) % 10
    # The thought begins with the start itself: each later step then has what it begins with in the token before it.
    tables = np.concatenate([np.full((1, 10), start, np.int32), sums])
    return Instance(f"arithmetic {start} {changes}", np.asarray(tokens, np.int32), 0, tables)


TASKS: dict[str, Task] = {
    "pointer": Task(_NODES, _NODES, prompt_length=_NODES + 1, thought_length=_HOPS - 1, draw=_pointers),
    "arithmetic": Task(len(WORDS), 10, prompt_length=8 + 4 * _SUMMANDS, thought_length=_SUMMANDS, draw=_sums),
}
