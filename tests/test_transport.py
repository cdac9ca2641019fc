"""One attempt on real sockets: bodies, encodings, limits, broken connections, TLS, cookies and proxies."""

import asyncio
import gc
import gzip
import json
import select
import socket
import ssl as tls
import struct
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest
import trustme
from aiohttp import web
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from conftest import EMPTY_ANSWER, RawConnection, RawServer
from services import free_port
from yarl import URL

from audiences_async import (
    Account,
    AttemptTimeoutError,
    AudiencesClient,
    AudiencesError,
    ConnectionFailedError,
    Event,
    InvalidResponseError,
    ResponseTooLargeError,
    RetryPolicy,
    ServerError,
    StatusError,
    UnauthorizedError,
)
from audiences_async._http import direct
from audiences_async._http.connections import Connector, Trust
from audiences_async._http.transport import Transport, TransportSettings
from audiences_async.credentials import ApiKey
from audiences_async.events import AttemptFinished
from audiences_async.sandbox import Answer, Sandbox, many_audiences

StartRaw: TypeAlias = Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]]
ONCE = RetryPolicy(max_attempts=1)
THRICE = RetryPolicy(max_attempts=3, base_delay=0, throttle_base_delay=0)
LONG_ANSWER = json.dumps({"status": "200", "data": list(many_audiences("a", 5000))}).encode()


@pytest.fixture(autouse=True, params=["direct", "session"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set how our own session sends: directly on its pool, or as with another version of aiohttp."""
    if request.param == "session":
        monkeypatch.setattr(direct, "_is_known", lambda: False)
    return str(request.param)


def deflate(data: bytes, wbits: int) -> bytes:
    """Compress *data* with zlib; *wbits* selects zlib, raw deflate or gzip."""
    compressor = zlib.compressobj(wbits=wbits)
    return compressor.compress(data) + compressor.flush()


async def a_few_turns() -> None:
    """Let the event loop finish work that needs no wait, such as reading received data."""
    for _ in range(10):
        await asyncio.sleep(0)


async def error_of(client: AudiencesClient) -> AudiencesError:
    """Return the error of one call."""
    with pytest.raises(AudiencesError) as caught:
        await client.get_audiences()
    return caught.value


# --- the request


async def test_a_connection_that_is_lost_at_once(
    sandbox: Sandbox, north: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is already lost when aiohttp returns it is a failed one, and retried."""
    connect = aiohttp.TCPConnector.connect

    async def lost(*arguments: Any, **named: Any) -> Connection:
        connection = await connect(*arguments, **named)
        assert connection.protocol is not None
        connection.protocol.abort()
        return connection

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", lost)
    async with AudiencesClient(str(north.api_key), base_url=sandbox.base_url, retry=ONCE) as client:
        error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert error.transient
    assert error.message == "the connection was closed or reset before a reply came"


# --- encodings


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("identity", LONG_ANSWER),
        ("", LONG_ANSWER),
        ("gzip", gzip.compress(LONG_ANSWER, mtime=0)),
        ("X-GZip", gzip.compress(LONG_ANSWER, mtime=0)),
        ("gzip", gzip.compress(LONG_ANSWER[:1000], mtime=0) + gzip.compress(LONG_ANSWER[1000:], mtime=0)),
        ("deflate", deflate(LONG_ANSWER, zlib.MAX_WBITS)),
        ("deflate", deflate(LONG_ANSWER, -zlib.MAX_WBITS)),
    ],
)
async def test_every_encoding_asked_for_is_read(sandbox: Sandbox, north: Account, encoding: str, body: bytes) -> None:
    """Plain, gzip (of several members too) and both forms of deflate have the same result."""
    sandbox.script("north", Answer(200, body, headers={"Content-Encoding": encoding}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        response = await client.get_audiences(north)
    assert [audience.id for audience in response] == [f"a-{n}" for n in range(5000)]


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(LONG_ANSWER, mtime=0)[:-20]),
        ("gzip", LONG_ANSWER),
        ("gzip", gzip.compress(LONG_ANSWER, mtime=0) + b"garbage"),
        ("deflate", deflate(LONG_ANSWER, zlib.MAX_WBITS)[:-1]),
        ("br", LONG_ANSWER),
        ("gzip, gzip", LONG_ANSWER),
    ],
)
async def test_a_cut_or_corrupt_encoding_is_no_answer(
    sandbox: Sandbox, north: Account, encoding: str, body: bytes
) -> None:
    """An encoding that is cut, mislabelled or unexpected is a failed connection, and retried."""
    sandbox.script("north", *[Answer(200, body, headers={"Content-Encoding": encoding})] * 2)
    async with AudiencesClient(str(north.api_key), base_url=sandbox.base_url, retry=THRICE) as client:
        assert len(await client.get_audiences()) == 2
    sandbox.script("north", Answer(200, body, headers={"Content-Encoding": encoding}))
    async with AudiencesClient(str(north.api_key), base_url=sandbox.base_url, retry=ONCE) as client:
        error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert "the body is cut short or corrupt" in str(error)


