"""The lane of all accounts together: its limits, its load and its outages."""

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from audiences_async._base.deadlines import Deadlines
from audiences_async._pace.evidence import Evidence
from audiences_async._pace.lanes import Lane
from audiences_async._pace.load import Load
from audiences_async._pace.outage import Outage
from audiences_async._pace.pacing import REFUSALS, PacedQueue, PauseSettings, Report, Turn, Verdict
from audiences_async._pace.queue import NO_TIME
from audiences_async.clock import Clock
from audiences_async.errors import TransportError
from audiences_async.events import (
    Event,
    ServiceConcurrencyLearned,
    ServicePaused,
    ServiceRateLearned,
    ServiceResumed,
)
from audiences_async.policies import Limiter, RateLimit
from audiences_async.snapshots import ServicePace, State

if TYPE_CHECKING:
    from audiences_async.credentials import ApiKey

_MANY: Final = 8  # requests in flight; fewer show no stall
_LONGEST_PACED: Final = 1.0  # s; of a pause once a rate is known, or two intervals of it
_LONGEST_UNPACED: Final = 1.5  # s; of a pause until a rate is known
_SOON: Final = 5.0  # s; a longer pause ends a measurement
_SAMPLE: Final = 32  # answers without a refusal, after which there is no shared limit


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

    __slots__ = ("_emit", "_state", "_unrefused", "abandon", "answers", "evidence", "load", "outage", "witness")

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
        self.witness: ApiKey | None = None
        """The key of an account that was answered."""
        self.abandon: Callable[[], None] = _do_nothing
        """Called to time out all requests in flight."""
        self._emit = emit
        self._state: State = "open"
        self._unrefused = 0  # answers since the latest refusal
        attach = getattr(limit, "attach_pace", None)
        if attach is not None:
            attach(self)

    @property
    def learned_rate(self) -> float | None:
        """Requests per second, as learned; ``None`` if no rate is."""
        return self.paces.learned_rate

    @property
    def refuses_many(self) -> bool:
        """Whether an account that is refused repeatedly need not be the cause."""
        return (self.is_limited and self.paces.rate is None) or self.evidence.shows_refusals

    @property
    def is_out(self) -> bool:
        """Whether the service answers no account."""
        return self._state == "out"

    @property
    def is_limited(self) -> bool:
        """Whether the service holds all accounts to a limit."""
        return self._state == "limited"

    def snapshot(self, now: float) -> ServicePace:
        """Return how the service holds all accounts together."""
        return ServicePace(
            rate=self.paces.rate,
            paused_for=self.closing.left(now),
            waiting=self.waiting,
            in_flight=self.in_flight,
            window=int(self.load.limit),
            state=self._state,
            silent_for=self.outage.silent_for(now),
        )

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if self._state == "out":
            if self.closing.probe_is_out:
                return self.outage.next_probe(now)
        elif self.in_flight >= int(self.load.limit):
            return math.inf
        return super().delay(now)

    async def opened_or_out(self) -> None:
        """Return when a request may go; if the service is out, as soon as a connection is free.

        For calls outside of jobs: they have a deadline, and do not wait for the end of an outage.
        """
        while not self.is_out and (delay := self.delay(self.clock.monotonic())) > NO_TIME:
            await self._wait(delay)
        while self.in_flight >= self.load.connections:
            await self._wait(math.inf)

    async def _wait(self, delay: float) -> None:
        if not self.is_out or delay == math.inf:
            await super()._wait(delay)
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
        many = self.in_flight >= max(_MANY, int(self.load.limit) // 2)
        if self._state != "open" or not self.answers or not many:
            return
        if self.outage.is_stall(now - self._last_at, self.load.slowest):
            self.load.ignore_until(now)
            self._trip(now, now, "timed out", None)
            self.outage.hangs = True
            self.abandon()

    def check_patience(self, patience: float) -> None:
        """Refuse a call that would wait although no account has been answered for *patience* seconds.

        Raises:
            TransportError: The call may not even be a probe.
        """
        now = self.clock.monotonic()
        silent = self.outage.silent_for(now)
        if silent > 0 and silent >= patience and self.delay(now) > 0:
            raise self._impatient(now, patience)

    def returned(self, now: float, turn: Turn, report: Report, lane: Lane, *, is_shared: bool) -> bool:
        """Learn from the end of a request; return whether a refusal is the service's, and not the account's.

        Args:
            now: The time.
            turn: The turn of the request.
            report: The meaning of the reply for the pace.
            lane: The account's.
            is_shared: Whether the service may be the cause, and not the account alone.
        """
        fresh = self._returned(now, turn.sent_at)
        if turn.probe:
            self.closing.probe_is_out = False
        verdict = report.verdict
        try:
            if verdict != "answered" or self.evidence.is_needed:
                self.evidence.returned(verdict, lane)
            if self.load.follow(now, turn, verdict):
                self._limit_in_flight()
            if verdict == "answered":
                self._heard(now, turn.sent_at, fresh=fresh)
                return False
            if turn.probe and verdict != "nothing":
                self._trip(now, turn.sent_at, verdict, report.pause)
                return True
            if self.outage.outlived(turn.sent_at):
                return False
            return is_shared and self._is_service(now, turn, verdict, report.pause, lane)
        finally:
            self.changed()

    def adopt(self, rate: float) -> None:
        """Keep to *rate* requests per second, as if it had been learned."""
        now = self.clock.monotonic()
        self.paces.learn(now).steady.adopt(now, rate)
        self._state = "limited" if self._state == "open" else self._state
        self._on_rate(rate, None)
        self.changed()

    def shrink(self) -> bool:
        """Lower the limit of requests in flight below the current number; return whether one will come back.

        For a machine that cannot open another socket.
        """
        if not self.in_flight:
            return False
        self.load.cut(float(self.in_flight))
        return True

    def _limit_in_flight(self) -> None:
        """Keep to a limit of requests in flight that was just recognized, or lowered, and to no rate."""
        self.paces.forget()
        self._emit(ServiceConcurrencyLearned("", int(self.load.concurrency)))

    def _heard(self, now: float, sent_at: float, *, fresh: bool) -> None:
        self.answers += 1
        self._unrefused += 1
        is_end = self._state == "out"  # any answer ends an outage, even to an old request
        was_closed = now < self.closing.until
        if is_end:
            self.closing.until, fresh = now, True
        self.outage.silent_since = None
        self._answered(now, sent_at, fresh=fresh)
        if is_end and was_closed and self.paces.learned is not None:
            self.paces.learned.steady.measurement.restart(
                now
            )  # a measurement leaves the whole pause out, and the grant that ended it
        if self._state == "limited" and self.paces.rate is None and self._unrefused >= _SAMPLE:
            self._state = "open"

    def _is_service(self, now: float, turn: Turn, verdict: Verdict, pause: float | None, lane: Lane) -> bool:
        """Return whether a refusal or failure, which may be the service's, is taken for that."""
        if self.closing.is_probing:
            if verdict == "throttled" and pause is not None:
                self._throttled(now, turn.sent_at, pause, fresh=False)  # an old request, but its reply names a time
            return True
        if verdict in REFUSALS and self.load.concurrency < math.inf:
            return True
        if verdict in REFUSALS and (self.is_limited or self.refuses_many):
            return self._is_rate(now, turn, pause)
        if not self.evidence.suffices(verdict, lane, self.load.peak):
            return False
        self._trip(now, turn.sent_at, verdict, pause)
        return True

    def _is_rate(self, now: float, turn: Turn, pause: float | None) -> bool:
        """Return whether a refusal may be due to the shared rate, which then is lowered."""
        self._unrefused = 0
        if self.paces.learned is not None and not self.paces.learned.steady.explains_refusals:
            self.paces.learned.steady.throttled(now)
            return False
        self._trip(now, turn.sent_at, "throttled", pause)
        return True

    def _trip(self, now: float, sent_at: float, verdict: Verdict, pause: float | None) -> None:
        """Close the service until a probe is answered."""
        self.outage.began(now)
        may_be_limit = self.outage.may_be_limit(now, is_limited=self.is_limited, rate=self.paces.rate)
        if verdict == "throttled" or (verdict == "unavailable" and may_be_limit):
            self._state = "limited"
            if self.paces.rate is None:
                self.load.refused()
            self._throttled(now, sent_at, pause, fresh=True)
        else:
            self._fail(now, verdict, pause)
        for waiter in self.waiters():
            if self.outage.silent_for(self.closing.until) >= waiter.patience:
                waiter.refuse(self._impatient(now, waiter.patience))

    def _fail(self, now: float, verdict: Verdict, pause: float | None) -> None:
        """Begin or continue an outage."""
        self._state = "out"
        self.closing.refused(now)
        if verdict == "unavailable":
            self.paces.learn(now).steady.measurement.restart(now)  # in case it is a limit after all
        seconds = self.outage.pause(self.closing.failures, self.clock)
        is_asked = pause is not None and seconds < pause
        self._close(now, pause if is_asked and pause is not None else seconds, asked=is_asked)

    def _impatient(self, now: float, patience: float) -> TransportError:
        silent = self.outage.silent_for(now)
        bound = f"patience={patience:g} s"
        end = f"longer than {bound} allows" if silent >= patience else f"and {bound} ends before the next probe"
        message = f"the service has answered no account for {silent:.3g} s, {end}"
        return TransportError(message, stop_reason="patience", retry_after=self.closing.left(now) or None)

    def _draw_pause(self) -> float:
        # During a long pause other processes use the limit, and accounts may run out of attempts.
        longest = _LONGEST_UNPACED if self.paces.rate is None else max(_LONGEST_PACED, 2 / self.paces.rate)
        return min(super()._draw_pause(), longest)

    def _on_paused(self, seconds: float, *, asked: bool) -> None:
        self._emit(ServicePaused("", seconds, asked, self._state))

    def _on_resumed(self) -> None:
        now = self.clock.monotonic()
        if now - self.closing.cut_at > _SOON and self.paces.learned is not None:
            self.paces.learned.idle()
        self.outage.resumed(now)
        if self.is_out:
            self._state = "open" if self.paces.learned_rate is None else "limited"
            self.load.reopen(now)
            if self.outage.hangs:
                self.outage.hangs = False
                self.abandon()  # the probes in flight, which no reply will end
        self._emit(ServiceResumed(""))

    def _on_rate(self, rate: float, per: float | None) -> None:
        self._unrefused = 0
        self._emit(ServiceRateLearned("", rate, per))


def _do_nothing() -> None:
    """Stand in for a transport without requests in flight."""
