from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.presets.tracking import CONFIG
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.data.task import DataConfig
from lensjax.runs.data.tracking import TrackingSource
from lensjax.training.scoring import ContextConfig

VOCABULARY = 160
"""Three words, 78 names from 3 on, 79 values from 81 on."""
BAD_INPUT = {
    "split": ({"split": "dev"}, {}, "split must be one of train, validation, test, got 'dev'"),
    "block": ({}, {"block_size": 3}, "context.block_size must be at least 4, got 3"),
    "horizon": ({"hops": 4}, {}, "data.hops 4: context.horizon must be 4, got 2"),
    "recent tokens": ({}, {"recent_tokens": 1}, "context.recent_tokens must be at least 2, got 1"),
    "window": ({}, {"window": 262}, "must be a multiple of 4 plus 4, such as 260, got 262"),
    "one chain": ({"hops": 4}, {"window": 18, "horizon": 4}, "context.window must be at least 22, got 18"),
    "vocabulary": ({"vocab_size": 130}, {}, "64 names .*: base.vocab_size must be at least 131, got 130"),
}


def context(*, hops: int, statements: int = 64, block_size: int = 4, recent_tokens: int = 2) -> ContextConfig:
    window = statements * block_size + 2 + hops
    return ContextConfig(window=window, block_size=block_size, horizon=hops, recent_tokens=recent_tokens)


def source(*, hops: int = 2, vocab_size: int = VOCABULARY, pretraining: bool = False, **kwargs) -> TrackingSource:
    return TrackingSource(context(hops=hops, **kwargs), vocab_size, "train", 0, hops, pretraining)


def read(history, size: int) -> tuple[dict[int, tuple[int, int]], list[list[int]]]:
    """What a text says: by name, the right-hand side and where its statement starts; and the questions."""
    found, questions = {}, []
    for start in range(0, len(history), size):
        block = history[start : start + size]
        if block[0] == 0:
            assert block[1] not in found, "a name is defined twice"
            assert block[3:] == [1] * (size - 3)
            found[block[1]] = (block[2], start)
        elif block[0] == 2:
            questions.append(block[1:])
        else:  # the rest of a question that takes several blocks
            questions[-1] += block
    return found, questions


def solve(found: dict[int, tuple[int, int]], name: int) -> tuple[list[int], list[int]]:
    """Right-hand sides from a name to the literal, and where they stand."""
    values, starts = [], []
    while name in found:
        name, start = found[name]
        values.append(name)
        starts.append(start)
    return values, starts


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_every_question_has_one_answer_which_stands_in_the_text(hops):
    examples = source(hops=hops)
    lengths = set()
    for index in range(1000):
        example = examples[index]
        history, horizon = example["tokens"][:-hops].tolist(), example["tokens"][-hops:].tolist()
        found, ((asked,),) = read(history, 4)
        assert solve(found, asked) == (horizon, example["answers"].tolist())
        assert len(horizon) == len(set(horizon)) == hops and horizon[-1] >= 81
        # Nothing refers to what is asked for: it is the last of its chain.
        used = [value for value, _ in found.values() if value < 81]
        assert asked not in used and len(used) == len(set(used)) == 64 // hops * (hops - 1)
        lengths |= {len(solve(found, name)[0]) for name in found}
    assert lengths == set(range(1, hops + 1))


@settings(max_examples=60)
@given(
    hops=st.integers(1, 5),
    more=st.integers(0, 20),
    size=st.integers(4, 9),
    recent=st.integers(2, 9),
    index=st.integers(0, 2**40),
    pretraining=st.booleans(),
)
def test_sequences_of_all_sizes_are_answerable(hops, more, size, recent, index, pretraining):
    statements = hops + more + 2
    shape = context(hops=hops, statements=statements, block_size=size, recent_tokens=recent)
    vocab_size = 3 + 2 * statements
    example = TrackingSource(shape, vocab_size, "test", 1, hops, pretraining)[index]
    assert example["tokens"].shape == (shape.window,) and example["tokens"].dtype == np.int32
    found, questions = read(example["tokens"].tolist(), size)
    assert len(questions) >= 1 and max(found) < 3 + statements and {1, 2} & set(found) == set()
    values = [value for value, _ in found.values()]
    assert len(set(values)) == len(values) and max(values) < vocab_size
    for name, *answer in questions:
        expected, _ = solve(found, name)
        assert answer[:hops] == expected and set(answer[hops:]) <= {1}
    if pretraining:
        assert "answers" not in example
    else:
        assert len(found) == statements and len(questions) == 1
        assert example["answers"].dtype == np.int32 and example["answers"].tolist() == solve(found, name)[1]