async def test_the_last_bytes_of_a_deflated_body_are_read(sandbox: Sandbox, north: Account) -> None:
    """All input may be taken before a piece of 256 KiB is full, and the rest of the output then still waits in zlib."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
    body = compressor.compress(EMPTY_ANSWER.ljust(256 * 1024 + 3)) + compressor.flush()
    sandbox.script("north", Answer(200, body, headers={"Content-Encoding": "deflate"}))
    async with AudiencesClient(base_url=sandbox.base_url, retry=ONCE) as client:
        assert len(await client.get_audiences(north)) == 0


async def test_the_content_type_does_not_matter(sandbox: Sandbox, north: Account) -> None:
    """A 200 is read as UTF-8 JSON, whatever its content type."""
    sandbox.script("north", Answer(200, EMPTY_ANSWER, headers={"Content-Type": "text/html; charset=utf-16"}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        assert len(await client.get_audiences(north)) == 0


# --- caps


@pytest.mark.parametrize("encoding", ["identity", "gzip", "deflate"])
async def test_a_body_above_the_cap_is_refused(sandbox: Sandbox, north: Account, encoding: str) -> None:
    """A 200 above max_body_bytes after decompression is refused, not retried, and its connection dropped."""
    packed = {"identity": LONG_ANSWER, "gzip": gzip.compress(LONG_ANSWER), "deflate": zlib.compress(LONG_ANSWER)}
    sandbox.script("north", Answer(200, packed[encoding], headers={"Content-Encoding": encoding}))
    cap = len(LONG_ANSWER) - 1
    async with AudiencesClient(str(north.api_key), base_url=sandbox.base_url, max_body_bytes=cap) as client:
        error = await error_of(client)
    assert isinstance(error, ResponseTooLargeError)
    assert f"max_body_bytes={cap}" in str(error)
    assert (error.stop_reason, len(error.attempts)) == ("final", 1)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_a_body_at_the_cap_is_read(sandbox: Sandbox, north: Account, encoding: str) -> None:
    """A 200 of exactly max_body_bytes is read."""
    body = gzip.compress(LONG_ANSWER) if encoding == "gzip" else LONG_ANSWER
    sandbox.script("north", Answer(200, body, headers={"Content-Encoding": encoding}))
    async with AudiencesClient(base_url=sandbox.base_url, max_body_bytes=len(LONG_ANSWER)) as client:
        assert len(await client.get_audiences(north)) == 5000


async def test_a_chunked_body_above_the_cap_is_dropped_at_the_cap(raw: StartRaw) -> None:
    """A body without an announced length is read up to the limit and no further."""
    gone = asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(10_000):
                await connection.send(b"1000\r\n" + b" " * 4096 + b"\r\n")
        finally:
            gone.set()

    server = await raw(serve)
    async with AudiencesClient("key", base_url=server.base_url, max_body_bytes=100_000) as client:
        error = await error_of(client)
        await gone.wait()
    assert isinstance(error, ResponseTooLargeError)
    assert len(error.body) == 64 * 1024


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_of_an_error_body_only_the_start_is_read(sandbox: Sandbox, north: Account, encoding: str) -> None:
    """At most 64 KiB of an error's body are kept, and the status decides."""
    body = b"x" * 10**6
    packed = gzip.compress(body) if encoding == "gzip" else body
    sandbox.script("north", Answer(404, packed, headers={"Content-Encoding": encoding}))
    async with AudiencesClient(str(north.api_key), base_url=sandbox.base_url) as client:
        error = await error_of(client)
    assert isinstance(error, StatusError)
    assert (error.status, len(error.body)) == (404, 64 * 1024)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(401, failure="cut-body"),
        Answer(401, failure="reset-in-body"),
        Answer(401, "x", headers={"Content-Encoding": "gzip"}),
    ],
)
async def test_an_error_with_a_broken_body_is_still_that_error(
    sandbox: Sandbox, north: Account, answer: Answer
) -> None:
    """The status decides, however much of the body is readable."""
    sandbox.script("north", answer)
    async with AudiencesClient(str(north.api_key), base_url=sandbox.base_url) as client:
        assert isinstance(await error_of(client), UnauthorizedError)


