"""Run folders that something happened to: gone on with to the bit, or refused in one line with nothing changed."""

import atexit
import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import train
from tests import runs
from tests.fuzz.runner import Case, Outcome, run_alone
from tests.kill.runs import essence

GARBAGE = (
    b"",
    b"{",
    b"5",
    b"{}",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b'{"step": NaN}\n',
    b"[" * 5000,
)
STRANGERS = (".DS_Store", ".nfs0001", ".tmp-5", "9", "0004", "-1", "4.bak", "notes.txt", "\u0661")
_RESULT = "essence.json"


class _Damaged:
    name = "damaged"

    def make(self, rng: random.Random, folder: Path) -> Case:
        run = folder / "run"
        shutil.copytree(_template() / "killed", run, symlinks=True)
        story = [rng.choice(DAMAGES)(rng, run) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        return Case("; ".join(story), lambda: _resume(run, folder / _RESULT), leaves=run, expects=story)

    def check(self, outcome: Outcome) -> str:
        ours = json.loads((outcome.folder / _RESULT).read_text())
        whole = json.loads((_template() / _RESULT).read_text())
        different = [name for name in whole if ours[name] != whole[name]]
        # What is not there cannot come back; but it must be said.
        said = "metrics.jsonl" in outcome.output + outcome.errors or "logging_steps" in outcome.output
        return (
            f"other {', '.join(different)} than the unbroken run"
            if different and not (different == ["rows"] and said)
            else ""
        )


KIND = _Damaged()


@functools.cache
def _template() -> Path:
    """A folder with `killed`, a run that was killed behind its checkpoint at LensNet's step 4, and what it comes to."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-damaged-"))
    atexit.register(_remove, folder, os.getpid())

    def make() -> None:
        with runs.cheap_programs():
            runs.start(runs.tiny_config(folder / "whole"))
            (folder / _RESULT).write_text(essence(folder / "whole"))
            runs.hook_run(setattr, lambda *at: at == ("saved", "lens", 4) and os._exit(0))
            runs.start(runs.tiny_config(folder / "killed"))

    outcome = run_alone(Case("", make), folder, limit=300)
    assert outcome.code == 0 and (folder / "killed").is_dir(), outcome.errors
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _resume(run: Path, result: Path) -> None:
    with runs.cheap_programs():
        train.main(["--resume", str(run)])
        result.write_text(essence(run))


def _file(rng: random.Random, run: Path) -> Path:
    """A file of any depth; those of the run itself are as likely as all below it."""
    above = sorted(path for path in run.iterdir() if path.is_file())
    return rng.choice(above if above and rng.random() < 0.5 else _paths(run, Path.is_file) or above)


def _paths(run: Path, is_one: Callable[[Path], bool]) -> list[Path]:
    return sorted(path for path in run.rglob("*") if is_one(path) and not path.is_symlink())


def _shown(run: Path, path: Path) -> str:
    return str(path.relative_to(run))


def _delete(rng: random.Random, run: Path) -> str:
    path = _file(rng, run)
    path.unlink()
    return f"{_shown(run, path)} deleted"


def _delete_folder(rng: random.Random, run: Path) -> str:
    path = rng.choice(_paths(run, Path.is_dir) or [run])
    shutil.rmtree(path)
    return f"{_shown(run, path)} deleted"


def _cut(rng: random.Random, run: Path) -> str:
    path = _file(rng, run)
    held = path.read_bytes()
    size = rng.randrange(len(held) + 1)
    path.write_bytes(held[:size])
    return f"{_shown(run, path)} cut to {size} bytes"


def _flip(rng: random.Random, run: Path) -> str:
    path = _file(rng, run)
    held = bytearray(path.read_bytes() or b" ")
    place, bit = rng.randrange(len(held)), rng.randrange(8)
    held[place] ^= 1 << bit
    path.write_bytes(held)
    return f"{_shown(run, path)} bit {bit} of byte {place} flipped"


def _overwrite(rng: random.Random, run: Path) -> str:
    path, text = _file(rng, run), rng.choice(GARBAGE)
    path.write_bytes(text)
    return f"{_shown(run, path)} is {text[:20]!r}"


def _line(rng: random.Random, run: Path) -> str:
    texts = [path for path in (run / "metrics.jsonl", run / "config.json") if path.is_file()]
    path = rng.choice(texts or [_file(rng, run)])
    lines = path.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    what = rng.choice(("taken out", "twice", "replaced"))
    lines[at : at + 1] = {"taken out": [], "twice": [lines[at]] * 2, "replaced": [rng.choice(GARBAGE)]}[what]
    path.write_bytes(b"\n".join(lines))
    return f"{_shown(run, path)} line {at + 1} {what}"


def _as_folder(rng: random.Random, run: Path) -> str:
    path = _file(rng, run)
    path.unlink()
    path.mkdir()
    return f"{_shown(run, path)} is a folder"


def _stranger(rng: random.Random, run: Path) -> str:
    path = rng.choice([run, *_paths(run, Path.is_dir)]) / rng.choice(STRANGERS)
    if path.exists():
        return "nothing"
    if rng.random() < 0.5:
        path.write_bytes(rng.choice(GARBAGE))
    else:
        path.mkdir()
    return f"{_shown(run, path)} added, a {'folder' if path.is_dir() else 'file'}"


def _renamed(rng: random.Random, run: Path) -> str:
    steps = [path for path in _paths(run, Path.is_dir) if path.name.isdecimal()]
    if not steps:
        return "nothing"
    path = rng.choice(steps)
    other = path.with_name(rng.choice(("0004", "40", "3", "1", "04", "5")))
    if other.exists():
        return "nothing"
    do: Callable[[Path, Path], Any] = rng.choice((shutil.copytree, shutil.move))
    do(path, other)
    return f"{do.__name__} {_shown(run, path)} {other.name}"


def _loop(rng: random.Random, run: Path) -> str:
    path = rng.choice([run, *_paths(run, Path.is_dir)]) / "loop"
    if path.is_symlink():
        return "nothing"
    path.symlink_to(rng.choice((".", "..", "nowhere")))
    return f"{_shown(run, path)} is a link to {os.readlink(path)}"


DAMAGES = (_delete, _delete, _delete_folder, _cut, _cut, _flip, _flip, _overwrite, _overwrite, _line, _as_folder)
DAMAGES += (_stranger, _stranger, _renamed, _loop)
