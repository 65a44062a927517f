import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.evaluation import effects as effect_module
from lensjax.evaluation.effects import Effect, Measured, effects, holm, markdown
from lensjax.evaluation.statistics import estimate

KNOB = {"hyper.temperature": 0.5}


def measured(nll, setting=None, diverged=(), **others):
    nll = np.asarray(nll, float)
    marks = np.isin(np.arange(len(nll)), diverged)
    values = {name: np.asarray(value, float) for name, value in others.items()}
    return Measured(KNOB if setting is None else setting, nll, values, marks)


def compared(differences):
    """The effect of a setting with these differences to a default that varies far more by seed and by batch."""
    differences = np.asarray(differences, float)
    seeds, batches = differences.shape
    default = 4.0 + np.arange(seeds)[:, None] + 2.0 * np.arange(batches)
    both = [measured(default, {}), measured(default + differences)]
    return effects(both)[1]


# Holm


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.2, 0.6]) == pytest.approx([1.0, 0.6, 1.0])
    assert holm([0.04]) == [0.04] and holm([]) == []


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.3]))
@settings(max_examples=50)
def test_holm_rejects_what_the_step_down_procedure_rejects(p, level):
    order = sorted(range(len(p)), key=lambda place: p[place])
    rejects = itertools.takewhile(lambda i: (len(p) - i) * p[order[i]] < level, range(len(p)))
    adjusted = holm(p)
    assert {place for place, one in enumerate(adjusted) if one < level} == {order[i] for i in rejects}
    assert all(one <= after <= 1 for one, after in zip(p, adjusted, strict=True))


# Intervals and p-values


def test_a_difference_is_that_of_pairs():
    rng = np.random.default_rng(3)
    differences = 1 + rng.normal(size=(4, 1)) + rng.normal(size=(1, 6)) + rng.normal(size=(4, 6))
    one, expected = compared(differences), estimate(differences)
    found = (one.difference, one.difference_low, one.difference_high, one.p)
    assert found == pytest.approx((expected.mean, expected.low, expected.high, expected.p))
    assert one.p == one.p_holm and one.seeds == 4


def test_a_shift_is_found_and_none_is_not():
    rng = np.random.default_rng(1)
    runs = [measured(3 + rng.normal(size=(5, 32)) * 0.01 + rng.normal(size=32), {})]
    for place, shift in enumerate([0.0, -0.05, 0.0, 0.03, 0.0]):
        runs.append(measured(runs[0].nll + shift + 0.01 * rng.normal(size=(5, 32)), {"knob": place}))
    found = effects(runs)
    assert {one.value for one in found if one.is_distinguishable} == {"1", "3"}
    assert [one.value for one in found[:3]] == ["", "1", "3"]
    assert all(0 < one.p <= one.p_holm <= 1 for one in found[1:])
    # Without pairs the difference would drown: batches vary 1000 times as much.
    assert found[1].high - found[1].low > 10 * (found[1].difference_high - found[1].difference_low)


def test_no_difference_at_all():
    one = compared(np.zeros((3, 4)))
    assert (one.difference, one.difference_low, one.difference_high, one.p, one.p_holm) == (0, 0, 0, 1, 1)
    assert not one.is_distinguishable


@given(st.integers(2, 4), st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=20)
def test_effects_mirror_and_move(seeds, batches, seed):
    differences = np.random.default_rng(seed).normal(size=(seeds, batches))
    one, mirrored = (compared(sign * differences) for sign in (1, -1))
    assert 0 < one.p <= 1 and one.p == pytest.approx(mirrored.p)
    assert one.difference == pytest.approx(-mirrored.difference)
    moved = compared(differences + 10.0)
    assert moved.difference_low == pytest.approx(one.difference_low + 10)


# What is left out


