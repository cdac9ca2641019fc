"""What a worker does with a chunk that it has in hand, on a real Redis, with a client that answers at once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import define
from docket import Docket, Worker
from docket.dependencies import AdmissionBlocked
from redis.asyncio import Redis
from services import missing, redis_server
from workers import Flaky

from audiences_async import Account, AudiencesResponse, ConfigurationError, Failed, Fetched
from audiences_async._distributed import handling, patient
from audiences_async._distributed.handling import MARKER, Desk
from audiences_async._distributed.ledger import Ledger
from audiences_async._distributed.slots import Slots
from audiences_async._jobs import outcome_files
from audiences_async.distributed import DocketError, PartsError

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed"),
]
NAMES = ["a0", "a1", "a2"]
PART = "job/chunk-0.ndjson"
DONE = AudiencesResponse(200, "", None, ())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Redis and return its URL."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


class Client:
    """A client whose accounts are fetched at once, except for those with an error."""

    def __init__(self, errors: "dict[str, list[Exception]]") -> None:
        self.errors = errors
        self.asked: list[str] = []
        self.on_asked: Callable[[str], object] = self.asked.append

    @asynccontextmanager
    async def stream(self, accounts: AsyncIterator[Account], **_: Any) -> AsyncIterator[AsyncIterator[Any]]:
        """Yield the outcomes."""
        started: asyncio.Queue[Account | None] = asyncio.Queue()

        async def start() -> None:
            async for account in accounts:
                self.on_asked(account.name)
                started.put_nowait(account)
            started.put_nowait(None)

        async def outcomes() -> AsyncIterator[Fetched | Failed]:
            while (account := await started.get()) is not None:
                errors = self.errors.get(account.name)
                yield Failed(account, 0.0, errors.pop(0)) if errors else Fetched(account, 0.0, DONE)  # type: ignore[arg-type]

        starting = asyncio.create_task(start())
        try:
            yield outcomes()
        finally:
            starting.cancel()


class Accounts(dict[str, Account]):
    """Accounts, of which one is not where it was."""

    def __getitem__(self, name: str) -> Account:
        """Return an account."""
        if name == "moved":
            raise ConfigurationError("the file has changed")
        return super().__getitem__(name)


@define
class Fixture:
    """A worker's desk, and what is around it."""

    desk: Desk
    slots: Slots
    client: Client
    store: Any
    ledger: Ledger

    async def handle(self, *names: str, redelivered: bool = False) -> timedelta | None:
        """Handle the chunk; return when it goes back to the queue, if it does."""
        execution: Any = SimpleNamespace(redelivered=redelivered, key=PART, message_id=b"1-0")
        try:
            await self.desk.fetch_chunk(PART, list(names or NAMES), execution)
        except AdmissionBlocked as blocked:
            return blocked.retry_delay
        return None

    async def written(self) -> dict[str, bool]:
        """Return the accounts of the part, and whether each was fetched."""
        file = await self.store.get(PART)
        if file is None:
            return {}
        with file:
            return {line.account: line.ok for line in outcome_files.read_lines(file, "")}

    async def notices(self) -> list[str]:
        """Return the parts that the submitter is told of."""
        return (await self.ledger.news("job", {})).parts


@pytest.fixture
async def worker(server: str, tmp_path: Path) -> AsyncIterator[Fixture]:
    """Yield a worker that shares the store of the job."""
    async with Redis.from_url(server) as redis:
        await redis.flushall()
    store = Flaky(tmp_path, {})
    await store.put(f"job/{MARKER}", BytesIO(b"{}"))
    client = Client({})
    slots = Slots(client, 10, 1.0)  # type: ignore[arg-type] # it streams as a client does
    accounts = Accounts({name: Account(name, "key") for name in NAMES})
    async with Docket("audiences", server) as docket, Worker(docket) as running:
        desk = Desk(accounts, store, slots, 10)
        desk.serve(running)
        fetching = asyncio.create_task(slots.run())
        yield Fixture(desk, slots, client, store, Ledger(docket))
        fetching.cancel()


