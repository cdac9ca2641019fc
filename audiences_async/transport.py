"""The aiohttp session, and one attempt on it: request, headers, whole body, and every failure as one of our errors."""

import asyncio
import errno
import math
import os
import re
import select
import socket
import ssl as tls
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractCookieJar, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from attrs import field, frozen
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from audiences_async import checks
from audiences_async.credentials import ApiKey
from audiences_async.deadlines import Deadlines, Scope, is_cancelled
from audiences_async.direct import DISCONNECTED, NO_TIMEOUT, DirectRequests, ResendError, direct_requests
from audiences_async.errors import (
    AttemptTimeoutError,
    ClientClosedError,
    ConfigurationError,
    ConnectionFailedError,
    TransportError,
    printable,
)
from audiences_async.models import Account
from audiences_async.resolver import SharedResolver
from audiences_async.wire import FIXED_HEADERS, MAX_ERROR_BODY, Reply, authorization

DEFAULT_MAX_CONNECTIONS: Final = 100
_ERROR_BODY_TIMEOUT: Final = 1.0  # s; the status alone decides
_PIECE_SIZE: Final = 256 * 1024
_NO_SOCKETS: Final = {errno.EMFILE, errno.ENFILE}
# What an attempt was doing when it timed out.
_CONNECT: Final = "connecting"
_LOOK_UP: Final = "looking up the name"
_HANDSHAKE: Final = "in the TLS handshake"
_HEAD: Final = "waiting for the reply"
_BODY: Final = "reading the body"
_CODINGS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


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
    """

    endpoint: URL
    attempt_timeout: float
    max_body_bytes: int
    max_connections: int
    ssl: tls.SSLContext | None
    proxy: URL | None = field(repr=False)  # may hold the proxy's password
    session: aiohttp.ClientSession | None


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


_current: ContextVar["_Exchange"] = ContextVar("exchange")
"""The current task's exchange; aiohttp's hooks do not pass it on."""


async def _begin(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Run as the innermost middleware of a caller's session, whose pool is aiohttp's."""
    exchange = _current.get()
    exchange.begin("a middleware of the session would have sent the request twice")
    name = "send" if hasattr(request, "send") else "_send"  # aiohttp 4, and before
    write = getattr(request, name)

    async def checked(connection: "Connection") -> aiohttp.ClientResponse:
        await exchange.take_caller_connection(connection)
        return await write(connection)  # type: ignore[no-any-return]

    setattr(request, name, checked)  # no other code refers to the connection before it is written to
    while True:
        try:
            return await send(request)
        except _UnusableConnectionError:
            continue  # closed, and nothing was sent on it: the pool has another
        except aiohttp.ClientConnectorError:
            raise  # never sent, and never retried by aiohttp
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            raise ResendError(DISCONNECTED) from None


class _UnusableConnectionError(Exception):
    """A pooled connection must not be used."""


class _Trust:
    """Which idle connections of a pool may still be used: those that became idle after the last failure of one."""

    def __init__(self) -> None:
        self.now = asyncio.get_running_loop().time
        self._failed_at = -math.inf
        # Connections of a caller's session, which cannot be marked.
        self._used: WeakSet[asyncio.Transport] = WeakSet()
        self._lost: WeakSet[asyncio.Transport] = WeakSet()

    def has(self, idle_since: float) -> bool:
        """Return whether a connection of the client's own session, idle since *idle_since*, may be used."""
        return idle_since > self._failed_at

    def has_caller_connection(self, transport: asyncio.Transport) -> bool:
        """Return whether a connection of a caller's session may be used."""
        return transport not in self._lost

    def knows(self, transport: asyncio.Transport) -> bool:
        """Return whether a connection of a caller's session was used here before."""
        return transport in self._used

    def returned(self, transport: asyncio.Transport) -> None:
        """Record that a connection of a caller's session was used here."""
        self._used.add(transport)

    def lose(self, pool: aiohttp.BaseConnector | None) -> None:
        """Record that a connection has failed; connections that are idle now are likely to be dead too.

        Args:
            pool: The pool of a caller's session; ``None`` for the client's own.
        """
        self._failed_at = self.now()
        # aiohttp has no public list of its idle connections.
        for idle in list(getattr(pool, "_conns", {}).values()):
            self._lost.update(protocol.transport for protocol, *_ in idle if protocol.transport is not None)


