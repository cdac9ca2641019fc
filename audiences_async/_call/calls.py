"""The calls of one client: each runs within its deadline, alone or by way of the cache."""

from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any
from weakref import WeakValueDictionary

from attrs import evolve
from yarl import URL

from audiences_async._base.deadlines import CallTime, Deadlines
from audiences_async._call.cache import Cache, copy_for
from audiences_async._call.context import CallContext, Caller
from audiences_async._call.record import new_call_id
from audiences_async._call.run import ASKING, Call, out_of_time
from audiences_async._http.wire import Result
from audiences_async.credentials import ApiKey, KeySource
from audiences_async.errors import (
    AudiencesError,
    ClientClosedError,
    ConfigurationError,
    DeadlineExceededError,
    TransportError,
)
from audiences_async.events import StopReason
from audiences_async.models import Account
from audiences_async.policies import CachePolicy


class Calls:
    """The calls of one client, on one event loop.

    Args:
        context: What all calls share.
        deadlines: The deadlines of the calls.
        cache: How long answers are reused; ``None`` means that every call sends a request.
        timeout: Seconds for a refresh of the cache.
    """

    def __init__(
        self,
        context: CallContext,
        deadlines: Deadlines,
        *,
        cache: CachePolicy | None,
        timeout: float,
    ) -> None:
        self.context: CallContext = context
        self._deadlines = deadlines
        self._cache: Cache | None = None
        if cache is not None:
            self._cache = Cache(
                cache, context.clock, begin=self._begin, run=self._run, timeout=timeout, on_event=context.on_event
            )
        self._key_sources: WeakValueDictionary[tuple[str, int], KeySource] = WeakValueDictionary()
        self._closing = False

    def answer(self, caller: Caller) -> Coroutine[Any, Any, Result]:
        """Return the account's answer, or the error of its call, to be awaited."""
        if self._cache is None:
            return self._run(self._begin(caller))
        return self._cached(self._cache, caller)

    def json(self, path: str, url: URL, caller: Caller) -> Coroutine[Any, Any, Result]:
        """Return the answer to another call of the API, or its error, to be awaited."""
        return self._run(self._begin(caller, (path, url)))

    def invalidate(self, account: Account) -> None:
        """Discard the account's cached answer."""
        if self._cache is not None:
            self._cache.invalidate(account)

    async def close(self) -> None:
        """End all calls."""
        self._closing = True
        await self._deadlines.end()
        if self._cache is not None:
            await self._cache.close()

    def _begin(self, caller: Caller, other: tuple[str, URL] | None = None) -> Call:
        account, timeout, policy, place = caller
        context = self.context
        if policy is not None and policy is not context.policy:
            context = evolve(context, policy=policy)
        call_id: str | None = None
        if other is not None or context.request_id_header is not None:
            call_id = new_call_id()
            path, url = other or (None, None)
            header = None if context.request_id_header is None else (context.request_id_header, call_id)
            context = evolve(context, path=path, url=url, header=header)
        now = context.clock.monotonic
        time = CallTime(now, self._deadlines.within(timeout), timeout, stands_still=place is not None)
        return Call(account, self._credential(account), time, context, place=place, call_id=call_id)

    async def _run(self, call: Call, first: AudiencesError | None = None) -> Result:
        try:
            with call.time.scope:
                return await call.run(first)
        except (ConfigurationError, ClientClosedError, DeadlineExceededError) as error:
            return call.cut_off(error, error.stop_reason)
        except TimeoutError:
            return call.cut_off(*self._out_of_time(call.time.timeout, call.phase))
        except BaseException as error:
            call.record.abandoned(error)
            raise

    async def _cached(self, cache: Cache, caller: Caller) -> Result:
        account, timeout = caller.account, caller.timeout
        if caller.place is not None:
            caller.place.stay()
        credential = self._credential(account)
        started = self.context.clock.monotonic()
        calls: list[Call] = []
        try:
            in_use = credential.in_use() if isinstance(credential, KeySource) else nullcontext()
            with in_use, self._deadlines.within(timeout) as scope:
                key = credential if isinstance(credential, ApiKey) else await credential.get(account=account.name)
                scope.check()
                if caller.place is None:
                    return await cache.get(caller, key, scope, calls.append)
                # In a job, the time of the request bounds the wait: it stands still in an outage.
                with scope.suspended():
                    return await cache.get(caller, key, scope, calls.append)
        except TransportError as failure:  # the key function failed, so there is no key to look up
            return await self._run(self._begin(caller), failure.with_traceback(None))
        except TimeoutError:
            error, reason = self._out_of_time(timeout, calls[-1].phase if calls else ASKING)
            now = self.context.clock.monotonic()
            if calls and calls[-1].failure is not None and not self._closing:
                error = copy_for(calls[-1].failure, account)  # as that of a call whose next attempt does not fit
                error.retry_after = max(error.retry_after or 0.0, calls[-1].retry_at - now)
            error.account, error.elapsed, error.stop_reason = account.name, now - started, reason
            if calls:
                record = calls[-1].record
                error.attempts, error.call_id = record.until_now(reason), record.call_id
                calls[-1].hint_at_turn(error)
            return cache.in_place_of(error, account)

    def _out_of_time(self, timeout: float, phase: str) -> tuple[AudiencesError, StopReason]:
        if self._closing:
            return ClientClosedError("the client was closed while the call ran"), "final"
        return out_of_time(timeout, phase), "deadline"

    def _credential(self, account: Account) -> ApiKey | KeySource:
        credential = account.credential
        if isinstance(credential, ApiKey):
            return credential
        # Kept as long as a call refers to it, so that concurrent calls share one key and one refresh.
        return self._key_sources.setdefault((account.name, id(credential)), KeySource(credential))
