"""A queue of calls: first come, first served, and only the first one waits for the pace."""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from attrs import define, field

from audiences_async._base.deadlines import Deadlines, Scope, is_cancelled
from audiences_async.clock import Clock
from audiences_async.errors import DeadlineExceededError, TransportError, callback_error
from audiences_async.policies import Limiter

NO_TIME: Final = 1e-9
"""Seconds; less than a clock can resolve."""


@define(eq=False)
class Waiter:
    """A call in a queue.

    Attributes:
        deadline: When it must have had its turn, on the client's clock.
        patience: Seconds that it waits while the service answers no account.
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


class Queue(ABC):
    """Serve callers in order of arrival: the first waits for the pace, the others for the first."""

    __slots__ = ("_changed", "_deadlines", "_lock", "_waiters", "clock", "in_flight", "limiter")

    def __init__(self, clock: Clock, deadlines: Deadlines, limiter: Limiter | None) -> None:
        self.clock: Clock = clock
        self.limiter: Limiter | None = limiter
        self.in_flight: int = 0
        self._deadlines = deadlines
        self._waiters: set[Waiter] = set()
        # Made when a call has to wait: a job makes a queue for each account, and most calls never wait.
        self._lock: asyncio.Lock | None = None
        self._changed: asyncio.Event | None = None

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return len(self._waiters)

    @abstractmethod
    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""

    def is_free(self, now: float) -> bool:
        """Return whether a request may go now, without passing a waiting call."""
        return not self._waiters and self.limiter is None and self.delay(now) <= 0

    @asynccontextmanager
    async def head(self, deadline: float, patience: float = math.inf) -> AsyncIterator[None]:
        """Come to the head of the queue, and stay there for the length of the block.

        Raises:
            DeadlineExceededError: The turn cannot come before the *deadline*, as a pause that begins now shows.
            TransportError: The service has answered no account for *patience* seconds.
        """
        self._lock = self._lock or asyncio.Lock()
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
            await self.wait(delay)

    async def wait(self, delay: float) -> None:
        """Return after *delay* seconds, or, if that is ``inf``, when something has changed."""
        if delay == math.inf:
            await self._change()
        else:
            await self.clock.sleep(delay)

    async def _change(self) -> None:
        """Return when something has changed that may let a request go."""
        self._changed = self._changed or asyncio.Event()
        self._changed.clear()
        await self._changed.wait()

    async def ask_limiter(self, setting: str, account: str, timeout: float = math.inf) -> None:
        """Return when the caller's own limiter agrees, if there is one. For the head of the queue.

        Args:
            setting: Name of the limiter's setting, for messages.
            account: The account's name.
            timeout: Seconds until the call's deadline, for a limiter that refuses a wait that does not fit.
        """
        if self.limiter is None:
            return
        try:
            await acquire(self.limiter, account, timeout)
        except (DeadlineExceededError, TransportError):
            raise  # of a limiter that uses this package's errors
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            raise callback_error(f"{setting}.acquire()", error) from error

    def changed(self) -> None:
        """Have the head of the queue look again."""
        if self._changed is not None:
            self._changed.set()

    def waiters(self) -> tuple[Waiter, ...]:
        """Return the calls that wait."""
        return tuple(self._waiters)


async def acquire(limiter: Limiter, account: str, timeout: float) -> None:
    """Wait for a limiter of a user's own, which may be one that knows deadlines.

    Args:
        limiter: The limiter.
        account: The account's name.
        timeout: Seconds until the call's deadline.
    """
    within = getattr(limiter, "acquire_within", None)
    await (limiter.acquire(account) if within is None else within(account, timeout))
