"""The client: settings, lifecycle, and the limits on each call."""

import copy
import os
import ssl as tls
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from audiences_async._base import checks
from audiences_async._call.context import Caller
from audiences_async._call.engine import Engine, EngineSettings
from audiences_async._call.retrying import RetryTokens
from audiences_async._http.transport import (
    DEFAULT_MAX_CONNECTIONS,
    TransportSettings,
    check_cookies,
    check_session,
)
from audiences_async._http.urls import Params, url_below
from audiences_async._http.wire import (
    JsonAnswer,
    base_url_or_default,
    endpoint,
    fixed_headers,
    header_name,
    proxy_url,
)
from audiences_async._jobs import jobs
from audiences_async._jobs.places import Place
from audiences_async._pace.pacer import watching
from audiences_async.clock import Clock
from audiences_async.credentials import ApiKey, Secret
from audiences_async.errors import AudiencesError, ConfigurationError
from audiences_async.events import EventHook, log_unexpected
from audiences_async.models import Account, AudiencesResponse, Failed, Fetched, Outcome
from audiences_async.policies import CachePolicy, Limiter, RateLimit, RetryBudget, RetryPolicy
from audiences_async.snapshots import ClientSnapshot

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

DEFAULT_ACCOUNT: Final = "default"
"""Name of the account that uses the client's own ``api_key``."""


