"""What the benchmarks share: a lean server in a process of its own, and interleaved, checked, printed measurements."""

import asyncio
import contextlib
import json
import multiprocessing
import platform
import statistics
from collections.abc import Awaitable, Callable, Iterator, Mapping
from importlib.metadata import version
from multiprocessing.connection import Connection

from audiences_async.sandbox import many_audiences


def body(audiences: int, account: str = "bench") -> bytes:
    """A 200's body with so many audiences."""
    envelope = {"status": "200", "description": "Audiences retrieved", "response_time": "2026-02-11T12:00:00.000Z"}
    return json.dumps(envelope | {"data": list(many_audiences(account, audiences))}).encode()


class _Fixed(asyncio.Protocol):
    """Answers each request head with the same bytes: the least a server can do."""

    def __init__(self, reply: bytes) -> None:
        self._reply = reply

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(self._reply * data.count(b"\r\n\r\n"))  # type: ignore[attr-defined]


def _serve(reply: bytes, ready: Connection) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Fixed(reply), "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextlib.contextmanager
def server(payload: bytes) -> Iterator[str]:
    """The base URL of a server, in a process of its own, that answers everything with this body."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(payload)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(head + payload, theirs), daemon=True)
    process.start()
    yield f"http://127.0.0.1:{ours.recv()}/"
    process.terminate()
    process.join()


async def in_parallel(call: Callable[[], Awaitable[object]], total: int, at_once: int) -> None:
    """Make *total* calls, *at_once* at a time."""

    async def worker() -> None:
        for _ in range(total // at_once):
            await call()

    await asyncio.gather(*(worker() for _ in range(at_once)))


def environment() -> str:
    """Interpreter, machine and versions, to stand beside every figure."""
    packages = ("aiohttp", "attrs", "cattrs", "msgspec", "tenacity")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}, {versions}"


def report(title: str, baseline: str, figures: Mapping[str, list[float]], unit: str, scale: float) -> None:
    """Print medians, spreads and ratios to the baseline; each ratio is the median over rounds."""
    print(f"\n{title}\n{environment()}")
    print(f"{'case':40} {'median':>9} {'min':>9} {'max':>9}   ratio to {baseline}")
    for name, values in figures.items():
        ratio = statistics.median(value / base for value, base in zip(values, figures[baseline], strict=True))
        shown = [scale * pick(values) for pick in (statistics.median, min, max)]
        print(f"{name:40} {' '.join(f'{value:9.2f}' for value in shown)}   {ratio:.2f}    ({unit})")
