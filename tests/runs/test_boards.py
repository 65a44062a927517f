"""Weights & Biases and MLflow: what a run writes there, read back, and runs that go on."""

import io
import json
import math
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lensjax._settings import replace
from lensjax.plots import curves, style
from lensjax.runs.config import STEPS, Config
from lensjax.runs.folder import open_run
from lensjax.runs.store import config_file, identity, sinks
from lensjax.runs.store.log import RunLogger, read_rows
from lensjax.runs.store.sinks import LoggingConfig
from lensjax.training.metrics import HISTOGRAMS
from tests.runs import TINY, cheap_programs, contents, start, tiny_config

(HISTOGRAM,) = HISTOGRAMS
COUNTS = np.arange(len(HISTOGRAMS[HISTOGRAM]) - 1, dtype=np.float32)
PHASES = ("lens", "online")
BOARDS = ("wandb", "mlflow")


def write(folder: Path, steps, board: str, *, resume=None) -> None:
    logging = LoggingConfig(sinks=("tensorboard", board), project="mine")
    values = identity.flat(TINY)
    with RunLogger(folder, resume=resume, phases=PHASES, logging=logging, values=values) as logger:
        for step in steps:
            logger.log("lens", step, {"loss": 1 / step, "mc/preference_corr_mean": math.nan, HISTOGRAM: COUNTS})
            if step % 2 == 0:
                logger.log("lens", step, {"eval/nll": float(step)})
            logger.flush()


