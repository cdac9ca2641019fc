"""Faults of a peer on raw sockets, and the client's promise for each.

**What a fault is.** A `Fault` has a name, a behaviour of the server (`serve`) and a promise: the outcome of the call,
the number of requests, and, if they matter, the seconds and the bytes. The outcome is a `Value` (an answer with so
many audiences) or a `Refused` (the exact class of the error, its status, and the path of the first problem).

**How faults are used.** `test_faults.test_fault` runs every fault of `CATALOGUE`. It starts the server in a thread of
its own, makes one call, and compares the outcome and the costs with the promise. It then heals the server and makes a
second call, which must succeed (unless TLS is the fault), and checks that no task and no socket is left. `HEAVY` and
`LONG` are run in a child process that measures peak memory, and how long the event loop is blocked.

**How a behaviour is written.** `serve` is a coroutine function of one `Peer`, the server's end of a connection. It is
called again and again until it closes the connection. Most faults need no new one:

- `_keep(body, status, *headers)` sends a valid response, and keeps the connection;
- `_says(*pieces, then=...)` sends bytes as they are, and then keeps, closes or resets the connection, or hangs;
- `_goes_on(start, piece, times, finish)` sends the same bytes many times, or for ever; `_drips` sends single bytes;
- `_first_connection` and `_in_turn` combine behaviours, for faults of a connection that is reused.

`reply`, `head`, `chunk` and `length` make the bytes; `ONE` is a valid body with one audience.

**How to add a fault.** Find the function that yields its kind, such as `_header_lines` or `_chunked`, and yield one
more:

    yield Fault("header: an empty value", _says(head(b"X-Name:", length(len(ONE))) + ONE), Value(1))

`_retried` is the same for a fault that costs both attempts, by default with `NO_REPLY`; `_slow` is for one that costs
the time of both. A new function goes into `CATALOGUE` too. Then run it alone:

    pytest tests/test_faults.py -k "empty and value"

State the promise that README makes, not what the client happens to do. If aiohttp accepts something that it should
refuse, list it with a comment, so that a new version of aiohttp shows the difference.

`PYTHONPATH=tests pytest -p fault_table tests/test_faults.py` prints a table of all outcomes; see `fault_table`.
"""

import asyncio
import functools
import gzip
import itertools
import json
import os
import socket
import ssl
import struct
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final, Literal, Self, TypeAlias

import one_call
import trustme
from attrs import define, field, frozen
from one_call import Refused, Value

from audiences_async import (
    AttemptTimeoutError,
    AudiencesClient,
    BadRequestError,
    ConnectionFailedError,
    DeadlineExceededError,
    ForbiddenError,
    InvalidResponseError,
    NotFoundError,
    ResponseTooLargeError,
    RetryPolicy,
    ServerError,
    StatusError,
    TooManyRequestsError,
    UnauthorizedError,
)
from audiences_async.sandbox.thread import all_accepted

MIB: Final = 2**20
KERNEL: Final = 16 * MIB  # capacity of both sockets' buffers, beyond what the client has read
EMPTY: Final = b'{"status": "200", "data": []}'
STATIC: Final[Mapping[str, Any]] = {
    "id": "1",
    "name": "one",
    "created_time": "2025-10-01T09:10:00Z",
    "user_count": 7,
    "type": "Static",
}
DYNAMIC: Final[Mapping[str, Any]] = {name: STATIC[name] for name in ("id", "name", "created_time")} | {
    "type": "Dynamic"
}
HEALED_ID: Final = "healed"


def envelope(*data: Any, **changed: Any) -> bytes:
    """Return a body as the service sends it."""
    whole = {"status": "200", "description": "Audiences retrieved", "response_time": None, "data": list(data)}
    return json.dumps(whole | changed).encode()


ONE: Final = envelope(STATIC)
_HEALED: Final = envelope({**STATIC, "id": HEALED_ID})


# --- the raw server


class _Over(Exception):  # noqa: N818 - no error
    """The server is done with this connection."""


@define(eq=False)
class Peer:
    """The server's end of one connection; *number* counts connections."""

    server: "FaultServer"
    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def request(self) -> bytes:
        """Read one request's head; a healed server answers it properly and waits for the next."""
        while True:
            head = await self.reader.readuntil(b"\r\n\r\n")
            self.server.heads.append(head)
            if not self.server.healed:
                self.server.requests += 1
                return head
            await self.answer(_HEALED)

    async def send(self, data: bytes) -> None:
        """Send bytes unchanged; return when the kernel has them all."""
        self.writer.write(data)
        await self.writer.drain()
        self.server.sent += len(data)

    async def answer(self, body: bytes = ONE, status: bytes = b"200 OK", *headers: bytes) -> None:
        """Send a complete, valid response."""
        await self.send(reply(body, status, *headers))

    async def end(self, how: "End") -> None:
        """Keep the connection for the next request, or end it in one of the other ways."""
        if how == "keep":
            return
        if how == "hang":
            await self.reader.read()
        if how == "reset":
            linger = struct.pack("ii", 1, 0)  # on, 0 s: closing sends RST
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.writer.transport.abort()
        raise _Over


End: TypeAlias = Literal["keep", "close", "reset", "hang"]
Serve: TypeAlias = Callable[[Peer], Awaitable[None]]


@define(eq=False)
class FaultServer:
    """A server that behaves on each connection as scripted, and counts what it sees."""

    serve: Serve
    tls_context: ssl.SSLContext | None = None
    port: int = 0
    other_port: int = 0
    """Address of a second server, to which no request may go."""
    connections: int = 0
    requests: int = 0
    """Requests seen before it was healed."""
    sent: int = 0
    heads: list[bytes] = field(factory=list)
    healed: bool = False
    _listener: asyncio.Server | None = None
    _tasks: set["asyncio.Task[Any]"] = field(factory=set)

    async def start(self) -> None:
        """Listen on a free port of the loopback address."""
        self._listener = await asyncio.start_server(self._handle, "127.0.0.1", 0, ssl=self.tls_context, limit=MIB)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close everything; return when it is closed."""
        assert self._listener is not None
        await all_accepted()
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        # Drained means sent. Not 0 with TLS: asyncio then pauses writing for good.
        writer.transport.set_write_buffer_limits(high=1)
        peer = Peer(self, self.connections, reader, writer)
        try:
            while True:
                await (peer.request() if self.healed else self.serve(peer))
        except (_Over, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with suppress(OSError, asyncio.CancelledError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)
            self._tasks.discard(task)


class ServerThread:
    """An event loop in its own thread, so that the client's loop runs nothing of the servers."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-servers")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop()  # ends the remaining tasks

    @asynccontextmanager
    async def serving(self, fault: "Fault") -> AsyncIterator[FaultServer]:
        """Run a server with this fault, and a second one beside it."""
        server = FaultServer(fault.serve, tls_context=fault.server_tls())
        async with self._running(FaultServer(_keep(ONE))) as other:
            server.other_port = other.port
            async with self._running(server):
                yield server
            assert other.connections == 0, "the client went to another origin"

    @asynccontextmanager
    async def _running(self, server: FaultServer) -> AsyncIterator[FaultServer]:
        await self._run(server.start())
        try:
            yield server
        finally:
            await self._run(server.stop())

    async def _run(self, work: Any) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


# --- what a fault is


Outcome: TypeAlias = Value | Refused
TlsCase: TypeAlias = Literal["none", "trusted", "unknown-ca", "expired", "other-host", "server-only", "client-only"]


