"""Turns: first come, first served for each account and for the service, at their rates, and none after a refusal."""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from attrs import define, field, frozen

from audiences_async.allowance import Allowance
from audiences_async.clock import Clock
from audiences_async.deadlines import Deadlines, Scope, is_cancelled
from audiences_async.errors import DeadlineExceededError, TransportError, callback_error
from audiences_async.events import AccountPaused, AccountResumed, Event, RateLearned
from audiences_async.learning import LearnedRate
from audiences_async.quota import Quota
from audiences_async.rates import KnownRate, RateLimit
from audiences_async.windows import LearnedWindow

Verdict: TypeAlias = Literal["answered", "throttled", "unavailable", "failed", "lost", "timed out", "nothing"]
"""What became of a request: an answer, if only a final refusal; a 429; a 503; another reply that may be retried; no
reply; none in time; or nothing that says anything of the service."""

_IDLE: Final = 1.0  # s without a request, after which an account counts as idle
_LONGEST_PAUSE: Final = 86_400.0  # s; who asks for more has mistaken the unit
NO_TIME: Final = 1e-9  # s; less than a clock can tell
_LONGEST_ANNOUNCED: Final = 30.0  # s, of a pause that no refusal asked for: it may be misread, and a request will tell
_DOUBLINGS: Final = 5  # pauses, each twice as long as the one before
_LATER: Final = 6.2  # the next ones: a quarter of the time since the first refusal
_RECENT: Final = 1.0  # s; what an account has sent in it may explain a refusal


@runtime_checkable
class Limiter(Protocol):
    """Any object that says when an account may send, such as a limit that several processes share."""

    async def acquire(self, account_name: str) -> object:
        """Return when the account may send one request. Called before every attempt, retries included."""


class Turn(NamedTuple):
    """A request's turn.

    Attributes:
        sent_at: When it came, on the client's clock.
        probe: Whether the service is closed, and this request shows whether it opens again.
        quick_answers: Quick answers of the service before it.
        others: Other requests in flight.
    """

    sent_at: float
    probe: bool
    quick_answers: int
    others: int


class Place(Protocol):
    """A call's place in a job, which it leaves while it waits to retry."""

    held: bool
    """Whether the call is in its place."""
    patience: float
    """Seconds that the job waits while the service answers nobody."""

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
class Waiter:
    """A call in a queue.

    Attributes:
        deadline: When it must have had its turn, on the client's clock.
        patience: Seconds that it waits while the service answers nobody.
        scope: What ends its wait.
        refusal: Why it was ended.
    """

    deadline: float
    patience: float
    scope: Scope
    refusal: DeadlineExceededError | TransportError | None = field(default=None)

    def refuse(self, error: DeadlineExceededError | TransportError) -> None:
        """End the wait at once."""
        self.refusal = error
        self.scope.expire()


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
        """Draw the seconds to pause after so many refusals in a row."""
        base = self.first / 2 if rate is None else min(max(0.5 / rate, self.first / 20), self.longest)
        # A limit that is closed for longer may be a window, whose end is not to be missed by as much again.
        times = 2.0 ** (failures - 1) if failures <= _DOUBLINGS else _LATER * 1.25 ** min(failures - _DOUBLINGS, 60)
        return min(self.longest, base * times * (1 + clock.random()))


class Queue(ABC):
    """First come, first served: one caller at a time waits for the pace, the others for that one."""

    __slots__ = ("_changed", "_deadlines", "_lock", "_waiters", "clock", "in_flight", "limiter")

    def __init__(self, clock: Clock, deadlines: Deadlines, limiter: Limiter | None) -> None:
        self.clock: Clock = clock
        self.limiter: Limiter | None = limiter
        self.in_flight: int = 0
        self._deadlines = deadlines
        self._lock = asyncio.Lock()
        self._waiters: set[Waiter] = set()
        self._changed = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return len(self._waiters)

    @abstractmethod
    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""

    def is_free(self, now: float) -> bool:
        """Return whether a request may go now, ahead of nobody."""
        return not self._waiters and self.limiter is None and self.delay(now) <= 0

    @asynccontextmanager
    async def head(self, deadline: float, patience: float = math.inf) -> AsyncIterator[None]:
        """Come to the head of the queue, and stay there for the length of the block.

        Raises:
            DeadlineExceededError: The turn cannot come before the *deadline*, as a pause that begins now shows.
            TransportError: The service has answered no account for *patience* seconds.
        """
        waiter = Waiter(deadline, patience, self._deadlines.within(math.inf))
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
        while (delay := self.delay(self.clock.monotonic())) > NO_TIME:
            await self._wait(delay)

    async def _wait(self, delay: float) -> None:
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

    def waiters(self) -> tuple[Waiter, ...]:
        """Return the calls that wait."""
        return tuple(self._waiters)


