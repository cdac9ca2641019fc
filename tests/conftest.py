"""Fixtures: stepped time, a sandbox with one account, and a patch for aioresponses."""

import asyncio
import functools
import gc
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import aioresponses.core
import pytest
from attrs import define
from hypothesis import settings
from services import redis_server

from audiences_async import Account, RetryPolicy
from audiences_async.sandbox import Sandbox, SteppedTime
from audiences_async.sandbox.thread import all_accepted

pytest_plugins = ["pytester"]

SAMPLES = Path(__file__).parent / "samples"
EMPTY_ANSWER = b'{"status": "200", "data": []}'

# A shell ignores Ctrl-C for background jobs, and the programs that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests start Python over a hundred times: an environment that keeps no bytecode would have each compile everything.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# What has coverage measure each process that is started, on CI.
COVERAGE = {name: os.environ[name] for name in os.environ if name.startswith("COVERAGE_PROCESS")}

settings.register_profile("default", derandomize=True, deadline=None)
settings.load_profile("default")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Start two processes for each core: half of the tests' time is waiting."""
    return 2 * (os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Redis; leave out what measures real time beside other processes of tests."""
    for item in items:
        if "redis" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.redis)
    if "PYTEST_XDIST_WORKER" in os.environ:
        alone = pytest.mark.skip(reason="measures real time; run it alone: pytest -m timed")
        for item in items:
            if item.get_closest_marker("timed"):
                item.add_marker(alone)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all that is imported again and again, in every test."""
    gc.collect()
    gc.freeze()


@define
class RawServer:
    """Records of a raw server."""

    base_url: str = ""
    connections: int = 0
    requests: int = 0


@define
class RawConnection:
    """One connection to a raw server."""

    server: RawServer
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def request(self) -> bytes:
        """Read one request's head."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        self.server.requests += 1
        return head

    async def send(self, data: bytes) -> None:
        """Send bytes unchanged."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes = EMPTY_ANSWER, head: bytes = b"HTTP/1.1 200 OK") -> None:
        """Send a complete response."""
        await self.send(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


@pytest.fixture(autouse=True)
def _measured(request: pytest.FixtureRequest) -> None:
    """Measure coverage in the processes of a test only if it asks for that: it takes them twice as long."""
    for name, value in COVERAGE.items():
        if request.node.get_closest_marker("measured"):
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


@pytest.fixture
def time(audiences_time: SteppedTime) -> SteppedTime:
    """Return stepped time."""
    return audiences_time


@pytest.fixture
def sandbox(audiences_sandbox: Sandbox) -> Sandbox:
    """Yield the running sandbox."""
    return audiences_sandbox


@pytest.fixture
def north(sandbox: Sandbox) -> Account:
    """Return the sandbox's account north."""
    return sandbox.add_account("north")


@pytest.fixture
def at_once() -> RetryPolicy:
    """Return a policy that never waits, for tests of other things."""
    return RetryPolicy(base_delay=0, throttle_base_delay=0)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the environment variables that the client reads."""
    monkeypatch.delenv("AUDIENCES_API_KEY", raising=False)
    monkeypatch.delenv("AUDIENCES_BASE_URL", raising=False)


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[aioresponses.aioresponses]:
    """Yield aioresponses, patched: 0.7.9 does not pass `stream_writer` to aiohttp 3.14's ClientResponse."""
    mended = functools.partial(aiohttp.ClientResponse, stream_writer=Mock(output_size=0))
    monkeypatch.setattr(aioresponses.core, "ClientResponse", mended)
    with aioresponses.aioresponses() as mock:
        yield mock


@pytest.fixture
def chance() -> random.Random:
    """Return a random source that is the same in every run."""
    return random.Random(20261123)


@pytest.fixture
async def raw() -> AsyncIterator[Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]]]:
    """Yield a function that starts raw servers, for responses that the sandbox cannot send."""
    servers: list[asyncio.Server] = []
    handling: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(serve: Callable[[RawConnection], Awaitable[None]]) -> RawServer:
        raw = RawServer()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raw.connections += 1
            task = asyncio.current_task()
            assert task is not None
            handling[task] = writer
            try:
                await serve(RawConnection(raw, reader, writer))
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        servers.append(server)
        raw.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        return raw

    yield start
    await all_accepted()
    for server in servers:
        server.close()
    for task, writer in handling.items():
        task.cancel()
        writer.transport.abort()
    if handling:
        await asyncio.wait(handling)
    await asyncio.sleep(0)  # the event loop closes sockets in its next turn


def eager_task_factory() -> Any:
    """Return asyncio's eager task factory; skip the test on Pythons without it."""
    factory = getattr(asyncio, "eager_task_factory", None)
    if factory is None:
        pytest.skip("eager tasks came with CPython 3.12")
    return factory


@pytest.fixture(scope="module")
def redis_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Redis and return its URL."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
async def redis(redis_of_module: str) -> str:
    """Return the URL of an empty Redis, which the tests of a module share."""
    from redis.asyncio import Redis

    async with Redis.from_url(redis_of_module) as client:
        await client.flushall()
    return redis_of_module
