"""A client in a web app: each recipe runs as printed, in its own process, and serves requests over real sockets."""

import asyncio
import os
import re
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import aiohttp
import pytest
from attrs import define, field, frozen
from conftest import RawConnection, RawServer
from services import free_port

import audiences_async
from audiences_async.sandbox import EXAMPLE_AUDIENCES, Answer, Sandbox

README: Final = Path(__file__).parent.parent / "README.md"
PAGE: Final = Path(audiences_async.__file__).parent / "help" / "web.md"

UVICORN: Final = ["Django", "FastAPI", "Litestar", "Quart", "Starlette"]
FRAMEWORKS: Final = ["aiohttp.web", *UVICORN]

CLIENT: Final = "AudiencesClient()"
"""The code with which the recipes create their client."""
SHARING_CLIENT: Final = "AudiencesClient(cache=CachePolicy(ttl=1.0))"
TELLING_CLIENT: Final = """
from pathlib import Path
from audiences_async import AudiencesClient

class TellingClient(AudiencesClient):
    async def aclose(self):
        await super().aclose()
        Path("closed").touch(exist_ok=False)
"""
KEY: Final = "key-of-the-app"

pytestmark = [pytest.mark.once, pytest.mark.slow]

Raw: TypeAlias = Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]]


@frozen
class Got:
    """An app's response."""

    status: int
    body: Any
    retry_after: str | None = None


@define
class Upstream:
    """A service that delays its answers until it is released."""

    base_url: str = ""
    asked: list[RawConnection] = field(factory=list[RawConnection])
    may_answer: asyncio.Event = field(factory=asyncio.Event)

    async def serve(self, connection: RawConnection) -> None:
        """Answer the requests of one connection."""
        while True:
            await connection.request()
            self.asked.append(connection)
            await self.may_answer.wait()
            await connection.answer()

    def cut_off(self) -> int:
        """Return how many connections with a request the other side has closed."""
        return len({id(connection) for connection in self.asked if connection.reader.at_eof()})

    async def wait_for_requests(self, count: int) -> None:
        """Return when *count* requests have arrived."""
        await eventually(lambda: len(self.asked) == count)


@frozen
class App:
    """A running recipe."""

    port: int
    process: Process
    stderr: Path
    session: aiohttp.ClientSession

    async def get(self, path: str = "audiences") -> Got:
        """Request the audiences, or another path."""
        async with self.session.get(f"http://127.0.0.1:{self.port}/{path}") as response:
            return Got(response.status, await response.json(), response.headers.get("Retry-After"))

    async def gets(self, count: int) -> list[Got]:
        """Send *count* requests at once."""
        return await asyncio.gather(*(self.get() for _ in range(count)))

    def traced(self, words: str) -> int:
        """Count these words in uvicorn's trace."""
        return self.stderr.read_text().count(words)

    def listens(self) -> bool:
        """Return whether it accepts connections."""
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    async def ended(self) -> None:
        """Return when the process has ended successfully, with no output but uvicorn's trace."""
        async with asyncio.timeout(10):
            assert await self.process.wait() in {0, -signal.SIGTERM}
        told = self.stderr.read_text().splitlines()
        assert [line for line in told if not line.startswith(("TRACE:", "INFO:"))] == []


@pytest.fixture
async def upstream(raw: Raw) -> Upstream:
    """Yield a service that delays its answers."""
    upstream = Upstream()
    upstream.base_url = (await raw(upstream.serve)).base_url
    return upstream


async def eventually(holds: Callable[[], bool]) -> None:
    """Return when *holds* is true; raise after 10 s."""
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("it did not come to hold")


