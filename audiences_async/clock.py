"""Time and randomness in one value, so that tests can control both."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from attrs import field, frozen


@frozen
class Clock:
    """Source of time, sleep and jitter for the client. The defaults are the real ones.

    Attributes:
        monotonic: Returns seconds that never go backwards.
        wall: Returns seconds since 1970 in UTC; used only for a ``Retry-After`` date in a response without a ``Date``.
        sleep: Waits for the given number of seconds.
        random: Draws from [0, 1).
    """

    monotonic: Callable[[], float] = field(default=time.monotonic)
    wall: Callable[[], float] = field(default=time.time)
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep)
    random: Callable[[], float] = field(default=random.random)
