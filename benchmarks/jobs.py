"""A job over many accounts: throughput beside bare aiohttp with a semaphore, and peak memory as the job grows.

Run ``python benchmarks/jobs.py [rounds] [--json FILE]``. Takes about three minutes.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from common import arguments, body, median_ratio, report, save

from audiences_async import Account, AudiencesClient, structuring
from audiences_async._jobs.outcome_files import OutcomeFile, lines

ACCOUNTS = 3_000
CONCURRENCY = 100
AUDIENCES = 20
DELAYS = (0.0, 0.02, 0.05, 0.1)  # s, of the server for each reply
MIN_RATIO = 0.9  # of the throughputs, ours to the baseline's

SMALL_JOB, LARGE_JOB = 10_000, 100_000
FEW = 2  # audiences of each account of these
MAX_DIFFERENCE = 20.0  # MB

PLACE = "account-xxxxxx"  # where the server's body has the account's name; as long as every name
NAMES = [f"account-{number:06}" for number in range(ACCOUNTS)]
IDS = {name: [f"{name}-{number}" for number in range(AUDIENCES)] for name in NAMES}

BARE = "aiohttp, semaphore, msgspec"
MODELS = "the same, into our models"
OURS = "audiences_async stream()"
TIME_LIMIT = 200.0  # s, for any single run


class _PerAccount(asyncio.Protocol):
    """Answers each request, perhaps late, with audiences whose ids carry the key: whose answer it is can be checked."""

    def __init__(self, reply: bytes, delay: float) -> None:
        self._reply = reply
        self._delay = delay

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        start = data.index(b"Bearer ") + len(b"Bearer ")
        reply = self._reply.replace(PLACE.encode(), data[start : start + len(PLACE)])
        if self._delay:
            asyncio.get_running_loop().call_later(self._delay, self._transport.write, reply)
        else:
            self._transport.write(reply)


def _serve(reply: bytes, delay: float, ready: Connection) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _PerAccount(reply, delay), "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextlib.contextmanager
def service(audiences: int, delay: float = 0.0) -> Iterator[str]:
    """The base URL of a server, in a process of its own, that gives each key so many audiences of its own."""
    payload = body(audiences, PLACE)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(payload)
    ours, theirs = multiprocessing.Pipe()
    args = (head + payload, delay, theirs)
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=args, daemon=True)
    process.start()
    try:
        assert ours.poll(30.0), "the server did not start"
        yield f"http://127.0.0.1:{ours.recv()}/"
    finally:
        process.terminate()
        process.join()


def fetched(name: str, ids: list[str]) -> str:
    """The account's name, once every id is the right one."""
    assert ids == IDS[name]
    return name


async def bare(base_url: str) -> list[str]:
    """A task for each account behind a semaphore; what one writes without a package."""
    return await _gathered(base_url, lambda text: [each["id"] for each in msgspec.json.decode(text)["data"]])


async def bare_models(base_url: str) -> list[str]:
    """The same, and each reply decoded as ours is: what is left to the ratio is not the decoding."""
    return await _gathered(base_url, lambda text: [each.id for each in structuring.decode(text)])


async def _gathered(base_url: str, ids_of: Callable[[bytes], list[str]]) -> list[str]:
    url = f"{base_url}audiences"
    room = asyncio.Semaphore(CONCURRENCY)
    connector = aiohttp.TCPConnector(limit=CONCURRENCY)
    async with aiohttp.ClientSession(connector=connector, raise_for_status=True) as session:

        async def fetch(name: str) -> str:
            async with room, session.get(url, headers={"Authorization": f"Bearer {name}"}) as response:
                return fetched(name, ids_of(await response.read()))

        return await asyncio.gather(*map(fetch, NAMES))


async def ours(base_url: str) -> list[str]:
    accounts = (Account(name, name) for name in NAMES)
    async with (
        AudiencesClient(base_url=base_url) as client,
        client.stream(accounts, concurrency=CONCURRENCY) as outcomes,
    ):
        return [fetched(outcome.account.name, [each.id for each in outcome.response]) async for outcome in outcomes]


