"""The aiohttp session, and one attempt on it: send, headers, whole body, and every failure as one of our errors."""

import asyncio
import os
import re
import select
import ssl as tls
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import aiohttp
from aiohttp import hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from attrs import field, frozen
from multidict import CIMultiDictProxy
from yarl import URL

from audiences_async import checks
from audiences_async.credentials import ApiKey
from audiences_async.deadlines import Deadlines
from audiences_async.direct import DISCONNECTED, NO_TIMEOUT, DirectRequests, NotAgainError
from audiences_async.errors import (
    AttemptTimeoutError,
    ClientClosedError,
    ConfigurationError,
    ConnectionFailedError,
    TransportError,
    printable,
)
from audiences_async.models import Account
from audiences_async.wire import FIXED_HEADERS, MAX_ERROR_BODY, Reply, authorization

DEFAULT_MAX_CONNECTIONS: Final = 100
_ERROR_BODY_TIMEOUT: Final = 1.0  # s; the status has decided already
_INFLATED_PIECE: Final = 256 * 1024
_CODINGS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


@frozen(eq=False)
class TransportSettings:
    """What one attempt needs to know; see `AudiencesClient` for each.

    Attributes:
        endpoint: The URL of ``/audiences``.
        attempt_timeout: Seconds for one attempt.
        max_body_bytes: The cap of an inflated 200.
        max_connections: Connections of our own session.
        ssl: The TLS context of our own session; ``None`` means the system's certificates.
        proxy: The proxy of our own session; ``None`` means none.
        session: A session that stays its owner's; ``None`` means our own.
    """

    endpoint: URL
    attempt_timeout: float
    max_body_bytes: int
    max_connections: int
    ssl: tls.SSLContext | None
    proxy: URL | None = field(repr=False)  # may hold the proxy's password
    session: aiohttp.ClientSession | None


def check_session(session: aiohttp.ClientSession) -> None:
    """Refuse a session that would send the key, or another credential, in a way its owner did not mean.

    Raises:
        ConfigurationError: It is no aiohttp session, reads ``.netrc`` and proxies from the environment, or has an
            ``auth`` of its own.
        ClientClosedError: The session is closed.
    """
    checks.instance("session", session, aiohttp.ClientSession)
    if session.closed:
        raise ClientClosedError("the session given to the client is closed")
    if session.trust_env:
        raise ConfigurationError("session has trust_env=True: .netrc would fight the API key; give one without")
    if session.auth is not None:
        raise ConfigurationError("session has an auth of its own, which would fight the API key; give one without")


# Of the session and not of a client: two clients may share one.
_sole_accounts: WeakKeyDictionary[aiohttp.ClientSession, Account] = WeakKeyDictionary()


def check_cookies(session: aiohttp.ClientSession, account: Account) -> None:
    """Refuse a second account on a session that would send it the first one's cookies.

    Raises:
        ConfigurationError: The session keeps cookies, and has served another account.
    """
    if isinstance(session.cookie_jar, aiohttp.DummyCookieJar):
        return
    if _sole_accounts.setdefault(session, account) != account:
        message = "session keeps cookies, so it serves one account only; give it aiohttp.DummyCookieJar()"
        raise ConfigurationError(message, account=account.name)


_current: ContextVar["_Exchange"] = ContextVar("exchange")
"""The exchange of this task, for where aiohttp tells nothing of it."""


