"""Cancelling and closing, in every state of a call: immediate, with no further request and nothing left behind.

The module has four parts: one call held in a known state, many calls cancelled at random moments, other loops and
processes, and a search for blocking calls. Only the first needs an explanation.

**What a scene is.** A call passes through about twenty states: it waits for its key, for its turn, for a connection,
for the body, and so on. A `Scene` is one client with one call that is stuck in one of these states. The scene
provides both what the call waits for and the way out of it:

- a server that answers every request with the same bytes, or with none (`serve`);
- callbacks that do not return: `key`, `acquire` (a limiter) and `sleep` (the clock);
- a name server, a TLS handshake and a full backlog that do not answer (`resolve_slowly`, `handshake`, `fill_backlog`).

The client's clock moves only once the scene is healed. The server has no tasks: any task that is left is the
client's.

**How a test uses it.** `STATES[state](scene)` brings the call into the state. The test then cancels the call or
closes the client, and counts the turns of the event loop until it has ended. `scene.heal()` releases everything that
is held, and `scene.sound()` checks that the next call is answered. At the end, no task, no socket and no queued call
is left. The fixture runs each state with the client's own session, and again with a session of the caller.

**How a state is recognized.** `scene.call("Queue.wait")` starts a call and returns when it waits in the function of
this qualified name. `awaited` lists these names for any task; print it to find the right one. If a function is
renamed, the scenes that wait in it fail with a timeout, and only the name has to be changed.

**How to add a state.** Write a function of four lines, and add it to `STATES` under a name that completes "a call
that is cancelled while it is ...":

    async def _headers(scene: Scene) -> None:
        scene.open()  # the client, with the settings that the state needs
        await scene.serve()  # what holds the call: here, a server that sends nothing
        await scene.call("ClientResponse.start")  # the call, and the function that it waits in
        await in_time(lambda: scene.requests)  # if that is not yet the state: what must have happened

Both tests of every state then include it. If the call waits for another call, start that one first: the last call is
cancelled before the others.
"""

import asyncio
import gc
import gzip
import json
import random
import re
import socket
import ssl as tls
import stat
import subprocess
import sys
import textwrap
import time as blocking
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Final

import aiohttp
import pytest
import trustme
from attrs import Factory, define, field
from blockbuster import BlockingError, blockbuster_ctx

from audiences_async import (
    Account,
    AudiencesClient,
    AudiencesError,
    AudiencesResponse,
    CachePolicy,
    ClientClosedError,
    ConnectionFailedError,
    DeadlineExceededError,
    Event,
    Fetched,
    RateLimit,
    RetryPolicy,
    TransportError,
)
from audiences_async.clock import Clock
from audiences_async.events import AttemptFinished, CallFinished
from audiences_async.sandbox import Answer, Sandbox, many_audiences
from audiences_async.sandbox.thread import all_accepted

SEED: Final = 20261125
AT_ONCE: Final = 0.05  # s, in which a cancelled call must end
A_FEW_TURNS: Final = 10  # turns of the event loop, which never waits in them
HANGS: Final = Answer(delay=30.0)
CONNECTIONS: Final = 4  # of a client under load; fewer than its calls, so that they queue


# --- what is left behind


def others() -> set["asyncio.Task[Any]"]:
    """Return all tasks but the test's own."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


def all_done(tasks: Iterable["asyncio.Task[Any]"]) -> bool:
    """Return whether every task has ended."""
    return all(task.done() for task in tasks)


def busy(client: AudiencesClient) -> int:
    """Return the number of calls that wait for a turn or have one."""
    return sum(pace.waiting + pace.in_flight for pace in client.snapshot().accounts)


def open_sockets() -> set[int]:
    """Return the inodes of this process's sockets."""
    inodes = set()
    for path in Path("/dev/fd").iterdir():
        with suppress(OSError):  # the listing's own
            known = path.stat()
            if stat.S_ISSOCK(known.st_mode):
                inodes.add(known.st_ino)
    return inodes


async def turns(reached: Callable[[], object], most: int) -> int:
    """Count the turns of the event loop until *reached* is true; the loop never waits in them."""
    for number in range(most + 1):
        if reached():
            return number
        await asyncio.sleep(0)
    raise AssertionError(f"not within {most} turns of the event loop; tasks: {others()}")


async def in_time(reached: Callable[[], object], *, seconds: float = 5.0) -> None:
    """Let other tasks run until *reached* is true."""
    async with asyncio.timeout(seconds):
        while not reached():  # noqa: ASYNC110 - no event is set inside a call
            await asyncio.sleep(0)


async def none_left(sockets: set[int]) -> None:
    """Check that no socket is left beyond these; they close in the loop's and the server's next turns."""
    await in_time(lambda: not open_sockets() - sockets, seconds=1.0)


def awaited(task: "asyncio.Task[Any]") -> list[str]:
    """Return the names of the functions that a task waits in, the outermost first."""
    names: list[str] = []
    at: Any = task.get_coro()
    while at is not None:
        code = getattr(at, "cr_code", None) or getattr(at, "gi_code", None)
        if code is None:  # the result of a coroutine's `__await__` does not expose the coroutine
            at = next((held for held in gc.get_referents(at) if hasattr(held, "cr_code")), None)
        else:
            names.append(code.co_qualname)
            at = getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None)
    return names


# --- one call, held in a state