class PacedQueue(Queue):
    """A queue at a known or a learned rate, closed for a while after a refusal; one probe then goes ahead."""

    __slots__ = (
        "_allowance", "_closed_until", "_cut_at", "_failures", "_last_at", "_learned", "_pace", "_probe_out",
        "_probing", "_settings", "_window",
    )  # fmt: skip

    in_flight: int

    def __init__(
        self,
        limit: RateLimit | Limiter | None,
        learned: LearnedRate,
        clock: Clock,
        deadlines: Deadlines,
        settings: PauseSettings,
    ) -> None:
        super().__init__(clock, deadlines, limit if isinstance(limit, Limiter) else None)
        self._learned = learned if limit is None else None
        self._pace: KnownRate | LearnedRate = (
            learned if limit is None else KnownRate(limit if isinstance(limit, RateLimit) else None)
        )
        self._window = LearnedWindow()
        self._allowance: Allowance | None = None  # if the service announces its quota
        self._settings = settings
        self._last_at = -math.inf  # when a request last came back
        self._closed_until = -math.inf
        self._cut_at = -math.inf
        self._failures = 0  # refusals in a row, without an answer between them
        self._probing = False
        self._probe_out = False

    @property
    def rate(self) -> float | None:
        """Requests per second, known or learned; ``None`` if none is known."""
        return self._window.rate or self._pace.rate

    @property
    def paces_retries(self) -> bool:
        """Whether a call that was refused may leave all waiting to the queue."""
        return self.rate is not None and self._failures <= 1

    def paused_for(self, now: float) -> float:
        """Return the seconds until requests may go again after a refusal; 0.0 means now."""
        return max(0.0, self._closed_until - now)

    def expected(self, now: float) -> float:
        """Estimate the seconds until a call that comes now gets its turn."""
        backlog = max(self._pace.backlog(now, self.waiting), self._window.backlog(now, self.waiting))
        return max(0.0, self._closed_until - now, backlog)

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if now < self._closed_until:
            return self._closed_until - now
        if self._probing and self._probe_out:
            return math.inf
        delay = self._pace.delay(now, self.in_flight)
        if self._window.limit is not None:
            delay = max(delay, self._window.delay(now, self.in_flight))
        return delay if self._allowance is None else max(delay, self._allowance.delay(now, self.in_flight))

    def sent(self, now: float) -> bool:
        """Note that a request goes now; ``True`` if it is a probe."""
        # A pause is not idleness: calls wait for its end.
        idle_for = now - max(self._last_at, self._closed_until)
        if self._learned is not None and not self.in_flight and idle_for > _IDLE:
            self._learned.idle()
        self.in_flight += 1
        self._probe_out = self._probing
        self._pace.sent(now)
        return self._probing

    def announced(self, now: float, sent_at: float, quota: Quota | None) -> None:
        """Keep to the *quota* announced in the reply to a request sent at *sent_at*; ``None`` if there was none."""
        if quota is not None:
            self._allowance = self._allowance or Allowance()
            self._allowance.announced(now, sent_at, quota)
        elif self._allowance is not None:
            self._allowance.not_announced(now)

    def _returned(self, now: float, sent_at: float) -> bool:
        """Note that a request has come to its end; ``False`` if it was sent before the last cut, and is old news."""
        self._last_at = now
        self.in_flight -= 1
        fresh = sent_at >= self._cut_at
        if fresh:
            self._probe_out = False
        return fresh

    def _answered(self, now: float, sent_at: float, *, fresh: bool) -> None:
        if self._learned is not None:
            self._learned.answered(now - sent_at, fresh=fresh)
            self._window.granted(now, sent_at, fresh=fresh, is_paced=self._learned.rate is not None)
        if not fresh:
            return
        self._failures = 0
        if self._probing and now >= self._closed_until:
            self._probing = False
            self._paused_until(now)
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
        if self._learned is not None:
            until_open = self._window.refused(sent_at)
            if until_open is not None:
                self._learned.forget()
                assert self._window.rate is not None
                self._on_rate(self._window.rate, self._window.period)
                return until_open
            if self._learned.throttled(now, asked=asked):
                assert self._learned.rate is not None
                self._on_rate(self._learned.rate, None)
        return self._draw_pause()

    def _draw_pause(self) -> float:
        """Draw the seconds to pause after a refusal that names no time."""
        return self._settings.draw(self._pace.rate, self._failures, self.clock)

    def _close(self, now: float, seconds: float, *, asked: bool) -> None:
        self._probing = True
        until = now + seconds
        if until <= self._closed_until:
            return
        if asked and self._learned is not None:
            self._learned.excuse(until - max(now, self._closed_until))
        self._closed_until = until
        self._paused_until(until)
        for waiter in self.waiters():
            if waiter.deadline <= until:
                waiter.refuse(never(seconds))
        self._on_paused(seconds, asked=asked)

    def _paused_until(self, when: float) -> None:
        # A known limit that was not used up during a pause is no more than the burst.
        if self._learned is not None:
            self._learned.paused_until(when)

    @abstractmethod
    def _on_paused(self, seconds: float, *, asked: bool) -> None:
        """Note that requests stop."""

    @abstractmethod
    def _on_resumed(self) -> None:
        """Note that they go again."""

    @abstractmethod
    def _on_rate(self, rate: float, per: float | None) -> None:
        """Note a new measure of the rate."""


