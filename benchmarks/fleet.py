"""Many processes under one limit that they share, in virtual time: how near they come to it, and how fairly.

Run ``python benchmarks/fleet.py [--processes N] [--accounts N] [--rate R] [--seeds N] [--kind KIND]``. The default, 50
processes of 200 accounts each, takes about 10 seconds a row. All processes have a client and random numbers of their
own, and run in one event loop, whose clock jumps.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, whatever is installed
sys.path.append(str(Path(__file__).parent.parent / "tests"))

from fleets import KINDS, Fleet, simulate

COLUMNS = {
    "failed": "accounts that failed",
    "time": "time of the last answer / ideal",
    "requests": "requests for each answer",
    "used": "part of the limit used while all processes ran, from 5 s on",
    "first": "end of the first process / ideal",
    "last": "end of the last process / ideal",
    "min": "smallest share / mean, when the first process ended",
    "max": "greatest share / mean, then",
    "Jain": "Jain's fairness index, then",
    "min½": "smallest share / mean, at half of the ideal time",
    "Jain½": "Jain's fairness index, then",
    "gap": "longest time that a running process had no answer / ideal",
}


def row(run: Fleet) -> list[float]:
    half = run.ideal / 2
    return [
        run.failures.total(),
        run.took,
        run.requests_per_answer,
        run.used,
        run.first / run.ideal,
        run.last / run.ideal,
        *run.extremes(run.first),
        run.fairness(run.first),
        run.extremes(half)[0],
        run.fairness(half),
        run.longest_gap / run.ideal,
    ]


def show(name: str, values: Iterable[float]) -> None:
    print(f"{name:12}" + "".join(f"{value:9.3g}" for value in values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=50)
    parser.add_argument("--accounts", type=int, default=200, help="of each process")
    parser.add_argument("--rate", type=float, default=50.0, help="requests per second of all processes together")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    given = parser.parse_args()
    ideal = given.processes * given.accounts / given.rate
    print(f"{given.processes} processes of {given.accounts} accounts at {given.rate:g} requests/s; ideal {ideal:g} s")
    print(f"{'kind, seed':12}" + "".join(f"{name:>9}" for name in COLUMNS))
    for kind in KINDS if given.kind == "all" else [given.kind]:
        rows = []
        for seed in range(1, given.seeds + 1):
            run = simulate(kind, processes=given.processes, accounts=given.accounts, rate=given.rate, seed=seed)
            rows.append(row(run))
            show(f"{kind} {seed}", rows[-1])
        show(f"{kind} median", map(median, zip(*rows, strict=True)))
    print(*(f"{name}: {meaning}" for name, meaning in COLUMNS.items()), sep="\n")


if __name__ == "__main__":
    main()