@frozen
class Fault:
    """One fault and the promise.

    Attributes:
        name: The fault.
        serve: The server's side; called again and again on each connection until it leaves it.
        outcome: Result of the call.
        requests: Number of requests sent.
        fewer: Whether fewer requests are fine too, because the server may not read them all.
        attempts: The policy's ``max_attempts``.
        tries: Attempts on the error, if their number differs from the requests.
        seconds: Longest duration of the call. Generous unless a time is promised, for machines under load.
        before: Ordinary calls on the same client before the one that counts.
        most_sent: Maximum number of bytes per request that the server can send.
        tls: Which side uses TLS, and whether the certificate is valid.
        host: Host name that the client uses.
        settings: Arguments of the client.
        family: Faults that are generated together share a line of the table.
    """

    name: str
    serve: Serve
    outcome: Outcome
    requests: int = 1
    fewer: bool = False
    attempts: int = 2
    tries: int | None = None
    seconds: float = 5.0
    before: int = 0
    most_sent: int | None = None
    tls: TlsCase = "none"
    host: str = "127.0.0.1"
    settings: Mapping[str, Any] = field(factory=dict)
    family: str = ""

    @property
    def heals(self) -> bool:
        """Whether a later call on the same client can succeed."""
        return self.tls in {"none", "trusted"}

    def server_tls(self) -> ssl.SSLContext | None:
        """Return the server's TLS context; ``None`` if it speaks plain HTTP."""
        return None if self.tls in {"none", "client-only"} else _server_context(self.tls)

    def client(self, server: FaultServer) -> AudiencesClient:
        """Create the client that meets the fault."""
        secure = self.tls not in {"none", "server-only"}
        return AudiencesClient(
            "key",
            base_url=f"http{'s' if secure else ''}://{self.host}:{server.port}/",
            retry=RetryPolicy(max_attempts=self.attempts, base_delay=0, throttle_base_delay=0),
            ssl=_client_context() if secure and self.tls != "unknown-ca" else None,
            **{"timeout": 20.0, "attempt_timeout": 10.0, **self.settings},
        )


@functools.cache
def _authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def _server_context(case: TlsCase) -> ssl.SSLContext:
    name = "other.example" if case == "other-host" else "127.0.0.1"
    expires = datetime.now(UTC) - timedelta(days=1) if case == "expired" else None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _authority().issue_cert(name, not_after=expires).configure_cert(context)
    return context


@functools.cache
def _client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    _authority().configure_trust(context)
    return context


# --- bytes


def reply(body: bytes = ONE, status: bytes = b"200 OK", *headers: bytes) -> bytes:
    """Return a response with its true length."""
    lines = [b"HTTP/1.1 " + status, *headers, b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, b"", body])


def head(*headers: bytes, status: bytes = b"200 OK") -> bytes:
    """Return a head and the empty line."""
    return b"\r\n".join([b"HTTP/1.1 " + status, *headers, b"", b""])


def chunk(data: bytes) -> bytes:
    """Return one chunk."""
    return b"%x\r\n" % len(data) + data + b"\r\n"


CHUNKED: Final = b"Transfer-Encoding: chunked"
LAST: Final = b"0\r\n\r\n"
GZIP, DEFLATE = b"Content-Encoding: gzip", b"Content-Encoding: deflate"


def length(count: int) -> bytes:
    """Return a ``Content-Length`` header."""
    return b"Content-Length: %d" % count


def deflated(data: bytes, wbits: int) -> bytes:
    """Compress *data* with zlib; *wbits* selects zlib, raw deflate or gzip."""
    compressor = zlib.compressobj(wbits=wbits)
    return compressor.compress(data) + compressor.flush()


@functools.cache
def bomb(kind: Literal["gzip", "deflate", "raw deflate"], mib: int) -> bytes:
    """Return an empty answer and *mib* MiB of white space, which JSON allows, compressed about a thousandfold."""
    spaces = b" " * MIB
    # A fully flushed piece does not refer to earlier data, so one piece serves for all.
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    piece = compressor.compress(spaces) + compressor.flush(zlib.Z_FULL_FLUSH)
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    first = compressor.compress(EMPTY) + compressor.flush(zlib.Z_FULL_FLUSH)
    raw = first + piece * mib + deflated(b"", -zlib.MAX_WBITS)
    if kind == "raw deflate":
        return raw
    if kind == "deflate":
        check = functools.reduce(
            lambda value, data: zlib.adler32(data, value), itertools.repeat(spaces, mib), zlib.adler32(EMPTY)
        )
        return b"\x78\xda" + raw + struct.pack(">I", check)
    check = functools.reduce(
        lambda value, data: zlib.crc32(data, value), itertools.repeat(spaces, mib), zlib.crc32(EMPTY)
    )
    size = (len(EMPTY) + mib * MIB) % 2**32
    return b"\x1f\x8b\x08\0\0\0\0\0\x02\xff" + raw + struct.pack("<II", check, size)


# --- behaviours


def _keep(body: bytes, status: bytes = b"200 OK", *headers: bytes) -> Serve:
    """Send a valid response to each request."""
    return _says(reply(body, status, *headers))


def _says(*pieces: bytes, then: End = "keep") -> Serve:
    """Send these bytes to each request."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        for piece in pieces:
            await peer.send(piece)
        await peer.end(then)

    return serve


def _goes_on(start: bytes, piece: bytes, times: int | None = None, finish: bytes = b"", *, then: End = "keep") -> Serve:
    """Send the start, and then the same bytes *times* times; for ever by default."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(start)
        for _ in itertools.count() if times is None else range(times):
            await peer.send(piece)
        await peer.send(finish)
        await peer.end(then)

    return serve


