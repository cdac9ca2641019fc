"""What happens on a queue right now, for `audiences status`."""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from attrs import asdict, fields, frozen
from docket import Docket

from audiences_async._distributed.connection import exchange, opened
from audiences_async._distributed.peers import KEY, Report, fresh


@frozen
class WorkerStatus:
    """A worker.

    Attributes:
        name: Host name, process id and chance.
        chunks: Chunks in hand.
        waiting: Accounts in hand that have not been started.
        in_flight: Accounts in flight.
        fetched: Accounts fetched since it was started.
        failed: Accounts that failed.
        per_second: Accounts per second, over the last 10 s.
        state: ``"open"``, ``"limited"``, ``"out"``, or ``"unknown"`` if it does not report.
        rate: Requests per second that it has learned for itself; ``None`` if it has learned no limit.
        error: Its last failed account; empty if there was none.
    """

    name: str
    chunks: int
    waiting: int
    in_flight: int
    fetched: int
    failed: int
    per_second: float
    state: str
    rate: float | None
    error: str


@frozen
class JobStatus:
    """A job whose submitter runs, or was interrupted.

    Attributes:
        id: Its id.
        total: Its accounts; ``None`` if unknown.
        fetched: Accounts merged by this run of the submitter, without errors.
        failed: Accounts that failed.
        seconds: Seconds since the submitter was started.
    """

    id: str
    total: int | None
    fetched: int
    failed: int
    seconds: float


@frozen
class QueueStatus:
    """A queue.

    Attributes:
        queue: Its name.
        waiting: Chunks that no worker has in hand.
        running: Chunks in hand.
        workers: The workers.
        jobs: The jobs.
    """

    queue: str
    waiting: int
    running: int
    workers: tuple[WorkerStatus, ...]
    jobs: tuple[JobStatus, ...]

    @property
    def per_second(self) -> float:
        """Accounts per second of all workers."""
        return sum(worker.per_second for worker in self.workers)

    @property
    def rate(self) -> float | None:
        """Requests per second that all workers together have learned; ``None`` if there is no limit."""
        rates = [worker.rate for worker in self.workers if worker.rate is not None]
        return sum(rates) if rates else None

    def as_dict(self) -> dict[str, Any]:
        """Return the status as JSON has it."""
        return {**asdict(self), "per_second": self.per_second, "rate": self.rate}


@asynccontextmanager
async def watched(url: str, queue: str) -> AsyncIterator[Callable[[], Awaitable[QueueStatus]]]:
    """Connect to Redis, and yield a function that returns the status of a queue.

    The function takes one round trip, and raises `DocketError` if Redis fails.

    Args:
        url: URL of the Redis.
        queue: Name of the queue.

    Raises:
        ConfigurationError: The URL or the name is invalid.
        DocketError: Redis is unreachable.
    """
    async with opened(url, queue) as docket:
        yield partial(_look, docket)


async def _look(docket: Docket) -> QueueStatus:
    oldest = datetime.now(UTC) - docket.heartbeat_interval * docket.missed_heartbeats

    def commands(pipeline: Any) -> None:
        pipeline.time()
        pipeline.xlen(docket.stream_key)
        pipeline.zcard(docket.queue_key)
        pipeline.zrangebyscore(docket.workers_set, oldest.timestamp(), "+inf")
        pipeline.hgetall(docket.key(KEY))
        pipeline.hgetall(docket.key("jobs"))

    clock, queued, delayed, names, reports, jobs = await exchange(docket, commands)
    known = fresh(reports, clock[0] + clock[1] / 1e6)
    workers = tuple(_worker(name.decode(), known.get(name.decode())) for name in sorted(names))
    running = sum(worker.chunks for worker in workers)
    return QueueStatus(docket.name, max(0, queued + delayed - running), running, workers, tuple(_jobs(jobs)))


def _worker(name: str, report: Report | None) -> WorkerStatus:
    report = Report(state="unknown") if report is None else report
    return WorkerStatus(name, *(getattr(report, each.name) for each in fields(WorkerStatus)[1:]))


def _jobs(found: dict[bytes, bytes]) -> Iterator[JobStatus]:
    """Yield the jobs, without any of another version."""
    for name, text in sorted(found.items()):
        with suppress(ValueError, KeyError, TypeError):
            job = json.loads(text)
            yield JobStatus(name.decode(), job["total"], job["fetched"], job["failed"], time.time() - job["since"])
