"""Share one request between concurrent callers, and cache its answer."""

import asyncio
import copy
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from attrs import define, field, frozen

from audiences_async._base.deadlines import Scope
from audiences_async._call.context import Caller
from audiences_async._call.run import Call
from audiences_async._http.wire import Result
from audiences_async.clock import Clock
from audiences_async.credentials import ApiKey
from audiences_async.errors import (
    AudiencesError,
    DeadlineExceededError,
    ServerError,
    TooManyRequestsError,
    TransportError,
)
from audiences_async.events import CacheLookup, CacheResult, EventHook, emit, is_watched
from audiences_async.models import Account, AudiencesResponse
from audiences_async.policies import CachePolicy

_K = TypeVar("_K")
_V = TypeVar("_V")

# Outages only, as in RFC 5861, section 4: an answer such as 403 is not one.
_OUTAGES: Final = (TransportError, ServerError, TooManyRequestsError, DeadlineExceededError)
_MAX_NAMES: Final = 10_000  # names kept with one answer; if it has more, it is fetched again


@frozen(eq=False)
class _Kept:
    """A cached answer, the time it arrived, the names of the accounts that asked for it, and the call's identifier.

    The identifier is ``None`` if the call's events were not observed.
    """

    response: AudiencesResponse
    at: float
    names: set[str]
    call_id: str | None


@define(eq=False)
class _Flight:
    """A request in flight, the names of the accounts that asked for it, and the number of its waiting callers.

    During a refresh, the client counts as one caller.
    """

    digest: bytes
    call: Call
    names: set[str]
    waiters: int = 0
    task: asyncio.Task[Result] = field(init=False)


