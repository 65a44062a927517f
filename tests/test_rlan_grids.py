import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.rlan import grids, rules
from experiments.rlan.grids import PADDING

SIDE = 5
PERMUTATIONS = grids.colour_permutations(7, 4)


@jax.jit
def all_views(grid):
    """The 8 k views of a grid, and what each of them maps back to."""
    seen = [grids.forward(grid, index, row) for index in range(8) for row in PERMUTATIONS]
    places = [(index, row) for index in range(8) for row in PERMUTATIONS]
    return seen, [grids.inverse(view, index, row) for view, (index, row) in zip(seen, places, strict=True)]


@st.composite
def padded_grids(draw):
    rows, columns = draw(st.integers(0, SIDE)), draw(st.integers(1, SIDE))
    cells = draw(st.lists(st.integers(0, 9), min_size=rows * columns, max_size=rows * columns))
    return rules.padded(np.asarray(cells, np.int32).reshape(rows, columns), SIDE)


@settings(max_examples=60)
@given(grid=padded_grids())
def test_every_view_maps_back(grid):
    seen, back = all_views(grid)
    content = grid[grid != PADDING]
    assert len(back) == 32
    for index, (view, found) in enumerate(zip(seen, back, strict=True)):
        np.testing.assert_array_equal(found, grid)
        rows, columns = grids.size_of(grid)
        if len(content):
            expected = (columns, rows) if grids.TRANSPOSES[index // 4] else (rows, columns)
            assert grids.size_of(np.asarray(view)) == expected
            assert (np.asarray(view)[: expected[0], : expected[1]] != PADDING).all()


def test_views_by_hand():
    # 1 2 3     fills two rows of three: a turn to the left puts 3 6 on top.
    # 4 5 6
    grid = rules.padded(np.arange(1, 7).reshape(2, 3), 4)
    expected = {
        0: [[1, 2, 3], [4, 5, 6]],
        1: [[3, 6], [2, 5], [1, 4]],
        2: [[6, 5, 4], [3, 2, 1]],
        3: [[4, 1], [5, 2], [6, 3]],
        4: [[3, 2, 1], [6, 5, 4]],
        5: [[4, 5, 6], [1, 2, 3]],
        6: [[1, 4], [2, 5], [3, 6]],
        7: [[6, 3], [5, 2], [4, 1]],
    }
    identity = grids.colour_permutations(0, 1)[0]
    for index, rows in expected.items():
        found = grids.forward(grid, index, identity)
        np.testing.assert_array_equal(found, rules.padded(np.asarray(rows), 4))
    with pytest.raises(ValueError, match="0 to 7, got 8"):
        grids.forward(grid, 8, identity)


def test_colours_are_permuted_before_the_turn_and_zero_and_padding_stay():
    assert PERMUTATIONS.shape == (4, 11) and (PERMUTATIONS[:, 0] == 0).all() and (PERMUTATIONS[:, 10] == 10).all()
    np.testing.assert_array_equal(PERMUTATIONS[0], np.arange(11))
    assert all(sorted(row) == list(range(11)) for row in PERMUTATIONS)
    assert len({row.tobytes() for row in PERMUTATIONS}) == 4
    grid = rules.padded(np.asarray([[0, 4]]), 2)
    found = grids.forward(grid, 4, PERMUTATIONS[1])
    np.testing.assert_array_equal(found, [[PERMUTATIONS[1][4], 0], [PADDING, PADDING]])


@pytest.mark.parametrize("index", range(8))
def test_a_view_on_the_host_is_that_of_the_program(index):
    grid = np.asarray([[0, 1, 2], [7, 9, 1]])
    found = grids.view(grid, index, PERMUTATIONS[2])
    expected = grids.forward(rules.padded(grid, 4), index, PERMUTATIONS[2])
    np.testing.assert_array_equal(rules.padded(found, 4), expected)


def test_inside_is_the_rectangle_at_the_top_left():
    np.testing.assert_array_equal(grids.inside(np.asarray([1, 2]), 3), [[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert not grids.inside(np.asarray([0, 0]), 3).any()


@pytest.mark.parametrize(
    ("pairs", "query", "expected"),
    [
        ([((2, 3), (2, 3)), ((4, 4), (4, 4))], (5, 1), (5, 1)),
        ([((2, 3), (1, 1)), ((4, 4), (1, 1))], (5, 1), (1, 1)),
        ([((2, 3), (4, 9)), ((1, 2), (2, 6))], (5, 1), (10, 3)),
        ([((4, 2), (2, 1)), ((6, 8), (3, 4))], (2, 2), (1, 1)),
        ([((4, 2), (2, 1)), ((6, 8), (3, 4))], (3, 2), None),
        ([((2, 3), (4, 6)), ((2, 3), (2, 6))], (2, 3), None),
        # Where all outputs have one size and all inputs too, it is a constant and no ratio.
        ([((2, 2), (4, 4)), ((2, 2), (4, 4))], (3, 3), (4, 4)),
    ],
)
def test_the_size_of_an_answer_comes_from_the_examples(pairs, query, expected):
    assert grids.output_size(pairs, query) == expected


def test_an_answer_without_a_size_is_no_answer():
    support = np.stack(
        [
            [rules.padded(np.zeros((2, 3)), 4), rules.padded(np.zeros((4, 3)), 4)],
            [rules.padded(np.zeros((2, 3)), 4), rules.padded(np.zeros((1, 2)), 4)],
        ]
    )
    grid = rules.padded(np.zeros((2, 2)), 4)
    assert grids.answer_size(support, grid) == (0, 0)
    support[1] = grids.PADDING
    assert grids.answer_size(support, grid) == (4, 3)


def test_votes_go_to_distinct_grids_and_shape_is_part_of_them():
    one, two = rules.padded(np.ones((1, 2), int), 2), rules.padded(np.ones((2, 1), int), 2)
    three = rules.padded(np.ones((2, 2), int), 2)
    ranked = grids.vote(np.stack([two, one, three, one, two, one]))
    assert len(ranked) == 3
    for found, expected in zip(ranked, (one, two, three), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [grids.passes(ranked, three, tries) for tries in (1, 2, 3)] == [False, False, True]
    np.testing.assert_array_equal(grids.vote(np.stack([three, one]))[0], three)  # the earlier view


# The rules


def test_every_rule_is_in_one_split():
    names = {split: {rule.name for rule in rules.rules(rules.FAMILIES, split)} for split in rules.SPLITS}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 36 + 2268 + 168 + 378 + 144
    assert len(names["train"]) / 2994 == pytest.approx(0.7, abs=0.03)
    assert len(names["test"]) / 2994 == pytest.approx(0.2, abs=0.03)
    # Colour maps are different even where names are not looked at: no held-out rule is a trained one in disguise.
    maps = [(rule.colours, rule.shift) for split in rules.SPLITS for rule in rules.rules(rules.FAMILIES, split)]
    assert len(set(maps)) == len(maps)
    assert "swap 1 2" in names["train"] and "swap 1 6" in names["test"]


def test_a_task_shows_its_rule_and_no_other():
    source = rules.RuleSource(rules.RulesConfig(families=rules.FAMILIES, queries=2), "test", 3)
    held_out = rules.rules(rules.FAMILIES, "test")
    for index in range(20):
        task = source[index]
        assert task["support"].shape == (3, 2, 5, 5) and task["query"].shape == (2, 2, 5, 5)
        assert task["support"].dtype == task["query"].dtype == np.int32
        pairs = np.concatenate([task["support"], task["query"]])
        fitting = [rule for rule in held_out if all((rule.apply(pair[0]) == pair[1]).all() for pair in pairs)]
        assert len(fitting) == 1


def test_tasks_are_a_function_of_seed_split_and_index():
    config = rules.RulesConfig(families=("cycle",))
    first = rules.RuleSource(config, "train", 0)
    for other in (rules.RuleSource(config, "train", 1), rules.RuleSource(config, "validation", 0)):
        assert (first[4]["support"][:, 0] != other[4]["support"][:, 0]).any()
    np.testing.assert_array_equal(first[4]["support"], rules.RuleSource(config, "train", 0)[4]["support"])
    assert (first[4]["support"][:, 0] != first[5]["support"][:, 0]).any()
    count = len(rules.rules(config.families, "validation"))
    source = rules.RuleSource(config, "validation", 0)
    answers = [rule.apply(np.arange(10)[None]).tobytes() for rule in rules.rules(config.families, "validation")]

    def rule_of(task):
        source_cells, target = task["support"][:, 0].ravel(), task["support"][:, 1].ravel()
        colours = np.asarray([target[source_cells == colour][0] for colour in range(10)], np.int32)
        return colours.tobytes()

    assert sorted(rule_of(source[i]) for i in range(count)) == sorted(answers)


def test_settings_and_sizes_are_checked():
    with pytest.raises(ValueError, match=r"families must name .* swap, recolour, cycle, double, shift, got \(\)"):
        rules.RulesConfig(families=())
    with pytest.raises(ValueError, match=r"at most 2 x 2, got \(1, 3\)"):
        rules.padded(np.zeros((1, 3)), 2)
