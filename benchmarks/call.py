"""CPU of one call with 20 audiences over loopback, against a default aiohttp get and read in the same run.

python benchmarks/call.py [rounds]
"""

import asyncio
import sys
import time

import aiohttp
from common import body, in_parallel, report, server

from audiences_async import AudiencesClient

AUDIENCES = 20
CALLS = 2000


async def measure(base_url: str, payload: bytes, rounds: int, at_once: int) -> dict[str, list[float]]:
    url = f"{base_url}audiences"
    async with aiohttp.ClientSession() as session, AudiencesClient("key", base_url=base_url) as client:

        async def bare() -> None:
            async with session.get(url, headers={"Authorization": "Bearer key"}) as response:
                assert await response.read() == payload

        async def ours() -> None:
            response = await client.get_audiences()
            assert len(response) == AUDIENCES
            assert response.data[-1].id == f"bench-{AUDIENCES - 1}"

        cases = {"bare aiohttp get + read": bare, "audiences_async get_audiences()": ours}
        figures: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(rounds + 1):
            for name, case in cases.items():
                started = time.process_time()
                await in_parallel(case, CALLS, at_once)
                if number:  # the first round warms up
                    figures[name].append((time.process_time() - started) / CALLS)
    return figures


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    payload = body(AUDIENCES)
    with server(payload) as base_url:
        for at_once in (64, 1):
            figures = asyncio.run(measure(base_url, payload, rounds, at_once))
            report(f"CPU per call, {at_once} at once", "bare aiohttp get + read", figures, "us", 1e6)


if __name__ == "__main__":
    main()