def reply(status: bytes, body: bytes, *headers: bytes) -> bytes:
    """Return the bytes of a response."""
    return b"\r\n".join([b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers, b"", body])


def answer_of(*ids: str, padding: int = 0) -> bytes:
    """Return the body of a 200 with these ids, each record longer by *padding* characters."""
    common = {"name": "", "created_time": "2025-10-01T09:10:00Z", "type": "Dynamic", "padding": "x" * padding}
    return json.dumps({"status": "200", "data": [{"id": each, **common} for each in ids]}).encode()


HEALED: Final = reply(b"200 OK", answer_of("healed"))
HALF: Final = -10  # missing bytes


@define(eq=False)
class Scene:
    """A call held in some state, by a server without tasks or by a function that the client calls.

    `heal` releases it: from then on the client can be served properly.
    """

    own_session: bool
    monkeypatch: pytest.MonkeyPatch
    listener: socket.socket
    calls: list["asyncio.Task[AudiencesResponse]"] = field(factory=list)
    requests: int = 0
    _now: float = 1000.0
    _host: str = "127.0.0.1"
    _healed: asyncio.Event = field(factory=asyncio.Event)
    _reply: bytes = b""
    _tls: tls.SSLContext | None = None
    _server: asyncio.Server | None = None
    _client: AudiencesClient | None = None
    _session: aiohttp.ClientSession | None = None
    _fillers: list[socket.socket] = field(factory=list)
    _transports: list[asyncio.WriteTransport] = field(factory=list)

    # the client and its calls

    @property
    def client(self) -> AudiencesClient:
        """Return the client, once it is open."""
        assert self._client is not None
        return self._client

    def open(self, *, connections: int | None = None, ssl: tls.SSLContext | None = None, **settings: Any) -> None:
        """Create the client, on its own session or on a caller's."""
        if self.own_session:
            settings |= {"max_connections": connections, "ssl": ssl}
        else:
            connector = aiohttp.TCPConnector(limit=connections or 100, ssl=ssl or True)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
            settings["session"] = self._session
        port = self.listener.getsockname()[1]
        url = f"http{'s' if ssl else ''}://{self._host}:{port}/"
        clock = Clock(monotonic=lambda: self._now, wall=lambda: self._now, sleep=self.sleep, random=lambda: 1.0)
        self._client = AudiencesClient(base_url=url, timeout=5000.0, clock=clock, **settings)

    async def call(self, waits_in: str = "", account: Account | None = None) -> None:
        """Start a call, and let it run until it waits in the named function; it does not run if the name is empty."""
        call = asyncio.create_task(self.client.get_audiences(account or Account("north", "key")))
        self.calls.append(call)
        if waits_in:
            await in_time(lambda: waits_in in awaited(call))

    async def sound(self) -> None:
        """Check that the next call is answered properly."""
        response = await self.client.get_audiences(Account("next", "key"), timeout=4000.0)
        assert [audience.id for audience in response] == ["healed"]

    # what holds

    async def serve(self, reply: bytes = b"") -> None:
        """Accept connections, and answer every request with *reply*."""
        self._reply = reply
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(lambda: _Peer(self), sock=self.listener, ssl=self._tls)

    async def hold(self) -> None:
        """Wait until the scene is healed."""
        await self._healed.wait()

    async def key(self) -> str:
        """Return the key once the scene is healed."""
        await self.hold()
        return "key"

    async def acquire(self, account_name: str) -> None:
        """Let a request pass once the scene is healed."""
        await self.hold()

    async def sleep(self, seconds: float) -> None:
        """Advance the time once the scene is healed."""
        if seconds:
            await self.hold()
            self._now += seconds

    def resolve_slowly(self) -> None:
        """Let a name server that does not answer resolve names."""
        self._host = "localhost"

        async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
            await self.hold()
            return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]

        self.monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)

    def fill_backlog(self) -> None:
        """Fill the kernel's backlog; how it then treats a new connection is specific to Linux."""
        self.listener.listen(0)
        filler = socket.create_connection(self.listener.getsockname())
        self._fillers.append(filler)

    def handshake(self) -> tls.SSLContext:
        """Return a context that trusts the server, which is silent before it is healed."""
        authority = trustme.CA()
        self._tls = tls.SSLContext(tls.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self._tls)
        trusting = tls.create_default_context()
        authority.configure_trust(trusting)
        self.listener.listen(10)
        return trusting

    async def heal(self) -> None:
        """Release everything that is held."""
        self._healed.set()
        for filler in self._fillers:
            filler.close()
        await self.serve(HEALED)

    async def close(self) -> None:
        """Close the client, and then the caller's session, which is still open."""
        await self.client.aclose()
        if self._session is not None:
            assert not self._session.closed
            await self._session.close()

    async def leave(self) -> None:
        """Release and close everything, after a failed test too."""
        await self.heal()
        assert self._server is not None
        if self._client is not None:
            await self._client.aclose()
        if self._session is not None:
            await self._session.close()
        await all_accepted()
        self._server.close()
        for transport in self._transports:
            transport.abort()
        await asyncio.sleep(0)  # the event loop closes sockets in its next turn


