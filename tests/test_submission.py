"""The submitting side of a job on many machines, on a real Redis."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from docket import Docket, Worker
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from services import free_port, missing, redis_server
from workers import Flaky, asked, expected, failures, fetched, opened, submitted, until, worker

from audiences_async import ConfigurationError, distributed
from audiences_async._distributed import handling, submission
from audiences_async._distributed import worker as working
from audiences_async._distributed.chunks import chunks
from audiences_async._distributed.ledger import Ledger
from audiences_async.distributed import DocketError
from audiences_async.sandbox import Answer, Sandbox

A0 = b'{"account": "a0", "ok": true, "audiences": []}\n'
JOB = "20261128T000000Z-0123456789abcdef"

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed"),
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for parts and late chunks at every turn."""
    monkeypatch.setattr(submission, "_LOOK_EVERY", 0.01)
    monkeypatch.setattr(submission, "_LATE", 0.02)
    monkeypatch.setattr(submission, "_PATIENT", 0.1)
    monkeypatch.setattr(working, "_RETRY_AFTER", timedelta(0))


@contextlib.asynccontextmanager
async def other_worker(url: str, parts: Path, *wrote: bytes) -> AsyncIterator[list[list[str]]]:
    """Run a worker whose parts always have the same lines; yield the names of its chunks."""
    seen: list[list[str]] = []

    async def fetch_chunk(part: str, names: list[str]) -> None:
        seen.append(names)
        if wrote:
            await distributed.open_store(parts).put(part, BytesIO(b"".join(wrote)))

    async with Docket("audiences", url) as docket:
        docket.register(fetch_chunk)
        async with Worker(docket, minimum_check_interval=timedelta(milliseconds=10)) as one:
            task = asyncio.create_task(one.run_forever())
            yield seen
            task.cancel()
            await asyncio.wait({task})


