"""What a queue does right now, for people and for programs, on a real Redis."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Done, runner
from rich.console import Console
from services import missing, redis_server
from workers import opened, submitted, until, worker

from audiences_async import distributed
from audiences_async.cli import status as cli
from audiences_async.distributed import DocketError, JobStatus, QueueStatus, WorkerStatus
from audiences_async.sandbox import Answer, Sandbox

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed"),
]

WORKER = WorkerStatus(
    name="host#1-ab",
    chunks=2,
    waiting=100,
    in_flight=50,
    fetched=1200,
    failed=3,
    per_second=40.0,
    state="limited",
    rate=16.5,
    error="account 'a1': HTTP 403 Forbidden",
)
JOB = JobStatus("20261128T000000Z-0123456789abcdef", total=5000, fetched=1200, failed=3, seconds=61.0)
STATUS = QueueStatus("audiences", 7, 2, (WORKER,), (JOB,))


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Redis and return its URL."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs the command line."""
    return runner(monkeypatch, capsys)


async def test_the_status_of_a_job(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Report the chunks, the worker with its last error, and the job with its progress; nothing remains of them."""
    accounts = opened(sandbox, 100)
    sandbox.script("a0", Answer(403))
    sandbox.script("a99", Answer(delay=3.0))
    job = asyncio.create_task(submitted(redis, accounts, tmp_path / "parts", tmp_path / "out", total=100))
    async with distributed.watched(redis, "audiences") as look:

        async def merged() -> bool:
            found = await look()
            return bool(found.jobs and found.workers) and found.jobs[0].fetched == 95 and found.workers[0].fetched == 98

        async with worker(redis, accounts, tmp_path / "parts", sandbox):
            await until(merged)
            found = await look()
            await job
        gone = await look()
    assert (found.waiting, found.running, found.jobs[0].total, found.jobs[0].failed) == (0, 1, 100, 1)
    assert (found.workers[0].fetched, found.workers[0].failed, found.workers[0].state) == (98, 1, "open")
    assert "HTTP 403" in found.workers[0].error
    assert found.per_second > 1
    assert json.loads(json.dumps(found.as_dict()))["workers"][0]["in_flight"] == 1
    assert (gone.waiting, gone.running, gone.workers, gone.jobs) == (0, 0, (), ())


async def test_reports_of_another_version(redis: str) -> None:
    """Leave out what workers and submitters of another version report."""
    async with distributed.connect(redis, 1) as client, distributed.watched(redis, "audiences") as look:
        for report in ("no JSON", '{"at": "noon"}', "[]"):
            await client.hset("audiences:reports", report, report)
            await client.hset("audiences:jobs", report, report)
        found = await look()
    assert (found.workers, found.jobs) == ((), ())


def test_the_command(redis: str, run: Callable[..., Done]) -> None:
    """Print JSON, or text if stdout is no terminal; report a Redis that is away with exit code 5."""
    done = run("status", "--docket", redis, "--queue", "q", "--json")
    assert (done.returncode, json.loads(done.stdout)["queue"]) == (0, "q")
    done = run("status", "--docket", redis)
    assert done.stdout.splitlines() == [
        "queue audiences: 0 chunks waiting, 0 in hand, 0.0 accounts/s",
        "no job",
        "no worker",
    ]
    done = run("status", "--docket", "redis://127.0.0.1:1")
    assert (done.returncode, "Redis is unavailable" in done.stderr) == (5, True)


def test_ctrl_c(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is the normal end."""

    async def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert run("status", "--docket", "redis://h") == Done(0, "", "")


def test_the_tables() -> None:
    """Show the learned limit, the jobs and the workers, without markup in their names."""
    console = Console(width=160, record=True)
    console.print(cli.table(STATUS))
    text = console.export_text()
    assert "7 chunks waiting, 2 in hand, 40.0 accounts/s, limited by the service to about 16.5 requests/s" in text
    assert "20261128T000000Z-0123456789abcdef" in text
    assert "limited, 16.5/s" in text
    unknown = QueueStatus("q", 0, 0, (), (JobStatus("j", None, 0, 0, 0.0),))
    console.print(cli.table(unknown))
    assert "unknown" in console.export_text()


async def test_a_terminal(redis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refresh on a terminal until Ctrl-C, also while Redis is away."""
    seen: list[object] = []
    looks: Iterator[QueueStatus | DocketError] = iter([STATUS, DocketError("Redis is unavailable: no"), STATUS])

    async def look(docket: object) -> QueueStatus:
        seen.append(docket)
        found = next(looks, None)
        if found is None:
            raise KeyboardInterrupt
        if isinstance(found, DocketError):
            raise found
        return found

    monkeypatch.setattr("audiences_async._distributed.status._look", look)
    monkeypatch.setattr(cli, "_EVERY", 0.01)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        await cli.run(redis, None, as_json=False)
    assert len(seen) == 4
