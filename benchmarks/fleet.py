"""Many processes under one limit that they share, in virtual time: how near they come to it, and how fairly.

Run ``python benchmarks/fleet.py [--processes N] [--accounts N] [--rate R] [--seeds N] [--kind KIND] [--json FILE]``.
The default, 50 processes of 200 accounts each, takes about 10 seconds a row. All processes have a client and random
numbers of their own, and run in one event loop, whose clock jumps.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, whatever is installed
sys.path.append(str(Path(__file__).parent.parent / "tests"))

from common import Better, parser, save, table
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

IDEALLY_ZERO = ("failed", "gap")  # the ideal of all others is 1
MORE_IS_BETTER = ("used", "min", "Jain", "min½", "Jain½")


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


def figures(what: str, rows: list[list[float]]) -> Iterator[dict[str, Any]]:
    """Yield the columns of one kind beside their ideal, for `save`; a round is a seed."""
    for (name, meaning), values in zip(COLUMNS.items(), zip(*rows, strict=True), strict=True):
        if name not in IDEALLY_ZERO:
            better: Better = "more" if name in MORE_IS_BETTER else "less"
            beside = {"ideal": [1.0] * len(rows), "audiences_async": list(values)}
            yield from table(f"{name}, {meaning}; {what}", "ideal", beside, "", better=better)


def show(name: str, values: Iterable[float]) -> None:
    print(f"{name:12}" + "".join(f"{value:9.3g}" for value in values), flush=True)


def main() -> None:
    command = parser(__doc__.partition("\n")[0])
    command.add_argument("--processes", type=int, default=50)
    command.add_argument("--accounts", type=int, default=200, help="of each process")
    command.add_argument("--rate", type=float, default=50.0, help="requests per second of all processes together")
    command.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    command.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    given = command.parse_args()
    ideal = given.processes * given.accounts / given.rate
    size = f"{given.processes} processes of {given.accounts} accounts at {given.rate:g} requests/s"
    records: list[dict[str, Any]] = []
    print(f"{size}; ideal {ideal:g} s")
    print(f"{'kind, seed':12}" + "".join(f"{name:>9}" for name in COLUMNS))
    for kind in KINDS if given.kind == "all" else [given.kind]:
        rows = []
        for seed in range(1, given.seeds + 1):
            run = simulate(kind, processes=given.processes, accounts=given.accounts, rate=given.rate, seed=seed)
            rows.append(row(run))
            show(f"{kind} {seed}", rows[-1])
        show(f"{kind} median", map(median, zip(*rows, strict=True)))
        records += figures(f"{kind}, {size}", rows)
    print(*(f"{name}: {meaning}" for name, meaning in COLUMNS.items()), sep="\n")
    save(given.json, records)


if __name__ == "__main__":
    main()
