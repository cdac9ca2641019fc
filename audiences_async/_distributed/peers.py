"""Share what the workers of a queue learn of the service, twice a second through Redis."""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import msgspec
from docket import Docket

from audiences_async._distributed.connection import DocketError, exchange
from audiences_async._distributed.shares import Pace, Share
from audiences_async._pace.queue import acquire
from audiences_async.errors import TransportError
from audiences_async.events import AttemptFinished, Event, ServicePaused, ServiceResumed
from audiences_async.policies import Limiter, RateLimit, RetryPolicy

KEY: Final = "reports"
"""Name of the hash with the reports, below the queue's prefix."""
FRESH: Final = 3.0
"""Seconds for which a report counts."""

_EVERY: Final = 0.5  # s between two reports
_KEPT: Final = 60.0  # s after which another worker removes the report of one that died
_TURN: Final = 2.0  # s for which a worker is the one that probes
_RETRIED: Final = RetryPolicy().statuses  # any other shows that the service answers, as the client sees it too
_SETTLED: Final = 1.0  # s; a shorter pause for which the service named no time belongs to learning its rate


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's report to the others.

    Attributes:
        at: Time of the report, in seconds by the clock of Redis.
        state: ``"open"``, ``"limited"`` if all accounts are refused for longer, or ``"out"``.
        closed_for: Seconds since the service was last open for it.
        answered: Seconds since its last answer; ``None`` if it has had none.
        rate: Requests per second to which it keeps; ``None`` if it has learned no limit.
        waiting: Accounts in hand that have not been started.
        in_flight: Accounts in flight.
        chunks: Chunks in hand.
        fetched: Accounts fetched since it was started.
        failed: Accounts that failed.
        per_second: Accounts per second, over the last seconds.
        error: Its last failure; empty if it had none.
    """

    at: float = 0.0
    state: str = "open"
    closed_for: float = 0.0
    answered: float | None = None
    rate: float | None = None
    waiting: int = 0
    in_flight: int = 0
    chunks: int = 0
    fetched: int = 0
    failed: int = 0
    per_second: float = 0.0
    error: str = ""

    @property
    def is_busy(self) -> bool:
        """Whether the worker has accounts to fetch."""
        return self.waiting + self.in_flight > 0


def fresh(reports: dict[bytes, bytes], now: float, seconds: float = FRESH) -> dict[str, Report]:
    """Return the reports that are not older than *seconds*, by the worker's name; without any of another version."""
    found: dict[str, Report] = {}
    for name, text in reports.items():
        with suppress(msgspec.MsgspecError):
            report = msgspec.json.decode(text, type=Report)
            if now - report.at <= seconds:
                found[name.decode()] = report
    return found


class Seen:
    """Record what a worker's own requests show of the service."""

    def __init__(self) -> None:
        self.answered_at: float = -math.inf
        """When the last answer came."""
        self._state = "open"
        self._closed_at = -math.inf
        self._matters = False  # whether the others should know of a short pause, too

    def note(self, now: float, event: Event) -> None:
        """Learn from an event of the client."""
        match event:
            case AttemptFinished(attempt=attempt):
                if attempt.status is not None and attempt.status not in _RETRIED:
                    self.answered_at = now
            case ServicePaused(state=state, asked=asked):
                self._closed_at = now if self._state == "open" else self._closed_at
                self._state = state
                self._matters = asked or state == "out"
            case ServiceResumed():
                self._state = "open"

    def report(self, now: float) -> dict[str, Any]:
        """Return the fields of the report to the others."""
        closed_for = 0.0 if self._state == "open" else now - self._closed_at
        return {
            "state": self._state if self._matters or closed_for > _SETTLED else "open",
            "closed_for": closed_for,
            "answered": None if self.answered_at == -math.inf else now - self.answered_at,
        }


