"""Turns: first come, first served for each account and for the service, at their rates, and none after a refusal."""

import asyncio
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import islice
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

from attrs import define, field, frozen

from audiences_async.clock import Clock
from audiences_async.credentials import ApiKey
from audiences_async.deadlines import CallTime, Deadlines, Scope, is_cancelled
from audiences_async.errors import DeadlineExceededError, callback_error
from audiences_async.events import AccountPaused, AccountResumed, Event, EventHook, RateLearned, emit
from audiences_async.models import Account
from audiences_async.rates import KnownRate, LearnedRate, RateLimit

Verdict: TypeAlias = Literal["answered", "throttled", "nothing"]
"""What a request told about the pace: any reply but a 429, a 429, or no reply at all."""

_FIRST_PAUSE: Final = 0.1  # of throttle_base_delay
_IDLE: Final = 1.0  # s without a request, after which an account counts as idle
_LONGEST_PAUSE: Final = 86_400.0  # s; who asks for more has mistaken the unit
_NO_TIME: Final = 1e-9  # s; less than a clock can tell
_LONGEST_ANNOUNCED: Final = 30.0  # s, of a pause that no refusal asked for: it may be misread, and a request will tell
_KEPT_LANES: Final = 4096
_LOOKED_AT: Final = 2  # lanes that are looked at for each new one


@runtime_checkable
class Limiter(Protocol):
    """Any object that says when an account may send, such as a limit that several processes share."""

    async def acquire(self, account_name: str) -> object:
        """Return when the account may send one request. Called before every attempt, retries included."""


class Place(Protocol):
    """A call's place in a job, which it leaves while it waits to retry."""

    held: bool
    """Whether the call is in its place."""

    def leave(self) -> None:
        """Let another account take the place, if there is room for one more that waits."""

    async def enter(self) -> None:
        """Return when there is a place again; at once if it is held."""

    async def borrow(self) -> None:
        """Return when a retry may go that the budget has no tokens for."""

    def give_back(self) -> None:
        """Let the next such retry go, if this call has borrowed."""


@frozen
class AccountPace:
    """How one account is paced right now.

    Attributes:
        account: The account's name.
        rate: Requests per second, known or learned; ``None`` if none is known yet.
        paused_for: Seconds until requests may go again; 0.0 means now.
        waiting: Calls that wait for their turn.
        in_flight: Requests on the wire.
    """

    account: str
    rate: float | None
    paused_for: float
    waiting: int
    in_flight: int


@define(eq=False)
class _Waiter:
    """A call in a lane's queue."""

    deadline: float
    scope: Scope
    refusal: DeadlineExceededError | None = field(default=None)

    def refuse(self, error: DeadlineExceededError) -> None:
        """End the wait at once: the turn cannot come before the deadline."""
        self.refusal = error
        self.scope.expire()


class Queue:
    """First come, first served: one caller at a time waits for the pace, the others for that one."""

    __slots__ = ("_changed", "_deadlines", "_lock", "_waiters", "clock", "in_flight", "limiter")

    def __init__(self, clock: Clock, deadlines: Deadlines, limiter: Limiter | None) -> None:
        self.clock: Clock = clock
        self.limiter: Limiter | None = limiter
        self.in_flight: int = 0
        self._deadlines = deadlines
        self._lock = asyncio.Lock()
        self._waiters: set[_Waiter] = set()
        self._changed = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return len(self._waiters)

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        raise NotImplementedError

    def is_free(self, now: float) -> bool:
        """Return whether a request may go now, ahead of nobody."""
        return not self._waiters and self.limiter is None and self.delay(now) <= 0

    @asynccontextmanager
    async def head(self, deadline: float) -> AsyncIterator[None]:
        """Come to the head of the queue, and stay there for the length of the block.

        Raises:
            DeadlineExceededError: The turn cannot come before the *deadline*, as a pause that begins now shows.
        """
        waiter = _Waiter(deadline, self._deadlines.within(math.inf))
        self._waiters.add(waiter)
        try:
            with waiter.scope:
                async with self._lock:
                    yield
        except TimeoutError:
            if waiter.refusal is None:
                raise
            raise waiter.refusal from None
        finally:
            self._waiters.discard(waiter)

    async def opened(self) -> None:
        """Return when a request may go. For the head of the queue."""
        while (delay := self.delay(self.clock.monotonic())) > _NO_TIME:
            if delay == math.inf:
                self._changed.clear()
                await self._changed.wait()
            else:
                await self.clock.sleep(delay)

    async def ask_limiter(self, setting: str, account: str) -> None:
        """Return when the caller's own limiter agrees, if there is one. For the head of the queue."""
        if self.limiter is None:
            return
        try:
            await self.limiter.acquire(account)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            raise callback_error(f"{setting}.acquire()", error) from error

    def changed(self) -> None:
        """Have the head of the queue look again."""
        self._changed.set()

    def refuse(self, until: float, seconds: float) -> None:
        """End the waits that cannot last *until* then, *seconds* from now."""
        for waiter in tuple(self._waiters):
            if waiter.deadline <= until:
                waiter.refuse(never(seconds))


