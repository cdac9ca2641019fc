"""Jobs against a service whose limits, outages and load all accounts share: ours beside others, all with the defaults.

Run ``python benchmarks/service.py [--only NAME] [--rounds N] [--ours] [--json FILE]``; it needs nginx, and
``pip install --group bench``. Takes about half an hour; ``--quick`` tries everything with small numbers in a minute.

Each run has a server of its own, and every reply is checked. nginx has the limits that it can have; all else is
`faulty.py`. Requests are counted at the server.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import tenacity
from aiohttp_retry import JitterRetry, RetryClient
from attrs import Factory, define, frozen

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, whatever is installed
sys.path.append(str(Path(__file__).parent.parent / "tests"))

from common import environment, parser, save, table
from faulty import PLACE, Faults, template
from services import free_port

from audiences_async import Account, AudiencesClient, Fetched, Outcome
from audiences_async.events import AttemptStarted, Event

CONCURRENCY = 100
TIMEOUT = 60.0  # s, of each account
ATTEMPTS = 5
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
AUDIENCES = 2
DELAY = 0.05  # s, of the python server for each reply
RATE, BURST = 50, 5  # of all accounts together, in nginx
KEY_RATE = 2  # of each account beside it, without a burst
ASKED = 3  # times for each account, when both limits bite
PLACES, HELD = 10, 0.2  # connections at the same time, and seconds for each request
OUTAGE = 10.0  # s
WORKERS, WORK = 4, 1.0  # of the slow backend; s
QUICK_LIMIT = 4.0  # s, for any job with --quick
KINDS = ("503", "refused", "reset", "hang")

OURS, TENACITY, RETRY, BARE = "audiences_async", "tenacity", "aiohttp_retry", "bare aiohttp"

NGINX = """
{user} daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 4096; }}
http {{
  map $http_authorization $key {{ "~^Bearer (?<name>.+)$" $name; }}
  limit_req_zone $binary_remote_addr zone=all:1m rate={rate}r/s;
  limit_req_zone $http_authorization zone=keys:10m rate={key_rate}r/s;
  limit_conn_zone $binary_remote_addr zone=places:1m;
  log_format seen '$http_authorization $status $msec';
  access_log {folder}/seen seen;
  default_type application/json;
  keepalive_requests 1000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream behind {{ server 127.0.0.1:{behind}; keepalive 64; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    root {folder};
    location = /audiences {{
      limit_req_status {status}; limit_conn_status {status};
      {limits}
    }}
    location @answer {{ return 200 '{answer}'; }}
    location @refuse {{ add_header Retry-After 1 always; return {status} '{refusal}'; }}
  }}
}}
"""
SHARED_LIMIT = f"limit_req zone=all burst={BURST} nodelay;"
KEY_LIMIT = "limit_req zone=keys;"
ANSWER = "try_files /none @answer;"
PLACES_LIMIT = f"limit_conn places {PLACES}; proxy_http_version 1.1; proxy_set_header Connection '';"
PROXY = "proxy_pass http://behind;"


# What a run comes to


@define
class Run:
    """What became of one job, as its client and its server saw it.

    Attributes:
        keys: The accounts' keys, one for each outcome that is due.
        audiences: How many each account has.
        answered: When which key was answered.
        failures: Why the others failed.
        seconds: How long the job took.
        is_cut: Whether it was ended before its end.
        requests: The server's log: arrival, reply, key, status; times may be missing.
        outage: When the server's outage began and ended.
        attempts: When attempts started, if that was asked for.
    """

    keys: list[str]
    audiences: int
    answered: list[tuple[float, str]] = Factory(list)
    failures: Counter[str] = Factory(Counter)
    started: float = 0.0
    seconds: float = 0.0
    is_cut: bool = False
    requests: list[tuple[float, float, str, int]] = Factory(list)
    outage: tuple[float, float] = (0.0, 0.0)
    attempts: list[float] | None = None

    def take(self, key: str, ids: list[str]) -> None:
        """Note an answer, once its ids are the account's."""
        assert ids == [f"{key}-{number}" for number in range(self.audiences)], f"{key} was given {ids}"
        self.answered.append((time.monotonic(), key))

    def check(self) -> None:
        """Check that each account has exactly one outcome."""
        wanted, got = Counter(self.keys), Counter(key for _, key in self.answered)
        assert got <= wanted, f"answered more than once: {got - wanted}"
        assert self.is_cut or len(self.answered) + self.failures.total() == len(self.keys)

    @property
    def per_answer(self) -> float:
        """Requests that the server had for each answer."""
        return len(self.requests) / max(1, len(self.answered))