CASES: dict[str, Callable[[str], Awaitable[list[str]]]] = {BARE: bare, MODELS: bare_models, OURS: ours}


async def in_time(job: Awaitable[list[str]]) -> list[str]:
    async with asyncio.timeout(TIME_LIMIT):
        return await job


def throughput(delay: float, rounds: int) -> list[dict[str, Any]]:
    """Whole jobs, a client or session made for each."""
    rates: dict[str, list[float]] = {name: [] for name in CASES}
    cpu: dict[str, list[float]] = {name: [] for name in CASES}
    with service(AUDIENCES, delay) as base_url:
        for number in range(rounds + 1):
            turns = list(CASES.items())
            for name, case in turns if number % 2 else reversed(turns):
                gc.collect()
                started, used = time.perf_counter(), time.process_time()
                names = asyncio.run(in_time(case(base_url)))
                took, used = time.perf_counter() - started, time.process_time() - used
                assert sorted(names) == NAMES  # each account exactly once
                if number:  # the first round warms up
                    rates[name].append(ACCOUNTS / took)
                    cpu[name].append(used / ACCOUNTS)
    what = f"{ACCOUNTS:,} accounts of {AUDIENCES} audiences, {CONCURRENCY} at once, replies after {delay * 1e3:g} ms"
    records = report(f"throughput, {what}", BARE, rates, "accounts/s", 1.0, also=(MODELS,), better="more")
    records += report(f"CPU for an account, {what}", BARE, cpu, "us", 1e6, also=(MODELS,))
    ratio = median_ratio(rates[OURS], rates[BARE])
    print(f"throughput of ours to the baseline's: {ratio:.3f}, the goal is {MIN_RATIO} or more")
    return records


def megabytes() -> float:
    """This process's largest resident size so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def streamed(base_url: str, count: int, path: Path) -> tuple[float, float]:
    """Stream so many accounts into a file; megabytes before, and at the peak. Runs in a process of its own."""

    async def job() -> None:
        accounts = (Account(name, name) for name in map("account-{:06}".format, range(count)))
        async with (
            asyncio.timeout(TIME_LIMIT),
            AudiencesClient(base_url=base_url) as client,
            client.stream(accounts, concurrency=CONCURRENCY) as outcomes,
        ):
            async for outcome in outcomes:
                assert [each.id for each in outcome.response] == [f"{outcome.account.name}-{n}" for n in range(FEW)]
                file.write(outcome)

    before = megabytes()
    with OutcomeFile(path) as file:
        asyncio.run(job())
    peak = megabytes()
    assert peak > before, "the peak is the parent's, from which a process on Linux starts to count"
    written = [line.account for line in lines(path) if line.ok]
    assert sorted(written) == [f"account-{number:06}" for number in range(count)]
    assert path.read_bytes().count(b"\n") == count
    return before, peak


def memory() -> list[dict[str, Any]]:
    peaks: dict[int, list[float]] = {}
    with service(FEW) as base_url, tempfile.TemporaryDirectory() as folder:
        for count in (SMALL_JOB, LARGE_JOB):
            path = Path(folder) / f"{count}.ndjson"
            started = time.perf_counter()
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
                before, peak = child.submit(streamed, base_url, count, path).result()
            took = time.perf_counter() - started
            print(f"{count:,} accounts into a file: {before:.1f} MB before, {peak:.1f} MB at the peak, {took:.0f} s")
            peaks[count] = [peak]
    named = {f"{count:,} accounts": values for count, values in peaks.items()}
    title = f"peak memory, stream() into an OutcomeFile, {FEW} audiences each, {CONCURRENCY} at once"
    records = report(title, f"{SMALL_JOB:,} accounts", named, "MB", 1.0)
    difference = peaks[LARGE_JOB][0] - peaks[SMALL_JOB][0]
    print(f"difference: {difference:+.1f} MB, the goal is {MAX_DIFFERENCE:g} MB or less")
    return records


def main() -> None:
    options = arguments(5)
    records = memory()  # first, while this process is small
    for delay in DELAYS:
        records += throughput(delay, options.rounds)
    save(options.json, records)


if __name__ == "__main__":
    main()