def test_seeds_that_diverged_on_either_side_are_left_out():
    nan = math.nan
    default = measured([[1.0, 1.0], [nan, nan], [2.0, 2.0], [3.0, 3.0]], {}, [1], swap_rate=[nan, 9.0, nan, 0.5])
    other = measured([[1.5, 1.5], [9.0, 9.0], [nan, 7.0], [3.25, 3.25]], diverged=[2], swap_rate=[0.1, 9.0, 9.0, 0.3])
    first, one = effects([default, other])
    assert (first.seeds, first.diverged, first.mean, first.others) == (3, 1, 2.0, {"swap_rate": 0.5})
    assert (one.seeds, one.diverged, one.mean, one.difference) == (2, 1, 2.375, 0.375)
    assert one.others == pytest.approx({"swap_rate": 0.2})
    same = effects([measured([[1, 1], [3, 3]], {}), measured([[1.5, 1.5], [3.25, 3.25]])])[1]
    assert (one.difference_low, one.difference_high, one.p) == (same.difference_low, same.difference_high, same.p)


def test_fewer_than_two_seeds_are_not_tested():
    default = measured([[1.0, 2.0], [3.0, 4.0]], {})
    left = measured([[1.5, 2.5], [0, 0]], {"a": 1}, [1], hit_rate=[math.nan, 1.0])
    gone = measured(np.full((2, 2), math.nan), {"a": 2}, [0, 1])
    small = measured(default.nll + 0.001, {"a": 3})
    _, one, tested, none = effects([default, gone, small, left])
    assert (one.seeds, one.mean, one.difference) == (1, 2.0, 0.5) and math.isnan(one.others["hit_rate"])
    assert none.seeds == 0 and math.isnan(none.mean) and math.isnan(none.difference)
    for untested in (one, none):
        assert untested.low is untested.high is untested.difference_low is untested.difference_high is None
        assert untested.p is untested.p_holm is None and not untested.is_distinguishable
    # Nothing else was tested, so nothing is corrected.
    assert tested.p == tested.p_holm < 1e-9


def test_default_is_first_and_is_not_compared():
    first, *others = effects([measured([[1.0, 2.0], [3.0, 4.0]], {}), measured(np.ones((2, 2)))])
    assert (first.knob, first.value, first.name, first.difference) == ("default", "", "default", 0.0)
    assert first.p is first.p_holm is first.difference_low is first.difference_high is None
    assert first.low < first.mean == 2.5 < first.high
    assert [one.name for one in others] == ["hyper.temperature = 0.5"]


def test_order_is_by_size_and_names_hold_all_fields():
    default = np.arange(6.0).reshape(2, 3)
    shifts = {0.1: {"a.b": 1}, -0.3: {"a.b": True, "c": "x|y"}, 0.2: {"c": 1e-5}}
    runs = [measured(default, {}), *(measured(default + shift, setting) for shift, setting in shifts.items())]
    found = effects(runs)
    assert [(one.knob, one.value) for one in found[1:]] == [("a.b + c", "True, x|y"), ("c", "1e-05"), ("a.b", "1")]


def test_an_effect_depends_on_its_own_setting_alone_but_for_the_correction():
    rng = np.random.default_rng(2)
    runs = [measured(rng.normal(size=(3, 5)), setting) for setting in ({}, {"a": 1}, {"a": 2})]
    alone = effects(runs[::2])[1]
    (among,) = (one for one in effects(runs) if one.value == "2")
    assert replace(among, p_holm=None) == replace(alone, p_holm=None)
    assert among.p_holm >= alone.p_holm == alone.p


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: [], r"the default, which changes nothing, as the first setting, got \[\]"),
        (lambda: [measured(np.ones((2, 2)))], r"first setting, got \[\{'hyper.temperature': 0.5\}\]"),
        (lambda: [measured(np.ones((2, 2)), {})] * 2, r"every setting once, got \[\{\}\] again"),
        (
            lambda: [measured(np.ones((2, 2)), {}), measured(np.ones((2, 3)))],
            r"losses of shapes \[\(2, 2\), \(2, 3\)\]",
        ),
        (lambda: [measured(np.ones(2), {})], r"expected nll \[S, Q\], .* and diverged \[S\], got \(2,\) and \(2,\)"),
        (lambda: [measured(np.ones((2, 1)), {})], r"two or more batches Q, .* got \(2, 1\) and"),
        (lambda: [measured(np.ones((2, 0)), {})], r"got \(2, 0\) and"),
        (lambda: [replace(measured(np.ones((2, 2)), {}), diverged=np.zeros(3, bool))], r"got \(2, 2\) and \(3,\)"),
        (
            lambda: [measured(np.ones((2, 2)), {}, swap_rate=np.ones(3))],
            r"shape \(2,\), .* got \{'swap_rate': \(3,\)\}",
        ),
        (lambda: [measured([[1.0, 2.0], [math.inf, 1.0]], {"a": 1})], r"a loss of \{'a': 1\} is not finite"),
    ],
)
def test_sweeps_that_cannot_be_compared_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        effects(change())