# Who does the job


async def ours(run: Run, base_url: str, client_options: dict[str, Any] | None = None) -> None:
    accounts = (Account(key, key) for key in run.keys)
    async with (
        AudiencesClient(base_url=base_url, **(client_options or {})) as client,
        client.stream(accounts, concurrency=CONCURRENCY, timeout=TIMEOUT) as outcomes,
    ):
        async for outcome in outcomes:
            note(run, outcome)


async def ours_counting(run: Run, base_url: str) -> None:
    """The same, and note when attempts start: a closed port cannot count them."""
    starts = run.attempts = []

    def on_event(event: Event) -> None:
        if isinstance(event, AttemptStarted):
            starts.append(time.monotonic())

    await ours(run, base_url, {"on_event": on_event})


async def ours_fetching(run: Run, base_url: str) -> None:
    """`fetch_all`, in which accounts come several times."""
    accounts = {key: Account(key, key) for key in run.keys}
    async with AudiencesClient(base_url=base_url) as client:
        outcomes = await client.fetch_all([accounts[key] for key in run.keys], concurrency=CONCURRENCY, timeout=TIMEOUT)
    assert [outcome.account.name for outcome in outcomes] == run.keys
    for outcome in outcomes:
        note(run, outcome)


def note(run: Run, outcome: Outcome) -> None:
    if isinstance(outcome, Fetched):
        run.take(outcome.account.name, [each.id for each in outcome.response])
    else:
        run.failures[f"{type(outcome.error).__name__}/{outcome.error.stop_reason}"] += 1


def ids_of(text: bytes) -> list[str]:
    return [each["id"] for each in msgspec.json.decode(text)["data"]]


async def gathered(run: Run, call: Callable[[str], Awaitable[list[str]]]) -> None:
    """A task for each account, behind a semaphore."""
    room = asyncio.Semaphore(CONCURRENCY)

    async def one(key: str) -> None:
        async with room:
            try:
                run.take(key, await call(key))
            except aiohttp.ClientResponseError as error:
                run.failures[str(error.status)] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                run.failures[type(error).__name__] += 1

    await asyncio.gather(*map(one, run.keys))


def session_options() -> dict[str, Any]:
    connector = aiohttp.TCPConnector(limit=CONCURRENCY)
    return {"connector": connector, "timeout": aiohttp.ClientTimeout(total=15.0), "raise_for_status": True}


def headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def bare(run: Run, base_url: str) -> None:
    async with aiohttp.ClientSession(**session_options()) as session:

        async def call(key: str) -> list[str]:
            async with session.get(f"{base_url}audiences", headers=headers(key)) as response:
                return ids_of(await response.read())

        await gathered(run, call)


def may_pass(error: BaseException) -> bool:
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in RETRIED
    return isinstance(error, aiohttp.ClientError | TimeoutError)


async def with_tenacity(run: Run, base_url: str) -> None:
    async with aiohttp.ClientSession(**session_options()) as session:

        @tenacity.retry(
            wait=tenacity.wait_random_exponential(1.0, 20.0),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            retry=tenacity.retry_if_exception(may_pass),
            reraise=True,
        )
        async def call(key: str) -> list[str]:
            async with session.get(f"{base_url}audiences", headers=headers(key)) as response:
                return ids_of(await response.read())

        await gathered(run, call)


async def with_aiohttp_retry(run: Run, base_url: str) -> None:
    options = JitterRetry(attempts=ATTEMPTS, start_timeout=1.0, max_timeout=20.0, statuses=set(RETRIED))
    async with RetryClient(retry_options=options, **session_options()) as session:

        async def call(key: str) -> list[str]:
            async with session.get(f"{base_url}audiences", headers=headers(key)) as response:
                return ids_of(await response.read())

        await gathered(run, call)


Peer = Callable[[Run, str], Awaitable[None]]
PEERS: dict[str, Peer] = {OURS: ours, TENACITY: with_tenacity, RETRY: with_aiohttp_retry, BARE: bare}


# What they do it against


Server = Callable[[Run, int], contextlib.AbstractContextManager[str]]  # its base URL; fills in the run's log


