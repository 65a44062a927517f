from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.rlan import grids, objects, rules
from experiments.rlan.grids import PADDING

pytestmark = pytest.mark.slow

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


def test_the_table_of_colours_by_hand():
    """1 becomes 7 twice and 8 once, 2 becomes 3 or 4 once each, and what is padding on either side says nothing."""
    pairs = np.full((3, 2, 2, 3), PADDING)
    pairs[0] = [[[1, 1, 2], [1, 2, 0]], [[7, 8, 4], [7, 3, 0]]]
    pairs[1, :, 0, :2] = [[5, 6], [0, PADDING]]
    found = grids.colour_table(pairs)
    assert found.dtype == np.int32
    assert found.tolist() == [0, 7, 3, 3, 4, 0, 6, 7, 8, 9, PADDING]


# The rules


def test_what_a_rule_does_by_hand():
    named = {rule.name: rule for split in rules.SPLITS for rule in rules.rules(rules.FAMILIES, split)}
    grid = np.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    for name, expected in {
        "swap 1 5": [[5, 2, 3], [4, 1, 6], [7, 8, 9]],
        "recolour 1 5 to 9 9": [[9, 2, 3], [4, 9, 6], [7, 8, 9]],
        "cycle 1 5 2": [[5, 1, 3], [4, 2, 6], [7, 8, 9]],
        "double 1 5 2 3": [[5, 3, 2], [4, 1, 6], [7, 8, 9]],
        "swap 1 5 down": [[7, 8, 9], [5, 2, 3], [4, 1, 6]],
        "roll 1 2": [[8, 9, 7], [2, 3, 1], [5, 6, 4]],
        "turn 1": [[3, 6, 9], [2, 5, 8], [1, 4, 7]],
        "turn 4 swap 1 5": [[3, 2, 5], [6, 1, 4], [9, 8, 7]],
    }.items():
        np.testing.assert_array_equal(named[name].apply(grid), expected)
    # Two cells of 3 at the corner, three of 5 within, and a single 3 that touches the first only across a corner.
    grid = np.asarray([[3, 3, 0, 0, 0], [0, 0, 3, 0, 0], [0, 5, 0, 5, 0], [0, 5, 5, 5, 0], [0, 0, 0, 0, 0]])
    for name, expected in {
        "rank 7 8 9": [[8, 8, 0, 0, 0], [0, 0, 9, 0, 0], [0, 7, 0, 7, 0], [0, 7, 7, 7, 0], [0, 0, 0, 0, 0]],
        "border 7 8": [[7, 7, 0, 0, 0], [0, 0, 8, 0, 0], [0, 8, 0, 8, 0], [0, 8, 8, 8, 0], [0, 0, 0, 0, 0]],
        "border same 0": [[3, 3, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
        "flood largest same 1": [[1, 1, 5, 5, 5], [5, 5, 1, 5, 5], [5, 5, 5, 5, 5], [5, 5, 5, 5, 5], [5, 5, 5, 5, 5]],
        "flood smallest 0 same": [[3, 3, 3, 3, 3], [3, 3, 0, 3, 3], [3, 5, 3, 5, 3], [3, 5, 5, 5, 3], [3, 3, 3, 3, 3]],
    }.items():
        np.testing.assert_array_equal(named[name].apply(grid), expected)


def test_objects_are_cells_of_one_colour_side_by_side():
    grid = np.asarray([[1, 0, 2], [1, 2, 2], [0, 0, 1]])
    found = [[(int(row), int(column)) for row, column in zip(*cells, strict=True)] for cells in objects.find(grid)]
    assert found == [[(0, 2), (1, 1), (1, 2)], [(0, 0), (1, 0)], [(2, 2)]]
    assert objects.find(np.zeros((2, 2), int)) == []
    # Of equally large ones that which comes first.
    grid = np.asarray([[0, 4, 0], [0, 0, 3], [2, 0, 0]])
    assert [int(grid[cells][0]) for cells in objects.find(grid)] == [4, 3, 2]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), side=st.integers(objects.SMALLEST_SIDE, 9))
def test_drawn_objects_are_told_apart_by_size_colour_and_border(seed, side):
    grid = objects.draw(np.random.default_rng(seed), side)
    assert grid.shape == (side, side) and grid.dtype == np.int32 and grid.min() == 0 and grid.max() < 10
    found = objects.find(grid)
    assert len({len(rows) for rows, _ in found}) == len({int(grid[cells][0]) for cells in found}) == 3
    at_border = [bool({0, side - 1} & {*rows.tolist(), *columns.tolist()}) for rows, columns in found]
    assert any(at_border) and not all(at_border)
    for rows, columns in found:  # nothing else within a cell of it, not even across a corner
        around = {(r + i, c + j) for r, c in zip(rows, columns, strict=True) for i in (-1, 0, 1) for j in (-1, 0, 1)}
        inside = [grid[cell] for cell in around if min(cell) >= 0 and max(cell) < side]
        assert np.count_nonzero(inside) == len(rows)


