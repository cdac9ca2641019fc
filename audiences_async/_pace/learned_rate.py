"""The rate of a limit that the service does not publish, learned from its refusals.

The service throttles with 429 and publishes neither its rate nor ``Retry-After``: https://api.commbox.io/
(GET /audiences). The rate is measured as the grants from one refusal to a later one, divided by the time between them.
"""

import math
from collections import deque
from typing import Final

_MANY_ANSWERS: Final = 50  # answers for a measurement, or for faster growth
_MIN_GROWTH: Final = 0.001  # of the rate, for each answer
_MAX_GROWTH: Final = 0.25
_SURE_GROWTH: Final = 0.02  # larger growth fades to this: each answer makes the rate surer
_GROWTH_FADING: Final = 0.93
_SLOW_RATE: Final = 10.0  # requests per second
_FEW_GRANTS: Final = 8
_SLOW_GROWTH: Final = 0.005
_NO_TIME: Final = 0.001  # s
_MIN_RATE: Final = 0.01  # requests per second
_MAX_RATE: Final = 10_000.0

# If refusals name a pause, each costs far more than a little of the rate:
_CAREFUL_GROWTH: Final = 0.00005
_FIRST_CAREFUL_GROWTH: Final = 0.03  # until a measurement has some answers
_SOME_GRANTS: Final = 20
_VERY_MANY_ANSWERS: Final = 1000  # answers, after which the rate may grow faster

_JUDGED_CUTS: Final = 15  # cuts of the rate by which their use is judged
_USELESS_CUT: Final = 0.85  # of the rate before them, and still refused
_SHARE_WEIGHT: Final = 1 / 48  # of the latest request
_HALF: Final = 0.5
_STRAYS_MARGIN: Final = 0.03  # of the requests, beyond half as many strays again
_REFUSALS_IN_A_ROW: Final = 5


