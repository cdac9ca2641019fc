"""``audiences status``: what happens on a queue, once or again and again."""

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from audiences_async.errors import AudiencesError

if TYPE_CHECKING:
    from audiences_async.distributed import JobStatus, QueueStatus, WorkerStatus

_EVERY: Final = 1.0  # s between two looks


async def run(url: str, queue: str | None, *, as_json: bool) -> None:
    """Print the status of a queue; on a terminal a table that is refreshed until Ctrl-C.

    Raises:
        AudiencesError: Redis is unreachable at the start, or a setting is invalid.
    """
    from audiences_async import distributed  # noqa: PLC0415 - of an optional extra

    console = Console()
    async with distributed.watched(url, queue or distributed.QUEUE) as look:
        status = await look()
        if as_json:
            print(json.dumps(status.as_dict()))
        elif not sys.stdout.isatty():
            console.print(table(status))
        else:
            with Live(table(status), console=console, auto_refresh=False) as live:
                while True:
                    await asyncio.sleep(_EVERY)
                    try:
                        live.update(table(await look()), refresh=True)
                    except AudiencesError as error:
                        live.update(Text(error.summary), refresh=True)


def table(status: "QueueStatus") -> Group:
    """Return the status as tables."""
    limit = "" if status.rate is None else f", limited by the service to about {status.rate:.3g} requests/s"
    chunks = f"{status.waiting:,} chunks waiting, {status.running:,} in hand"
    head = Text(f"queue {status.queue}: {chunks}, {status.per_second:,.1f} accounts/s{limit}")
    return Group(head, _jobs(status.jobs), _workers(status.workers))


def _jobs(jobs: "tuple[JobStatus, ...]") -> Table | Text:
    if not jobs:
        return Text("no job")
    rows = Table("job", "accounts", "fetched", "failed", "running for")
    for job in jobs:
        total = "unknown" if job.total is None else f"{job.total:,}"
        rows.add_row(Text(job.id), total, f"{job.fetched:,}", f"{job.failed:,}", f"{job.seconds:,.0f} s")
    return rows


def _workers(workers: "tuple[WorkerStatus, ...]") -> Table | Text:
    if not workers:
        return Text("no worker")
    rows = Table("worker", "chunks", "waiting", "in flight", "fetched", "failed", "per second", "service", "last error")
    for worker in workers:
        counts = (worker.chunks, worker.waiting, worker.in_flight, worker.fetched, worker.failed)
        numbers = [f"{count:,}" for count in counts]
        state = worker.state if worker.rate is None else f"{worker.state}, {worker.rate:.3g}/s"
        rows.add_row(Text(worker.name), *numbers, f"{worker.per_second:,.1f}", state, Text(worker.error))
    return rows