class AudiencesClient:
    """A client for ``GET /audiences``: every audience of an account, or an error that explains why not.

    One client serves any number of accounts, and any number of tasks on one event loop. It can be created anywhere; on
    first use it binds to the running event loop and opens its session::

        async with AudiencesClient("api-key") as client:
            response = await client.get_audiences()

    Args:
        api_key: The default account's key; by default the environment's ``AUDIENCES_API_KEY``. With neither, every call
            needs an `Account`.
        base_url: URL of the service; by default ``AUDIENCES_BASE_URL``, else production, https://api.commbox.io/.
        allow_http: Whether a plain ``http://`` URL may name a host other than loopback; the key is then sent
            unencrypted.
        timeout: Seconds for a whole call: queueing, every attempt and every wait. Above 0.
        attempt_timeout: Seconds for one attempt: sending, headers and the whole body. Above 0.
        retry: Which failures are retried, how often and after which delay.
        budget: Limit on the retries of all calls of this client together; ``None`` means no such limit.
        rate_limit: Known rate of each account, or a `Limiter`; ``None`` means that the rate is learned from the
            service's 429s. A 429 pauses its account in any case.
        service_rate_limit: Known rate of all accounts together, or a `Limiter`; ``None`` means that one is learned, if
            there is one. In a job, waiting for it does not count towards an account's timeout.
        cache: How long answers are kept and shared between callers; ``None`` means that every call sends a request.
        max_connections: Connections of the client's own session; ``None`` means 100.
        max_body_bytes: Largest body that is read, in bytes after decompression. The decoded audiences take several
            times as much memory. Two steps block the event loop: decoding one record, and one scan of the body, up to 5
            ms per MiB.
        ssl: TLS context of the client's own session, for your own CA or client certificate; ``None`` means the system's
            CAs.
        proxy: URL of an HTTP proxy for the client's own session; ``None`` means no proxy. The environment is ignored.
        session: Your own session to send on, with its headers except ``User-Agent``; the client never closes it. A
            session that keeps cookies can serve only one account: for more, give it an `aiohttp.DummyCookieJar`.
            aiohttp itself reads what arrives on its idle connections; a connection that received anything
            is not used, which costs an attempt. Configure TLS, proxy and connections on the session: ``ssl``, ``proxy``
            and ``max_connections`` cannot be combined with it.
        request_id_header: Name of a header that carries the call's identifier, the ``call_id`` of its events and its
            error; the same on every attempt. ``None`` means that no identifier is sent.
        app_info: Your application, such as ``my-app/1.2``, to be added to the ``User-Agent``; ``None`` means nothing.
        on_event: Called with each `Event`, on the event loop: it must not block. Its exceptions are logged and ignored.
        clock: Time and randomness; tests can replace it.

    Raises:
        ConfigurationError: An argument or an environment variable is invalid.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        base_url: str | None = None,
        allow_http: bool = False,
        timeout: float = 60.0,
        attempt_timeout: float = 15.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - a frozen value
        budget: RetryBudget | None = RetryBudget(),  # noqa: B008 - a frozen value
        rate_limit: RateLimit | Limiter | None = None,
        service_rate_limit: RateLimit | Limiter | None = None,
        cache: CachePolicy | None = None,
        max_connections: int | None = None,
        max_body_bytes: int = 64 * 2**20,
        ssl: tls.SSLContext | None = None,
        proxy: str | None = None,
        session: "aiohttp.ClientSession | None" = None,
        request_id_header: str | None = None,
        app_info: str | None = None,
        on_event: EventHook | None = None,
        clock: Clock = Clock(),  # noqa: B008 - a frozen value
    ) -> None:
        # Secrets leave this frame's locals before anything can raise: tracebacks may print locals.
        key = None if api_key is None else ApiKey(api_key)
        base, via = Secret(base_url_or_default(base_url)), None if proxy is None else Secret(proxy)
        del api_key, base_url, proxy
        self._default = _default_account(key)
        self._timeout = checks.seconds("timeout", timeout)
        checks.instance("retry", retry, RetryPolicy)
        checks.instance("clock", clock, Clock)
        if on_event is not None and not callable(on_event):
            raise ConfigurationError(f"on_event must be callable, got {type(on_event).__name__}")
        checks.instance("budget", budget, RetryBudget, type(None))
        checks.instance("cache", cache, CachePolicy, type(None))
        checks.instance("rate_limit", rate_limit, RateLimit, Limiter, type(None))
        checks.instance("service_rate_limit", service_rate_limit, RateLimit, Limiter, type(None))
        _check_pool(session, max_connections, ssl, via)
        if session is not None:
            check_session(session)
        self._retry = retry
        transport = TransportSettings(
            endpoint=endpoint(base, allow_http=allow_http),
            headers=fixed_headers(app_info),
            attempt_timeout=checks.seconds("attempt_timeout", attempt_timeout),
            max_body_bytes=checks.count("max_body_bytes", max_body_bytes),
            max_connections=max_connections or DEFAULT_MAX_CONNECTIONS,
            ssl=ssl,
            proxy=None if via is None else proxy_url(via),
            session=session,
        )
        self._engine = Engine(
            EngineSettings(
                retry=retry,
                tokens=RetryTokens(budget),
                clock=clock,
                on_event=on_event,
                request_id_header=header_name(request_id_header),
                transport=transport,
                rate_limit=rate_limit,
                service_rate_limit=service_rate_limit,
                cache=cache,
                timeout=self._timeout,
            )
        )

    def __repr__(self) -> str:
        if not hasattr(self, "_engine"):
            return "<AudiencesClient refused>"  # for tracebacks that print the locals of a failed __init__
        state = "closed" if self._engine.closed else "open"
        return f"<AudiencesClient {self._engine.settings.transport.endpoint} {state}>"

    async def __aenter__(self) -> Self:
        self._engine.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def get_audiences(self, account: Account | None = None, *, timeout: float | None = None) -> AudiencesResponse:
        """Return every audience of one account.

        Args:
            account: The account to fetch; ``None`` means the client's own.
            timeout: Seconds for this whole call; ``None`` means the client's ``timeout``.

        Raises:
            ConfigurationError: There is no account or no key, the key is invalid, or its key function has a bug.
            ClientClosedError: The client is closed, was closed during the call, or belongs to another event loop.
            StatusError: The service answered with an error status; see its subclasses.
            InvalidResponseError: The service's answer is unreadable.
            TransportError: No answer arrived, or the key function or the limiter failed on each attempt.
            DeadlineExceededError: ``timeout`` ran out in the queue or during an attempt, or the account's next turn
                comes after it. If the *wait* after an attempt does not fit, that attempt's error is raised at once
                instead, with ``stop_reason="deadline"``.
        """
        calls = self._engine.open()
        account = self._checked(account)
        result = await calls.answer(Caller(account, self._limit(timeout), self._retry))
        if isinstance(result, AudiencesError):
            try:
                raise result
            finally:
                del result  # its traceback refers to this frame: a reference cycle
        assert isinstance(result, AudiencesResponse)
        return result

    async def get_json(
        self,
        path: str,
        account: Account | None = None,
        *,
        params: Params | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Return the data of another GET call of the same API, as plain data; ``None`` if its envelope has none.

        Key, retries, pace, deadline and errors are those of `get_audiences`; the cache is not used. Whatever the
        service sends as ``data`` is returned: nothing of it is checked, and decoding a large body blocks the event
        loop. This is outside the documented contract.

        Args:
            path: A relative path of plain segments below the base URL, such as ``campaigns/7``.
            account: The account; ``None`` means the client's own.
            params: Parameters for the query: names, and texts or numbers; ``None`` means no query.
            timeout: Seconds for this whole call; ``None`` means the client's ``timeout``.

        Raises:
            ConfigurationError: As from `get_audiences`; or *path* or *params* are invalid.
            AudiencesError: As from `get_audiences`.
        """
        calls = self._engine.open()
        account = self._checked(account)
        url = url_below(self._engine.settings.transport.endpoint, path, params)
        result = await calls.json(path, url, Caller(account, self._limit(timeout), self._retry))
        if isinstance(result, AudiencesError):
            try:
                raise result
            finally:
                del result
        assert isinstance(result, JsonAnswer)
        return result.data

    def stream(
        self,
        accounts: jobs.Accounts,
        *,
        concurrency: int = 100,
        timeout: float | None = None,
        patience: float = 900.0,
    ) -> AbstractAsyncContextManager[AsyncIterator[Outcome]]:
        """Return a context manager that yields the outcomes of many accounts, in order of completion.

        There is exactly one outcome per account given. Enter it, and iterate once::

            async with client.stream(accounts) as outcomes:
                async for outcome in outcomes:
                    ...

        An account that fails is an outcome and never ends the job. At most *concurrency* accounts are in flight, and at
        most twice as many outcomes and calls are held, so that a slow consumer slows the job down. An account that
        retries lets new ones go first if they are ready, unless the service limits them all: 50 for each of
        *concurrency*. With a cache it keeps its place. However the block is left, all tasks end at once.

        Args:
            accounts: Any iterable or async iterable, read in one task when there is room. A sync iterable must not
                block. The client does not close it if the block is left early. Names are labels: a name that occurs
                twice has two outcomes. If the iterable raises, the outcomes of the accounts already read are delivered
                before the error.
            concurrency: Maximum number of accounts in flight, without those that only wait for a retry. More than the
                client's connections brings no gain.
            timeout: Seconds for each account's call; ``None`` means the client's ``timeout``. Delays caused by the
                service as a whole do not count once they are recognized: its outages, a rate limit shared by all
                accounts, and its load. That the service accepts requests and does not answer is recognized after
                ``attempt_timeout``, so this should be longer.
            patience: Longest outage in seconds: after that long without an answer to any account, the remaining
                accounts fail with ``stop_reason="patience"``. Until then one probe at a time is sent, and the other
                accounts wait.

        Raises:
            ConfigurationError: An argument is invalid; while iterating, an item is not an `Account`.
            ClientClosedError: The client is closed or belongs to another event loop; while iterating, the block has
                been left. If the client is closed during the job, the outcomes carry the error.
        """
        fetch = self._job(accounts, concurrency, timeout)
        checks.seconds("patience", patience)
        return self._watched(jobs.stream(jobs.checked(accounts), fetch, concurrency, patience))

    async def fetch_all(
        self,
        accounts: jobs.Accounts,
        *,
        concurrency: int = 100,
        timeout: float | None = None,
        patience: float = 900.0,
    ) -> list[Outcome]:
        """Return the outcomes of many accounts, exactly one per account, in the order given.

        All accounts are read before the first request, so that no outcome is lost if reading fails.

        Args:
            accounts: Any iterable or async iterable; a sync one must not block.
            concurrency: As in `stream`.
            timeout: As in `stream`.
            patience: As in `stream`.

        Raises:
            ConfigurationError: An argument is invalid, or an item is not an `Account`.
            ClientClosedError: The client is closed, or belongs to another event loop.
        """
        fetch = self._job(accounts, concurrency, timeout)
        checks.seconds("patience", patience)
        items = [account async for account in jobs.checked(accounts)]

        async def numbered(item: tuple[int, Account], place: Place) -> tuple[int, Outcome]:
            return item[0], await fetch(item[1], place)

        async with self._watched(jobs.stream(jobs.each(enumerate(items)), numbered, concurrency, patience)) as outcomes:
            by_number = {number: outcome async for number, outcome in outcomes}
        return [by_number[number] for number in range(len(items))]

    def with_options(self, *, timeout: float | None = None, retry: RetryPolicy | None = None) -> Self:
        """Return a client with other settings that shares the pool, the pace, the budget and the cache with this one.

        Closing either closes both::

            patient = client.with_options(timeout=600.0, retry=RetryPolicy(max_attempts=10))

        Args:
            timeout: Seconds for a whole call; ``None`` means this client's.
            retry: Which failures are retried, how often and after which delay; ``None`` means this client's. Callers
                that share a request by way of the cache have the policy of the first of them.

        Raises:
            ConfigurationError: An argument is invalid.
        """
        checks.instance("retry", retry, RetryPolicy, type(None))
        variant = copy.copy(self)
        variant._timeout = self._limit(timeout)  # noqa: SLF001 - of this class
        if retry is not None:
            variant._retry = retry  # noqa: SLF001
        return variant

    def invalidate(self, account: Account | None = None) -> None:
        """Discard the account's cached answer; requests already in flight are not cached. No effect without a cache.

        Args:
            account: The account to invalidate; ``None`` means the client's own.

        Raises:
            ConfigurationError: There is neither an *account* nor an account of the client's own.
        """
        account = self._checked(account)
        if self._engine.calls is not None:
            self._engine.calls.invalidate(account)

    def snapshot(self) -> ClientSnapshot:
        """Return why calls wait right now: the pace of each account in use, and what is left of the retry budget."""
        return self._engine.snapshot()

    async def aclose(self) -> None:
        """Close the client and its own session. Calls in flight end with `ClientClosedError`.

        May be called more than once, and concurrently.
        """
        await self._engine.close()

    @asynccontextmanager
    async def _watched(self, job: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
        with watching(self._engine.open().context.pacer.service):
            async with job as outcomes:
                yield outcomes

    def _job(
        self, accounts: jobs.Accounts, concurrency: int, timeout: float | None
    ) -> Callable[[Account, Place], Awaitable[Outcome]]:
        """Check the arguments of a job and return the function that fetches one of its accounts."""
        self._engine.open()
        checks.instance("accounts", accounts, Iterable, AsyncIterable)
        checks.count("concurrency", concurrency)
        limit = self._limit(timeout)
        now = self._engine.settings.clock.monotonic

        async def fetch(account: Account, place: Place) -> Outcome:
            started = now()
            try:
                self._check_cookies(account)
                result = await self._engine.open().answer(Caller(account, limit, self._retry, place))
            except AudiencesError as error:
                # Without its frames, which would keep the call and its body alive as long as the outcome.
                result = error.with_traceback(None)
            except Exception as error:  # noqa: BLE001 - one account's failure must not end the job
                log_unexpected(error, account.name)
                result = _unexpected(error, account)
            if isinstance(result, AudiencesError):
                return Failed(account, now() - started, result)
            assert isinstance(result, AudiencesResponse)
            return Fetched(account, now() - started, result)

        return fetch

    def _checked(self, account: Account | None) -> Account:
        if account is not None:
            checks.instance("account", account, Account)
        elif (account := self._default) is None:
            raise ConfigurationError("no account: pass one to get_audiences(), or an api_key to the client")
        self._check_cookies(account)
        return account

    def _check_cookies(self, account: Account) -> None:
        if (session := self._engine.settings.transport.session) is not None:
            check_cookies(session, account)

    def _limit(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else checks.seconds("timeout", timeout)


def _unexpected(error: Exception, account: Account) -> AudiencesError:
    """Return the `AudiencesError` that stands for an unexpected exception."""
    failure = AudiencesError(f"the call raised {type(error).__name__}; see its cause", account=account.name)
    failure.__cause__ = error
    failure.call_id = getattr(error, "call_id", None)
    return failure


def _default_account(key: ApiKey | None) -> Account | None:
    if key is None and os.environ.get("AUDIENCES_API_KEY"):
        key = ApiKey(os.environ["AUDIENCES_API_KEY"])
    return None if key is None else Account(DEFAULT_ACCOUNT, key.reveal())


def _check_pool(
    session: "aiohttp.ClientSession | None",
    max_connections: int | None,
    ssl: tls.SSLContext | None,
    proxy: Secret | None,
) -> None:
    settings = {"max_connections": max_connections, "ssl": ssl, "proxy": proxy}
    conflicts = [name for name, value in settings.items() if value is not None]
    if session is not None and conflicts:
        names = " and ".join(conflicts)
        raise ConfigurationError(f"{names} cannot be combined with session; configure the session instead")
    if max_connections is not None:
        checks.count("max_connections", max_connections)
    checks.instance("ssl", ssl, tls.SSLContext, type(None))
    if ssl is not None and not (ssl.verify_mode is tls.CERT_REQUIRED and ssl.check_hostname):
        raise ConfigurationError(
            "ssl must verify certificates and host names; load your own CA into it instead of disabling this"
        )