class Lane(Queue):
    """One account's way to the wire, at the account's pace, and closed after a 429."""

    __slots__ = (
        "_closed_until", "_cut_at", "_failures", "_last_at", "_learned", "_pace", "_pacer", "_probe_out", "_probing",
        "account", "users",
    )  # fmt: skip

    def __init__(self, account: str, pace: KnownRate | LearnedRate, limiter: Limiter | None, pacer: "Pacer") -> None:
        super().__init__(pacer.clock, pacer.deadlines, limiter)
        self.account: str = account
        self.users: int = 0
        """Calls that hold on to the lane, also while they neither wait nor send."""
        self._pace = pace
        self._learned = pace if isinstance(pace, LearnedRate) else None
        self._pacer = pacer
        self._last_at = -math.inf  # when a request last came back
        self._closed_until = -math.inf
        self._cut_at = -math.inf
        self._failures = 0  # 429s in a row, without an answer between them
        self._probing = False
        self._probe_out = False

    @property
    def paces_retries(self) -> bool:
        """Whether a call that got a 429 may leave all waiting to the lane."""
        return self._pace.rate is not None and self._failures <= 1

    def snapshot(self, now: float) -> AccountPace:
        """Return how the account is paced right now."""
        paused_for = max(0.0, self._closed_until - now)
        return AccountPace(self.account, self._pace.rate, paused_for, self.waiting, self.in_flight)

    def is_paused(self, now: float) -> bool:
        """Return whether the account is closed after a 429."""
        return now < self._closed_until

    def is_idle(self, now: float) -> bool:
        """Return whether forgetting the lane would make no difference."""
        return not self.users and not self._failures and self._closed_until <= now and self._pace.is_idle(now)

    def expected(self, now: float) -> float:
        """Estimate the seconds until a call that comes now gets its turn."""
        return max(0.0, self._closed_until - now, self._pace.backlog(now, self.waiting))

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if now < self._closed_until:
            return self._closed_until - now
        if self._probing and self._probe_out:
            return math.inf
        return self._pace.delay(now, self.in_flight)

    def sent(self, now: float) -> None:
        """Note that a request goes now."""
        if self._learned is not None and not self.in_flight and now - self._last_at > _IDLE:
            self._learned.idle()
        self.in_flight += 1
        self._probe_out = self._probing
        self._pace.sent(now)

    def returned(self, now: float, sent_at: float, verdict: Verdict, pause: float | None) -> None:
        """Learn from what became of a request.

        Args:
            now: The time.
            sent_at: When it was sent.
            verdict: What the reply says about the pace.
            pause: Seconds for which the service asked to send nothing, if it did.
        """
        self._last_at = now
        self.in_flight -= 1
        fresh = sent_at >= self._cut_at  # a reply to what was sent before the last cut is old news
        if fresh:
            self._probe_out = False
        try:
            if verdict == "throttled":
                self._throttled(now, pause, fresh=fresh)
            elif verdict == "answered":
                self._answered(now, fresh=fresh)
                if pause is not None:
                    self._close(now, min(pause, _LONGEST_ANNOUNCED), asked=True)
        finally:  # a hook may raise what ends the program, and be mistaken
            self.changed()

    def _answered(self, now: float, *, fresh: bool) -> None:
        if self._learned is not None:
            self._learned.answered()
        if not fresh:
            return
        self._failures = 0
        if self._probing and now >= self._closed_until:
            self._probing = False
            self._paused_until(now)
            self._pacer.emit(AccountResumed(self.account))

    def _throttled(self, now: float, pause: float | None, *, fresh: bool) -> None:
        if not fresh:
            if pause is not None and pause <= _LONGEST_PAUSE:
                self._close(now, pause, asked=True)
            return
        self._failures += 1
        self._cut_at = now
        self._probing = True
        if self._learned is not None and self._learned.throttled(now) and self._learned.rate is not None:
            self._pacer.emit(RateLearned(self.account, self._learned.rate))
        own = self._pacer.pause(self._pace.rate, self._failures)
        asked = pause if pause is not None and own < pause <= _LONGEST_PAUSE else None
        self._close(now, own if asked is None else asked, asked=asked is not None)

    def _close(self, now: float, seconds: float, *, asked: bool) -> None:
        until = now + seconds
        if until <= self._closed_until:
            return
        self._closed_until = until
        self._probing = True
        if asked and self._learned is not None:
            self._learned.idle()  # what the service grants after a pause of its own making measures nothing
        self._paused_until(until)
        self.refuse(until, seconds)
        self._pacer.emit(AccountPaused(self.account, seconds, asked))

    def _paused_until(self, when: float) -> None:
        # A known limit that was not used up during a pause is no more than the burst.
        if self._learned is not None:
            self._learned.paused_until(when)


