import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensjax.runs.engine import stopping

NAN = math.nan


def states(scores, *, min_improvement=0.0):
    """The state after each evaluation; the first one is after step 10, the second after step 20."""
    best, seen = stopping.init(), []
    for index, score in enumerate(scores, start=1):
        best = stopping.update(best, score, 10 * index, min_improvement=min_improvement)
        seen.append(best)
    return seen


@pytest.mark.parametrize(
    ("scores", "patience", "min_improvement", "stop", "best"),
    [
        ([5, 4, 3, 2], 1, 0.0, None, 40),
        ([5, 6], 1, 0.0, 20, 10),
        ([5, 3, 4, 3.5, 2], 2, 0.0, 40, 20),
        ([5, 3, 4, 3.5, 2], 3, 0.0, None, 50),
        ([5, 3, 4, 2, 4, 4, 4], 2, 0.0, 60, 40),
        ([2, 2, 2], 2, 0.0, 30, 10),  # as good is no improvement
        ([3, 2.5, 2.25, 1.75], 2, 0.5, None, 30),  # 0.75 is more than 0.5, and 0.5 is not
        ([3, 2.75, 2.5], 2, 0.5, 30, 10),
        ([3, 2, 1.75, 1.5, 1], 3, 0.5, None, 50),
        ([NAN, 4, NAN, NAN], 2, 0.0, 40, 20),
        ([NAN, NAN], 2, 0.0, 20, None),
        ([4, -math.inf, 3], 2, 0.0, None, 30),
        ([-1, -2, -1.5], 1, 0.0, 30, 20),
    ],
)
def test_schedules_by_hand(scores, patience, min_improvement, stop, best):
    seen = states(scores, min_improvement=min_improvement)
    over = [10 * index for index, one in enumerate(seen, start=1) if stopping.is_over(one, patience=patience)]
    assert next(iter(over), None) == stop
    end = len(scores) if stop is None else stop // 10
    assert seen[end - 1].step == best
    assert seen[end - 1].score == (None if best is None else scores[best // 10 - 1])


def test_without_patience_it_is_never_over():
    assert not any(stopping.is_over(one, patience=None) for one in [stopping.init(), *states([1, 2, 3, NAN])])
    assert not stopping.is_over(stopping.init(), patience=1)


LOSSES = st.one_of(st.integers(-4, 4).map(lambda number: number / 2), st.just(NAN))


@given(
    scores=st.lists(LOSSES, min_size=1, max_size=12), patience=st.integers(1, 4), least=st.sampled_from([0.0, 0.5, 1.0])
)
def test_it_is_over_where_the_last_evaluations_improve_on_nothing_before_them(scores, patience, least):
    seen = states(scores, min_improvement=least)
    split = len(scores) - patience
    before = seen[split - 1].score if split > 0 else None
    last = scores[max(split, 0) :]
    improves = any(not math.isnan(score) and (before is None or before - score > least) for score in last)
    assert stopping.is_over(seen[-1], patience=patience) == (split >= 0 and not improves)


@given(scores=st.lists(LOSSES, min_size=1, max_size=12))
def test_without_a_least_improvement_the_best_one_is_the_first_of_the_lowest(scores):
    best, numbers = states(scores)[-1], [score for score in scores if not math.isnan(score)]
    assert best.score == (min(numbers) if numbers else None)
    assert best.step == (10 * scores.index(min(numbers)) + 10 if numbers else None)
    assert json.loads(json.dumps(dataclasses.asdict(best))) == dataclasses.asdict(best)
