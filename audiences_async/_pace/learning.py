"""The rate of a limit that the service does not publish, learned from its refusals.

The service throttles with 429 and publishes neither its rate nor ``Retry-After``: https://api.commbox.io/
(GET /audiences). A slow start grows until the first refusals. The rate is then measured as the grants from one refusal
to a later one, divided by the time between them.
"""

import math
from collections import deque
from typing import Final

_FIRST_WINDOW: Final = 2.0  # requests in flight
_WINDOW_STEP: Final = 0.25  # for each answer, so a quarter more in a round trip
_LONG_TRIP: Final = 0.08  # s; a slow start costs more time than requests then
_LONG_STEP: Final = 0.5

_ENOUGH: Final = 50  # answers for a measurement, or for faster growth
_MIN_GROWTH: Final = 0.001  # of the rate, for each answer
_MAX_GROWTH: Final = 0.25
_SURE_GROWTH: Final = 0.02  # larger growth fades to this: each answer makes the rate surer
_FADING: Final = 0.93
_SLOW: Final = 10.0  # requests per second
_FEW: Final = 8
_SLOW_GROWTH: Final = 0.005
_MIN_RATE: Final = 0.01  # requests per second
_MAX_RATE: Final = 10_000.0

# If refusals name a pause, each costs far more than a little of the rate:
_CAREFUL_GROWTH: Final = 0.00005
_FIRST_CAREFUL_GROWTH: Final = 0.03  # until a measurement has some answers
_SOME: Final = 20
_LONG: Final = 1000  # answers, after which the rate may grow faster

_CUTS: Final = 15  # cuts of the rate by which their use is judged
_NO_USE: Final = 0.85  # of the rate before them, and still refused
_SHARE_WEIGHT: Final = 1 / 48  # of the latest request
_HALF: Final = 0.5
_MORE: Final = 0.03  # of the requests, beyond half as many strays again
_IN_A_ROW: Final = 5


