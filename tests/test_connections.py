"""Faults of the connection: huge numbers, dead pools and addresses, client certificates, and the phase that hung."""

import asyncio
import contextlib
import itertools
import json
import logging
import socket
import ssl as tls
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeAlias

import aiohttp
import pytest
import trustme
from attrs import define, field
from conftest import RawConnection, RawServer

from audiences_async import (
    Account,
    AttemptTimeoutError,
    AudiencesClient,
    AudiencesError,
    CachePolicy,
    ConnectionFailedError,
    DeadlineExceededError,
    Failed,
    InvalidResponseError,
    RetryPolicy,
    StatusError,
)
from audiences_async.clock import Clock
from audiences_async.sandbox import Answer, Sandbox, SteppedTime
from audiences_async.structuring import decode

Serve: TypeAlias = Callable[[RawConnection], Awaitable[None]]
StartRaw: TypeAlias = Callable[[Serve], Awaitable[RawServer]]
ONCE = RetryPolicy(max_attempts=1)
AT_ONCE = RetryPolicy(base_delay=0)


async def error_of(client: AudiencesClient, **settings: Any) -> AudiencesError:
    """Return the error of one call."""
    with pytest.raises(AudiencesError) as caught:
        await client.get_audiences(**settings)
    return caught.value


def many(count: int) -> list[Account]:
    """Return *count* accounts: an unknown account does not send many requests at once."""
    return [Account(str(number), "key") for number in range(count)]


@pytest.fixture(params=["own", "given"])
async def session(request: pytest.FixtureRequest) -> AsyncIterator[aiohttp.ClientSession | None]:
    """Yield the client's session: ``None`` for its own, or a caller's."""
    if request.param == "own":
        yield None
    else:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as given:
            yield given


async def answer_all(connection: RawConnection) -> None:
    """Answer every request."""
    while True:
        await connection.request()
        await connection.answer()


async def hang(connection: RawConnection) -> None:
    """Read, and never answer."""
    await connection.reader.read()


async def reset(connection: RawConnection) -> None:
    """Let the connection, which ends now, be reset."""
    linger = struct.pack("ii", 1, 0)
    connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.writer.transport.abort()


# --- numbers that no Python number can hold, and invalid statuses

NUMBERS = pytest.mark.parametrize("number", [b"1e999", b"-1e400", b"9" * 5000], ids=["1e999", "-1e400", "digits"])
STATIC = {"id": "a", "name": "A", "created_time": "2025-10-01T09:10:00Z", "user_count": 1, "type": "Static"}
DYNAMIC = {"id": "a", "name": "A", "created_time": "2025-10-01T09:10:00Z", "type": "Dynamic"}
UNKNOWN = {"type": "Lookalike", "id": "a"}


RECORDS: list[dict[str, Any]] = [STATIC, DYNAMIC, UNKNOWN]
PLACES = [("status",), ("description",), ("data",), ("data", 1), ("response_time",), ("new",)]
PLACES += [("data", index, name) for index in range(3) for name in (*DYNAMIC, "user_count", "new")]


def body_with(number: bytes, *path: Any, before: int = 0) -> bytes:
    """Return a body with this number at this place, and other records before the ones it names."""
    body: dict[str, Any] = {"status": "200", "data": [STATIC] * before + [dict(record) for record in RECORDS]}
    place: Any = body if len(path) == 1 else body["data"] if len(path) == 2 else body["data"][before + path[1]]
    place[path[-1]] = ["HERE"] if path[-1] == "new" else "HERE"
    return json.dumps(body).encode().replace(b'"HERE"', number)


@NUMBERS
@pytest.mark.parametrize("before", [0, 3000])
@pytest.mark.parametrize("path", PLACES)
def test_a_number_out_of_range(number: bytes, path: tuple[Any, ...], before: int) -> None:
    """Report a number out of range with its path, in a body of any size; ignore it in an ignored field."""
    body = body_with(number, *path, before=before if len(path) == 3 else 0)
    if path[0] in {"response_time", "new"}:
        assert len(decode(body)) == 3
    else:
        with pytest.raises(InvalidResponseError) as caught:
            decode(body)
        where = path[0] if len(path) == 1 else f"data[{path[1] + (before if len(path) == 3 else 0)}]"
        assert caught.value.problems[0].startswith(f"$.{where}{'.' + path[2] if len(path) == 3 else ''}: ")


