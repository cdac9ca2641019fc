"""Fetch many accounts on several machines, with Docket and Redis (extra ``docket``).

A task is a chunk of account *names*. A worker looks up their keys in its own accounts file, so that no key is ever
stored in Redis. It writes the outcomes as one NDJSON part, atomically, into a directory shared by all machines. A chunk
that is repeated, because a worker died or was slow, overwrites its own part: delivery at least once gives each account
one outcome.

Anyone who can write to the Redis can run code in the workers, as with any task queue that pickles.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from attrs import frozen
from docket import Docket, ExecutionState, Retry, Worker
from redis.asyncio import Redis
from redis.exceptions import RedisError

from audiences_async._base import checks
from audiences_async._jobs import results
from audiences_async._jobs.results import OutcomeFile
from audiences_async.accounts import no_key
from audiences_async.client import AudiencesClient
from audiences_async.errors import ConfigurationError, TransportError, printable
from audiences_async.models import Account, Failed
from audiences_async.policies import RateLimit

CHUNK_SIZE: Final = 100
"""Accounts per chunk."""

_NAME: Final = "audiences"
_TASK: Final = "fetch_chunk"
_UNDER_WAY: Final = frozenset({ExecutionState.SCHEDULED, ExecutionState.QUEUED, ExecutionState.RUNNING})
_CHUNKS_AT_ONCE: Final = 2  # per worker: the next chunk begins while the last accounts of one are awaited
_CONNECTIONS: Final = 16  # to Redis: the maximum for a docket's own loops, plus some for each chunk
# A worker renews its lease on a chunk four times in this time, and others look for expired leases as often: a killed
# worker's chunk is taken over within 10 to 13 s.
_TAKEOVER: Final = timedelta(seconds=10)
_LOOK_EVERY: Final = 0.2  # s between two checks for parts
_ASK_EVERY: Final = 2.0  # s between two checks for lost chunks
_RETRY_AFTER: Final = timedelta(seconds=1)
_ATTEMPTS: Final = 3  # per chunk whose part was not written or is missing


class DocketError(TransportError):
    """Redis is unreachable or unusable."""

    hint = "check the Redis URL, and that Redis is running"


async def work(
    url: str,
    accounts: Mapping[str, Account],
    out: Path,
    client: AudiencesClient,
    *,
    concurrency: int = 100,
    patience: float = 900.0,
) -> None:
    """Fetch chunks until cancelled; accounts in flight are finished first.

    Args:
        url: URL of the Redis.
        accounts: Accounts by name. A name in a chunk that is missing here has an error as its outcome.
        out: Directory for the parts, shared by all workers and the submitting machine.
        client: The process's client; opened here, and closed at the end.
        concurrency: Maximum number of accounts in flight.
        patience: Longest outage in seconds: after that long without an answer to any account, a chunk's remaining
            accounts fail.

    Raises:
        ConfigurationError: A number or the URL is invalid.
        DocketError: Redis is unreachable at the start. Later, the worker waits for it.
    """
    checks.count("concurrency", concurrency)
    await asyncio.to_thread(out.mkdir, parents=True, exist_ok=True)

    async def fetch_chunk(
        part: str,
        names: list[str],
        retry: Retry = Retry(attempts=_ATTEMPTS, delay=_RETRY_AFTER),  # noqa: B008 - Docket reads it from the signature
    ) -> None:
        known = [accounts[name] for name in names if name in accounts]
        with results.successor(out / part) as file:
            for name in names:
                if name not in accounts:
                    file.write(_failed_line(name, "missing from the worker's accounts file"))
            async with client.stream(
                known, concurrency=-(-concurrency // _CHUNKS_AT_ONCE), patience=patience
            ) as outcomes:
                async for outcome in outcomes:
                    file.write(results.line(outcome))

    async with client, _opened(url) as docket:
        docket.register(fetch_chunk, names=[_TASK])
        async with Worker(docket, concurrency=_CHUNKS_AT_ONCE, redelivery_timeout=_TAKEOVER) as worker:
            await worker.run_forever()


async def submit(
    url: str,
    names: Iterable[str],
    parts: Path,
    file: OutcomeFile,
    *,
    resume: bool = False,
    chunk_size: int = CHUNK_SIZE,
    on_merged: Callable[[results.Line], None],
    on_idle: Callable[[], None],
) -> None:
    """Have workers fetch the accounts missing from *file*, and merge their parts into it until it is complete.

    May be ended at any time and called again: chunks in flight are not submitted twice, and parts written meanwhile are
    merged.

    Args:
        url: URL of the Redis.
        names: Names of all accounts of the job, in the same order each time.
        parts: Directory that the workers write to.
        file: File for the outcomes.
        resume: Whether to merge parts that already exist; otherwise they are deleted, because they may be outdated.
        chunk_size: Accounts per chunk, from 1 up.
        on_merged: Called with each merged line.
        on_idle: Called once if there is no worker.

    Raises:
        ConfigurationError: A number or the URL is invalid, or a part is not an outcome file.
        DocketError: Redis is unreachable while the chunks are submitted. Later, this waits for it.
        OSError: The parts cannot be read, or the file cannot be written.
    """
    checks.count("chunk_size", chunk_size)
    await asyncio.to_thread(parts.mkdir, parents=True, exist_ok=True)
    async with _opened(url) as docket:
        docket.register(_submit_only, names=[_TASK])
        job = _Job(docket, parts, file, on_merged)
        await job.submit(_chunks(names, chunk_size), resume=resume)
        await job.finish(on_idle)


@frozen
class _Chunk:
    """Accounts that are fetched together.

    Attributes:
        part: Name of the file with their outcomes, and the chunk's key; derived from all names of the chunk.
        names: Names of the accounts that are still to be fetched.
    """

    part: str
    names: list[str]


def _chunks(names: Iterable[str], size: int) -> Iterator[_Chunk]:
    rest = iter(names)
    while chunk := list(islice(rest, size)):
        digest = blake2b(json.dumps(chunk).encode(), digest_size=16).hexdigest()
        yield _Chunk(f"{digest}.ndjson", chunk)


class _Job:
    """The chunks of one job that are in flight."""

    def __init__(
        self, docket: Docket, parts: Path, file: OutcomeFile, on_merged: Callable[[results.Line], None]
    ) -> None:
        self._docket = docket
        self._parts = parts
        self._file = file
        self._on_merged = on_merged
        self._waiting: dict[str, _Chunk] = {}
        self._submitted: Counter[str] = Counter()

    async def submit(self, chunks: Iterable[_Chunk], *, resume: bool) -> None:
        """Submit the chunks without the accounts that already have an outcome."""
        for chunk in chunks:
            for line in self._taken(chunk):  # of an earlier run
                if line.ok and resume:
                    self._append(line)
            missing = [name for name in chunk.names if name not in self._file.fetched]
            if missing:
                await self._add(_Chunk(chunk.part, missing))

    async def finish(self, on_idle: Callable[[], None]) -> None:
        """Merge the parts as they appear; return when all are merged."""
        asked = time.monotonic()
        idle = False
        while self._waiting:
            for part in self._written & self._waiting.keys():
                self._merge(self._waiting[part])
            if time.monotonic() - asked > _ASK_EVERY:
                asked = time.monotonic()
                with suppress(RedisError, DocketError):  # parts are merged even while Redis is unreachable
                    await self._look_after_lost_chunks()
                    if not idle and not await self._docket.workers():
                        idle = True
                        on_idle()
            await asyncio.sleep(_LOOK_EVERY)
        self._tidy()

    @property
    def _written(self) -> set[str]:
        return {path.name for path in self._parts.iterdir()}

    def _tidy(self) -> None:
        """Delete incomplete files of killed workers."""
        for path in self._parts.glob(".*.tmp"):
            if path.name.removeprefix(".").partition(".tmp")[0].rpartition(".")[0] in self._submitted:
                path.unlink(missing_ok=True)

    async def _add(self, chunk: _Chunk) -> None:
        self._waiting[chunk.part] = chunk
        self._submitted[chunk.part] += 1
        with _reached():
            await self._docket.add(_TASK, key=chunk.part)(chunk.part, chunk.names)

    def _taken(self, chunk: _Chunk) -> Iterator[results.Line]:
        """Yield the part's lines of accounts that the file does not have yet; then delete the part."""
        path = self._parts / chunk.part
        if path.exists():
            missing = set(chunk.names) - self._file.fetched
            for line in results.lines(path):
                if line.account in missing:
                    missing.discard(line.account)
                    yield line
            path.unlink()

    def _append(self, line: results.Line) -> None:
        self._file.append(line.text)
        if line.ok:
            self._file.fetched.add(line.account)
        self._on_merged(line)

    def _merge(self, chunk: _Chunk) -> None:
        missing = set(chunk.names)
        for line in self._taken(chunk):
            missing.discard(line.account)
            self._append(line)
        self._give_up(chunk, missing, "missing from its chunk's part")

    def _give_up(self, chunk: _Chunk, names: Iterable[str], reason: str) -> None:
        """Drop the chunk; the accounts in *names* fail."""
        del self._waiting[chunk.part]
        for name in names:
            self._append(results.Line(name, ok=False, text=_failed_line(name, reason)))

    async def _look_after_lost_chunks(self) -> None:
        for chunk in tuple(self._waiting.values()):
            execution = await self._docket.get_execution(chunk.part)
            state = None if execution is None else execution.state
            if state in _UNDER_WAY or (self._parts / chunk.part).exists():
                continue
            if state is ExecutionState.FAILED or self._submitted[chunk.part] >= _ATTEMPTS:
                error = None if execution is None else execution.error
                self._give_up(chunk, chunk.names, f"no worker could write its chunk: {error or 'the part is missing'}")
            else:
                await self._add(chunk)  # forgotten by Redis, or merged by another job


