"""The floor of a step on a device that is known from its data sheet alone."""

import csv

import pytest

from experiments.bench import roofline as script
from experiments.bench.cost import step_cost
from experiments.bench.shapes import SHAPES


def test_the_floor_is_the_larger_of_computing_and_reading():
    config = SHAPES["large"]
    plain, fused = step_cost(config).total, step_cost(config, fused_attention=True).total
    device = script.Device("any", flops_per_second=1e12, bytes_per_second=1.0, memory=1.0)
    slow_memory = script.floors(config, device)
    assert slow_memory["bound"] == "bytes" and slow_memory["fused_ms"] == pytest.approx(1e3 * fused.traffic)
    assert slow_memory["plain_ms"] == pytest.approx(1e3 * plain.traffic)
    slow_products = script.floors(config, script.Device("any", 1.0, 1e30, 1.0))
    assert slow_products["bound"] == "operations" and slow_products["most_plain"] == 1
    assert slow_products["fused_ms"] == slow_products["plain_ms"] == pytest.approx(1e3 * plain.flops)
    assert slow_products["tokens_per_second"] == pytest.approx(8 * 2048 / plain.flops)


def test_every_shape_for_an_accelerator_has_a_row_for_each_device(tmp_path):
    script.main(["--csv", str(tmp_path / "a.csv")])
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [(row["shape"], row["device"]) for row in rows[:4:3]] == [("large", "H100 SXM"), ("smollm2", "H100 SXM")]
    assert len(rows) == 6
