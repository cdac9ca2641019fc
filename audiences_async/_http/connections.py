"""Pooled connections: which of them a request may use, what arrived on them while idle, and what ended them.

A `Line` is a connection, a `Lease` is one request's use of it, and `Trust` decides whether it may be used again.
`Connector` is the client's own pool; `send_once` does the same for the pool of a caller's session.
"""

import asyncio
import math
import os
import select
import socket
import ssl as tls
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from attrs import define, field

from audiences_async._http.direct import DISCONNECTED, ResendError
from audiences_async._http.resolver import SharedResolver

Phase: TypeAlias = Literal[
    "connecting",
    "looking up the name (DNS)",
    "in the TLS handshake",
    "waiting for the reply's headers",
    "reading the body",
    "decoding the reply",
]
"""A phase of an attempt, for the message of a timeout."""

current_lease: ContextVar["Lease"] = ContextVar("lease")
"""The current task's lease; aiohttp's hooks do not pass it on."""


class Line:
    """A pooled connection, which serves one request after another."""

    on_lost: Callable[[BaseException | None], object] | None = None
    """Called with the exception that ended the connection, if any; ``None`` while it is idle."""
    idle_since: float = math.inf
    """The event loop's time at which it last became idle."""
    used: bool = False
    """Whether a request has used it."""

    def lost(self, error: BaseException | None) -> None:
        """Report the end of the connection to the request in flight, if any."""
        if self.on_lost is not None:
            self.on_lost(error)


class OwnLine(Line, asyncio.Protocol):
    """A connection of the client's own pool, between the transport and aiohttp's protocol; it rejects unsolicited data.

    aiohttp would buffer such data without limit, and return it as the responses of the next requests.
    """

    def __init__(self, protocol: ResponseHandler, transport: asyncio.Transport) -> None:
        self._protocol = protocol
        self._transport = transport
        self.arrivals: Callable[[], Sequence[object]] = _arrivals(transport)
        """Polls the socket for unread data."""
        transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        """Pass on the data of the request in flight."""
        if self.on_lost is None:
            self._transport.abort()
        else:
            self._protocol.data_received(data)

    def eof_received(self) -> None:
        """Pass on the end of the data."""
        self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on the end of the connection."""
        self._protocol.connection_lost(exc)
        self.lost(exc)


class CallerLine(Line):
    """A connection of a caller's session, whose pool and protocol are aiohttp's."""

    def __init__(self, protocol: ResponseHandler) -> None:
        if (closed := protocol.closed) is not None:
            closed.add_done_callback(self._closed)

    def _closed(self, closed: "asyncio.Future[None]") -> None:
        # Retrieved even while idle: asyncio logs an exception that never is.
        error = None if closed.cancelled() else closed.exception()
        self.lost(None if error is None else error.__cause__)


class Trust:
    """Which idle connections may still be used: those that became idle after the last failure of one.

    Args:
        pool: The pool of a caller's session; ``None`` for the client's own.
    """

    def __init__(self, pool: aiohttp.BaseConnector | None) -> None:
        self.now: Callable[[], float] = asyncio.get_running_loop().time
        self.resolver: SharedResolver = _Resolver()
        """The resolver of the client's own pool; addresses that failed come last."""
        self._pool = pool
        self._failed_at = -math.inf
        self._caller_lines: WeakKeyDictionary[ResponseHandler, CallerLine] = WeakKeyDictionary()

    def covers(self, line: Line) -> bool:
        """Return whether a connection may be used."""
        return line.idle_since > self._failed_at

    def caller_line(self, protocol: ResponseHandler) -> CallerLine:
        """Return the line of a connection of a caller's session."""
        return self._caller_lines.get(protocol) or self._caller_lines.setdefault(protocol, CallerLine(protocol))

    def withdraw(self, lease: "Lease") -> None:
        """Make later attempts avoid all connections that are idle now, or a failed new connection's address.

        Args:
            lease: The lease of the connection that has failed.
        """
        if self._pool is None and not lease.reused:
            if lease.address is not None:
                self.resolver.failed(lease.address)
            return
        self._failed_at = self.now()
        # aiohttp has no public list of its idle connections.
        for idle in getattr(self._pool, "_conns", {}).values():
            for protocol, *_ in idle:
                self.caller_line(protocol).idle_since = self._failed_at