@contextlib.contextmanager
def faulty(run: Run, number: int, *, faults: Faults, is_behind: bool = False) -> Iterator[str]:
    """Run `faulty.py`; behind another server, its log is not the run's."""
    settings = json.dumps(asdict(faults) | {"seed": number})
    command = [sys.executable, str(Path(__file__).with_name("faulty.py")), settings]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/"
            report = json.loads(process.communicate("\n", timeout=30.0)[0])
        finally:
            process.kill()
    if not is_behind:
        run.requests = [tuple(each) for each in report["log"]]
        run.outage = tuple(report["outage"])


@contextlib.contextmanager
def nginx(
    run: Run,
    number: int,
    *,
    status: int,
    limits: tuple[str, ...],
    key_rate: int = KEY_RATE,
    named_wait: bool = False,
    held: float | None = None,
) -> Iterator[str]:
    """Run nginx with these limits; in front of a server that needs *held* seconds, or else answering itself."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        behind = 9  # nobody is asked there
        if held is not None:
            server = faulty(run, number, faults=Faults(audiences=AUDIENCES, delay=held), is_behind=True)
            behind = int(stack.enter_context(server).rstrip("/").rpartition(":")[2])
        refuse = f"error_page {status} @refuse;" if named_wait else ""
        lines = (*limits, refuse, ANSWER if held is None else PROXY)
        with running_nginx(folder, status, behind, "\n      ".join(lines), key_rate) as base_url:
            yield base_url
        run.requests = nginx_log(folder)


@contextlib.contextmanager
def running_nginx(folder: Path, status: int, behind: int, limits: str, key_rate: int) -> Iterator[str]:
    port = free_port()
    settings = {"folder": folder, "port": port, "behind": behind, "status": status, "limits": limits}
    settings |= {"rate": RATE, "key_rate": key_rate, "user": "user root;" if os.geteuid() == 0 else ""}
    settings |= {"answer": nginx_body(200), "refusal": nginx_body(status)}
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(**settings))
    process = subprocess.Popen(["nginx", "-c", str(config), "-e", str(folder / "errors")])
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def nginx_body(status: int) -> str:
    """The body of a reply, in which nginx puts the key."""
    return template(status, AUDIENCES).partition(b"\r\n\r\n")[2].replace(PLACE, b"${key}").decode()


def nginx_log(folder: Path) -> list[tuple[float, float, str, int]]:
    lines = (line.split() for line in (folder / "seen").read_text().splitlines())
    return [(0.0, 0.0, line[1], int(line[2])) for line in lines if line[0] == "Bearer"]


def wait_for(port: int) -> None:
    for _ in range(500):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise TimeoutError(f"nothing listens on port {port}")


# The situations


@frozen
class Row:
    """A job in one situation, by one or several peers.

    Attributes:
        title: What the table calls it.
        keys: The accounts' keys.
        server: What the job runs against.
        peers: Who does it, by name.
        ideal: Seconds, from the reference run of the same round if there is one; ``None`` if nothing bounds it.
        figures: What else is shown, from the run and the reference run.
        base: Title and peer of the reference.
        limit: Seconds after which the job is ended.
        audiences: How many the server has for each account.
    """

    title: str
    keys: list[str]
    server: Server
    peers: dict[str, Peer]
    ideal: Callable[[Run | None], float | None] = lambda _: None
    figures: Callable[[Run, Run | None], dict[str, float]] = lambda _run, _base: {}
    base: tuple[str, str] | None = None
    limit: float = 120.0
    audiences: int = AUDIENCES


@frozen
class Sizes:
    """How large everything is; ``None`` for *accounts* means each situation's own number."""

    is_quick: bool = False
    only_ours: bool = False
    accounts: int | None = None

    def count(self, usual: int, quick: int) -> int:
        """The number of accounts of a situation."""
        return self.accounts or (quick if self.is_quick else usual)

    @property
    def statuses(self) -> tuple[int, ...]:
        """What a limit answers."""
        return (429,) if self.is_quick else (429, 503)

    def pick(self, *names: str) -> dict[str, Peer]:
        """The peers with these names, if they are wanted."""
        return {name: PEERS[name] for name in names if name == OURS or not self.only_ours}


def keys(count: int, bad_every: int = 0) -> list[str]:
    """The keys of so many accounts; every so many of them are bad."""
    return [f"{'bad' if bad_every and number % bad_every == 0 else 'acc'}-key-{number:06}" for number in range(count)]


def refused(run: Run, _: Run | None = None) -> dict[str, float]:
    return {"refused": sum(status in {429, 503} for *_, status in run.requests)}


