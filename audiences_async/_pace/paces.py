"""The paces that a queue keeps to at the same time."""

import math

from audiences_async._http.quota import Quota
from audiences_async._pace.allowance import Allowance
from audiences_async._pace.known_rate import KnownRate
from audiences_async._pace.learned_pace import LearnedPace
from audiences_async.policies import RateLimit


class Paces:
    """A known rate, the pace that refusals have shown, and an announced quota, as far as there are any.

    Args:
        known: The known rate; ``None`` if none is.
        is_shared: Whether the limit may be shared with other processes.
    """

    __slots__ = ("_allowance", "_began", "_grants", "_is_shared", "_known", "learned", "may_hold")

    def __init__(self, known: RateLimit | None, *, is_shared: bool) -> None:
        self.learned: LearnedPace | None = None
        """The learned pace, from the first refusal on, also below a known rate."""
        self.may_hold: bool = known is not None
        """Whether there is any, so that a request may have to wait."""
        self._is_shared = is_shared
        self._known = None if known is None else KnownRate(known)
        self._allowance: Allowance | None = None
        self._grants = 0  # requests, until a pace is learned
        self._began = -math.inf  # when the first of them was sent

    @property
    def learned_rate(self) -> float | None:
        """Requests per second, as learned; ``None`` if no rate is."""
        return None if self.learned is None else self.learned.rate

    @property
    def rate(self) -> float | None:
        """Requests per second, known or learned; ``None`` if none is known."""
        return self.learned_rate or (None if self._known is None else self._known.rate)

    def delay(self, now: float, in_flight: int) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        delay = self.known_delay(now)
        if self.learned is not None:
            delay = max(delay, self.learned.delay(now, in_flight))
        return delay if self._allowance is None else max(delay, self._allowance.delay(now, in_flight))

    def known_delay(self, now: float) -> float:
        """Return the seconds until the known rate lets the next request go; 0.0 if no rate is known."""
        return 0.0 if self._known is None else self._known.delay(now)

    def backlog(self, now: float, ahead: int) -> float:
        """Estimate the seconds until the turn of a request behind *ahead* others; 0.0 if that is unknown."""
        paces = (pace for pace in (self._known, self.learned) if pace is not None)
        return max((pace.backlog(now, ahead) for pace in paces), default=0.0)

    def sent(self, now: float) -> None:
        """Note that a request goes now."""
        if self._known is not None:
            self._known.sent(now)
        if self.learned is not None:
            self.learned.sent(now)

    def granted(self, now: float, sent_at: float, *, fresh: bool) -> None:
        """Note that a request was granted; *fresh* if it was sent after the latest refusal."""
        if self.learned is not None:
            self.learned.granted(now, sent_at, fresh=fresh)
        else:
            self._began = self._began if self._grants else sent_at
            self._grants += 1

    def announced(self, now: float, sent_at: float, quota: Quota | None) -> None:
        """Keep to the *quota* announced in the reply to a request sent at *sent_at*; ``None`` if it had no quota."""
        if quota is not None:
            self.may_hold = True
            self._allowance = self._allowance or Allowance()
            self._allowance.announced(now, sent_at, quota)
        elif self._allowance is not None:
            self._allowance.not_announced(now)

    def learn(self, now: float) -> LearnedPace:
        """Return the learned pace, which begins *now* if there is none."""
        if self.learned is None:
            self.may_hold = True
            self.learned = LearnedPace(self._grants, self._began, now, is_shared=self._is_shared)
        return self.learned

    def restore(self) -> None:
        """Return to the learned pace that was proven last; forget it if none was."""
        if self.learned is None or not self.learned.restore():
            self.forget()

    def forget(self) -> None:
        """Forget the learned pace, and what was granted before."""
        self.learned, self._grants = None, 0
        self.may_hold = self._known is not None or self._allowance is not None

    def is_idle(self, now: float) -> bool:
        """Return whether forgetting them all would make little difference."""
        return (self.learned is None or self.learned.is_forgettable) and (
            self._known is None or self._known.is_idle(now)
        )
