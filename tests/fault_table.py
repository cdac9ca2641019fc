"""Print a table of all faults and their results at the end of the test session.

This is a pytest plugin, and is off by default. To print the table, run the faults in one process:

    PYTHONPATH=tests pytest -p fault_table tests/test_faults.py

Each row has a fault of the catalogue in `faults`, its outcome, the number of requests and the seconds. `test_faults`
adds a `Row` for each fault to `ROWS`. Faults of one family share a row, with the highest figures; ``-v`` lists each
of them.
"""

from itertools import groupby
from typing import Final

import pytest
from attrs import frozen


@frozen
class Row:
    """One fault and its result."""

    fault: str
    outcome: str
    requests: int
    seconds: float
    family: str = ""


ROWS: Final = pytest.StashKey[list[Row]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table; a family of faults is one line, unless -v lists each."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("faults: outcome, requests, seconds")
    lines = [line for row in rows for line in [row]] if config.get_verbosity() > 0 else _by_family(rows)
    width = max(len(row.fault) for row in lines)
    outcome_width = max(len(row.outcome) for row in lines)
    for row in lines:
        terminalreporter.write_line(
            f"{row.fault:{width}}  {row.outcome:{outcome_width}}  {row.requests:8}  {row.seconds:7.3f}"
        )


def _by_family(rows: list[Row]) -> list[Row]:
    lines: list[Row] = []
    for family, members in groupby(sorted(rows, key=lambda row: row.family), key=lambda row: row.family):
        alike = list(members)
        if not family:
            lines += alike
            continue
        outcomes = sorted({row.outcome.split(" $")[0] for row in alike})
        requests, longest = max(row.requests for row in alike), max(row.seconds for row in alike)
        shown = outcomes[0] if len(outcomes) == 1 else f"{len(outcomes)} outcomes"
        lines.append(Row(f"{family} ({len(alike)} faults, the most)", shown, requests, longest))
    return lines
