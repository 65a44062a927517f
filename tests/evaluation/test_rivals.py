"""The names of those who could choose a context, and what each may know."""

import pytest

from lensjax.evaluation import choices, compare, rivals

CAUSAL = ("recency", "uniform", "random", "recent_random", "key_norm", "snapkv", "bm25", "lookup")
LENSNET = ("lensnet_1", "lensnet_10", "lensnet_2", compare.FOREIGN)
HINDSIGHT = ("snapkv_hindsight", "bm25_hindsight", "best_of_3", "best_of_16", "oracle")


@pytest.mark.parametrize("name", [*CAUSAL, *LENSNET])
def test_what_chooses_from_the_history_is_causal(name):
    assert rivals.information(name) == "causal"


@pytest.mark.parametrize("name", HINDSIGHT)
def test_what_knows_the_horizon_or_its_loss_is_hindsight(name):
    assert rivals.information(name) == "hindsight"


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (("recency", "uniform", "random", "recent_random", compare.FULL, "sliding_window", "collapse_oldest"), 0),
        ((*LENSNET, choices.FRESH, "session"), 7),
        (("key_norm", "snapkv", "bm25", "lookup"), 32),
        ((*HINDSIGHT, "answer"), 36),
    ],
)
def test_what_a_policy_reads_is_nothing_its_context_all_tokens_or_the_horizon_too(names, count):
    assert {rivals.reads(name, history=32, horizon=4, rows=7) for name in names} == {count}


def test_what_nobody_knows_reads_no_number():
    with pytest.raises(ValueError, match="newcomer is no policy"):
        rivals.reads("newcomer", history=32, horizon=4, rows=7)


def test_the_table_goes_from_what_knows_nothing_to_what_chooses_in_hindsight():
    expected = [
        "empty",
        *CAUSAL,
        *LENSNET[:3],
        compare.FOREIGN,
        *HINDSIGHT[:2],
        "best_of_16",
        "best_of_3",
        "oracle",
        "full",
    ]
    assert sorted(sorted(expected), key=rivals.order) == expected
    assert sorted(expected[::-1], key=rivals.order) == expected
