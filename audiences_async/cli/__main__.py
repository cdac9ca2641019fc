"""``python -m audiences_async.cli`` is ``audiences``."""

from audiences_async.cli import main

main()