class ServiceLane(Queue):
    """The way of all accounts together: a known rate, and no more requests in flight than there are connections."""

    __slots__ = ("_connections", "_limit", "_pace")

    def __init__(self, limit: RateLimit | Limiter | None, connections: int, clock: Clock, deadlines: Deadlines) -> None:
        super().__init__(clock, deadlines, limit if isinstance(limit, Limiter) else None)
        self._pace = KnownRate(limit) if isinstance(limit, RateLimit) else None
        self._connections = connections
        self._limit = float(connections)

    def expected(self, now: float) -> float:
        """Estimate the seconds until a call that comes now gets its turn."""
        return 0.0 if self._pace is None else self._pace.backlog(now, self.waiting)

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if self.in_flight >= self._limit:
            return math.inf
        return 0.0 if self._pace is None else self._pace.delay(now, self.in_flight)

    def sent(self, now: float) -> None:
        """Note that a request goes now."""
        self.in_flight += 1
        if self._pace is not None:
            self._pace.sent(now)

    def returned(self, verdict: Verdict) -> None:
        """Note that a request has come to its end."""
        self.in_flight -= 1
        if verdict == "answered" and self._limit < self._connections:
            self._limit = min(self._connections, self._limit + 1 / self._limit)
        self.changed()

    def shrink(self) -> bool:
        """Have one request fewer in flight from now on; ``False`` if there is none to wait for.

        For a machine that can open no more sockets: what is in flight will return one.
        """
        if not self.in_flight:
            return False
        self._limit = max(1.0, min(self._limit, self.in_flight + 1) - 1)
        return True


def never(seconds: float) -> DeadlineExceededError:
    """Return the error of a call whose turn comes in *seconds*, after its deadline."""
    message = f"the account's next request may go in {seconds:.3g} s, which does not fit into the call's timeout"
    return DeadlineExceededError(message, retry_after=seconds, stop_reason="deadline")


