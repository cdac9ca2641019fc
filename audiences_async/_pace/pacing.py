"""Turns at a known or a learned pace, and none after a refusal until a probe is answered."""

import math
from abc import abstractmethod
from typing import ClassVar, Final, Literal, NamedTuple, TypeAlias

from attrs import frozen

from audiences_async._base.deadlines import Deadlines
from audiences_async._http.quota import Quota
from audiences_async._pace.closing import Closing
from audiences_async._pace.paces import Paces
from audiences_async._pace.queue import Queue
from audiences_async.clock import Clock
from audiences_async.errors import DeadlineExceededError
from audiences_async.policies import Limiter, RateLimit

Verdict: TypeAlias = Literal[
    "answered", "throttled", "unavailable", "failed", "lost", "timed out", "stale", "nothing"
]  # fmt: skip
"""What the result of a request shows about the service.

- ``"answered"``: an answer, or an error that is not retried
- ``"throttled"``: a 429
- ``"unavailable"``: a 503
- ``"failed"``: another reply that is retried
- ``"lost"``: no reply
- ``"timed out"``: no reply in time
- ``"stale"``: no reply on a pooled connection, which a healthy peer may just have closed
- ``"nothing"``: nothing
"""

REFUSALS: Final = frozenset({"throttled", "unavailable"})
"""Verdicts on replies that a limit may send."""

NEUTRAL: Final = frozenset({"stale", "nothing"})
"""Verdicts on a single request that has shown nothing."""


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
_LONGEST_PACED: Final = 1.0  # s; of a shared pause once a rate is known, or two intervals of it
_LONGEST_UNPACED: Final = 1.5  # s; of a shared pause until a rate is known
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
        first: Seconds; the longest pause after one refusal, until a rate is known.
        longest: Seconds; the longest of all.
        is_shared: Whether they are of all accounts together, and shorter: during a long one other processes use the
            limit, and accounts may run out of attempts.
    """

    first: float
    longest: float
    is_shared: bool = False

    def draw(self, rate: float | None, failures: int, clock: Clock) -> float:
        """Draw the seconds to pause after *failures* refusals in a row."""
        longest = self.longest
        if self.is_shared:
            longest = min(longest, _LONGEST_UNPACED if rate is None else max(_LONGEST_PACED, 2 / rate))
        base = self.first / 2 if rate is None else min(max(0.5 / rate, self.first / 20), longest)
        # Later pauses grow more slowly: the limit may be a window, and a long pause would overshoot its end.
        times = 2.0 ** (failures - 1) if failures <= _DOUBLINGS else _LATER * 1.25 ** min(failures - _DOUBLINGS, 60)
        return min(longest, base * times * (1 + clock.random()))


class PacedQueue(Queue):
    """A queue at a known or a learned pace, closed for a while after a refusal; one probe then goes ahead."""

    __slots__ = ("_last_at", "_settings", "closing", "paces")

    is_shared: ClassVar[bool]
    """Whether its limit may be shared with other processes."""

    def __init__(
        self, limit: RateLimit | Limiter | None, clock: Clock, deadlines: Deadlines, settings: PauseSettings
    ) -> None:
        # Not by `isinstance(limit, Limiter)`: checking a protocol takes longer than making a lane.
        known = limit if limit is None or isinstance(limit, RateLimit) else getattr(limit, "limit", None)
        super().__init__(clock, deadlines, None if isinstance(limit, RateLimit) else limit)
        self.closing: Closing = Closing()
        self.paces: Paces = Paces(known if isinstance(known, RateLimit) else None, is_shared=self.is_shared)
        self._settings = settings
        self._last_at = -math.inf  # when a request last came back

    @property
    def learned_rate(self) -> float | None:
        """Requests per second, as learned; ``None`` if no rate is."""
        return self.paces.learned_rate

    @property
    def paces_retries(self) -> bool:
        """Whether a call that was refused may leave all waiting to the queue."""
        return self.paces.rate is not None and self.closing.failures <= 1

    def expected(self, now: float) -> float:
        """Estimate the seconds until a call that comes now gets its turn."""
        return max(self.closing.left(now), self.paces.backlog(now, self.waiting))

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        # On the way of every request: what holds nothing back is not asked for how long.
        closed = self.closing.delay(now) if self.closing.is_probing else 0.0
        return closed or (self.paces.delay(now, self.in_flight) if self.paces.may_hold else 0.0)

    def sent(self, now: float) -> bool:
        """Note that a request goes now; ``True`` if it is a probe."""
        # A pause is not idleness: calls wait for its end.
        if self.paces.learned is not None and not self.in_flight:
            idle_for = now - self._last_at
            if idle_for > _IDLE and now - self.closing.until > _IDLE:
                self.paces.learned.idle(idle_for)
        if self.paces.may_hold:
            self.paces.sent(now)
        self.in_flight += 1
        if self.closing.is_probing:
            self.closing.probe_is_out = True
        return self.closing.is_probing

    def _returned(self, now: float, sent_at: float) -> bool:
        """Note that a request has come to its end; return whether it was sent after the latest refusal."""
        self._last_at = now
        self.in_flight -= 1
        return sent_at >= self.closing.cut_at

    def _answered(self, now: float, sent_at: float, *, fresh: bool) -> None:
        self.paces.granted(now, sent_at, fresh=fresh)
        if fresh and (self.closing.is_probing or self.closing.failures) and self.closing.answered(now):
            if self.paces.learned is not None:
                self.paces.learned.resumed(now)
            self._on_resumed()

    def _throttled(self, now: float, sent_at: float, pause: float | None, *, fresh: bool) -> None:
        if not fresh:
            if pause is not None and pause <= _LONGEST_PAUSE:
                self._close(now, pause, asked=True)
            return
        self.closing.refused(now)
        own = self._learn(now, sent_at, asked=pause is not None and pause > 0)
        asked = pause if pause is not None and own < pause <= _LONGEST_PAUSE else None
        self._close(now, own if asked is None else asked, asked=asked is not None)

    def _learn(self, now: float, sent_at: float, *, asked: bool) -> float:
        """Learn from a refusal; return the seconds to pause, if it names none."""
        learned = self.paces.learn(sent_at)
        if learned.refused(now, sent_at, asked=asked):
            assert learned.rate is not None
            self._on_rate(learned.rate, learned.per)
        if learned.until_open is not None:
            return learned.until_open
        return self._settings.draw(self.paces.rate, self.closing.failures, self.clock)

    def _close(self, now: float, seconds: float, *, asked: bool) -> None:
        before, until = self.closing.until, now + seconds
        if not self.closing.close(until):
            return
        if self.paces.learned is not None:
            self.paces.learned.paused(now, until, before, asked=asked)
        for waiter in self.waiters():
            if waiter.deadline <= until:
                waiter.refuse(too_late(seconds))
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


def too_late(seconds: float) -> DeadlineExceededError:
    """Return the error of a call whose turn comes in *seconds*, after its deadline."""
    message = f"the next request may go in {seconds:.3g} s, which does not fit into the call's timeout"
    return DeadlineExceededError(message, retry_after=seconds, stop_reason="deadline")
