"""Concurrent calls on one account under each kind of rate limit: time and requests, ours beside blind backoff.

Run ``python benchmarks/pacing.py [--only NAME] [--rounds N] [--quick] [--json FILE] [--markdown]``; it needs nginx, and
``pip install --group bench``. Takes 25 minutes, of which ``fixed-long`` takes 9; ``--quick`` takes a minute and a half.
``--markdown`` also prints the table of README; ``--from FILE`` prints the tables of earlier runs instead of measuring.

nginx enforces the leaky bucket, `limiters.py` the other limits. No reply has ``Retry-After`` or ``RateLimit`` headers.
The ideal time of each limit is defined in `limiters.py`. Each run has a new server in a separate process, which counts
the requests. Every reply is checked.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import tenacity
from aiohttp_retry import JitterRetry, RetryClient
from attrs import frozen

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, even if another one is installed
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import service
from common import body, environment, parser, save, table
from faulty import Faults
from limiters import FixedWindow, SlidingWindow, TokenBucket
from service import AUDIENCES, Run, Server, bounded, headers, ids_of, spread
from services import Nginx, nginx

from audiences_async import Account, AudiencesClient, AudiencesError, RateLimit
from audiences_async._base.deadlines import CallTime, Deadlines
from audiences_async._pace.pacer import Pacer
from audiences_async._pace.pacing import ANSWERED
from audiences_async.clock import Clock

RATE, BURST = 20, 5  # nginx grants BURST + 1 at once
PHASES = (0.25, 0.5, 0.75)  # how much of a fixed window has passed before the first request, by round
TIMEOUT = 60.0  # s for each call of any peer, our default; LONGEST times the ideal if that is more
LONGEST = 4.0
TURNS = 50_000

OURS, KNOWN, TENACITY, RETRY = "audiences_async", "audiences_async, known", "tenacity", "aiohttp_retry"
IN_README = (OURS, TENACITY)
Limit = TokenBucket | FixedWindow | SlidingWindow


@frozen
class Case:
    """Concurrent calls under one limit.

    Attributes:
        title: Its name in the tables.
        calls: Number of calls.
        quick_calls: Number of calls with ``--quick``; 0 leaves the case out.
        limit: Returns the limit of a round.
        known: The limit for a client that knows it. `RateLimit` cannot express a window: it spreads the requests.
        is_nginx: Whether nginx enforces the limit.
    """

    title: str
    calls: int
    quick_calls: int
    limit: Callable[[int], Limit]
    known: RateLimit
    is_nginx: bool = False

    def server(self, number: int) -> Server:
        """Return the server of a round."""
        if self.is_nginx:
            limits = (f"limit_req zone=keys burst={BURST} nodelay;",)
            return partial(service.nginx, status=429, limits=limits, key_rate=RATE)
        limit = self.limit(number)
        return partial(
            service.faulty,
            faults=Faults(audiences=AUDIENCES, limit=type(limit).__name__, limit_settings=asdict(limit)),
        )


def window(limit: int, seconds: float) -> Callable[[int], FixedWindow]:
    """Return fixed windows; the alignment differs from round to round."""
    return lambda number: FixedWindow(limit, seconds, elapsed=PHASES[number % len(PHASES)] * seconds)


def same(limit: Limit) -> Callable[[int], Limit]:
    return lambda _: limit


CASES = {
    "leaky": Case(
        "leaky bucket (nginx), 20/s, burst 5",
        200,
        40,
        same(TokenBucket(RATE, BURST + 1)),
        RateLimit(RATE, burst=BURST),
        is_nginx=True,
    ),
    "token": Case("token bucket, 20/s, capacity 10", 200, 40, same(TokenBucket(20, 10)), RateLimit(20, burst=10)),
    "fixed": Case("fixed window, 10 per 2 s", 100, 20, window(10, 2.0), RateLimit(10, per=2.0)),
    "fixed-long": Case("fixed window, 60 per 10 s", 240, 0, window(60, 10.0), RateLimit(60, per=10.0)),
    "sliding": Case("sliding window, 10 per 2 s", 100, 20, same(SlidingWindow(10, 2.0)), RateLimit(10, per=2.0)),
}


# Who makes the calls


async def ours(run: Run, base_url: str, seconds: float, limit: RateLimit | None = None) -> None:
    (key,) = set(run.keys)
    async with AudiencesClient(key, base_url=base_url, rate_limit=limit, timeout=seconds) as client:

        async def call() -> None:
            try:
                run.take(key, [each.id for each in await client.get_audiences()])
            except AudiencesError as error:
                run.failures[f"{type(error).__name__}/{error.stop_reason}"] += 1

        await asyncio.gather(*(call() for _ in run.keys))


async def with_tenacity(run: Run, base_url: str, seconds: float) -> None:
    (key,) = set(run.keys)
    async with aiohttp.ClientSession(headers=headers(key), raise_for_status=True) as session:

        @tenacity.retry(
            wait=tenacity.wait_random_exponential(1.0, 20.0),
            stop=tenacity.stop_after_delay(seconds),
            retry=tenacity.retry_if_exception_type(aiohttp.ClientError),
        )
        async def fetch() -> list[str]:
            async with session.get(f"{base_url}audiences") as response:
                return ids_of(await response.read())

        async def call() -> None:
            try:
                run.take(key, await fetch())
            except tenacity.RetryError:
                run.failures["RetryError"] += 1

        await asyncio.gather(*(call() for _ in run.keys))


async def with_aiohttp_retry(run: Run, base_url: str, seconds: float) -> None:
    (key,) = set(run.keys)
    options = JitterRetry(attempts=20, start_timeout=1.0, max_timeout=20.0, random_interval_size=2.0, statuses={429})
    async with RetryClient(retry_options=options, headers=headers(key)) as session:

        async def call() -> None:
            try:
                async with asyncio.timeout(seconds), session.get(f"{base_url}audiences") as response:
                    text = await response.read()
            except TimeoutError:
                run.failures["TimeoutError"] += 1
                return
            if response.status == 200:
                run.take(key, ids_of(text))
            else:
                run.failures[str(response.status)] += 1

        await asyncio.gather(*(call() for _ in run.keys))


def peers(case: Case) -> dict[str, Callable[[Run, str, float], Awaitable[None]]]:
    return {OURS: ours, KNOWN: partial(ours, limit=case.known), TENACITY: with_tenacity, RETRY: with_aiohttp_retry}


# Measuring


def run_one(case: Case, peer: str, number: int, calls: int) -> tuple[Run, float]:
    """Run one round of one peer; return it and its ideal."""
    run, ideal = Run(["acc-key-000001"] * calls, AUDIENCES), case.limit(number).ideal(calls)
    seconds = max(TIMEOUT, LONGEST * ideal)
    with case.server(number)(run, number) as base_url:
        asyncio.run(bounded(run, peers(case)[peer](run, base_url, seconds), seconds + 10.0))
    run.check()
    granted = sum(status == 200 for *_, status in run.requests)
    assert granted >= len(run.answered), f"{len(run.answered)} answers, of which the server knows {granted}"
    return run, ideal


def measure(name: str, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Run all peers of a case, interleaved, and odd rounds in the other order."""
    case, runs = CASES[name], {peer: list[tuple[Run, float]]() for peer in peers(CASES[name])}
    for number in range(rounds):
        for peer in reversed(runs) if number % 2 else runs:
            run, ideal = run_one(case, peer, number, calls)
            runs[peer].append((run, ideal))
            print(f"  {case.title}; {peer}: {len(run.answered)} in {run.seconds:.1f} s", file=sys.stderr)
    return [
        {
            "case": name,
            "limit": case.title,
            "peer": peer,
            "calls": calls,
            "answered": [len(run.answered) for run, _ in taken],
            "failures": [dict(run.failures) for run, _ in taken],
            "s": [run.seconds for run, _ in taken],
            "ideal": [ideal for _, ideal in taken],
            "time / ideal": [run.seconds / ideal for run, ideal in taken],
            "requests / answer": [run.per_answer for run, _ in taken],
        }
        for peer, taken in runs.items()
    ]


