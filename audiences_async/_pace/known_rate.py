"""A rate that the user knows."""

import math

from audiences_async.policies import RateLimit


class KnownRate:
    """A known rate, kept by the generic cell rate algorithm."""

    __slots__ = ("_interval", "_next_at", "_tolerance", "rate")

    def __init__(self, limit: RateLimit) -> None:
        self.rate: float = limit.rate / limit.per
        """Requests per second."""
        self._interval = limit.per / limit.rate
        self._tolerance = (limit.burst - 1) * self._interval
        self._next_at = -math.inf

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go."""
        return self._next_at - now

    def backlog(self, now: float, ahead: int) -> float:
        """Estimate the seconds until the turn of a request behind *ahead* others."""
        return max(0.0, self.delay(now) + ahead * self._interval)

    def sent(self, now: float) -> None:
        """Note that a request goes now."""
        earliest = now - self._tolerance
        if self._next_at < earliest:  # noqa: PLR1730 - max() would be a sixth of an uncontended turn
            self._next_at = earliest
        self._next_at += self._interval

    def is_idle(self, now: float) -> bool:
        """Return whether forgetting it would make no difference."""
        return self._next_at + self._tolerance <= now
