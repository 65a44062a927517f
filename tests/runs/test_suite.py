"""Questions over a text: an independent reader answers each from its text, and from what is needed of it."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from experiments.presets.suite import CONFIG
from lensjax.runs.data import batches, suite
from lensjax.runs.data.suite import words
from lensjax.runs.data.suite.source import stacked
from lensjax.runs.data.suite.windows import Example, Text, Words, fill
from lensjax.runs.data.tokenizers import Bytes

HISTORY, HORIZON, BLOCK = 1024, 96, 16
PAIR, CODE, CHAIN = r"^(\w+) is (?:now )?(\w+)\.$", r"^the code of (\w+) is (\w+)\.$", r"^the value of (\w+) is (.+)\.$"


def read(text: str) -> str | None:
    """The answer to the question on the last line of a text, by rules that look at nothing but the text."""
    *lines, ask = text.split("\n")
    if ask.startswith("the most"):
        counts = Counter(line[:-1] for line in lines if re.fullmatch(r"\w+\.", line))
        if len(counts) < 3:
            return None
        most = [word for word, _ in counts.most_common(3)]
        return " ".join(sorted(most) if "common" in ask else most)
    if ask.startswith("the value of"):
        sides, name, steps = dict(found(CHAIN, lines)), ask.split()[3], []
        while name in sides:
            steps.append(sides[name])
            name = sides[name].split()[-1]
        return " is ".join(steps) or None
    if ask.startswith("the code of"):
        asked, codes = re.findall(r"(\w+)(?= and | is)", ask.removeprefix("the code of ")), found(CODE, lines)
        return " ".join(value for name in asked for key, value in codes if key == name) or None
    key = ask.split()[0]
    values = [value for name, value in found(PAIR, lines) if name == key]
    is_update = any(re.fullmatch(rf"{key} is now \w+\.", line) for line in lines)
    return " ".join(values[-1:] if is_update else values) or None


def found(pattern: str, lines: list[str]) -> list[tuple[str, str]]:
    return [match.groups() for line in lines if (match := re.match(pattern, line))]


def example(task: str, index: int, form=None, *, history: int = HISTORY, horizon: int = HORIZON) -> Example:
    puzzle, rng = suite.draw(task, index + 1, seed=0)[-1]
    return fill(puzzle, form or Text(Bytes()), rng, history=history, horizon=horizon, name=task)


def texts(one: Example) -> tuple[str, str]:
    """The text up to the cursor, and the answer."""
    behind = one.tokens[len(one.needed) :]
    return Bytes().decode(one.tokens[: len(one.needed)]), Bytes().decode(behind[one.scored]).strip()


@pytest.mark.slow
@pytest.mark.parametrize("task", suite.TASKS)
def test_a_thousand_questions_have_the_answer_that_stands_in_their_text(task):
    answers = Counter()
    for puzzle, rng in suite.draw(task, 1000, seed=1):
        one = fill(puzzle, Text(Bytes()), rng, history=HISTORY, horizon=HORIZON, name=task)
        text, answer = texts(one)
        assert len(text) == HISTORY and len(one.tokens) == HISTORY + HORIZON
        assert read(text) == answer
        answers[answer.split()[-1]] += 1
    # No word is the answer much more often than others.
    assert len(answers) > 100 and max(answers.values()) < (60 if task == "common_words" else 30)


@pytest.mark.parametrize("task", suite.TASKS)
def test_what_is_needed_answers_and_nothing_else_does(task):
    for index in range(20):
        one = example(task, index)
        text, answer = texts(one)
        ask = text.split("\n")[-1]
        characters = np.array(list(text))
        needed = "".join(characters[one.needed])
        assert read(f"{needed}{ask}") == answer
        rest = "".join(characters[~one.needed])
        assert read(rest) != answer and read(ask) is None


def test_a_chain_of_one_statement_missing_is_broken_and_updates_come_last():
    text, answer = texts(example("tracking_4", 0))
    needed = [line for line in text.split("\n")[:-1] if any(name in line for name in answer.split()[3::5])]
    for line in needed[:3]:
        assert read(text.replace(f"{line}\n", "")) != answer
    text, answer = texts(example("mqar_update", 0))
    assert read(text.replace(" is now ", " is ")) != answer


@pytest.mark.parametrize("task", suite.TASKS)
def test_both_forms_ask_the_same_and_a_block_that_is_needed_is_named(task):
    puzzle, rng = suite.draw(task, 1, seed=0)[0]
    one = fill(puzzle, Words(), rng, history=256, horizon=16, name=task)
    spelled = [words.VOCABULARY[id] for id in one.tokens]
    assert spelled[256 - len(puzzle.ask.split()) : 256] == puzzle.ask.split()
    assert spelled[256 : 256 + one.scored.sum()] == puzzle.answer.split()
    named = stacked([one], 4)["answers"][0]
    assert named.shape == (64,) and set(named) == {place // 4 * 4 for place in np.flatnonzero(one.needed)}


def test_words_are_in_one_list_each():
    assert len(set(words.VOCABULARY)) == len(words.VOCABULARY) == 452


def test_what_does_not_fit_is_refused_by_its_name():
    with pytest.raises(
        ValueError, match=r"tracking_4 needs \d+ tokens .* more than a history of 64: raise context.win"
    ):
        example("tracking_4", 0, history=64)
    with pytest.raises(ValueError, match=r"tracking_4 has an answer of \d+ tokens, more than a horizon of 8"):
        example("tracking_4", 0, horizon=8)
    with pytest.raises(ValueError, match=r"the suite has 452 words: base.vocab_size must be at least that, got 256"):
        suite.SuiteSource(CONFIG.context, 256, "train", 0)
    with pytest.raises(ValueError, match="tracking_2 has an answer of 6 tokens, more than a horizon of 4"):
        suite.SuiteSource(replace(CONFIG.context, window=260, horizon=4), 512, "train", 0)


def test_examples_are_functions_of_seed_split_and_place():
    def some(split="train", seed=0, pretraining=False):
        source = suite.SuiteSource(CONFIG.context, 512, split, seed, pretraining)
        return np.stack([source[i]["tokens"] for i in range(12)])

    assert (some() == some()).all() and some().shape == (12, 272)
    assert not any((some() == other).all() for other in (some("test"), some(seed=1), some(pretraining=True)))


def test_pretraining_asks_and_answers_again_and_again():
    source = suite.SuiteSource(CONFIG.context, 512, "train", 0, pretraining=True)
    asked = Counter()
    for index in range(200):
        spelled = " ".join(words.VOCABULARY[id] for id in source[index]["tokens"])
        asked["list"] += spelled.count("the most")
        asked["codes"] += len(re.findall(r"the code of \w+ is \w+ \w+", spelled))
    assert asked["list"] > 30 and asked["codes"] > 20


def test_a_run_reads_the_suite_by_its_name():
    [batch] = batches.fixed_batches(CONFIG, "test", batch_size=12, count=1, seed=0)
    assert batch["tokens"].shape == (12, 272) and batch["answers"].shape == (12, 64)
    assert batches.digest(CONFIG) != batches.digest(replace(CONFIG, data=replace(CONFIG.data, task="recall")))
