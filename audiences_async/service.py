"""The way of all accounts together: its rate, its load, and its outages."""

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from attrs import frozen

from audiences_async.clock import Clock
from audiences_async.concurrency import LearnedConcurrency
from audiences_async.deadlines import Deadlines
from audiences_async.errors import TransportError
from audiences_async.events import Event, ServiceConcurrencyLearned, ServicePaused, ServiceRateLearned, ServiceResumed
from audiences_async.learning import LearnedRate
from audiences_async.pacing import NO_TIME, Lane, Limiter, PacedQueue, PauseSettings, Turn, Verdict
from audiences_async.rates import RateLimit

if TYPE_CHECKING:
    from audiences_async.credentials import ApiKey

State: TypeAlias = Literal["open", "limited", "out"]
"""The service answers; it holds all accounts to a rate; or it answers nobody."""

REFUSALS: Final = frozenset({"throttled", "unavailable"})
"""What a rate limit may answer."""

_FIRST_LIMIT: Final = 32.0  # requests in flight; then three times as many in a round trip
_FAST_STEP: Final = 2.0  # for each answer
_SLOW_STEP: Final = 0.2
_LEAST: Final = 4.0  # requests in flight, however slow the service is
_ENOUGH: Final = 50  # answers after which growth may be faster
_FAST: Final = 1 / 8  # of the attempt timeout
_SLOW: Final = 1 / 2
_FEW: Final = 3  # accounts in a row that come to nothing while little is in flight, and the service is suspected
_MANY: Final = 8
_PER_SUSPECT: Final = 4  # requests in flight for each account that it takes
_MOST_TOLERANT: Final = 8
_WEIGHT: Final = 1 / 16  # of the last request, in what is known of the latest ones
_HALF: Final = 0.5
_FIRST_PROBE: Final = 0.25  # s after the first failure; twice as long after each probe
_LONGEST_PROBE: Final = 1.5  # s; and a third more by chance
_LONGEST_PACED: Final = 1.0  # s; of a pause once a rate is known, or two intervals of it
_SOON: Final = 5.0  # s after an outage: what is refused then is refused for going too fast
_STALL: Final = 2.0  # s without any reply, after which one more request goes ahead to see
_FADING: Final = 0.999  # of what is kept of the slowest answer, with each one
_SAMPLE: Final = 32  # answers without a refusal, after which there is no shared rate


@frozen
class ServicePace:
    """How the service holds all accounts together.

    Attributes:
        rate: Requests per second, known or learned; ``None`` if there is no such limit.
        paused_for: Seconds until the next request may go, a probe if the state is ``"out"``; 0.0 means now.
        waiting: Calls that wait for the service.
        in_flight: Requests on the wire.
        window: Requests that may be in flight at the same time, as far as is known.
        state: ``"open"``, ``"limited"`` (all accounts share a rate), or ``"out"`` (nobody is answered).
        silent_for: Seconds for which nobody has been answered, while the service was asked; 0.0 if somebody was.
    """

    rate: float | None
    paused_for: float
    waiting: int
    in_flight: int
    window: int
    state: State
    silent_for: float