class _Peer(asyncio.Protocol):
    """A peer that sends the same bytes to each request."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._scene._transports.append(transport)

    def data_received(self, data: bytes) -> None:
        *heads, self._heard = (self._heard + data).split(b"\r\n\r\n")
        self._scene.requests += len(heads)
        self._transport.write(self._scene._reply * len(heads))


async def _not_begun(scene: Scene) -> None:
    scene.open()
    await scene.call()


async def _key(scene: Scene) -> None:
    scene.open()
    await scene.call("Scene.key", Account("north", scene.key))


async def _key_of_another_call(scene: Scene) -> None:
    account = Account("north", scene.key)
    scene.open()
    await scene.call("Scene.key", account)
    await scene.call("Lock.acquire", account)


async def _fresh_key(scene: Scene) -> None:
    asked: list[int] = []

    async def key() -> str:
        asked.append(1)
        return "old" if len(asked) == 1 else await scene.key()

    scene.open()
    await scene.serve(reply(b"401 Unauthorized", b""))
    await scene.call("Scene.key", Account("north", key))


async def _slots(scene: Scene) -> None:
    scene.open(connections=1)
    await scene.serve()
    await scene.call("ClientResponse.start", Account("south", "key"))
    await scene.call("Queue.wait")


async def _window(scene: Scene) -> None:
    scene.open()
    await scene.serve()
    for _ in range(2):  # the initial number of requests in flight of an unknown account
        await scene.call("ClientResponse.start")
    await scene.call("Queue.wait")


async def _rate(scene: Scene) -> None:
    scene.open(rate_limit=RateLimit(0.001))
    await scene.serve()
    await scene.call("ClientResponse.start")
    await scene.call("Queue.wait")


async def _pause(scene: Scene) -> None:
    scene.open()
    await scene.serve(reply(b"429 Too Many", b"", b"Retry-After: 60"))
    await scene.call("Scene.sleep")
    await scene.call("Queue.wait")


async def _limiter(scene: Scene) -> None:
    scene.open(rate_limit=scene)
    await scene.call("Queue.ask_limiter")


async def _resolving(scene: Scene) -> None:
    scene.resolve_slowly()
    scene.open()
    await scene.call("TCPConnector._resolve_host")


async def _connecting(scene: Scene) -> None:
    scene.fill_backlog()
    scene.open()
    await scene.call("BaseSelectorEventLoop.sock_connect")


async def _handshake(scene: Scene) -> None:
    scene.open(ssl=scene.handshake())
    await scene.call("BaseEventLoop._create_connection_transport")
    await in_time(lambda: scene.client.snapshot().accounts[0].in_flight == 1)


async def _headers(scene: Scene) -> None:
    scene.open()
    await scene.serve()
    await scene.call("ClientResponse.start")
    await in_time(lambda: scene.requests)


async def _body(scene: Scene) -> None:
    scene.open()
    await scene.serve(HEALED[:HALF])
    await scene.call("StreamReader.readany")


async def _packed_body(scene: Scene) -> None:
    scene.open()
    packed = reply(b"200 OK", gzip.compress(answer_of("a")), b"Content-Encoding: gzip")
    await scene.serve(packed[:HALF])
    await scene.call("StreamReader.readany")


async def _error_body(scene: Scene) -> None:
    scene.open()
    await scene.serve(reply(b"404 Not Found", b"x" * 100)[:HALF])
    await scene.call("StreamReader.readany")


async def _decoding(scene: Scene) -> None:
    scene.open()
    await scene.serve(reply(b"200 OK", answer_of(*map(str, range(2000)), padding=1000)))
    await scene.call("_in_turns")


async def _anothers_request(scene: Scene) -> None:
    scene.open(cache=CachePolicy(ttl=0))
    await scene.serve()
    await scene.call("wait")
    await in_time(lambda: scene.requests)
    await scene.call("wait")


async def _backoff(scene: Scene) -> None:
    scene.open()
    await scene.serve(reply(b"500 Error", b""))
    await scene.call("Scene.sleep")


STATES: Final[dict[str, Callable[[Scene], Awaitable[None]]]] = {
    "not begun": _not_begun,
    "waiting for the key function": _key,
    "waiting for another call to get the key": _key_of_another_call,
    "waiting for a fresh key after a 401": _fresh_key,
    "queueing for a connection": _slots,
    "queueing for a reply to others of the account": _window,
    "queueing at a known rate": _rate,
    "queueing in a pause after a 429": _pause,
    "waiting for a limiter": _limiter,
    "resolving": _resolving,
    "connecting": _connecting,
    "in the TLS handshake": _handshake,
    "waiting for the headers": _headers,
    "reading the body": _body,
    "reading a packed body": _packed_body,
    "reading the body of an error": _error_body,
    "decoding, a piece at a time": _decoding,
    "waiting to try again": _backoff,
    "sharing another call's request": _anothers_request,
}

IN_EVERY_STATE: Final = pytest.mark.parametrize(
    ("scene", "state"),
    # A caller's session does its own look-ups: other requests of its owner may wait for the same one.
    [*(("own", state) for state in STATES), *(("given", state) for state in STATES if state != "resolving")],
    indirect=["scene"],
)


@pytest.fixture
async def scene(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    """Yield a scene whose client has its "own" session, or a "given" one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        scene = Scene(request.param == "own", monkeypatch, listener)
        yield scene
        await scene.leave()


