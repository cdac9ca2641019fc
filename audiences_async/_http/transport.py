"""The aiohttp session of a client and the attempts on it; checks of a caller's session."""

import asyncio
import ssl as tls
from collections.abc import Awaitable, Mapping
from typing import Final
from weakref import WeakKeyDictionary

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractCookieJar
from attrs import evolve, field, frozen
from yarl import URL

from audiences_async._base import checks
from audiences_async._base.deadlines import Deadlines, Scope, is_cancelled
from audiences_async._http.connections import Connector, Trust, send_once
from audiences_async._http.direct import NO_TIMEOUT, DirectRequests, direct_requests
from audiences_async._http.exchange import Exchange
from audiences_async._http.mistakes import is_mistake, without_frames
from audiences_async._http.wire import Reply, authorization, fixed_headers
from audiences_async.credentials import ApiKey
from audiences_async.errors import ClientClosedError, ConfigurationError, ConnectionFailedError, TransportError
from audiences_async.models import Account

DEFAULT_MAX_CONNECTIONS: Final = 100


@frozen(eq=False)
class TransportSettings:
    """Settings of an attempt; see `AudiencesClient` for each.

    Attributes:
        endpoint: The URL of ``/audiences``.
        attempt_timeout: Seconds for one attempt.
        max_body_bytes: Maximum size of a decompressed 200, in bytes.
        max_connections: Connections of the client's own session.
        ssl: TLS context of the client's own session; ``None`` means the system's CAs.
        proxy: Proxy of the client's own session; ``None`` means no proxy.
        session: The caller's session, which is never closed here; ``None`` means a session of the client's own.
        headers: Headers of every request, besides the key.
    """

    endpoint: URL
    attempt_timeout: float
    max_body_bytes: int
    max_connections: int
    ssl: tls.SSLContext | None
    proxy: URL | None = field(repr=False)  # may hold the proxy's password
    session: aiohttp.ClientSession | None
    headers: Mapping[str, str] = field(factory=fixed_headers)


def check_session(session: aiohttp.ClientSession) -> None:
    """Refuse a session that would send the key, or another credential, in an unintended way.

    Raises:
        ConfigurationError: *session* is not an aiohttp session, reads ``.netrc`` and proxies from the environment, or
            has ``auth`` set.
        ClientClosedError: The session is closed.
    """
    checks.instance("session", session, aiohttp.ClientSession)
    if session.closed:
        raise ClientClosedError("the session given to the client is closed")
    if session.trust_env:
        raise ConfigurationError(
            "session has trust_env=True, so .netrc could replace the API key; use a session without it"
        )
    if getattr(session, "auth", None) is not None:  # aiohttp 4 removed it
        raise ConfigurationError("session has auth set, which conflicts with the API key; use a session without it")


# By cookie jar, because two clients may share one. (Sessions of aiohttp 4 cannot be weakly referenced.)
_sole_accounts: WeakKeyDictionary[AbstractCookieJar, Account] = WeakKeyDictionary()


def check_cookies(session: aiohttp.ClientSession, account: Account) -> None:
    """Refuse a second account on a session that would send it the first one's cookies.

    Raises:
        ConfigurationError: The session keeps cookies, and has served another account.
    """
    if isinstance(session.cookie_jar, aiohttp.DummyCookieJar):
        return
    if _sole_accounts.setdefault(session.cookie_jar, account) != account:
        message = "session keeps cookies, so it serves one account only; give it aiohttp.DummyCookieJar()"
        raise ConfigurationError(message, account=account.name)


