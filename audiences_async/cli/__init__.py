"""The command line ``audiences``; needs the extra ``cli``."""

import sys

from audiences_async.cli.exits import USAGE
from audiences_async.cli.signals import ending_as_ctrl_c, interrupted_code
from audiences_async.cli.streams import replace_closed


def main() -> None:
    """Run the command line and exit with its code."""
    replace_closed()
    try:
        from audiences_async.cli.app import run  # noqa: PLC0415 - of an optional extra
    except KeyboardInterrupt:
        sys.exit(interrupted_code())
    except ModuleNotFoundError as error:
        if error.name not in {"cyclopts", "filelock", "rich"}:
            raise
        sys.stderr.write("error: the command line needs the extra 'cli'\nhint: pip install 'audiences_async[cli]'\n")
        sys.exit(USAGE)
    with ending_as_ctrl_c():
        code = run()
    sys.exit(code)
