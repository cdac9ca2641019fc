"""What one client still holds after 100,000 calls: traced memory, objects, tasks and open files.

Run ``python benchmarks/growth.py [--calls N] [--json FILE]``. Takes about four minutes, for tracing slows every
allocation; exits with 1 where what is held grew by more than 64 KiB.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, count
from multiprocessing.connection import Connection
from typing import Any

from common import environment, in_parallel, parser, save, table

from audiences_async import Account, AudiencesClient, UnauthorizedError
from audiences_async.sandbox import Sandbox

CALLS = 100_000
WARM_UP = 5_000
ACCOUNTS = 10_000
AT_ONCE = 20
MAX_GROWTH = 64 * 1024  # bytes
TIME_LIMIT = 900.0  # s, for any single case
SHOWN = 8  # lines that grew most, where there was too much growth


def names(accounts: int) -> list[str]:
    return [f"account-{number:05}" for number in range(accounts)]


def _serve(accounts: int, ours: Connection) -> None:
    with Sandbox() as sandbox:
        for name in names(accounts):
            sandbox.add_account(name)
        ours.send(sandbox.base_url)
        while not ours.poll(0.2):
            sandbox.requests.clear()  # the record of so many would be the largest thing on this machine


@contextlib.contextmanager
def service(accounts: int) -> Iterator[str]:
    """The base URL of a sandbox, in a process of its own, with so many accounts."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(accounts, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(60.0), "the server did not start"
        yield ours.recv()
        ours.send("stop")
        process.join(10.0)
    finally:
        process.terminate()
        process.join()


def round_robin(client: AudiencesClient, accounts: int) -> Callable[[], Awaitable[None]]:
    """A call for each account in turn."""
    given = [Account(name, f"sandbox-key-{name}") for name in names(accounts)]
    numbers = count()

    async def call() -> None:
        assert len(await client.get_audiences(given[next(numbers) % accounts])) == 2

    return call


def in_trouble(client: AudiencesClient, accounts: int) -> Callable[[], Awaitable[None]]:
    """A call that is answered, one that is refused, and one that is cancelled after some turns of the event loop."""
    sound = round_robin(client, accounts)
    stranger = Account("stranger", "no key of anybody")
    numbers = count()

    async def call() -> None:
        number = next(numbers)
        if number % 3 == 0:
            await sound()
        elif number % 3 == 1:
            with contextlib.suppress(UnauthorizedError):
                await client.get_audiences(stranger)
        else:
            task = asyncio.create_task(sound())
            for _ in range(number % 13):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

    return call


CASES: dict[str, tuple[Callable[[AudiencesClient, int], Callable[[], Awaitable[None]]], int]] = {
    "one account": (round_robin, 1),
    f"{ACCOUNTS:,} accounts in turn": (round_robin, ACCOUNTS),
    "one account, a third refused, a third cancelled": (in_trouble, 1),
}


def held() -> dict[str, int]:
    """What this process holds, once what can be collected is."""
    while gc.collect():
        pass
    return {
        "bytes": tracemalloc.get_traced_memory()[0],
        "objects": len(gc.get_objects()),
        "tasks": len(asyncio.all_tasks()),
        "files": len(os.listdir("/dev/fd")),  # noqa: PTH208 - as long as the listing is open it counts itself
    }


def measured(case: str, base_url: str, warm_up: int, calls: int) -> dict[str, Any]:
    """The whole case, in a process of its own."""

    async def job() -> dict[str, Any]:
        make, accounts = CASES[case]
        async with asyncio.timeout(TIME_LIMIT), AudiencesClient(base_url=base_url) as client:
            call = make(client, accounts)
            await in_parallel(call, warm_up, AT_ONCE)
            gc.collect()
            was = tracemalloc.take_snapshot()
            before = held()  # the snapshot included, for that is held to the end
            started = time.perf_counter()
            await in_parallel(call, calls, AT_ONCE)
            took = time.perf_counter() - started
            after = held()
            grown = tracemalloc.take_snapshot().compare_to(was, "lineno")[:SHOWN]
            return {"before": before, "after": after, "seconds": took, "lines": [str(line) for line in grown]}

    tracemalloc.start()
    return asyncio.run(job())


def case_of(case: str, calls: int) -> dict[str, Any]:
    accounts = CASES[case][1]
    warm_up = max(WARM_UP, accounts)  # each account once
    with (
        service(accounts) as base_url,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child,
    ):
        found = child.submit(measured, case, base_url, warm_up, calls).result()
    before, after = found["before"], found["after"]
    growth = {name: after[name] - before[name] for name in before}
    shown = "  ".join(f"{name} {before[name]:,} {growth[name]:+,}" for name in before)
    print(f"{case:48} {calls:,} calls in {found['seconds']:.0f} s after {warm_up:,}:  {shown}")
    if growth["bytes"] > MAX_GROWTH:
        print("\n".join(f"  {line}" for line in found["lines"]))
    return {
        "case": case,
        "calls": calls,
        "warm_up": warm_up,
        **found,
        "growth": growth,
    }


def figures(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what one case held before and after, for `save`."""
    for name in run["before"]:
        held = {moment: [run[moment][name]] for moment in ("before", "after")}
        yield from table(f"{name} held, {run['case']}, {run['calls']:,} calls", "before", held, name)


def main() -> None:
    command = parser(__doc__.partition("\n")[0])
    command.add_argument("--calls", type=int, default=CALLS, help=f"calls of each case (default: {CALLS:,})")
    options = command.parse_args()
    print(environment())
    runs = [case_of(case, options.calls) for case in CASES]
    save(options.json, chain.from_iterable(map(figures, runs)), runs=runs)
    most = max(run["growth"]["bytes"] for run in runs)
    print(f"largest growth of traced memory: {most:+,} bytes, the goal is {MAX_GROWTH:,} or less")
    sys.exit(most > MAX_GROWTH)


if __name__ == "__main__":
    main()
