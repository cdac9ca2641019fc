"""Turns: first come, first served for each account, at its rate, and none for a while after a 429."""

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import islice
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

from attrs import frozen

from audiences_async.clock import Clock
from audiences_async.credentials import ApiKey
from audiences_async.deadlines import is_cancelled
from audiences_async.errors import ConfigurationError, DeadlineExceededError
from audiences_async.events import AccountPaused, AccountResumed, Event, EventHook, RateLearned, emit
from audiences_async.models import Account
from audiences_async.rates import KnownRate, LearnedRate, RateElsewhere, RateLimit

Verdict: TypeAlias = Literal["answered", "throttled", "nothing"]
"""What a request told about the pace: any reply but a 429, a 429, or no reply at all."""

_FIRST_PAUSE: Final = 0.1  # of throttle_base_delay
_IDLE: Final = 1.0  # s without a request, after which an account counts as idle
_LONGEST_PAUSE: Final = 86_400.0  # s; who asks for more has mistaken the unit
_NO_TIME: Final = 1e-9  # s; less than a clock can tell
_KEPT_LANES: Final = 4096
_LOOKED_AT: Final = 2  # lanes that are looked at for each new one


@runtime_checkable
class Limiter(Protocol):
    """Any object that says when an account may send, such as a limit that several processes share."""

    async def acquire(self, account_name: str) -> object:
        """Return when the account may send one request. Called before every attempt, retries included."""


@frozen
class AccountPace:
    """How one account is paced right now.

    Attributes:
        account: The account's name.
        rate: Requests per second, known or learned; ``None`` where none is known yet.
        paused_for: Seconds until requests may go again; 0.0 means now.
        waiting: Calls that wait for their turn.
        in_flight: Requests on the wire.
    """

    account: str
    rate: float | None
    paused_for: float
    waiting: int
    in_flight: int


class Slots:
    """Connection slots, handed on in the order asked for.

    Of our own because asyncio's semaphore cannot be taken without waiting, and takes a microsecond where nobody waits.
    """

    __slots__ = ("_free", "_waiters")

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiters: deque[asyncio.Future[None]] = deque()

    def take(self) -> bool:
        """Take a slot if one is free; ``False`` if not."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def wait(self) -> None:
        """Take a slot, once there is one."""
        if self.take():
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Give a slot back, to the first who waits."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1


class _Waiter:
    """A call in a lane's queue."""

    __slots__ = ("deadline", "refused", "turn")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.refused: DeadlineExceededError | ConfigurationError | None = None
        self.turn: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def refuse(self, error: DeadlineExceededError | ConfigurationError) -> None:
        """The turn will not come. A result and no exception: nobody may be left to take it."""
        if not self.turn.done():
            self.refused = error
            self.turn.set_result(-math.inf)


