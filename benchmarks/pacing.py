"""200 calls at once on an account that nginx limits to 20 requests/s: time and requests, ours beside blind backoff.

Run ``python benchmarks/pacing.py``; it needs nginx, and ``pip install --group bench``. Takes about two minutes.
"""

import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import tenacity
from aiohttp_retry import JitterRetry, RetryClient
from common import body, environment

from audiences_async import Account, AudiencesClient, AudiencesError, AudiencesResponse, RateLimit
from audiences_async.clock import Clock
from audiences_async.pacing import Pacer, Slots

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from services import Nginx, nginx

RATE, BURST, CALLS = 20, 5, 200
IDEAL = (CALLS - BURST - 1) / RATE  # s; nginx grants burst + 1 at once
ROUNDS = 3
TURNS = 50_000


async def ours(server: Nginx, key: str, limit: RateLimit | None = None) -> int:
    async with AudiencesClient(key, base_url=server.base_url, rate_limit=limit) as client:
        answers = await asyncio.gather(*(client.get_audiences() for _ in range(CALLS)), return_exceptions=True)
    return sum(isinstance(answer, AudiencesResponse) for answer in answers)


async def known(server: Nginx, key: str) -> int:
    return await ours(server, key, RateLimit(RATE, burst=BURST))


async def with_tenacity(server: Nginx, key: str) -> int:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:

        @tenacity.retry(
            wait=tenacity.wait_random_exponential(1.0, 20.0),
            stop=tenacity.stop_after_delay(60),
            retry=tenacity.retry_if_exception_type(aiohttp.ClientResponseError),
        )
        async def call() -> bytes:
            async with session.get(f"{server.base_url}audiences", raise_for_status=True) as response:
                return await response.read()

        answers = await asyncio.gather(*(call() for _ in range(CALLS)), return_exceptions=True)
    return sum(isinstance(answer, bytes) for answer in answers)


async def with_aiohttp_retry(server: Nginx, key: str) -> int:
    options = JitterRetry(attempts=20, start_timeout=1.0, max_timeout=20.0, random_interval_size=2.0, statuses={429})
    async with RetryClient(retry_options=options, headers={"Authorization": f"Bearer {key}"}) as session:

        async def call() -> int:
            async with session.get(f"{server.base_url}audiences") as response:
                await response.read()
                return response.status

        answers = await asyncio.gather(*(call() for _ in range(CALLS)), return_exceptions=True)
    return answers.count(200)


CASES: dict[str, Callable[[Nginx, str], Awaitable[int]]] = {
    "audiences_async, learning": ours,
    "audiences_async, RateLimit known": known,
    "tenacity, random exponential": with_tenacity,
    "aiohttp_retry, jitter": with_aiohttp_retry,
}


def alone(server: Nginx) -> None:
    print(f"{'case':34} {'answers':>8} {'time / ideal':>24} {'requests / answer':>24}   median (min-max)")
    figures: dict[str, list[tuple[str, int, float]]] = {name: [] for name in CASES}
    for number in range(ROUNDS):
        for name, case in CASES.items():
            key = f"{case.__name__}-{number}"
            started = time.monotonic()
            answers = asyncio.run(bounded(case(server, key)))
            figures[name].append((key, answers, (time.monotonic() - started) / IDEAL))
    time.sleep(1.0)  # for the last lines of nginx's log
    for name, rounds in figures.items():
        times = spread([took for _, _, took in rounds])
        requests = spread([len(server.statuses(key)) / max(1, answers) for key, answers, _ in rounds])
        print(f"{name:34} {min(answers for _, answers, _ in rounds):4}/{CALLS} {times:>24} {requests:>24}")


async def bounded(case: Awaitable[int]) -> int:
    async with asyncio.timeout(60.0):
        return await case


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


async def together(server: Nginx) -> None:
    """Five accounts at once, and one that is refused for ever."""
    calls = 100
    names = [f"together-{number}" for number in range(5)]
    took: dict[str, float] = {}
    async with AudiencesClient(base_url=server.base_url) as client:

        async def job(name: str) -> None:
            started = time.monotonic()
            account = Account(name, name)
            await asyncio.gather(*(client.get_audiences(account) for _ in range(calls)))
            took[name] = time.monotonic() - started

        async def refused() -> None:
            account = Account("blocked", "blocked")
            with contextlib.suppress(AudiencesError):
                await client.get_audiences(account)

        blocked = [asyncio.create_task(refused()) for _ in range(calls)]
        await asyncio.gather(*map(job, names))
        for task in blocked:
            task.cancel()
    ideal = (calls - BURST - 1) / RATE
    print(f"\n5 accounts of {calls} calls at once, beside one that is refused for ever; each one's time / ideal alone:")
    print("  " + ", ".join(f"{took[name] / ideal:.3f}" for name in names))
    print(f"  requests of the refused account: {len(server.statuses('blocked'))} for {calls} calls")


async def nothing(deadline: float) -> float:
    return deadline


async def uncontended() -> None:
    bare = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(TURNS):
            await nothing(1e12)
        bare.append((time.perf_counter() - started) / TURNS * 1e6)
    print(f"uncontended, awaiting a coroutine that does nothing: {spread(bare)} us")
    for limit in (RateLimit(1e8, burst=1000), None):
        pacer = Pacer(limit, Slots(10**9), Clock(), throttle_base_delay=1.0, max_delay=20.0, on_event=None)
        lane = pacer.lane(Account("north", "key"))
        for _ in range(2 * TURNS if limit is None else 0):
            lane.release(await lane.acquire(1e12), "answered")  # opens the window

        acquires, releases = [], []
        for _ in range(7):
            taken = []
            started = time.perf_counter()
            for _ in range(TURNS):
                taken.append(await lane.acquire(1e12))  # noqa: PERF401 - the plain loop is what is measured
            acquires.append((time.perf_counter() - started) / TURNS * 1e6)
            started = time.perf_counter()
            for sent_at in taken:
                lane.release(sent_at, "answered")
            releases.append((time.perf_counter() - started) / TURNS * 1e6)
        name = "learning" if limit is None else "known rate"
        print(f"uncontended, {name}: acquire {spread(acquires)} us, release {spread(releases)} us")


@contextlib.contextmanager
def limited() -> Iterator[Nginx]:
    with tempfile.TemporaryDirectory() as folder, nginx(Path(folder), body(20), rate=RATE, burst=BURST) as server:
        yield server


def main() -> None:
    print(
        f"{CALLS} calls at once, {RATE} requests/s, burst {BURST}, no Retry-After; ideal {IDEAL:.1f} s; {environment()}"
    )
    with limited() as server:
        alone(server)
        asyncio.run(together(server))
    asyncio.run(uncontended())


if __name__ == "__main__":
    main()
