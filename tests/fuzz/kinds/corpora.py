"""Folders of text with hostile names, links, copies and strangers: what is held out stays out, nothing is lost."""

import json
import os
import random
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.process import errors_end
from lensjax._settings import replace
from lensjax.runs.config import Config
from lensjax.runs.data import batches, corpus
from lensjax.runs.data.splits import SPLITS
from lensjax.runs.data.task import DataConfig
from lensjax.runs.store import config_file
from tests.corpora import text_config
from tests.fuzz.runner import Case, Outcome
from tests.runs import TINY, cheap_programs, start

OWN = b"This was written by a run, and is no text.\n" * 20
NAMES = (
    *(
        "a.txt",
        "B.TXT",
        "ünï.txt",
        "日本.txt",
        "a b.txt",
        "[x].txt",
        "*.txt",
        "?.md",
        "-rf.txt",
        "~",
        "$HOME",
        "a\nb.txt",
    ),
    *("\udcff\udcfe.txt", "x" * 250 + ".txt", ".hidden.txt", "%d.txt", "a\\b.txt", "e\u0301.txt", "train", "test"),
)
FOLDERS = ("", "", "sub", "sub/deep", "[2024]", "ä", "train", "test/x", "validation", ".git", "a*b")
TOO_SMALL = ("windows of 32 tokens, and", "one window takes 32", "no file with text in it under")


@dataclass(frozen=True)
class Drawn:
    """What a corpus is made of, as far as the outcome depends on it."""

    path: str
    split_by: str
    groups: list[list[Path]]
    """Files that are nearly the same."""
    refusals: tuple[str, ...]
    """Parts of messages that it may end with."""
    whole_run: bool


class _Corpora:
    name = "corpora"

    def make(self, rng: random.Random, folder: Path) -> Case:
        root = folder / "corpus"
        root.mkdir()
        split_by = rng.choice(("file", "file", "folder"))
        groups = [_write_group(rng, root, _folders(rng, split_by)) for _ in range(rng.choice((2, 40, 60)))]
        refusals = list(TOO_SMALL)
        for stranger in rng.choices(STRANGERS, k=rng.choice((0, 0, 1, 2))):
            refusals += stranger(rng, root)
        path, more = _draw_path(rng, folder, root)
        refusals += [*more, *(["the same text, or nearly"] if split_by == "folder" else [])]
        drawn = Drawn(path, split_by, groups, tuple(refusals), rng.random() < 0.1)
        shown = (
            f"data.path {path!r}, split_by {split_by}, of {sorted(str(one.relative_to(folder)) for one in _all(root))}"
        )
        return Case(shown[:1000], lambda: _use(drawn, root), leaves=root / "runs", expects=drawn)

    def check(self, outcome: Outcome) -> str:
        read = {split: [outcome.folder / name for name in names] for split, names in json.loads(outcome.output).items()}
        drawn, root = outcome.case.expects, outcome.folder / "corpus"
        assert isinstance(drawn, Drawn)
        files = [(split, path) for split in SPLITS for path in read[split]]
        real = {split: {_real(path) for path in read[split]} for split in SPLITS}
        if len(set().union(*real.values())) < len(files):
            return "a real file is read twice"
        if own := [path for _, path in files if OWN in path.read_bytes()]:
            return f"what a run wrote is read as text: {own}"
        for group in drawn.groups:
            held = {split for split in SPLITS if real[split] & {_real(path) for path in group}}
            if len(held) > 1:
                return f"nearly the same text is in {sorted(held)}: {group}"
        if drawn.split_by == "folder" and any(split not in path.parts for split, path in files):
            return "a file is in a split that its folder does not say"
        expected = {_real(path) for path in _all(root)}
        if drawn.path in FORMS_OF_ALL and drawn.split_by == "file" and expected != set().union(*real.values()):
            return "other files are read than there are"
        return ""


def _use(drawn: Drawn, root: Path) -> None:
    """Reads a corpus in all its splits, and says which files that were."""
    os.environ["HOME"] = str(root.parent)
    with errors_end():
        data = DataConfig(task="text", path=drawn.path, split_by=drawn.split_by)  # type: ignore[arg-type]
        config = replace(text_config("x"), data=data)
        try:
            read = _read(config)
        except ValueError as error:
            message = str(error)
            assert any(part in message for part in drawn.refusals), f"refused for no reason: {message}"
            raise
        absolute = os.path.join(root.parent, os.path.expanduser(drawn.path))
        again = replace(config, **{"data.path": absolute})
        assert batches.digest(config) == batches.digest(again), "other data by their absolute path"
        if drawn.whole_run:
            with cheap_programs():
                start(replace(TINY, output_dir=str(root / "runs/a"), data=data))
            after = {split: [str(path) for path in corpus.corpus_files(data, split)] for split in SPLITS}
            assert after == read, "a run in its corpus changes the corpus"
        print(json.dumps(read))


def _read(config: Config) -> dict[str, list[str]]:
    for split in SPLITS:
        if len(corpus.token_row(config, split)) >= config.context.window:
            batch = next(batches.make_iterator(config, split, seed=0, batch_size=1))
            assert batch["tokens"].shape == (1, config.context.window)
    return {split: [str(path) for path in corpus.corpus_files(config.data, split)] for split in SPLITS}