class Lane:
    """One account's way to the wire: first come, first served, at the account's pace, and closed after a 429."""

    __slots__ = (
        "_changed", "_closed_until", "_cut_at", "_driver", "_failures", "_last_at", "_limiter", "_now", "_pace",
        "_pacer", "_probe_out", "_probing", "_queue", "_slots", "account", "in_flight", "users", "waiting",
    )  # fmt: skip

    def __init__(self, account: str, pace: KnownRate | LearnedRate, limiter: Limiter | None, pacer: "Pacer") -> None:
        self.account: str = account
        self.users: int = 0
        """Calls that hold on to the lane, also while they neither wait nor send."""
        self.in_flight: int = 0
        self.waiting: int = 0
        self._pace = pace
        self._limiter = limiter
        self._pacer = pacer
        self._last_at = -math.inf  # when a request last came back
        self._now = pacer.clock.monotonic
        self._slots = pacer.slots
        self._queue: deque[_Waiter] = deque()
        self._driver: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
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
        """How the account is paced right now."""
        paused_for = max(0.0, self._closed_until - now)
        return AccountPace(self.account, self._pace.rate, paused_for, self.waiting, self.in_flight)

    def is_paused(self, now: float) -> bool:
        """Whether the account is closed after a 429."""
        return now < self._closed_until

    def is_idle(self, now: float) -> bool:
        """Whether forgetting the lane would make no difference."""
        return not self.users and not self._failures and self._closed_until <= now and self._pace.is_idle(now)

    def expected(self, now: float) -> float:
        """Seconds until a call that comes now gets its turn, as far as is known."""
        return max(0.0, self._closed_until - now, self._pace.backlog(now, self.waiting))

    async def acquire(self, deadline: float) -> float:
        """Return when it is this call's turn, with a connection slot taken; when that was, to be given to `release`.

        Raises:
            DeadlineExceededError: The turn will not come before the *deadline*.
        """
        now = self._now()
        is_open = not (self.waiting or self._probing or self._limiter) and self._closed_until <= now
        if is_open and self._pace.delay(now, self.in_flight) <= 0 and self._slots.take():
            if not self.in_flight and now - self._last_at > _IDLE:
                self._pace.idle()
            self._send(now)
            return now
        expected = self.expected(now)
        if now + expected >= deadline:
            raise _never(expected)
        return await self._queued(_Waiter(deadline))

    def release(self, sent_at: float, verdict: Verdict, *, pause: float | None = None) -> None:
        """Give the slot back, and say what became of the request.

        Args:
            sent_at: What `acquire` gave.
            verdict: What the reply tells about the pace.
            pause: Seconds for which the service asked to send nothing, if it did.
        """
        now = self._now()
        self._slots.release()
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
                    self._close(now, pause, asked=True)
        finally:  # a hook may raise what ends the program, and be mistaken
            self._changed.set()

    def cancel(self) -> None:
        """End the lane's task."""
        if self._driver is not None:
            self._driver.cancel()

    def _delay(self, now: float) -> float:
        if now < self._closed_until:
            return self._closed_until - now
        if self._probing and self._probe_out:
            return math.inf
        return self._pace.delay(now, self.in_flight)

    def _send(self, now: float) -> None:
        self.in_flight += 1
        self._probe_out = self._probing
        self._pace.sent(now)

    def _answered(self, now: float, *, fresh: bool) -> None:
        self._pace.answered()
        if not fresh:
            return
        self._failures = 0
        if self._probing and now >= self._closed_until:
            self._probing = False
            self._pace.paused_until(now)
            self._pacer.tell(AccountResumed(self.account))

    def _throttled(self, now: float, pause: float | None, *, fresh: bool) -> None:
        if not fresh:
            if pause is not None and pause <= _LONGEST_PAUSE:
                self._close(now, pause, asked=True)
            return
        self._failures += 1
        self._cut_at = now
        self._probing = True
        if self._pace.throttled(now) and self._pace.rate is not None:
            self._pacer.tell(RateLearned(self.account, self._pace.rate))
        own = self._pacer.pause(self._pace.rate, self._failures)
        asked = pause if pause is not None and own < pause <= _LONGEST_PAUSE else None
        self._close(now, own if asked is None else asked, asked=asked is not None)

    def _close(self, now: float, seconds: float, *, asked: bool) -> None:
        until = now + seconds
        if until <= self._closed_until:
            return
        self._closed_until = until
        self._probing = True
        if asked:
            self._pace.idle()  # what the service grants after a pause of its own making measures nothing
        self._pace.paused_until(until)
        for waiter in self._queue:
            if waiter.deadline <= until:
                waiter.refuse(_never(seconds))
        self._pacer.tell(AccountPaused(self.account, seconds, asked))

    async def _queued(self, waiter: _Waiter) -> float:
        self._queue.append(waiter)
        self.waiting += 1
        if self._driver is None or self._driver.done():
            self._driver = asyncio.get_running_loop().create_task(self._drive())
        try:
            turn = await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.refused is None:
                self._give_back()
            raise
        finally:
            self.waiting -= 1
            self._leave()
        if waiter.refused is not None:
            raise waiter.refused
        return turn

    def _give_back(self) -> None:
        """The turn of a call that was cancelled before it could use it goes to the next one."""
        self._slots.release()
        self.in_flight -= 1
        self._probe_out = False
        self._pace.not_sent()
        self._changed.set()

    def _leave(self) -> None:
        if not self.waiting:
            self._queue.clear()
            self.cancel()
            self._driver = None

    async def _drive(self) -> None:
        """Give turns to the queue until it is empty; the one place that sleeps for a lane."""
        try:
            while self._queue:
                await self._wait_or_give_turn(self._delay(self._now()))
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            for waiter in self._queue:  # who must hear of it
                refusal = ConfigurationError(f"rate_limit.acquire(), or the clock, raised {type(error).__name__}")
                refusal.__cause__ = error
                waiter.refuse(refusal)

    async def _wait_or_give_turn(self, delay: float) -> None:
        if delay == math.inf:
            self._changed.clear()
            await self._changed.wait()
        elif delay > _NO_TIME:
            await self._pacer.clock.sleep(delay)
        else:
            await self._give_turn()

    async def _give_turn(self) -> None:
        if self._limiter is not None:
            await self._limiter.acquire(self.account)
        await self._slots.wait()
        now = self._now()
        while self._queue and self._queue[0].turn.done():
            self._queue.popleft()
        if not self._queue or self._delay(now) > _NO_TIME:  # things changed while all slots were taken
            self._slots.release()
            return
        self._send(now)
        self._queue.popleft().turn.set_result(now)