async def test_resuming_has_only_the_rest_fetched(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Parts that were written without a submitter are merged, and only the rest is fetched."""
    accounts = opened(sandbox, 8)
    sandbox.script("a1", Answer(403))
    parts, out = tmp_path / "parts", tmp_path / "out"
    first = asyncio.create_task(submitted(redis, accounts, parts, out, job=JOB))
    async with worker(redis, accounts, parts, sandbox):
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        first.cancel()
        await asyncio.wait({first})
        await asyncio.to_thread(sandbox.wait_for_requests, 8)
    assert sorted(asked(sandbox)) == sorted(accounts)
    async with worker(redis, accounts, parts, sandbox):
        await submitted(redis, accounts, parts, out, job=JOB)
    assert fetched(out) == expected(8)
    assert sorted(asked(sandbox)[8:]) == ["a1"]
    assert list(parts.iterdir()) == []


@pytest.mark.usefixtures("quick")
async def test_resuming_does_not_submit_the_rest_of_a_chunk_again(redis: str, tmp_path: Path) -> None:
    """If a worker fetches what an earlier part of its chunk lacked, a resumed job waits for that part."""
    seen: list[list[str]] = []
    resumed = asyncio.Event()

    async def fetch_chunk(part: str, names: list[str]) -> None:
        seen.append(names)
        if names == ["a1"]:
            await resumed.wait()
        await distributed.open_store(tmp_path).put(part, BytesIO(A0 if "a0" in names else A0.replace(b"a0", b"a1")))

    async def is_fetching_the_rest() -> bool:
        return ["a1"] in seen

    async with Docket("audiences", redis) as docket:
        docket.register(fetch_chunk)
        async with Worker(docket, minimum_check_interval=timedelta(milliseconds=10)) as one:
            task = asyncio.create_task(one.run_forever())
            job = asyncio.create_task(submitted(redis, ["a0", "a1"], tmp_path, tmp_path / "out", job=JOB))
            await until(is_fetching_the_rest)
            job.cancel()
            await asyncio.wait({job})
            job = asyncio.create_task(submitted(redis, ["a0", "a1"], tmp_path, tmp_path / "out", job=JOB))
            await asyncio.sleep(0.3)
            resumed.set()
            assert await job == ["a1"]
            task.cancel()
            await asyncio.wait({task})
    assert fetched(tmp_path / "out") == {"a0": [], "a1": []}
    assert seen == [["a0", "a1"], ["a1"]]


async def test_parts_of_another_job_are_not_used(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """A new job neither merges nor removes what an earlier one has left, even of the same accounts."""
    accounts = opened(sandbox, 1)
    store = distributed.open_store(tmp_path / "parts")
    (chunk,) = chunks(JOB, accounts, 4)
    await store.put(chunk.part, BytesIO(A0))
    async with worker(redis, accounts, store, sandbox):
        await submitted(redis, accounts, store, tmp_path / "out")
    assert fetched(tmp_path / "out") == expected(1)
    assert await store.names(JOB) == [chunk.part]


async def test_two_submitters_of_the_same_accounts(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Each of two jobs has all accounts, although they share the queue, the workers and the directory."""
    accounts, parts = opened(sandbox, 40), tmp_path / "parts"
    async with worker(redis, accounts, parts, sandbox):
        await asyncio.gather(*(submitted(redis, accounts, parts, tmp_path / out) for out in ("one", "two")))
    assert fetched(tmp_path / "one") == fetched(tmp_path / "two") == expected(40)
    assert len(sandbox.requests) == 80
    assert list(parts.iterdir()) == []


async def test_two_fleets_on_one_redis(
    redis: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with other accounts and another directory leaves a job's chunks to the job's own workers."""
    monkeypatch.setattr(handling, "_ELSEWHERE", timedelta(milliseconds=50))
    accounts = opened(sandbox, 40)
    fleets = [dict(list(accounts.items())[:20]), dict(list(accounts.items())[20:])]
    told: list[str] = []
    async with worker(redis, fleets[0], tmp_path / "p0", sandbox), worker(redis, fleets[1], tmp_path / "p1", sandbox):
        await asyncio.gather(
            *(
                submitted(redis, fleet, tmp_path / f"p{number}", tmp_path / f"o{number}", on_notice=told.append)
                for number, fleet in enumerate(fleets)
            )
        )
    assert fetched(tmp_path / "o0") | fetched(tmp_path / "o1") == expected(40)
    assert len(sandbox.requests) == 40
    assert any("give each fleet its own --queue" in text for text in told)


async def test_two_queues_on_one_redis(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Workers of another queue do not see a job."""
    accounts = opened(sandbox, 8)
    async with (
        worker(redis, {}, tmp_path / "parts", sandbox, queue="theirs"),
        worker(redis, accounts, tmp_path / "parts", sandbox, queue="ours"),
    ):
        await submitted(redis, accounts, tmp_path / "parts", tmp_path / "out", queue="ours")
    assert fetched(tmp_path / "out") == expected(8)


@pytest.mark.usefixtures("quick")
async def test_a_part_that_is_nowhere_is_asked_for_again(redis: str, tmp_path: Path) -> None:
    """If the part of a chunk is missing, the chunk is repeated, and then its accounts fail with that reason."""
    async with other_worker(redis, tmp_path) as seen:
        await submitted(redis, ["a0", "a1"], tmp_path, tmp_path / "out")
    assert failures(tmp_path / "out")["a0"].endswith("no worker could write its chunk: the part is missing")
    assert seen == [["a0", "a1"]] * 3


@pytest.mark.usefixtures("quick")
async def test_a_chunk_that_redis_has_lost(redis: str, tmp_path: Path) -> None:
    """A Redis that is emptied, however often, costs no account anything."""
    job = asyncio.create_task(submitted(redis, ["a0"], tmp_path, tmp_path / "out"))
    async with Redis.from_url(redis) as client:
        for _ in range(4):
            await until(lambda: client.exists("audiences:stream"))
            await client.flushall()
    async with other_worker(redis, tmp_path, A0):
        assert await job == ["a0"]
    assert failures(tmp_path / "out") == {}


@pytest.mark.usefixtures("quick")
async def test_a_worker_with_a_bug(redis: str, tmp_path: Path) -> None:
    """A chunk on which workers fail unexpectedly is tried three times, and its accounts get the reason."""

    async def fetch_chunk(part: str, names: list[str]) -> None:
        raise ZeroDivisionError("a bug")

    async with Docket("audiences", redis) as docket:
        docket.register(fetch_chunk)
        async with Worker(docket) as one:
            task = asyncio.create_task(one.run_forever())
            await submitted(redis, ["a0"], tmp_path, tmp_path / "out")
            task.cancel()
            await asyncio.wait({task})
    assert "no worker could write its chunk: ZeroDivisionError: a bug" in failures(tmp_path / "out")["a0"]


@pytest.mark.usefixtures("quick")
async def test_a_part_that_lacks_an_account(redis: str, tmp_path: Path) -> None:
    """Ask for an account again that a part lacks, and write one line for each, even if a part has it twice."""
    async with other_worker(redis, tmp_path, A0, A0) as seen:
        merged = await submitted(redis, ["a0", "a1"], tmp_path, tmp_path / "out")
    assert merged == ["a0", "a1"]
    assert failures(tmp_path / "out") == {"a1": "account 'a1': missing from its chunk's part"}
    assert seen == [["a0", "a1"], ["a1"], ["a1"], ["a1"]]


@pytest.mark.usefixtures("quick")
async def test_what_a_killed_worker_left_half_written_is_removed(redis: str, tmp_path: Path) -> None:
    """Remove a job's own temporary files at its end, and no others."""
    (chunk,) = chunks(JOB, ["a0"], 4)
    ours, others = tmp_path / JOB / ".a.0123456789abcdef.tmp", tmp_path / ".other.ndjson.0123456789abcdef.tmp"
    ours.parent.mkdir()
    ours.touch()
    others.touch()
    async with other_worker(redis, tmp_path, A0):
        await submitted(redis, ["a0"], tmp_path, tmp_path / "out", job=JOB)
    assert chunk.part.startswith(JOB)
    assert (ours.exists(), others.exists()) == (False, True)


@pytest.mark.usefixtures("quick")
async def test_without_a_worker_it_says_so(redis: str, tmp_path: Path) -> None:
    """Report missing workers once, and keep waiting."""
    told: list[str] = []
    job = asyncio.create_task(submitted(redis, ["a0"], tmp_path / "parts", tmp_path / "out", on_notice=told.append))
    await asyncio.sleep(0.5)
    job.cancel()
    await asyncio.wait({job})
    assert (job.cancelled(), len(told)) == (True, 1)
    assert told[0].startswith("no worker yet; start one: audiences worker")


@pytest.mark.usefixtures("quick")
async def test_a_redis_that_goes_away(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """While Redis is down, a submitter merges the parts that there are, waits, and says so once; then it goes on."""
    told: list[str] = []
    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    with redis_server(folder, port) as url:
        job = asyncio.create_task(
            submitted(url, ["a0", "a1"], tmp_path, tmp_path / "out", job=JOB, chunk_size=1, on_notice=told.append)
        )
        async with Redis.from_url(url) as client:
            await until(lambda: client.exists("audiences:stream"))
    first, _ = chunks(JOB, ["a0", "a1"], 1)
    await distributed.open_store(tmp_path).put(first.part, BytesIO(A0))
    await until(lambda: asyncio.to_thread(fetched, tmp_path / "out"))
    assert [text for text in told if "Redis is unavailable" in text] == told[-1:]
    with redis_server(folder, port):
        async with other_worker(url, tmp_path, A0.replace(b"a0", b"a1")):
            assert await job == ["a0", "a1"]


@pytest.mark.usefixtures("quick")
async def test_a_redis_that_is_full(redis: str, tmp_path: Path) -> None:
    """If Redis has no memory, the submitter waits until it has some, and says so."""
    told: list[str] = []
    async with Redis.from_url(redis) as client, other_worker(redis, tmp_path, A0):
        await client.config_set("maxmemory", 1)
        try:
            job = asyncio.create_task(submitted(redis, ["a0"], tmp_path, tmp_path / "out", on_notice=told.append))
            await asyncio.sleep(0.5)
            assert not job.done()
        finally:
            await client.config_set("maxmemory", 0)
        assert await job == ["a0"]
    assert "Redis is unavailable: command not allowed when used memory > 'maxmemory'" in told[0]


@pytest.mark.usefixtures("quick")
async def test_a_redis_that_hangs(redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that does not answer is as one that is away."""
    told: list[str] = []
    async with Redis.from_url(redis) as client:
        job = asyncio.create_task(submitted(redis, ["a0"], tmp_path, tmp_path / "out", on_notice=told.append))
        await until(lambda: client.exists("audiences:stream"))
        with monkeypatch.context() as patch:
            patch.setattr("audiences_async._distributed.connection._TIMEOUT", 0.2)
            await client.client_pause(1000)
            await asyncio.sleep(1.0)
    async with other_worker(redis, tmp_path, A0):
        assert await job == ["a0"]
    assert any("Redis is unavailable: no answer within 0.2 s" in text for text in told)


@pytest.mark.usefixtures("quick")
async def test_a_redis_that_hangs_before_it_has_a_chunk(
    redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that could not be sent in time is looked for, and fetched once."""
    monkeypatch.setattr("audiences_async._distributed.connection._TIMEOUT", 0.5)
    told: list[str] = []

    def names() -> Iterator[str]:
        with BlockingRedis.from_url(redis) as client:
            client.client_pause(1500)
        yield "a0"

    async with other_worker(redis, tmp_path, A0) as seen:
        assert await submitted(redis, names(), tmp_path, tmp_path / "out", on_notice=told.append) == ["a0"]
    assert told[0] == "Redis is unavailable: no answer within 0.5 s; waiting for it"
    assert seen == [["a0"]]


@pytest.mark.usefixtures("quick")
async def test_a_redis_that_took_a_chunk_and_could_not_say_so(
    redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is not sent again if only the answer was lost, even if it was fetched meanwhile."""
    add_many = Docket.add_many

    async def add_many_in_vain(self: Docket, *arguments: Any) -> Any:
        monkeypatch.setattr(Docket, "add_many", add_many)
        await add_many(self, *arguments)
        await until(lambda: asyncio.to_thread(lambda: list(tmp_path.glob(f"{JOB}/*.ndjson"))))
        raise RedisConnectionError("reset by peer")

    monkeypatch.setattr(Docket, "add_many", add_many_in_vain)
    async with other_worker(redis, tmp_path, A0) as seen:
        assert await submitted(redis, ["a0"], tmp_path, tmp_path / "out", job=JOB) == ["a0"]
    assert seen == [["a0"]]


@pytest.mark.usefixtures("quick")
async def test_few_chunks_wait_in_redis(redis: str, tmp_path: Path) -> None:
    """Of many accounts, about ten chunks for each worker are in Redis, and no more are read."""
    read: list[str] = []

    def names() -> Iterator[str]:
        for number in range(100_000):
            read.append(f"a{number}")
            yield read[-1]

    job = asyncio.create_task(submitted(redis, names(), tmp_path, tmp_path / "out"))
    await asyncio.sleep(0.5)
    async with Redis.from_url(redis) as client:
        assert await client.xlen("audiences:stream") == 10
    assert len(read) <= 44
    job.cancel()
    await asyncio.wait({job})


@pytest.mark.usefixtures("quick")
async def test_a_store_that_fails_for_a_while(redis: str, tmp_path: Path) -> None:
    """If the parts cannot be read, listed or removed for a while, the submitter tries again, and says so."""
    told: list[str] = []
    store = Flaky(tmp_path, {"get": [1, 2], "remove": [1]})
    async with other_worker(redis, tmp_path, A0):
        assert await submitted(redis, ["a0"], store, tmp_path / "out", on_notice=told.append) == ["a0"]
    assert told == ["no get at the moment; trying again"]


@pytest.mark.usefixtures("quick")
async def test_neither_redis_nor_the_store(redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the parts cannot be listed while Redis is away, the submitter waits for both."""
    told: list[str] = []
    store = Flaky(tmp_path, {"names": [2]})
    news = Ledger.news
    failing = iter([DocketError("away")])

    async def look(self: Ledger, *arguments: Any) -> Any:
        for error in failing:
            raise error
        return await news(self, *arguments)

    monkeypatch.setattr(Ledger, "news", look)
    async with other_worker(redis, tmp_path, A0):
        assert await submitted(redis, ["a0"], store, tmp_path / "out", on_notice=told.append) == ["a0"]
    problems = [text.partition(" (")[0] for text in told if not text.startswith("no worker yet")]
    assert problems == ["away; waiting for it", "no names at the moment; trying again"]


async def test_a_long_job_that_is_resumed(redis: str, tmp_path: Path) -> None:
    """Of a job whose accounts were all fetched before, nothing is submitted."""
    names = [f"a{number}" for number in range(3 * 100)]
    lines = "".join(f'{{"account":"{name}","ok":true,"elapsed":0,"audiences":[]}}\n' for name in names)
    (tmp_path / "out").write_text(lines)
    assert await submitted(redis, names, tmp_path, tmp_path / "out", chunk_size=1) == []
    assert len(fetched(tmp_path / "out")) == 300


@pytest.mark.parametrize("url", ["nonsense", "redis://u:s3cr3t@[/0", "redis://:s3cr3t@127.0.0.1:1/0?max_connections=x"])
async def test_a_url_that_cannot_be_used(url: str, tmp_path: Path) -> None:
    """Report an invalid URL as a usage error, without repeating it."""
    with pytest.raises(ConfigurationError, match="invalid Redis URL") as caught:
        await submitted(url, ["a0"], tmp_path, tmp_path / "out")
    assert caught.value.__cause__ is caught.value.__context__ is None
    with pytest.raises(ConfigurationError, match="invalid Redis URL"):
        distributed.connect(url, 5)


@pytest.mark.parametrize("queue", ["", "a:b", "{a}", "a" * 101])
async def test_a_queue_that_cannot_be_used(queue: str, tmp_path: Path) -> None:
    """Refuse a name that could clash with Redis keys."""
    with pytest.raises(ConfigurationError, match="queue must be"):
        await submitted("redis://127.0.0.1:1", ["a0"], tmp_path, tmp_path / "out", queue=queue)


async def test_a_redis_that_is_not_there(tmp_path: Path) -> None:
    """If Redis does not listen at the start, the submitter ends with an error and a hint."""
    url = f"redis://127.0.0.1:{free_port()}/0?max_connections=5"
    with pytest.raises(DocketError, match="Redis is unavailable: .*check the Redis URL"):
        await submitted(url, ["a0"], tmp_path, tmp_path / "out")


def test_the_identity_of_a_job(tmp_path: Path) -> None:
    """An interrupted job keeps its id for --resume; a complete one, a new one and a damaged record give a new id."""
    out = tmp_path / "out"
    with contextlib.suppress(KeyboardInterrupt), distributed.recorded(out, resume=False) as first:
        raise KeyboardInterrupt
    with distributed.recorded(out, resume=True) as resumed:
        pass
    with distributed.recorded(out, resume=True) as second:
        (tmp_path / ".out.job").write_text('{"job": "../.."}')
        with distributed.recorded(out, resume=True) as third:
            pass
    assert first == resumed
    assert len({first, second, third}) == 3
    assert list(tmp_path.iterdir()) == []