async def _submit_only(part: str, names: list[str]) -> None:
    """Stand in for the task on the submitting side, which never runs it."""


def _failed_line(name: str, reason: str) -> bytes:
    return results.line(Failed(Account(name, no_key), 0.0, ConfigurationError(reason, account=name)))


def connect(url: str, connections: int) -> Redis:
    """Return a client of the Redis, for `RedisLimiter`; the caller closes it.

    Raises:
        ConfigurationError: The URL is invalid.
    """
    with suppress(ValueError):
        return Redis.from_url(url, max_connections=connections)
    raise _invalid_url()


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Docket]:
    """Yield a connected docket. Its pool has the connections that it needs, unless the URL sets a number."""
    docket = None
    with suppress(ValueError), _reached():
        query = urlsplit(url).query
        size = "" if "max_connections" in parse_qs(query) else f"{'&' if query else '?'}max_connections={_CONNECTIONS}"
        docket = await Docket(_NAME, f"{url}{size}").__aenter__()
    if docket is None:
        raise _invalid_url()
    try:
        with _reached():
            await docket.workers()
        yield docket
    finally:
        await docket.__aexit__(None, None, None)


def _invalid_url() -> ConfigurationError:
    # Without the original message, which may repeat a password.
    return ConfigurationError("invalid Redis URL; expected a form such as redis://host:6379/0")


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise DocketError(f"Redis is unavailable: {printable(str(error))}") from error


class RedisLimiter:
    """A `Limiter` for ``AudiencesClient(rate_limit=...)``: one rate per account, shared by several processes.

    It uses the generic cell rate algorithm. Redis stores only when each account's next request is due, by its own
    clock.

    Args:
        redis: A client with a connection for each account that waits at the same time; the caller closes it.
        limit: Rate of each account.
    """

    def __init__(self, redis: Redis, limit: RateLimit) -> None:
        interval = 1e6 * limit.per / limit.rate
        self._microseconds = (round(interval), round(interval * (limit.burst - 1)))
        self._next: Callable[..., Awaitable[Any]] = redis.register_script(_NEXT)

    async def acquire(self, account_name: str) -> None:
        """Wait until the account may send.

        Raises:
            redis.exceptions.RedisError: The request to Redis failed.
        """
        wait = await self._next(keys=[f"{_NAME}:pace:{account_name}"], args=self._microseconds)
        await asyncio.sleep(int(wait) / 1e6)


_NEXT: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local due = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), now)
local next_due = due + ARGV[1]
redis.call('SET', KEYS[1], string.format('%.0f', next_due), 'PX', math.ceil((next_due - now) / 1000) + 1)
return math.max(0, due - ARGV[2] - now)
"""