def _never(seconds: float) -> DeadlineExceededError:
    message = f"the account's next request may go in {seconds:.3g} s, which does not fit into the call's timeout"
    return DeadlineExceededError(message, retry_after=seconds, stop_reason="deadline")


class Pacer:
    """The lanes of one client's accounts, and the connection slots that they share.

    Args:
        limit: What is known of each account's rate; ``None`` means that it is learned.
        slots: Taken for each request, when it goes.
        clock: Where the time comes from.
        throttle_base_delay: Seconds; the first pauses after a 429 are a tenth of it, until a rate is learned.
        max_delay: Seconds of the longest pause that the service did not ask for.
        on_event: Told of pauses and rates.
    """

    def __init__(
        self,
        limit: RateLimit | Limiter | None,
        slots: Slots,
        clock: Clock,
        *,
        throttle_base_delay: float,
        max_delay: float,
        on_event: EventHook | None,
    ) -> None:
        self.slots: Slots = slots
        self.clock: Clock = clock
        self._limit = limit
        self._first_pause = _FIRST_PAUSE * throttle_base_delay
        self._max_pause = max_delay
        self._on_event = on_event
        self._lanes: OrderedDict[Account | str, Lane] = OrderedDict()

    def lane(self, account: Account) -> Lane:
        """The account's lane. Functions for keys do not compare, so accounts that have one are told apart by name."""
        key = account if isinstance(account.credential, ApiKey) else account.name
        lane = self._lanes.get(key)
        if lane is None:
            self._forget_idle()
            limiter = self._limit if not isinstance(self._limit, RateLimit) else None
            lane = self._lanes[key] = Lane(account.name, self._new_pace(), limiter, self)
        return lane

    def _new_pace(self) -> KnownRate | LearnedRate:
        if self._limit is None:
            return LearnedRate()
        return KnownRate(self._limit) if isinstance(self._limit, RateLimit) else RateElsewhere()

    def snapshot(self) -> Iterator[AccountPace]:
        """How each account is paced right now."""
        now = self.clock.monotonic()
        return (lane.snapshot(now) for lane in self._lanes.values())

    def cancel(self) -> None:
        """End all tasks."""
        for lane in self._lanes.values():
            lane.cancel()

    def pause(self, rate: float | None, failures: int) -> float:
        """Seconds to pause after so many 429s in a row, where the service names no time; about half of it is drawn."""
        base = self._first_pause / 2 if rate is None else min(1 / rate, self._max_pause)
        doubled = base * 2.0 ** min(failures - 1, 60)
        return min(self._max_pause, doubled * (1 + self.clock.random()))

    def tell(self, event: Event) -> None:
        """Tell whoever listens."""
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
