"""The rate of requests that a limit allows: known, or kept elsewhere."""

import math
from typing import Protocol, runtime_checkable

from attrs import field, frozen

from audiences_async import checks


@frozen
class RateLimit:
    """A rate that is known, for each account: at most ``burst + rate / per * t`` requests in any *t* seconds.

    Attributes:
        rate: Requests in *per* seconds; above 0.
        per: Seconds; above 0.
        burst: Requests that may go at once after a pause; 1 means evenly spaced.

    Raises:
        ConfigurationError: A number out of its range.
    """

    rate: float = field(validator=checks.is_positive)
    per: float = field(default=1.0, validator=checks.is_positive)
    burst: int = field(default=1, validator=checks.is_count)


@runtime_checkable
class Limiter(Protocol):
    """Any object that says when an account may send, such as a limit that several processes share."""

    async def acquire(self, account_name: str) -> object:
        """Return when the account may send one request. Called before every attempt, retries included."""


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
