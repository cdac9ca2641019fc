"""Many accounts over several machines, on Docket and Redis (extra ``docket``).

The task is a chunk of account *names*. A worker looks up their keys in its own accounts file, so that no key is ever in
Redis; it writes the outcomes as one NDJSON part, whole, into a directory that all machines share. A chunk that is
repeated, because a worker died or was slow, overwrites its own part: delivery at least once gives each account once.

Whoever can write to the Redis can run code in the workers, as with any task queue that pickles.
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

from audiences_async import checks, results
from audiences_async.accounts import no_key
from audiences_async.client import AudiencesClient
from audiences_async.errors import ConfigurationError, TransportError, printable
from audiences_async.models import Account, Failed
from audiences_async.rates import RateLimit
from audiences_async.results import OutcomeFile

CHUNK_SIZE: Final = 100
"""Accounts of a chunk."""

_NAME: Final = "audiences"
_TASK: Final = "fetch_chunk"
_UNDER_WAY: Final = frozenset({ExecutionState.SCHEDULED, ExecutionState.QUEUED, ExecutionState.RUNNING})
_CHUNKS_AT_ONCE: Final = 2  # of a worker: while the last accounts of one are awaited, the next one is under way
_CONNECTIONS: Final = 16  # to Redis, that a docket's own loops need at the most, and some for each chunk
# A worker renews its hold on a chunk four times in this, and others look as often for what nobody holds any more. So a
# killed worker's chunk is taken up within 10 to 13 s.
_TAKEOVER: Final = timedelta(seconds=10)
_LOOK_EVERY: Final = 0.2  # s between two looks for parts
_ASK_EVERY: Final = 2.0  # s between two looks at what has become of the chunks
_RETRY_AFTER: Final = timedelta(seconds=1)
_ATTEMPTS: Final = 3  # for a chunk whose part is not written, or not there


class DocketError(TransportError):
    """Redis cannot be reached, or not used."""

    hint = "check the URL of the Redis, and that it runs"


async def work(
    url: str,
    accounts: Mapping[str, Account],
    out: Path,
    client: AudiencesClient,
    *,
    concurrency: int = 100,
    patience: float = 900.0,
) -> None:
    """Take chunks until cancelled; what is under way then is finished first.

    Args:
        url: Of the Redis.
        accounts: By name. A chunk's name that is not among them becomes an error in its place.
        out: The directory for the parts, the same for all workers and whoever submits.
        client: One for the process; opened here, and closed at the end.
        concurrency: Accounts under way at the same time.
        patience: Seconds in a row in which the service may answer nobody, before a chunk's remaining accounts fail.

    Raises:
        ConfigurationError: A number or a URL that cannot be used.
        DocketError: Redis cannot be reached at the start; later, it is waited for.
    """
    checks.count("concurrency", concurrency)
    await asyncio.to_thread(out.mkdir, parents=True, exist_ok=True)

    async def fetch_chunk(
        part: str,
        names: list[str],
        retry: Retry = Retry(attempts=_ATTEMPTS, delay=_RETRY_AFTER),  # noqa: B008 - how Docket is told
    ) -> None:
        known = [accounts[name] for name in names if name in accounts]
        with results.successor(out / part) as file:
            for name in names:
                if name not in accounts:
                    file.write(_no_answer(name, "the worker's accounts file does not have it"))
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
    """Have workers fetch what the file does not have yet, and merge what they write into it, until it is whole.

    May be ended at any time and called again: chunks under way are not doubled, and parts written meanwhile are merged.

    Args:
        url: Of the Redis.
        names: Of all accounts of the job, in the same order each time.
        parts: The directory that the workers write to.
        file: Where the outcomes go.
        resume: Whether parts that are there already are taken in; else they are removed, for they may be old.
        chunk_size: Accounts of a chunk, from 1 up.
        on_merged: Called with each line that is merged.
        on_idle: Called once, where no worker is there.

    Raises:
        ConfigurationError: A number or a URL that cannot be used, or a part that is none.
        DocketError: Redis cannot be reached while the chunks are submitted; later, it is waited for.
        OSError: The parts cannot be read, or the file cannot be written.
    """
    checks.count("chunk_size", chunk_size)
    await asyncio.to_thread(parts.mkdir, parents=True, exist_ok=True)
    async with _opened(url) as docket:
        docket.register(_elsewhere, names=[_TASK])
        job = _Job(docket, parts, file, on_merged)
        await job.submit(_chunks(names, chunk_size), resume=resume)
        await job.finish(on_idle)


@frozen
class _Chunk:
    """Accounts that are fetched together.

    Attributes:
        part: Name of the file with their outcomes, and the chunk's key; follows from all the names.
        names: Of the accounts that are still to be fetched.
    """

    part: str
    names: list[str]


def _chunks(names: Iterable[str], size: int) -> Iterator[_Chunk]:
    rest = iter(names)
    while chunk := list(islice(rest, size)):
        digest = blake2b(json.dumps(chunk).encode(), digest_size=16).hexdigest()
        yield _Chunk(f"{digest}.ndjson", chunk)


class _Job:
    """The chunks of one job that are under way."""

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
        """Have the chunks fetched, but for what is there already."""
        for chunk in chunks:
            for line in self._taken(chunk):  # of a job that was ended
                if line.ok and resume:
                    self._append(line)
            missing = [name for name in chunk.names if name not in self._file.fetched]
            if missing:
                await self._add(_Chunk(chunk.part, missing))

    async def finish(self, on_idle: Callable[[], None]) -> None:
        """Merge the parts as they come."""
        asked = time.monotonic()
        idle = False
        while self._waiting:
            for part in self._written & self._waiting.keys():
                self._merge(self._waiting[part])
            if time.monotonic() - asked > _ASK_EVERY:
                asked = time.monotonic()
                with suppress(RedisError, DocketError):  # parts are written, and tell, also while Redis is away
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
        """Remove what killed workers have left half written."""
        for path in self._parts.glob(".*.tmp"):
            if path.name.removeprefix(".").partition(".tmp")[0].rpartition(".")[0] in self._submitted:
                path.unlink(missing_ok=True)

    async def _add(self, chunk: _Chunk) -> None:
        self._waiting[chunk.part] = chunk
        self._submitted[chunk.part] += 1
        with _reached():
            await self._docket.add(_TASK, key=chunk.part)(chunk.part, chunk.names)

    def _taken(self, chunk: _Chunk) -> Iterator[results.Line]:
        """The part's lines of accounts that the file does not have yet; the part is gone afterwards."""
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
        self._give_up(chunk, missing, "its chunk's part does not have it")

    def _give_up(self, chunk: _Chunk, names: Iterable[str], reason: str) -> None:
        """The chunk is over: these names of it have come to nothing."""
        del self._waiting[chunk.part]
        for name in names:
            self._append(results.Line(name, ok=False, text=_no_answer(name, reason)))

    async def _look_after_lost_chunks(self) -> None:
        for chunk in tuple(self._waiting.values()):
            execution = await self._docket.get_execution(chunk.part)
            state = None if execution is None else execution.state
            if state in _UNDER_WAY or (self._parts / chunk.part).exists():
                continue
            if state is ExecutionState.FAILED or self._submitted[chunk.part] >= _ATTEMPTS:
                error = None if execution is None else execution.error
                self._give_up(
                    chunk, chunk.names, f"no worker could write its chunk: {error or 'the part is not there'}"
                )
            else:
                await self._add(chunk)  # forgotten by Redis, or merged by another job