@IN_EVERY_STATE
async def test_a_call_is_cancelled_at_once_in_every_state(scene: Scene, state: str) -> None:
    """End a cancelled call within a few turns: it sends nothing more, leaves nothing, disturbs no other call."""
    sockets = open_sockets()
    await STATES[state](scene)
    client, requests, call = scene.client, scene.requests, scene.calls[-1]
    for ended in (call, *scene.calls[:-1]):  # then those that stood in its way
        started = thread_time()  # the loop never waits, so the machine's load does not matter
        assert ended.cancel()
        await turns(ended.done, A_FEW_TURNS)
        assert thread_time() - started <= AT_ONCE
        assert ended.cancelled()
    await turns(lambda: not others(), A_FEW_TURNS)
    assert busy(client) == 0
    await scene.heal()
    await scene.sound()
    assert scene.requests == requests + 1
    await scene.close()
    await none_left(sockets)


@IN_EVERY_STATE
async def test_closing_ends_calls_in_every_state(scene: Scene, state: str) -> None:
    """Calls in flight when the client is closed end with ClientClosedError, and so does every later call."""
    sockets = open_sockets()
    await STATES[state](scene)
    client, requests = scene.client, scene.requests
    async with asyncio.timeout(1.0):
        await asyncio.gather(client.aclose(), client.aclose())
    for call in scene.calls:
        with pytest.raises(ClientClosedError):
            await call
    assert busy(client) == 0
    await turns(lambda: not others(), A_FEW_TURNS)
    await scene.heal()
    for attempt in (client.get_audiences(Account("next", "key")), client.fetch_all([Account("next", "key")])):
        with pytest.raises(ClientClosedError, match="the client is closed"):
            await attempt
    assert scene.requests == requests
    await scene.close()
    await none_left(sockets)


@pytest.mark.parametrize("scene", ["own"], indirect=True)
async def test_a_cancelled_close_closes_all_the_same(scene: Scene) -> None:
    """If aclose() is cancelled while a call holds on, the client is closed, and the call ends with it."""
    ended = asyncio.Event()

    async def key() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            await ended.wait()
        raise AssertionError

    sockets = open_sockets()
    scene.open()
    await scene.serve()
    await scene.call("ClientResponse.start")
    await scene.call(key.__qualname__, Account("south", key))
    first, second = scene.calls
    closing = asyncio.create_task(scene.client.aclose())
    await in_time(first.done)
    assert not closing.done()
    closing.cancel()
    await turns(closing.done, A_FEW_TURNS)
    assert closing.cancelled()
    ended.set()
    for call in (first, second):
        with pytest.raises(ClientClosedError):
            await call
    await scene.close()
    await none_left(sockets)


@pytest.mark.parametrize("scene", ["own", "given"], indirect=True)
async def test_a_key_function_that_closes_the_client_costs_its_caller_nothing(scene: Scene) -> None:
    """If a key function closes the client and fails, the call fails; its task is not cancelled afterwards."""

    async def key() -> str:
        await scene.client.aclose()
        raise OSError("the vault is gone")

    scene.open()
    with pytest.raises(AudiencesError):
        await scene.client.get_audiences(Account("north", key))
    await asyncio.sleep(0)  # a leftover cancellation would be raised here
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


# --- random moments under load


@define
class Steps:
    """Time that advances when a task sleeps, and sleeps that take some turns of the event loop."""

    chance: random.Random
    now: float = 1000.0

    @property
    def clock(self) -> Clock:
        """Return a clock of this time."""
        return Clock(lambda: self.now, lambda: self.now, self.sleep, self.chance.random)

    async def sleep(self, seconds: float) -> None:
        """Take some turns of the event loop, then advance the time."""
        until = self.now + seconds
        for _ in range(self.chance.randint(1, 30)):
            await asyncio.sleep(0)
        self.now = max(self.now, until)


@define(eq=False)
class Told:
    """Events of a client by account, and those of cancelled calls."""

    attempts: Counter[str] = field(factory=Counter)
    cancelled: set["asyncio.Task[Any]"] = field(factory=set)
    late: defaultdict[Any, list[Event]] = Factory(lambda: defaultdict(list))

    def __call__(self, event: Event) -> None:
        """Count an attempt; keep what a cancelled call still emits."""
        self.attempts[event.account] += isinstance(event, AttemptFinished)
        task = asyncio.current_task()
        if task in self.cancelled:
            self.late[task].append(event)