@NUMBERS
async def test_a_number_out_of_range_ends_no_job(sandbox: Sandbox, number: bytes) -> None:
    """Fail the account whose answer has one, after one request, and fetch the others."""
    accounts = [sandbox.add_account(str(n)) for n in range(10)]
    sandbox.script("3", Answer(200, body_with(number, "data")))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        results = await client.fetch_all(accounts, concurrency=3)
    assert [result.account.name for result in results if not result.ok] == ["3"]
    assert isinstance(results[3], Failed)
    assert isinstance(results[3].error, InvalidResponseError)
    assert len(sandbox.requests) == 10


WRONG_STATUSES = [99, 600, 1000, 0, -200, 10**40, 200.0, True, None, "99", "600", "0200", "1" * 40, "-200", "+200",
                  " 200", "200 ", "2e2", "²00", "２００", "200.0", "", "OK", [200]]  # fmt: skip  # noqa: RUF001


@pytest.mark.parametrize("status", WRONG_STATUSES, ids=repr)
async def test_a_status_that_is_none(sandbox: Sandbox, north: Account, status: Any) -> None:
    """Reject a response with an envelope status other than three digits from 100 to 599."""
    sandbox.script("north", Answer(200, {"status": status, "data": []}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        error = await error_of(client, account=north)
    assert isinstance(error, InvalidResponseError)
    assert error.problems[0].startswith("$.status: ")
    assert len(sandbox.requests) == 1


@pytest.mark.parametrize("cache", [None, CachePolicy(ttl=60)], ids=["", "cached"])
@pytest.mark.parametrize("status", [200, 429, 500])
async def test_an_error_that_is_not_ours_ends_no_job(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, status: int, cache: CachePolicy | None
) -> None:
    """Log an unexpected exception in one account's call, here of the clock, and make it its outcome."""
    accounts = [sandbox.add_account(str(n)) for n in range(10)]
    sandbox.script("3", Answer(status))
    readings = itertools.count(-3)
    clock = Clock(wall=lambda: 1 / next(readings)) if status == 200 else Clock(random=lambda: 1 / 0)
    async with AudiencesClient(base_url=sandbox.base_url, clock=clock, cache=cache) as client:
        results = await client.fetch_all(accounts, concurrency=3)
    [failed] = [result for result in results if isinstance(result, Failed)]
    assert (len(results), status == 200 or failed.account.name == "3") == (10, True)
    assert isinstance(failed.error.__cause__, ZeroDivisionError)
    [logged] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert logged.name == "audiences_async"
    assert logged.exc_info is not None
    assert logged.exc_info[1] is failed.error.__cause__


# --- a pool of dead connections


@define
class Pool:
    """A server whose first connections are dead on demand; others are served."""

    how: Serve
    size: int = 30
    is_ill: bool = False
    ended: int = 0
    filled: asyncio.Event = field(factory=asyncio.Event)
    all_ended: asyncio.Event = field(factory=asyncio.Event)

    async def serve(self, connection: RawConnection) -> None:
        """Answer on a connection; if it is one of the first, die once the pool is ill."""
        is_old = connection.server.connections <= self.size
        try:
            while True:
                await connection.request()
                if connection.server.requests == self.size:
                    self.filled.set()
                await self.filled.wait()  # so that each of the first requests needs a connection
                if is_old and self.is_ill:
                    return await self.how(connection)
                await connection.answer()
        finally:
            self.ended += is_old
            if self.ended == self.size:
                self.all_ended.set()

    async def fill(self, get: Callable[[Account], Awaitable[object]]) -> None:
        """Open the pool's connections, and let them die."""
        await asyncio.gather(*map(get, many(self.size)))
        self.is_ill = True


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize("calls", [1, 10])
@pytest.mark.parametrize("how", [reset, hang])
async def test_a_pool_of_dead_connections_costs_a_call_one_request(
    raw: StartRaw, session: aiohttp.ClientSession | None, how: Serve, calls: int
) -> None:
    """After one failure the second attempt uses a new connection, and the old ones are dropped."""
    pool = Pool(how)
    server = await raw(pool.serve)
    settings: dict[str, Any] = {"session": session, "retry": AT_ONCE, "attempt_timeout": 0.3}
    async with AudiencesClient("key", base_url=server.base_url, **settings) as client:
        await pool.fill(client.get_audiences)
        await asyncio.gather(*map(client.get_audiences, many(calls)))
        assert 30 + calls < server.requests <= 30 + 2 * calls
        asked = server.requests
        await asyncio.wait_for(pool.all_ended.wait(), 2)
        for _ in range(3):
            await client.get_audiences()
    assert server.requests == asked + 3
    assert 30 < server.connections <= 30 + calls  # fewer, because timeouts reduce the requests in flight


async def test_a_call_that_times_out_on_a_dead_connection_is_the_only_one(
    raw: StartRaw, session: aiohttp.ClientSession | None
) -> None:
    """If the call has less time than an attempt, the call that meets a dead pool fails, and the next does not."""
    pool = Pool(hang)
    server = await raw(pool.serve)
    async with AudiencesClient("key", base_url=server.base_url, session=session) as client:
        await pool.fill(client.get_audiences)
        assert isinstance(await error_of(client, timeout=0.1), DeadlineExceededError)
        assert len(await client.get_audiences(timeout=2.0)) == 0
        await asyncio.wait_for(pool.all_ended.wait(), 2)
    assert (server.connections, server.requests) == (31, 30 + 2)


@pytest.mark.parametrize("how", [reset, hang])
async def test_dead_connections_that_the_caller_has_used_itself(raw: StartRaw, how: Serve) -> None:
    """Handle idle connections the same if a caller's session opened them for the caller's own requests."""
    pool = Pool(how)
    server = await raw(pool.serve)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:

        async def get(_: Account) -> None:
            async with session.get(server.base_url) as response:
                await response.read()

        await pool.fill(get)
        settings: dict[str, Any] = {"session": session, "retry": AT_ONCE, "attempt_timeout": 0.3}
        async with AudiencesClient("key", base_url=server.base_url, **settings) as client:
            await client.get_audiences()
    assert (server.connections, server.requests) == (31, 30 + 2)


# --- one name with several addresses


@define
class Names:
    """The addresses of ``service.test``; a look-up waits until the gate is open."""

    addresses: list[str] = field(factory=list[str])
    look_ups: int = 0
    gate: asyncio.Event = field(factory=asyncio.Event)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Return the addresses of a name."""
    names = Names()
    names.gate.set()

    async def getaddrinfo(loop: object, host: str, port: int, **named: Any) -> list[Any]:
        assert host == "service.test"
        names.look_ups += 1
        await names.gate.wait()
        if not names.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names.addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return names


@pytest.fixture
def raw_at(raw: StartRaw, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[tuple[RawServer, int]]]:
    """Yield a function that starts raw servers at chosen addresses, with TLS if there is a context."""
    begin = asyncio.start_server

    async def start(
        serve: Serve, address: str, port: int = 0, ssl: tls.SSLContext | None = None
    ) -> tuple[RawServer, int]:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "start_server", lambda handle, *_: begin(handle, address, port, ssl=ssl))
            server = await raw(serve)
        return server, int(server.base_url.split(":")[2].strip("/"))

    return start


def tls_contexts(name: str) -> tuple[tls.SSLContext, tls.SSLContext]:
    """Return a client's and a server's context for a certificate of this name."""
    ca, ours, theirs = trustme.CA(), tls.create_default_context(), tls.create_default_context(tls.Purpose.CLIENT_AUTH)
    ca.configure_trust(ours)
    ca.issue_cert(name).configure_cert(theirs)
    return ours, theirs


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("dead", [[hang], [reset], [hang, hang], [reset, hang]])
async def test_a_retry_starts_at_another_address(raw_at: Any, names: Names, scheme: str, dead: list[Serve]) -> None:
    """If the first addresses of a name accept and hang, or reset, each attempt uses the next one."""
    ours, theirs = tls_contexts("service.test") if scheme == "https" else (None, None)
    names.addresses = [f"127.0.0.{number}" for number in range(2, 3 + len(dead))]
    port = 0
    for serve, address in zip(dead, names.addresses, strict=False):
        _, port = await raw_at(serve, address, port)  # without TLS: the hello never ends
    server, _ = await raw_at(answer_all, names.addresses[-1], port, theirs)
    retry = RetryPolicy(max_attempts=len(dead) + 1, base_delay=0)
    settings: dict[str, Any] = {"allow_http": True, "attempt_timeout": 0.3, "retry": retry}
    async with AudiencesClient("key", base_url=f"{scheme}://service.test:{port}/", ssl=ours, **settings) as client:
        assert len(await client.get_audiences()) == 0
    assert server.requests == 1


@contextlib.asynccontextmanager
async def calls_that_look_up(
    raw: StartRaw, names: Names, count: int
) -> AsyncIterator[tuple[AudiencesClient, list["asyncio.Task[Any]"]]]:
    """Yield a new client with calls that all wait for the look-up of its name."""
    server = await raw(answer_all)
    names.addresses, names.look_ups = ["127.0.0.1"], 0
    names.gate.clear()
    base_url = server.base_url.replace("127.0.0.1", "service.test")
    async with AudiencesClient("key", base_url=base_url, allow_http=True, retry=ONCE) as client:
        calls = [asyncio.create_task(client.get_audiences(account)) for account in many(count)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert names.look_ups
        yield client, calls


async def test_calls_at_once_share_a_look_up(raw: StartRaw, names: Names) -> None:
    """Look a name up at most twice for a hundred calls to it on a new client."""
    async with calls_that_look_up(raw, names, 100) as (_, calls):
        names.gate.set()
        await asyncio.gather(*calls)
    assert names.look_ups <= 2


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_cancelled_caller_leaves_no_look_up_behind(raw: StartRaw, names: Names, count: int) -> None:
    """Callers that are cancelled leave no task behind, and those that still wait are answered."""
    async with calls_that_look_up(raw, names, 3) as (_, calls):
        for call in calls[:count]:
            call.cancel()
        await asyncio.wait(calls[:count])
        assert asyncio.all_tasks() == {asyncio.current_task(), *calls[count:]}
        names.gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [n < count for n in range(3)]


async def test_a_look_up_that_fails_fails_for_those_who_wait(raw: StartRaw, names: Names) -> None:
    """Raise each call's own error with the name; the next call looks the name up again."""
    async with calls_that_look_up(raw, names, 10) as (client, calls):
        names.addresses = []
        names.gate.set()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, ConnectionFailedError) and "service.test" in str(error) for error in errors)
        assert (len(set(map(id, errors))), names.look_ups <= 2) == (10, True)
        names.addresses = ["127.0.0.1"]
        assert len(await client.get_audiences()) == 0


