"""The lane of all accounts together: its limits, its load and its outages."""

import asyncio
import math
from collections.abc import Callable
from typing import Final

from audiences_async._base.deadlines import Deadlines
from audiences_async._pace.evidence import Evidence
from audiences_async._pace.lanes import Lane
from audiences_async._pace.load import Load
from audiences_async._pace.outage import Outage
from audiences_async._pace.pacing import NEUTRAL, REFUSALS, PacedQueue, PauseSettings, Report, Turn, Verdict
from audiences_async._pace.queue import NO_TIME
from audiences_async.clock import Clock
from audiences_async.events import (
    Event,
    ServiceConcurrencyLearned,
    ServicePaused,
    ServiceRateLearned,
    ServiceResumed,
)
from audiences_async.policies import Limiter, RateLimit
from audiences_async.snapshots import ServicePace, State

_STALL_IN_FLIGHT: Final = 8  # requests in flight; fewer show no stall
_LONG_PAUSE: Final = 5.0  # s; a longer pause ends a measurement
_UNREFUSED_ANSWERS: Final = 32  # answers without a refusal, after which there is no shared limit


class ServiceLane(PacedQueue):
    """The lane of all accounts together.

    Args:
        limit: The rate of all accounts together; ``None`` means that one is learned, if there is one.
        connections: Requests that may be in flight at the same time.
        attempt_timeout: Seconds for one attempt.
        clock: Time, sleep and randomness.
        deadlines: Deadlines of waiting calls.
        settings: Lengths of pauses.
        emit: Called with pauses and learned limits.
    """

    is_shared = True

    __slots__ = ("_emit", "_unrefused", "abandon", "answers", "evidence", "jobs", "load", "outage", "state")

    def __init__(
        self,
        limit: RateLimit | Limiter | None,
        *,
        connections: int,
        attempt_timeout: float,
        clock: Clock,
        deadlines: Deadlines,
        settings: PauseSettings,
        emit: Callable[[Event], None],
    ) -> None:
        super().__init__(limit, clock, deadlines, settings)
        self.load: Load = Load(connections, attempt_timeout)
        self.evidence: Evidence = Evidence()
        self.outage: Outage = Outage()
        self.answers: int = 0
        """Number of requests answered so far."""
        self.abandon: Callable[[], None] = lambda: None
        """Called to time out all requests in flight."""
        self.state: State = "open"
        """Whether all accounts are held to a limit, or no account is answered."""
        self.jobs: int = 0
        """Jobs under way."""
        self._emit = emit
        self._unrefused = 0  # answers since the latest refusal
        attach = getattr(limit, "attach_pace", None)
        if attach is not None:
            attach(self)

    def snapshot(self, now: float) -> ServicePace:
        """Return how the service holds all accounts together."""
        return ServicePace(
            rate=self.paces.rate,
            paused_for=self.closing.left(now),
            waiting=self.waiting,
            in_flight=self.in_flight,
            window=int(self.load.limit),
            state=self.state,
            silent_for=self.outage.failing_for(now if self.in_flight or self._waiters else self._last_at),
        )

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if self.state == "out":
            if self.closing.probe_is_out:
                return self.outage.next_probe(now)
        elif self.in_flight >= int(self.load.limit):
            return math.inf
        return super().delay(now)

    async def opened_or_out(self) -> None:
        """Return when a request may go; if the service is out, as soon as a connection and a known rate let it.

        For calls outside of jobs: they have a deadline, and do not wait for the end of an outage.
        """
        while self.state != "out" and (delay := self.delay(self.clock.monotonic())) > NO_TIME:
            await self.wait(delay)
        while self.in_flight >= self.load.connections:
            await self.wait(math.inf)
        while self.state == "out" and (delay := self.paces.known_delay(self.clock.monotonic())) > NO_TIME:
            await self.wait(delay)

    async def wait(self, delay: float) -> None:
        if self.state != "out" or delay == math.inf:
            await super().wait(delay)
            return
        # An answer may end the outage before the next probe is due.
        sleeping = asyncio.ensure_future(self.clock.sleep(delay))
        changing = asyncio.ensure_future(self._change())
        try:
            await asyncio.wait({sleeping, changing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            changing.cancel()

    def look_for_stall(self) -> None:
        """Begin an outage if many requests are in flight and no reply has come for a while. For jobs."""
        now = self.clock.monotonic()
        many = self.in_flight >= max(_STALL_IN_FLIGHT, int(self.load.limit) // 2)
        if self.state != "open" or not self.answers or not many:
            return
        if self.outage.note_silence(now - self._last_at, self.load.slowest):
            self.load.ignore_until(now)
            self._trip(now, now, "timed out", None)
            self.outage.hangs = True
            self.abandon()

    def returned(
        self, now: float, turn: Turn, report: Report, lane: Lane, *, is_own: bool, may_be_service: bool
    ) -> bool:
        """Learn from the end of a request; return whether a refusal is the service's, and not the account's.

        Args:
            now: The time.
            turn: The turn of the request.
            report: The meaning of the reply for the pace.
            lane: The account's.
            is_own: Whether the request was the account's own, and no probe for another one.
            may_be_service: Whether the service may be the cause, and not the account alone.
        """
        fresh = self._returned(now, turn.sent_at)
        if turn.probe:
            self.closing.probe_is_out = False
        verdict = report.verdict
        try:
            if verdict != "answered" or self.evidence.is_needed:
                self.evidence.returned(verdict, lane if is_own else None, is_probe=turn.probe)
            if self.load.follow(now, turn, verdict):
                self.paces.forget()
                self._emit(ServiceConcurrencyLearned("", int(self.load.concurrency)))
            if verdict == "answered":
                self._heard(now, turn, fresh=fresh, recovers=is_own and lane.recovers)
                return False
            if verdict in NEUTRAL:
                if verdict == "stale" and self.evidence.suspects_outage and self.state == "open":
                    self.load.reopen(now)
                return False
            if verdict != "throttled":  # which may be due to the account's own limit
                self.outage.failed(now)
            if turn.probe:
                self._trip(now, turn.sent_at, verdict, report.pause)
                return True
            may_be_service = may_be_service and not self.outage.outlived(turn.sent_at)
            return may_be_service and self._judge(now, turn, verdict, report.pause, lane)
        finally:
            if self._changed is not None:
                self.changed()

    def adopt(self, rate: float) -> None:
        """Keep to *rate* requests per second, as if it had been learned."""
        now = self.clock.monotonic()
        self.paces.learn(now).steady.adopt(now, rate)
        self.state = "limited" if self.state == "open" else self.state
        self._on_rate(rate, None)
        self.changed()

    def _heard(self, now: float, turn: Turn, *, fresh: bool, recovers: bool) -> None:
        self.answers += 1
        self._unrefused += 1
        is_end = self.state == "out"  # any answer ends an outage, even to an old request
        was_closed = now < self.closing.until
        if is_end:
            self.closing.until, fresh = now, True
        if self.outage.failing_since is not None:
            self.outage.answered()
        self._answered(now, turn.sent_at, fresh=fresh)
        if is_end and was_closed and self.paces.learned is not None:
            # A measurement leaves the whole pause out, and the grant that ended it.
            self.paces.learned.steady.measurement.restart(now)
        if self.state == "limited" and self.paces.rate is None and self._unrefused >= _UNREFUSED_ANSWERS:
            self.state = "open"
        if recovers and self.paces.learned is not None:
            self.paces.learned.prove()
        if turn.probe and self.evidence.blames_accounts:
            self.paces.restore()
            self.state = "open" if self.paces.learned is None else "limited"

    def _judge(self, now: float, turn: Turn, verdict: Verdict, pause: float | None, lane: Lane) -> bool:
        """Decide whether a refusal or failure, which may be the service's, is its own, and close it then."""
        if self.closing.is_probing:
            if verdict == "throttled" and pause is not None:
                self._throttled(now, turn.sent_at, pause, fresh=False)  # an old request, but its reply names a time
            return True
        if verdict in REFUSALS and self.load.concurrency < math.inf:
            return True
        shows_limit = not self.evidence.blames_accounts and (self.state == "limited" or self.evidence.shows_refusals)
        if verdict in REFUSALS and shows_limit:
            self._unrefused = 0
            learned = self.paces.learned
            if learned is not None and not learned.steady.explains_refusals:
                learned.steady.throttled(now)  # which counts it, and cuts the rate if there are more than strays
                return False
            verdict = "throttled"  # under a limit, a 503 is its refusal
        elif not self.evidence.add(verdict, lane, self.load.peak):
            return False
        self._trip(now, turn.sent_at, verdict, pause)
        return True

    def _trip(self, now: float, sent_at: float, verdict: Verdict, pause: float | None) -> None:
        """Close the service until a probe is answered."""
        self.outage.began(now)
        may_be_limit = self.outage.may_be_limit(now, is_limited=self.state == "limited", rate=self.paces.rate)
        if verdict == "throttled" or (verdict == "unavailable" and may_be_limit):
            self.state = "limited"
            if self.paces.rate is None:
                self.load.refused()
            self._throttled(now, sent_at, pause, fresh=True)
        else:
            self._fail(now, verdict, pause)
        for waiter in self.waiters():
            if self.outage.closed_for(self.closing.until) >= waiter.patience:
                waiter.refuse(self.outage.impatient(now, waiter.patience, self.closing.left(now)))

    def _fail(self, now: float, verdict: Verdict, pause: float | None) -> None:
        """Begin or continue an outage."""
        self.state = "out"
        self.closing.refused(now)
        if verdict == "unavailable":
            self.paces.learn(now).steady.measurement.restart(now)  # in case it is a limit after all
        seconds = self.outage.pause(self.closing.failures, self.clock)
        asked = pause or 0.0
        self._close(now, max(seconds, asked), asked=asked > seconds)

    def _on_paused(self, seconds: float, *, asked: bool) -> None:
        self._emit(ServicePaused("", seconds, asked, self.state))

    def _on_resumed(self) -> None:
        now = self.clock.monotonic()
        if now - self.closing.cut_at > _LONG_PAUSE and self.paces.learned is not None:
            self.paces.learned.idle()
        self.outage.resumed(now)
        if self.state == "out":
            self.state = "open" if self.paces.learned_rate is None else "limited"
            self.load.reopen(now)
            if self.outage.hangs:
                self.outage.hangs = False
                self.abandon()  # the probes in flight, which no reply will end
        self._emit(ServiceResumed(""))

    def _on_rate(self, rate: float, per: float | None) -> None:
        self._unrefused = 0
        self._emit(ServiceRateLearned("", rate, per))
