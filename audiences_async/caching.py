"""Share one request between concurrent callers, and cache its answer."""

import asyncio
import copy
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from attrs import define, field, frozen

from audiences_async import checks
from audiences_async.call import Call
from audiences_async.clock import Clock
from audiences_async.credentials import ApiKey
from audiences_async.errors import (
    AudiencesError,
    DeadlineExceededError,
    ServerError,
    TooManyRequestsError,
    TransportError,
)
from audiences_async.models import Account, AudiencesResponse
from audiences_async.places import Place
from audiences_async.wire import Result

# Outages only, as in RFC 5861, section 4: an answer such as 403 is not one.
_OUTAGES: Final = (TransportError, ServerError, TooManyRequestsError, DeadlineExceededError)


@frozen
class CachePolicy:
    """How long an answer may be reused. A frozen value that can be shared freely.

    Concurrent calls of one account always share one request. The cache is keyed by the account's API key, never by its
    name, so that no account gets the answer of another. Errors are not cached.

    Attributes:
        ttl: Seconds for which an answer is reused; 0 means that only concurrent calls share it.
        stale_while_revalidate: Seconds after *ttl* for which the old answer is returned while a new one is fetched in
            the background; 0 disables this (https://www.rfc-editor.org/rfc/rfc5861, section 3).
        stale_if_error: Seconds after *ttl* for which the old answer replaces an outage: no answer, a 5xx, a 429, or no
            time left; 0 disables this (section 4).
        max_accounts: Maximum number of cached answers; the least recently used are evicted.

    Raises:
        ConfigurationError: A number is out of range.
    """

    ttl: float = field(validator=checks.is_not_negative)
    stale_while_revalidate: float = field(default=0.0, validator=checks.is_not_negative)
    stale_if_error: float = field(default=0.0, validator=checks.is_not_negative)
    max_accounts: int = field(default=1024, validator=checks.is_count)


@frozen(eq=False)
class _Kept:
    """A cached answer and the time it arrived."""

    response: AudiencesResponse
    at: float
    generation: int


@define(eq=False)
class _Flight:
    """A request in flight and the number of its waiters. During a refresh, the client counts as one."""

    call: Call
    generation: int
    waiters: int = 0
    keep: bool = True
    task: asyncio.Task[Result] = field(init=False)

    def extend(self, timeout: float) -> None:
        """Extend the request's deadline so that a joining caller gets its full *timeout*."""
        self.call.time.extend(timeout)