# --- a server that asks for a client certificate


@pytest.mark.parametrize("version", [tls.TLSVersion.TLSv1_2, tls.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("certificate", "reasons"),
    [
        ("missing", ["CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE"]),  # of TLS 1.3, and of TLS 1.2
        ("foreign", ["UNKNOWN_CA"]),
        ("expired", ["CERTIFICATE_EXPIRED"]),
    ],
)
@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
async def test_a_refused_client_certificate_is_final(
    raw: StartRaw, certificate: str, reasons: list[str], version: tls.TLSVersion, *, is_given: bool
) -> None:
    """End the call at its first attempt if the server refuses the client certificate, with OpenSSL's reason."""
    ours, theirs = tls_contexts("localhost")
    ca = trustme.CA()
    ca.configure_trust(theirs)
    theirs.verify_mode, theirs.maximum_version = tls.CERT_REQUIRED, version
    if certificate != "missing":
        issuer = ca if certificate == "expired" else trustme.CA()
        ends = datetime(2001, 1, 1, tzinfo=UTC) if certificate == "expired" else None
        issuer.issue_cert("client.test", not_after=ends).configure_cert(ours)

    async def serve(connection: RawConnection) -> None:  # asyncio's own TLS servers send no alerts
        incoming, outgoing = tls.MemoryBIO(), tls.MemoryBIO()
        peer = theirs.wrap_bio(incoming, outgoing, server_side=True)
        while sent := await connection.reader.read(1 << 16):
            incoming.write(sent)
            with contextlib.suppress(tls.SSLError):
                peer.do_handshake()
            await connection.send(outgoing.read())

    server = await raw(serve)
    base_url = server.base_url.replace("http://127.0.0.1", "https://localhost")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=ours)) as session:
        way: dict[str, Any] = {"session": session} if is_given else {"ssl": ours}
        async with AudiencesClient("key", base_url=base_url, retry=AT_ONCE, **way) as client:
            error = await error_of(client)
    assert isinstance(error, ConnectionFailedError)
    assert any(reason in str(error) for reason in reasons), str(error)
    assert (error.transient, error.stop_reason, len(error.attempts)) == (False, "final", 1)
    assert server.connections == 1