def figures(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield times beside the ideal, and requests beside one for each answer, for `save`."""
    for title in dict.fromkeys(record["limit"] for record in records):
        rows = [record for record in records if record["limit"] == title]
        what = f"{title}, {rows[0]['calls']} calls"
        times = {"ideal": rows[0]["ideal"]} | {row["peer"]: row["s"] for row in rows}
        yield from table(f"time, {what}", "ideal", times, "s")
        asked = {"ideal": [1.0] * len(rows[0]["s"])} | {row["peer"]: row["requests / answer"] for row in rows}
        yield from table(f"requests for an answer, {what}", "ideal", asked, "requests")


def show(records: list[dict[str, Any]]) -> None:
    """Print the figures and their spread."""
    print(f"{'limit':38} {'peer':24} {'answered':>8} {'time / ideal':>20} {'requests / answer':>20}   median (min-max)")
    for record in records:
        answered = f"{min(record['answered'])}/{record['calls']}"
        figures = " ".join(f"{spread(record[figure]):>20}" for figure in ("time / ideal", "requests / answer"))
        print(f"{record['limit']:38} {record['peer']:24} {answered:>8} {figures}")
        failed: Counter[str] = sum(map(Counter, record["failures"]), Counter())
        if failed:
            print(f"    in all rounds failed: {', '.join(f'{count} {why}' for why, count in failed.most_common())}")


def markdown(records: list[dict[str, Any]]) -> str:
    """Return the table of README; ``*`` marks a peer of which calls failed, with a note below the table."""
    heads = " | ".join(f"{peer}: time / ideal | requests / answer" for peer in IN_README)
    lines = [f"| limit of the account | {heads} |", f"{'|---' * (1 + 2 * len(IN_README))}|"]
    notes: list[str] = []
    for title, calls in dict.fromkeys((record["limit"], record["calls"]) for record in records):
        cells = [f"{title}; {calls} calls"]
        for peer in IN_README:
            (record,) = (each for each in records if (each["limit"], each["peer"]) == (title, peer))
            missed = len(record["answered"]) * calls - sum(record["answered"])
            mark = "*" if missed else ""
            if missed:
                notes.append(f"*: {missed} of {len(record['answered']) * calls} calls failed ({peer}, {title})")
            cells.append(f"{statistics.median(record['time / ideal']):.2f}{mark}")
            cells.append(f"{statistics.median(record['requests / answer']):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *notes])


# Several accounts, and no limit at all


async def together(server: Nginx) -> None:
    """Call five accounts at once, beside one that is always refused."""
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
            with contextlib.suppress(AudiencesError):
                await client.get_audiences(Account("blocked", "blocked"))

        blocked = [asyncio.create_task(refused()) for _ in range(calls)]
        await asyncio.gather(*map(job, names))
        for task in blocked:
            task.cancel()
    ideal = TokenBucket(RATE, BURST + 1).ideal(calls)
    print(f"\n5 accounts of {calls} calls at once, beside one that is always refused; time / ideal of each:")
    print("  " + ", ".join(f"{took[name] / ideal:.3f}" for name in names))
    print(f"  requests of the refused account: {len(server.statuses('blocked'))} for {calls} calls")


async def uncontended() -> None:
    """Print the cost of acquiring and releasing a turn that is free."""
    for limit in (RateLimit(1e8, burst=1000), None):
        deadlines, clock = Deadlines(), Clock()
        pacer = Pacer(
            limit,
            None,
            connections=100,
            attempt_timeout=15.0,
            throttle_base_delay=1.0,
            max_delay=20.0,
            clock=clock,
            deadlines=deadlines,
            on_event=None,
        )
        lane = pacer.lane(Account("north", "key"))
        costs = []
        with deadlines.within(3600.0) as scope:
            call_time = CallTime(clock.monotonic, scope, 3600.0)
            for _ in range(7):
                started = time.perf_counter()
                for _ in range(TURNS):
                    pacer.release(lane, await pacer.acquire(lane, call_time, None), ANSWERED)
                costs.append((time.perf_counter() - started) / TURNS * 1e6)
        print(f"uncontended, {'learning' if limit is None else 'known rate'}: {spread(costs)} us for a turn")


@contextlib.contextmanager
def limited() -> Iterator[Nginx]:
    with tempfile.TemporaryDirectory() as folder, nginx(Path(folder), body(20), rate=RATE, burst=BURST) as server:
        yield server


def options() -> argparse.Namespace:
    command = parser(__doc__.partition("\n")[0])
    choices = (*CASES, "together", "uncontended")
    command.add_argument("--only", action="append", choices=choices, help="this measurement; may be repeated")
    command.add_argument("--rounds", type=int, help="rounds of each (default: 3; with --quick 1)")
    command.add_argument("--quick", action="store_true", help="small numbers, to try it out")
    command.add_argument("--markdown", action="store_true", help="also print the table of README")
    command.add_argument(
        "--from",
        type=Path,
        action="append",
        dest="sources",
        metavar="FILE",
        help="read this file instead of measuring; may be repeated",
    )
    return command.parse_args()


def main() -> None:
    given = options()
    wanted = given.only or [*CASES, "together", "uncontended"]
    rounds = given.rounds or (1 if given.quick else 3)
    records: list[dict[str, Any]] = []
    for source in given.sources or ():
        records += json.loads(source.read_text(encoding="utf-8"))["runs"]
    records.sort(key=lambda record: list(CASES).index(record["case"]))
    for name in wanted if not given.sources else ():
        if name in CASES and (calls := CASES[name].quick_calls if given.quick else CASES[name].calls):
            records += measure(name, rounds, calls)
    if records:
        print(environment("aiohttp_retry"))
        show(records)
        save(given.json, figures(records), "aiohttp_retry", runs=records)
    if given.markdown:
        print(f"\n{markdown(records)}")
    if given.sources:
        return
    if "together" in wanted:
        with limited() as server:
            asyncio.run(together(server))
    if "uncontended" in wanted:
        asyncio.run(uncontended())


if __name__ == "__main__":
    main()
