"""``audiences fetch --check``: everything that is wrong with an account file, at once."""

from pathlib import Path

from audiences_async import accounts
from audiences_async.cli.exits import DONE, USAGE
from audiences_async.errors import printable


def show(path: Path, *, with_keys: bool) -> int:
    """Print the format of the file, its header and its problems; return the exit code.

    Raises:
        ConfigurationError: The file's name has none of the supported extensions.
    """
    report = accounts.check(path, with_keys=with_keys)
    if report.layout:
        print(f"{printable(str(path), limit=1000)}: {report.layout}")
    for problem in report.described:
        print(problem)
    more = report.problems - len(report.described)
    if more:
        print(f"… and {more:,} more problems")
    for note in report.notes:
        print(f"note: {note}")
    print(f"accounts: {report.accounts:,}, problems: {report.problems:,}")
    return USAGE if report.problems else DONE
