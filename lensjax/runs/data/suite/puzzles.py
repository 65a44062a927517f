"""Twelve kinds of question over a text, each a pure function of a random generator.

    mqar_keys, mqar_values, mqar_update    pairs of key and value: one value a key, several, one that replaces another
    needle, needle_keys, needle_values, needle_queries
                                           sentences to be found in prose: one; one among many; all of one key; several
    tracking_1, tracking_2, tracking_4     a value that is defined by another one, in as many statements
    common_words, frequent_words           which words of a list come most often

Statements are words with spaces between them, a full stop or a colon a word of its own.

References:
  Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models (2023), section 3: multi-query
    associative recall. One query of each text is asked here, as every policy decides once; the variants with several
    values and with updates are ours.
  Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models? (2024), section 3: needles,
    variable tracking, common and frequent words. Wordings and words are ours; numbers are words here, so that text and
    word form ask the same. Answers have one order, so that a match is exact: common words that of the alphabet,
    everything else that of the text or of the question.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lensjax.runs.data.suite.words import ADJECTIVES, NAMES, NOUNS, VALUES, VERBS

_SEVERAL = 3
"""Values of a key, keys of a question, and words that come most often."""
_AMONG = 8
"""Needles of a text in which one is asked for."""
_COMMON = 6
"""Times that a common word comes; the others come once."""
_FREQUENT = (10, 7, 5)
"""Times that the most frequent words come; those behind them come less and less often."""


class Puzzle(NamedTuple):
    """A question, and the statements that answer it or lead astray; a text keeps the order of each list."""

    needed: list[str]
    """Nobody can answer without these."""
    others: list[str]
    """As many of them as there is room for, the first ones first."""
    ask: str
    answer: str


Rng = np.random.Generator
MakePuzzle = Callable[[Rng], Puzzle]


def filler(rng: Rng) -> Iterator[str]:
    """Sentences without end that say nothing of what is asked."""
    while True:
        quality, who, does, other, whom = (
            str(rng.choice(words)) for words in (ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS)
        )
        yield f"the {quality} {who} {does} the {other} {whom} ."


def mqar(rng: Rng, *, values: int = 1, update: bool = False) -> Puzzle:
    """Pairs of key and value.

    Args:
      rng: decides all.
      values: of each key, to be named in the order of the text.
      update: whether each key gets a second value later, which is the one that counts.
    """
    keys, rounds = _some(rng, NAMES), values + update
    own = [_some(rng, VALUES, rounds) for _ in keys]
    verbs = ["is"] * values + ["is now"] * update
    lines = [[f"{key} {verbs[turn]} {own[place][turn]} ." for turn in range(rounds)] for place, key in enumerate(keys)]
    # A few keys whole before the next ones begin: any first part of the list then makes sense.
    others = [line for group in _groups(lines[1:], _AMONG) for turn in zip(*group, strict=True) for line in turn]
    answer = own[0][-1:] if update else own[0]
    return Puzzle(lines[0], others, f"{keys[0]} is", " ".join(answer))


def needles(rng: Rng, *, among: int = 1, values: int = 1, queries: int = 1) -> Puzzle:
    """Sentences to be found in prose.

    Args:
      rng: decides all.
      among: keys in the text.
      values: of each key, to be named in the order of the text.
      queries: keys that are asked for, to be answered in the order of the question.
    """
    keys = _some(rng, NAMES, among)
    own = [_some(rng, VALUES, values) for _ in keys]
    lines = [[f"the code of {key} is {value} ." for value in own[place]] for place, key in enumerate(keys)]
    asked = rng.permutation(queries)
    needed = [line for place in range(queries) for line in lines[place]]
    others = [line for turn in zip(*lines[queries:], strict=True) for line in turn]
    answer = [value for place in asked for value in own[place]]
    return Puzzle(needed, others, f"the code of {' and '.join(keys[i] for i in asked)} is", " ".join(answer))


def tracking(rng: Rng, *, hops: int) -> Puzzle:
    """Chains of `hops` statements in any order: a value, and names each of which has the value of the one before it.

    The answer spells the chain: what the last name has the value of, and so on to the value.
    """
    names = _some(rng, NAMES)
    names, literals = names[: len(names) // hops * hops], _some(rng, VALUES)
    chains = [(names[i * hops : (i + 1) * hops], literals[i]) for i in range(len(names) // hops)]
    lines = []
    for chain, literal in chains:
        sides = [literal, *(f"the value of {name}" for name in chain[:-1])]
        lines.append([f"the value of {name} is {side} ." for name, side in zip(chain, sides, strict=True)])
    asked, literal = chains[0]
    others = _shuffled(rng, [line for chain in lines[1:] for line in chain])
    answer = [*(f"the value of {name}" for name in reversed(asked[:-1])), literal]
    return Puzzle(_shuffled(rng, lines[0]), others, f"the value of {asked[-1]} is", " is ".join(answer))


def common_words(rng: Rng) -> Puzzle:
    """Words of a list, a few of which come several times, all others once; the answer is in alphabetical order."""
    words = _some(rng, VALUES)
    common, rare = sorted(words[:_SEVERAL]), words[_SEVERAL:]
    needed = _shuffled(rng, [f"{word} ." for word in common for _ in range(_COMMON)])
    return Puzzle(needed, [f"{word} ." for word in rare], "the most common words :", " ".join(common))


def frequent_words(rng: Rng) -> Puzzle:
    """Words of a list, the n-th of which comes less often than the one before it; the first ones are to be named."""
    words, most = _some(rng, VALUES), len(_FREQUENT)
    needed = [f"{word} ." for word, count in zip(words, _FREQUENT, strict=False) for _ in range(count)]
    # As often as 40 / rank**2 says, a zeta distribution, but at least once: 2 times from the fourth word on.
    rare = [f"{word} ." for rank, word in enumerate(words[most:], most + 1) for _ in range(max(1, 40 // rank**2))]
    answer = " ".join(words[:most])
    return Puzzle(_shuffled(rng, needed), _shuffled(rng, rare), "the most frequent words :", answer)


TASKS: dict[str, MakePuzzle] = {
    "mqar_keys": mqar,
    "mqar_values": lambda rng: mqar(rng, values=_SEVERAL),
    "mqar_update": lambda rng: mqar(rng, update=True),
    "needle": needles,
    "needle_keys": lambda rng: needles(rng, among=_AMONG),
    "needle_values": lambda rng: needles(rng, values=_SEVERAL),
    "needle_queries": lambda rng: needles(rng, among=_AMONG, queries=_SEVERAL),
    "tracking_1": lambda rng: tracking(rng, hops=1),
    "tracking_2": lambda rng: tracking(rng, hops=2),
    "tracking_4": lambda rng: tracking(rng, hops=4),
    "common_words": common_words,
    "frequent_words": frequent_words,
}
"""By name."""


def _some(rng: Rng, words: Sequence[str], count: int | None = None) -> list[str]:
    """Different words in random order, all of them where no number is given."""
    return [words[i] for i in rng.permutation(len(words))[:count]]


def _shuffled(rng: Rng, lines: Sequence[str]) -> list[str]:
    return [lines[i] for i in rng.permutation(len(lines))]


def _groups(items: Sequence[list[str]], size: int) -> list[Sequence[list[str]]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
