"""Rate limits that `faulty.py` enforces; the standard library only.

Each limit has a meter, which grants or refuses each request, and an ideal: the seconds from the first request to the
last answer for a client that knows the limit, sends each request as soon as it is granted, and is never refused. The
network adds nothing to it.
"""

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Meter = Callable[[float], bool]  # whether a request at this time, in seconds, is granted


class Limit(Protocol):
    """A rate limit."""

    def meter(self) -> Meter:
        """Return a meter that has seen no request yet."""

    def ideal(self, calls: int) -> float:
        """Return the shortest time, in seconds, in which *calls* requests are granted."""


@dataclass(frozen=True)
class TokenBucket:
    """Grants *capacity* requests at once, and *rate* requests/s after them.

    nginx's ``limit_req rate=RATE burst=BURST nodelay``, a leaky bucket, grants the same as a capacity of ``BURST + 1``.
    """

    rate: float
    capacity: int

    def meter(self) -> Meter:
        tokens, last = float(self.capacity), -math.inf

        def grants(now: float) -> bool:
            nonlocal tokens, last
            tokens, last = min(float(self.capacity), tokens + self.rate * (now - last)), now
            if tokens < 1:
                return False
            tokens -= 1
            return True

        return grants

    def ideal(self, calls: int) -> float:
        """Return the time that fills the tokens beyond the capacity: the bucket is full at the first request."""
        return max(0, calls - self.capacity) / self.rate


@dataclass(frozen=True)
class FixedWindow:
    """Grants *limit* requests in each of consecutive windows of *seconds*.

    Attributes:
        limit: Requests.
        seconds: Length of a window.
        elapsed: Seconds of the first window that have passed before the first request: the alignment, which a client
            does not know.
    """

    limit: int
    seconds: float
    elapsed: float = 0.0

    def meter(self) -> Meter:
        begun: float | None = None
        granted: Counter[int] = Counter()

        def grants(now: float) -> bool:
            nonlocal begun
            if begun is None:
                begun = now - self.elapsed
            window = int((now - begun) / self.seconds)
            granted[window] += 1
            return granted[window] <= self.limit

        return grants

    def ideal(self, calls: int) -> float:
        """Return the time until the last window begins that is needed; the first one is partly over."""
        windows = math.ceil(calls / self.limit)
        return max(0.0, (windows - 1) * self.seconds - self.elapsed)


@dataclass(frozen=True)
class SlidingWindow:
    """Grants *limit* requests in any *seconds*; refused requests do not count."""

    limit: int
    seconds: float

    def meter(self) -> Meter:
        granted: deque[float] = deque()

        def grants(now: float) -> bool:
            while granted and granted[0] <= now - self.seconds:
                granted.popleft()
            if len(granted) >= self.limit:
                return False
            granted.append(now)
            return True

        return grants

    def ideal(self, calls: int) -> float:
        """Return the time until the last batch: *limit* requests go at once, and again after each *seconds*."""
        return (math.ceil(calls / self.limit) - 1) * self.seconds


LIMITS: dict[str, type[TokenBucket | FixedWindow | SlidingWindow]] = {
    kind.__name__: kind for kind in (TokenBucket, FixedWindow, SlidingWindow)
}