async def test_an_error_with_a_body_that_hangs_is_still_that_error(raw: StartRaw) -> None:
    """An error whose body never ends is that error when the attempt's time is up."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 401 No\r\nContent-Length: 9\r\n\r\nhalf")
        await connection.reader.read()

    server = await raw(serve)
    async with AudiencesClient("key", base_url=server.base_url, attempt_timeout=0.1) as client:
        error = await error_of(client)
    assert isinstance(error, UnauthorizedError)
    assert error.body == b"half"


async def test_a_key_at_the_cut_of_a_body_is_masked(sandbox: Sandbox) -> None:
    """If the 64 KiB end inside an echoed key, the rest of the key is masked too."""
    account = sandbox.add_account("north", api_key="secret-key-0123456789")
    sandbox.script("north", Answer(400, b"x" * (64 * 1024 - 12) + b"secret-key-0123456789" * 9))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(StatusError) as caught:
            await client.get_audiences(account)
    assert caught.value.body.endswith(b"x***")


# --- connections


@pytest.mark.parametrize("lost", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_requests_on_the_wire_never_exceed_max_attempts(raw: StartRaw, lost: bytes) -> None:
    """A peer that closes new and pooled connections sees max_attempts requests, aiohttp's own included."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        if connection.server.requests == 1:
            await connection.answer()
            await connection.request()
        await connection.send(lost)

    server = await raw(serve)
    async with AudiencesClient("key", base_url=server.base_url, retry=THRICE) as client:
        await client.get_audiences()
        error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert (server.requests, len(error.attempts)) == (1 + 3, 3)


