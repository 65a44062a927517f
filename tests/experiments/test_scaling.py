"""The scaling script, on shapes that take no time."""

import csv
from dataclasses import replace

import pytest

from experiments.bench import scaling as script
from experiments.bench.cost import step_cost
from lensjax import _settings
from tests.small import SMALL

TINY = _settings.replace(SMALL, **{"hyper.kl_weight": 0.1, "data.task": "recall"})


def test_every_series_grows_in_one_size_alone():
    for name, series in script.SERIES.items():
        configs = [series.config(value) for value in series.values]
        entries = [config.capacity for config in configs]
        if name == "entries":
            assert all(abs(count - value) < 8 for count, value in zip(entries, series.values, strict=True))
        else:
            assert all(232 <= count <= 256 for count in entries), name
        assert series.is_session or script.SHAPE in configs or name == "levels"


def test_operations_on_paper_grow_as_the_sizes_do():
    def flops(name):
        return [step_cost(script.SERIES[name].config(value)).total.flops for value in script.SERIES[name].values]

    one, two, *_, sixteen = flops("rollouts")
    assert two / one == pytest.approx(3 / 2, rel=0.01) and sixteen / one == pytest.approx(17 / 2, rel=0.03)
    *_, three_quarters, whole = flops("entries")
    assert 4 / 3 < whole / three_quarters < (4 / 3) ** 2
    assert max(flops("window")) / min(flops("window")) < 1.05


@pytest.mark.slow
def test_points_are_measured_and_drawn(tmp_path, monkeypatch):
    step = script.Series("rollouts N", (1, 2), lambda n: _settings.replace(TINY, **{"context.rollouts": n}))
    session = replace(
        script.SERIES["history"],
        values=(64,),
        config=lambda t: _settings.replace(
            TINY,
            **{"context.window": t, "context.recent_tokens": 17, "hyper.context_end": 48 / t, "context.horizon": 8},
        ),
    )
    monkeypatch.setattr(script, "SERIES", {"rollouts": step, "history": session})
    folder = tmp_path / "run"
    script.main(["--series", "rollouts", "history", "--repetitions", "2", "--output-dir", str(folder)])
    with (folder / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["series"], int(row["value"])) for row in rows] == [("rollouts", 1), ("rollouts", 2), ("history", 64)]
    for row in rows:
        assert 0 < float(row["lower_quartile"]) <= float(row["milliseconds"]) <= float(row["upper_quartile"])
    assert (folder / "scaling.png").is_file() and (folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--series", "depth"], "series may be rollouts, entries, "),
        (["--repetitions", "0"], "repetitions must be at least 1, got 0"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        script.main([*words, "--output-dir", str(tmp_path / "run")])
    assert message in (capsys.readouterr().err if stop.value.code == 2 else str(stop.value))
    assert not (tmp_path / "run").exists()