async def _begin(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Innermost middleware, where the pool is not ours."""
    _current.get().begin("a middleware of the session would have sent the request twice")
    _drop_spoilt(request)
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise  # never sent, and never sent again by aiohttp
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
        raise NotAgainError(DISCONNECTED) from None


def _arrivals(protocol: ResponseHandler) -> Callable[[], Sequence[object]]:
    """A function that tells whether anything has come which the event loop has not had the time to read."""
    assert protocol.transport is not None
    socket = protocol.transport.get_extra_info("socket")
    if not hasattr(select, "poll"):  # on Windows, where select takes any socket
        return lambda: select.select([socket], [], [], 0)[0]
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return partial(poll.poll, 0)


def _is_spoilt(protocol: ResponseHandler, arrivals: Callable[[], Sequence[object]]) -> bool:
    """Whether data or the end came while it was idle: aiohttp would take the data for the next request's answer."""
    return protocol.should_close or bool(arrivals())


def _drop_spoilt(request: aiohttp.ClientRequest) -> None:
    """Close what the request must not go out on, of the connections that a given session keeps."""
    # aiohttp shows its idle connections to nobody in public. It takes the first that is connected.
    idle = getattr(request.session.connector, "_conns", {})
    for protocol, _ in idle.get(request.connection_key, ()):
        if protocol.is_connected() and not _is_spoilt(protocol, _arrivals(protocol)):
            break
        protocol.close()


class _Line:
    """A connection of our own pool."""

    __slots__ = ("arrivals", "exchange")

    def __init__(self, protocol: ResponseHandler, exchange: "_Exchange") -> None:
        self.arrivals = _arrivals(protocol)
        self.exchange = exchange
        """The last one on it."""


class _Connector(aiohttp.TCPConnector):
    """A pool that lets each exchange know its connection, and gives it no second one."""

    def __init__(self, ssl: tls.SSLContext | None) -> None:
        # No limit here: the pacer's slots bound the connections, and waiting for one is no part of an attempt.
        # No cache of names: its look-ups go on when the call that asked has been cancelled.
        super().__init__(limit=0, use_dns_cache=False, ssl=True if ssl is None else ssl)
        self._process = os.getpid()
        self._lines: dict[ResponseHandler, _Line] = {}

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
            protocol = connection.protocol
            assert protocol is not None
            line = self._lines.get(protocol)
            if line is None or not _is_spoilt(protocol, line.arrivals):
                break
            connection.close()
        exchange.protocol = protocol
        if line is None:
            self._watch(connection, protocol, exchange)
        else:
            exchange.reused = True
            line.exchange = exchange
        return connection

    def _watch(self, connection: Connection, protocol: ResponseHandler, exchange: "_Exchange") -> None:
        if (closed := protocol.closed) is None:  # lost within the moment since it was made
            connection.close()
            raise aiohttp.ServerDisconnectedError
        closed.add_done_callback(partial(self._lost, protocol))
        self._lines[protocol] = _Line(protocol, exchange)

    def _close(self, *, abort_ssl: bool = False) -> Any:
        # A forked process that ends would take the connections out of the epoll that it shares with its parent.
        return super()._close(abort_ssl=abort_ssl) if os.getpid() == self._process else []

    def _lost(self, protocol: ResponseHandler, closed: "asyncio.Future[None]") -> None:
        with suppress(asyncio.CancelledError):  # where closing the pool was
            closed.exception()  # has been told to whom it concerns
        self._lines.pop(protocol).exchange.lost()


class Transport:
    """One session on one event loop, and its connection slots."""

    def __init__(self, settings: TransportSettings, deadlines: Deadlines) -> None:
        """Must run inside the event loop that will use it."""
        self._settings = settings
        self._deadlines = deadlines
        self._middlewares: tuple[aiohttp.ClientMiddlewareType, ...] = ()
        self._direct: DirectRequests | None = None
        if settings.session is None:
            # The jar that keeps nothing: one account's cookie never goes out with another account's key.
            self._session = aiohttp.ClientSession(
                connector=_Connector(settings.ssl),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=FIXED_HEADERS,
                proxy=settings.proxy,
            )
            self._headers: dict[str, str] = {}
            if settings.proxy is None:
                self._direct = DirectRequests(self._session, settings.endpoint)
            connections = settings.max_connections
        else:
            self._session = settings.session
            # aiohttp does not tell the loop of a session in public.
            if getattr(self._session, "_loop", None) not in {None, asyncio.get_running_loop()}:
                raise ClientClosedError("the session given to the client belongs to another event loop")
            self._headers = dict(FIXED_HEADERS)
            # Middlewares of a request replace those of the session, and aiohttp does not tell the latter in public.
            self._middlewares = (*getattr(settings.session, "_middlewares", ()), _begin)
            connections = _limit_of(settings.session.connector)
        self.connections: int = connections
        """How many attempts may be under way at once; waiting for one is no part of it."""

    async def close(self) -> None:
        """Close the session if it is our own. May be called again."""
        if self._settings.session is None:
            await self._session.close()

    async def attempt(self, key: ApiKey) -> Reply | TransportError:
        """Send the request once and read the whole reply.

        Whatever goes wrong is a value, with none of aiohttp's frames on it: their locals hold the key.
        """
        if self._session.closed:
            raise ClientClosedError("the session given to the client was closed")
        exchange = _Exchange()
        _current.set(exchange)
        scope = self._deadlines.within(self._settings.attempt_timeout)
        try:
            with scope:
                exchange.response = await self._send(authorization(key))
                return await exchange.read(self._settings.max_body_bytes)
        except asyncio.CancelledError as cancelled:
            cancelled.__context__ = None
            raise cancelled.with_traceback(None) from None
        except Exception as error:  # noqa: BLE001 - aiohttp raises far more than ClientError, bugs of its own included
            if exchange.refused:
                return exchange.reply()
            if scope.expired:
                limit = self._settings.attempt_timeout
                return AttemptTimeoutError(f"no whole reply within attempt_timeout={limit:g} s")
            return _failure(error, key, reused=exchange.reused)
        finally:
            exchange.close()

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
    """One request and what has been read of its reply."""

    __slots__ = ("_begun", "_body", "protocol", "response", "reused")

    def __init__(self) -> None:
        self._begun = False
        self._body = bytearray()
        self.response: aiohttp.ClientResponse | None = None
        self.protocol: ResponseHandler | None = None
        """Where it went, on our own pool."""
        self.reused: bool = False
        """Whether that was a connection that another exchange has used before."""

    def begin(self, again: str) -> None:
        """The request goes out now, which it may do once.

        Raises:
            NotAgainError: It has done so before, which means what *again* says.
        """
        if self._begun:
            raise NotAgainError(again)
        self._begun = True

    @property
    def refused(self) -> bool:
        """Whether the status alone decides, however much of the body can be read."""
        return self.response is not None and self.response.status != 200

    def reply(self, *, exceeded: int | None = None) -> Reply:
        """What has been read."""
        assert self.response is not None
        return Reply(self.response.status, self.response.headers, bytes(self._body), exceeded)

    def close(self) -> None:
        """Give back a connection that was read to its end; drop any other."""
        if self.response is not None:
            self.response.close()
            # aiohttp takes a 101 without Upgrade for an answer, and the connection back for the next request.
            if self.response.status < 200 and self.protocol is not None:
                self.protocol.close()
        # The pool keeps the exchange as long as the connection.
        self.response = self.protocol = None
        self._body = bytearray()

    def lost(self) -> None:
        """The connection is gone: aiohttp does not tell it a reader whose body it could not parse."""
        if self.response is not None and not self.response.content.is_eof():
            self.response.content.set_exception(aiohttp.ClientPayloadError("the connection ended within it"))

    async def read(self, cap: int) -> Reply:
        """The whole reply; of a 200 at most *cap* bytes."""
        assert self.response is not None
        if self.response.version is not None and self.response.version.major != 1:
            raise aiohttp.ClientError("it is not HTTP/1")
        if self.response.status == 200:
            return self.reply(exceeded=None if await self._read(cap) else cap)
        async with asyncio.timeout(_ERROR_BODY_TIMEOUT):
            await self._read(MAX_ERROR_BODY)
        return self.reply()

    def _read(self, cap: int) -> Awaitable[bool]:
        """Read the body, inflated; ``False`` where it is above the cap, of which no more is kept."""
        assert self.response is not None
        headers = self.response.headers
        if hdrs.TRANSFER_ENCODING in headers and _codings(headers, hdrs.TRANSFER_ENCODING) != "chunked":
            raise aiohttp.ClientPayloadError("its Transfer-Encoding was not asked for")
        coding = _codings(headers, hdrs.CONTENT_ENCODING) if hdrs.CONTENT_ENCODING in headers else "identity"
        if coding in {"", "identity"}:
            return self._read_plain(cap)
        if coding not in _CODINGS:
            raise aiohttp.ClientPayloadError(f"Content-Encoding {printable(coding)!r} was not asked for")
        return self._read_deflated(cap, _Inflater(_CODINGS[coding]))

    async def _read_plain(self, cap: int) -> bool:
        assert self.response is not None
        if (self.response.content_length or 0) > cap:
            cap = min(cap, MAX_ERROR_BODY)  # the start will do
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
                if len(piece) in {0, _INFLATED_PIECE}:
                    await asyncio.sleep(0)  # a bomb, or a chain of nothing, holds the event loop for one piece
        inflater.finish()
        return True

    def _keep_start(self, cap: int) -> None:
        """Of a body that is too large, an error shows as much as of any."""
        del self._body[min(cap, MAX_ERROR_BODY) :]


def _codings(headers: CIMultiDictProxy[str], name: str) -> str:
    """All codings of a header that may come more than once."""
    return ", ".join(headers.getall(name)).strip().lower()


class _Inflater:
    """gzip or deflate, in bounded pieces."""

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._waiting = b""
        self._zlib: zlib._Decompress | None = None
        self._members = 0

    def feed(self, chunk: bytes) -> None:
        self._waiting += chunk

    def piece(self) -> bytes | None:
        """The next piece, which may be empty; ``None`` where more has to be fed first."""
        if self._members and self._zlib is None:
            self._waiting = self._waiting.lstrip(b"\0")  # padding
        if not self._waiting:
            return None
        if self._zlib is None:
            self._zlib = zlib.decompressobj(self._wbits_for(self._waiting))
        piece = self._zlib.decompress(self._waiting, _INFLATED_PIECE)
        self._waiting = self._zlib.unconsumed_tail
        if self._zlib.eof:
            # What follows may be another member: RFC 1952, section 2.2.
            self._waiting, self._zlib = self._zlib.unused_data, None
            self._members += 1
        return piece

    def finish(self) -> None:
        """Refuse what was cut short."""
        if self._zlib is not None:
            raise zlib.error("the compressed body is cut short")

    def _wbits_for(self, start: bytes) -> int:
        # RFC 9110, section 8.4.1.2: some servers send "deflate" without the zlib wrapper.
        raw = self._wbits == zlib.MAX_WBITS and start[0] & 0x0F != zlib.DEFLATED
        return -zlib.MAX_WBITS if raw else self._wbits


def _failure(error: Exception, key: ApiKey, *, reused: bool) -> ConnectionFailedError:
    """Our error for whatever kept a readable reply from coming."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            reason = f"the server's certificate is not trusted: {_said(error.certificate_error, key)}"
            return ConnectionFailedError(reason, transient=False)
        case aiohttp.ClientConnectorError():
            return ConnectionFailedError(f"cannot connect to {error.host}:{error.port}: {error.os_error}")
        case NotAgainError():
            return ConnectionFailedError(str(error), stale_connection=reused)
        case aiohttp.ClientResponseError():
            # `status` is aiohttp's word for what it could not parse, not the server's.
            return ConnectionFailedError(f"the reply is not HTTP: {_unquoted(error.message, key)}")
        case zlib.error() | aiohttp.ClientPayloadError():
            return ConnectionFailedError(f"the body is cut short or corrupt: {_said(error, key)}")
        case _:
            return ConnectionFailedError(f"the exchange failed: {_said(error, key)}")


def _said(error: Exception, key: ApiKey) -> str:
    text = _unquoted(str(error), key)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _unquoted(text: str, key: ApiKey) -> str:
    """The words of aiohttp without the bytes that it quotes: it cuts them, perhaps in the middle of an echoed key."""
    return printable(key.redact(re.split(r"\bb['\"]", text)[0].strip(" :\n")))


def _limit_of(connector: aiohttp.BaseConnector | None) -> int:
    """The connections that a given session allows to one host; many, where it sets no limit."""
    limits = [] if connector is None else [connector.limit, connector.limit_per_host]
    return min((limit for limit in limits if limit), default=2**31)
