"""What is around a program: consoles that go away or cannot encode, Ctrl-C, devices that are not there."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

from experiments.process import advising, describe, errors_end
from lensjax.runs.engine import devices, loop
from lensjax.runs.store import config_file, paths
from tests.runs import ROOT, run_script, tiny_config


def test_d14_2_a_console_that_cannot_encode_shows_escapes(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    with errors_end():
        Console().out("runs/ünï☃")
        sys.stdout.flush()
    assert shown.getvalue() == rb"runs/\xfcn\xef\u2603" + b"\n"


@pytest.mark.parametrize("name", ["l\udce9t", "p\udcc3\udcb6"])
def test_d14_3_a_folder_whose_name_is_no_text_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"^output_dir must be text that UTF-8 can write.*\\udc"):
        tiny_config(tmp_path / name)


def test_d14_3_so_is_one_below_such_a_working_folder(tmp_path, monkeypatch):
    (tmp_path / "l\udce9t").mkdir()
    monkeypatch.chdir(tmp_path / "l\udce9t")
    with pytest.raises(ValueError, match=r"must be text that UTF-8 can write.*\\udce9t/run"):
        paths.resolved(tiny_config(Path("run")))


def test_d14_4_a_reader_that_goes_away_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with errors_end():
            for _ in range(3):
                print("a line", flush=True)
                Console().out("another")


def test_d14_4_no_console_at_all_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with errors_end():
        Console().out("a line")
        print("another", file=sys.stderr)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'\nand more")])
def test_d14_5_a_platform_that_is_not_there_is_named(monkeypatch, error):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", lambda: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match=r"^JAX_PLATFORMS=cuda asks for .* not there \(.*\): unset it, or set .* cpu$"):
        devices.find()


def test_d14_6_ctrl_c_is_one_line_and_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as end, errors_end(), advising(lambda: "go on with --resume runs/a"):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted; go on with --resume runs/a\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
def test_m12_a_signal_that_the_process_was_started_to_ignore_stays_ignored(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with loop._stop_requests() as stop:
            signal.raise_signal(number)
            assert not stop.requested
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL)
        with loop._stop_requests() as stop:
            signal.raise_signal(number)
            assert stop.agreed == number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def ended(error, capsys):
    """The message that a program ends with on an exception, and what it printed before."""
    with pytest.raises(SystemExit) as end, errors_end():
        raise error
    return end.value.code, capsys.readouterr().err


def test_a_message_for_people_stands_as_it_is(capsys):
    def refuse():
        raise ValueError("steps must be at least 1,\n  got 0")

    try:
        config_file.from_json("[]", object)
    except ValueError as error:
        assert describe(error) == "config: expected an object with keys of object, got []"
    assert ended(FileNotFoundError("no config x.py; name a file"), capsys) == ("error: no config x.py; name a file", "")
    with pytest.raises(ValueError) as raised:
        refuse()
    assert describe(raised.value).startswith("ValueError: steps must be at least 1,; got 0 (LENSJAX_TRACEBACK=1")


def test_an_exception_that_is_no_message_says_where_it_comes_from(capsys, monkeypatch):
    with pytest.raises(Exception) as raised:
        config_file.to_json(tiny_config(ROOT, seed=0) and object())
    line = describe(raised.value)
    assert line.startswith("TypeError: ") and "(lensjax/runs/store/config_file.py:" in line and "\n" not in line
    assert ended(KeyError("phase"), capsys) == ("error: KeyError: 'phase' (LENSJAX_TRACEBACK=1 shows the rest)", "")
    monkeypatch.setenv("LENSJAX_TRACEBACK", "1")
    assert "Traceback" in ended(KeyError("phase"), capsys)[1]


def test_what_was_being_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("{}")
    monkeypatch.setattr(json, "loads", lambda text, **options: {}["phase"])
    with pytest.raises(KeyError) as raised:
        config_file.load(path, object)
    line = describe(raised.value)
    assert line.startswith("KeyError: 'phase' (lensjax/runs/store/config_file.py:")
    assert line.endswith(f"; at {path}; LENSJAX_TRACEBACK=1 shows the rest)")


def test_d15_a_full_disk_is_one_line_with_the_way_on(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")
    with pytest.raises(SystemExit) as end, errors_end(), advising(lambda: "go on with --resume runs/a"):
        raise full
    assert end.value.code == (
        "error: no space left on device: runs/a/metrics.jsonl; free some; go on with --resume runs/a"
    )
    deep = RuntimeError("RESOURCE_EXHAUSTED: Error opening driver: [spec] write: No space left on device [and so on]")
    assert ended(deep, capsys) == ("error: no space left on device; free some", "")
    assert ended(MemoryError(), capsys)[0].startswith("error: out of memory")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, programs):
    """A file with the tiny run's settings, and a folder for compiled programs."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "tiny.json").write_text(config_file.to_json(tiny_config(folder / "never")))
    return folder / "tiny.json", programs


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "evaluate", "studies.recall", "rlan.train", "bench.step"])
def test_d14_5_every_program_says_that_a_platform_is_not_there(tiny, script):
    words = ["x"] if script == "evaluate" else []
    done = run_script(*words, script=script, cache=tiny[1], JAX_PLATFORMS="nonsense")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: JAX_PLATFORMS=nonsense asks for") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_d14_4_a_run_goes_on_when_its_reader_has_seen_enough(tiny, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train", str(tiny[0]), "--output-dir", str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(tiny[1])
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("run folder")
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=300) == 0
    assert (folder / "summary.json").is_file()


@pytest.fixture
def terminal():
    """Programs start as on a terminal: in the background of a shell Ctrl-C is ignored, and stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["imports", "compiling"])
def test_d14_6_ctrl_c_anywhere_is_one_line(tiny, tmp_path, moment, terminal):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train", str(tiny[0]), "--output-dir", str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(None)
    ) as process:
        assert process.stdout is not None
        if moment == "compiling":
            process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    if moment == "imports":
        assert (shown, errors) == ("", "interrupted\n") and not folder.exists()
    else:
        assert f"go on with --resume {folder}\n" in shown + errors and len(errors.splitlines()) <= 1


def _environment(cache):
    cached = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    return {**os.environ, "PYTHONPATH": str(ROOT), **cached}