# The report

FOUND = [
    Effect("default", "", 3, 2.0, 1.9, 2.1, 0.0, None, None, None, None, 0, {"hit_rate": 0.5, "swap_rate": math.nan}),
    Effect("a.b", "x|y", 2, 1.5, 1.4, 1.6, -0.5, -0.6, -0.4, 1e-6, 3e-6, 1, {"hit_rate": 0.75, "swap_rate": 0.1}),
    Effect("a.b", "4", 3, 2.25, 2.0, 2.5, 0.25, 0.2, 0.3, 0.002, 0.004, 0, {"hit_rate": 0.25, "swap_rate": 0.2}),
    Effect("c", "0.1", 3, 2.0, 1.9, 2.1, -1e-9, -0.01, 0.01, 0.9, 0.9, 0, {"hit_rate": 0.5, "swap_rate": -1e-9}),
    Effect("c", "9", 1, 2.0, None, None, 0.0, None, None, None, None, 2, {"hit_rate": 0.5, "swap_rate": 0.3}),
    Effect("c", "99", 0, *[math.nan, None, None] * 2, None, None, 3, {"hit_rate": math.nan, "swap_rate": math.nan}),
]
REPORT = f"""\
# Sweep

```console
make ablate
```

{effect_module._METHOD}

The default has `a.b = 2`, `c = 0.5`.

| setting | seeds | NLL, nats per token | difference | p (Holm) | swap_rate | hit_rate |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| `default` | 3 | 2.0000 [1.9000, 2.1000] |  |  | n/a | 0.500 |
| `a.b = x\\|y` | 2 (1 diverged) | 1.5000 [1.4000, 1.6000] | -0.5000 [-0.6000, -0.4000] | < 0.0001 | 0.100 | 0.750 |
| `a.b = 4` | 3 | 2.2500 [2.0000, 2.5000] | +0.2500 [+0.2000, +0.3000] | 0.0040 | 0.200 | 0.250 |
| `c = 0.1` | 3 | 2.0000 [1.9000, 2.1000] | +0.0000 [-0.0100, +0.0100] | 0.9000 | 0.000 | 0.500 |
| `c = 9` | 1 (2 diverged) | 2.0000 [no interval] | +0.0000 [no interval] | n/a | 0.300 | 0.500 |
| `c = 99` | 0 (3 diverged) | n/a [no interval] | n/a [no interval] | n/a | n/a | n/a |

## Distinguishable from the default (p_holm < 0.05)

- `a.b = x|y`: lower NLL, -0.5000 [-0.6000, -0.4000]
- `a.b = 4`: higher NLL, +0.2500 [+0.2000, +0.3000]

## Not distinguishable from zero

- `c = 0.1`

## Not tested: fewer than two seeds left to compare

- `c = 9`: 2 diverged
- `c = 99`: 3 diverged
"""


def test_report():
    options = {
        "default": {"a.b": 2, "c": 0.5},
        "title": "Sweep",
        "columns": ["swap_rate", "hit_rate"],
        "command": "make ablate",
    }
    assert markdown(FOUND, **options) == REPORT
    short = markdown(FOUND[:1], **options)
    assert short.endswith("(p_holm < 0.05)\n\n- none\n\n## Not distinguishable from zero\n\n- none\n")


def test_report_of_a_metric_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="default has no metric hits: choose from hit_rate, swap_rate"):
        markdown(FOUND, default={}, title="", columns=["hit_rate", "hits"], command="")