async def test_a_given_sessions_resends_count_too(raw: StartRaw) -> None:
    """The same holds on a caller's session, whose own middlewares still run."""
    passed: list[str] = []

    async def middleware(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        passed.append(request.method)
        return await send(request)

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        if connection.server.requests == 1:
            await connection.answer()
            await connection.request()

    server = await raw(serve)
    async with aiohttp.ClientSession(middlewares=[middleware]) as session:
        client = AudiencesClient("key", base_url=server.base_url, retry=THRICE, session=session)
        await client.get_audiences()
        assert isinstance(await error_of(client), ConnectionFailedError)
    assert server.requests == len(passed) == 1 + 3


async def test_a_given_session_that_cannot_connect() -> None:
    """If the port is closed, a caller's session raises the same error as our own."""
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{free_port()}/"
        error = await error_of(AudiencesClient("key", base_url=url, session=session, retry=ONCE))
    assert isinstance(error, ConnectionFailedError)
    assert "cannot connect to 127.0.0.1" in str(error)


async def test_a_middleware_cannot_send_twice(sandbox: Sandbox, north: Account) -> None:
    """A middleware that sends again on its own is stopped: each request sent is an attempt."""

    async def middleware(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        (await send(request)).close()
        return await send(request)

    async with aiohttp.ClientSession(middlewares=[middleware]) as session:
        client = AudiencesClient(str(north.api_key), base_url=sandbox.base_url, session=session, retry=ONCE)
        error = await error_of(client)
    assert "would have sent the request twice" in str(error)
    assert len(sandbox.requests) == 1


@pytest.mark.parametrize("has_poll", [True, False], ids=["poll", "select"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])  # turns of the event loop, in which it reads the data
@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize(
    "unasked", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", None], ids=["a reply", "the end"]
)
async def test_what_comes_unasked_answers_nobody(
    raw: StartRaw,
    monkeypatch: pytest.MonkeyPatch,
    unasked: bytes | None,
    turns: int,
    *,
    is_given: bool,
    has_poll: bool,
) -> None:
    """Unsolicited data on an idle connection is never taken for the next response, even while unread."""
    if not has_poll:
        monkeypatch.delattr(select, "poll")
    idle, sent = asyncio.Event(), asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.answer()
        if connection.server.connections == 1:
            await idle.wait()
            if unasked is None:
                connection.writer.write_eof()
            else:
                await connection.send(unasked)
            sent.set()
        await connection.request()
        await connection.answer()

    server = await raw(serve)
    async with aiohttp.ClientSession() as session:
        given = session if is_given else None
        retry = THRICE if is_given else ONCE
        async with AudiencesClient("key", base_url=server.base_url, retry=retry, session=given) as client:
            assert len(await client.get_audiences()) == 0
            idle.set()
            await sent.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            assert len(await client.get_audiences()) == 0
    assert (server.connections, server.requests) == (2, 2)


@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
async def test_a_connection_that_the_next_request_has_already(raw: StartRaw, *, is_given: bool) -> None:
    """The pool may reuse a connection before the task that read from it has run; the next request keeps it."""
    sent = asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(EMPTY_ANSWER))
        await a_few_turns()
        await connection.send(EMPTY_ANSWER)
        sent.set()
        await connection.request()
        await connection.answer()

    server = await raw(serve)
    async with aiohttp.ClientSession() as session:
        given = session if is_given else None
        async with AudiencesClient("key", base_url=server.base_url, retry=ONCE, session=given) as client:
            first = asyncio.create_task(client.get_audiences())
            await sent.wait()
            await asyncio.sleep(0)  # the event loop reads the answer, and runs this task before the other one
            assert not first.done()
            assert len(await client.get_audiences()) == len(await first) == 0
    assert (server.connections, server.requests) == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
async def test_the_end_of_an_idle_connection_is_no_ones_error(raw: StartRaw, *, is_given: bool) -> None:
    """If a peer resets an idle connection, asyncio reports no unhandled error."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

    async def serve(connection: RawConnection) -> None:
        for _ in range(2):
            await connection.request()
            await connection.answer()
        linger = struct.pack("ii", 1, 0)  # closing it sends a reset
        connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    server = await raw(serve)
    async with aiohttp.ClientSession() as session:
        given = session if is_given else None
        async with AudiencesClient("key", base_url=server.base_url, retry=ONCE, session=given) as client:
            for _ in range(2):
                await client.get_audiences()
            await a_few_turns()
            await client.get_audiences()  # on another, for which the pool lets the first one go
            gc.collect()
    assert told == []
    assert server.connections == 2


async def test_nothing_is_read_from_an_idle_connection(raw: StartRaw) -> None:
    """Unsolicited data on an idle connection, of any size, closes it at once, and is not buffered."""
    idle, ended = asyncio.Event(), asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.answer()
        await idle.wait()
        try:
            while True:
                await connection.answer()
        except ConnectionError:
            ended.set()

    server = await raw(serve)
    async with AudiencesClient("key", base_url=server.base_url) as client:
        await client.get_audiences()
        idle.set()
        await asyncio.wait_for(ended.wait(), 10)


async def test_what_comes_while_a_given_session_takes_its_connection(raw: StartRaw) -> None:
    """A caller's session's connection is checked when it is taken, whatever the session does before."""
    reused, sent = asyncio.Event(), asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.answer()
        if connection.server.connections == 1:
            await reused.wait()
            await connection.answer(b'{"status": "200", "data": [{"type": "Stale"}]}')
            sent.set()
        await connection.request()
        await connection.answer()

    async def wait(*_: object) -> None:
        reused.set()
        await sent.wait()

    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(wait)
    server = await raw(serve)
    async with aiohttp.ClientSession(trace_configs=[trace]) as session:
        client = AudiencesClient("key", base_url=server.base_url, session=session, retry=THRICE)
        assert len(await client.get_audiences()) == 0
        assert len(await client.get_audiences()) == 0
    assert (server.connections, server.requests) == (2, 2)


async def test_a_given_session_that_loses_its_connection_at_once(
    sandbox: Sandbox, north: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection of a caller's session without a signal for its end is used all the same."""
    monkeypatch.setattr(ResponseHandler, "closed", None)
    async with aiohttp.ClientSession() as session:
        client = AudiencesClient(str(north.api_key), base_url=sandbox.base_url, session=session, retry=ONCE)
        assert len(await client.get_audiences()) == 2


@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
async def test_what_follows_a_101_answers_nobody(raw: StartRaw, *, is_given: bool) -> None:
    """The response after an unsolicited 101 is never the next account's."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        await connection.request()
        await connection.answer()

    server = await raw(serve)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        given = session if is_given else None
        async with AudiencesClient("key", base_url=server.base_url, retry=ONCE, session=given) as client:
            for _ in range(2):
                assert isinstance(await error_of(client), InvalidResponseError)
    assert (server.connections, server.requests) == (2, 2)


@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
async def test_a_body_that_cannot_be_parsed_ends_its_attempt_at_once(raw: StartRaw, *, is_given: bool) -> None:
    """An invalid chunk, in its own segment, ends the attempt at once."""
    sent, begun = asyncio.Event(), asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        sent.set()
        await begun.wait()
        await connection.send(b"no size\r\n")
        await connection.reader.read()

    server = await raw(serve)
    async with aiohttp.ClientSession() as session:
        given = session if is_given else None
        async with AudiencesClient("key", base_url=server.base_url, retry=ONCE, session=given) as client:
            call = asyncio.create_task(error_of(client))
            await sent.wait()
            await a_few_turns()
            begun.set()
            error = await asyncio.wait_for(call, 5)
    assert isinstance(error, ConnectionFailedError)
    assert "cut short or corrupt" in str(error)


async def test_a_body_that_ends_with_a_reset_is_cut(raw: StartRaw) -> None:
    """A body of unknown length is complete if the connection ends cleanly, and not if it is reset."""
    sent, begun = asyncio.Event(), asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\n\r\n" + EMPTY_ANSWER)
        sent.set()
        if connection.server.requests == 1:
            await begun.wait()
            linger = struct.pack("ii", 1, 0)  # closing it sends a reset
            connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    server = await raw(serve)
    async with AudiencesClient("key", base_url=server.base_url, retry=ONCE) as client:
        call = asyncio.create_task(error_of(client))
        await sent.wait()
        await a_few_turns()
        begun.set()
        error = await asyncio.wait_for(call, 5)
        assert isinstance(error, ConnectionFailedError)
        assert "reset" in str(error)
        assert len(await client.get_audiences()) == 0


async def test_whatever_a_middleware_raises_is_a_failed_exchange(sandbox: Sandbox, north: Account) -> None:
    """An exception from the session owner's code is one of our errors, and leaves no frames with headers behind."""

    async def middleware(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        raise LookupError(request.headers["Authorization"])

    async with aiohttp.ClientSession(middlewares=[middleware]) as session:
        client = AudiencesClient(str(north.api_key), base_url=sandbox.base_url, session=session, retry=ONCE)
        error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert error.message == "the exchange failed: LookupError: Bearer ***"
    assert error.__context__ is None


async def test_a_stale_connection_is_replaced_at_once(raw: StartRaw) -> None:
    """A pooled connection that the peer has closed costs an attempt, and no wait."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.answer()
        if connection.server.connections == 1:
            await connection.request()  # seen, and never answered

    server = await raw(serve)
    events: list[Event] = []
    async with AudiencesClient("key", base_url=server.base_url, on_event=events.append) as client:
        await client.get_audiences()
        await client.get_audiences()
    made = [event.attempt for event in events if isinstance(event, AttemptFinished)]
    assert [(attempt.wait, attempt.reason) for attempt in made] == [
        (0.0, "success"),
        (0.0, "stale-connection"),
        (0.0, "success"),
    ]


async def test_connections_are_reused_after_errors(sandbox: Sandbox, north: Account, raw: StartRaw) -> None:
    """A small error body is read to its end, so that its connection serves the next attempt."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.answer(b"<html>", head=b"HTTP/1.1 503 Busy")
        await connection.request()
        await connection.answer()

    server = await raw(serve)
    async with AudiencesClient("key", base_url=server.base_url, retry=THRICE) as client:
        await client.get_audiences()
    assert (server.connections, server.requests) == (1, 2)


@pytest.mark.parametrize(
    "head",
    [
        b"\x00\x00\x00\r\n\r\n",
        b"HTTP/9.9 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBad\x00: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: nine\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 20_000 + b"\r\n\r\n",
    ],
)
async def test_a_malformed_head_is_no_answer(raw: StartRaw, head: bytes) -> None:
    """A head that is not HTTP is a failed connection: retried, and never taken for a status."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.send(head)

    server = await raw(serve)
    async with AudiencesClient("key", base_url=server.base_url, retry=THRICE) as client:
        error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert [attempt.status for attempt in error.attempts] == [None] * 3
    assert server.requests == 3


async def test_an_echoed_key_in_a_malformed_head_is_masked(raw: StartRaw) -> None:
    """If the garbage holds the key, the error does not."""

    async def serve(connection: RawConnection) -> None:
        head = await connection.request()
        await connection.send(b"WHAT " + head.replace(b"\r\n", b" ") + b"\r\n\r\n")

    server = await raw(serve)
    async with AudiencesClient("s3cr3t", base_url=server.base_url, retry=ONCE) as client:
        error = await error_of(client)
    assert "s3cr3t" not in str(error) + repr(vars(error))


async def test_information_before_the_reply_is_passed_over(raw: StartRaw) -> None:
    """1xx responses before the final one are ignored."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        await connection.answer()

    server = await raw(serve)
    async with AudiencesClient("key", base_url=server.base_url) as client:
        assert len(await client.get_audiences()) == 0


async def test_a_refused_connection_says_where_it_went() -> None:
    """A closed port is a failed connection, and the error has host and port."""
    async with AudiencesClient("key", base_url="http://127.0.0.1:1/", retry=ONCE) as client:
        error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert "cannot connect to 127.0.0.1:1" in str(error)
    assert (error.transient, error.stale_connection) == (True, False)


async def test_an_unreadable_200_is_not_retried(sandbox: Sandbox, north: Account) -> None:
    """An unreadable 200 is raised at once, with its problems and the attempt's record."""
    sandbox.script("north", Answer(200, "<html>"))
    async with AudiencesClient(str(north.api_key), base_url=sandbox.base_url) as client:
        error = await error_of(client)
    assert isinstance(error, InvalidResponseError)
    assert (error.stop_reason, len(error.attempts), error.body) == ("final", 1, b"<html>")


# --- the key goes to one origin


async def test_cookies_are_not_carried_from_account_to_account(sandbox: Sandbox, north: Account) -> None:
    """A cookie set for one account is sent neither with another's key, nor with its own."""
    south = sandbox.add_account("south")
    sandbox.script("north", Answer(headers={"Set-Cookie": "session=north; Path=/"}))
    base_url = sandbox.base_url.replace("127.0.0.1", "localhost")  # a jar ignores bare addresses
    async with AudiencesClient(base_url=base_url) as client:
        for account in (north, south, north):
            await client.get_audiences(account)
    assert len(sandbox.requests) == 3
    assert not any("Cookie" in request.headers for request in sandbox.requests)


async def test_the_environment_brings_no_proxy_and_no_netrc(
    sandbox: Sandbox, north: Account, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Proxy variables and .netrc change neither the destination of the key, nor the key."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        assert len(await client.get_audiences(north)) == 2


async def test_an_explicit_proxy_is_used(raw: StartRaw) -> None:
    """A proxy given by argument gets the request, with the whole URL."""
    heads: list[bytes] = []

    async def serve(connection: RawConnection) -> None:
        heads.append(await connection.request())
        await connection.answer()

    proxy = await raw(serve)
    async with AudiencesClient("key", base_url="http://localhost:1/", proxy=proxy.base_url) as client:
        assert len(await client.get_audiences()) == 0
    assert heads[0].startswith(b"GET http://localhost:1/audiences HTTP/1.1\r\n")


async def test_a_proxy_that_refuses(raw: StartRaw) -> None:
    """A proxy that refuses the connection is reported by status, without its message: it may quote the password."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.answer(b"", head=b"HTTP/1.1 407 no me:s3cret")

    proxy = (await raw(serve)).base_url.replace("http://", "http://me:s3cret@")
    async with AudiencesClient("key", base_url="https://localhost:1/", proxy=proxy, retry=ONCE) as client:
        error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert error.message == "the proxy refused the connection with status 407"


async def test_a_dropped_tls_connection_is_gone_at_once(raw: StartRaw) -> None:
    """A silent peer, which never closes TLS, does not keep a connection that the client has given up."""
    ca = trustme.CA()
    ours, theirs = tls.create_default_context(), tls.create_default_context(tls.Purpose.CLIENT_AUTH)
    ca.configure_trust(ours)
    ca.issue_cert("localhost").configure_cert(theirs)
    connected, gone = asyncio.Event(), asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        incoming, outgoing = tls.MemoryBIO(), tls.MemoryBIO()
        peer = theirs.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            try:
                request = peer.read()
            except tls.SSLWantReadError:
                await connection.send(outgoing.read())
                incoming.write(await connection.reader.read(1 << 16))
            else:
                break
        assert request.startswith(b"GET ")
        connected.set()
        await connection.reader.read()  # until the client has gone
        gone.set()

    server = await raw(serve)
    base_url = server.base_url.replace("http://127.0.0.1", "https://localhost")
    async with AudiencesClient("key", base_url=base_url, ssl=ours) as client:
        call = asyncio.create_task(client.get_audiences())
        await asyncio.wait_for(connected.wait(), 10)
        call.cancel()
        await asyncio.wait_for(gone.wait(), 10)
    assert call.cancelled()


@pytest.fixture
async def https(unused_tcp_port: int) -> Any:
    """Yield a server with a certificate of an unknown CA: its URL, the CA and a count of requests."""
    ca = trustme.CA()
    context = tls.create_default_context(tls.Purpose.CLIENT_AUTH)
    ca.issue_cert("localhost").configure_cert(context)
    seen: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.Response(body=EMPTY_ANSWER)

    app = web.Application()
    app.router.add_get("/audiences", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "localhost", unused_tcp_port, ssl_context=context).start()
    yield f"https://localhost:{unused_tcp_port}/", ca, seen
    await runner.cleanup()


async def test_an_untrusted_certificate_is_final(https: Any) -> None:
    """An untrusted certificate ends the call at once, before the key is sent."""
    base_url, _, seen = https
    async with AudiencesClient("key", base_url=base_url, retry=THRICE) as client:
        error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert "certificate is not trusted" in str(error)
    assert (error.transient, error.stop_reason, len(error.attempts), seen) == (False, "final", 1, [])


async def test_a_ca_of_ones_own(https: Any) -> None:
    """A context that knows the CA is accepted; another host name on the certificate is not."""
    base_url, ca, seen = https
    context = tls.create_default_context()
    ca.configure_trust(context)
    async with AudiencesClient("key", base_url=base_url, ssl=context) as client:
        assert len(await client.get_audiences()) == 0
    async with AudiencesClient("key", base_url=base_url.replace("localhost", "127.0.0.1"), ssl=context) as client:
        error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert len(seen) == 1


async def test_a_server_error_that_lasts(sandbox: Sandbox, north: Account) -> None:
    """The last error of a persistent failure keeps headers and body."""
    sandbox.script("north", *[Answer(503, "<html>busy</html>", headers={"X-Served-By": "proxy-7"})] * 3)
    async with AudiencesClient(str(north.api_key), base_url=sandbox.base_url, retry=THRICE) as client:
        error = await error_of(client)
    assert isinstance(error, ServerError)
    assert (error.headers["x-served-by"], error.body) == ("proxy-7", b"<html>busy</html>")


async def test_requests_that_are_abandoned_time_out(raw: StartRaw) -> None:
    """Requests in flight to a service that swallows them end at once, and the error names the phase."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        asked.set()
        await asyncio.sleep(30)

    asked = asyncio.Event()
    settings = TransportSettings(
        endpoint=URL((await raw(serve)).base_url),
        attempt_timeout=30.0,
        max_body_bytes=2**20,
        max_connections=1,
        ssl=None,
        proxy=None,
        session=None,
    )
    transport = Transport(settings)
    attempt = asyncio.create_task(transport.attempt(ApiKey("key")))
    await asyncio.wait_for(asked.wait(), 5)
    transport.abandon()
    error = await attempt
    await transport.close()
    assert isinstance(error, AttemptTimeoutError)
    assert "nor to any other request, waiting for the reply" in str(error)


async def test_a_connector_of_another_aiohttp_is_closed_in_its_own_process(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the pool is left to the process that created it, under aiohttp 4's method name too."""
    if way == "session":
        pytest.skip("the pool is the same")
    monkeypatch.setattr(aiohttp.TCPConnector, "_close_immediately", lambda _, *, abort_ssl: ["closed"], raising=False)
    connector = Connector(None, Trust(None), is_tls=False)
    assert connector._close_immediately() == ["closed"]
    monkeypatch.setattr("os.getpid", lambda: 0)
    assert connector._close_immediately() == []
    monkeypatch.undo()
    await connector.close()