def rate(sizes: Sizes, *, named_wait: bool = False) -> list[Row]:
    """A rate that all accounts share."""
    count = sizes.count(1000, 40)
    peers = sizes.pick(OURS) if sizes.is_quick and named_wait else sizes.pick(*PEERS)
    also = ", Retry-After: 1" if named_wait else ""
    return [
        Row(
            f"{RATE}/s shared, {status}{also}",
            keys(count),
            partial(nginx, status=status, limits=(SHARED_LIMIT,), named_wait=named_wait),
            peers,
            lambda _: (count - BURST - 1) / RATE,
            refused,
        )
        for status in sizes.statuses
    ]


def both(sizes: Sizes) -> list[Row]:
    """A shared limit and limits of each account, each account asked several times."""
    asked = [key for key in keys(sizes.count(200, 16)) for _ in range(ASKED)]
    title = f"{RATE}/s shared, {KEY_RATE}/s for each account, asked {ASKED} times"
    server = partial(nginx, status=429, limits=(SHARED_LIMIT, KEY_LIMIT))
    shared, own = (len(asked) - BURST - 1) / RATE, (ASKED - 1) / KEY_RATE
    return [Row(title, asked, server, {OURS: ours_fetching}, lambda _: max(shared, own), refused)]


def connections(sizes: Sizes) -> list[Row]:
    """A number of requests in flight that all accounts share."""
    count = sizes.count(500, 40)
    peers = sizes.pick(OURS) if sizes.is_quick else sizes.pick(*PEERS)
    return [
        Row(
            f"{PLACES} connections of {HELD} s, {status}",
            keys(count),
            partial(nginx, status=status, limits=(PLACES_LIMIT,), held=HELD),
            peers,
            lambda _: count / PLACES * HELD,
            refused,
        )
        for status in sizes.statuses
    ]