class Cache:
    """The cache of one client, on one event loop.

    Args:
        policy: How long answers are reused.
        clock: Source of the time.
        base_url: URL of the service, part of the cache key.
        begin: Creates a call for an account, a timeout in seconds and a place in a job.
        run: Runs a call.
        timeout: Seconds for a background refresh.
    """

    def __init__(
        self,
        policy: CachePolicy,
        clock: Clock,
        *,
        base_url: str,
        begin: Callable[[Account, float, Place | None], Call],
        run: Callable[[Call], Awaitable[Result]],
        timeout: float,
    ) -> None:
        self._policy = policy
        self._now = clock.monotonic
        self._base_url = base_url
        self._begin = begin
        self._run = run
        self._timeout = timeout
        self._salt = os.urandom(32)
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._flights: dict[bytes, _Flight] = {}
        self._tasks: set[asyncio.Task[Result]] = set()
        self._digests: OrderedDict[Account, bytes] = OrderedDict()
        self._generation = 0  # incremented by each invalidation
        self._invalidated: dict[str, int] = {}  # by account name, for accounts with a key function

    async def get(
        self,
        account: Account,
        key: ApiKey,
        timeout: float,
        on_call: Callable[[Call], object],
        place: Place | None = None,
    ) -> Result:
        """Return the account's answer, cached or new, or the error.

        Args:
            account: The account.
            key: Its current key.
            timeout: Seconds that the caller has left; the caller enforces them.
            on_call: Called with the call that the caller waits for.
            place: The caller's place in a job; ``None`` outside a job.
        """
        digest = self._digest(key)
        self._remember(account, digest)
        kept = self._kept_for(account, digest)
        if kept is not None:
            self._kept.move_to_end(digest)
            age = self._now() - kept.at
            if age < self._policy.ttl:
                return kept.response
            if age < self._policy.ttl + self._policy.stale_while_revalidate:
                self._refresh(digest, account)
                return kept.response
        result = await self._joined(digest, account, timeout, on_call, place)
        stale = self._in_place_of(result, account, digest) if isinstance(result, AudiencesError) else None
        return result if stale is None else stale

    def in_place_of(self, error: AudiencesError, account: Account) -> AudiencesResponse | None:
        """Return the cached answer that replaces *error*; ``None`` if there is no such answer."""
        digest = self._digests.get(account)
        return None if digest is None else self._in_place_of(error, account, digest)

    def invalidate(self, account: Account) -> None:
        """Discard the account's answer, and do not cache the answers of requests in flight."""
        if isinstance(account.credential, ApiKey):
            self._forget(self._digest(account.credential))
            return
        if len(self._invalidated) >= self._policy.max_accounts:
            for digest in {*self._kept, *self._flights}:
                self._forget(digest)
            self._invalidated.clear()
        self._generation += 1
        self._invalidated[account.name] = self._generation

    def _forget(self, digest: bytes) -> None:
        self._kept.pop(digest, None)
        flight = self._flights.pop(digest, None)
        if flight is not None:
            flight.keep = False

    def _is_valid(self, held: _Kept | _Flight | None, account: Account) -> bool:
        """Return whether *held* was requested after the account was last invalidated.

        Earlier keys of a key function are unknown, and functions cannot be compared. Accounts with one go by name.
        """
        if held is None:
            return False
        return isinstance(account.credential, ApiKey) or held.generation >= self._invalidated.get(account.name, 0)

    def _kept_for(self, account: Account, digest: bytes) -> _Kept | None:
        kept = self._kept.get(digest)
        return kept if self._is_valid(kept, account) else None

    async def close(self) -> None:
        """Cancel all requests and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _digest(self, key: ApiKey) -> bytes:
        return key.digest(self._salt, self._base_url)

    def _remember(self, account: Account, digest: bytes) -> None:
        self._digests[account] = digest
        self._digests.move_to_end(account)
        while len(self._digests) > self._policy.max_accounts:
            self._digests.popitem(last=False)

    def _in_place_of(self, error: AudiencesError, account: Account, digest: bytes) -> AudiencesResponse | None:
        kept = self._kept_for(account, digest)
        if kept is None or not isinstance(error, _OUTAGES):
            return None
        return kept.response if self._now() - kept.at < self._policy.ttl + self._policy.stale_if_error else None

    def _refresh(self, digest: bytes, account: Account) -> None:
        if digest not in self._flights:
            self._start(digest, account, self._timeout).waiters = 1

    async def _joined(
        self,
        digest: bytes,
        account: Account,
        timeout: float,
        on_call: Callable[[Call], object],
        place: Place | None,
    ) -> Result:
        until = self._now() + timeout
        flight = self._flights.get(digest)
        joined = flight is not None and not flight.call.time.scope.expired and self._is_valid(flight, account)
        if flight is None or not joined:
            flight = self._start(digest, account, timeout, place)
        flight.extend(timeout)
        on_call(flight.call)
        with self._waiting(digest, flight):
            await asyncio.wait({flight.task})
        result = flight.task.result()
        if joined and isinstance(result, DeadlineExceededError) and self._now() + (result.retry_after or 0) < until:
            # It waited for its turn with the shorter deadline of the first caller.
            return await self._joined(digest, account, until - self._now(), on_call, place)
        if joined and place is not None and isinstance(result, AudiencesError) and result.stop_reason == "budget":
            # It was begun outside a job, so it did not wait for tokens.
            return await self._joined(digest, account, until - self._now(), on_call, place)
        return _copy_for(result, account) if isinstance(result, AudiencesError) else result

    @contextmanager
    def _waiting(self, digest: bytes, flight: _Flight) -> Iterator[None]:
        flight.waiters += 1
        try:
            yield
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                flight.task.cancel()
                self._land(digest, flight)

    def _start(self, digest: bytes, account: Account, timeout: float, place: Place | None = None) -> _Flight:
        flight = _Flight(self._begin(account, timeout, place), self._generation)
        self._flights[digest] = flight  # before creating the task, which may start eagerly
        flight.task = asyncio.get_running_loop().create_task(self._fly(digest, account, flight))
        self._tasks.add(flight.task)
        flight.task.add_done_callback(self._tasks.discard)
        return flight

    async def _fly(self, digest: bytes, account: Account, flight: _Flight) -> Result:
        try:
            result = await self._run(flight.call)
        finally:
            self._land(digest, flight)
        if flight.keep and isinstance(result, AudiencesResponse) and flight.call.key is not None:
            answered = self._digest(flight.call.key)  # the key may be a fresh one, after a 401
            self._remember(account, answered)
            self._keep(answered, _Kept(result, self._now(), flight.generation))
        return result

    def _land(self, digest: bytes, flight: _Flight) -> None:
        if self._flights.get(digest) is flight:
            del self._flights[digest]

    def _keep(self, digest: bytes, kept: _Kept) -> None:
        self._kept[digest] = kept
        self._kept.move_to_end(digest)
        while len(self._kept) > self._policy.max_accounts:
            self._kept.popitem(last=False)


def _copy_for(error: AudiencesError, account: Account) -> AudiencesError:
    """Return a copy of the error for one caller: an exception that is raised twice shows the frames of both."""
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    copied.account = account.name
    return copied
