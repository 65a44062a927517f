"""Words behind `python -m experiments.train`, or another program: refused in one line, or done."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from experiments import chat, evaluate, train
from experiments.quiet_star import train as quiet_star
from experiments.rlan import train as rlan
from experiments.studies import ablate, stream
from lensjax._settings import replace
from lensjax.runs.config import Config
from lensjax.runs.store import config_file
from tests.fuzz.kinds.configurations import drawn, fields, numbers
from tests.fuzz.runner import Case, Outcome
from tests.runs import TINY, cheap_programs

WORDS = (
    *("0", "1", "-1", "2", "5", "31", "5.5", "1e308", "1e-46", "nan", "inf", "-inf", "", " ", "true", "False", "None"),
    *(
        "3000000000",
        "9" * 400,
        "0x10",
        "1_0",
        "\u0661",
        "lens",
        "base lens",
        "recall",
        "text",
        "~nosuchuser/x",
        "/dev/null",
    ),
    *(
        "../x",
        ".",
        "/",
        "é☃",
        "\udce9",
        "-",
        "--",
        "a b",
        "runs/[1]",
        "x" * 300,
        "*",
        "preset.json",
        "missing.py",
        "bad.py",
    ),
)
PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "evaluate": evaluate.main,
    "chat": chat.main,
    "rlan.train": rlan.main,
    "quiet_star.train": quiet_star.main,
    "studies.ablate": ablate.main,
    "studies.stream": stream.main,
}
"""Others than `train`; no command line drawn here is a whole one of theirs."""
TOP = ("--output-dir", "--seed", "--steps", "--resume", "--base-run", "--start-from", "--name", "--budgets", "--tokens")


class _CommandLines:
    name = "command_lines"

    def make(self, rng: random.Random, folder: Path) -> Case:
        (folder / "preset.json").write_text(config_file.to_json(replace(TINY, output_dir=str(folder / "run"))))
        (folder / "bad.py").write_text("import lensjax as lx\nCONFIG = lx.Config(steps=-1)\n")
        flags = {f"--{name.replace('_', '-')}": value for name, value in fields(TINY).items()}
        words = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            flag = rng.choice(TOP if rng.random() < 0.2 else list(flags))
            value = str(drawn(flag, flags.get(flag), rng)) if rng.random() < 0.5 else rng.choice(WORDS)
            words += [f"{flag}={value}"] if rng.random() < 0.3 else [flag] if rng.random() < 0.05 else [flag, value]
        if rng.random() < 0.15:
            program = rng.choice(list(PROGRAMS))
            start = [rng.choice(WORDS)] if rng.random() < 0.5 else []
            words = [*start, *words, "--no-such-flag"] if "train" in program else [*start, *words]
            act = PROGRAMS[program]
        else:
            program, act = "train", train.main
            preset = str(folder / "preset.json")
            words = [preset, *words] if rng.random() < 0.9 else [*words, preset]
        return Case(f"{program} {words!r}"[:400], lambda: _run(act, words), leaves=folder, expects=(program, words))

    def check(self, outcome: Outcome) -> str:
        program, words = outcome.case.expects
        if "--help" in words or program != "train":
            return ""
        configs = list(outcome.folder.rglob("config.json"))
        if not configs and any(word.startswith("--output-dir") for word in words):
            return ""  # somewhere else
        if len(configs) != 1:
            return f"{len(configs)} run folders"
        stored = config_file.load(configs[0], Config)
        if "--resume" not in words and numbers(stored) != numbers(train.parse(words)[0]):
            return "config.json is not what was asked for"
        summary = configs[0].with_name("summary.json")
        return "" if json.loads(summary.read_text()) else "no summary"


def _run(act: Callable[[list[str]], object], words: list[str]) -> None:
    sys.dont_write_bytecode = True  # of presets
    with cheap_programs():
        act(words)


KIND = _CommandLines()
