"""Compare two files that one benchmark wrote with ``--json``: which figures changed beyond noise.

Run ``python benchmarks/compare.py OLD.json NEW.json``; it needs the standard library only.
Our ratios to the baseline that the file names are compared, in each round: noise changes both sides of a ratio. But a
baseline may be faster in one process than in another, and all ratios higher: in a table with three peers, the median of
their changes is divided out of the new ratios. What remains is beyond noise if the medians differ by more than 3 %, and
the ranges do not overlap. Fewer than three rounds are not judged.

Exits with 1 if a figure of ours is worse beyond noise, with 2 if the files cannot be compared, and with 0 otherwise.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

MIN_CHANGE = 0.03  # of the median ratio
MIN_ROUNDS = MIN_PEERS = 3
OURS = "audiences_async"  # in the name of a case; all cases are ours in a table that has none such


@dataclass(frozen=True)
class Figure:
    """A case of a benchmark: its ratio to the baseline in each round, and the median of what was measured."""

    table: str
    is_ours: bool
    ratios: list[float]
    median: float
    unit: str
    better: str  # less or more

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({min(self.ratios):.3f}-{max(self.ratios):.3f})"


def change(old: Figure, new: Figure) -> float:
    """Return the change of the ratio as a part of the old one; NaN if there is none."""
    return new.ratio / old.ratio - 1 if old.ratio else math.nan


def read(path: Path) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Return what the file says about its run, and its figures but for the baselines themselves."""
    found = json.loads(path.read_text(encoding="utf-8"))
    about = {name: found[name] for name in ("date", "commit", "machine", "interpreter")} | found["versions"]
    values = {(each["table"], each["case"]): each["values"] for each in found["results"]}
    mixed = {each["table"] for each in found["results"] if OURS in each["case"]}
    figures = {}
    for each in found["results"]:
        table, case, baseline = each["table"], each["case"], each["baseline"]
        pairs = zip(each["values"], values[table, baseline], strict=True)
        ratios = [value / base if base else math.nan for value, base in pairs]
        is_ours = OURS in case or table not in mixed
        figure = Figure(table, is_ours, ratios, median(each["values"]), each["unit"], each["better"])
        if case != baseline:
            figures[f"{table}; {case} to {baseline}"] = figure
    return about, figures


def drift(table: str, pairs: Iterable[tuple[Figure, Figure]]) -> float:
    """Return the median change of the peers in a table, 0 if they are too few: what the baseline did."""
    changes = [change(old, new) for old, new in pairs if old.table == table and not old.is_ours]
    return median(changes) if len(changes) >= MIN_PEERS else 0.0


def verdict(old: Figure, new: Figure) -> str:
    if not old.is_ours:
        return "(peer)"
    if not all(map(math.isfinite, [*old.ratios, *new.ratios, change(old, new)])):
        return "no ratio"
    if min(len(old.ratios), len(new.ratios)) < MIN_ROUNDS:
        return "too few rounds"
    overlap = min(old.ratios) <= max(new.ratios) and min(new.ratios) <= max(old.ratios)
    if overlap or abs(change(old, new)) <= MIN_CHANGE:
        return "same"
    return "better" if (new.ratio < old.ratio) == (new.better == "less") else "WORSE"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs=2, type=Path, metavar=("OLD.json", "NEW.json"))
    given = parser.parse_args(arguments)
    runs = []
    for path in given.files:
        try:
            runs.append(read(path))
        except (OSError, KeyError, TypeError, ValueError) as error:
            parser.error(f"{path} is not what a benchmark writes with --json: {error!r}")
    (old, before), (new, after) = runs
    both = [name for name in before if name in after]
    if not both:
        parser.error("no figure is in both files; compare two runs of the same benchmark")
    for name in old | new:
        if old.get(name) != new.get(name):
            print(f"{name}: {old.get(name)} -> {new.get(name)}")
    verdicts = []
    pairs = [(before[name], after[name]) for name in both]
    for name, (was, now) in zip(both, pairs, strict=True):
        rest = 1 + drift(was.table, pairs)
        steady = replace(now, ratios=[ratio / rest for ratio in now.ratios])
        verdicts.append(verdict(was, steady))
        medians = f"{was.median:.4g} -> {now.median:.4g} {now.unit}"
        print(f"{verdicts[-1]:14} {change(was, steady):+7.1%}  {name}: {was} -> {now}; {medians}")
    for name in sorted(before.keys() ^ after.keys()):
        print(f"only in {'OLD' if name in before else 'NEW':14} {name}")
    return int("WORSE" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
