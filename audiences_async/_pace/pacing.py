"""Turns at a known or a learned pace, and none after a refusal until a probe is answered."""

import math
from abc import abstractmethod
from typing import ClassVar, Final, Literal, NamedTuple, TypeAlias

from attrs import frozen

from audiences_async._base.deadlines import Deadlines
from audiences_async._http.quota import Quota
from audiences_async._pace.allowance import Allowance
from audiences_async._pace.learned import LearnedPace
from audiences_async._pace.queue import Queue
from audiences_async._pace.rates import KnownRate
from audiences_async.clock import Clock
from audiences_async.errors import DeadlineExceededError
from audiences_async.policies import Limiter, RateLimit

Verdict: TypeAlias = Literal["answered", "throttled", "unavailable", "failed", "lost", "timed out", "nothing"]
"""What the result of a request shows about the service.

- ``"answered"``: an answer, or an error that is not retried
- ``"throttled"``: a 429
- ``"unavailable"``: a 503
- ``"failed"``: another reply that is retried
- ``"lost"``: no reply
- ``"timed out"``: no reply in time
- ``"nothing"``: nothing
"""

REFUSALS: Final = frozenset({"throttled", "unavailable"})
"""Verdicts on replies that a limit may send."""


class Report(NamedTuple):
    """The meaning of a reply for the pace.

    Attributes:
        verdict: The kind of reply.
        pause: Seconds for which the service asked to send nothing; ``None`` if it did not.
        quota: The quota that the reply announced; ``None`` if it had none.
    """

    verdict: Verdict
    pause: float | None = None
    quota: Quota | None = None


ANSWERED: Final = Report("answered")
NOTHING: Final = Report("nothing")

_IDLE: Final = 1.0  # s without a request, after which an account counts as idle
_LONGEST_PAUSE: Final = 86_400.0  # s; a longer one is in a mistaken unit
_DOUBLINGS: Final = 5  # pauses, each twice as long as the one before
_LATER: Final = 6.2  # the next ones: a quarter of the time since the first refusal


class Turn(NamedTuple):
    """A request's turn.

    Attributes:
        sent_at: When it came, on the client's clock.
        probe: Whether the service is closed, and this request shows whether it opens again.
        quick_answers: Quick answers of the service before it.
        number: The request's number, in the order of sending.
    """

    sent_at: float
    probe: bool
    quick_answers: int
    number: int


@frozen
class PauseSettings:
    """How long to pause after a refusal that names no time.

    Attributes:
        first: Seconds; the longest pause until a rate is known.
        longest: Seconds; the longest of all.
    """

    first: float
    longest: float

    def draw(self, rate: float | None, failures: int, clock: Clock) -> float:
        """Draw the seconds to pause after *failures* refusals in a row."""
        base = self.first / 2 if rate is None else min(max(0.5 / rate, self.first / 20), self.longest)
        # Later pauses grow more slowly: the limit may be a window, and a long pause would overshoot its end.
        times = 2.0 ** (failures - 1) if failures <= _DOUBLINGS else _LATER * 1.25 ** min(failures - _DOUBLINGS, 60)
        return min(self.longest, base * times * (1 + clock.random()))


