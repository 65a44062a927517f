"""`python -m tests.kill --rounds 100`: random interruptions against unbroken runs; see `tests.kill`."""

import argparse
import functools
import os
import sys
import tempfile

from tests import quick

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.update(quick.ENVIRONMENT | os.environ)


def main() -> None:
    """Plays the rounds, and prints counts and faults; exit code 1 where a run came out otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainers", nargs="+", help="in turns; default: all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compiled-") as compiled:
        # The tests set it to nothing: no folder.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or compiled
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        from tests.kill import rounds

        mix = tuple(arguments.trainers or rounds.MIX)
        show = functools.partial(print, flush=True)
        report = rounds.rounds(arguments.rounds, seed=arguments.seed, mix=mix, tell=show)
    for name, count in sorted(report.counts.items()):
        print(f"{name:<24}{count:>5}")
    print(f"{arguments.rounds} rounds, {len(report.faults)} came out otherwise")
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