class LearnedRate:
    """A rate that is learned from refusals.

    A refusal finds the limit's store of requests empty. The grants from one refusal to a later one are therefore what
    the store was filled with in between. The rate begins a little below that and grows until the next refusal, faster
    if fewer answers were measured.

    Args:
        is_shared: Whether the limit may be shared with other processes, which are to get their share of it.
    """

    __slots__ = (
        "_burst", "_growth", "_held", "_is_asked", "_is_shared", "_next_at", "_since_cut", "_strays",
        "measurement", "rate",
    )  # fmt: skip

    def __init__(self, *, is_shared: bool = False) -> None:
        self.rate: float | None = None
        self.measurement: Measurement = Measurement()
        self._is_shared = is_shared
        self._next_at = -math.inf
        self._held = True  # whether requests go as fast as the pace lets them
        self._growth = _MAX_GROWTH
        self._since_cut = 0.0  # answers
        self._is_asked = False  # whether refusals name a pause
        self._burst = math.inf  # the fewest answers from the end of a pause to the next refusal
        self._strays: Strays | None = None  # once there is a rate

    @property
    def explains_refusals(self) -> bool:
        """Whether a refusal now may be due to the rate."""
        return self._strays is None or self._strays.do_not_explain

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go."""
        return 0.0 if self.rate is None else self._next_at - now

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
            self.measurement.stop()
        # A turn that came late does not make the next one late.
        self._next_at = max(self._next_at, now - interval) + interval

    def answered(self, *, fresh: bool) -> None:
        """Note that a request was granted; *fresh* if it was sent after the latest refusal."""
        if self.rate is None:
            self.measurement.granted += fresh  # the others were granted before it began
            return
        assert self._strays is not None
        self.measurement.granted += 1
        self._strays.granted()
        if self._held:  # else the callers are slower than the pace, and no answer shows that more is granted
            self._grow(self.rate)

    def _grow(self, rate: float) -> None:
        # Among processes that share a limit, growth with each answer would let the fastest take all from the slowest.
        weight = max(1.0, _SLOW_RATE / rate) if self._is_shared else 1.0
        enough = _VERY_MANY_ANSWERS if self._is_asked else max(_MANY_ANSWERS, int(rate))
        doublings = (self._since_cut + weight) // enough - self._since_cut // enough
        self._since_cut += weight
        if self._since_cut < _MANY_ANSWERS and not self._is_asked:
            self._growth = max(_GROWTH_FADING * self._growth, min(self._growth, _SURE_GROWTH))
        else:
            self._growth = min(_MAX_GROWTH, 2**doublings * self._growth)  # the limit may have been raised
        self.rate = min(_MAX_RATE, rate * min(1 + _MAX_GROWTH, (1 + self._growth) ** weight))

    def throttled(self, now: float, *, asked: bool = False) -> bool:
        """Learn from a refusal; return whether the rate was measured, and not only lowered by guess.

        Args:
            now: The time.
            asked: Whether the refusal names a pause.
        """
        if self._strays is not None:
            self._strays.refused()
            if not self._strays.do_not_explain:
                return False
        since = self.measurement.since
        if since is None:
            if self.rate is not None:
                self._cut(self.rate, 0.8 * self.rate)
                self._growth = _MIN_GROWTH
            self.measurement.restart(now)
            return False
        if not self.measurement.note_refusal(now):
            return False
        if asked and self._held:
            self._measure_carefully(now - since)
            self.measurement.restart(now)
        else:
            self._measure(now - since)
            if self.measurement.granted >= _MANY_ANSWERS:
                self.measurement.restart(now)
        return True

    def _measure(self, seconds: float) -> None:
        # What the limit would have granted while nothing was sent may be lost: the measurement is a lower bound. The
        # rate that was refused is an upper one.
        granted, doubt = self.measurement.granted, 0.0
        measured = granted / seconds
        lower_bound = measured * (1 - 0.5 / (granted + 1))
        if self.rate is None:
            self._begin_at(lower_bound)
            # The more of the first measurement was pause, the lower it is.
            paused = self.measurement.paused
            doubt = paused / max(_NO_TIME, seconds - paused)
        else:
            self._cut(self.rate, max(0.25 * self.rate, min(0.9 * self.rate, 1.2 * measured), lower_bound))
        is_slow = self._is_shared and self.rate is not None and self.rate < _SLOW_RATE and granted > _FEW_GRANTS
        most = _SLOW_GROWTH if is_slow else _MAX_GROWTH
        self._growth = min(most, max(_MIN_GROWTH, 2 / granted**2, doubt / _MANY_ANSWERS))

    def _measure_carefully(self, active: float) -> None:
        granted, excused = self.measurement.granted, self.measurement.excused
        if excused:
            self._burst = min(self._burst, granted)
        if granted > max(_SOME_GRANTS, 2 * self._burst):
            measured = (granted - self._burst) / active
        else:
            # Most of it was the burst after a pause. With the pause this is too low, without it too high.
            measured = granted / math.sqrt(active * (active + excused))
        if self.rate is None:
            self._begin_at(measured)
        else:
            self._cut(self.rate, min(0.95 * self.rate, max(0.5 * self.rate, measured)))
        self._growth = _CAREFUL_GROWTH if granted >= _SOME_GRANTS else _FIRST_CAREFUL_GROWTH
        self._is_asked = True

    def _begin_at(self, rate: float) -> None:
        self.rate = max(_MIN_RATE, rate)
        self._strays = self._strays or Strays()

    def _cut(self, old: float, new: float) -> None:
        assert self._strays is not None
        restored = self._strays.cut(old)
        self.rate = max(_MIN_RATE, new if restored is None else restored)
        self._since_cut = 0

    def adopt(self, now: float, rate: float) -> None:
        """Go on at *rate* requests per second, and begin a measurement."""
        self._strays = None
        self._begin_at(rate)
        self._since_cut, self._growth = 0.0, _MIN_GROWTH
        self.measurement.restart(now)

    def forget(self) -> None:
        """Forget the rate: the limit is of another kind."""
        self.rate = None
        self.measurement.stop()

    def paused_until(self, when: float) -> None:
        """Pace from *when* on, the end of a pause."""
        self._next_at = max(self._next_at, when)


class Measurement:
    """The requests that were granted since a refusal."""

    __slots__ = ("_counted", "excused", "granted", "paused", "since")

    def __init__(self) -> None:
        self.since: float | None = None
        """When it began; ``None`` if none is under way."""
        self.granted: int = 0
        self.excused: float = 0.0
        """Seconds of pauses that were asked for, by which *since* was moved."""
        self.paused: float = 0.0
        """Seconds of other pauses since then."""
        self._counted = 0  # grants, at the latest refusal

    def restart(self, now: float) -> None:
        """Begin anew."""
        self.since, self.granted, self._counted = now, 0, 0
        self.excused = self.paused = 0.0

    def stop(self) -> None:
        """End it: for a while nothing was held back."""
        self.since = None

    def note_refusal(self, now: float) -> bool:
        """Note a refusal; return whether anything was granted since the latest one."""
        if self.since is None or self.granted == self._counted or now <= self.since:
            return False
        self._counted = self.granted
        return True

    def excuse(self, seconds: float) -> None:
        """Leave *seconds* out of the time, if a measurement is under way."""
        if self.since is not None:
            self.since += seconds
            self.excused += seconds


class Strays:
    """Refusals that come at any rate, such as those of single accounts.

    If slower requests are refused as well, again and again, slowing down does not help: the rate is restored, and as
    many refusals are ignored as came at the lower rates.
    """

    __slots__ = ("_cuts", "_ignored", "_in_a_row", "_share")

    def __init__(self) -> None:
        self._cuts: deque[float] = deque(maxlen=_JUDGED_CUTS)  # the rates at the latest refusals
        self._share = 0.0  # of the latest requests, that was refused
        self._ignored = 0.0  # the share that is ignored
        self._in_a_row = 0

    @property
    def do_not_explain(self) -> bool:
        """Whether more is refused than they explain."""
        if not self._ignored:
            return True
        return self._in_a_row > _REFUSALS_IN_A_ROW or self._share > 1.5 * self._ignored + _STRAYS_MARGIN

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
        if len(self._cuts) < _JUDGED_CUTS:
            return None
        cuts = list(self._cuts)
        before, after = min(cuts[: _JUDGED_CUTS // 3]), max(cuts[-(_JUDGED_CUTS // 3) :])
        if after >= _USELESS_CUT * before or self._share >= _HALF:
            return None
        self._cuts.clear()
        self._ignored = self._share
        return before
