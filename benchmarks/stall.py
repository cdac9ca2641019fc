"""How long a reply of 100,000 records (10 MB) holds the event loop, and what not holding it costs.

Run ``python benchmarks/stall.py [rounds] [--json FILE]``. A task wakes every millisecond: its longest gap is the stall.
"""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
from common import arguments, body, check, report, save, server

from audiences_async import AudiencesClient, structuring

RECORDS = 100_000
TICK = 0.001  # s
BLOCKING = "aiohttp read, decode on the loop"
OURS = "audiences_async"
IDLE = "nothing, for half a second"


async def stalled(call: Callable[[], Awaitable[Any]]) -> tuple[float, float, Any]:
    """The longest gap between two ticks while this call ran, its whole time, and its result."""
    done = False
    longest = 0.0
    ticking = asyncio.Event()

    async def ticker() -> None:
        nonlocal longest
        last = time.perf_counter()
        ending = False
        while not ending:
            ending = done  # once more after the call: it may have held the loop to its end
            ticking.set()
            await asyncio.sleep(TICK)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    task = asyncio.create_task(ticker())
    await ticking.wait()
    started = time.perf_counter()
    result = await call()
    took = time.perf_counter() - started
    done = True
    await task
    return longest, took, result


async def measure(base_url: str, payload: bytes, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    async with aiohttp.ClientSession() as session, AudiencesClient("key", base_url=base_url) as client:

        async def blocking() -> Any:
            async with session.get(f"{base_url}audiences", headers={"Authorization": "Bearer key"}) as response:
                return structuring.decode(await response.read())

        cases = {BLOCKING: blocking, OURS: client.get_audiences, IDLE: partial(asyncio.sleep, 0.5)}
        stalls: dict[str, list[float]] = {name: [] for name in cases}
        times: dict[str, list[float]] = {name: [] for name in cases if name != IDLE}
        for number in range(rounds + 1):
            for name, call in cases.items():
                gc.collect()
                longest, took, result = await stalled(call)
                if name != IDLE:
                    check(result, payload)
                del result
                if number:  # the first round warms up
                    stalls[name].append(longest)
                    if name != IDLE:
                        times[name].append(took)
    return stalls, times


def main() -> None:
    options = arguments(7)
    payload = body(RECORDS)
    records = []
    for gzipped, words in ((False, ""), (True, ", gzipped")):
        with server(payload, gzipped=gzipped) as base_url:
            stalls, times = asyncio.run(measure(base_url, payload, options.rounds))
        size = f"{RECORDS:,} records ({len(payload) / 1e6:.1f} MB{words})"
        records += report(f"longest event loop stall, {size}", BLOCKING, stalls, "ms", 1e3)
        records += report(f"time of the call, {size}", BLOCKING, times, "ms", 1e3)
    save(options.json, records)


if __name__ == "__main__":
    main()