def _drips(start: bytes, rest: bytes, seconds: float = 0.1) -> Serve:
    """Send the start at once and the rest one byte at a time: the slowness is the fault."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(start)
        for byte in rest:
            await asyncio.sleep(seconds)
            await peer.send(bytes([byte]))

    return serve


def _at_accept(then: End) -> Serve:
    async def serve(peer: Peer) -> None:
        await peer.end(then)

    return serve


def _first_connection(first: Serve, later: Serve) -> Serve:
    """Use one behaviour on the first connection, another on later ones."""

    async def serve(peer: Peer) -> None:
        await (first if peer.number == 1 else later)(peer)

    return serve


def _in_turn(*serves: Serve) -> Serve:
    """Use one behaviour after the other on each connection."""

    async def serve(peer: Peer) -> None:
        for each in serves:
            await each(peer)

    return serve


# --- promises


NO_REPLY: Final = Refused(ConnectionFailedError)
TOO_SLOW: Final = Refused(AttemptTimeoutError)
UNREADABLE: Final = Refused(InvalidResponseError)
TOO_LARGE: Final = Refused(ResponseTooLargeError)
_CLASSES: Final[Mapping[int, type[StatusError]]] = {
    400: BadRequestError,
    401: UnauthorizedError,
    403: ForbiddenError,
    404: NotFoundError,
    429: TooManyRequestsError,
}
_RETRIED: Final = {408, 429, 500, 502, 503, 504}
_HANGS: Final = {"attempt_timeout": 0.2}
_SMALL: Final = {"max_body_bytes": MIB}


def refusal(status: int) -> Refused:
    """Return the error of a status from 300 up."""
    return Refused(_CLASSES.get(status, ServerError if 500 <= status <= 599 else StatusError), status)


def _retried(name: str, serve: Serve, outcome: Outcome = NO_REPLY, **more: Any) -> Fault:
    """Return a fault that costs all attempts."""
    return Fault(name, serve, outcome, **{"requests": 2, **more})


def _slow(name: str, serve: Serve, outcome: Outcome = TOO_SLOW, **more: Any) -> Fault:
    """Return a fault that costs the time of all attempts: 2 of 0.2 s, plus a margin for a busy machine."""
    settings = _HANGS | more.pop("settings", {})
    return _retried(name, serve, outcome, **{"seconds": 2.6, "settings": settings, **more})


# --- the catalogue


def _status_lines() -> Iterator[Fault]:
    rest = b"\r\n" + length(len(ONE)) + b"\r\n\r\n" + ONE
    lines = {
        "binary garbage": b"\x00\xff\x13\x80garbage",
        "the greeting of SSH": b"SSH-2.0-OpenSSH_9.6",
        "the greeting of a mail server": b"220 mail.example ESMTP",
        "an alert of TLS": b"\x15\x03\x01\x00\x02\x02\x28",
        "a frame of HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80",
        "an empty status line and a body": b"",
        "no status": b"HTTP/1.1",
        "no status, but the space": b"HTTP/1.1 ",
        "a word for a status": b"HTTP/1.1 OK",
        "a status of two digits": b"HTTP/1.1 20 OK",
        "a status of four digits": b"HTTP/1.1 2000 OK",
        "a negative status": b"HTTP/1.1 -200 OK",
        "a status in hexadecimal": b"HTTP/1.1 0xC8 OK",
        "two spaces before the status": b"HTTP/1.1  200 OK",
        "no space before the status": b"HTTP/1.1200 OK",
        "HTTP/9.9": b"HTTP/9.9 200 OK",
        "HTTP/2.0 in text": b"HTTP/2.0 200 OK",
        "HTTP/1": b"HTTP/1 200 OK",
        "HTTP/1.10": b"HTTP/1.10 200 OK",
        "http in lower case": b"http/1.1 200 OK",
        "Shoutcast": b"ICY 200 OK",
        "a request": b"GET / HTTP/1.1",
    }
    for name, line in lines.items():
        yield _retried(f"status line: {name}", _says(line + rest))
    for status in (0, 99):  # three digits, as RFC 9112 requires, but not a status
        yield Fault(f"status line: status {status:03}", _says(b"HTTP/1.1 %03d None" % status + rest), UNREADABLE)
    yield _retried("no head, only a body", _says(ONE, then="close"))
    yield Fault("status line without a reason", _says(b"HTTP/1.1 200" + rest), Value(1))
    yield Fault("status line of HTTP/1.0", _says(b"HTTP/1.0 200 OK" + rest, then="close"), Value(1))
    yield Fault("a reason in UTF-8", _says("HTTP/1.1 200 schön".encode() + rest), Value(1))
    # aiohttp's parser accepts these as valid; the rest of the response is complete and valid.
    yield Fault("status line: RTSP", _says(b"RTSP/1.0 200 OK" + rest), Value(1))
    yield Fault("a NUL in the reason", _says(b"HTTP/1.1 200 O\0K" + rest), Value(1))


def _lengths_told() -> Iterator[Fault]:
    lines = {
        "negative": [b"Content-Length: -1"],
        "a word": [b"Content-Length: nine"],
        "empty": [b"Content-Length:"],
        "with a sign": [b"Content-Length: +%d" % len(ONE)],
        "in hexadecimal": [b"Content-Length: 0x%x" % len(ONE)],
        "a fraction": [b"Content-Length: %d.0" % len(ONE)],
        "two numbers": [b"Content-Length: %d %d" % (len(ONE), len(ONE))],
        "a list of one number twice": [b"Content-Length: %d, %d" % (len(ONE), len(ONE))],
        "twice the same": [length(len(ONE))] * 2,
        "conflicting": [length(len(ONE)), length(len(ONE) - 5)],
        "conflicting, the other way round": [length(5), length(len(ONE))],
        "above 64 bits": [length(2**64 + len(ONE))],
        "of a thousand digits": [b"Content-Length: " + b"1" * 1000],
        "in other digits": ["Content-Length: ٢٩".encode()],
    }
    for name, headers in lines.items():
        yield _retried(f"Content-Length: {name}", _says(head(*headers) + ONE))
    both = chunk(ONE) + LAST
    yield _retried("Content-Length before chunked", _says(head(length(len(ONE)), CHUNKED) + both))
    yield _retried("Content-Length after chunked", _says(head(CHUNKED, length(len(both))) + both))


def _header_lines() -> Iterator[Fault]:
    wrong = {
        "without a colon": b"NoColonHere",
        "with an empty name": b": value",
        "a space in the name": b"Bad Name: value",
        "a space before the colon": b"X-Bad : value",
        "a NUL in the name": b"X-B\0d: value",
        "a NUL in the value": b"X-Bad: val\0ue",
        "a bare CR in the value": b"X-Bad: val\rue",
        "an escape in the name": b"X-\x1b[31m: value",
        "a name in UTF-8": "Schön: value".encode(),
        "a brace in the name": b"X{Y}: value",
        "of 64 KiB": b"X-Long: " + b"x" * 64 * 1024,
        "of 1 MiB": b"X-Long: " + b"x" * MIB,
        "a name of 64 KiB": b"X" * 64 * 1024 + b": value",
    }
    for name, line in wrong.items():
        yield _retried(f"header: {name}", _says(head(line, length(len(ONE))) + ONE))
    allowed = {
        "a value in UTF-8": "X-Name: schön".encode(),
        "an invalid byte in the value": b"X-Name: \xff\xfe",
        "an empty value": b"X-Name:",
        "folded onto two lines": b"X-Name: one\r\n two",
        "the same one a hundred times": b"\r\n".join([b"X-Same: 1"] * 100),
    }
    for name, line in allowed.items():
        yield Fault(f"header: {name}", _says(head(line, length(len(ONE))) + ONE), Value(1))
    many = b"".join(b"X-%d: %d\r\n" % (n, n) for n in range(10_000))
    yield _retried("10,000 headers", _says(b"HTTP/1.1 200 OK\r\n" + many + length(len(ONE)) + b"\r\n\r\n" + ONE))
    yield _retried("a reason of 1 MiB", _keep(ONE, b"200 " + b"x" * MIB))
    # RFC 9112, section 2.2: a recipient may accept a single LF as the end of a line.
    yield Fault("bare LF for every end of line", _says(head(length(len(ONE))).replace(b"\r", b"") + ONE), Value(1))
    endless: dict[str, Any] = {"most_sent": KERNEL}
    yield _retried("endless garbage", _goes_on(b"", b"\xa5" * 4096), **endless)
    yield _retried("an endless reason", _goes_on(b"HTTP/1.1 200 ", b"x" * 4096), **endless)
    yield _retried("an endless header", _goes_on(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 4096), **endless)
    yield _retried("an endless header name", _goes_on(b"HTTP/1.1 200 OK\r\n", b"x" * 4096), **endless)
    yield _retried("endless headers", _goes_on(b"HTTP/1.1 200 OK\r\n", b"X-Same: 1\r\n" * 500), **endless)


def _lengths_kept() -> Iterator[Fault]:
    close: dict[str, End] = {"then": "close"}
    yield _retried("body shorter than told", _says(head(length(len(ONE) + 1)) + ONE, **close))
    yield _retried("body missing", _says(head(length(len(ONE))), **close))
    yield _retried("body shorter than told, by 512 MiB", _says(head(length(512 * MIB)) + ONE, **close))
    yield _slow("body shorter than told, and silence", _says(head(length(len(ONE) + 1)) + ONE))
    # All in one segment, so that the surplus is there before the response can be taken as complete.
    yield _retried("body longer than told", _says(head(length(len(ONE) - 5)) + ONE))
    yield _retried("body longer than told, then FIN", _says(head(length(len(ONE) - 5)) + ONE, **close))
    yield _retried("length 0 told, a body sent", _says(head(length(0)) + ONE))
    yield Fault("length 0", _keep(b""), UNREADABLE)
    yield Fault("line ends after the body", _says(reply() + b"\r\n\r\n"), Value(1))
    yield _retried("garbage after the body", _says(reply() + b"\0garbage"))
    yield Fault("a second answer after the body", _says(reply() + reply(EMPTY)), Value(1))
    yield Fault("a second answer after an error", _says(reply(b"", b"404 No") + reply(EMPTY)), refusal(404))
    yield Fault("no length, whole, FIN", _says(head() + ONE, **close), Value(1))
    yield Fault("no length, cut, FIN", _says(head() + ONE[:-1], **close), UNREADABLE)
    yield _retried("no length, whole, RST", _says(head() + ONE, then="reset"))
    yield _slow("no length, whole, and silence", _says(head() + ONE, then="hang"))
    yield Fault("no body at all, FIN", _says(head(), **close), UNREADABLE)


def _chunked() -> Iterator[Fault]:
    start = head(CHUNKED)
    cut: dict[str, bytes] = {
        "no last chunk": chunk(ONE),
        "cut in a chunk": chunk(ONE)[:-10],
        "cut after a size": b"%x\r\n" % len(ONE),
        "cut in a size": b"5",
        "cut in the last chunk": chunk(ONE) + b"0\r\n",
        "no chunk": b"",
    }
    for name, body in cut.items():
        yield _retried(f"chunked: {name}, FIN", _says(start + body, then="close"))
        yield _retried(f"chunked: {name}, RST", _says(start + body, then="reset"))
        yield _slow(f"chunked: {name}, and silence", _says(start + body, then="hang"))
    bad: dict[str, bytes] = {
        "size no number": b"xyz\r\n" + ONE,
        "size negative": b"-5\r\n" + ONE,
        "size with a prefix": b"0x%x\r\n" % len(ONE) + ONE + b"\r\n" + LAST,
        "size empty": b"\r\n" + ONE + b"\r\n" + LAST,
        "size above 64 bits": b"1" + b"0" * 16 + b"\r\n" + ONE,
        "size of 1 MiB of digits": b"1" * MIB + b"\r\n" + ONE,
        "chunk longer than told": b"5\r\n" + ONE + b"\r\n" + LAST,
        "chunk shorter than told": b"%x\r\n" % (len(ONE) + 3) + ONE + b"\r\n" + LAST,
        "body not chunked at all": ONE,
    }
    for name, body in bad.items():
        yield _retried(f"chunked: {name}", _says(start + body, then="close"))
    yield _slow("chunked: endless size", _goes_on(start, b"0" * 4096))
    yield _slow("chunked: endless extension", _goes_on(start + b"5;x=", b"x" * 4096))
    yield _retried("chunked: endless trailer", _goes_on(start + chunk(ONE) + b"0\r\nX: ", b"x" * 4096))
    yield _retried(
        "chunked: endless trailers", _goes_on(start + chunk(ONE) + b"0\r\n", b"X: 1\r\n" * 800), most_sent=KERNEL
    )
    yield Fault(
        "chunked: an extension and a trailer",
        _says(start + b"%x;a=b\r\n" % len(ONE) + ONE + b"\r\n0\r\nX-Sum: 1\r\n\r\n"),
        Value(1),
    )
    yield Fault("chunked: a byte a chunk", _says(start + b"".join(chunk(bytes([b])) for b in ONE) + LAST), Value(1))
    yield _retried("chunked: garbage after the last chunk", _says(start + chunk(ONE) + LAST + b"garbage"))
    yield _retried("Transfer-Encoding unknown", _says(head(b"Transfer-Encoding: rot13") + ONE, then="close"))
    twice = head(CHUNKED, CHUNKED) + chunk(chunk(ONE) + LAST) + LAST
    yield _retried("chunked twice", _says(twice, then="close"), fewer=True)
    first = start + chunk(ONE[:9])
    for name, rest in {
        "chunk": b"no chunk\r\n",
        "line end": b"5\r\nhelloXX",
        "trailer": b"0\r\n\0no trailer\r\n\r\n",
    }.items():
        yield _retried(f"chunked: a bad {name} in a later segment", _drips(first, rest, 0.01))
    packed = gzip.compress(ONE)
    yield _retried(
        "Transfer-Encoding: gzip, not asked for",
        _says(head(b"Transfer-Encoding: gzip, chunked") + chunk(packed) + LAST),
    )


def _connections() -> Iterator[Fault]:
    half = reply()[:-10]
    good = _keep(ONE)
    ways: tuple[End, ...] = ("close", "reset")
    for way in ways:
        word = "FIN" if way == "close" else "RST"
        yield _retried(f"{word} at accept", _at_accept(way), fewer=True)
        yield _retried(f"{word} after the request", _says(then=way))
        yield _retried(f"{word} in the status line", _says(b"HTTP/1.1 2", then=way))
        yield _retried(f"{word} in the head", _says(head(length(len(ONE)))[:-4], then=way))
        yield _retried(f"{word} after the head", _says(head(length(len(ONE))), then=way))
        yield _retried(f"{word} in the body", _says(half, then=way))
        yield Fault(f"{word} in the first body only", _first_connection(_says(half, then=way), good), Value(1), 2)
        stale = _first_connection(_in_turn(good, _says(then=way)), good)
        yield Fault(f"stale keep-alive, {word} after the request", stale, Value(1), 2, before=1)
        stale = _first_connection(_says(reply(), then=way), good)
        yield Fault(f"stale keep-alive, {word} while idle", stale, Value(1), 2, fewer=True, before=1)
        stale = _in_turn(good, _says(then=way))
        yield Fault(f"keep-alive that is always stale, {word}", stale, Value(1), 2, before=1)
    yield _slow("silence at accept", _at_accept("hang"), fewer=True)
    yield _slow("silence after the request", _says(then="hang"))
    yield _slow("silence in the status line", _says(b"HTTP/1.1 2", then="hang"))
    yield _slow("silence in the head", _says(head(length(len(ONE)))[:-4], then="hang"))
    yield _slow("silence after the head", _says(head(length(len(ONE))), then="hang"))
    yield _slow("silence in the body", _says(half, then="hang"))
    packed = reply(gzip.compress(ONE), b"200 OK", GZIP)
    yield _slow("silence in a packed body", _says(packed[:-9], then="hang"))
    yield Fault(
        "silence longer than the call's time",
        _says(then="hang"),
        Refused(DeadlineExceededError),
        1,
        seconds=2.3,
        settings={"timeout": 0.3},
    )
    yield Fault(
        "silence in the first attempt only",
        _first_connection(_says(then="hang"), good),
        Value(1),
        2,
        seconds=2.3,
        settings=_HANGS,
    )
    yield _slow("one byte every 100 ms from the first on", _drips(b"", reply()))
    yield _slow("one byte every 100 ms of the body", _drips(half, reply()[-10:]))
    yield _slow("one byte every 100 ms of a chunk's size", _drips(head(CHUNKED), b"0" * 30))
    yield Fault("one byte every 100 ms, in time", _drips(reply()[:-5], reply()[-5:]), Value(1))


def _informational() -> Iterator[Fault]:
    goes_on, hints = head(status=b"100 Continue"), head(b"Link: </x>; rel=preload", status=b"103 Early Hints")
    yield Fault("100 first", _says(goes_on + reply()), Value(1))
    yield Fault("102 first", _says(head(status=b"102 Processing") + reply()), Value(1))
    yield Fault("103 first", _says(hints + reply()), Value(1))
    yield Fault("103 first, by itself", _says(hints, reply()), Value(1))
    yield Fault("199 first", _says(head(status=b"199 Odd") + reply()), Value(1))
    yield Fault("100 and 103 a hundred times", _says((goes_on + hints) * 50 + reply()), Value(1))
    yield _slow("100 and silence", _says(goes_on, then="hang"))
    yield _retried("100 and FIN", _says(goes_on, then="close"))
    yield _slow("100 for ever", _goes_on(b"", goes_on * 20), fewer=True)
    yield Fault(
        "101 unasked, then silence",
        _says(head(b"Upgrade: h2c", b"Connection: Upgrade", status=b"101 Switching Protocols"), then="hang"),
        UNREADABLE,
    )
    yield Fault(
        "101 unasked, then FIN",
        _says(head(b"Upgrade: h2c", b"Connection: Upgrade", status=b"101 Switching Protocols") + ONE, then="close"),
        UNREADABLE,
    )
    yield Fault("101 without Upgrade", _says(head(status=b"101 Switching Protocols"), then="hang"), UNREADABLE)


def _bodiless() -> Iterator[Fault]:
    for status in (b"204 No Content", b"205 Reset Content", b"206 Partial Content", b"304 Not Modified"):
        number = int(status[:3])
        outcome = UNREADABLE if number < 300 else refusal(number)
        yield Fault(f"{number} without a body", _says(head(status=status), then="close"), outcome)
        yield Fault(f"{number} with length 0", _keep(b"", status), outcome)
        # If the status allows no body, data after the head in the same segment is not a response, and nor is the head.
        fault = Fault if number in {205, 206} else _retried
        outcome = outcome if number in {205, 206} else NO_REPLY
        yield fault(f"{number} with a body", _keep(ONE, status), outcome)
        yield fault(f"{number} with a chunked body", _says(head(CHUNKED, status=status) + chunk(ONE) + LAST), outcome)
    yield Fault("206 of a range", _keep(ONE[:9], b"206 Partial Content", b"Content-Range: bytes 0-8/99"), UNREADABLE)


def _encodings() -> Iterator[Fault]:
    packed = gzip.compress(ONE)
    corrupt: dict[str, tuple[bytes, bytes]] = {
        "gzip, and is plain": (GZIP, ONE),
        "deflate, and is plain": (DEFLATE, ONE),
        "deflate, and is gzip": (DEFLATE, packed),
        "gzip, and is deflate": (GZIP, deflated(ONE, zlib.MAX_WBITS)),
        "br, not asked for": (b"Content-Encoding: br", b"\x0b\x02\x80hello\x03"),
        "zstd, not asked for": (b"Content-Encoding: zstd", b"\x28\xb5\x2f\xfd\x04\x00\x01\x00\x00"),
        "compress, not asked for": (b"Content-Encoding: compress", b"\x1f\x9d\x90"),
        "a name of its own": (b"Content-Encoding: none-such", ONE),
        "gzip, gzip": (b"Content-Encoding: gzip, gzip", gzip.compress(packed)),
        "gzip in two headers": (GZIP + b"\r\n" + GZIP, gzip.compress(packed)),
        "gzip with garbage after it": (GZIP, packed + b"garbage"),
        "gzip cut in its header": (GZIP, packed[:5]),
        "gzip cut in the middle": (GZIP, packed[: len(packed) // 2]),
        "gzip cut before its checksum": (GZIP, packed[:-8]),
        "gzip cut by a byte": (GZIP, packed[:-1]),
        "gzip with a wrong checksum": (GZIP, packed[:-8] + b"\0\0\0\0" + packed[-4:]),
        "gzip with a wrong size": (GZIP, packed[:-4] + b"\1\0\0\0"),
        "gzip with a flipped bit": (GZIP, packed[:20] + bytes([packed[20] ^ 8]) + packed[21:]),
        "gzip and half of a second member": (GZIP, packed + packed[:-9]),
        "deflate cut": (DEFLATE, deflated(ONE, zlib.MAX_WBITS)[:-1]),
        "raw deflate cut": (DEFLATE, deflated(ONE, -zlib.MAX_WBITS)[:-1]),
        "deflate with a wrong checksum": (DEFLATE, deflated(ONE, zlib.MAX_WBITS)[:-1] + b"\xff"),
        "deflate with garbage after it": (DEFLATE, deflated(ONE, zlib.MAX_WBITS) + b"\xff\xffgarbage"),
    }
    for name, (header, body) in corrupt.items():
        yield _retried(f"encoding: {name}", _keep(body, b"200 OK", header))
    sound: dict[str, tuple[bytes, bytes]] = {
        "gzip": (GZIP, packed),
        "gzip of two members": (GZIP, gzip.compress(ONE[:9]) + gzip.compress(ONE[9:])),
        "gzip with zeros after it": (GZIP, packed + b"\0" * 100),
        "gzip with zeros between its members": (GZIP, gzip.compress(ONE[:9]) + b"\0" * 9 + gzip.compress(ONE[9:])),
        "gzip with empty members around it": (GZIP, gzip.compress(b"") * 9 + packed + gzip.compress(b"") * 9),
        "deflate": (DEFLATE, deflated(ONE, zlib.MAX_WBITS)),
        "raw deflate": (DEFLATE, deflated(ONE, -zlib.MAX_WBITS)),
        "identity": (b"Content-Encoding: identity", ONE),
    }
    for name, (header, body) in sound.items():
        yield Fault(f"encoding: {name}", _keep(body, b"200 OK", header), Value(1))
    apart = _drips(head(GZIP, CHUNKED) + chunk(packed), chunk(b"\0") + LAST, 0.02)
    yield Fault("encoding: gzip with zeros after it, later", apart, Value(1))
    yield Fault("encoding: plain, and is gzip", _keep(packed), UNREADABLE)
    yield Fault("encoding: gzip, and is packed twice", _keep(gzip.compress(packed), b"200 OK", GZIP), UNREADABLE)
    yield Fault("encoding: gzip of nothing", _keep(gzip.compress(b""), b"200 OK", GZIP), UNREADABLE)
    yield Fault("encoding: gzip and no byte", _keep(b"", b"200 OK", GZIP), UNREADABLE)
    empties = gzip.compress(b"") * 200
    yield _slow("encoding: empty gzip members for ever", _goes_on(head(GZIP, CHUNKED), chunk(empties)))
    yield _slow(
        "encoding: zeros after gzip for ever", _goes_on(head(GZIP, CHUNKED) + chunk(packed), chunk(b"\0" * 4096))
    )
    named = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff"  # a file name follows, and never ends
    yield _slow("encoding: a gzip file name for ever", _goes_on(head(GZIP, CHUNKED) + chunk(named), chunk(b"x" * 4096)))


def _bombs() -> Iterator[Fault]:
    encodings: tuple[tuple[Literal["gzip", "deflate", "raw deflate"], bytes], ...] = (
        ("gzip", GZIP),
        ("deflate", DEFLATE),
        ("raw deflate", DEFLATE),
    )
    for kind, header in encodings:
        yield Fault(f"{kind} bomb of 1 MiB, within the cap", _bomb(kind, 1, header), Value(0))
        for mib in (1, 64, 1024):
            yield Fault(f"{kind} bomb of {mib} MiB, cap 1 MiB", _bomb(kind, mib, header), TOO_LARGE, settings=_SMALL)
        yield Fault(f"chunked {kind} bomb of 1024 MiB", _chunked_bomb(kind, 1024, header), TOO_LARGE, settings=_SMALL)
    yield Fault("gzip bomb of 1024 MiB, cap as it comes", _bomb("gzip", 1024, GZIP), TOO_LARGE)
    large: dict[str, Any] = {"most_sent": MIB + KERNEL, "settings": _SMALL}
    spaces = b" " * MIB
    yield Fault("512 MiB announced", _goes_on(head(length(512 * MIB)), spaces, 512), TOO_LARGE, **large)
    yield Fault("512 MiB chunked", _goes_on(head(CHUNKED), chunk(spaces), 512, LAST), TOO_LARGE, **large)
    yield Fault(
        "512 MiB in one chunk",
        _goes_on(head(CHUNKED) + b"20000000\r\n", spaces, 512, b"\r\n" + LAST),
        TOO_LARGE,
        **large,
    )
    yield Fault("512 MiB until FIN", _goes_on(head(), spaces, 512, then="close"), TOO_LARGE, **large)
    yield Fault("an endless body", _goes_on(head(CHUNKED), chunk(b" " * 4096)), TOO_LARGE, **large)


def _bomb(kind: Literal["gzip", "deflate", "raw deflate"], mib: int, header: bytes, status: bytes = b"200 OK") -> Serve:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.answer(bomb(kind, mib), status, header)

    return serve


def _chunked_bomb(kind: Literal["gzip", "deflate", "raw deflate"], mib: int, header: bytes) -> Serve:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(head(header, CHUNKED) + chunk(bomb(kind, mib)) + LAST)

    return serve


def _error_bodies() -> Iterator[Fault]:
    spaces = b" " * MIB
    for status, requests in ((b"500 Broken", 2), (b"404 None", 1), (b"302 Found", 1)):
        number = int(status[:3])

        def fault(name: str, serve: Serve, *, number: int = number, requests: int = requests, **more: Any) -> Fault:
            return Fault(f"{number} with {name}", serve, refusal(number), requests, **more)

        yield fault("a gzip bomb of 1024 MiB", _bomb("gzip", 1024, GZIP, status))
        yield fault("a deflate bomb of 1024 MiB", _bomb("deflate", 1024, DEFLATE, status))
        yield fault(
            "512 MiB announced", _goes_on(head(length(512 * MIB), status=status), spaces, 512), most_sent=KERNEL
        )
        yield fault(
            "512 MiB chunked", _goes_on(head(CHUNKED, status=status), chunk(spaces), 512, LAST), most_sent=KERNEL
        )
        yield fault("an endless body", _goes_on(head(status=status), b"x" * 4096), most_sent=KERNEL)
        hangs: dict[str, Any] = {"seconds": 2.0 + 0.3 * requests, "settings": {"attempt_timeout": 0.5}}
        yield fault("a body that hangs", _says(head(length(99), status=status) + b"half", then="hang"), **hangs)
        yield fault("a body that never begins", _says(head(length(99), status=status), then="hang"), **hangs)
        yield fault("one byte every 100 ms", _drips(head(length(99), status=status), b"x" * 99), **hangs)
        yield fault("a body that is cut", _says(head(length(99), status=status) + b"half", then="close"))
        yield fault("a body that is reset", _says(head(length(99), status=status) + b"half", then="reset"))
        # In the same segment as the head, invalid HTTP spoils the head too.
        spoiled = _says(head(CHUNKED, status=status) + b"xyz\r\n", then="close")
        yield _retried(f"{number} with a body that is no chunk", spoiled)
        yield _retried(f"{number} with a body longer than told", _says(reply(b"no", status) + b"garbage"))
        yield fault("a body that is not gzip", _keep(ONE, status, GZIP))
        yield fault("a cut gzip body", _keep(gzip.compress(ONE)[:-9], status, GZIP))
        yield fault("an encoding not asked for", _keep(ONE, status, b"Content-Encoding: br"))
        yield fault("no body", _keep(b"", status))
        yield fault("no body, FIN", _says(head(status=status), then="close"))
        yield fault("invalid UTF-8", _keep(b"\xff\xfe\xfd", status))
        yield fault("60,000 nested brackets", _keep(b"[" * 60_000 + b"]" * 60_000, status))
        yield fault("100,000 nested objects", _keep(b'{"a":' * 100_000, status))
    yield Fault("a long error body, whole", _keep(b"x" * MIB, b"500 Broken"), refusal(500), 2)
    # Reading an empty body until FIN takes a second at most, though the attempt has more.
    yield Fault(
        "404 with a body that hangs, and time left",
        _says(head(length(9), status=b"404 None"), then="hang"),
        refusal(404),
        seconds=3.0,
    )


def _json() -> Iterator[Fault]:
    deep = 100_000
    static = json.dumps(STATIC)
    wrong: dict[str, bytes] = {
        "100,000 open brackets": b"[" * deep,
        "100,000 nested brackets": b"[" * deep + b"]" * deep,
        "100,000 nested objects": b'{"a":' * deep + b"1" + b"}" * deep,
        "100,000 nested brackets in data": b'{"status": "200", "data": ' + b"[" * deep + b"]" * deep + b"}",
        "100,000 nested brackets in a record": ONE.replace(b'"one"', b"[" * deep + b"]" * deep),
        "100,000 nested brackets in an extra field": ONE.replace(
            b'"id"', b'"x": ' + b"[" * deep + b"]" * deep + b', "id"'
        ),
        "invalid UTF-8 in a name": ONE.replace(b"one", b"\xff\xfe"),
        "UTF-8 cut inside a character": ONE.replace(b"one", b"\xc3"),
        "UTF-8 of a surrogate": ONE.replace(b"one", b"\xed\xa0\x80"),
        "UTF-8 longer than need be": ONE.replace(b"one", b"\xc0\xaf"),
        "Latin-1": envelope({**STATIC, "name": "schön"}).replace(b"\\u00f6", b"\xf6"),
        "UTF-16 with its mark": ONE.decode().encode("utf-16"),
        "UTF-16, little end first": ONE.decode().encode("utf-16-le"),
        "UTF-16, big end first": ONE.decode().encode("utf-16-be"),
        "UTF-32": ONE.decode().encode("utf-32"),
        "UTF-7": b"+AHs-",
        "two byte order marks": b"\xef\xbb\xbf" * 2 + ONE,
        "only a byte order mark": b"\xef\xbb\xbf",
        "white space": b" \r\n\t ",
        "zeros": b"\0" * 99,
        "cut": ONE[:-1],
        "cut in a string": ONE[:20],
        "two documents": ONE + ONE,
        "garbage after it": ONE + b"x",
        "a zero after it": ONE + b"\0",
        "a trailing comma": ONE[:-1] + b",}",
        "a comment": b"/* ok */" + ONE,
        "single quotes": ONE.replace(b'"', b"'"),
        "a prefix against hijacking": b")]}',\n" + ONE,
        "NaN": ONE.replace(b"7", b"NaN"),
        "Infinity": ONE.replace(b"7", b"Infinity"),
        "a leading zero": ONE.replace(b"7", b"07"),
        "a hexadecimal number": ONE.replace(b"7", b"0x7"),
        "a control character in a string": ONE.replace(b"one", b"o\x01e"),
        "an escape that is none": ONE.replace(b"one", b"\\q"),
        "a count written 7.0": ONE.replace(b" 7,", b" 7.0,"),
        "a count written 7e0": ONE.replace(b" 7,", b" 7e0,"),
        "a record that is a string": envelope(static),
        "records in an object": ONE.replace(b"[", b'{"0": ').replace(b"]", b"}"),
        "an event stream": b"data: " + ONE + b"\n\n",
        "one record a line": static.encode() + b"\n" + static.encode(),
        "HTML": b"<!doctype html><title>Sign in</title>",
        "XML": b'<?xml version="1.0"?><data/>',
        "a time in year 1, east of Greenwich": ONE.replace(b"2025-10-01T09:10:00Z", b"0001-01-01T00:00:00+01:00"),
        "a time on day 32": ONE.replace(b"2025-10-01T", b"2025-10-32T"),
        "10,000 wrong records": envelope(*[{**STATIC, "id": None}] * 10_000),
    }
    for name, body in wrong.items():
        yield Fault(f"body: {name}", _keep(body), UNREADABLE)
    sound: dict[str, bytes] = {
        "a byte order mark": b"\xef\xbb\xbf" + ONE,
        "white space around it": b" \r\n\t" + ONE + b" \r\n\t",
        "1 MiB of white space before it": b" " * MIB + ONE,
        "a count above 64 bits": ONE.replace(b"7", b"9" * 30),
        "an emoji": ONE.replace(b"one", "🎉".encode()),
        "escaped NUL": ONE.replace(b"one", b"\\u0000"),
        "a name of 1 MiB": ONE.replace(b"one", b"x" * MIB),
        "10,000 extra fields": envelope({**STATIC, **{f"x{n}": n for n in range(10_000)}}),
        "a key twice": ONE.replace(b'"id": "1"', b'"id": 1, "id": "1"'),
    }
    for name, body in sound.items():
        yield Fault(f"body: {name}", _keep(body), Value(1))
    types = (
        "", "json", "text/html", "text/html; charset=utf-16", "application/json; charset=none-such",
        "application/json; charset=", "application/json; charset=utf-8; charset=utf-16",
        "application/json; charset=idna",
        "application/json; charset=\"un", "application/json; charset=utf_8_sig", "image/png",
        "multipart/mixed; boundary=x",
        "; ; ;", "application/json; " + "x=y; " * 100, "application/schön",
    )  # fmt: skip
    for sent in types:
        named = sent if len(sent) < 60 else f"{sent[:40]}…"
        serve = _keep(ONE, b"200 OK", f"Content-Type: {sent}".encode())
        yield Fault(f"Content-Type: {named!r}", serve, Value(1), family="odd content types")


def _html() -> Iterator[Fault]:
    html = b"<html><head><title>Oops</title></head><body><h1>It broke</h1></body></html>"
    known = {status.value for status in HTTPStatus if status.value >= 200}
    for status in sorted(
        known | {218, 299, 306, 399, 420, 430, 440, 444, 494, 499, 509, 520, 522, 525, 530, 599, 600, 999}
    ):
        outcome = UNREADABLE if status < 300 else refusal(status)
        outcome = NO_REPLY if status in {204, 304} else outcome  # which have no body
        serve = _keep(html, b"%d Odd" % status, b"Content-Type: text/html")
        requests = 2 if status in _RETRIED | {204, 304} else 1
        yield Fault(f"HTML with {status}", serve, outcome, requests, family="HTML in every status")


def _contradictions() -> Iterator[Fault]:
    for inner in (500, 503, 429, 408, "401", 400, "404", "403", 302, "599", "300"):
        serve = _keep(envelope(status=inner, data=None, description="no"))
        status = int(inner)
        yield Fault(f"200 with envelope {inner!r}", serve, refusal(status), 2 if status in _RETRIED else 1)
    yield Fault("200 with envelope 429, then sound", _first_in_turn(envelope(status=429)), Value(1), 2)
    for inner in ("201", 204, 299):
        yield Fault(f"200 with envelope {inner!r}", _keep(envelope(STATIC, status=inner)), Value(1))
    for outer, inner in ((500, "200"), (503, 404), (404, 500), (401, "200"), (429, 200), (302, 200)):
        serve = _keep(envelope(STATIC, status=inner), b"%d Odd" % outer)
        yield Fault(f"{outer} with envelope {inner!r}", serve, refusal(outer), 2 if outer in _RETRIED else 1)
    yield Fault("201 with envelope 500", _keep(envelope(status=500), b"201 Created"), UNREADABLE)


def _first_in_turn(body: bytes) -> Serve:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.answer(body if peer.server.requests == 1 else ONE)

    return serve


_JUNK: Final[Mapping[str, Any]] = {
    "missing": ...,
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "a fraction": 1.5,
    "text": "text",
    "digits": "7",
    "empty text": "",
    "an array": [],
    "an object": {},
}
_ANYTHING: Final = frozenset(_JUNK)
# Unusual but valid responses.
_FINE: Final[Mapping[str, Mapping[str, frozenset[str]]]] = {
    "Static": {
        "id": frozenset({"text", "digits"}),
        "name": frozenset({"text", "digits", "empty text"}),
        "created_time": frozenset(),
        "user_count": frozenset({"zero"}),
        "type": frozenset({"text", "digits"}),
    },
    "Dynamic": {
        "id": frozenset({"text", "digits"}),
        "name": frozenset({"text", "digits", "empty text"}),
        "created_time": frozenset(),
        "user_count": _ANYTHING,
        "type": frozenset({"text", "digits"}),
    },
    "Unknown": {
        "id": _ANYTHING,
        "name": _ANYTHING,
        "created_time": _ANYTHING,
        "user_count": _ANYTHING,
    },
    "envelope": {
        "status": frozenset(),
        "description": frozenset({"missing", "null", "text", "digits", "empty text"}),
        "response_time": _ANYTHING,
        "data": frozenset({"an array"}),
    },
}  # fmt: skip


def _fields() -> Iterator[Fault]:
    records = {"Static": STATIC, "Dynamic": DYNAMIC, "Unknown": {**STATIC, "type": "Lookalike"}}
    for (kind, rules), (junk, value) in itertools.product(_FINE.items(), _JUNK.items()):
        for name, fine in rules.items():
            if kind == "envelope":
                whole = json.loads(ONE)
                changed, path = _changed(whole, name, value), f"$.{name}"
                body, count = json.dumps(changed).encode(), len(changed.get("data") or ()) if junk in fine else 0
            else:
                path, count = f"$.data[1].{name}", 3
                body = envelope(STATIC, _changed(records[kind], name, value), DYNAMIC)
            outcome: Outcome = Value(count) if junk in fine else Refused(InvalidResponseError, path=path)
            yield Fault(f"{kind}: {name} is {junk}", _keep(body), outcome, family=f"fields of {kind}, each amiss")
    for junk, value in _JUNK.items():
        if value is ...:
            continue
        path = "$.data" if junk == "an object" else "$"
        wrong = _keep(json.dumps({"status": "200"} if junk == "an object" else value).encode())
        yield Fault(
            f"the envelope is {junk}",
            wrong,
            Refused(InvalidResponseError, path=path),
            family="envelope or record amiss",
        )
        path = "$.data[0].type" if junk == "an object" else "$.data[0]"
        yield Fault(
            f"a record is {junk}",
            _keep(envelope(value)),
            Refused(InvalidResponseError, path=path),
            family="envelope or record amiss",
        )


def _changed(record: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    changed = {**record, name: value}
    if value is ...:
        del changed[name]
    return changed


def _origins() -> Iterator[Fault]:
    for status in (300, 301, 302, 303, 307, 308):
        yield Fault(
            f"{status} to another origin", _redirects(status, "http://127.0.0.1:{other}/audiences"), refusal(status)
        )
    places = {
        "to itself": "/audiences",
        "to another host": "http://localhost:{other}/audiences",
        "without a scheme": "//127.0.0.1:{other}/audiences",
        "that is no URL": "http://[",
        "with a password": "http://a:b@127.0.0.1:{other}/audiences",
        "that is empty": "",
        "of 8,000 characters": "/" + "x" * 7900,
    }
    for name, place in places.items():
        yield Fault(f"302 {name}", _redirects(302, place), refusal(302))
    yield Fault("200 with Location", _redirects(200, "http://127.0.0.1:{other}/"), Value(1))
    yield Fault("200 with Refresh", _keep(ONE, b"200 OK", b"Refresh: 0; url=http://127.0.0.1:1/"), Value(1))
    yield Fault("401 that asks for a password", _keep(b"", b"401 Who", b"WWW-Authenticate: Basic"), refusal(401))
    yield Fault("407 unasked", _keep(b"", b"407 Who", b"Proxy-Authenticate: Basic"), refusal(407))
    cookies = (b"session=1; Path=/", b"session=1; Domain=localhost", b"=", b"a" * 4000 + b"=1", b"a=1; Max-Age=-1")
    for cookie in cookies:
        yield Fault(
            f"Set-Cookie: {cookie[:30].decode()}",
            _keep(ONE, b"200 OK", b"Set-Cookie: " + cookie),
            Value(1),
            before=1,
            host="localhost",
        )


def _redirects(status: int, place: str) -> Serve:
    async def serve(peer: Peer) -> None:
        await peer.request()
        location = place.format(other=peer.server.other_port)
        await peer.answer(ONE, b"%d Moved" % status, b"Location: " + location.encode())

    return serve


def _secured() -> Iterator[Fault]:
    good = _keep(ONE)
    yield Fault("TLS, trusted", good, Value(1), tls="trusted")
    yield Fault("certificate of an unknown CA", good, NO_REPLY, 0, tries=1, tls="unknown-ca")
    yield Fault("certificate that has expired", good, NO_REPLY, 0, tries=1, tls="expired")
    yield Fault("certificate of another host", good, NO_REPLY, 0, tries=1, tls="other-host")
    yield Fault("TLS on a plain port", good, NO_REPLY, 0, tries=2, tls="server-only")
    yield Fault("plain HTTP on a TLS port", _plain_first, NO_REPLY, 0, tries=2, tls="client-only")
    yield Fault(
        "silence in the handshake",
        _at_accept("hang"),
        TOO_SLOW,
        0,
        tries=2,
        tls="client-only",
        seconds=2.6,
        settings=_HANGS,
    )
    yield Fault("FIN in the handshake", _at_accept("close"), NO_REPLY, 0, tries=2, tls="client-only")
    yield Fault("RST in the handshake", _at_accept("reset"), NO_REPLY, 0, tries=2, tls="client-only")
    yield _retried("TLS: FIN after the request", _says(then="close"), tls="trusted")
    yield _retried("TLS: RST in the body", _says(reply()[:-9], then="reset"), tls="trusted")
    yield _slow("TLS: silence in the body", _says(reply()[:-9], then="hang"), tls="trusted")
    stale = _first_connection(_in_turn(good, _says(then="reset")), good)
    yield Fault("TLS: stale keep-alive, RST", stale, Value(1), 2, before=1, tls="trusted")
    yield Fault(
        "TLS: 512 MiB chunked",
        _goes_on(head(CHUNKED), chunk(b" " * MIB), 512, LAST),
        TOO_LARGE,
        most_sent=MIB + KERNEL,
        tls="trusted",
        settings=_SMALL,
    )


async def _plain_first(peer: Peer) -> None:
    await peer.send(reply(b"", b"400 This is a TLS port? No"))
    await peer.end("close")


CATALOGUE: Final[tuple[Fault, ...]] = (
    *_status_lines(),
    *_lengths_told(),
    *_header_lines(),
    *_lengths_kept(),
    *_chunked(),
    *_connections(),
    *_informational(),
    *_bodiless(),
    *_encodings(),
    *_bombs(),
    *_error_bodies(),
    *_json(),
    *_html(),
    *_contradictions(),
    *_fields(),
    *_origins(),
    *_secured(),
)


# --- measuring, in a process of its own

_CAP: Final = {"max_body_bytes": 16 * MIB}
HEAVY: Final[tuple[Fault, ...]] = (
    Fault("gzip bomb of 1024 MiB", _bomb("gzip", 1024, GZIP), TOO_LARGE, settings=_CAP),
    Fault("deflate bomb of 1024 MiB", _bomb("deflate", 1024, DEFLATE), TOO_LARGE, settings=_CAP),
    Fault("512 MiB chunked", _goes_on(head(CHUNKED), chunk(b" " * MIB), 512, LAST), TOO_LARGE, settings=_CAP),
    Fault("512 MiB announced", _goes_on(head(length(512 * MIB)), b" " * MIB, 512), TOO_LARGE, settings=_CAP),
)
"""Faults with a promise on peak memory: at most twice ``max_body_bytes``."""


@functools.cache
def _many() -> bytes:
    """Return 100,000 audiences, about 10 MB."""
    return envelope(*({**STATIC, "id": str(n), "name": f"audience number {n}"} for n in range(100_000)))


async def _says_many(peer: Peer) -> None:
    await peer.request()
    await peer.answer(_many())


def _members(number: int) -> bytes:
    """Return an answer after *number* blanks, each compressed by itself."""
    return gzip.compress(b" ") * number + gzip.compress(ONE)


def _ignored(number: int) -> bytes:
    """Return an answer with *number* empty arrays in an ignored field."""
    return gzip.compress(ONE.replace(b"{", b'{"ignored": [' + b"[]," * number + b"[]], ", 1), compresslevel=1)


LONG: Final[tuple[Fault, ...]] = (
    Fault("gzip bomb of 1024 MiB", _bomb("gzip", 1024, GZIP), TOO_LARGE),
    Fault("deflate bomb of 1024 MiB", _bomb("deflate", 1024, DEFLATE), TOO_LARGE),
    Fault("gzip bomb of 8 MiB, within the cap", _bomb("gzip", 8, GZIP), Value(0)),
    Fault("100,000 audiences", _says_many, Value(100_000)),
    Fault(
        "an error body of 64 MiB", _goes_on(head(length(64 * MIB), status=b"404 None"), b"x" * MIB, 64), refusal(404)
    ),
    Fault("gzip of 20,000 members", _keep(_members(20_000), b"200 OK", b"Content-Encoding: gzip"), Value(1)),
    Fault("gzip of what is ignored", _keep(_ignored(1_000_000), b"200 OK", b"Content-Encoding: gzip"), Value(1)),
    Fault("an error body that is a bomb", _bomb("gzip", 1024, GZIP, b"404 None"), refusal(404)),
)
"""Faults that must not block the event loop."""


@frozen
class Measured:
    """One call in its own process.

    Attributes:
        outcome: Result of the call.
        idle: Bytes of the process after an ordinary call.
        peak: Maximum number of bytes during the call.
        gap: Seconds, the longest between two ticks of a 10 ms ticker in the same loop.
        seconds: Seconds of the call.
    """

    outcome: str
    idle: int
    peak: int
    gap: float
    seconds: float


async def measure(fault: Fault, thread: ServerThread) -> Measured:
    """Meet the fault in a child process, after an ordinary call there."""
    async with thread.serving(Fault("ordinary", _keep(ONE), Value(1))) as ordinary, thread.serving(fault) as server:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            one_call.__file__,
            str(ordinary.port),
            str(server.port),
            json.dumps({"timeout": 30.0, "attempt_timeout": 30.0, **fault.settings}),
            stdout=asyncio.subprocess.PIPE,
            env={
                name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")
            },  # at full speed
        )
        out, _ = await child.communicate()
    assert child.returncode == 0
    return Measured(**json.loads(out))
