"""What an account may send per second: known, learned, or kept elsewhere.

The service throttles with 429 and publishes neither its rate nor ``Retry-After``: https://api.commbox.io/
(GET /audiences). So the rate is learned: a slow start finds where the 429s begin, and what was granted from one 429 to
a later one tells what the service grants.
"""

import math
from typing import Final

from attrs import field, frozen

from audiences_async import checks

_FIRST_WINDOW: Final = 2.0
_WINDOW_STEP: Final = 0.5  # for each answer, so half as many again in a round trip
_ENOUGH: Final = 50  # answers after which a new measurement begins
_MIN_GROWTH: Final = 0.001  # of the learned rate, for each answer
_MAX_GROWTH: Final = 0.25
_CAREFUL_GROWTH: Final = 0.0002  # where each refusal costs a pause
_LONG: Final = 500  # answers there, after which the rate may grow faster
_SHORT: Final = 20  # answers between two refusals: the rate is far too high
_MIN_RATE: Final = 0.01  # requests per second


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


class KnownRate:
    """A known rate by the generic cell rate algorithm: all it keeps is when the next request is due."""

    __slots__ = ("_interval", "_next_at", "_tolerance", "rate")

    def __init__(self, limit: RateLimit | None) -> None:
        """Keep to *limit*; ``None`` if a `Limiter` keeps the rate, and everything may go at once here."""
        self.rate: float | None = None if limit is None else limit.rate / limit.per
        self._interval = 0.0 if limit is None else limit.per / limit.rate
        self._tolerance = 0.0 if limit is None else (limit.burst - 1) * self._interval
        self._next_at = -math.inf

    def delay(self, now: float, in_flight: int) -> float:
        """Seconds until the next request may go; ``inf`` where that waits for a reply."""
        return self._next_at - now

    def backlog(self, now: float, ahead: int) -> float:
        """Seconds until a request may go that has so many others before it."""
        return max(0.0, self.delay(now, 0) + ahead * self._interval)

    def sent(self, now: float) -> None:
        """A request goes."""
        earliest = now - self._tolerance
        if self._next_at < earliest:  # noqa: PLR1730 - max() would be a sixth of an uncontended turn
            self._next_at = earliest
        self._next_at += self._interval

    def is_idle(self, now: float) -> bool:
        """Whether forgetting it would make no difference."""
        return self._next_at + self._tolerance <= now


class LearnedRate:
    """A rate that is found out: a window of requests in flight until there are 429s, then a rate.

    Every 429 finds the service's store of requests empty. So what was granted from one 429 to a later one, by the time
    between them, is the rate at which the store is filled. That rate is used from a little below and grows until the
    next 429, the faster the fewer answers it was measured by.
    """

    __slots__ = (
        "_enough",
        "_excused",
        "_granted",
        "_growth",
        "_held",
        "_next_at",
        "_since",
        "_since_cut",
        "_window",
        "rate",
    )

    def __init__(self, window: float | None = _FIRST_WINDOW) -> None:
        """Begin with so many requests in flight; ``None`` if somebody else bounds them."""
        self.rate: float | None = None
        self._window = math.inf if window is None else window
        self._next_at = -math.inf
        self._since: float | None = None  # when the measurement began: at a 429
        self._granted = 0  # answers since then
        self._since_cut = 0  # answers since the rate was last cut
        self._growth = _MAX_GROWTH
        self._enough = _ENOUGH
        self._excused = 0.0  # s of pauses that were asked for, since the measurement began
        self._held = True  # whether requests go as fast as the pace lets them

    def delay(self, now: float, in_flight: int) -> float:
        """Seconds until the next request may go; ``inf`` where that waits for a reply."""
        if self.rate is None:
            return 0.0 if in_flight + 1 <= self._window else math.inf
        return self._next_at - now

    def backlog(self, now: float, ahead: int) -> float:
        """Seconds until a request may go that has so many others before it, if the rate grows with each of them."""
        if self.rate is None:
            return 0.0
        shrink = 1 / (1 + self._growth)  # of the time between two requests
        return max(0.0, self._next_at - now) + (1 - shrink**ahead) / (1 - shrink) / self.rate

    def sent(self, now: float) -> None:
        """A request goes."""
        if self.rate is None:
            return
        interval = 1 / self.rate
        self._held = now - self._next_at <= 2 * interval
        if not self._held:
            self.idle()
        # A turn that came late does not make the next one late.
        self._next_at = max(self._next_at, now - interval) + interval

    def answered(self) -> None:
        """One more was granted."""
        self._granted += 1
        if self.rate is None:
            self._window += _WINDOW_STEP
            return
        if not self._held:
            return  # the callers are slower than the pace: that it is kept tells nothing
        self._since_cut += 1
        if self._since_cut % self._enough == 0:
            self._growth = min(_MAX_GROWTH, 2 * self._growth)  # no 429 for long: the service may grant more than it did
        self.rate *= 1 + self._growth

    def throttled(self, now: float, *, asked: bool = False) -> bool:
        """Learn from a refusal; ``True`` if there is a new rate.

        Args:
            now: The time.
            asked: Whether it names a pause, so that refusals cost far more than a little of the rate.
        """
        self._window = max(1.0, self._window / 2)
        if asked and self.rate is not None and self._held:
            self.rate = max(_MIN_RATE, self.rate * (0.5 if self._since_cut < _SHORT else 0.92))
            self._growth, self._since_cut, self._enough = _CAREFUL_GROWTH, 0, _LONG
            self._since, self._granted, self._excused = now, 0, 0.0
            return True
        if self._since is None:
            if self.rate is not None:
                self.rate *= 0.8
                self._growth, self._since_cut = _MIN_GROWTH, 0
            self._since, self._granted, self._excused = now, 0, 0.0
        if not self._granted or now <= self._since:
            return False
        # What the service would have granted while nothing was sent may be lost, so the measure is a lower bound. The
        # rate that was too high is an upper one.
        measured = self._granted / (now - self._since)
        if asked and self.rate is None:
            # Most of it was a burst after a pause. With the pause counted it is too low a measure, without it too high.
            measured = math.sqrt(measured * self._granted / (now - self._since + self._excused))
        old = self.rate or 0.0
        self.rate = max(
            _MIN_RATE,
            0.25 * old,
            min(0.9 * old, 1.2 * measured),
            measured * (1 - 0.5 / (self._granted + 1)),
        )
        self._growth = min(_MAX_GROWTH, max(_MIN_GROWTH, 2 / self._granted**2))
        self._since_cut = 0
        if self._granted >= _ENOUGH:
            self._since, self._granted, self._excused = now, 0, 0.0
        return True

    def idle(self) -> None:
        """Nothing was held back for a while: grants from now on do not belong to the measurement."""
        self._since = None

    def restart(self, now: float) -> None:
        """Measure from here on."""
        self._since, self._granted, self._excused = now, 0, 0.0

    def excuse(self, seconds: float) -> None:
        """Leave a pause that the service asked for out of the measurement."""
        if self._since is not None:
            self._since += seconds
            self._excused += seconds

    def paused_until(self, when: float) -> None:
        """What comes after a pause is paced from its end."""
        self._next_at = max(self._next_at, when)

    def is_idle(self, now: float) -> bool:
        """Whether forgetting it would make little difference."""
        return self.rate is None and self._since is None
