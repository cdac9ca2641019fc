"""Workers, submitters and Redis, for tests of jobs on many machines."""

import asyncio
import contextlib
import json
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from command import COMMAND, KEY

from audiences_async import Account, AudiencesClient, RetryPolicy, distributed
from audiences_async._jobs import outcome_files
from audiences_async._jobs.outcome_files import OutcomeFile
from audiences_async.distributed import PartsError, PartStore
from audiences_async.sandbox import Sandbox, many_audiences


def opened(sandbox: Sandbox, count: int) -> dict[str, Account]:
    """Return *count* accounts by name, with 3 audiences each."""
    names = [f"a{number}" for number in range(count)]
    return {
        name: sandbox.add_account(name, api_key=f"{KEY}-{name}", audiences=many_audiences(name, 3)) for name in names
    }


def accounts_file(path: Path, names: Iterable[str]) -> Path:
    """Write an accounts file for `opened` accounts."""
    path.write_text("name,api_key\n" + "".join(f"{name},{KEY}-{name}\n" for name in names))
    return path


def expected(count: int) -> dict[str, list[str]]:
    """Return the audience ids of each account."""
    return {f"a{number}": [f"a{number}-{audience}" for audience in range(3)] for number in range(count)}


def fetched(out: Path) -> dict[str, list[str]]:
    """Return the ids of each account of an output, in which each occurs once."""
    told = [json.loads(line) for line in out.read_text().splitlines()]
    ids = {one["account"]: [audience["id"] for audience in one.get("audiences", ())] for one in told}
    assert len(ids) == len(told)
    return ids


def failures(out: Path) -> dict[str, str]:
    """Return the message of each account of an output that failed."""
    told = {line.account: json.loads(line.text) for line in outcome_files.lines(out)}
    return {name: one["error"]["message"] for name, one in told.items() if not one["ok"]}


def asked(sandbox: Sandbox) -> list[str]:
    """Return the account of each request, in order."""
    return [str(request.account) for request in sandbox.requests]


@contextlib.asynccontextmanager
async def worker(
    url: str, accounts: Mapping[str, Account], out: "Path | str | PartStore", sandbox: Sandbox, **settings: Any
) -> AsyncIterator["asyncio.Task[None]"]:
    """Run a worker in this process inside the block."""
    client = settings.pop("client", None)
    client = client or AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(max_attempts=1))
    settings = {"concurrency": 10, **settings}
    task = asyncio.create_task(distributed.work(url, accounts, out, client, **settings))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def submitted(
    url: str, names: Iterable[str], parts: "Path | str | PartStore", out: Path, **settings: Any
) -> list[str]:
    """Submit in chunks of 4; return the merged accounts."""
    merged: list[str] = []
    settings = {"chunk_size": 4, "on_notice": lambda text: None, **settings}
    with OutcomeFile(out, resume=True) as file:
        await distributed.submit(
            url, names, parts, file, on_merged=lambda line: merged.append(line.account), **settings
        )
    return merged


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Return when *condition* is true."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.01)


class Flaky:
    """A directory, some of whose operations fail.

    Args:
        path: The directory.
        failing: For an operation, the numbers of the calls that fail, from 1.
    """

    place = "flaky"

    def __init__(self, path: Path, failing: Mapping[str, Container[int]]) -> None:
        self._store = distributed.open_store(path)
        self._failing = failing
        self.calls: Counter[str] = Counter()

    async def put(self, name: str, content: IO[bytes]) -> None:
        """Write a part."""
        self._count("put")
        await self._store.put(name, content)

    async def get(self, name: str) -> IO[bytes] | None:
        """Open a part."""
        self._count("get")
        return await self._store.get(name)

    async def names(self, job: str) -> list[str]:
        """Return the names of all parts of a job."""
        self._count("names")
        return await self._store.names(job)

    async def remove(self, name: str) -> None:
        """Remove a part."""
        self._count("remove")
        await self._store.remove(name)

    async def remove_all(self, job: str) -> None:
        """Remove all parts of a job."""
        await self._store.remove_all(job)

    def _count(self, operation: str) -> None:
        self.calls[operation] += 1
        if self.calls[operation] in self._failing.get(operation, ()):
            raise PartsError(f"no {operation} at the moment")


def work(redis: str, accounts: Path, parts: object, service: Any, *options: str) -> list[str]:
    """Return the command of a worker."""
    common = ["--docket", redis, "--accounts", str(accounts), "--out", str(parts), "--base-url", service.base_url]
    return [*COMMAND, "worker", *common, *options]


def fetch(redis: str, accounts: Path, parts: object, out: Path, *options: str) -> list[str]:
    """Return the command of a submitter."""
    common = ["--docket", redis, "--accounts", str(accounts), "--parts", str(parts), "--out", str(out)]
    return [*COMMAND, "fetch", *common, *options]


@contextlib.contextmanager
def started(command: list[str], **settings: Any) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that ends with the block."""
    with subprocess.Popen(command, text=True, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def ready(command: list[str], **settings: Any) -> Iterator["subprocess.Popen[str]"]:
    """Start a worker that ends with the block, and wait until it takes chunks."""
    with started(command, stderr=subprocess.PIPE, **settings) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert " is ready: " in line, line + process.stderr.read()
        yield process