class PacedQueue(Queue):
    """A queue at a known or a learned pace, closed for a while after a refusal; one probe then goes ahead."""

    __slots__ = (
        "_allowance", "_began", "_closed_until", "_cut_at", "_failures", "_grants", "_known", "_last_at", "_learned",
        "_probe_out", "_probing", "_settings",
    )  # fmt: skip

    is_shared: ClassVar[bool]
    """Whether its limit may be shared with other processes."""

    def __init__(
        self, limit: RateLimit | Limiter | None, clock: Clock, deadlines: Deadlines, settings: PauseSettings
    ) -> None:
        # Not by `isinstance(limit, Limiter)`: checking a protocol takes longer than making a lane.
        super().__init__(clock, deadlines, None if isinstance(limit, RateLimit) else limit)
        known = limit if isinstance(limit, RateLimit) else getattr(limit, "limit", None)
        self._known = KnownRate(known) if isinstance(known, RateLimit) else None
        self._learned: LearnedPace | None = None  # from the first refusal on, also below a known rate
        self._allowance: Allowance | None = None  # if the service announces its quota
        self._settings = settings
        self._grants = 0  # requests, until a pace is learned
        self._began = -math.inf  # when the first of them was sent
        self._last_at = -math.inf  # when a request last came back
        self._closed_until = -math.inf
        self._cut_at = -math.inf
        self._failures = 0  # refusals in a row, without an answer between them
        self._probing = False
        self._probe_out = False

    @property
    def learned_rate(self) -> float | None:
        """Requests per second, as learned; ``None`` if no rate is."""
        return None if self._learned is None else self._learned.rate

    @property
    def rate(self) -> float | None:
        """Requests per second, known or learned; ``None`` if none is known."""
        return self.learned_rate or (None if self._known is None else self._known.rate)

    @property
    def paces_retries(self) -> bool:
        """Whether a call that was refused may leave all waiting to the queue."""
        return self.rate is not None and self._failures <= 1

    def paused_for(self, now: float) -> float:
        """Return the seconds until requests may go again after a refusal; 0.0 means now."""
        return max(0.0, self._closed_until - now)

    def expected(self, now: float) -> float:
        """Estimate the seconds until a call that comes now gets its turn."""
        paces = (pace for pace in (self._known, self._learned) if pace is not None)
        return max(0.0, self._closed_until - now, *(pace.backlog(now, self.waiting) for pace in paces))

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if now < self._closed_until:
            return self._closed_until - now
        if self._probing and self._probe_out:
            return math.inf
        delay = 0.0 if self._known is None else self._known.delay(now)
        if self._learned is not None:
            delay = max(delay, self._learned.delay(now, self.in_flight))
        return delay if self._allowance is None else max(delay, self._allowance.delay(now, self.in_flight))

    def sent(self, now: float) -> bool:
        """Note that a request goes now; ``True`` if it is a probe."""
        if self._known is not None:
            self._known.sent(now)
        if self._learned is not None:
            # A pause is not idleness: calls wait for its end.
            if not self.in_flight and now - self._last_at > _IDLE and now - self._closed_until > _IDLE:
                self._learned.idle(now - self._last_at)
            self._learned.sent(now)
        self.in_flight += 1
        self._probe_out = self._probing
        return self._probing

    def announced(self, now: float, sent_at: float, quota: Quota | None) -> None:
        """Keep to the *quota* announced in the reply to a request sent at *sent_at*; ``None`` if it had no quota."""
        if quota is not None:
            self._allowance = self._allowance or Allowance()
            self._allowance.announced(now, sent_at, quota)
        elif self._allowance is not None:
            self._allowance.not_announced(now)

    def _returned(self, now: float, sent_at: float) -> bool:
        """Note that a request has come to its end; ``False`` if it was sent before the last cut, and is old news."""
        self._last_at = now
        self.in_flight -= 1
        return sent_at >= self._cut_at

    def _answered(self, now: float, sent_at: float, *, fresh: bool) -> None:
        if self._learned is not None:
            self._learned.granted(now, sent_at, fresh=fresh)
        else:
            self._began = self._began if self._grants else sent_at
            self._grants += 1
        if fresh:
            self._failures = 0
            if self._probing and now >= self._closed_until:
                self._resume(now)

    def _resume(self, now: float) -> None:
        self._probing = False
        if self._learned is not None:
            self._learned.resumed(now)
        self._on_resumed()

    def _throttled(self, now: float, sent_at: float, pause: float | None, *, fresh: bool) -> None:
        if not fresh:
            if pause is not None and pause <= _LONGEST_PAUSE:
                self._close(now, pause, asked=True)
            return
        self._failures += 1
        self._cut_at = now
        own = self._learn(now, sent_at, asked=pause is not None and pause > 0)
        asked = pause if pause is not None and own < pause <= _LONGEST_PAUSE else None
        self._close(now, own if asked is None else asked, asked=asked is not None)

    def _learn(self, now: float, sent_at: float, *, asked: bool) -> float:
        """Learn from a refusal; return the seconds to pause, if it names none."""
        learned = self._learner(sent_at)
        if learned.refused(now, sent_at, asked=asked):
            assert learned.rate is not None
            self._on_rate(learned.rate, learned.per)
        return self._draw_pause() if learned.until_open is None else learned.until_open

    def _learner(self, now: float) -> LearnedPace:
        """Return the learned pace, which begins *now* if there is none."""
        if self._learned is None:
            self._learned = LearnedPace(self._grants, self._began, now, is_shared=self.is_shared)
        return self._learned

    def _draw_pause(self) -> float:
        """Draw the seconds to pause after a refusal that names no time."""
        return self._settings.draw(self.rate, self._failures, self.clock)

    def _close(self, now: float, seconds: float, *, asked: bool) -> None:
        self._probing = True
        until = now + seconds
        if until <= self._closed_until:
            return
        if self._learned is not None:
            self._learned.paused(now, until, self._closed_until, asked=asked)
        self._closed_until = until
        for waiter in self.waiters():
            if waiter.deadline <= until:
                waiter.refuse(never(seconds))
        self._on_paused(seconds, asked=asked)

    @abstractmethod
    def _on_paused(self, seconds: float, *, asked: bool) -> None:
        """Note that requests stop."""

    @abstractmethod
    def _on_resumed(self) -> None:
        """Note that they go again."""

    @abstractmethod
    def _on_rate(self, rate: float, per: float | None) -> None:
        """Note a new measure of the rate."""


def never(seconds: float) -> DeadlineExceededError:
    """Return the error of a call whose turn comes in *seconds*, after its deadline."""
    message = f"the next request may go in {seconds:.3g} s, which does not fit into the call's timeout"
    return DeadlineExceededError(message, retry_after=seconds, stop_reason="deadline")
