"""Rate limits for the sandbox: frozen descriptions, and meters that keep what has been used of them."""

import math
from collections import deque
from typing import Final, Protocol, runtime_checkable

from attrs import define, field, frozen

from audiences_async._base import checks

_ROUNDING: Final = 1e-6  # seconds or requests: differences of floats are not exact


@frozen
class Quota:
    """The remaining quota of a limit at one moment.

    Attributes:
        remaining: Requests that would be granted now.
        reset: Seconds until *remaining* grows; ``None`` if the quota is unused, or if time does not bring it back.
    """

    remaining: int
    reset: float | None


class Meter(Protocol):
    """The state of one limit.

    The sandbox grants a request if one remains in `quota`. It then calls `take`, and `release` when the request ends.
    All calls come from one thread; *now* is in seconds, on a clock that never goes back.
    """

    def quota(self, now: float) -> Quota:
        """Return the quota that remains at *now*."""
        ...

    def take(self, now: float) -> None:
        """Count a request that is granted at *now*."""
        ...

    def release(self) -> None:
        """End a granted request, which was answered or whose client has left."""
        ...


@runtime_checkable
class Limit(Protocol):
    """The description of a limit; a class of your own needs these two members.

    A description holds no state: each account that uses it gets a new meter. The same `FixedWindow` given to two
    accounts therefore grants its full quota to both. A limit is shared only through `Sandbox.set_shared_limit`, or by a
    class of your own that returns one and the same meter.
    """

    @property
    def policy(self) -> str:
        """The parameters of the ``RateLimit-Policy`` header, such as ``q=100;w=60``."""
        ...

    def meter(self) -> Meter:
        """Return a meter with the full quota."""
        ...


@frozen
class _Window:
    limit: int = field(validator=checks.is_count)
    per: float = field(validator=checks.is_positive)

    @property
    def policy(self) -> str:
        """The parameters of the ``RateLimit-Policy`` header."""
        return _policy(self.limit, self.per)


@frozen
class FixedWindow(_Window):
    """At most *limit* requests in each window.

    A window opens with the first request after the previous window has ended.

    Attributes:
        limit: Requests per window.
        per: Length of a window, in seconds.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def meter(self) -> Meter:
        """Return a meter with the full quota."""
        return _FixedWindowMeter(self.limit, self.per)


@frozen
class SlidingWindow(_Window):
    """At most *limit* requests in any *per* seconds.

    Attributes:
        limit: Requests per window.
        per: Length of the window, in seconds.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def meter(self) -> Meter:
        """Return a meter with the full quota."""
        return _SlidingWindowMeter(self.limit, self.per)


@frozen
class TokenBucket:
    """A bucket that is full at first: a request takes one token, and *rate* tokens a second come back.

    Attributes:
        rate: Tokens per second.
        capacity: Tokens in a full bucket: the requests that are granted at once after a pause.

    Raises:
        ConfigurationError: A number is out of range.
    """

    rate: float = field(validator=checks.is_positive)
    capacity: int = field(validator=checks.is_count)

    @property
    def policy(self) -> str:
        """The parameters of the ``RateLimit-Policy`` header."""
        return _policy(self.capacity, self.capacity / self.rate)

    def meter(self) -> Meter:
        """Return a meter with the full quota."""
        return _BucketMeter(self.rate, self.capacity)


@frozen
class LeakyBucket:
    """The limit of nginx's ``limit_req`` with ``nodelay``; the same as ``TokenBucket(rate, burst + 1)``.

    Attributes:
        rate: Requests per second.
        burst: Requests above the rate that are granted at once; 0 means that requests must be evenly spaced.

    Raises:
        ConfigurationError: A number is out of range.
    """

    rate: float = field(validator=checks.is_positive)
    burst: int = field(default=0, validator=checks.is_count_or_zero)

    @property
    def policy(self) -> str:
        """The parameters of the ``RateLimit-Policy`` header."""
        return self._bucket.policy

    def meter(self) -> Meter:
        """Return a meter with the full quota."""
        return self._bucket.meter()

    @property
    def _bucket(self) -> TokenBucket:
        return TokenBucket(self.rate, self.burst + 1)


@frozen
class ConnectionLimit:
    """At most *limit* requests under way at the same time, as nginx's ``limit_conn``.

    A request is under way from its arrival until its answer or until its client leaves. ``Answer(delay=...)`` and
    ``Answer(failure="hang")`` keep it under way.

    Attributes:
        limit: Requests.

    Raises:
        ConfigurationError: The number is out of range.
    """

    limit: int = field(validator=checks.is_count)

    @property
    def policy(self) -> str:
        """The parameters of the ``RateLimit-Policy`` header."""
        return f'q={self.limit};qu="concurrent-requests"'

    def meter(self) -> Meter:
        """Return a meter with the full quota."""
        return _ConnectionMeter(self.limit)


def _policy(quota: int, window: float) -> str:
    return f"q={quota};w={math.ceil(window)}"


class _TimeMeter(Meter):
    """A meter whose quota comes back with time alone."""

    def release(self) -> None:
        """Do nothing."""


@define
class _FixedWindowMeter(_TimeMeter):
    _limit: int
    _per: float
    _used: int = 0
    _ends_at: float = -math.inf

    def quota(self, now: float) -> Quota:
        if self._has_ended(now):
            return Quota(self._limit, None)
        return Quota(self._limit - self._used, self._ends_at - now)

    def take(self, now: float) -> None:
        if self._has_ended(now):
            self._used, self._ends_at = 0, now + self._per
        self._used += 1

    def _has_ended(self, now: float) -> bool:
        return self._ends_at <= now + _ROUNDING


@define
class _SlidingWindowMeter(_TimeMeter):
    _limit: int
    _per: float
    _leaves_at: deque[float] = field(init=False, factory=deque[float])  # when each grant leaves the window

    def quota(self, now: float) -> Quota:
        while self._leaves_at and self._leaves_at[0] <= now + _ROUNDING:
            self._leaves_at.popleft()
        return Quota(self._limit - len(self._leaves_at), self._leaves_at[0] - now if self._leaves_at else None)

    def take(self, now: float) -> None:
        self._leaves_at.append(now + self._per)


@define
class _BucketMeter(_TimeMeter):
    _rate: float
    _capacity: int
    _missing: float = 0.0  # tokens, at the time below
    _at: float = -math.inf

    def quota(self, now: float) -> Quota:
        missing = self._missing_at(now)
        remaining = int(self._capacity - missing + _ROUNDING)
        if remaining == self._capacity:
            return Quota(remaining, None)
        return Quota(remaining, (missing - (self._capacity - remaining - 1)) / self._rate)

    def take(self, now: float) -> None:
        self._missing, self._at = self._missing_at(now) + 1, now

    def _missing_at(self, now: float) -> float:
        return max(0.0, self._missing - (now - self._at) * self._rate)


@define
class _ConnectionMeter(Meter):
    _limit: int
    _under_way: int = 0

    def quota(self, now: float) -> Quota:
        return Quota(self._limit - self._under_way, None)

    def take(self, now: float) -> None:
        self._under_way += 1

    def release(self) -> None:
        self._under_way -= 1