async def _elsewhere(part: str, names: list[str]) -> None:
    """Stands for the task where it is only submitted."""


def _no_answer(name: str, reason: str) -> bytes:
    return results.line(Failed(Account(name, no_key), 0.0, ConfigurationError(reason, account=name)))


def connect(url: str, connections: int) -> Redis:
    """A client of the Redis, such as a `RedisLimiter` wants; the caller closes it.

    Raises:
        ConfigurationError: A URL that cannot be used.
    """
    with suppress(ValueError):
        return Redis.from_url(url, max_connections=connections)
    raise _unusable_url()


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Docket]:
    """A docket that can be reached, whose pool has the connections that it needs unless the URL says how many."""
    docket = None
    with suppress(ValueError), _reached():
        query = urlsplit(url).query
        size = "" if "max_connections" in parse_qs(query) else f"{'&' if query else '?'}max_connections={_CONNECTIONS}"
        docket = await Docket(_NAME, f"{url}{size}").__aenter__()
    if docket is None:
        raise _unusable_url()
    try:
        with _reached():
            await docket.workers()
        yield docket
    finally:
        await docket.__aexit__(None, None, None)


def _unusable_url() -> ConfigurationError:
    # Without the reason's own words, which may repeat a password.
    return ConfigurationError("the URL of the Redis cannot be used; it looks like redis://host:6379/0")


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise DocketError(f"Redis cannot be used: {printable(str(error))}") from error


class RedisLimiter:
    """A `Limiter` for ``AudiencesClient(rate_limit=...)``: one rate for each account, whichever processes call it.

    The generic cell rate algorithm; all that Redis keeps is when each account's next request is due, by its own clock.

    Args:
        redis: A client with a connection for each account that asks at the same time; stays the caller's.
        limit: What each account may send.
    """

    def __init__(self, redis: Redis, limit: RateLimit) -> None:
        interval = 1e6 * limit.per / limit.rate
        self._microseconds = (round(interval), round(interval * (limit.burst - 1)))
        self._next: Callable[..., Awaitable[Any]] = redis.register_script(_NEXT)

    async def acquire(self, account_name: str) -> None:
        """Return when the account may send.

        Raises:
            redis.exceptions.RedisError: Redis cannot be asked.
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
