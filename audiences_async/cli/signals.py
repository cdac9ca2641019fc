"""Treat every terminating signal like Ctrl-C, so that finished work is kept and reported."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from audiences_async.cli.exits import SIGNALLED

_ENDING: Final = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_received: list[int] = []


@contextmanager
def ending_as_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C inside the block. Main thread only."""
    _received.clear()
    ending = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    # A signal that was ignored at start-up stays ignored, so that `nohup` works.
    before = {number: signal.getsignal(number) for number in ending if signal.getsignal(number) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    _received.append(number)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)  # asyncio cancels its main task on it


def interrupted_code() -> int:
    """Return the exit code of an interrupted command: 128 plus the signal number."""
    return SIGNALLED + (_received[-1] if _received else signal.SIGINT)
