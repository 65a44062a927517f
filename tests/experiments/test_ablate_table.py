"""One table of several sweeps: the same settings side by side, corrected over all of them."""

import pytest

from experiments.studies import ablate_table as script

HEAD = "knob,value,seeds,mean,difference,difference_low,difference_high,p\n"


def sweep(folder, rows):
    folder.mkdir()
    (folder / "effects.csv").write_text(HEAD + "\n".join(["default,,5,1.25,0,,,", *rows]) + "\n")
    return folder


def test_the_table_by_hand(tmp_path, capsys):
    one = sweep(
        tmp_path / "one",
        ['objective.gate + steps,"teacher, 56",5,1,-0.25,-0.5,-0.125,0.02', "hyper.beta,2.0,5,1.5,0.25,-0.5,1,0.5"],
    )
    # Of three tests 0.001 counts three times, 0.02 twice; what has one seed has no interval and is not tested.
    two = sweep(
        tmp_path / "two",
        ['objective.gate + steps,"teacher, 36",5,1,-0.5,-0.75,-0.25,0.001', "hyper.margin,1,1,2,0.75,,,"],
    )
    table = script.show(script.Arguments((one, two)))
    assert table.splitlines() == [
        "| | one | two |",
        "| --- | --- | --- |",
        "| default | 1.250 | 1.250 |",
        "| `objective.gate teacher` | **-0.250 [-0.500, -0.125]** | **-0.500 [-0.750, -0.250]** |",
        "| `hyper.beta 2.0` | +0.250 [-0.500, +1.000] |  |",
        "| `hyper.margin 1` |  | +0.750 |",
    ]
    assert table in capsys.readouterr().out


def test_the_correction_is_over_all_sweeps(tmp_path):
    rows = ["hyper.beta,2.0,5,1,-0.25,-0.5,-0.125,0.03"]
    one, two = sweep(tmp_path / "one", rows), sweep(tmp_path / "two", rows)
    assert "**" in script.show(script.Arguments((one,))) and "**" not in script.show(script.Arguments((one, two)))


def test_a_folder_without_a_sweep_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished sweep"):
        script.read(tmp_path)


def test_settings_that_each_sweep_counts_in_its_own_numbers_share_a_row(tmp_path):
    one, two = (
        sweep(tmp_path / name, [f"context.own_rollouts,{own},5,1,0.25,,,", "steps,0,5,1,0.5,,,"])
        for name, own in (("one", 3), ("two", 2))
    )
    assert script.show(script.Arguments((one, two))).splitlines()[3:] == [
        "| `context.own_rollouts n` | +0.250 | +0.250 |",
        "| `untrained` | +0.500 | +0.500 |",
    ]
