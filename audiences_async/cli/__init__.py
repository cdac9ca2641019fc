"""The command line ``audiences``, of the extra ``cli``."""

import sys

from audiences_async.cli.exits import INTERRUPTED, USAGE


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from audiences_async.cli.app import run  # noqa: PLC0415 - of an optional extra
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in {"cyclopts", "rich"}:
            raise
        sys.stderr.write("error: the command line needs an extra\nhint: pip install 'audiences_async[cli]'\n")
        sys.exit(USAGE)
    sys.exit(run())
