"""One request for all who ask at the same time, and its answer for those who ask soon after."""

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
from audiences_async.pacing import Place
from audiences_async.wire import Result

# As RFC 5861, section 4 has it: an outage, and not an answer that refuses.
_OUTAGES: Final = (TransportError, ServerError, TooManyRequestsError, DeadlineExceededError)


@frozen
class CachePolicy:
    """How long an answer is good for. A frozen value: share it freely.

    Calls of one account at the same time always share one request. Answers are told apart by what the account's key
    is, never by its name, and are never another account's. Errors are not kept.

    Attributes:
        ttl: Seconds for which an answer is given again; 0 means that only calls at the same time share it.
        stale_while_revalidate: Seconds after that, for which it is still given while a new one is fetched behind it;
            0 means not at all (https://www.rfc-editor.org/rfc/rfc5861, section 3).
        stale_if_error: Seconds after *ttl*, for which it is given in place of an outage: no answer, a 5xx, a 429, or no
            time left; 0 means not at all (section 4).
        max_accounts: Answers that are kept, the last used ones.

    Raises:
        ConfigurationError: A number out of its range.
    """

    ttl: float = field(validator=checks.is_not_negative)
    stale_while_revalidate: float = field(default=0.0, validator=checks.is_not_negative)
    stale_if_error: float = field(default=0.0, validator=checks.is_not_negative)
    max_accounts: int = field(default=1024, validator=checks.is_count)


@frozen(eq=False)
class _Kept:
    """An answer and when it came."""

    response: AudiencesResponse
    at: float
    generation: int


@define(eq=False)
class _Flight:
    """A request under way, and how many wait for it; the client itself counts as one while it refreshes."""

    call: Call
    generation: int
    waiters: int = 0
    keep: bool = True
    task: asyncio.Task[Result] = field(init=False)

    def extend(self, timeout: float) -> None:
        """Whoever joins has so many seconds: no shorter time of somebody else's ends the request before."""
        self.call.time.extend(timeout)


class Cache:
    """What one client keeps, on one event loop.

    Args:
        policy: For how long.
        clock: Where the time comes from.
        base_url: Where the answers come from.
        begin: Makes a call for an account that has so many seconds.
        run: Runs it.
        timeout: Seconds for a request that nobody waits for.
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
        self._generation = 0  # counts what has been invalidated
        self._invalidated: dict[str, int] = {}  # by name, of accounts whose key a function gives

    async def get(
        self,
        account: Account,
        key: ApiKey,
        timeout: float,
        on_call: Callable[[Call], object],
        place: Place | None = None,
    ) -> Result:
        """The account's answer, kept or new, or the error.

        Args:
            account: Whose it is.
            key: Its key right now.
            timeout: Seconds that the caller has; keeping to them is the caller's own matter.
            on_call: Called with the call that it waits for.
            place: The caller's place in a job; ``None`` if it is of no job.
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
        """What is given instead of the error; ``None`` where that is nothing."""
        digest = self._digests.get(account)
        return None if digest is None else self._in_place_of(error, account, digest)

    def invalidate(self, account: Account) -> None:
        """Keep no answer of this account that was asked for before now."""
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
        """Whether it was asked for after the account was last invalidated.

        Which key a function gave before is not known, and two functions do not compare: such accounts go by name.
        """
        if held is None:
            return False
        return isinstance(account.credential, ApiKey) or held.generation >= self._invalidated.get(account.name, 0)

    def _kept_for(self, account: Account, digest: bytes) -> _Kept | None:
        kept = self._kept.get(digest)
        return kept if self._is_valid(kept, account) else None

    async def close(self) -> None:
        """End what is under way."""
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
            # Where it waited for its turn, it had no more time than the first who asked.
            return await self._joined(digest, account, until - self._now(), on_call, place)
        if joined and place is not None and isinstance(result, AudiencesError) and result.stop_reason == "budget":
            # Begun by a call of no job, which does not wait for tokens.
            return await self._joined(digest, account, until - self._now(), on_call, place)
        return _of(result, account) if isinstance(result, AudiencesError) else result

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
        self._flights[digest] = flight  # before the task, which may be an eager one
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
            answered = self._digest(flight.call.key)  # perhaps by a fresh key, after a 401
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


def _of(error: AudiencesError, account: Account) -> AudiencesError:
    """Each caller's own error: an exception that is raised twice shows the frames of both."""
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    own.account = account.name
    return own