class Cache:
    """The cache of one client, on one event loop.

    Args:
        policy: How long answers are reused.
        clock: Source of the time.
        begin: Creates a call for a caller.
        run: Runs a call.
        timeout: Seconds for a background refresh.
        on_event: Called with what each caller gets.
    """

    def __init__(
        self,
        policy: CachePolicy,
        clock: Clock,
        *,
        begin: Callable[[Caller], Call],
        run: Callable[[Call], Awaitable[Result]],
        timeout: float,
        on_event: EventHook | None,
    ) -> None:
        self._on_event = on_event
        self._policy = policy
        self._now = clock.monotonic
        self._begin = begin
        self._run = run
        self._timeout = timeout
        self._salt = os.urandom(32)
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # by digest of the key
        self._flights: dict[bytes, _Flight] = {}  # by digest of the key; those that callers may join
        self._tasks: set[asyncio.Task[Result]] = set()
        self._digests: OrderedDict[Account, bytes] = OrderedDict()  # of the account's last key

    async def get(self, caller: Caller, key: ApiKey, scope: Scope, on_call: Callable[[Call], object]) -> Result:
        """Return the account's answer, cached or new, or the error.

        Args:
            caller: The caller, with the time that it has left.
            key: The account's current key.
            scope: Enforces that time.
            on_call: Called with the call that the caller waits for.
        """
        account = caller.account
        digest = key.digest(self._salt)
        self._put(self._digests, account, digest)
        kept = self._kept.get(digest)
        if kept is not None and len(kept.names) < _MAX_NAMES:
            self._kept.move_to_end(digest)
            kept.names.add(account.name)
            age = self._now() - kept.at
            if age < self._policy.ttl:
                return self._reuse(kept, account, "fresh", age)
            if age < self._policy.ttl + self._policy.stale_while_revalidate:
                if digest not in self._flights:
                    refresh = Caller(account, self._timeout, caller.policy)
                    self._start(digest, refresh, is_refresh=True).waiters = 1
                return self._reuse(kept, account, "stale", age)
        result = await self._joined(digest, caller, scope, on_call)
        return self._or_stale(result, account, digest) if isinstance(result, AudiencesError) else result

    def in_place_of(self, error: AudiencesError, account: Account) -> Result:
        """Return the cached answer that replaces *error*, or the error if nothing is cached."""
        return self._or_stale(error, account, self._digests.get(account))

    def invalidate(self, account: Account) -> None:
        """Discard the answers that the account asked for, and do not cache those of requests in flight."""
        if isinstance(account.credential, ApiKey):
            digests = [account.credential.digest(self._salt)]
        else:  # by name: earlier keys of a function are unknown, and functions cannot be compared
            held: list[tuple[bytes, _Kept | _Flight]] = [*self._kept.items(), *self._flights.items()]
            digests = [digest for digest, each in held if account.name in each.names]
        for digest in digests:
            self._kept.pop(digest, None)
            self._flights.pop(digest, None)

    async def close(self) -> None:
        """Cancel all requests and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _or_stale(self, error: AudiencesError, account: Account, digest: bytes | None) -> Result:
        kept = None if digest is None else self._kept.get(digest)
        if kept is None or not self._replaces(kept, error, self._policy.stale_if_error):
            return error
        return self._reuse(kept, account, "stale", self._now() - kept.at)

    def _replaces(self, kept: _Kept, error: BaseException, period: float) -> bool:
        """Return whether a cached answer may stand in for an error, up to *period* seconds after its ``ttl``."""
        is_outage = isinstance(error, (*_OUTAGES, asyncio.CancelledError))  # of a call whose callers had no more time
        return is_outage and self._now() - kept.at < self._policy.ttl + period

    def _reuse(self, kept: _Kept, account: Account, result: CacheResult, age: float) -> AudiencesResponse:
        """Return a cached answer with its age, and report it."""
        self._report(account, result, age, kept.call_id)
        sent = kept.response
        return AudiencesResponse(sent.status, sent.description, sent.response_time, sent.data, sent.headers, age)

    def _report(self, account: Account, result: CacheResult, age: float, call_id: str | None) -> None:
        if is_watched(self._on_event):
            emit(self._on_event, CacheLookup(account.name, result, age, call_id=call_id))

    def _put(self, recent: OrderedDict[_K, _V], key: _K, value: _V) -> None:
        """Add an item, and evict the least recently used ones."""
        recent[key] = value
        recent.move_to_end(key)
        while len(recent) > self._policy.max_accounts:
            recent.popitem(last=False)

    async def _joined(self, digest: bytes, caller: Caller, scope: Scope, on_call: Callable[[Call], object]) -> Result:
        """Return the result of the request in flight, or of a new one."""
        account = caller.account
        until = self._now() + caller.timeout
        flight = self._flights.get(digest)
        joined = flight is not None and not flight.call.time.scope.expired
        if flight is None or not joined:
            flight = self._start(digest, caller)
        flight.names.add(account.name)
        flight.call.time.extend(caller.timeout)
        on_call(flight.call)
        result = await self._result_of(flight, scope)
        if not isinstance(result, AudiencesError):
            record = flight.call.record
            self._report(account, "shared" if joined else "wire", 0.0, record.call_id if record.is_watched else None)
            return result
        left = until - self._now()
        if joined and _may_help(result, left, caller):
            return await self._joined(digest, caller._replace(timeout=left), scope, on_call)
        return copy_for(result, account)

    async def _result_of(self, flight: _Flight, scope: Scope) -> Result:
        """Wait for a request, and end it if the last of its callers leaves: by its deadline if that is why."""
        flight.waiters += 1
        try:
            await asyncio.wait({flight.task})
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                end = flight.call.time.scope.expire if scope.expired else flight.task.cancel
                end()
                self._land(flight)
        return flight.task.result()

    def _start(self, digest: bytes, caller: Caller, *, is_refresh: bool = False) -> _Flight:
        account = caller.account
        flight = _Flight(digest, self._begin(caller), {account.name})
        if (kept := self._kept.get(digest)) is not None:
            periods = [self._policy.stale_if_error, self._policy.stale_while_revalidate if is_refresh else 0.0]
            flight.call.record.stands_in = lambda error: self._replaces(kept, error, max(periods))
        self._flights[digest] = flight  # before creating the task, which may start eagerly
        flight.call.begin()  # the caller may leave before the task begins
        flight.task = asyncio.get_running_loop().create_task(self._fly(flight, account))
        self._tasks.add(flight.task)
        flight.task.add_done_callback(self._tasks.discard)
        flight.task.add_done_callback(lambda _: flight.call.end())
        return flight

    async def _fly(self, flight: _Flight, account: Account) -> Result:
        try:
            result = await self._run(flight.call)
        finally:
            is_valid = self._land(flight)
        if is_valid and isinstance(result, AudiencesResponse) and flight.call.key is not None:
            answered = flight.call.key.digest(self._salt)  # the key may be a fresh one, after a 401
            record = flight.call.record
            call_id = record.call_id if record.is_watched else None
            self._put(self._digests, account, answered)
            self._put(self._kept, answered, _Kept(result, self._now(), flight.names, call_id))
        return result

    def _land(self, flight: _Flight) -> bool:
        """Let no caller join the request any more; return whether one could until now, as it was not invalidated."""
        is_valid = self._flights.get(flight.digest) is flight
        if is_valid:
            del self._flights[flight.digest]
        return is_valid


def _may_help(error: AudiencesError, left: float, caller: Caller) -> bool:
    """Return whether a request of its own may help a caller with *left* seconds that joined one with this *error*."""
    if isinstance(error, DeadlineExceededError):  # it waited for its turn with the shorter deadline of another caller
        return (error.retry_after or 0) < left
    return caller.place is not None and error.stop_reason == "budget"  # outside a job it did not wait for tokens


def copy_for(error: AudiencesError, account: Account) -> AudiencesError:
    """Return a copy of the error for one caller: an exception that is raised twice shows the frames of both."""
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    copied.account = account.name
    return copied