def _ends(connection: Connection) -> tuple[ResponseHandler, asyncio.Transport]:
    """Return the two objects at this end of a connection: aiohttp's protocol and asyncio's transport."""
    protocol = connection.protocol
    assert protocol is not None
    if protocol.transport is None:  # lost immediately after it was made
        connection.close()
        raise aiohttp.ServerDisconnectedError
    return protocol, protocol.transport


def _arrivals(transport: asyncio.BaseTransport) -> Callable[[], Sequence[object]]:
    """Return a function that polls the socket for unread data."""
    socket = transport.get_extra_info("socket")
    if not hasattr(select, "poll"):  # on Windows, where select takes any socket
        return lambda: select.select([socket], [], [], 0)[0]
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return partial(poll.poll, 0)


class _Line(asyncio.Protocol):
    """A connection of the client's own pool, between the transport and aiohttp's protocol; it rejects unsolicited data.

    aiohttp would buffer such data without limit, and return it as the responses of the next requests.
    """

    def __init__(self, protocol: ResponseHandler, transport: asyncio.Transport) -> None:
        self._protocol = protocol
        self.transport: asyncio.Transport = transport
        self.arrivals = _arrivals(transport)
        self.exchange: _Exchange | None = None
        """The exchange in flight."""
        self.idle_since: float = math.inf
        transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            self.transport.abort()
        else:
            self._protocol.data_received(data)

    def eof_received(self) -> None:
        self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)
        if self.exchange is not None:
            self.exchange.lost(exc)


