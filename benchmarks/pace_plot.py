"""One SVG of a real run: requests over time under a limit, ours beside blind backoff.

Run ``python benchmarks/pace_plot.py OUT.svg``; takes half a minute. 100 calls at once, on a sandbox account that
grants 20 requests/s, 5 at once after a pause, and answers 429 without Retry-After beyond that.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import tenacity
from common import environment

from audiences_async import Account, AudiencesClient, RetryPolicy
from audiences_async.sandbox import Sandbox, SeenRequest

CALLS, RATE, BURST = 100, 20.0, 5
WIDTH, LEFT, RIGHT, TOP, HEIGHT, GAP = 760, 16, 16, 56, 92, 44
BIN = 0.1  # s; the requests of so long a time are one column of dots

STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}
.t{font-weight:600}.n{font-size:12px;fill:#59636e}.p{fill:#fff}.x{stroke:#d1d9e0}.g{fill:#0969da}.r{fill:#cf222e}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.n{fill:#9198a1}.p{fill:#0d1117}.x{stroke:#3d444d}.g{fill:#4493f8}
.r{fill:#f85149}}
"""


async def ours(base_url: str, account: Account) -> None:
    retry = RetryPolicy(max_attempts=50)
    async with AudiencesClient(base_url=base_url, retry=retry, budget=None) as client:
        await asyncio.gather(*(client.get_audiences(account) for _ in range(CALLS)))


async def blind(base_url: str, account: Account) -> None:
    """What one writes with tenacity: random exponential waits, each call for itself."""
    headers = {"Authorization": f"Bearer {account.api_key}"}
    async with aiohttp.ClientSession(raise_for_status=True) as session:

        @tenacity.retry(
            wait=tenacity.wait_random_exponential(0.5, 20.0),
            stop=tenacity.stop_after_attempt(50),
            retry=tenacity.retry_if_exception_type(aiohttp.ClientError),
        )
        async def fetch() -> None:
            async with session.get(f"{base_url}audiences", headers=headers) as response:
                await response.read()

        await asyncio.gather(*(fetch() for _ in range(CALLS)))


def seen(job: Callable[[str, Account], Awaitable[None]]) -> list[SeenRequest]:
    """What reached the sandbox; every call has had its answer."""
    with Sandbox() as sandbox:
        account = sandbox.add_account("north", rate=RATE, burst=BURST)
        asyncio.run(asyncio.wait_for(job(sandbox.base_url, account), 120))
        requests = list(sandbox.requests)
    assert sum(request.answer == 200 for request in requests) == CALLS
    return requests


def panel(title: str, requests: list[SeenRequest], seconds: float, top: int) -> Iterator[str]:
    started = requests[0].at
    refused = sum(request.answer == 429 for request in requests)
    took = requests[-1].at - started
    yield f'<text class="t" x="{LEFT}" y="{top - 10}">{title}</text>'
    told = f"{len(requests)} requests, {refused} of them 429, in {took:.1f} s"
    yield f'<text class="n" x="{WIDTH - RIGHT}" y="{top - 10}" text-anchor="end">{told}</text>'
    scale = (WIDTH - LEFT - RIGHT) / seconds
    columns: dict[int, list[SeenRequest]] = {}
    for request in requests:
        columns.setdefault(int((request.at - started) / BIN), []).append(request)
    for column, members in columns.items():
        step = min(5.0, (HEIGHT - 6) / len(members))
        for number, request in enumerate(sorted(members, key=lambda request: request.answer or 0)):
            x, y = LEFT + (column + 0.5) * BIN * scale, top + HEIGHT - 4 - number * step
            yield f'<circle class="{"g" if request.answer == 200 else "r"}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>'
    yield f'<path class="x" d="M{LEFT} {top + HEIGHT}H{WIDTH - RIGHT}"/>'
    for second in range(0, int(seconds) + 1, 2):
        x = LEFT + second * scale
        yield f'<text class="n" x="{x:.1f}" y="{top + HEIGHT + 16}">{second} s</text>'


def main() -> None:
    path = Path(sys.argv[1])
    runs = {"audiences_async, which is told no limit": seen(ours), "tenacity, random exponential waits": seen(blind)}
    seconds = max(requests[-1].at - requests[0].at for requests in runs.values()) + 0.2
    height = TOP + len(runs) * (HEIGHT + GAP) + 16
    head = f"{CALLS} calls at once, {RATE:g} requests/s granted, {BURST} at once: blue is 200, red is 429"
    body = [f'<text class="n" x="{LEFT}" y="24">{head}</text>']
    for number, (title, requests) in enumerate(runs.items()):
        body += panel(title, requests, seconds, TOP + number * (HEIGHT + GAP))
        print(f"{title}: {len(requests)} requests in {requests[-1].at - requests[0].at:.1f} s")
    foot = f"{environment().partition(';')[0]}, the sandbox on loopback"
    body.append(f'<text class="n" x="{LEFT}" y="{height - 10}">{foot}</text>')
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">'
    frame = f'<style>{STYLE}</style><rect class="p" width="{WIDTH}" height="{height}"/>'
    path.write_text("\n".join([svg, frame, *body, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