@define(eq=False)
class Load:
    """A client under load: accounts that together meet every state, and a record of what they sent."""

    sandbox: Sandbox
    number: int
    slow: Answer
    chance: random.Random = Factory(lambda self: random.Random(SEED + self.number), takes_self=True)
    told: Told = field(factory=Told)
    client: AudiencesClient = Factory(lambda self: self._client(), takes_self=True)
    accounts: list[Account] = Factory(lambda self: self._accounts(), takes_self=True)

    def _client(self) -> AudiencesClient:
        return AudiencesClient(
            base_url=self.sandbox.base_url,
            timeout=10_000.0,
            budget=None,
            max_connections=CONNECTIONS,
            on_event=self.told,
            clock=Steps(self.chance).clock,
        )

    def account(self, kind: str, *script: Answer) -> Account:
        """Open an account for this load, whose audiences carry its name."""
        name = f"{kind}-{self.number}"
        account = self.sandbox.add_account(name, audiences=many_audiences(name, 3))
        self.sandbox.script(name, *script)
        return account

    def _accounts(self) -> list[Account]:
        paced = self.account("paced", Answer(429), Answer(200), Answer(429))
        accounts = [
            paced, paced, paced, paced,
            self.account("asked", Answer(429, retry_after=2), Answer(429, retry_after=0.5)),
            self.account("slow", self.slow),
            self.account("failing", Answer(500), Answer(503, b""), Answer(500)),
            self.account("reset", Answer(failure="reset"), Answer(failure="reset")),
            self.account("halved", Answer(failure="reset-in-body"), Answer(failure="cut-body")),
            self.account("large", Answer(200, LARGE)), self.account("larger", Answer(500), Answer(200, LARGE)),
            self.account("packed", Answer(200, PACKED, headers={"Content-Encoding": "gzip"})),
            self._keyed("keyed"), self._keyed("rekeyed", Answer(401)),
        ]  # fmt: skip
        self.chance.shuffle(accounts)
        return accounts

    def _keyed(self, kind: str, *script: Answer) -> Account:
        account = self.account(kind, *script)

        async def key() -> str:
            for _ in range(self.chance.randint(1, 30)):
                await asyncio.sleep(0)
            return str(account.api_key)

        return Account(account.name, key)

    async def moment(self) -> None:
        """Let the load run for a while: some requests, and some turns of the event loop."""
        requests = len(self.sandbox.requests) + self.chance.randint(0, self.chance.randint(0, 10))
        with suppress(TimeoutError):  # fewer requests arrive while the whole service is paused
            await in_time(lambda: len(self.sandbox.requests) >= requests, seconds=0.5)
        for _ in range(self.chance.randint(0, 60)):
            await asyncio.sleep(0)

    def on_the_wire(self) -> Counter[str]:
        """Return the requests of each account that may have been sent by now."""
        in_flight = Counter({pace.account: pace.in_flight for pace in self.client.snapshot().accounts})
        return self.told.attempts + in_flight

    async def all_is_free(self) -> None:
        """Check that as many calls as there are connections are answered properly, and that no turn is lost."""
        accounts = [self.account(f"next{number}") for number in range(CONNECTIONS)]
        calls = [asyncio.create_task(self.client.get_audiences(account)) for account in accounts]
        await turns(lambda: busy(self.client) == CONNECTIONS, 1)
        for account, call in zip(accounts, calls, strict=True):
            right(account, await call)
        service = self.client.snapshot().service
        assert service is not None
        assert (service.in_flight, service.waiting, busy(self.client)) == (0, 0, 0)


LARGE: Final = json.dumps(
    {"status": "200", "data": [{**each, "name": "x" * 2000} for each in many_audiences("large", 300)]}
).encode()
PACKED: Final = gzip.compress(b'{"status": "200", "data": [' + b" " * 2**20 + b"]}")


def right(account: Account, response: AudiencesResponse) -> None:
    """Check that the response is complete, and this account's."""
    kind = account.name.partition("-")[0]
    if kind.startswith("large"):
        assert [audience.id for audience in response] == [f"large-{n}" for n in range(300)]
    elif kind == "packed":
        assert len(response) == 0
    else:
        assert [audience.id for audience in response] == [f"{account.name}-{n}" for n in range(3)]


KINDS_OF_WAITING: Final = {
    "key": {"Load._keyed.<locals>.key"},
    "turn": {"Queue.wait"},
    "connecting": {"BaseSelectorEventLoop.sock_connect", "BaseEventLoop._create_connection_transport"},
    "headers": {"ClientResponse.start"},
    "body": {"StreamReader.readany"},
    "decoding": {"_in_turns"},
    "backoff": {"Steps.sleep"},
}


def kind_of_waiting(task: "asyncio.Task[Any]") -> str:
    """Return what a task waits for, by the functions that it awaits."""
    functions = set(awaited(task))
    return next((kind for kind, of in KINDS_OF_WAITING.items() if functions & of), "elsewhere")