def test_where_a_statement_stands_says_nothing_about_its_place_in_the_chain():
    examples, count = source(hops=2, statements=4), 3000
    found = Counter(tuple(examples[i]["answers"].tolist()) for i in range(count))
    # The last variable's statement and the first's: any two of four places, in any order.
    assert len(found) == 12
    assert all(abs(n - count / 12) < 5 * (count * (1 / 12) * (11 / 12)) ** 0.5 for n in found.values())


def test_statements_that_fill_no_chain_are_literals():
    found, _ = read(source(hops=4, statements=11)[0]["tokens"][:-4].tolist(), 4)
    assert len(found) == 11 and sum(value >= 81 for value, _ in found.values()) == 2 + 3


@pytest.mark.parametrize("hops", [2, 4])
def test_pretraining_asks_for_all_chains_equally_often(hops):
    examples, sizes, most = source(hops=hops, pretraining=True), [], 64 // hops
    for index in range(1000):
        found, questions = read(examples[index]["tokens"].tolist(), 4)
        # Nothing but statements and questions, and as many of those as fit behind the statements.
        assert len(found) + (len(questions) - 1) * -(-(2 + hops) // 4) == 64
        ends = {name for name in found if len(solve(found, name)[0]) == hops}
        asked = Counter(dict.fromkeys(ends, 0))
        asked.update(name for name, *_ in questions)
        assert set(asked) == ends and max(asked.values()) - min(asked.values()) <= 1
        sizes.append(len(ends))
    # Up to as many as in the task, and as often few as many.
    assert set(sizes) == set(range(1, most + 1))
    assert abs(np.mean(np.asarray(sizes) < (most + 1) ** 0.5) - 0.5) < 0.1


def test_an_example_depends_on_seed_split_and_index_alone():
    config = Config(
        context=context(hops=2), base=replace(Config().base, vocab_size=512), data=DataConfig(task="tracking")
    )
    batch = next(data.make_iterator(config, "train", seed=0, batch_size=3))
    examples = TrackingSource(config.context, 512, "train", 0, 2)
    np.testing.assert_array_equal(batch["tokens"], [examples[i]["tokens"] for i in range(3)])
    np.testing.assert_array_equal(batch["answers"], [examples[i]["answers"] for i in range(3)])
    rows = [
        TrackingSource(config.context, 512, split, seed, 2, pretraining)[index]["tokens"].tobytes()
        for split, seed, pretraining, index in (
            ("train", 0, False, 0),
            ("test", 0, False, 0),
            ("train", 1, False, 0),
            ("train", 0, True, 0),
            ("train", 0, False, 1),
        )
    ]
    assert len(set(rows)) == 5
    # numpy may change what a generator draws; whoever compares runs across versions should know.
    assert examples[0]["tokens"][-4:].tolist() == [2, 206, 103, 328]


def test_the_preset_fits_its_task():
    batch = next(data.make_iterator(CONFIG, "train", seed=0, batch_size=2, pretraining=True))
    assert set(batch) == {"tokens"} and batch["tokens"].shape == (2, CONFIG.context.window)


@pytest.mark.parametrize(("changes", "shape", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_a_task_that_does_not_fit_is_refused(changes, shape, message):
    fitting = {"vocab_size": VOCABULARY, "split": "train", "seed": 0, "hops": 2}
    with pytest.raises(ValueError, match=message):
        TrackingSource(replace(context(hops=2), **shape), **(fitting | changes))


@pytest.mark.parametrize(("hops", "chains", "quiet"), [(2, 4, 16), (2, 0, 16), (3, 5, 49), (2, 3, 0)])
def test_a_quiet_end_belongs_to_no_chain(hops, chains, quiet):
    one = TrackingSource(context(hops=hops), VOCABULARY, "train", 0, hops, chains=chains, quiet=quiet)
    first = set()
    for index in range(30):
        example = one[index]
        tokens = example["tokens"].tolist()
        found, _ = read(tokens[:256], 4)
        values, starts = solve(found, tokens[257])
        assert values == tokens[258:] and starts == example["answers"].tolist() and len(starts) == hops
        used = [start for value, start in found.values() if value in found]
        assert len(used) == (chains or (64 - quiet) // hops) * (hops - 1)
        assert max(starts + used) < (64 - quiet) * 4
        first.add(min(starts))
    assert len(first) > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quiet": -1}, "quiet must be 0 in pretraining, and else leave 2 of 64 statements to a chain, got -1"),
        ({"quiet": 63}, "leave 2 of 64 statements to a chain, got 63"),
        ({"quiet": 1, "pretraining": True}, "quiet must be 0 in pretraining, .* got 1"),
        ({"quiet": 60, "chains": 3}, "chains of 2 statements must fit into 4: at most 2, got 3"),
        ({"chains": -1}, "chains of 2 statements must fit into 64: at most 32, got -1"),
    ],
)
def test_chains_that_do_not_fit_before_a_quiet_end_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrackingSource(context(hops=2), VOCABULARY, "train", 0, 2, **changes)