class _Resolver(SharedResolver):
    """Record how far each exchange has come."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        exchange = _current.get()
        exchange.phase = _LOOK_UP
        found = await super().resolve(host, port, family)
        exchange.phase = _CONNECT
        exchange.address = found[0]["host"]
        return found


def _new_socket(address: tuple[Any, ...]) -> socket.socket:
    """Create a socket and add it to the exchange, which checks it on a timeout."""
    made = socket.socket(*address[:3])
    _current.get().sockets.append(made)
    return made


class _Connector(aiohttp.TCPConnector):
    """A pool that passes its connection to the exchange, and never gives it a second one."""

    def __init__(self, ssl: tls.SSLContext | None, resolver: _Resolver, trust: _Trust, *, is_tls: bool) -> None:
        # No limit here: the pacer's slots limit the connections, and waiting for one is not part of an attempt. No DNS
        # cache: its look-ups outlive a cancelled call.
        super().__init__(
            limit=0,
            use_dns_cache=False,
            ssl=True if ssl is None else ssl,
            resolver=resolver,
            socket_factory=_new_socket if is_tls else None,
        )
        self._trust = trust
        self._process = os.getpid()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[aiohttp.tracing.Trace],
        timeout: aiohttp.ClientTimeout,
    ) -> Connection:
        exchange = _current.get()
        exchange.begin(DISCONNECTED)
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol, transport = _ends(connection)
            line = transport.get_protocol()
            if not isinstance(line, _Line):
                exchange.take(_Line(protocol, transport))
                return connection
            # Unsolicited data or the end arrived while it was idle, or another connection idle at that time has failed.
            if protocol.should_close or not self._trust.has(line.idle_since) or line.arrivals():
                connection.close()
                continue
            exchange.reused = True
            exchange.take(line)
            return connection

    # A forked process must not remove the connections from the epoll instance that it shares with its parent.

    def _close(self, *, abort_ssl: bool = False) -> Any:
        return super()._close(abort_ssl=abort_ssl) if os.getpid() == self._process else []

    def _close_immediately(self, *, abort_ssl: bool = False) -> Any:  # its name in aiohttp 4
        return super()._close_immediately(abort_ssl=abort_ssl) if os.getpid() == self._process else []  # type: ignore[misc]


class Transport:
    """One session on one event loop, and the size of its pool."""

    def __init__(self, settings: TransportSettings, deadlines: Deadlines) -> None:
        """Create it inside the event loop that will use it."""
        self._settings = settings
        self._deadlines = deadlines
        self._trust = _Trust()
        self._under_way: set[Scope] = set()
        self._resolver = _Resolver()
        self._middlewares: tuple[aiohttp.ClientMiddlewareType, ...] = ()
        self._direct: DirectRequests | None = None
        if settings.session is None:
            # No cookies: one account's must never be sent with another account's key.
            self._session = aiohttp.ClientSession(
                connector=_Connector(
                    settings.ssl, self._resolver, self._trust, is_tls=settings.endpoint.scheme == "https"
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=FIXED_HEADERS,
                proxy=settings.proxy,
            )
            self._headers: dict[str, str] = {}
            if settings.proxy is None:
                self._direct = direct_requests(self._session, settings.endpoint)
            connections = settings.max_connections
        else:
            self._session = settings.session
            # aiohttp has no public attribute for a session's loop.
            if getattr(self._session, "_loop", None) not in {None, asyncio.get_running_loop()}:
                raise ClientClosedError("the session given to the client belongs to another event loop")
            self._headers = dict(FIXED_HEADERS)
            # Middlewares of a request replace the session's, for which aiohttp has no public attribute.
            self._middlewares = (*getattr(settings.session, "_middlewares", ()), _begin)
            connections = _limit_of(settings.session.connector)
        self.connections: int = connections
        """Maximum number of attempts in flight; waiting for a slot is not part of an attempt."""

    async def close(self) -> None:
        """Close the session if it is the client's own. May be called more than once."""
        if self._settings.session is None:
            await self._session.close()
            await self._resolver.close()

    async def attempt(self, key: ApiKey, call: Scope | None = None) -> Reply | TransportError:
        """Send the request once and read the whole response.

        Failures are returned as values, without aiohttp's frames, whose locals hold the key.

        Args:
            key: The API key to send.
            call: The scope of the whole call, if any; its end counts as a failure of the connection.
        """
        if self._session.closed:
            raise ClientClosedError("the session given to the client was closed")
        exchange = _Exchange(self._trust)
        _current.set(exchange)
        scope = self._deadlines.within(self._settings.attempt_timeout, exchange.out_of_time)
        self._under_way.add(scope)
        started = self._trust.now()
        try:
            with scope:
                exchange.response = await self._send(authorization(key))
                exchange.phase = _BODY
                return await exchange.read(self._settings.max_body_bytes)
        except asyncio.CancelledError as cancelled:
            if not is_cancelled():
                return ConnectionFailedError("the exchange was cancelled, but not by its caller")
            if call is not None and call.expired:
                self._distrust(exchange)
            cancelled.__context__ = None
            raise cancelled.with_traceback(None) from None
        except Exception as error:  # noqa: BLE001 - aiohttp raises far more than ClientError, including its own bugs
            if exchange.refused:
                return exchange.reply()
            self._distrust(exchange)
            if scope.expired:
                return self._timed_out(self._trust.now() - started, exchange.phase)
            return _failure(error, exchange.lost_by, key, reused=exchange.reused)
        finally:
            self._under_way.discard(scope)
            exchange.close()

    def abandon(self) -> None:
        """Time out every attempt in flight now."""
        for scope in tuple(self._under_way):
            scope.expire()

    def _timed_out(self, elapsed: float, phase: str) -> AttemptTimeoutError:
        limit = self._settings.attempt_timeout
        if elapsed < limit:
            return AttemptTimeoutError(f"no complete reply within {elapsed:.3g} s, nor to any other request, {phase}")
        return AttemptTimeoutError(f"no complete reply within attempt_timeout={limit:g} s, {phase}")

    def _distrust(self, exchange: "_Exchange") -> None:
        """Make the next attempt avoid this connection's generation, or its address."""
        if exchange.reused or self._settings.session is not None:
            self._trust.lose(None if self._settings.session is None else self._session.connector)
        elif exchange.address is not None:
            self._resolver.failed(exchange.address)

    def _send(self, authorization: str) -> Awaitable[aiohttp.ClientResponse]:
        if self._direct is not None and self._direct.usable:
            return self._direct.send(authorization)
        return self._session.request(
            hdrs.METH_GET,
            self._settings.endpoint,
            headers={**self._headers, hdrs.AUTHORIZATION: authorization},
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=False,
            timeout=NO_TIMEOUT,
            middlewares=self._middlewares,
        )