async def test_a_chunk_is_fetched_and_reported(worker: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the part, send a notice, and count the chunk as running meanwhile only."""
    monkeypatch.setattr(handling, "_RATE_OVER", 0.0)
    assert worker.desk.report()["fetched"] == 0
    assert await worker.handle() is None
    report = worker.desk.report()
    assert (report["fetched"], report["per_second"]) == (3, 0.0), "there is no earlier report in the last 0 s"
    assert await worker.written() == dict.fromkeys(NAMES, True)
    assert await worker.notices() == [PART]
    assert (await worker.ledger.news("job", {})).running == 0


async def test_accounts_that_are_not_there(worker: Fixture) -> None:
    """An account that is missing, or whose file has changed, fails."""
    assert await worker.handle("a0", "west", "moved") is None
    assert await worker.written() == {"a0": True, "west": False, "moved": False}


async def test_a_part_that_is_there_already(worker: Fixture) -> None:
    """A chunk that is delivered again is not fetched again if its part is there."""
    await worker.handle(redelivered=True)
    await worker.handle(redelivered=True)
    assert worker.client.asked == NAMES
    assert await worker.notices() == [PART, PART]


async def test_a_chunk_with_which_workers_died(worker: Fixture) -> None:
    """Fetch its accounts one by one, and fail those that were fetched alone when a worker died."""
    for _ in range(2):
        await worker.ledger.started(PART)
    await worker.ledger.fetches_alone(PART, "a1", ["a0"])
    assert await worker.handle() is None
    assert worker.client.asked == ["a2"]
    assert await worker.written() == {"a0": False, "a1": False, "a2": True}


async def test_a_limit_out_of_reach(worker: Fixture) -> None:
    """An account that had no turn because Redis was away is fetched again."""
    worker.client.errors = {"a1": [DocketError("away"), DocketError("away")]}
    assert await worker.handle() is None
    assert await worker.written() == dict.fromkeys(NAMES, True)
    assert worker.client.asked.count("a1") == 3


async def test_a_worker_that_is_closing(worker: Fixture) -> None:
    """A chunk of which nothing is done goes back to the queue at once, and is not counted as a death."""
    worker.desk.close()
    assert await worker.handle() == timedelta(0)
    assert (await worker.ledger.started(PART)).count == 1
    assert worker.desk.report()["chunks"] == 0


async def test_a_worker_that_closes_while_redis_is_away(worker: Fixture) -> None:
    """An account that had no turn before the end is returned, and those that are done are written."""
    worker.client.errors = {"a1": [DocketError("away")]}
    worker.client.on_asked = lambda name: worker.slots.stop() if name == "a1" else None
    assert await worker.handle() is None
    assert await worker.written() == {"a0": True}


async def test_a_chunk_of_another_fleet(worker: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a chunk to others if the job's store is another, until its job has ended or it was offered too often."""
    await worker.store.remove(f"job/{MARKER}")
    assert await worker.handle() == await worker.handle() == timedelta(seconds=0.5)
    assert (await worker.ledger.news("job", {})).misplaced == 2
    monkeypatch.setattr(handling, "_MOST_OFFERS", 2)
    assert await worker.handle() is None
    await worker.ledger.end("job")
    assert await worker.handle() is None
    assert worker.client.asked == []


async def test_a_job_that_has_ended(worker: Fixture) -> None:
    """A part that nobody wants any more is not written."""
    await worker.handle("a0")
    await worker.store.remove(PART)
    await worker.ledger.end("job")
    assert await worker.handle() is None
    assert await worker.written() == {}


async def test_a_redis_that_goes_away_meanwhile(worker: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched is written although Redis is away, and the chunk does not go back."""

    async def fail(self: Ledger, part: str) -> bool:
        raise DocketError("away")

    monkeypatch.setattr(Ledger, "has_ended", fail)
    monkeypatch.setattr(Ledger, "finished", fail)
    assert await worker.handle() is None
    assert await worker.written() == dict.fromkeys(NAMES, True)


async def test_a_chunk_that_a_worker_takes_over_from_itself(worker: Fixture) -> None:
    """A chunk in hand is fetched once if it is delivered again to the same worker."""
    await asyncio.gather(worker.handle(), worker.handle(redelivered=True))
    assert worker.client.asked == NAMES


async def test_a_temporary_directory_that_is_full(worker: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is the machine's fault: the chunk goes back, and the worker ends."""

    class Full(BytesIO):
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(handling, "SpooledTemporaryFile", lambda size: Full())
    assert await worker.handle() == timedelta(seconds=1)
    assert (
        worker.desk.store.fault.result().message == "cannot write to the temporary directory: No space left on device"
    )


async def test_a_store_that_fails_too_long(worker: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, or when the worker closes, the chunk goes back; only the first reason is kept."""
    monkeypatch.setattr(patient, "_HOLD", 0.15)
    worker.store._failing = {"put": range(1000)}
    assert await worker.handle("a0") == await worker.handle("a1") == timedelta(seconds=1)
    assert isinstance(worker.desk.store.fault.result(), PartsError)
    assert (await worker.ledger.started(PART)).count == 1


async def test_an_unexpected_error(worker: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is left to the queue, which tries the chunk again, and counts as no death."""
    monkeypatch.setattr(outcome_files, "line", lambda outcome: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await worker.handle()
    assert (await worker.ledger.started(PART)).count == 1


async def test_one_account_in_two_chunks(worker: Fixture) -> None:
    """Two chunks that ask for the same account at the same time both get an outcome."""
    account = worker.desk._accounts["a0"]

    async def outcomes() -> list[str]:
        return [outcome.account.name async for outcome in worker.slots.fetch([account])]

    assert list(await asyncio.gather(outcomes(), outcomes())) == [["a0"], ["a0"]]