@pytest.fixture
async def complaints() -> AsyncIterator[list[dict[str, Any]]]:
    """Collect the event loop's exception reports; there must be none at the end of the test."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    yield complaints
    gc.collect()
    assert complaints == []


def only_what_was_told(sandbox: Sandbox, told: Counter[str], numbers: range) -> None:
    """Check that no load with one of these numbers sent more requests; probes may be of others."""
    names = [str(request.account) for request in sandbox.requests]
    sent = Counter(name.partition("-")[2] for name in names if not name.startswith("next"))
    expected: Counter[str] = Counter()
    for name, count in told.items():
        expected[name.partition("-")[2]] += count
    known = {number: count for number, count in sent.items() if int(number) in numbers}
    assert known
    assert {number: count for number, count in known.items() if count > expected[number]} == {}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("complaints")
async def test_calls_are_cancelled_at_once_at_any_moment(sandbox: Sandbox) -> None:
    """Cancel all calls at 200 moments under load: at once, with no further request and nothing left behind."""
    met: Counter[str] = Counter()
    took: list[float] = []
    allowed: Counter[str] = Counter()
    for number in range(200):
        sockets = open_sockets()
        load = Load(sandbox, number, HANGS)
        calls = [asyncio.create_task(load.client.get_audiences(account)) for account in load.accounts]
        await load.moment()
        for call in calls:
            if not call.done():
                met[kind_of_waiting(call)] += 1
        allowed += load.on_the_wire()
        took.append(await cancelled(load, {call for call in calls if not call.done()}))
        await load.all_is_free()
        await load.client.aclose()
        await none_left(sockets)
        for (event,) in load.told.late.values():  # of each call its end only
            assert isinstance(event, CallFinished)
            assert event.error == "CancelledError"
    only_what_was_told(sandbox, allowed, range(200))
    assert set(KINDS_OF_WAITING) <= set(met), met
    assert sorted(took)[-3] <= AT_ONCE, "twice at most may the machine have been busy with others"


async def cancelled(load: Load, running: set["asyncio.Task[Any]"]) -> float:
    """Cancel these tasks, the only ones that run; return the seconds until the last has ended, with nothing left."""
    started = perf_counter()
    load.told.cancelled |= running
    for task in running:
        assert task.cancel()
    await turns(partial(all_done, running), A_FEW_TURNS)
    took = perf_counter() - started
    assert all(task.cancelled() for task in running)
    assert busy(load.client) == 0
    await turns(lambda: not others(), A_FEW_TURNS)
    return took


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("complaints")
async def test_cancelled_calls_do_not_hurt_the_others(sandbox: Sandbox) -> None:
    """Cancel a random half of the calls at 40 moments under load: every other one is answered properly."""
    for number in range(40):
        sockets = open_sockets()
        load = Load(sandbox, number, Answer(delay=0.01))
        calls = [asyncio.create_task(load.client.get_audiences(account)) for account in load.accounts]
        await load.moment()
        doomed = {call for call in calls if load.chance.random() < 0.5 and call.cancel()}
        await turns(partial(all_done, doomed), A_FEW_TURNS)
        assert all(call.cancelled() for call in doomed)
        async with asyncio.timeout(5.0):
            for account, call in zip(load.accounts, calls, strict=True):
                if call not in doomed:
                    right(account, await call)
        assert busy(load.client) == 0
        await turns(lambda: not others(), A_FEW_TURNS)
        await load.all_is_free()
        await load.client.aclose()
        await none_left(sockets)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("complaints")
async def test_jobs_are_cancelled_at_once_at_any_moment(sandbox: Sandbox) -> None:
    """Cancel a job, a stream or fetch_all, at 200 moments: it ends at once, and with all its calls."""
    took: list[float] = []
    allowed: Counter[str] = Counter()
    for number in range(200):
        sockets = open_sockets()
        load = Load(sandbox, number, HANGS)
        job = asyncio.create_task(
            streamed(load, allowed) if number % 2 else load.client.fetch_all(source(load), concurrency=8)
        )
        await load.moment()
        assert not job.done()
        took.append(await cancelled(load, {job}))
        await load.all_is_free()
        await load.client.aclose()
        await none_left(sockets)
    only_what_was_told(sandbox, allowed, range(1, 200, 2))  # from inside the streams
    assert sorted(took)[-3] <= AT_ONCE, "twice at most may the machine have been busy with others"


async def source(load: Load) -> AsyncIterator[Account]:
    """Yield the accounts, some of them after a turn of the event loop."""
    for account in load.accounts:
        if load.chance.random() < 0.3:
            await asyncio.sleep(0)
        yield account


async def streamed(load: Load, allowed: Counter[str]) -> None:
    """Run a job; return the requests that it may have sent when the cancellation arrives."""
    async with load.client.stream(source(load), concurrency=8) as outcomes:
        try:
            async for outcome in outcomes:
                assert isinstance(outcome, Fetched), outcome
                right(outcome.account, outcome.response)
        finally:
            allowed.update(load.on_the_wire())


@pytest.mark.parametrize("after", range(4))
async def test_a_job_that_is_cancelled_twice_leaves_no_task(sandbox: Sandbox, after: int) -> None:
    """Leave no task behind after a second cancellation, some turns after the first one."""
    load = Load(sandbox, after, HANGS)
    job = asyncio.create_task(streamed(load, Counter()))
    await asyncio.to_thread(sandbox.wait_for_requests, 5)
    job.cancel()
    for _ in range(after):
        await asyncio.sleep(0)
    job.cancel()
    await turns(job.done, A_FEW_TURNS)
    assert job.cancelled()
    await turns(lambda: not others(), A_FEW_TURNS)
    assert busy(load.client) == 0
    await load.all_is_free()
    await load.client.aclose()


@pytest.mark.slow
@pytest.mark.usefixtures("complaints")
async def test_a_client_is_closed_at_any_moment(sandbox: Sandbox) -> None:
    """Close the client at 40 moments under load: each call has its answer or ends with ClientClosedError."""
    told: Counter[str] = Counter()
    ended: Counter[type[BaseException] | None] = Counter()
    for number in range(40):
        sockets = open_sockets()
        load = Load(sandbox, number, HANGS)
        calls = [asyncio.create_task(load.client.get_audiences(account)) for account in load.accounts]
        await load.moment()
        async with asyncio.timeout(1.0):
            await asyncio.gather(load.client.aclose(), load.client.aclose())
        assert all(call.done() for call in calls)
        assert busy(load.client) == 0
        await turns(lambda: not others(), A_FEW_TURNS)
        await none_left(sockets)
        for account, call in zip(load.accounts, calls, strict=True):
            error = call.exception()
            ended[None if error is None else type(error)] += 1
            if error is None:
                right(account, call.result())
        told += load.told.attempts
    only_what_was_told(sandbox, told, range(40))
    assert set(ended) == {None, ClientClosedError}


# --- other loops, other processes, and the end of the interpreter

OTHER_LOOP: Final = "the client belongs to another event loop; make one client for each loop"

PREAMBLE: Final = """
import asyncio, os, signal, sys, threading
from audiences_async import Account, AudiencesClient, ClientClosedError
url = sys.argv[1]
north, slow = Account("north", "sandbox-key-north"), Account("slow", "sandbox-key-slow")
async def until_sent(client, count=1):
    while sum(pace.in_flight for pace in client.snapshot().accounts) < count:
        await asyncio.sleep(0)
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Yield the URL for the programs' calls, with an account that is answered, and one that never is."""
    with Sandbox() as sandbox:
        sandbox.add_account("north")
        sandbox.add_account("slow")
        sandbox.script("slow", *[HANGS] * 1000)
        yield sandbox.base_url