def below(heading: str) -> str:
    """Return the program below a heading of the page."""
    programs = rf"^#+ {re.escape(heading)}$.*?^```python$(.*?)^```$"
    program: str
    (program,) = re.findall(programs, PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return program


def recipe(framework: str, changes: Mapping[str, str]) -> str:
    """Return the program below the framework's heading, with these words replaced."""
    program = below(framework)
    for old, new in changes.items():
        assert program.count(old) == 1
        program = program.replace(old, new)
    return program


@asynccontextmanager
async def running(
    framework: str,
    folder: Path,
    base_url: str,
    changes: Mapping[str, str] | None = None,
    *,
    before: str = "",
    after: str = "",
    key: str = KEY,
    log_level: str = "warning",
) -> AsyncIterator[App]:
    """Run a recipe, with lines before and after it: it listens in the block, and ends successfully with it."""
    port = free_port()
    if framework in UVICORN:
        pytest.importorskip(framework.lower())
        pytest.importorskip("uvicorn")
        command = ["-m", "uvicorn", "main:app", f"--port={port}", f"--log-level={log_level}"]
        program = recipe(framework, changes or {})
    else:
        command = ["main.py"]
        program = recipe(framework, {**(changes or {}), "port=8080": f"port={port}"})
    (folder / "main.py").write_text(f"{before}\n{program}\n{after}")
    environment = {**os.environ, "AUDIENCES_BASE_URL": base_url, "AUDIENCES_API_KEY": key}
    stderr = folder / "stderr"
    with stderr.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", *command, cwd=folder, env=environment, stdout=DEVNULL, stderr=file
        )
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            app = App(port, process, stderr, session)
            await eventually(lambda: app.listens() or process.returncode is not None)
            assert process.returncode is None, stderr.read_text()
            yield app
            if process.returncode is None:
                process.terminate()
            await app.ended()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_each_outcome_has_its_status(framework: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Audiences are a 200, and each error has its status, with Retry-After if known and never the key."""
    sandbox.add_account(api_key=KEY)
    refused = [
        (Answer(401), 502, None, "HTTP 401 Unauthorized"),
        (Answer(501), 502, None, "HTTP 501 Not Implemented"),
        (Answer(200, f"no JSON, but {KEY}"), 502, None, "the reply cannot be read"),
        (Answer(failure="reset"), 502, None, "before a reply came"),
        (Answer(delay=1.0), 504, None, "no complete reply within attempt_timeout=0.5 s"),
        (Answer(429), 429, None, "HTTP 429 Too Many Requests"),
        (Answer(429, {"status": 429, "description": KEY}, retry_after=7.95), 429, "8", "HTTP 429 Too Many Requests"),
        (Answer(), 429, "8", "which does not fit into the call's timeout"),  # never requested: the account is paused
    ]
    one_attempt = {CLIENT: "AudiencesClient(attempt_timeout=0.5, retry=RetryPolicy(max_attempts=1))"}
    before = "from audiences_async import RetryPolicy"
    async with running(framework, tmp_path, sandbox.base_url, one_attempt, before=before) as app:
        rows = [{"user_count": None, **row} for row in EXAMPLE_AUDIENCES]
        assert await app.get() == Got(200, rows)
        for answer, status, retry_after, words in refused:
            sandbox.script("default", answer)
            got = await app.get()
            assert (got.status, got.retry_after, list(got.body)) == (status, retry_after, ["error"])
            assert words in got.body["error"]
            assert KEY not in got.body["error"]


async def test_a_health_endpoint(sandbox: Sandbox, tmp_path: Path) -> None:
    """The snapshot is JSON before the first call and after it, also without a retry budget."""
    sandbox.add_account(api_key=KEY)
    no_budget = {CLIENT: "AudiencesClient(budget=None)"}
    async with running("FastAPI", tmp_path, sandbox.base_url, no_budget, after=below("A health endpoint")) as app:
        idle = (await app.get("health")).body
        assert (idle["accounts"], idle["budget_left"], idle["service"]["in_flight"]) == ([], None, 0)
        await app.get()
        health = (await app.get("health")).body
    assert ([pace["account"] for pace in health["accounts"]], health["service"]["state"]) == (["default"], "open")


async def test_several_accounts(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tenant gets its own account's audiences, and an unknown one a 404."""
    for name, audiences in (("north", []), ("south", EXAMPLE_AUDIENCES)):
        monkeypatch.setenv(f"{name.upper()}_KEY", str(sandbox.add_account(name, audiences=audiences).api_key))
    async with running("FastAPI", tmp_path, sandbox.base_url, after=below("Several accounts")) as app:
        got = [await app.get(f"tenants/{name}/audiences") for name in ("north", "south", "nobody")]
    assert [(one.status, len(one.body)) for one in got] == [(200, 0), (200, 2), (404, 1)]


def test_the_recipes_are_short() -> None:
    """Each has at most 30 lines, and README's is the page's."""
    assert all(len(below(framework).strip().splitlines()) <= 30 for framework in FRAMEWORKS)
    assert below("FastAPI") in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_an_app_without_a_key_answers_500(framework: str, upstream: Upstream, tmp_path: Path) -> None:
    """An app whose environment has no key starts, and reports the missing key."""
    async with running(framework, tmp_path, upstream.base_url, key="") as app:
        got = await app.get()
    assert (got.status, got.retry_after) == (500, None)
    assert got.body["error"].startswith("no account: pass one to get_audiences()")
    assert upstream.asked == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_the_deadline_holds_and_bounds_the_shutdown(framework: str, upstream: Upstream, tmp_path: Path) -> None:
    """A handler whose call hangs answers 504 at its deadline; on shutdown an app waits for it and closes its client."""
    changes = {"timeout=3.0": "timeout=0.5", CLIENT: "TellingClient()"}
    async with running(framework, tmp_path, upstream.base_url, changes, before=TELLING_CLIENT) as app:
        clock = asyncio.get_running_loop().time
        began = clock()
        getting = asyncio.create_task(app.get())
        await upstream.wait_for_requests(1)
        app.process.terminate()
        got = await getting
        assert 0.5 <= clock() - began < 1.5
        assert (got.status, got.retry_after) == (504, None)
        assert "no answer within timeout=0.5 s" in got.body["error"]
        await app.ended()
        assert clock() - began < 2.5
    assert (tmp_path / "closed").exists()


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_who_leaves_and_a_shutdown_end_no_other_call(framework: str, upstream: Upstream, tmp_path: Path) -> None:
    """Of 20 calls in flight 5 lose their clients and end; on shutdown, the app accepts no more and answers the rest."""
    async with running(framework, tmp_path, upstream.base_url) as app:
        upstream.may_answer.set()
        for _ in range(4):
            await app.gets(20)  # then the client lets 20 go at once
        upstream.may_answer.clear()
        getting = [asyncio.create_task(app.get()) for _ in range(20)]
        await upstream.wait_for_requests(100)
        for task in getting[:5]:
            task.cancel()
        await eventually(lambda: upstream.cut_off() == 5)
        getting += [asyncio.create_task(app.get()) for _ in range(5)]  # in their place
        await upstream.wait_for_requests(105)
        idle, writer = await asyncio.open_connection("127.0.0.1", app.port)
        writer.write(b"GET /nothing HTTP/1.1\r\nHost: app\r\n\r\n")
        await idle.readuntil(b"\r\n\r\n")  # so that the app has accepted the connection
        app.process.terminate()
        async with asyncio.timeout(10):
            await idle.read()  # until it is closed: the app has begun to end
        writer.close()
        assert not app.listens()
        assert upstream.cut_off() == 5
        upstream.may_answer.set()
        assert await asyncio.gather(*getting[5:]) == [Got(200, [])] * 20
        await app.ended()


@pytest.mark.long
@pytest.mark.parametrize(("client", "requests"), [(SHARING_CLIENT, 1), (CLIENT, 250)])
async def test_500_handlers_of_which_250_are_left_alone(
    upstream: Upstream, tmp_path: Path, client: str, requests: int
) -> None:
    """Of 500 handlers 250 end as their clients disconnect; the others are answered, with a cache by one call."""
    changes = {
        "timeout=3.0": "timeout=30.0",
        CLIENT: client,
        "AudiencesClient, Aud": "AudiencesClient, CachePolicy, Aud",
    }
    async with running("FastAPI", tmp_path, upstream.base_url, changes, log_level="trace") as app:
        staying = [asyncio.create_task(app.get()) for _ in range(2)]
        await upstream.wait_for_requests(min(2, requests))  # the initial number of requests in flight of a new client
        leaving = [asyncio.create_task(app.get()) for _ in range(250)]
        staying += [asyncio.create_task(app.get()) for _ in range(248)]
        await eventually(lambda: app.traced("Started scope") == 500 + 1)  # and the lifespan
        for task in leaving:
            task.cancel()
        await eventually(lambda: app.traced("Completed") == 250)
        upstream.may_answer.set()
        assert await asyncio.gather(*staying) == [Got(200, [])] * 250
    assert len(upstream.asked) == requests
