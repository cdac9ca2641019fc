"""Deadlines of many calls on one timer of the event loop.

`asyncio.timeout` sets a timer for each; two of those would cost more than the rest of this package's work on a call.
"""

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Protocol, Self

_TICK: Final = 0.002  # s between two checks, so that thousands of calls with one deadline do not crowd the loop


def is_cancelled() -> bool:
    """Return whether this task was cancelled; otherwise a `CancelledError` came out of an awaitable."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Deadlines:
    """The active scopes of one event loop."""

    def __init__(self) -> None:
        """Create it inside the event loop that will use it."""
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.scopes: set[Scope] = set()
        """Those that are watched."""
        self._timer: asyncio.TimerHandle | None = None
        self.next_look: float = math.inf
        """When they are looked at, on the loop's clock."""
        self.idle: asyncio.Event | None = None
        """Set when none is left; ``None`` if no task waits for that."""

    def within(self, seconds: float) -> "Scope":
        """Return a scope that raises `TimeoutError` after *seconds*."""
        return Scope(self, self.loop.time() + seconds)

    def expire_all(self) -> None:
        """Expire every scope now."""
        for scope in tuple(self.scopes):
            scope.expire()

    async def end(self) -> None:
        """Expire every scope now, and return when all have been left.

        If a key function closes the client that called it, its own scope is not awaited.
        """
        current = [scope for scope in self.scopes if scope.task is asyncio.current_task()]
        for scope in self.scopes.difference(current):
            scope.expire()
        for scope in current:  # the current task must not cancel itself here: its scope expires at the next check
            scope.ends_at = -math.inf
        self._look_at(self.loop.time())
        if self.scopes and not current:
            self.idle = self.idle or asyncio.Event()
            await self.idle.wait()

    def add(self, scope: "Scope") -> None:
        """Watch a scope."""
        self.scopes.add(scope)
        if scope.ends_at < self.next_look:
            self._look_at(scope.ends_at)

    def remove(self, scope: "Scope") -> None:
        """Stop watching a scope. The timer stays, because the next scope rarely ends before it."""
        self.scopes.discard(scope)
        if self.idle is not None and not self.scopes:
            self.idle.set()

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(when, self._look)
        self.next_look = when

    def _look(self) -> None:
        now = self.loop.time()
        self._timer, self.next_look = None, math.inf
        for scope in self.scopes:
            if scope.ends_at <= now:
                scope.expire()
        first = min((scope.ends_at for scope in self.scopes), default=math.inf)
        if first < math.inf:
            self._look_at(max(first, now + _TICK))


class Stage(Protocol):
    """The current phase of a task inside a scope."""

    @property
    def phase(self) -> str:
        """What it waits for."""

    def out_of_time(self) -> None:
        """Note that the scope expires now."""


class Scope:
    """A part of a task that has a deadline."""

    __slots__ = ("_cancelling", "_deadlines", "_left", "ends_at", "expired", "stage", "task")

    def __init__(self, deadlines: Deadlines, ends_at: float) -> None:
        self._deadlines = deadlines
        self._left: float | None = None  # s; while the clock stands still
        self.ends_at: float = ends_at
        self.expired: bool = False
        self.stage: Stage | None = None
        """The task's phase; ``None`` if it reports none."""

    def __enter__(self) -> Self:
        task = asyncio.current_task(self._deadlines.loop)
        assert task is not None
        self.task: asyncio.Task[Any] = task
        self._cancelling = task.cancelling()
        # On the way of every call: `add`, but for what is hardly ever needed.
        if self.ends_at < self._deadlines.next_look:
            self._deadlines.add(self)
        else:
            self._deadlines.scopes.add(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._deadlines.idle is not None:
            self._deadlines.remove(self)
        else:
            self._deadlines.scopes.discard(self)
        # An outside cancellation takes precedence, as in `asyncio.timeout`.
        if self.expired and self.task.uncancel() <= self._cancelling and exc_type is asyncio.CancelledError:
            raise TimeoutError from exc

    def extend(self, seconds: float) -> None:
        """Extend the deadline to at least *seconds* from now."""
        if self._left is None:
            self.ends_at = max(self.ends_at, self._deadlines.loop.time() + seconds)
        else:
            self._left = max(self._left, seconds)

    def check(self) -> None:
        """Raise the `TimeoutError` if the scope has expired but foreign code swallowed the cancellation."""
        if self.expired:
            raise TimeoutError

    def expire(self) -> None:
        """End the scope now."""
        if not self.expired:
            self.expired = True
            self.ends_at = math.inf
            if self.stage is not None:
                self.stage.out_of_time()
            self.task.cancel()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Stop the clock inside the block."""
        self._left = self.ends_at - self._deadlines.loop.time()
        self.ends_at = math.inf
        try:
            yield
        finally:
            left, self._left = self._left, None
            if not self.expired:
                self.ends_at = self._deadlines.loop.time() + left
                self._deadlines.add(self)


class CallTime:
    """The time of one call: a deadline on the client's clock, and the scope that enforces it.

    Args:
        monotonic: The client's clock.
        scope: The scope in which the caller runs the call.
        timeout: Seconds for the call.
        stands_still: Whether delays caused by the service as a whole do not count, as in a job.
    """

    __slots__ = ("_left", "_monotonic", "deadline", "scope", "stands_still", "started", "timeout")

    def __init__(
        self, monotonic: Callable[[], float], scope: Scope, timeout: float, *, stands_still: bool = False
    ) -> None:
        self._left: float | None = None  # s; while the clock stands still
        self._monotonic = monotonic
        self.scope: Scope = scope
        self.started: float = monotonic()
        self.deadline: float = self.started + timeout
        self.timeout: float = timeout
        """Seconds for the whole call."""
        self.stands_still: bool = stands_still

    def extend(self, timeout: float) -> None:
        """Extend the deadline to at least *timeout* seconds from now."""
        now = self._monotonic()
        if self._left is None:
            self.deadline = max(self.deadline, now + timeout)
        else:
            self._left = max(self._left, timeout)
        self.timeout = max(self.timeout, now + timeout - self.started)
        self.scope.extend(timeout)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Stop the clock inside the block."""
        self._left, self.deadline = self.deadline - self._monotonic(), math.inf
        try:
            with self.scope.suspended():
                yield
        finally:
            self.deadline = self._monotonic() + self._left
            self._left = None