def run(url: str, program: str, *, code: int = 0) -> tuple[list[str], str]:
    """Run a program; return its lines, and its stderr with every warning shown or raised."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PREAMBLE + textwrap.dedent(program), url],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == code, done.stderr
    # The debug mode reports a slow turn of the loop from 0.1 s on, which depends on the machine.
    return done.stdout.splitlines(), re.sub(r"(?m)^Executing <.*> took [0-9.]+ seconds\n", "", done.stderr)


def only_others_warn(stderr: str) -> None:
    """Check that only aiohttp and asyncio warn of unclosed objects: no line of ours is in a traceback."""
    assert "Unclosed" in stderr
    heads = [line for line in stderr.splitlines() if not line.startswith((" ", "Traceback", "ResourceWarning"))]
    assert all(head.startswith("Exception ignored") for head in heads), stderr
    assert not re.search(r'File ".*audiences_async', stderr), stderr


@pytest.mark.slow
def test_a_loop_that_was_closed_before_the_client(url: str) -> None:
    """Raise for a call, a job and aclose() on another loop if the client's loop is closed; nothing hangs."""
    out, err = run(
        url,
        """
        client = AudiencesClient(base_url=url)
        asyncio.run(client.get_audiences(north))
        for use in (client.get_audiences(north), client.fetch_all([north]), client.aclose()):
            try:
                asyncio.run(use)
            except ClientClosedError as error:
                print(error)
        """,
    )
    assert out == [OTHER_LOOP] * 3
    only_others_warn(err)


async def test_a_client_used_from_another_thread(sandbox: Sandbox, north: Account) -> None:
    """Reject another thread's loop as another loop, also while the first one runs, which continues as before."""
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        await client.get_audiences(north)
        for use in (client.get_audiences(north), client.fetch_all([north]), client.aclose()):
            with pytest.raises(ClientClosedError, match=OTHER_LOOP):
                await asyncio.to_thread(asyncio.run, use)
        assert len(await client.get_audiences(north)) == 2
    assert len(sandbox.requests) == 2


@pytest.mark.slow
def test_a_client_used_in_a_forked_process(url: str) -> None:
    """Raise in a child process that the client belongs to another loop; the parent's continues as before."""
    out, err = run(
        url,
        """
        async def main():
            async with AudiencesClient(base_url=url) as client:
                await client.get_audiences(north)
                call = asyncio.create_task(client.get_audiences(slow))
                await until_sent(client)
                child = os.fork()
                if child == 0:
                    for use in (client.get_audiences(north), client.fetch_all([north]), client.aclose()):
                        try:
                            asyncio.run(use)
                        except ClientClosedError as error:
                            print(error, flush=True)
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
                print(len(await client.get_audiences(north)))
                call.cancel()
                await asyncio.wait([call])

        asyncio.run(main())
        """,
    )
    assert (out, err) == ([OTHER_LOOP] * 3 + ["2"], "")


@pytest.mark.slow
def test_a_client_first_used_in_a_forked_process(url: str) -> None:
    """Serve parent and child, each on its own loop, if the client was created but not used before the fork."""
    out, err = run(
        url,
        """
        client = AudiencesClient(base_url=url)

        async def main():
            async with client:
                print(len(await client.get_audiences(north)), flush=True)

        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
        asyncio.run(main())
        """,
    )
    assert (out, err) == (["2", "2"], "")


@pytest.mark.slow
def test_a_forked_process_that_ends_does_not_touch_its_parents_client(url: str) -> None:
    """Leave the parent's next call unaffected when a child ends as programs do, without using the client."""
    out, _ = run(
        url,
        """
        client = AudiencesClient(base_url=url)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(client.get_audiences(north))
        child = os.fork()
        if child == 0:
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        try:
            print(len(loop.run_until_complete(client.get_audiences(north, timeout=2.0))))
        finally:
            loop.run_until_complete(client.aclose())
            loop.close()
        """,
    )
    assert out == ["2"]


