import functools
import math

import jax
import numpy as np
import pytest

from lensjax.context.geometry import Geometry
from lensjax.training.optim import schedules

GEOMETRY = Geometry(history=100, block_size=4, max_lod=2, recent_tokens=20)


def over_steps(schedule, steps):
    return jax.jit(jax.vmap(schedule))(np.arange(steps)).tolist()


def test_linear_runs_from_start_to_end_and_stays():
    line = over_steps(lambda step: schedules.linear(step, start=2.0, end=1.0, steps=5), 8)
    assert line == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0, 1.0])
    assert over_steps(lambda step: schedules.linear(step, start=2.0, end=1.0, steps=1), 3)[1:] == [1.0, 1.0]
    assert over_steps(lambda step: schedules.linear(step, start=2.0, end=1.0, steps=0), 3) == [1.0] * 3


def test_linear_meets_both_ends_exactly():
    line = over_steps(lambda step: schedules.linear(step, start=0.8, end=0.1, steps=1000), 1000)
    assert (line[0], line[-1]) == (np.float32(0.8), np.float32(0.1))


@pytest.mark.parametrize(
    ("schedule", "after_warmup"),
    [
        ("constant", [1.0] * 5),
        ("linear", [1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]),
    ],
)
def test_learning_rate_by_hand(schedule, after_warmup):
    rates = over_steps(
        functools.partial(schedules.learning_rate, peak=0.2, schedule=schedule, warmup_steps=3, steps=8), 10
    )
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.15])
    assert rates[3:8] == pytest.approx([0.2 * shape for shape in after_warmup])
    assert rates[8:] == pytest.approx([rates[7]] * 2)


def test_learning_rate_without_warmup_starts_at_the_peak():
    rates = over_steps(
        functools.partial(schedules.learning_rate, peak=0.2, schedule="linear", warmup_steps=0, steps=2), 2
    )
    assert rates == pytest.approx([0.2, 0.02])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "step"}, "schedule must be constant, linear or cosine, got 'step'"),
        ({"warmup_steps": 8}, "warmup_steps must be below the run's 8 steps, got 8"),
    ],
)
def test_learning_rate_refuses(change, message):
    arguments = {"schedule": "cosine", "warmup_steps": 2, "steps": 8} | change
    with pytest.raises(ValueError, match=message):
        schedules.learning_rate(0, 0.1, **arguments)


def test_the_curriculum_shortens_the_context_through_reachable_lengths():
    lengths = over_steps(
        lambda step: schedules.context_length(
            step, start=0.9, end=0.4, steps=51, geometry=GEOMETRY, capacity=GEOMETRY.length(90)
        ),
        60,
    )
    assert lengths == [GEOMETRY.length(max(90 - step, 40)) for step in range(60)]
    assert (lengths[0], lengths[-1]) == (88, 40)


def test_the_curriculum_can_grow_and_never_exceeds_the_capacity():
    lengths = over_steps(
        lambda step: schedules.context_length(step, start=0.4, end=1.0, steps=5, geometry=GEOMETRY, capacity=80),
        5,
    )
    assert lengths == [40, 55, 70, 79, 79]


@pytest.mark.parametrize("window", [100, 256, 1000, 4096])
def test_the_device_and_the_host_round_fractions_alike(window):
    geometry = Geometry(window, block_size=2, max_lod=1, recent_tokens=1)
    fractions = [i / 100 for i in range(51, 101)]
    lengths = jax.jit(
        jax.vmap(
            lambda end: schedules.context_length(0, start=1.0, end=end, steps=0, geometry=geometry, capacity=window)
        )
    )(np.asarray(fractions, np.float32))
    assert lengths.tolist() == [geometry.length_of_fraction(fraction) for fraction in fractions]