# --- what hung

PHASES = {"looking up the name", "connecting", "TLS handshake", "waiting for the reply", "reading the body"}


@pytest.fixture
def full_port() -> Iterator[int]:
    """Yield the port of a socket that has no room for another connection."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


@pytest.mark.parametrize("phase", sorted(PHASES))
@pytest.mark.parametrize("kind", [AttemptTimeoutError, DeadlineExceededError])
async def test_a_timeout_names_what_hung(
    raw: StartRaw, names: Names, full_port: int, phase: str, kind: type[AudiencesError]
) -> None:
    """Name the phase of an attempt, or of a whole call, that timed out, and no other; the service is to blame."""

    async def serve(connection: RawConnection) -> None:
        if phase == "reading the body":
            await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        await hang(connection)

    base_url = (await raw(serve)).base_url
    if phase == "looking up the name":
        names.gate.clear()
        base_url = base_url.replace("127.0.0.1", "service.test")
    elif phase == "connecting":
        base_url = f"http://127.0.0.1:{full_port}/"
    elif phase == "TLS handshake":
        base_url = base_url.replace("http:", "https:")
    limit: dict[str, Any] = {"attempt_timeout" if kind is AttemptTimeoutError else "timeout": 0.15}
    async with AudiencesClient("key", base_url=base_url, allow_http=True, retry=ONCE, **limit) as client:
        error = await error_of(client)
    assert type(error) is kind
    assert {named for named in PHASES if named in str(error)} == {phase}
    assert (error.gateway_status, error.retry_after) == (504, None)


@pytest.mark.parametrize("cache", [None, CachePolicy(ttl=1.0)], ids=["without a cache", "with one"])
async def test_a_timeout_names_the_key_function(cache: CachePolicy | None) -> None:
    """Name the key function if it hangs: nothing was sent, and no turn is awaited."""

    async def key() -> str:
        await asyncio.sleep(60)
        raise AssertionError

    async with AudiencesClient(base_url="http://127.0.0.1:9/", timeout=0.05, cache=cache) as client:
        error = await error_of(client, account=Account("north", key))
    assert isinstance(error, DeadlineExceededError)
    assert error.message == "no answer within timeout=0.05 s, waiting for the API key function"
    assert (error.gateway_status, error.retry_after, error.attempts) == (504, None, ())


@pytest.mark.parametrize("cache", [None, CachePolicy(ttl=1.0)], ids=["without a cache", "with one"])
async def test_a_timeout_names_the_turn(raw: StartRaw, cache: CachePolicy | None) -> None:
    """Name the turn if it is late, which is a 429 with a time and no 504."""

    async def serve(connection: RawConnection) -> None:
        await hang(connection)

    limit = SlowLimiter()
    base_url = (await raw(serve)).base_url
    async with AudiencesClient("key", base_url=base_url, rate_limit=limit, timeout=0.05, cache=cache) as client:
        error = await error_of(client)
    assert isinstance(error, DeadlineExceededError)
    assert error.message == "no answer within timeout=0.05 s, waiting for its turn"
    assert (error.gateway_status, error.gateway_headers, error.attempts) == (429, {"Retry-After": "1"}, ())


class SlowLimiter:
    """A limiter whose turns never come."""

    async def acquire(self, account_name: str) -> None:
        """Wait for ever."""
        await asyncio.Event().wait()


# --- a quota that a reply says is used up


@pytest.mark.parametrize(
    "headers",
    [
        {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "3600"},
        {"RateLimit-Remaining": "0", "RateLimit-Reset": "3600"},
        {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "4600"},  # seconds since 1970: in an hour
        {"X-Rate-Limit-Remaining": "0", "X-Rate-Limit-Reset": "1970-01-01T01:16:40.0000000Z"},  # the same
        {"RateLimit": '"day";r=0;t=3600'},
    ],
)
@pytest.mark.parametrize("status", [200, 404])
async def test_a_quota_used_up_does_not_close_the_account(
    sandbox: Sandbox, north: Account, time: SteppedTime, headers: dict[str, str], status: int
) -> None:
    """Delay the next call for 30 s at most if a response other than a 429 announces a long wait."""
    sandbox.script("north", *[Answer(status, headers={**headers, "Date": ""})] * 2)
    async with AudiencesClient(base_url=sandbox.base_url, clock=time.clock) as client:
        for _ in range(2):
            with contextlib.suppress(StatusError):
                await client.get_audiences(north)
        assert 0 < time.now - 1000 <= 30
        assert len(await client.get_audiences(north)) == 2
    assert (len(sandbox.requests), time.now - 1000 <= 60) == (3, True)


@pytest.mark.parametrize("headers", [{"Retry-After": "45"}, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "45"}])
async def test_a_429_keeps_its_full_wait(
    sandbox: Sandbox, north: Account, time: SteppedTime, headers: dict[str, str]
) -> None:
    """Keep the wait that a 429 asks for in full, above max_delay too."""
    sandbox.script("north", Answer(429, headers=headers))
    async with AudiencesClient(base_url=sandbox.base_url, clock=time.clock) as client:
        assert len(await client.get_audiences(north)) == 2
    assert time.now - 1000 >= 45
