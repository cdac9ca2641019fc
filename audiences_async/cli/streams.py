"""Replace closed standard streams."""

import os
import sys


def replace_closed() -> None:
    """Open the null device for closed standard streams, so that no other file gets their descriptors.

    It is opened for reading, so that writing to a closed stdout still fails. Text written to a closed stderr is lost.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
