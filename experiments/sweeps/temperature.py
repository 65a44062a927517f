"""Sixteen arms on recall: four temperatures, four seeds. docs/ablations.md times them against sixteen runs."""

from lensjax.runs.sweep import Sweep

SWEEP = Sweep(
    preset="recall",
    changes={"steps": 100, "batch_size": 16, "hyper.learning_rate": 3e-3},
    seeds=(0, 1, 2, 3),
    together=tuple({"hyper.temperature": value, "hyper.temperature_end": value} for value in (0.5, 2.0, 4.0)),
)
