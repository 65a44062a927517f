"""Hostile inputs, drawn by a seed: `python -m tests.fuzz --count 1000 --seed 0`.

Each input is used in a process of its own, which is forked from one that has imported everything. Whatever the kind,
the program must end within `runner.LIMIT` seconds of computing, and either with exit code 0 and what was asked for, or
with another code, one line of error, and nothing left behind.

A kind is a module of `tests/fuzz/kinds/` with an object `KIND`:

    class _Configurations:
        name = "configurations"

        def make(self, rng: random.Random, folder: Path) -> Case:
            words = draw(rng)  # and write what they name below `folder`, which is empty
            return Case(shown=" ".join(words), act=lambda: train.main(words), leaves=folder / "run")

        def check(self, outcome: Outcome) -> str:
            return ""  # or what is wrong with a run that ended with exit code 0

    KIND = _Configurations()

`make` runs in the process that all others are forked from: it must not use an array of JAX.
"""
