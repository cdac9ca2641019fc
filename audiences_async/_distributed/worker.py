"""A worker: from its start to its end."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from secrets import token_hex
from typing import Any, Final

from docket import CurrentExecution, Execution, Retry, Worker

from audiences_async._base import checks
from audiences_async._distributed import parts
from audiences_async._distributed.connection import QUEUE, DocketError, opened
from audiences_async._distributed.handling import Desk
from audiences_async._distributed.parts import PartStore
from audiences_async._distributed.peers import Peers
from audiences_async._distributed.slots import Slots
from audiences_async.client import AudiencesClient
from audiences_async.models import Account

TASK: Final = "fetch_chunk"
"""Name of the task of a chunk."""
ATTEMPTS: Final = 3
"""Attempts of a chunk that raises an unexpected error, whose part is missing, or which brings no account."""

_log: Final = logging.getLogger("audiences_async")
# A worker renews its lease on a chunk four times in this time, and others look for expired leases as often: a killed
# worker's chunk is taken over within 10 to 13 s.
_TAKEOVER: Final = timedelta(seconds=10)
_LOOK_EVERY: Final = timedelta(milliseconds=50)  # for chunks, and for room for them
_RECONNECT: Final = timedelta(seconds=1)
_RETRY_AFTER: Final = timedelta(seconds=1)
_CLOSING: Final = 3.0  # s for the last parts and exchanges with Redis, each
_CANCELS: Final = 10  # of a task that hangs in Redis


async def work(
    url: str,
    accounts: Mapping[str, Account],
    out: str | os.PathLike[str] | PartStore,
    client: AudiencesClient,
    *,
    concurrency: int = 100,
    patience: float = 900.0,
    queue: str = QUEUE,
    grace: float = 20.0,
    peers: Peers | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Fetch chunks until cancelled; then accounts in flight are finished, and the others are returned to the queue.

    Args:
        url: URL of the Redis.
        accounts: Accounts by name. A name in a chunk that is missing here has an error as its outcome.
        out: Store of the parts, shared with the submitting machine: a directory or a URL, see `open_store`.
        client: The process's client; opened here, and closed at the end.
        concurrency: Maximum number of accounts in flight.
        patience: Longest outage in seconds: after that long without an answer to any account, the accounts in hand
            fail.
        queue: Name of the queue.
        grace: Seconds for the accounts in flight once this is cancelled; 0 gives them up at once.
        peers: What the client shares with the queue's other workers: it must be the client's ``service_rate_limit`` and
            its ``on_event``. ``None`` means that it shares nothing.
        on_ready: Called with the worker's name when it takes chunks.

    Raises:
        ConfigurationError: A number, a name or a URL is invalid.
        DocketError: Redis is unreachable at the start. Later, the worker waits for it.
        PartsError: The store cannot be written, at the start or for 30 s.
    """
    checks.count("concurrency", concurrency)
    checks.seconds("patience", patience)
    checks.number("grace", grace, zero=True, unit="of seconds ")
    store = parts.open_store(out)
    await parts.check(store)
    slots = Slots(client, concurrency, patience)
    desk = Desk(accounts, store, slots, concurrency)
    async with client:
        serving = asyncio.create_task(
            _serve(url, queue, desk, peers or Peers(patience), concurrency=concurrency, on_ready=on_ready)
        )
        fetching = asyncio.create_task(slots.run())
        ends: set[asyncio.Future[Any]] = {serving, fetching, desk.store.fault}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _close(desk, slots, serving, fetching, grace)
    failures = [task.exception() for task in (serving, fetching) if task.done() and not task.cancelled()]
    failures += [desk.store.fault.result()] if desk.store.fault.done() else []
    raise next(failure for failure in failures if failure is not None)


async def _serve(
    url: str, queue: str, desk: Desk, peers: Peers, *, concurrency: int, on_ready: Callable[[str], None] | None
) -> None:
    """Take chunks until cancelled."""

    async def fetch_chunk(
        part: str,
        names: list[str],
        retry: Retry = Retry(attempts=ATTEMPTS, delay=_RETRY_AFTER),  # noqa: B008 - Docket reads it from the signature
        execution: Execution = CurrentExecution(),  # noqa: B008
    ) -> None:
        await desk.fetch_chunk(part, names, execution)

    name = f"{socket.gethostname()}#{os.getpid()}-{token_hex(2)}"  # containers may have the same name and process id
    async with opened(url, queue, concurrency) as docket:
        docket.register(fetch_chunk, names=[TASK])
        async with Worker(
            docket,
            name,
            redelivery_timeout=_TAKEOVER,
            reconnection_delay=_RECONNECT,
            minimum_check_interval=_LOOK_EVERY,
            schedule_automatic_tasks=False,
        ) as worker:
            desk.serve(worker)
            beside = [asyncio.create_task(peers.run(docket, name, desk.report)), asyncio.create_task(desk.keep())]
            _log.info("worker %s is ready: queue %s, %d accounts at a time", name, queue, concurrency)
            if on_ready is not None:
                on_ready(name)
            try:
                await worker.run_forever()
            finally:
                for task in beside:
                    task.cancel()
                with suppress(DocketError):
                    await peers.leave(docket)


async def _close(
    desk: Desk, slots: Slots, serving: asyncio.Task[Any], fetching: asyncio.Task[Any], grace: float
) -> None:
    """End a worker: give the accounts in flight *grace* seconds, and what hangs in Redis a few."""
    desk.close()
    try:
        await asyncio.wait({fetching}, timeout=grace)
    finally:
        slots.abandon()
        fetching.cancel()
        if not serving.done():
            await desk.emptied(_CLOSING)
        # A cancellation ends one exchange with a Redis that hangs, and the next one hangs again.
        for number in range(_CANCELS):
            if not serving.done():
                serving.cancel()
                await asyncio.wait({serving}, timeout=_CLOSING if number == 0 else _CLOSING / _CANCELS)
        await asyncio.wait({fetching})