class _Exchange:
    """One request, and what has been read of its response."""

    __slots__ = (
        "_begun", "_body", "_line", "_transport", "_trust", "_unwatch",
        "address", "lost_by", "phase", "response", "reused", "sockets",
    )  # fmt: skip

    def __init__(self, trust: _Trust) -> None:
        self._trust = trust
        self._begun = False
        self._body = bytearray()
        self._line: _Line | None = None
        self._transport: asyncio.Transport | None = None
        self._unwatch: Callable[[], object] | None = None
        self.response: aiohttp.ClientResponse | None = None
        self.reused: bool = False
        """Whether it uses a connection that another exchange has used before."""
        self.phase: str = _CONNECT
        """Its current phase, for the message of a timeout."""
        self.address: str | None = None
        """The first address it connects to, if a name was resolved."""
        self.sockets: list[socket.socket] = []
        """Sockets created to connect with TLS."""
        self.lost_by: BaseException | None = None
        """Exception that ended its connection; ``None`` if it was closed cleanly, or is still open."""

    def out_of_time(self) -> None:
        """Record the phase; its sockets are closed a moment later."""
        if self.phase == _CONNECT and any(map(_is_connected, self.sockets)):
            self.phase = _HANDSHAKE

    def begin(self, again: str) -> None:
        """Mark the request as sent, which may happen once.

        Raises:
            ResendError: It was sent before; *again* is the message.
        """
        if self._begun:
            raise ResendError(again)
        self._begun = True

    @property
    def refused(self) -> bool:
        """Whether the status alone decides, even if the body is incomplete."""
        return self.response is not None and self.response.status != 200

    def reply(self, *, exceeded: int | None = None) -> Reply:
        """Return the response as read so far."""
        assert self.response is not None
        return Reply(self.response.status, _headers(self.response), bytes(self._body), exceeded)

    def take(self, line: _Line) -> None:
        """Use a connection of the client's own pool."""
        self._line, self._transport = line, line.transport
        self.phase = _HEAD
        line.exchange = self

    async def take_caller_connection(self, connection: Connection) -> None:
        """Use a connection of a caller's session.

        Raises:
            _UnusableConnectionError: Unsolicited data arrived on it, or it may be dead.
        """
        protocol, transport = _ends(connection)
        arrivals = _arrivals(transport)
        for _ in range(3):  # the event loop reads the data in its next turns; of TLS it may be harmless
            if arrivals():
                await asyncio.sleep(0)
        if protocol.should_close or not protocol.is_connected() or not self._trust.has_caller_connection(transport):
            raise _UnusableConnectionError
        self.reused = self._trust.knows(transport)
        self.phase = _HEAD
        self._transport = transport
        if (closed := protocol.closed) is not None:
            closed.remove_done_callback(_retrieve)
            closed.add_done_callback(_retrieve)
            closed.add_done_callback(self._closed)
            self._unwatch = partial(closed.remove_done_callback, self._closed)

    def _closed(self, closed: "asyncio.Future[None]") -> None:
        error = _error_of(closed)
        self.lost(error if error is None else error.__cause__)

    def lost(self, error: BaseException | None) -> None:
        """Record that the connection is gone. aiohttp does not inform the reader of a body that it could not parse."""
        self.lost_by = error
        if self.response is not None and not self.response.content.is_eof():
            self.response.content.set_exception(
                aiohttp.ClientPayloadError("the connection ended before the end of the body")
            )

    def close(self) -> None:
        """Drop the connection, unless the response was read to its end and the pool already has it back."""
        if self._line is not None and self._line.exchange is self:
            self._line.exchange = None
            self._line.idle_since = self._trust.now()
        if self._unwatch is not None:
            self._unwatch()
        response, transport = self.response, self._transport
        # aiohttp treats a 101 without Upgrade as a response, and reuses the connection for the next request.
        is_whole = response is not None and response.connection is None and response.status >= 200
        if response is not None:
            response.close()
        if transport is not None and not (is_whole and not transport.is_closing()):
            transport.abort()  # closing TLS waits up to 30 s for the peer
        elif transport is not None and self._line is None:
            self._trust.returned(transport)
        self.response = self._transport = self._line = self._unwatch = None
        self._body = bytearray()

    async def read(self, cap: int) -> Reply:
        """Return the whole response; of a 200 at most *cap* bytes."""
        assert self.response is not None
        if self.response.version is not None and self.response.version.major != 1:
            raise aiohttp.ClientError("not HTTP/1")
        if self.response.status == 200:
            is_below = await self._read(cap)
            has_end = {hdrs.CONTENT_LENGTH, hdrs.TRANSFER_ENCODING} & self.response.headers.keys()
            if self.lost_by is not None and not has_end:
                raise aiohttp.ClientPayloadError("the connection was reset before the end of the body")
            return self.reply(exceeded=None if is_below else cap)
        async with asyncio.timeout(_ERROR_BODY_TIMEOUT):
            await self._read(MAX_ERROR_BODY)
        return self.reply()

    def _read(self, cap: int) -> Awaitable[bool]:
        """Read and decompress the body; return ``False`` if it is larger than *cap* and was truncated."""
        assert self.response is not None
        headers = _headers(self.response)
        if hdrs.TRANSFER_ENCODING in headers and _codings(headers, hdrs.TRANSFER_ENCODING) != "chunked":
            raise aiohttp.ClientPayloadError("unexpected Transfer-Encoding")
        coding = _codings(headers, hdrs.CONTENT_ENCODING) if hdrs.CONTENT_ENCODING in headers else "identity"
        if coding in {"", "identity"}:
            return self._read_plain(cap)
        if coding not in _CODINGS:
            sent = ", ".join(headers.getall(hdrs.CONTENT_ENCODING))
            raise aiohttp.ClientPayloadError(f"unexpected Content-Encoding {sent}")
        return self._read_deflated(cap, _Inflater(_CODINGS[coding]))

    async def _read_plain(self, cap: int) -> bool:
        assert self.response is not None
        if (self.response.content_length or 0) > cap:
            cap = min(cap, MAX_ERROR_BODY)  # only the start is kept
        content = self.response.content
        while not content.at_eof():
            self._body += await content.readany()
            if len(self._body) > cap:
                self._keep_start(cap)
                return False
        return True

    async def _read_deflated(self, cap: int, inflater: "_Inflater") -> bool:
        assert self.response is not None
        while chunk := await self.response.content.readany():
            inflater.feed(chunk)
            while (piece := inflater.piece()) is not None:
                self._body += piece
                if len(self._body) > cap:
                    self._keep_start(cap)
                    return False
                if len(piece) in {0, _PIECE_SIZE} or inflater.members > 1:
                    await asyncio.sleep(0)  # a bomb, or many tiny members, block the event loop for one piece only
        inflater.finish()
        return True

    def _keep_start(self, cap: int) -> None:
        """Truncate a body that is too large to the size that an error may show."""
        del self._body[min(cap, MAX_ERROR_BODY) :]