SILENT: Final = {
    "exit": (
        3,
        """
        async def main():
            async with AudiencesClient(base_url=url) as client:
                async with asyncio.TaskGroup() as group:
                    for account in (slow, slow, north, slow):
                        group.create_task(client.get_audiences(account))
                    await until_sent(client, 3)
                    sys.exit(3)

        asyncio.run(main())
        """,
    ),
    "interrupt": (
        130,
        """
        async def main():
            async with AudiencesClient(base_url=url) as client:
                async with asyncio.TaskGroup() as group:
                    for account in (slow, slow, north, slow):
                        group.create_task(client.get_audiences(account))
                    await until_sent(client, 3)
                    os.kill(os.getpid(), signal.SIGINT)

        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            sys.exit(130)
        """,
    ),
    "closed under calls": (
        0,
        """
        async def main():
            client = AudiencesClient(base_url=url)
            calls = [asyncio.create_task(client.get_audiences(account)) for account in (slow, slow, north, slow)]
            await until_sent(client, 2)
            await client.aclose()
            for result in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(result, ClientClosedError)

        asyncio.run(main())
        """,
    ),
    "exit from a job": (
        3,
        """
        async def main():
            async with AudiencesClient(base_url=url) as client:
                async with client.stream([north, *[slow] * 9], concurrency=4) as outcomes:
                    async for outcome in outcomes:
                        sys.exit(3)

        asyncio.run(main())
        """,
    ),
    "a job that is never left": (
        0,
        """
        async def main():
            async with AudiencesClient(base_url=url) as client:
                await client.stream([north, *[slow] * 9], concurrency=4).__aenter__()
                await until_sent(client, 2)

        asyncio.run(main())
        """,
    ),
    "never used": (
        0,
        """
        client = AudiencesClient(base_url=url)
        asyncio.run(client.aclose())
        unused = AudiencesClient(base_url=url)
        """,
    ),
    "a daemon thread": (
        0,
        """
        def key():
            asked.set()
            return slow.api_key

        asked = threading.Event()
        call = AudiencesClient(base_url=url).get_audiences(Account("slow", key))
        threading.Thread(target=asyncio.run, args=[call], daemon=True).start()
        asked.wait()
        """,
    ),
}
"""Programs that end while calls or a job are running, or after they closed what they opened, and their exit codes."""


@pytest.mark.slow
def test_the_interpreter_ends_in_silence(url: str) -> None:
    """Whatever still runs when a program ends, stderr is empty, and nothing hangs."""
    with ThreadPoolExecutor(3) as programs:
        ended = programs.map(lambda case: run(url, case[1], code=case[0]), SILENT.values())
        said = {name: stderr for name, (_, stderr) in zip(SILENT, ended, strict=True)}
    assert said == dict.fromkeys(SILENT, "")


NEVER_CLOSED: Final = {
    "local": """
        async def main():
            client = AudiencesClient(base_url=url)
            await client.get_audiences(north)

        asyncio.run(main())
        """,
    "global": """
        client = AudiencesClient(base_url=url)
        asyncio.run(client.get_audiences(north))
        """,
    "under calls": """
        client = AudiencesClient(base_url=url, max_connections=1)

        async def main():
            await client.get_audiences(north)
            for _ in range(3):
                calls.append(asyncio.create_task(client.get_audiences(slow)))
            await until_sent(client)

        calls = []
        asyncio.run(main())
        """,
}


@pytest.mark.slow
def test_a_client_that_is_never_closed(url: str) -> None:
    """If the user never closes a client, only aiohttp and asyncio warn, when it is collected."""
    with ThreadPoolExecutor(3) as programs:
        for _, stderr in programs.map(partial(run, url), NEVER_CLOSED.values()):
            only_others_warn(stderr)


# --- blocking calls


@pytest.fixture
def no_blocking() -> Iterator[None]:
    """Make every call below our code that blocks the event loop raise an error."""
    with blockbuster_ctx("audiences_async", excluded_modules=["audiences_async.sandbox"]):
        yield


@pytest.mark.usefixtures("no_blocking")
async def test_blocking_is_noticed(sandbox: Sandbox) -> None:
    """Raise an error for a blocking call below our code; the next tests rely on this."""

    def key() -> str:
        blocking.sleep(0.001)
        return "key"

    async with AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(max_attempts=1)) as client:
        with pytest.raises(TransportError) as caught:
            await client.get_audiences(Account("north", key))
    assert isinstance(caught.value.__cause__, BlockingError)


@pytest.mark.usefixtures("no_blocking")
async def test_nothing_of_ours_blocks_the_event_loop(sandbox: Sandbox) -> None:
    """Calls, retries, pauses, large bodies, keys, failures, a job and closing: none of them blocks."""
    load = Load(sandbox, 0, Answer(delay=0.01))
    refused, late = load.account("refused", *[Answer(400)] * 2), load.account("late", HANGS)
    async with load.client as client:
        responses = await asyncio.gather(*map(client.get_audiences, load.accounts))
        for account, response in zip(load.accounts, responses, strict=True):
            right(account, response)
        with pytest.raises(DeadlineExceededError):
            await client.get_audiences(late, timeout=0.05)
        assert [outcome.ok for outcome in await client.fetch_all([*load.accounts, refused])] == [True] * 14 + [False]
        async with client.stream([*load.accounts, refused]) as outcomes:
            assert sum([outcome.ok async for outcome in outcomes]) == 14
        running = asyncio.create_task(client.get_audiences(load.account("running", HANGS)))
        await in_time(lambda: busy(client) == 1)
    assert isinstance(running.exception(), ClientClosedError)


@pytest.mark.parametrize("scene", ["own"], indirect=True)
@pytest.mark.usefixtures("no_blocking")
async def test_tls_and_names_do_not_block_either(scene: Scene, at_once: RetryPolicy) -> None:
    """Neither the first call over TLS, with our context or the system's, nor a look-up of a name blocks."""
    trusting = scene.handshake()
    await scene.serve(HEALED)
    scene.open(ssl=trusting)
    await scene.sound()
    await scene.client.aclose()
    url = f"https://localhost:{scene.listener.getsockname()[1]}/"
    async with AudiencesClient("key", base_url=url, retry=at_once) as client:
        with pytest.raises(ConnectionFailedError, match="certificate is not trusted"):
            await client.get_audiences()