COUNTS = {"swap": 36, "recolour": 2268, "cycle": 168, "double": 378, "shift": 144}
COUNTS |= {"roll": 35, "turn": 259, "flood": 242, "rank": 504, "border": 110}
LARGE = rules.RulesConfig(size=6, queries=2)


def test_every_rule_is_in_one_split():
    found = {split: rules.rules(rules.FAMILIES, split) for split in rules.SPLITS}
    names = {split: {rule.name for rule in found[split]} for split in rules.SPLITS}
    total = sum(COUNTS.values())
    assert sum(map(len, found.values())) == len(set().union(*names.values())) == total
    assert len(names["train"]) / total == pytest.approx(0.7, abs=0.03)
    assert len(names["test"]) / total == pytest.approx(0.2, abs=0.03)
    # Rules are different even where names are not looked at: no held-out rule is a trained one in disguise.
    random = np.random.default_rng(0)
    for draw in (rules.noise, objects.draw):
        probes = [draw(random, 6) for _ in range(3)]
        shown = [rule for split in rules.SPLITS for rule in found[split] if rule.draw is draw]
        answers = {b"".join(rule.apply(grid).tobytes() for grid in probes) for rule in shown}
        assert len(answers) == len(shown) > 800
    assert "swap 1 2" in names["train"] and "swap 1 6" in names["test"]


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_every_family_has_rules_to_train_on_and_to_hold_out(family):
    counts = [len(rules.rules((family,), split)) for split in rules.SPLITS]
    assert min(counts) > 1 and sum(counts) == COUNTS[family]


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_a_rule_is_a_function_that_leaves_its_input_alone(family):
    random = np.random.default_rng(1)
    for rule in rules.rules((family,), "validation")[:20]:
        grid = rule.draw(random, 6)
        before, answer = grid.copy(), rule.apply(grid)
        assert answer.shape == (6, 6) and answer.min() >= 0 and answer.max() < 10
        np.testing.assert_array_equal(rule.apply(grid), answer)
        np.testing.assert_array_equal(grid, before)


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_a_table_of_colours_answers_rules_that_only_map_colours(family):
    """Whole answers that are right on 100 tasks, of two questions each: all of them or next to none."""
    source = rules.RuleSource(replace(LARGE, families=(family,)), "test", 0)
    tables = jax.jit(jax.vmap(grids.colour_table))(np.stack([source[i]["support"] for i in range(100)]))
    asked = [source[i]["query"] for i in range(100)]
    right = [
        (table[pair[0]] == pair[1]).all()
        for table, pairs in zip(np.asarray(tables), asked, strict=True)
        for pair in pairs
    ]
    if family in (*rules.MOVES, *rules.OBJECTS, "shift"):
        assert np.mean(right) < 0.2
    else:
        assert np.mean(right) > 0.95


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_a_task_shows_its_rule_and_no_other(family):
    """Whatever rule of any split fits the examples answers the questions alike."""
    source = rules.RuleSource(replace(LARGE, families=(family,)), "test", 3)
    every = [rule for split in rules.SPLITS for rule in rules.rules((family,), split)]
    for index in range(8):
        task = source[index]
        assert task["support"].shape == (3, 2, 6, 6) and task["query"].shape == (2, 2, 6, 6)
        assert task["support"].dtype == task["query"].dtype == np.int32
        fitting = [rule for rule in every if all((rule.apply(pair[0]) == pair[1]).all() for pair in task["support"])]
        assert fitting
        for rule in fitting:
            assert all((rule.apply(pair[0]) == pair[1]).all() for pair in task["query"]), rule.name


def test_balanced_families_take_turns_and_all_rules_of_each_come():
    config = replace(LARGE, families=("roll", "border"), balanced=True)
    source, counts = rules.RuleSource(config, "test", 0), {"roll": 6, "border": 10}
    for place, family in enumerate(config.families):
        found = rules.rules((family,), "test")
        assert len(found) == counts[family]
        names = set()
        for index in range(len(found)):
            pairs = source[2 * index + place]["support"]
            names |= {rule.name for rule in found if all((rule.apply(a) == b).all() for a, b in pairs)}
        assert names == {rule.name for rule in found}


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
    with pytest.raises(
        ValueError, match=r"families must name .* swap, recolour, cycle, double, shift, roll, .*, got \(\)"
    ):
        rules.RulesConfig(families=())
    with pytest.raises(ValueError, match=r"rules.size must be 6 or more for the families roll, .* border, got 5"):
        rules.RulesConfig(families=("swap", "rank"))
    with pytest.raises(ValueError, match=r"at most 2 x 2, got \(1, 3\)"):
        rules.padded(np.zeros((1, 3)), 2)