class LearnedRate:
    """A rate that is learned: a window of requests in flight until the first refusals, then a rate.

    A refusal finds the limit's store of requests empty. The grants from one refusal to a later one are therefore what
    the store was filled with in between. The rate begins a little below that and grows until the next refusal, faster
    if fewer answers were measured.
    """

    __slots__ = (
        "_burst", "_excused", "_granted", "_growth", "_held", "_is_asked", "_is_shared", "_learned_by", "_next_at",
        "_since", "_since_cut", "_strays", "_window", "rate",
    )  # fmt: skip

    def __init__(self, window: float | None = _FIRST_WINDOW) -> None:
        """Begin with *window* requests in flight; ``None`` if they are bounded elsewhere."""
        self.rate: float | None = None
        self._window = math.inf if window is None else window
        self._is_shared = window is None
        self._next_at = -math.inf
        self._held = True  # whether requests go as fast as the pace lets them
        self._growth = _MAX_GROWTH
        self._since_cut = 0.0  # answers
        self._is_asked = False  # whether refusals name a pause
        self._burst = math.inf  # the fewest answers from the end of a pause to the next refusal
        self._strays: Strays | None = None  # once there is a rate
        # The measurement:
        self._since: float | None = None  # a refusal
        self._granted = 0  # answers since then
        self._learned_by = 0  # of them, at the latest refusal
        self._excused = 0.0  # s of pauses that were asked for

    @property
    def explains_refusals(self) -> bool:
        """Whether a refusal now may be due to the rate."""
        return self._strays is None or self._strays.are_few

    def delay(self, now: float, in_flight: int) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if self.rate is None:
            return 0.0 if in_flight + 1 <= self._window else math.inf
        return self._next_at - now

    def backlog(self, now: float, ahead: int) -> float:
        """Estimate the seconds until the turn of a request behind *ahead* others, if the rate grows with each."""
        if self.rate is None:
            return 0.0
        shrink = 1 / (1 + self._growth)  # of the time between two requests
        return max(0.0, self._next_at - now) + (1 - shrink**ahead) / (1 - shrink) / self.rate

    def sent(self, now: float) -> None:
        """Note that a request goes now."""
        if self.rate is None:
            return
        interval = 1 / self.rate
        self._held = now - self._next_at <= 2 * interval
        if not self._held:
            self.idle()
        # A turn that came late does not make the next one late.
        self._next_at = max(self._next_at, now - interval) + interval

    def answered(self, took: float, *, fresh: bool) -> None:
        """Note that a request was granted, after *took* seconds; *fresh* if it was sent after the latest refusal."""
        if self.rate is None:
            self._granted += fresh  # the others were granted before the measurement began
            self._window += _WINDOW_STEP if took < _LONG_TRIP else _LONG_STEP
            return
        assert self._strays is not None
        self._granted += 1
        self._strays.granted()
        if self._held:  # else the callers are slower than the pace, and that it is kept shows nothing
            self._grow(self.rate)

    def _grow(self, rate: float) -> None:
        # Among processes that share a limit, growth with each answer would let the fastest take all from the slowest.
        weight = max(1.0, _SLOW / rate) if self._is_shared else 1.0
        enough = _LONG if self._is_asked else max(_ENOUGH, int(rate))
        doublings = (self._since_cut + weight) // enough - self._since_cut // enough
        self._since_cut += weight
        if self._since_cut < _ENOUGH and not self._is_asked:
            self._growth = max(_FADING * self._growth, min(self._growth, _SURE_GROWTH))
        else:
            self._growth = min(_MAX_GROWTH, 2**doublings * self._growth)  # the limit may have been raised
        self.rate = min(_MAX_RATE, rate * min(1 + _MAX_GROWTH, (1 + self._growth) ** weight))

    def throttled(self, now: float, *, asked: bool = False) -> bool:
        """Learn from a refusal; return whether there is a new rate.

        Args:
            now: The time.
            asked: Whether the refusal names a pause.
        """
        self._window = max(1.0, self._window / 2)
        if self._strays is not None:
            self._strays.refused()
            if not self._strays.are_few:
                return False
        if self._since is None:
            if self.rate is not None:
                self._cut(self.rate, 0.8 * self.rate)
                self._growth = _MIN_GROWTH
            self.restart(now)
            return False
        if self._granted == self._learned_by or now <= self._since:
            return False  # nothing was granted since the latest refusal
        self._learned_by = self._granted
        if asked and self._held:
            self._measure_carefully(now - self._since)
            self.restart(now)
        else:
            self._measure(now - self._since)
            if self._granted >= _ENOUGH:
                self.restart(now)
        return True

    def _measure(self, seconds: float) -> None:
        # What the limit would have granted while nothing was sent may be lost: the measurement is a lower bound. The
        # rate that was refused is an upper one.
        measured = self._granted / seconds
        lower_bound = measured * (1 - 0.5 / (self._granted + 1))
        if self.rate is None:
            self._begin_at(lower_bound)
        else:
            self._cut(self.rate, max(0.25 * self.rate, min(0.9 * self.rate, 1.2 * measured), lower_bound))
        is_slow = self._is_shared and self.rate is not None and self.rate < _SLOW and self._granted > _FEW
        self._growth = min(_SLOW_GROWTH if is_slow else _MAX_GROWTH, max(_MIN_GROWTH, 2 / self._granted**2))

    def _measure_carefully(self, active: float) -> None:
        if self._excused:
            self._burst = min(self._burst, self._granted)
        if self._granted > max(_SOME, 2 * self._burst):
            measured = (self._granted - self._burst) / active
        else:
            # Most of it was the burst after a pause. With the pause this is too low, without it too high.
            measured = self._granted / math.sqrt(active * (active + self._excused))
        if self.rate is None:
            self._begin_at(measured)
        else:
            self._cut(self.rate, min(0.95 * self.rate, max(0.5 * self.rate, measured)))
        self._growth = _CAREFUL_GROWTH if self._granted >= _SOME else _FIRST_CAREFUL_GROWTH
        self._is_asked = True

    def _begin_at(self, rate: float) -> None:
        self.rate = max(_MIN_RATE, rate)
        self._strays = self._strays or Strays()

    def _cut(self, old: float, new: float) -> None:
        assert self._strays is not None
        restored = self._strays.cut(old)
        self.rate = max(_MIN_RATE, new if restored is None else restored)
        self._since_cut = 0

    def forget(self) -> None:
        """Forget the rate: the limit is of another kind."""
        self.rate = self._since = None

    def idle(self) -> None:
        """End the measurement: for a while nothing was held back."""
        self._since = None

    def restart(self, now: float) -> None:
        """Begin a measurement."""
        self._since, self._granted, self._learned_by, self._excused = now, 0, 0, 0.0

    def excuse(self, seconds: float) -> None:
        """Leave a pause of *seconds* that the service asked for out of the measurement."""
        if self._since is not None:
            self._since += seconds
            self._excused += seconds

    def paused_until(self, when: float) -> None:
        """Pace from *when* on, the end of a pause."""
        self._next_at = max(self._next_at, when)

    def is_idle(self, now: float) -> bool:
        """Return whether forgetting it would make little difference."""
        return self.rate is None and self._since is None


class Strays:
    """Refusals that come at any rate, such as those of single accounts.

    If slower requests are refused as well, again and again, slowing down does not help: the rate is restored, and as
    many refusals are ignored as came at the lower rates.
    """

    __slots__ = ("_cuts", "_ignored", "_in_a_row", "_share")

    def __init__(self) -> None:
        self._cuts: deque[float] = deque(maxlen=_CUTS)  # the rates at the latest refusals
        self._share = 0.0  # of the latest requests, that was refused
        self._ignored = 0.0  # the share that is ignored
        self._in_a_row = 0

    @property
    def are_few(self) -> bool:
        """Whether they cannot explain a refusal now."""
        if not self._ignored:
            return True
        return self._in_a_row > _IN_A_ROW or self._share > 1.5 * self._ignored + _MORE

    def granted(self) -> None:
        """Note that a request was granted."""
        self._share *= 1 - _SHARE_WEIGHT
        self._in_a_row = 0

    def refused(self) -> None:
        """Note that a request was refused."""
        self._share += _SHARE_WEIGHT * (1 - self._share)
        self._in_a_row += 1

    def cut(self, rate: float) -> float | None:
        """Note a cut of *rate*; return the rate to restore, if the latest cuts were of no use."""
        self._cuts.append(rate)
        if len(self._cuts) < _CUTS:
            return None
        cuts = list(self._cuts)
        before, after = min(cuts[: _CUTS // 3]), max(cuts[-(_CUTS // 3) :])
        if after >= _NO_USE * before or self._share >= _HALF:
            return None
        self._cuts.clear()
        self._ignored = self._share
        return before