class Pacer:
    """The lanes of one client: the service's, and one for each account.

    Args:
        limit: What is known of each account's rate; ``None`` means that it is learned.
        service_limit: What is known of the rate of all accounts together; ``None`` means nothing.
        connections: Requests that may be in flight at the same time.
        clock: Where the time comes from.
        deadlines: Where waits are bounded.
        throttle_base_delay: Seconds; the first pauses after a 429 are a tenth of it, until a rate is learned.
        max_delay: Seconds of the longest pause that no refusal asked for.
        on_event: Called with pauses and rates.
    """

    def __init__(
        self,
        limit: RateLimit | Limiter | None,
        service_limit: RateLimit | Limiter | None,
        connections: int,
        clock: Clock,
        deadlines: Deadlines,
        *,
        throttle_base_delay: float,
        max_delay: float,
        on_event: EventHook | None,
    ) -> None:
        self.clock: Clock = clock
        self.deadlines: Deadlines = deadlines
        self.longest_pause: float = max_delay
        self.service: ServiceLane = ServiceLane(service_limit, connections, clock, deadlines)
        self._limit = limit
        self._first_pause = _FIRST_PAUSE * throttle_base_delay
        self._on_event = on_event
        self._lanes: OrderedDict[Account | str, Lane] = OrderedDict()

    def lane(self, account: Account) -> Lane:
        """Return the account's lane. Functions for keys do not compare, so their accounts are told apart by name."""
        key = account if isinstance(account.credential, ApiKey) else account.name
        lane = self._lanes.get(key)
        if lane is None:
            self._forget_idle()
            limiter = self._limit if isinstance(self._limit, Limiter) else None
            lane = self._lanes[key] = Lane(account.name, self._new_pace(), limiter, self)
        return lane

    def _new_pace(self) -> KnownRate | LearnedRate:
        if self._limit is None:
            return LearnedRate()
        return KnownRate(self._limit if isinstance(self._limit, RateLimit) else None)

    async def acquire(self, lane: Lane, time: CallTime, place: Place | None) -> float:
        """Return when a request of the lane's account may go; the time, to be given to `release`.

        Args:
            lane: The account's.
            time: The time of the call.
            place: Its place in a job, held again when this returns; ``None`` if it is of no job.

        Raises:
            DeadlineExceededError: The turn cannot come before the call's deadline.
            ConfigurationError: A limiter of the caller's is wrong.
            TransportError: A limiter of the caller's failed for a reason that may pass.
        """
        now = self.clock.monotonic()
        if lane.is_free(now) and self.service.is_free(now) and (place is None or place.held):
            return self._send(lane, now)
        expected = max(lane.expected(now), 0.0 if time.stands_still else self.service.expected(now))
        if now + expected >= time.deadline:
            raise never(expected)
        async with lane.head(time.deadline):
            await lane.opened()
            await lane.ask_limiter("rate_limit", lane.account)
            while True:
                await lane.opened()
                with time.held():
                    if place is not None:
                        await place.enter()
                    async with self.service.head(time.deadline):
                        await self.service.ask_limiter("service_rate_limit", lane.account)
                        await self.service.opened()
                        now = self.clock.monotonic()
                        if lane.delay(now) <= _NO_TIME:  # it may have been closed meanwhile
                            return self._send(lane, now)

    def _send(self, lane: Lane, now: float) -> float:
        lane.sent(now)
        self.service.sent(now)
        return now

    def release(self, lane: Lane, sent_at: float, verdict: Verdict, *, pause: float | None = None) -> None:
        """Take in what became of a request; see `Lane.returned`."""
        self.service.returned(verdict)
        lane.returned(self.clock.monotonic(), sent_at, verdict, pause)

    def expected(self, lane: Lane, time: CallTime) -> float:
        """Estimate the seconds until a call that comes now gets its turn, as far as they count for its time."""
        now = self.clock.monotonic()
        return lane.expected(now) if time.stands_still else max(lane.expected(now), self.service.expected(now))

    def snapshot(self) -> Iterator[AccountPace]:
        """Return how each account is paced right now."""
        now = self.clock.monotonic()
        return (lane.snapshot(now) for lane in self._lanes.values())

    def pause(self, rate: float | None, failures: int) -> float:
        """Draw the seconds to pause after *failures* 429s in a row that name no time."""
        base = self._first_pause / 2 if rate is None else min(1 / rate, self.longest_pause)
        doubled = base * 2.0 ** min(failures - 1, 60)
        return min(self.longest_pause, doubled * (1 + self.clock.random()))

    def emit(self, event: Event) -> None:
        """Log the event, and call the hook."""
        emit(self._on_event, event)

    def _forget_idle(self) -> None:
        """Drop idle lanes from the oldest on, so that memory follows the accounts in use."""
        now = self.clock.monotonic()
        for key, lane in list(islice(self._lanes.items(), _LOOKED_AT)):
            full = len(self._lanes) >= _KEPT_LANES
            if lane.is_idle(now) or (full and not lane.users and not lane.is_paused(now)):
                del self._lanes[key]
            else:
                self._lanes.move_to_end(key)
