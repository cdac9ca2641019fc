"""Time and chance, in one value, so that a test can step the one and script the other."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from attrs import field, frozen


@frozen
class Clock:
    """Where the client reads the time, sleeps between attempts and draws jitter. The defaults are the real ones.

    Attributes:
        monotonic: Seconds that never go back.
        wall: Seconds since 1970 in UTC; only for a ``Retry-After`` date in a reply without a ``Date``.
        sleep: Waits so many seconds.
        random: Draws from [0, 1).
    """

    monotonic: Callable[[], float] = field(default=time.monotonic)
    wall: Callable[[], float] = field(default=time.time)
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep)
    random: Callable[[], float] = field(default=random.random)