class Transport:
    """One session on one event loop, and the size of its pool."""

    def __init__(self, settings: TransportSettings) -> None:
        """Create it inside the event loop that will use it."""
        self._settings = settings
        self._deadlines = Deadlines()  # of the attempts alone
        self._trust = Trust(None if settings.session is None else settings.session.connector)
        self._middlewares: tuple[aiohttp.ClientMiddlewareType, ...] = ()
        self._direct: DirectRequests | None = None
        self.connections: int = settings.max_connections
        """Maximum number of attempts in flight; waiting for a slot is not part of an attempt."""
        if settings.session is None:
            # No cookies: one account's must never be sent with another account's key.
            self._session = aiohttp.ClientSession(
                connector=Connector(settings.ssl, self._trust, is_tls=settings.endpoint.scheme == "https"),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=settings.headers,
                proxy=settings.proxy,
            )
            if settings.proxy is None:
                self._direct = direct_requests(self._session, settings.endpoint)
        else:
            self._session = settings.session
            # aiohttp has no public attribute for a session's loop.
            if getattr(self._session, "_loop", None) not in {None, asyncio.get_running_loop()}:
                raise ClientClosedError("the session given to the client belongs to another event loop")
            # Middlewares of a request replace the session's, for which aiohttp has no public attribute.
            self._middlewares = (*getattr(self._session, "_middlewares", ()), send_once)
            self.connections = _limit_of(self._session.connector)

    async def close(self) -> None:
        """Close the session if it is the client's own. May be called more than once."""
        if self._settings.session is None:
            await self._session.close()
            await self._trust.resolver.close()

    async def attempt(
        self, key: ApiKey, call: Scope | None = None, *, url: URL | None = None, header: tuple[str, str] | None = None
    ) -> Reply | TransportError:
        """Send the request once and read the whole response.

        Failures are returned as values, without aiohttp's frames, whose locals hold the key. Programming errors of
        mocks and middlewares are raised.

        Args:
            key: The API key to send.
            call: The scope of the whole call, if any; its end counts as a failure of the connection.
            url: Another URL of the same origin; ``None`` means the endpoint.
            header: Name and value of one more header; ``None`` means none.
        """
        if self._session.closed:
            raise ClientClosedError("the session given to the client was closed")
        limit, cap = self._settings.attempt_timeout, self._settings.max_body_bytes
        exchange = Exchange(self._trust)
        scope = self._deadlines.within(limit)
        scope.stage = exchange.lease
        if call is not None:
            call.stage = exchange.lease
        try:
            with scope:
                response = await self._send(authorization(key), url, header)
                reply = exchange.begin(response, cap) or await exchange.read(cap)
                return reply if url is None else evolve(reply, is_json=True)
        except asyncio.CancelledError as cancelled:
            if not is_cancelled():
                return ConnectionFailedError("the exchange was cancelled, but not by its caller")
            if call is not None and call.expired:
                self._trust.withdraw(exchange.lease)
            cancelled.__context__ = None
            raise cancelled.with_traceback(None) from None
        except Exception as error:  # noqa: BLE001 - aiohttp raises far more than ClientError, including its own bugs
            if is_mistake(error):
                raise without_frames(error, key) from None
            return exchange.outcome(error, key, out_of_time=limit if scope.expired else None)
        finally:
            exchange.close()

    def abandon(self) -> None:
        """Time out every attempt in flight now."""
        self._deadlines.expire_all()

    def _send(
        self, authorization: str, url: URL | None, header: tuple[str, str] | None
    ) -> Awaitable[aiohttp.ClientResponse]:
        if url is None and self._direct is not None and self._direct.usable:
            return self._direct.send(authorization, header)
        return self._session.request(
            hdrs.METH_GET,
            url or self._settings.endpoint,
            headers={**self._settings.headers, **dict([header] if header else []), hdrs.AUTHORIZATION: authorization},
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=False,
            timeout=NO_TIMEOUT,
            middlewares=self._middlewares,
        )


def _limit_of(connector: aiohttp.BaseConnector | None) -> int:
    """Return the connections per host that a caller's session allows; a very large number if it sets no limit."""
    limits = [] if connector is None else [connector.limit, connector.limit_per_host]
    return min((limit for limit in limits if limit), default=2**31)
