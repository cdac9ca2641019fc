"""Signals that end a command: all of them as Ctrl-C does, so that what is done is kept and said."""

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
    """Let SIGTERM and SIGHUP do what Ctrl-C does, for the length of the block. For the main thread."""
    _received.clear()
    ending = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    # What was ignored when the program started stays ignored: so `nohup` works.
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


def exit_code() -> int:
    """Return the exit code of a command that was interrupted: 128 and the number of the signal."""
    return SIGNALLED + (_received[-1] if _received else signal.SIGINT)