def outage(sizes: Sizes) -> list[Row]:
    """An outage in the middle of a job."""
    count, lasts = sizes.count(10_000, 600), 1.0 if sizes.is_quick else OUTAGE
    plain = f"{count:,} accounts, no outage"
    rows = [Row(plain, keys(count), partial(faulty, faults=Faults(delay=DELAY)), {OURS: ours_counting})]
    for kind in KINDS:
        faults = Faults(delay=DELAY, outage=kind, outage_after=count // 2, outage_seconds=lasts)
        rows.append(
            Row(
                f"outage of {lasts:g} s: {kind}",
                keys(count),
                partial(faulty, faults=faults),
                {OURS: ours_counting},
                lambda base: base.seconds + lasts,
                outage_figures,
                (plain, OURS),
            )
        )
    return rows


def outage_figures(run: Run, base: Run | None) -> dict[str, float]:
    """Requests in the outage (attempts, where the port was closed), and seconds from its end to the first answer."""
    begun, ended = run.outage
    assert begun, "there was no outage"
    ended = ended or math.inf  # the job ended before
    arrived = sum(begun < arrival < ended for arrival, *_ in run.requests)
    started = sum(begun < start < ended for start in run.attempts)
    answers = [done for _, done, _, status in run.requests if status == 200 and done > ended]
    first = min(answers) - ended if answers else math.nan
    return {
        "requests in the outage": arrived,
        "attempts in the outage": started,
        "s to first answer": first,
        "s without outage": base.seconds,
    }


def slow(sizes: Sizes) -> list[Row]:
    """A backend that works on a few requests at a time, also on those whose client has gone."""
    count, work = sizes.count(200, 60), 0.1 if sizes.is_quick else WORK
    server = partial(faulty, faults=Faults(workers=WORKERS, work=work))
    title = f"slow backend, {WORKERS} workers of {work:g} s"
    ideal = count * work / WORKERS
    return [Row(title, keys(count), server, {OURS: ours}, lambda _: ideal, wasted, limit=max(120.0, 4 * ideal))]


def wasted(run: Run, _: Run | None) -> dict[str, float]:
    """The share of the requests for which the server worked, or will, without anybody to answer."""
    unanswered = sum(status == 0 for *_, status in run.requests)
    return {"% of the work wasted": 100 * unanswered / max(1, len(run.requests))}


def errors(sizes: Sizes) -> list[Row]:
    """503s at random."""
    count = sizes.count(3000, 300)
    shares = (0.1,) if sizes.is_quick else (0.1, 0.2, 0.3)
    return [
        Row(
            f"{share:.0%} random 503s",
            keys(count),
            partial(faulty, faults=Faults(delay=DELAY, share=share)),
            sizes.pick(*PEERS),
            figures=partial(retried, share),
        )
        for share in shares
    ]


def retried(share: float, run: Run, _: Run | None) -> dict[str, float]:
    return {"requests / independent retries": run.per_answer * (1 - share)}


def failing(sizes: Sizes) -> list[Row]:
    """Accounts that always fail, among healthy ones; and the same job without them.

    With the shorter delay, the cores of a small machine are full, and what a failure costs them counts too.
    """
    count, rows = sizes.count(3000, 200), []
    for delay, every in product((DELAY, 2 * DELAY), (20, 5)):
        given = keys(count, every)
        healthy = [key for key in given if not key.startswith("bad")]
        after = f"replies after {delay * 1e3:g} ms"
        plain = f"{len(healthy):,} healthy accounts alone, {after}"
        rows.append(Row(plain, healthy, partial(faulty, faults=Faults(delay=delay)), {OURS: ours}))
        rows += [
            Row(
                f"{100 // every} % of {count:,} always {status}, {after}",
                given,
                partial(faulty, faults=Faults(delay=delay, bad_status=status)),
                {OURS: ours},
                figures=partial(healthy_ones, len(healthy)),
                base=(plain, OURS),
                limit=1.5 if sizes.is_quick else 90.0,
            )
            for status in (500, 429)
        ]
    return rows


def healthy_ones(count: int, run: Run, base: Run | None) -> dict[str, float]:
    """Healthy accounts that were not answered, and the time until the last that was beside the job without bad ones."""
    last = max((moment for moment, _ in run.answered), default=math.nan) - run.started
    bad = sum(key.startswith("bad") for _, _, key, _ in run.requests)
    return {
        "healthy ones failed": count - len(run.answered),
        "s to last healthy": last,
        "last healthy / alone": last / base.seconds,
        "requests of bad ones / bad account": bad / (len(run.keys) - count),
    }


def unlimited(sizes: Sizes) -> list[Row]:
    """No limit at all: throughput."""
    count = sizes.count(6000, 1000)
    rows = []
    for delay in (0.0, DELAY):
        title = f"no limit, replies after {delay * 1e3:g} ms"
        server = partial(faulty, faults=Faults(audiences=20, delay=delay))
        peers = {OURS: ours, BARE: bare}
        rows.append(
            Row(title, keys(count), server, peers, lambda base: base.seconds, throughput, (title, BARE), audiences=20)
        )
    return rows


def throughput(run: Run, _: Run | None) -> dict[str, float]:
    return {"accounts/s": len(run.answered) / run.seconds}


SITUATIONS: dict[str, Callable[[Sizes], list[Row]]] = {
    "rate": rate,
    "retry-after": partial(rate, named_wait=True),
    "both": both,
    "connections": connections,
    "outage": outage,
    "slow": slow,
    "errors": errors,
    "failing": failing,
    "unlimited": unlimited,
}


# Running them, and the table


Runs = dict[tuple[str, str], list[Run]]


def run_all(rows: list[Row], rounds: int, limit: float) -> Runs:
    """Run every row with every peer, interleaved; odd rounds in the other order."""
    runs: Runs = {(row.title, name): [] for row in rows for name in row.peers}
    turns = [(row, name) for row in rows for name in row.peers]
    for number in range(rounds):
        for row, name in reversed(turns) if number % 2 else turns:
            run = run_one(row, name, number, limit)
            runs[row.title, name].append(run)
            failures = ", ".join(f"{count} {why}" for why, count in run.failures.most_common(3))
            print(f"  {row.title}; {name}: {len(run.answered)} in {run.seconds:.1f} s; {failures}", file=sys.stderr)
    return runs


def run_one(row: Row, name: str, number: int, limit: float) -> Run:
    """Run one job against a server of its own, for at most *limit* seconds."""
    run = Run(row.keys, row.audiences)
    gc.collect()
    with row.server(run, number) as base_url:
        asyncio.run(bounded(run, row.peers[name](run, base_url), min(row.limit, limit)))
    run.check()
    return run


async def bounded(run: Run, job: Awaitable[None], limit: float) -> None:
    """Time a job, and end it after *limit* seconds."""
    run.started = time.monotonic()
    try:
        async with asyncio.timeout(limit) as bound:
            await job
    except TimeoutError:
        if not bound.expired():
            raise
        run.is_cut = True
    finally:
        run.seconds = time.monotonic() - run.started


def tabulate(row: Row, name: str, runs: Runs) -> dict[str, Any]:
    """The figures of all rounds of one row and peer."""
    taken = runs[row.title, name]
    bases = [None] * len(taken) if row.base is None else runs[row.base]
    figures: dict[str, list[float | None]] = {}
    for run, base in zip(taken, bases, strict=True):
        ideal = row.ideal(base)
        found = {"s": run.seconds, "time / ideal": run.seconds / ideal if ideal else math.nan}
        found |= {"requests / answer": run.per_answer} | row.figures(run, base)
        for key, value in found.items():
            figures.setdefault(key, []).append(None if math.isnan(value) else value)
    return {
        "situation": row.title,
        "peer": name,
        "total": len(row.keys),
        "answered": [len(run.answered) for run in taken],
        "cut": [run.is_cut for run in taken],
        "failures": [dict(run.failures) for run in taken],
        "figures": figures,
    }


def figures(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield times beside the ideal, if there is one, and requests beside one for each answer, for `save`."""
    for title in dict.fromkeys(record["situation"] for record in records):
        rows = [record for record in records if record["situation"] == title]
        what = f"{title}, {rows[0]['total']:,} accounts"
        found = {row["peer"]: row["figures"] for row in rows}
        first = found[rows[0]["peer"]]
        if None not in first["time / ideal"]:
            ideal = [taken / ratio for taken, ratio in zip(first["s"], first["time / ideal"], strict=True)]
            times = {peer: figure["s"] for peer, figure in found.items()}
            yield from table(f"time, {what}", "ideal", {"ideal": ideal} | times, "s")
        asked = {peer: figure["requests / answer"] for peer, figure in found.items()}
        ones = {"ideal": [1.0] * len(first["s"])}
        yield from table(f"requests for an answer, {what}", "ideal", ones | asked, "requests")


def spread(values: list[float | None], digits: int = 2) -> str:
    if None in values:
        return "-"
    digits = 0 if all(isinstance(value, int) for value in values) else digits
    shown = f"{statistics.median(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def show(record: dict[str, Any]) -> None:
    """Print one line of the table, and one with what else there is."""
    figures = dict(record["figures"])
    took, ratio, asked = (figures.pop(key) for key in ("s", "time / ideal", "requests / answer"))
    answered = f"{min(record['answered'])}/{record['total']}" + ("*" if any(record["cut"]) else "")
    line = f"{record['situation']:46} {record['peer']:16} {answered:>12} {spread(took, 1):>20}"
    print(f"{line} {spread(ratio):>18} {spread(asked):>20}")
    failed: Counter[str] = sum(map(Counter, record["failures"]), Counter())
    also = [f"{key} {spread(values)}" for key, values in figures.items()]
    also += [f"failed {count / len(record['failures']):.4g} {why}" for why, count in failed.most_common(4)]
    if also:
        print(f"    {'; '.join(also)}")


def options() -> argparse.Namespace:
    command = parser(__doc__.partition("\n")[0])
    command.add_argument("--only", action="append", choices=SITUATIONS, help="this situation; may be given again")
    command.add_argument("--rounds", type=int, help="rounds of each (default: 3; with --quick 1)")
    command.add_argument("--accounts", type=int, metavar="N", help="accounts of each job, instead of its own number")
    command.add_argument("--ours", action="store_true", help="leave out the others where they are only beside ours")
    command.add_argument("--quick", action="store_true", help="small numbers, to try it out")
    return command.parse_args()


def main() -> None:
    given = options()
    sizes = Sizes(is_quick=given.quick, only_ours=given.ours, accounts=given.accounts)
    rounds = given.rounds or (1 if given.quick else 3)
    records = []
    for name in given.only or SITUATIONS:
        started = time.monotonic()
        rows = SITUATIONS[name](sizes)
        runs = run_all(rows, rounds, QUICK_LIMIT if given.quick else math.inf)
        records += [tabulate(row, peer, runs) for row in rows for peer in row.peers]
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(f"{environment('aiohttp_retry')}; {rounds} rounds, concurrency {CONCURRENCY}; *: ended before its end")
    heads = f"{'answered':>12} {'s':>20} {'time / ideal':>18} {'requests / answer':>20}"
    print(f"{'situation':46} {'peer':16} {heads}   median (min-max)")
    for record in records:
        show(record)
    save(given.json, figures(records), "aiohttp_retry", runs=records)


if __name__ == "__main__":
    main()
