"""What the benchmarks share: a lean server in a process of its own, and interleaved, checked, printed measurements."""

import argparse
import asyncio
import contextlib
import gzip
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from audiences_async.sandbox import many_audiences

CREATED = datetime(2025, 10, 1, 9, 10, tzinfo=UTC)  # of all audiences of the sandbox
PACKAGES = ("audiences_async", "aiohttp", "attrs", "cattrs", "msgspec", "tenacity")


def body(audiences: int, account: str = "bench") -> bytes:
    """A 200's body with so many audiences."""
    envelope = {"status": "200", "description": "Audiences retrieved", "response_time": "2026-02-11T12:00:00.000Z"}
    return json.dumps(envelope | {"data": list(many_audiences(account, audiences))}).encode()


def check(decoded: Any, reply: bytes) -> None:
    """Every field of every record is what was sent; time as text where the case leaves it as text."""
    sent = json.loads(reply)["data"]
    plain = isinstance(decoded, dict)
    got = decoded["data"] if plain else decoded.data
    assert len(got) == len(sent)
    for record, expected in zip(got, sent, strict=True):
        if plain:
            assert record == expected
            continue
        assert type(record).__name__.removesuffix("Audience").endswith(expected["type"])
        assert (record.id, record.name) == (expected["id"], expected["name"])
        assert record.created_time == CREATED
        assert getattr(record, "user_count", None) == expected.get("user_count")


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
def server(payload: bytes, *, gzipped: bool = False) -> Iterator[str]:
    """The base URL of a server, in a process of its own, that answers everything with this body."""
    sent = gzip.compress(payload) if gzipped else payload
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(sent)
    reply = head + (b"Content-Encoding: gzip\r\n" if gzipped else b"") + b"\r\n" + sent
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(reply, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/"
    finally:
        process.terminate()
        process.join()


async def in_parallel(call: Callable[[], Awaitable[object]], total: int, at_once: int) -> None:
    """Make *total* calls, *at_once* at a time."""

    async def worker() -> None:
        for _ in range(total // at_once):
            await call()

    await asyncio.gather(*(worker() for _ in range(at_once)))


def arguments(rounds: int) -> argparse.Namespace:
    """The command line that the benchmarks share: ``[rounds] [--json FILE]``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=rounds, help=f"measured rounds (default: {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser.parse_args()


def machine() -> str:
    """Processor and system."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} CPUs, {platform.system()}"
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"


def interpreter() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def environment(*peers: str) -> str:
    """Interpreter, machine and versions, to stand beside every figure."""
    versions = ", ".join(f"{name} {version(name)}" for name in (*PACKAGES, *peers))
    return f"{interpreter()}; {machine()}; {versions}"


def median_ratio(values: list[float], base: list[float]) -> float:
    """The median over rounds of each round's own ratio."""
    return statistics.median(value / of for value, of in zip(values, base, strict=True))


def report(
    title: str,
    baseline: str,
    figures: Mapping[str, list[float]],
    unit: str,
    scale: float,
    *,
    also: tuple[str, ...] = (),
    peers: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Print medians, spreads and ratios to the baseline, and to others; return them, for `save`.

    Each ratio is the median over rounds of that round's own ratio.
    """
    print(f"\n{title}\n{environment(*peers)}")
    against = (baseline, *also)
    print(f"{'case':40} {'median':>9} {'min':>9} {'max':>9} {unit}   ratio to {', to '.join(against)}")
    records = []
    for name, values in figures.items():
        scaled = [scale * value for value in values]
        ratios = {other: median_ratio(values, figures[other]) for other in against}
        shown = " ".join(f"{pick(scaled):9.2f}" for pick in (statistics.median, min, max))
        print(f"{name:40} {shown} {' ' * len(unit)}   {'  '.join(f'{ratio:.3f}' for ratio in ratios.values())}")
        records.append(
            {
                "table": title,
                "case": name,
                "unit": unit,
                "values": scaled,
                "median": statistics.median(scaled),
                "min": min(scaled),
                "max": max(scaled),
                "baseline": baseline,
                "ratio": ratios[baseline],
                "ratios": ratios,
            }
        )
    return records


def save(path: Path | None, records: Iterable[Mapping[str, Any]], *peers: str) -> None:
    """Write all figures as JSON, if a file was asked for."""
    if path is not None:
        versions = {name: version(name) for name in (*PACKAGES, *peers)}
        found = {"interpreter": interpreter(), "machine": machine(), "versions": versions, "results": list(records)}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