def _folders(rng: random.Random, split_by: str) -> tuple[str, ...]:
    """Where the copies of one text may be: mostly in one split, where folders say what that is."""
    if split_by == "file" or rng.random() < 0.01:
        return FOLDERS
    split = rng.choice(SPLITS)
    return (split, f"{split}/x", f"{split}/[2024]/ä")


def _write_group(rng: random.Random, root: Path, folders: tuple[str, ...]) -> list[Path]:
    """One text, and copies of it or of nearly all of it, under any names."""
    text = rng.choice(TEXTS)(rng)
    paths = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 5))):
        path = root / rng.choice(folders) / rng.choice((*NAMES, *(f"{rng.randrange(1000)}.txt" for _ in NAMES)))
        if any(one.exists() and not one.is_dir() for one in path.parents) or path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        way = rng.choice(("copy", "copy", "nearly", "soft", "hard")) if paths else "copy"
        if way == "soft":
            path.symlink_to(rng.choice((paths[0], os.path.relpath(paths[0], path.parent))))
        elif way == "hard":
            path.hardlink_to(paths[0])
        else:
            path.write_bytes(_nearly(rng, text) if way == "nearly" and len(text) > 600 else text)
        paths.append(path)
    return paths


def _nearly(rng: random.Random, text: bytes) -> bytes:
    place = rng.randrange(len(text))
    return rng.choice(
        (text[:place] + b"X" + text[place:], text.replace(b"\n", b"\r\n"), text + b"\nmore\n", b"\xef\xbb\xbf" + text)
    )


def _prose(rng: random.Random) -> bytes:
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(200)]
    return rng.choice((" ", "\n", "\n\n")).join(words).encode()


TEXTS: tuple[Callable[[random.Random], bytes], ...] = (
    *(_prose, _prose, _prose),
    lambda rng: rng.randbytes(rng.choice((1, 31, 32, 33, 1000))),
    lambda rng: b"",
    lambda rng: bytes([rng.randrange(256)]) * 200,
    lambda rng: "жар ".encode() * 50 + str(rng.random()).encode(),
    lambda rng: str(rng.random()).encode("utf-16") * 10,
)


def _place(rng: random.Random, root: Path) -> Path:
    """A free name in a folder that is there."""
    folder = rng.choice([root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())])
    return folder / f"stranger {rng.randrange(10**6)}.txt"


def _link_round(rng: random.Random, root: Path) -> list[str]:
    for _ in range(rng.choice((1, 2, 3))):
        path = _place(rng, root)
        path.symlink_to(rng.choice((".", "..", str(root), os.path.relpath(root, path.parent))))
    return []


def _link_to_nothing(rng: random.Random, root: Path) -> list[str]:
    path = _place(rng, root)
    path.symlink_to(rng.choice(("gone", path.name, "gone\nline")))
    return ["where nothing is", "symbolic links"]


def _special(rng: random.Random, root: Path) -> list[str]:
    path = _place(rng, root)
    os.mkfifo(path)
    return []


def _socket(rng: random.Random, root: Path) -> list[str]:
    path = _place(rng, root)
    if len(os.fsencode(path)) < 100:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    return []


def _huge(rng: random.Random, root: Path) -> list[str]:
    with _place(rng, root).open("wb") as file:
        file.truncate(2**42)
    return ["of memory: name fewer files"]


def _run_folder(rng: random.Random, root: Path) -> list[str]:
    folder = _place(rng, root)
    (folder / "checkpoints/lens/4").mkdir(parents=True)
    (folder / "config.json").write_text(config_file.to_json(replace(TINY, output_dir=str(folder))))
    for name in ("metrics.jsonl", "checkpoints/lens/4/data.txt"):
        (folder / name).write_bytes(OWN)
    return []


STRANGERS = (_link_round, _link_round, _link_to_nothing, _special, _socket, _huge, _run_folder, _run_folder)
FORMS_OF_ALL = ("corpus", "corpus/", "./corpus", "corpus/../corpus", "~/corpus", "corpus/**", "corpus/**/*", "link")


def _draw_path(rng: random.Random, folder: Path, root: Path) -> tuple[str, list[str]]:
    """What `data.path` says, and how it may be refused for that."""
    (folder / "link").symlink_to("corpus")
    some = rng.choice(_all(root) or [root])
    patterns = (
        "corpus/**/*.txt",
        "corpus/*/*",
        "corpus/*",
        "corpus/[a-z]*",
        "corpus/**/**",
        "corpus/**/sub/**/*",
        "corpus/[[]2024]/*",
    )
    bad = (
        "gone",
        "corpus/gone/*.txt",
        "/dev/zero",
        "/dev/null",
        "~nobody-here/x",
        "a\0b",
        "x" * 300,
        "corpus/*/../*",
        " ",
        "\n",
    )
    path = rng.choice(
        (*FORMS_OF_ALL, *FORMS_OF_ALL, rng.choice(patterns), str(some.relative_to(folder)), rng.choice(bad))
    )
    reasons = ["does not exist", "neither a file nor", "no user's home", "UTF-8", "name too long", "behind a pattern"]
    return path, reasons if path in bad else ([] if path.isascii() else ["UTF-8"])


def _real(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _all(root: Path) -> list[Path]:
    """All that is text below a folder, found in the simplest way."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if not name.startswith(".") and not Path(folder, name, "config.json").exists()
        ]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return [path for path in found if path.exists() and stat.S_ISREG(path.stat().st_mode) and path.stat().st_size]


KIND = _Corpora()
