"""`python -m tests.fuzz --count 1000 --seed 0`: hostile inputs of all kinds; see `tests.fuzz`."""

import argparse
import functools
import os
import sys

from tests import quick

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.update(quick.ENVIRONMENT | os.environ)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from tests.fuzz import runner  # the environment is read by the import


def main() -> None:
    """Runs the inputs, and prints counts and faults; exit code 1 where there is a fault."""
    known = {kind.name: kind for kind in runner.all_kinds()}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="inputs in all, shared among the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--kinds", nargs="+", choices=known, default=list(known))
    parser.add_argument("--only", metavar="KIND:NUMBER", help="this input alone")
    arguments = parser.parse_args()
    if arguments.only:
        name, _, number = arguments.only.partition(":")
        chosen, numbers = [known[name]], [int(number)]
    else:
        chosen = [known[name] for name in arguments.kinds]
        numbers = range(-(-arguments.count // len(chosen)))
    report = runner.fuzz(
        chosen, numbers, seed=arguments.seed, jobs=arguments.jobs, tell=functools.partial(print, flush=True)
    )
    for name, counts in report.counts.items():
        print(f"{name:<16}" + "  ".join(f"{key} {counts[key]:>4}" for key in ("accepted", "refused", "wrong")))
    print(f"{sum(map(sum, (counts.values() for counts in report.counts.values())))} inputs, {len(report.faults)} wrong")
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