def _retrieve(closed: "asyncio.Future[None]") -> None:
    """Retrieve the exception of a closed connection, so that asyncio does not log it as never retrieved."""
    _error_of(closed)


def _error_of(closed: "asyncio.Future[None]") -> BaseException | None:
    return None if closed.cancelled() else closed.exception()


def _headers(response: aiohttp.ClientResponse) -> CIMultiDictProxy[str]:
    """Return the headers one by one: aiohttp 4 joins equal names, and splits lists."""
    headers: Any = response.headers
    if isinstance(headers, CIMultiDictProxy):
        return headers
    pairs = [(_text(name), _text(value)) for name, value in response.raw_headers]
    return CIMultiDictProxy(CIMultiDict(pairs))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _codings(headers: CIMultiDictProxy[str], name: str) -> str:
    """Return all codings of a header that may occur more than once."""
    return ", ".join(headers.getall(name)).strip().lower()


class _Inflater:
    """Decompress gzip or deflate in pieces of bounded size."""

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._waiting = b""
        self._zlib: zlib._Decompress | None = None
        self.members: int = 0
        """Number of members read to their end."""

    def feed(self, chunk: bytes) -> None:
        self._waiting += chunk

    def piece(self) -> bytes | None:
        """Return the next piece, which may be empty; ``None`` if more data must be fed first."""
        if self.members and self._zlib is None:
            self._waiting = self._waiting.lstrip(b"\0")  # padding
        if not self._waiting:
            return None
        if self._zlib is None:
            self._zlib = zlib.decompressobj(self._wbits_for(self._waiting))
        piece = self._zlib.decompress(self._waiting, _PIECE_SIZE)
        self._waiting = self._zlib.unconsumed_tail
        if self._zlib.eof:
            # Another member may follow: RFC 1952, section 2.2.
            self._waiting, self._zlib = self._zlib.unused_data, None
            self.members += 1
        return piece

    def finish(self) -> None:
        """Raise if the compressed data was cut short."""
        if self._zlib is not None:
            raise zlib.error("the compressed body is cut short")

    def _wbits_for(self, start: bytes) -> int:
        # RFC 9110, section 8.4.1.2: some servers send "deflate" without the zlib wrapper.
        raw = self._wbits == zlib.MAX_WBITS and start[0] & 0x0F != zlib.DEFLATED
        return -zlib.MAX_WBITS if raw else self._wbits


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _failure(error: Exception, lost_by: BaseException | None, key: ApiKey, *, reused: bool) -> ConnectionFailedError:
    """Return our error for a failure that left no readable response.

    Args:
        error: aiohttp's exception.
        lost_by: Exception that ended the connection, if any; aiohttp's own exception does not have it.
        key: The key that was sent, to be masked.
        reused: Whether the connection had been used before.
    """
    alert = _alert(error.os_error if isinstance(error, aiohttp.ClientConnectorSSLError) else lost_by)
    if alert is not None:
        hint = "; a client certificate goes into ssl=" if "CERT" in alert or "UNKNOWN_CA" in alert else ""
        return ConnectionFailedError(f"the server refused the TLS connection: {alert}{hint}", transient=False)
    match error:
        case aiohttp.ClientConnectorCertificateError():
            reason = f"the server's certificate is not trusted: {_describe(error.certificate_error, key)}"
            return ConnectionFailedError(reason, transient=False)
        case aiohttp.ClientConnectorError() if error.os_error.errno in _NO_SOCKETS:
            reason = f"this process cannot open another socket: {error.os_error.strerror}"
            return ConnectionFailedError(
                f"{reason}; raise the limit (ulimit -n), or lower max_connections", unsent=True
            )
        case ResendError():
            return ConnectionFailedError(str(error), stale_connection=reused)
        case aiohttp.ClientConnectorError():
            reason = f"cannot connect to {error.host}:{error.port}: {error.os_error}"
        case aiohttp.ClientHttpProxyError():
            # Without aiohttp's message, which may contain the proxy's password.
            reason = f"the proxy refused the connection with status {error.status}"
        case aiohttp.ClientResponseError():
            # `status` is aiohttp's code for what it could not parse, not the server's.
            reason = f"the reply is not HTTP: {_unquoted(error.message, key)}"
        case zlib.error() | aiohttp.ClientPayloadError():
            reason = f"the body is cut short or corrupt: {_describe(error, key)}"
        case _:
            reason = f"the exchange failed: {_describe(error, key)}"
    return ConnectionFailedError(reason)


def _alert(error: BaseException | None) -> str | None:
    """Return the TLS alert that refused the connection; ``None`` if there was none, or a transient one."""
    reason = error.reason if isinstance(error, tls.SSLError) else None
    return reason if reason and "ALERT" in reason and "INTERNAL_ERROR" not in reason else None


def _describe(error: Exception, key: ApiKey) -> str:
    text = _unquoted(str(error), key)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _unquoted(text: str, key: ApiKey) -> str:
    """Return aiohttp's message without the bytes that it quotes: it truncates them, perhaps inside an echoed key."""
    return printable(key.redact(re.split(r"\bb['\"]", text)[0].strip(" :\n")))


def _limit_of(connector: aiohttp.BaseConnector | None) -> int:
    """Return the connections per host that a caller's session allows; a very large number if it sets no limit."""
    limits = [] if connector is None else [connector.limit, connector.limit_per_host]
    return min((limit for limit in limits if limit), default=2**31)