class Peers:
    """A `Limiter` for ``AudiencesClient(service_rate_limit=...)`` by which workers act as one.

    If the service answers none of them, one worker at a time sends a probe, and the others wait. A limit that they have
    learned is divided among those that have accounts to fetch.

    Args:
        patience: Seconds that an account waits during an outage.
        limiter: A limit of all workers together; ``None`` if none is known.
    """

    def __init__(self, patience: float, limiter: Limiter | None = None) -> None:
        self.limit: RateLimit | None = getattr(limiter, "limit", None)
        self._limiter = limiter
        self._patience = patience
        self._seen = Seen()
        self._name = ""
        self._reports: dict[str, Report] = {}
        self._offset = 0.0  # of the clock of Redis
        self._closed_since: float | None = None
        self._probed = -1  # number of the last turn as the one that probes
        self._changed = asyncio.Event()
        self._share: Share | None = None

    def attach_pace(self, pace: Pace) -> None:
        """Divide the limit that a client learns; called by the client."""
        self._share = Share(pace)

    def __call__(self, event: Event) -> None:
        """Learn from an event of the client."""
        self._seen.note(time.monotonic(), event)

    async def acquire(self, account_name: str) -> None:
        """Wait for the other workers, and for the limit of all."""
        await self.acquire_within(account_name, math.inf)

    async def acquire_within(self, account_name: str, timeout: float) -> None:
        """Do the same, for a call with a deadline in *timeout* seconds.

        Raises:
            TransportError: No worker has had an answer for as long as the patience.
            DeadlineExceededError: The turn comes later.
            DocketError: The limit of all is out of reach.
        """
        while not self._may_go():
            self._changed.clear()
            await self._changed.wait()
        if self._limiter is not None:
            await acquire(self._limiter, account_name, timeout)

    async def run(self, docket: Docket, name: str, own: Callable[[], dict[str, Any]]) -> None:
        """Report and read the others' reports until cancelled.

        Args:
            docket: The queue.
            name: This worker's name.
            own: Returns more fields of the report.
        """
        self._name = name
        while True:
            try:
                await self._exchange(docket, own())
            except DocketError:
                self._reports = {}  # each for itself
            self._changed.set()
            await asyncio.sleep(_EVERY)

    async def leave(self, docket: Docket) -> None:
        """Remove the report."""
        await exchange(docket, lambda pipeline: pipeline.hdel(docket.key(KEY), self._name))

    async def _exchange(self, docket: Docket, own: dict[str, Any]) -> None:
        now = time.monotonic()
        rate = None if self._share is None else self._share.rate
        report = Report(at=now + self._offset, rate=rate, **self._seen.report(now), **own)
        key = docket.key(KEY)

        def commands(pipeline: Any) -> None:
            if self._offset:
                pipeline.hset(key, self._name, msgspec.json.encode(report))
            pipeline.time()
            pipeline.hgetall(key)

        *_, clock, found = await exchange(docket, commands)
        server = clock[0] + clock[1] / 1e6
        self._offset = server - time.monotonic()
        self._reports = fresh(found, server)
        if self._share is not None:
            self._share.adjust(self._name, {name: each.rate for name, each in self._reports.items() if each.is_busy})
        dead = found.keys() - {name.encode() for name in fresh(found, server, _KEPT)}
        if dead:
            await exchange(docket, lambda pipeline: pipeline.hdel(key, *dead))

    def _may_go(self) -> bool:
        """Return whether a request may go; if the service is closed, as the one probe of this worker's turn.

        Raises:
            TransportError: No worker has had an answer for as long as the patience.
        """
        busy = sorted(name for name, report in self._reports.items() if report.is_busy)
        if len(busy) < 2 or not self._is_closed():
            self._closed_since = None
            return True
        now = time.monotonic()
        self._closed_since = now if self._closed_since is None else self._closed_since
        silent = now - self._closed_since
        if silent >= self._patience:
            message = f"the service has answered no worker for {silent:.3g} s, longer than the patience"
            raise TransportError(f"{message} of {self._patience:g} s allows", stop_reason="patience")
        turn = int((now + self._offset) / _TURN)
        if busy[turn % len(busy)] != self._name or turn == self._probed:
            return False
        self._probed = turn
        return True

    def _is_closed(self) -> bool:
        """Return whether the service is closed for a worker, and no worker has had an answer since."""
        closed = [report.closed_for for report in self._reports.values() if report.state != "open"]
        if not closed:
            return False
        now = time.monotonic()
        answered = [report.answered for report in self._reports.values() if report.answered is not None]
        return min([now - self._seen.answered_at, *answered]) >= min(closed)