class ServiceLane(PacedQueue):
    """The lane of all accounts together.

    It decides from what different accounts meet in a row: an account that comes to nothing alone is no matter of the
    service's.

    Args:
        limit: The rate of all accounts together; ``None`` means that one is learned, if there is one.
        connections: Requests that may be in flight at the same time.
        attempt_timeout: Seconds for one attempt.
        clock: Where the time comes from.
        deadlines: Where waits are bounded.
        settings: How long to pause.
        emit: Called with pauses and rates.
    """

    __slots__ = (
        "_answered_since", "_attempt_timeout", "_concurrency", "_connections", "_emit", "_limit", "_peak", "_probed_at",
        "_recovered", "_refusals", "_resumed_at", "_seen", "_shrunk_at", "_silent_since", "_slowest",
        "_stall", "_state", "_step", "_streak", "_swallows", "_tolerance", "abandon", "answers", "probes",
        "quick_answers", "witness",
    )  # fmt: skip

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
        super().__init__(limit, LearnedRate(window=None), clock, deadlines, settings)
        self.answers: int = 0
        """How many requests have been answered."""
        self.quick_answers: int = 0
        """How many of them in a small part of the attempt timeout."""
        self.probes: int = 0
        """How many probes were sent."""
        self.witness: ApiKey | None = None
        """The key of an account that was answered."""
        self._emit = emit
        self._connections = connections
        self._attempt_timeout = attempt_timeout
        self._concurrency = LearnedConcurrency()
        self._limit = min(_FIRST_LIMIT, float(connections))
        self._step = _FAST_STEP
        self._probed_at = -math.inf
        self._stall = _STALL
        self._swallows = False  # whether the outage is one in which requests are taken and not answered
        self._slowest = 0.0  # s; the longest that an answer took, lately
        self.abandon: Callable[[], None] = _ignore
        """Called to have all requests under way time out: nobody reads them any more."""
        self._answered_since = 0  # since the limit was last cut
        self._shrunk_at = -math.inf
        self._peak = 0  # requests in flight at the same time
        self._refusals = 0.0  # the share of the latest requests that were refused
        self._recovered = 0.0  # the share of the latest answers for accounts that had come to nothing before
        self._streak: set[Lane] = set()  # accounts that came to nothing since then
        self._tolerance = 1
        self._state: State = "open"
        self._silent_since: float | None = None
        self._resumed_at = -math.inf
        self._seen = 0  # answers since the last refusal

    @property
    def refuses_many(self) -> bool:
        """Whether an account that is refused again and again need not be the cause: most are, and then answered."""
        if self._state == "limited" and self.rate is None:
            return True
        return self._refusals >= _HALF and self._recovered >= _HALF

    @property
    def is_out(self) -> bool:
        """Whether the service answers nobody."""
        return self._state == "out"

    @property
    def is_limited(self) -> bool:
        """Whether the service holds all accounts to a limit."""
        return self._state == "limited"

    def snapshot(self, now: float) -> ServicePace:
        """Return how the service holds all accounts together."""
        return ServicePace(
            rate=self.rate,
            paused_for=self.paused_for(now),
            waiting=self.waiting,
            in_flight=self.in_flight,
            window=int(self._limit),
            state=self._state,
            silent_for=0.0 if self._silent_since is None else now - self._silent_since,
        )

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if self._state == "out" and self._probe_out:
            return max(0.0, self._probed_at + _STALL - now)  # one that is swallowed must not be the last
        if self._state != "out" and self.in_flight >= int(self._limit):
            return math.inf
        return super().delay(now)

    def sent(self, now: float) -> bool:
        """Note that a request goes now; ``True`` if it is a probe."""
        probe = super().sent(now)
        if probe:
            self.probes += 1
            self._probed_at = now
        self._peak = max(self._peak, self.in_flight)
        return probe

    async def opened_or_out(self) -> None:
        """As `opened`, but while the service is out wait for a connection only. For calls that are of no job.

        Their callers have a deadline, and do not wait for the end of an outage.
        """
        while not self.is_out and (delay := self.delay(self.clock.monotonic())) > NO_TIME:
            await self._wait(delay)
        while self.in_flight >= self._connections:
            await self._wait(math.inf)

    async def _wait(self, delay: float) -> None:
        if self._state != "out" or delay == math.inf:
            await super()._wait(delay)
            return
        # The end of an outage is worth more than two tasks.
        self._changed.clear()
        sleeping = asyncio.ensure_future(self.clock.sleep(delay))
        changing = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({sleeping, changing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            changing.cancel()

    def look_for_stall(self) -> None:
        """Take the service for out if many requests are under way and no reply comes for a while. For jobs."""
        now = self.clock.monotonic()
        many = self.in_flight >= max(_MANY, int(self._limit) // 2)
        silent = now - self._last_at >= max(self._stall, 2 * self._slowest)
        if self._state == "open" and self.answers and many and silent:
            self._stall *= 2  # it may be no more than slow
            self._shrunk_at = now
            self._trip(now, now, "timed out", None)
            self._swallows = True
            self.abandon()

    def check_patience(self, patience: float) -> None:
        """Refuse a call that comes when nobody has been answered for *patience* seconds, unless it may be a probe.

        Raises:
            TransportError: It has no more to wait for.
        """
        now = self.clock.monotonic()
        if self._silent_since is not None and self.delay(now) > 0 and now - self._silent_since >= patience:
            raise self._impatient(now, patience)

    def returned(
        self, now: float, turn: Turn, verdict: Verdict, pause: float | None, lane: Lane, *, is_shared: bool
    ) -> bool:
        """Learn from what became of a request; ``True`` if a refusal is taken for the service's own.

        Args:
            now: The time.
            turn: The request's.
            verdict: What the reply says.
            pause: Seconds for which the service asked to send nothing, if it did.
            lane: The account's.
            is_shared: Whether what came may be the service's doing, and not the account's alone.
        """
        probing_before = self._probe_out
        fresh = self._returned(now, turn.sent_at)
        self._probe_out = probing_before and not turn.probe
        self._refusals += _WEIGHT * ((verdict in REFUSALS) - self._refusals)
        try:
            self._adapt(now, turn, verdict)
            if verdict == "answered":
                self._concurrency.granted(turn.others)
                self._recovered += _WEIGHT * (lane.recovers - self._recovered)
                self._heard(now, turn.sent_at, fresh=fresh)
                return False
            if turn.probe and verdict != "nothing":
                self._trip(now, turn.sent_at, verdict, pause)
                return True
            if turn.sent_at < self._resumed_at:
                return False  # sent into an outage that is over
            return is_shared and self._suspected(now, turn, verdict, pause, lane)
        finally:
            self.changed()

    def shrink(self) -> bool:
        """Have one request fewer in flight from now on; ``False`` if there is none to wait for.

        For a machine that can open no more sockets: what is in flight will return one.
        """
        if not self.in_flight:
            return False
        self._cut(float(self.in_flight))
        return True

    def _heard(self, now: float, sent_at: float, *, fresh: bool) -> None:
        """Note that somebody was answered."""
        self.answers += 1
        self._streak.clear()
        self._seen += 1
        if self._state == "out":  # any answer ends an outage, one to an old request too
            self._closed_until, fresh = now, True
        self._silent_since = None
        self._answered(now, sent_at, fresh=fresh)
        if self._state == "limited":
            self._judge()

    def _suspected(self, now: float, turn: Turn, verdict: Verdict, pause: float | None, lane: Lane) -> bool:
        if self._probing:
            if verdict == "throttled" and pause is not None:
                self._throttled(now, turn.sent_at, pause, fresh=False)  # old news, but for the time that it names
            return True
        if verdict in REFUSALS and self._of_concurrency(turn):
            return True
        if verdict in REFUSALS and (self._state == "limited" or self.refuses_many):
            self._seen = 0
            if self._learned is not None and not self._learned.explains_refusals:
                self._learned.throttled(now)
                return False
            self._trip(now, turn.sent_at, "throttled", pause)
            return True
        self._streak.add(lane)
        # Accounts have limits of their own, and few have outages of their own.
        few = _MANY if verdict == "throttled" else _FEW
        if len(self._streak) < self._tolerance * min(max(few, self._peak // _PER_SUSPECT), _MANY):
            return False
        self._trip(now, turn.sent_at, verdict, pause)
        return True

    def _trip(self, now: float, sent_at: float, verdict: Verdict, pause: float | None) -> None:
        """Close the service, until a probe is answered."""
        if self._silent_since is None:
            self._silent_since = now
        self._streak.clear()
        if verdict == "throttled" or (verdict == "unavailable" and self._may_be_limit(now)):
            self._state = "limited"
            self._limit = max(2.0, self._limit / 4) if self.rate is None else self._limit
            self._throttled(now, sent_at, pause, fresh=True)
        else:
            self._state = "out"
            self._failures += 1
            self._cut_at = now
            if verdict == "unavailable" and self._learned is not None:
                self._learned.restart(now)  # if it is a limit after all, what it grants is measured from here
            seconds = min(_LONGEST_PROBE, _FIRST_PROBE * 2.0 ** min(self._failures - 1, 60))
            seconds *= 1 + self.clock.random() / 3
            asked = pause if pause is not None and seconds < pause else None
            self._close(now, seconds if asked is None else asked, asked=asked is not None)
        for waiter in self.waiters():
            if self._closed_until - self._silent_since >= waiter.patience:
                waiter.refuse(self._impatient(now, waiter.patience))

    def _may_be_limit(self, now: float) -> bool:
        """Return whether a 503 that comes now may be a limit's, and not an outage's."""
        if self._state != "limited":
            return now - self._resumed_at < _SOON
        assert self._silent_since is not None
        return now - self._silent_since <= max(_STALL, _FEW / (self.rate or math.inf))

    def _of_concurrency(self, turn: Turn) -> bool:
        """Return whether a refusal is of a limit of requests in flight; if so, keep to that, and to no rate."""
        if turn.sent_at < self._cut_at or not (self._state == "limited" or self._concurrency.limit < math.inf):
            return False
        if not self._concurrency.refused(turn.others):
            return False
        if self._learned is not None:
            self._learned.forget()
        self._limit = min(self._limit, self._concurrency.limit)
        self._emit(ServiceConcurrencyLearned("", int(self._concurrency.limit)))
        return True

    def _judge(self) -> None:
        """Forget a limit under which as much is refused as without it, or nothing: no limit that accounts share."""
        if self.rate is None and self._seen >= _SAMPLE:
            self._state = "open"

    def _adapt(self, now: float, turn: Turn, verdict: Verdict) -> None:
        """Let the number of requests in flight follow what the service can finish in time."""
        took = now - turn.sent_at
        if verdict == "timed out" or (verdict == "answered" and took > _SLOW * self._attempt_timeout):
            # If many others were quick meanwhile, it was no matter of load.
            if turn.sent_at >= self._shrunk_at and self.quick_answers - turn.quick_answers < self._limit:
                self._shrunk_at = now
                limit = (0.5 if verdict == "timed out" else 0.8) * min(self._limit, self.in_flight + 1)
                self._cut(max(limit, min(_LEAST, self._connections)))  # one that hangs must not hold up all others
        elif verdict in {"answered", "failed", "unavailable"} and self._limit < self._connections:
            self._answered_since += 1
            if self._answered_since % _ENOUGH == 0:
                self._step = min(_FAST_STEP, 2 * self._step)
            step = self._step if took <= _FAST * self._attempt_timeout else min(self._step, _SLOW_STEP)
            self._limit = min(float(self._connections), self._concurrency.limit, self._limit + step)
        if verdict == "answered":
            self._slowest = max(took, _FADING * self._slowest)
            self.quick_answers += took <= _FAST * self._attempt_timeout

    def _cut(self, limit: float) -> None:
        self._limit = max(1.0, limit)
        self._step, self._answered_since = _SLOW_STEP, 0

    def _impatient(self, now: float, patience: float) -> TransportError:
        silent = 0.0 if self._silent_since is None else now - self._silent_since
        message = f"the service has answered nobody for {silent:.3g} s, and patience={patience:g} s allows no more"
        return TransportError(message, stop_reason="patience", retry_after=self.paused_for(now) or None)

    def _draw_pause(self) -> float:
        # Other processes take what a long pause leaves.
        seconds = super()._draw_pause()
        return seconds if self._pace.rate is None else min(seconds, max(_LONGEST_PACED, 2 / self._pace.rate))

    def _on_paused(self, seconds: float, *, asked: bool) -> None:
        self._emit(ServicePaused("", seconds, asked, self._state))

    def _on_resumed(self) -> None:
        now = self.clock.monotonic()
        if self._learned is not None and now - self._cut_at > _SOON:
            self._learned.idle()
        self._resumed_at = now
        if self._state == "out":
            self._state = "open" if self._learned is None or self.rate is None else "limited"
            self._shrunk_at = now
            if self._swallows:
                self._swallows = False
                self.abandon()  # its probes, which nobody will answer
        self._emit(ServiceResumed(""))

    def _on_rate(self, rate: float, per: float | None) -> None:
        self._seen = 0
        self._emit(ServiceRateLearned("", rate, per))


def _ignore() -> None:
    """Stand for a transport that has nothing under way."""