class Lane(PacedQueue):
    """One account's way to the wire, at the account's pace, and closed after a 429."""

    __slots__ = ("_alone", "_emit", "_granted_at", "_suspected_at", "account", "users")

    def __init__(
        self,
        account: str,
        *,
        limit: RateLimit | Limiter | None,
        clock: Clock,
        deadlines: Deadlines,
        settings: PauseSettings,
        emit: Callable[[Event], None],
    ) -> None:
        super().__init__(limit, LearnedRate(), clock, deadlines, settings)
        self.account: str = account
        self.users: int = 0
        """Calls that hold on to the lane, also while they neither wait nor send."""
        self._emit = emit
        self._granted_at = -math.inf
        self._suspected_at: int | None = None  # answers of the service when this account began to come to nothing
        self._alone = False  # whether others were answered since then

    def snapshot(self, now: float) -> AccountPace:
        """Return how the account is paced right now."""
        return AccountPace(self.account, self.rate, self.paused_for(now), self.waiting, self.in_flight)

    def is_paused(self, now: float) -> bool:
        """Return whether the account is closed after a 429."""
        return now < self._closed_until

    def is_idle(self, now: float) -> bool:
        """Return whether forgetting the lane would make no difference."""
        return (
            not self.users
            and not self._failures
            and self._closed_until <= now
            and self._pace.is_idle(now)
            and self._window.limit is None
        )

    def explains(self, sent_at: float) -> bool:
        """Return whether a refusal of what was sent then can be the account's own doing: it has sent others lately."""
        if self.in_flight > 1 or sent_at - self._granted_at < _RECENT:
            return True
        return self.rate is not None and sent_at - self._granted_at < 2 / self.rate

    def fails_alone(self, answers: int) -> bool:
        """Return whether others have been answered between two failures of this account; and remember this one.

        Args:
            answers: Answers that the service has given so far.
        """
        if self._suspected_at is None:
            self._suspected_at = answers
        elif answers > self._suspected_at:
            self._alone = True
        return self._alone

    @property
    def recovers(self) -> bool:
        """Whether its last request came to nothing; that it is answered now shows that this was not its own doing."""
        return self._suspected_at is not None

    def returned(self, now: float, sent_at: float, verdict: Verdict, pause: float | None) -> None:
        """Learn from what became of a request.

        Args:
            now: The time.
            sent_at: When it was sent.
            verdict: What the reply says about the account's pace.
            pause: Seconds for which the service asked to send nothing, if it did.
        """
        fresh = self._returned(now, sent_at)
        try:
            if verdict == "throttled":
                self._throttled(now, sent_at, pause, fresh=fresh)
            elif verdict in {"answered", "failed", "unavailable"}:
                if verdict == "answered":
                    self._granted_at, self._suspected_at, self._alone = now, None, False
                self._answered(now, sent_at, fresh=fresh)  # the account's limit let it through
                if pause is not None and verdict != "unavailable":
                    self._close(now, min(pause, _LONGEST_ANNOUNCED), asked=True)
        finally:  # a hook may raise what ends the program, and be mistaken
            self.changed()

    def _on_paused(self, seconds: float, *, asked: bool) -> None:
        self._emit(AccountPaused(self.account, seconds, asked))

    def _on_resumed(self) -> None:
        self._emit(AccountResumed(self.account))

    def _on_rate(self, rate: float, per: float | None) -> None:
        self._emit(RateLearned(self.account, rate, per))


def never(seconds: float) -> DeadlineExceededError:
    """Return the error of a call whose turn comes in *seconds*, after its deadline."""
    message = f"the account's next request may go in {seconds:.3g} s, which does not fit into the call's timeout"
    return DeadlineExceededError(message, retry_after=seconds, stop_reason="deadline")