@define(eq=False)
class Lease:
    """One request's use of a connection, from the look-up of the name to the connection's return to its pool.

    Attributes:
        trust: The trust in the pool's idle connections.
        phase: Its current phase.
        address: The first address it connects to, if a name was resolved.
        sockets: Sockets created to connect with TLS.
        reused: Whether another request has used its connection before.
        content: The body of the response, once its head has arrived.
        lost_by: Exception that ended its connection; ``None`` if it was closed cleanly, or is still open.
    """

    trust: Trust
    _is_sent: bool = False
    _line: Line | None = None
    _transport: asyncio.Transport | None = None
    phase: Phase = "connecting"
    address: str | None = None
    sockets: list[socket.socket] = field(factory=list)
    reused: bool = False
    content: aiohttp.StreamReader | None = None
    lost_by: BaseException | None = None

    def begin(self, again: str) -> None:
        """Mark the request as sent, which may happen once.

        Raises:
            ResendError: It was sent before; *again* is the message.
        """
        if self._is_sent:
            raise ResendError(again)
        self._is_sent = True

    def take(self, line: Line, transport: asyncio.Transport) -> None:
        """Use a connection."""
        self._line, self._transport = line, transport
        self.reused, line.used = line.used, True
        self.phase = "waiting for the reply's headers"
        line.on_lost = self._lost

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
        line = self.trust.caller_line(protocol)
        if protocol.should_close or not protocol.is_connected() or not self.trust.covers(line):
            raise _UnusableConnectionError
        self.take(line, transport)

    def out_of_time(self) -> None:
        """Record the phase; its sockets are closed a moment later."""
        for connecting in self.sockets if self.phase == "connecting" else ():
            with suppress(OSError):
                connecting.getpeername()  # raises unless connected
                self.phase = "in the TLS handshake"

    def release(self, *, reusable: bool) -> None:
        """Give up the connection, and drop it unless it is *reusable* and still open; the pool already has it back."""
        line, transport = self._line, self._transport
        if line is None or transport is None:
            return
        if line.on_lost == self._lost:  # else the next request has it already
            line.on_lost = None
            line.idle_since = self.trust.now()
        if not reusable or transport.is_closing():
            transport.abort()  # closing TLS waits up to 30 s for the peer
        self._line = self._transport = self.content = None

    def _lost(self, error: BaseException | None) -> None:
        """Record the end of the connection. aiohttp does not inform the reader of a body that it could not parse."""
        self.lost_by = error
        if self.content is not None and not self.content.is_eof():
            self.content.set_exception(aiohttp.ClientPayloadError("the connection ended before the end of the body"))


class _Resolver(SharedResolver):
    """A resolver that records how far each request has come."""

    async def resolve(self, *arguments: Any, **named: Any) -> list[ResolveResult]:
        lease = current_lease.get()
        lease.phase = "looking up the name (DNS)"
        found = await super().resolve(*arguments, **named)
        lease.phase = "connecting"
        lease.address = found[0]["host"]
        return found


class Connector(aiohttp.TCPConnector):
    """A pool that passes its connection to the request's lease, and never gives it a second one."""

    def __init__(self, ssl: tls.SSLContext | None, trust: Trust, *, is_tls: bool) -> None:
        # No limit here: the pacer's slots limit the connections, and waiting for one is not part of an attempt. No DNS
        # cache: its look-ups outlive a cancelled call.
        super().__init__(
            limit=0,
            use_dns_cache=False,
            ssl=True if ssl is None else ssl,
            resolver=trust.resolver,
            socket_factory=_new_socket if is_tls else None,
        )
        self._trust = trust
        self._process = os.getpid()

    async def connect(self, *arguments: Any, **named: Any) -> Connection:
        """Return a connection that is new, or idle and without unread data.

        Raises:
            ResendError: The request has had a connection before.
        """
        lease = current_lease.get()
        lease.begin(DISCONNECTED)
        while True:
            connection = await super().connect(*arguments, **named)
            protocol, transport = _ends(connection)
            line = transport.get_protocol()
            if not isinstance(line, OwnLine):
                line = OwnLine(protocol, transport)
            elif protocol.should_close or not self._trust.covers(line) or line.arrivals():
                # Unsolicited data or the end arrived while it was idle, or another one idle at that time has failed.
                connection.close()
                continue
            lease.take(line, transport)
            return connection

    # A forked process must not remove the connections from the epoll instance that it shares with its parent.

    def _close(self, *, abort_ssl: bool = False) -> Any:
        return super()._close(abort_ssl=abort_ssl) if os.getpid() == self._process else []

    def _close_immediately(self, *, abort_ssl: bool = False) -> Any:  # its name in aiohttp 4
        return super()._close_immediately(abort_ssl=abort_ssl) if os.getpid() == self._process else []  # type: ignore[misc]


class _UnusableConnectionError(Exception):
    """A pooled connection must not be used."""


async def send_once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Run as the innermost middleware of a caller's session, whose pool is aiohttp's."""
    lease = current_lease.get()
    lease.begin("a middleware of the session would have sent the request twice")
    name = "send" if hasattr(request, "send") else "_send"  # aiohttp 4, and before
    write = getattr(request, name)

    async def checked(connection: Connection) -> aiohttp.ClientResponse:
        await lease.take_caller_connection(connection)
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


def _new_socket(address: tuple[Any, ...]) -> socket.socket:
    """Create a socket and add it to the lease, which checks it on a timeout."""
    made = socket.socket(*address[:3])
    current_lease.get().sockets.append(made)
    return made
