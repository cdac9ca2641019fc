"""What the benchmarks share: a lean server in a process of its own, and interleaved, checked, printed measurements."""

import argparse
import asyncio
import contextlib
import gzip
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import audiences_async
from audiences_async.sandbox import many_audiences

CREATED = datetime(2025, 10, 1, 9, 10, tzinfo=UTC)  # of all audiences of the sandbox
PACKAGES = ("audiences_async", "aiohttp", "attrs", "cattrs", "msgspec", "tenacity")

Better = Literal["less", "more"]


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


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return a command line with the option that all benchmarks have: ``--json FILE``."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return made


def arguments(rounds: int) -> argparse.Namespace:
    """Parse the command line of most benchmarks: ``[rounds] [--json FILE]``."""
    made = parser()
    made.add_argument("rounds", nargs="?", type=int, default=rounds, help=f"measured rounds (default: {rounds})")
    return made.parse_args()


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


def commit() -> str | None:
    """Return the git commit of the package, with ``-dirty`` if files differ from it; None outside a clone."""
    folder = Path(audiences_async.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    return found.stdout.strip() or None


def median_ratio(values: list[float], base: list[float]) -> float:
    """Return the median over rounds of each round's own ratio; NaN if a round of the baseline is 0."""
    return statistics.median(value / of if of else math.nan for value, of in zip(values, base, strict=True))


def rounded(value: float) -> float:
    """Round to six digits: no measurement is more exact."""
    return float(f"{value:.6g}")


def table(
    title: str,
    baseline: str,
    figures: Mapping[str, list[float]],
    unit: str,
    scale: float = 1.0,
    *,
    also: tuple[str, ...] = (),
    better: Better = "less",
) -> list[dict[str, Any]]:
    """Return the records of one table, for `save`: all rounds of each case, and ratios to the baseline and to others.

    Each ratio is the median over rounds of that round's own ratio.
    """
    records = []
    for case, values in figures.items():
        scaled = [rounded(scale * value) for value in values]
        ratios = {other: rounded(median_ratio(values, figures[other])) for other in (baseline, *also)}
        record = {"table": title, "case": case, "unit": unit, "better": better, "values": scaled}
        record |= {"median": statistics.median(scaled), "min": min(scaled), "max": max(scaled)}
        records.append(record | {"baseline": baseline, "ratio": ratios[baseline], "ratios": ratios})
    return records


def report(
    title: str,
    baseline: str,
    figures: Mapping[str, list[float]],
    unit: str,
    scale: float,
    *,
    also: tuple[str, ...] = (),
    better: Better = "less",
    peers: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Print medians, spreads and ratios to the baseline, and to others; return them, for `save`."""
    print(f"\n{title}\n{environment(*peers)}")
    print(f"{'case':40} {'median':>9} {'min':>9} {'max':>9} {unit}   ratio to {', to '.join((baseline, *also))}")
    records = table(title, baseline, figures, unit, scale, also=also, better=better)
    for record in records:
        shown = " ".join(f"{record[figure]:9.2f}" for figure in ("median", "min", "max"))
        ratios = "  ".join(f"{ratio:.3f}" for ratio in record["ratios"].values())
        print(f"{record['case']:40} {shown} {' ' * len(unit)}   {ratios}")
    return records


def save(
    path: Path | None,
    records: Iterable[Mapping[str, Any]],
    *peers: str,
    runs: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write figures as JSON, one on each line, if a file was asked for: `compare.py` reads them.

    Args:
        path: File to write; its folder is made if it is missing.
        records: From `table` or `report`.
        peers: Distributions whose versions are written beside our own.
        runs: What else the benchmark keeps of its runs, in a form of its own.
    """
    if path is None:
        return
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "interpreter": interpreter(),
        "versions": {name: version(name) for name in (*PACKAGES, *peers)},
        "commit": commit(),
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
    for name, rows in (("results", records), ("runs", runs)):
        if listed := ",\n".join(map(json.dumps, rows)):
            lines.append(f'"{name}": [\n{listed}\n]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