def expected(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Each number of the file once."""
    return {
        (f"{row['phase']}/{name}", row["step"]): [value]
        for row in read_rows(folder)
        for name, value in row.items()
        if name not in ("phase", "step") and value != "n/a"
    }


def name_on(folder: Path, board: str) -> str:
    return json.loads((folder / "boards.json").read_text())[board]


# What they keep, by their own formats


def records(path: Path):
    """Those of a file of Weights & Biases: blocks of 32 KiB, in them pieces of records; see LevelDB's log format."""
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def wandb_points(folder: Path) -> dict[tuple[str, int], list[float]]:
    from wandb.proto import wandb_internal_pb2 as messages

    points: dict[tuple[str, int], list[float]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        assert path.stem == f"run-{name_on(folder, 'wandb')}"  # all starts are one run
        for content in records(path):
            record = messages.Record.FromString(content)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            items = {
                name: json.loads(value) for name, value in items.items() if not name.startswith(("_", "pictures/"))
            }
            step = next((value for name, value in items.items() if name.endswith("/step")), None)
            for name, value in items.items():
                if isinstance(value, int | float) and not name.endswith("/step"):
                    points.setdefault((name, step), []).append(value)
                elif name.endswith(HISTOGRAM):
                    assert value["values"] == COUNTS.tolist()
    return points


def mlflow_points(folder: Path, uri: str) -> dict[tuple[str, int], list[float]]:
    from mlflow import MlflowClient

    client, points = MlflowClient(tracking_uri=uri), {}
    run = client.get_run(name_on(folder, "mlflow"))
    assert run.info.run_name == folder.name and run.info.status == "FINISHED"
    assert run.data.params["base.dim"] == "8" and len(run.data.params) == len(identity.flat(TINY))
    (experiment,) = client.search_experiments(filter_string="name = 'mine'")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            points.setdefault((name, point.step), []).append(point.value)
    return points


@pytest.fixture
def points(request, tmp_path, monkeypatch):
    """What a board holds of a run, as a function of its folder; the place where it is kept is asked for."""
    if request.param == "wandb":
        pytest.importorskip("wandb", reason="wandb (extra wandb) is not installed")
        monkeypatch.setenv("WANDB_MODE", "offline")
        return wandb_points
    pytest.importorskip("mlflow", reason="mlflow (extra mlflow) is not installed")
    if request.param == "mlflow":
        pytest.importorskip("sqlalchemy", reason="sqlalchemy (extra mlflow) is not installed")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return lambda folder: mlflow_points(folder, f"sqlite:///{folder}/mlflow.db")
    uri = f"file:{tmp_path}/mlruns"  # a store that MLflow no longer extends, and asks for by name
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return lambda folder: mlflow_points(folder, uri)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("points", ["wandb", "mlflow", "mlflow files"], indirect=True)
def test_a_board_holds_each_number_once_however_often_a_run_goes_on(tmp_path, points, request):
    board = request.node.callspec.params["points"].split()[0]
    write(tmp_path / "run", range(1, 6), board)
    first = name_on(tmp_path / "run", board)
    write(tmp_path / "run", range(4, 9), board, resume=("lens", 3))  # 4 and 5 are written again
    assert name_on(tmp_path / "run", board) == first
    assert points(tmp_path / "run") == expected(tmp_path / "run")
    assert len(expected(tmp_path / "run")) == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("points", ["wandb", "mlflow files"], indirect=True)
def test_a_whole_run_is_on_the_board_of_its_config(tmp_path, points, request, drawn):
    board = request.node.callspec.params["points"].split()[0]
    config = replace(tiny_config(tmp_path / "run"), logging=LoggingConfig(sinks=(board,), project="mine"))
    start(config)
    assert points(tmp_path / "run") == expected(tmp_path / "run")
    assert not (tmp_path / "run/tensorboard").exists()
    assert pictures(tmp_path, request.node.callspec.params["points"]) == [(tmp_path / "run/training.png").read_bytes()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("points", ["mlflow"], indirect=True)
def test_pictures_are_in_the_folder_of_a_run_that_has_its_own_database(tmp_path, points, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for resume in (None, ("lens", 2)):  # what is drawn again takes the place of what was there
        logging = LoggingConfig(sinks=("mlflow",), project="mine")
        values = identity.flat(TINY)
        with RunLogger(tmp_path / "run", resume=resume, phases=PHASES, logging=logging, values=values) as logger:
            logger.log("lens", 1 if resume is None else 3, {"loss": 1.0})
            draw(tmp_path / "run/training.png")
            logger.show(tmp_path / "run/training.png")
    assert pictures(tmp_path, "mlflow") == [(tmp_path / "run/training.png").read_bytes()]
    assert points(tmp_path / "run") == expected(tmp_path / "run")
    assert not list((tmp_path / "elsewhere").rglob("*.png"))


# Pictures


def draw(path: Path) -> None:
    style.write(style.new_figure(1, 1), path)


def pictures(folder: Path, board: str) -> list[bytes]:
    """Those that a board keeps of the run in `folder / "run"`, with a name like `training.png`."""
    kept = {
        "wandb": "run/wandb/offline-run-*/files/media/images/pictures/training_*.png",
        "mlflow": "run/mlartifacts/*/artifacts/training.png",
        "mlflow files": "mlruns/*/*/artifacts/training.png",
    }
    return [path.read_bytes() for path in folder.glob(kept[board])]


@pytest.fixture
def drawn():
    """Runs of cheap programs end with a small picture."""
    with cheap_programs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "training_curves", lambda rows, path: draw(path))
        yield


# Without the packages


class Fake:
    """A board that keeps what it is told."""

    def __init__(self, folder, **options):
        self.options, self.written, self.shown, self.closed = options, [], [], False

    def write(self, phase, step, metrics, histograms):
        self.written.append((phase, step, dict(metrics), list(histograms)))

    def show(self, picture):
        assert not self.closed
        self.shown.append((picture.name, picture.exists()))

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def fakes(monkeypatch):
    """Boards that are opened, in their order."""
    opened = []

    def open_fake(folder, **options):
        opened.append(Fake(folder, **options))
        return opened[-1]

    from lensjax.runs.store import boards

    monkeypatch.setattr(boards, "WandB", open_fake)
    monkeypatch.setattr(boards, "MLflow", open_fake)
    monkeypatch.setattr(sinks, "find_spec", lambda name: name)
    return opened


def test_a_sink_is_told_every_row_and_what_earlier_starts_have_sent(tmp_path, fakes):
    write(tmp_path, range(1, 3), "wandb")
    write(tmp_path, range(2, 4), "wandb", resume=("lens", 1))
    loss = {"mc/preference_corr_mean": "n/a"}
    assert fakes[0].written == [
        ("lens", 1, {"loss": 1.0, **loss}, [HISTOGRAM]),
        ("lens", 2, {"loss": 0.5, **loss}, [HISTOGRAM]),
        ("lens", 2, {"eval/nll": 2.0}, []),
    ]
    names = frozenset({"loss", *loss})
    assert fakes[0].options["known"] == set() and fakes[0].closed
    assert fakes[1].options["known"] == {
        ("lens", 1, names),
        ("lens", 2, names),
        ("lens", 2, frozenset({"eval/nll"})),
    }


@pytest.mark.slow
def test_pictures_of_a_run_are_shown_before_its_boards_are_closed(tmp_path, fakes, drawn):
    start(replace(tiny_config(tmp_path / "run"), logging=LoggingConfig(sinks=("tensorboard", "mlflow"))))
    (fake,) = fakes
    assert fake.shown == [("training.png", True)] and fake.closed


def test_a_board_that_refuses_a_picture_costs_a_warning(tmp_path, fakes, monkeypatch, capsys):
    def refuse(picture):
        raise OSError("no room\nfor it")

    with RunLogger(tmp_path, phases=PHASES, logging=LoggingConfig(sinks=BOARDS)) as logger:
        fakes[0].show = refuse
        logger.show(tmp_path / "maps.png")
    assert capsys.readouterr().err == f"warning: {tmp_path}/maps.png is not on Fake: no room\n"
    assert fakes[1].shown == [("maps.png", False)]


def opened(config, *, resume=False):
    """Opens the folder of a run, and its log, and does nothing."""
    with open_run(config, STEPS, resume=resume, console=Console(file=io.StringIO())):
        pass


def test_a_run_goes_on_with_other_sinks(tmp_path, fakes):
    config = tiny_config(tmp_path / "run")
    opened(config)
    path = tmp_path / "run/config.json"
    text = path.read_text().replace('"tensorboard"', '"mlflow"').replace('"lensjax"', '"other"')
    assert text != path.read_text()
    path.write_text(text)
    changed = config_file.load(path, Config)
    opened(changed, resume=True)
    (fake,) = fakes
    assert fake.options["project"] == "other" and fake.options["values"]["logging.sinks"] == ("mlflow",)
    both = [identity.of(one, data=None, weights=None) for one in (config, changed)]
    allowed, refused = identity.compare(*both, phase="lens", steps=STEPS)
    assert [one.split()[0] for one in allowed] == ["logging.sinks", "logging.project"] and refused == []


@pytest.mark.parametrize("board", BOARDS)
def test_a_sink_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch, board):
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    config = replace(tiny_config(tmp_path / "run"), logging=LoggingConfig(sinks=(board,)))
    with pytest.raises(ImportError, match=rf"logging\.sinks names {board}, which is not installed: pip install"):
        opened(config)
    assert contents(tmp_path) == {}


def test_a_damaged_list_of_names_is_refused(tmp_path, monkeypatch):
    from lensjax.runs.store import boards

    (tmp_path / "boards.json").write_text('{"wandb"')
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(ValueError, match=r"boards\.json is damaged .*: delete it to begin a new run on each board"):
        boards.WandB(tmp_path, project="mine", values={}, phases=PHASES, known=())


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"logging\.sinks must be .*tensorboard, wandb, mlflow.*, got \('comet',\)"):
        LoggingConfig(sinks=("comet",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logging\.project must be a name"):
        LoggingConfig(project="")
    assert LoggingConfig(sinks=()).sinks == ()
