"""CPU of one call with 20 audiences over loopback, ours and peers, against a default aiohttp get and read.

Run ``python benchmarks/call.py [rounds] [--json FILE]``; it needs ``pip install --group bench``. Takes a few minutes.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import orjson
import stamina
import tenacity
from aiohttp_retry import ExponentialRetry, RetryClient
from common import arguments, body, in_parallel, report, save, server
from decode import check, with_cattrs, with_pydantic
from yarl import URL

from audiences_async import AudiencesClient

AUDIENCES = 20
CALLS = 64 * 30
FEW = 64 * 3
BASELINE = "aiohttp get + read"
OURS = "audiences_async"
SLOW = "httpx + pydantic"
PEERS = ("aiohttp-retry", "httpx", "orjson", "pydantic", "stamina")
HEADERS = {"Authorization": "Bearer key"}
LAST = f"bench-{AUDIENCES - 1}"

Call = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def calls(base_url: str) -> AsyncIterator[dict[str, Call]]:
    """Each case as a call that gives its result."""
    url = f"{base_url}audiences"
    parsed = URL(url)
    prepared = aiohttp.ClientSession(
        headers=HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
    )
    retrying = RetryClient(retry_options=ExponentialRetry(attempts=5))
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=None)
    async with (
        aiohttp.ClientSession() as session,
        prepared,
        retrying,
        httpx.AsyncClient(headers=HEADERS, limits=limits) as other,
        AudiencesClient("key", base_url=base_url) as client,
    ):

        async def bare() -> bytes:
            async with session.get(url, headers=HEADERS) as response:
                return await response.read()

        async def with_orjson() -> Any:
            return orjson.loads(await bare())

        async def prepared_once() -> bytes:
            async with prepared.get(parsed) as response:
                return await response.read()

        async def checked() -> bytes:
            async with session.get(url, headers=HEADERS, raise_for_status=True) as response:
                return await response.read()

        @tenacity.retry(
            stop=tenacity.stop_after_attempt(5),
            wait=tenacity.wait_random_exponential(0.5, 20.0),
            retry=tenacity.retry_if_exception_type((aiohttp.ClientError, TimeoutError)),
        )
        async def with_tenacity() -> Any:
            return with_cattrs(await checked())

        async def with_aiohttp_retry() -> Any:
            async with retrying.get(url, headers=HEADERS, raise_for_status=True) as response:
                return with_cattrs(await response.read())

        @stamina.retry(on=(aiohttp.ClientError, TimeoutError), attempts=5)
        async def with_stamina() -> Any:
            return with_pydantic(await checked())

        async def with_httpx() -> Any:
            response = await other.get(url)
            response.raise_for_status()
            return with_pydantic(response.content)

        yield {
            BASELINE: bare,
            "aiohttp + orjson": with_orjson,
            "aiohttp prepared once": prepared_once,
            "tenacity + cattrs": with_tenacity,
            "aiohttp_retry + cattrs": with_aiohttp_retry,
            "stamina + pydantic": with_stamina,
            SLOW: with_httpx,
            OURS: client.get_audiences,
        }


def verified(call: Call, payload: bytes, first: Any) -> Call:
    """The call with a check of what it gives, as cheap as its kind allows."""

    async def of_bytes() -> None:
        assert await call() == payload

    async def of_json() -> None:
        data = (await call())["data"]
        assert len(data) == AUDIENCES
        assert data[-1]["id"] == LAST

    async def of_models() -> None:
        data = (await call()).data
        assert len(data) == AUDIENCES
        assert data[-1].id == LAST

    if isinstance(first, bytes):
        return of_bytes
    check(first, payload)
    return of_json if isinstance(first, dict) else of_models


async def measure(base_url: str, payload: bytes, rounds: int, at_once: int) -> dict[str, list[float]]:
    async with calls(base_url) as cases:
        checked = {name: verified(call, payload, await call()) for name, call in cases.items()}
        figures: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(rounds + 1):
            for name, case in checked.items():
                total = FEW if name == SLOW else CALLS
                await in_parallel(case, at_once, at_once)  # opens the connections
                gc.collect()
                started = time.process_time()
                await in_parallel(case, total, at_once)
                if number:  # the first round warms up
                    figures[name].append((time.process_time() - started) / total)
    return figures


def main() -> None:
    options = arguments(9)
    payload = body(AUDIENCES)
    records = []
    with server(payload) as base_url:
        for at_once, words in ((64, "64 at once"), (1, "one at a time")):
            figures = asyncio.run(measure(base_url, payload, options.rounds, at_once))
            records += report(f"CPU per call, {words}", BASELINE, figures, "us", 1e6, peers=PEERS)
    save(options.json, records, *PEERS)


if __name__ == "__main__":
    main()
