"""The workers of a job on many machines, on a real Redis."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError
from services import Forwarder, free_port, missing, redis_server
from workers import (
    Flaky,
    asked,
    expected,
    failures,
    fetched,
    opened,
    submitted,
    until,
    worker,
)

from audiences_async import AudiencesClient, ConfigurationError, RateLimit, RetryPolicy, distributed
from audiences_async._distributed import handling, patient
from audiences_async._distributed import worker as working
from audiences_async.distributed import DocketError, PartsError, RedisLimiter
from audiences_async.sandbox import Answer, Sandbox

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed"),
]


async def test_what_a_worker_cannot_do_is_an_error_of_the_account(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Write an account that fails, and one missing from the worker's own file, as lines with errors."""
    accounts = opened(sandbox, 6)
    sandbox.script("a1", Answer(403))
    known = {name: account for name, account in accounts.items() if name != "a2"}
    async with worker(redis, known, tmp_path / "parts", sandbox):
        merged = await submitted(redis, accounts, tmp_path / "parts", tmp_path / "out")
    assert sorted(merged) == sorted(accounts)
    failed = failures(tmp_path / "out")
    assert failed.keys() == {"a1", "a2"}
    assert "HTTP 403" in failed["a1"]
    assert failed["a2"] == "account 'a2': missing from the worker's accounts file"


@pytest.mark.timed
async def test_slow_accounts_hold_up_no_others(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """If the last account of each chunk is slow, the slots are used for other chunks meanwhile."""
    accounts = opened(sandbox, 48)
    for number in range(3, 48, 4):
        sandbox.script(f"a{number}", Answer(delay=1.0))
    async with worker(redis, accounts, tmp_path / "parts", sandbox, concurrency=16):
        began = asyncio.get_running_loop().time()
        await submitted(redis, accounts, tmp_path / "parts", tmp_path / "out")
    assert asyncio.get_running_loop().time() - began < 2.5, "one at a time they take 3 s for each of two chunks in hand"
    assert fetched(tmp_path / "out") == expected(48)


@pytest.mark.timed
async def test_a_worker_is_ended(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """A worker that ends starts no account, writes those that are done, and leaves the others to the next one."""
    accounts = opened(sandbox, 12)
    for name in ("a0", "a1"):
        sandbox.script(name, Answer(delay=0.5))
    sandbox.script("a2", Answer(delay=30.0))
    parts = tmp_path / "parts"
    job = asyncio.create_task(submitted(redis, accounts, parts, tmp_path / "out"))
    async with worker(redis, accounts, parts, sandbox, concurrency=3, grace=1.0) as task:
        await asyncio.to_thread(sandbox.wait_for_requests, 3)
        task.cancel()
        began = asyncio.get_running_loop().time()
        await asyncio.wait({task})
        assert asyncio.get_running_loop().time() - began < 2.5
    assert sorted(asked(sandbox)) == ["a0", "a1", "a2"]
    async with worker(redis, accounts, parts, sandbox):
        await job
    assert fetched(tmp_path / "out") == expected(12)
    assert asked(sandbox).count("a2") == 2
    assert len(sandbox.requests) == 13


async def test_an_account_that_crashes_its_worker(
    redis: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three deaths, the account that was fetched alone fails, and the other accounts of its chunk do not."""
    accounts = opened(sandbox, 4)
    program = tmp_path / "crash.py"
    program.write_text(CRASH)
    crash = [sys.executable, str(program), redis, str(tmp_path / "parts"), sandbox.base_url]
    job = asyncio.create_task(submitted(redis, accounts, tmp_path / "parts", tmp_path / "out"))
    deaths = 0
    while not job.done():
        process = await asyncio.create_subprocess_exec(*crash)
        ended = asyncio.ensure_future(process.wait())
        await asyncio.wait({job, ended}, return_when=asyncio.FIRST_COMPLETED)
        deaths += ended.done()
        if not ended.done():
            process.kill()
            await ended
    await job
    assert deaths == 3
    assert failures(tmp_path / "out") == {"a2": "account 'a2': the worker died each time that it fetched this account"}
    assert fetched(tmp_path / "out").keys() == accounts.keys()


CRASH = """
import asyncio, os, sys
from datetime import timedelta
from pathlib import Path
from audiences_async import Account, AudiencesClient, distributed
from audiences_async._distributed import worker

worker._TAKEOVER = timedelta(seconds=1)

def key(name):
    def found():
        if name == "a2":
            os._exit(1)
        return f"s3cr3t-k3y-{name}"
    return found

url, parts, base_url = sys.argv[1:]
accounts = {name: Account(name, key(name)) for name in ("a0", "a1", "a2", "a3")}
asyncio.run(distributed.work(url, accounts, parts, AudiencesClient(base_url=base_url)))
"""


async def test_a_store_that_fails_now_and_then(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """If every tenth part cannot be written at first, no account is fetched twice, and none fails."""
    accounts = opened(sandbox, 200)
    store = Flaky(tmp_path / "parts", {"put": range(10, 1000, 10)})
    async with worker(redis, accounts, store, sandbox, concurrency=100):
        await submitted(redis, accounts, tmp_path / "parts", tmp_path / "out")
    assert fetched(tmp_path / "out") == expected(200)
    assert (len(sandbox.requests), store.calls["put"]) == (200, 1 + 50 + 5)


async def test_a_store_that_cannot_be_written(
    redis: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker whose store fails takes no chunk, says why, and ends; its chunk is another's, and no account fails."""
    monkeypatch.setattr(patient, "_HOLD", 0.5)
    accounts = opened(sandbox, 40)
    store = Flaky(tmp_path / "parts", {"put": range(2, 1000)})
    job = asyncio.create_task(submitted(redis, accounts, tmp_path / "parts", tmp_path / "out"))
    async with worker(redis, accounts, store, sandbox, concurrency=1) as task:
        with pytest.raises(PartsError, match="no put at the moment"):
            await task
    assert "no put at the moment; this worker takes no chunks" in caplog.text
    assert len(sandbox.requests) < 40
    async with worker(redis, accounts, tmp_path / "parts", sandbox):
        await job
    assert fetched(tmp_path / "out") == expected(40)


async def test_a_store_that_cannot_be_written_at_the_start(sandbox: Sandbox) -> None:
    """End at once if the store cannot be written, before any connection to Redis."""
    with pytest.raises(PartsError, match="cannot write to /proc"):
        await distributed.work("redis://127.0.0.1:1", {}, "/proc", AudiencesClient(base_url=sandbox.base_url))


async def test_a_redis_that_hangs(sandbox: Sandbox, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An idle worker ends soon although Redis does not answer."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        async with Redis.from_url(url) as client, worker(url, {}, tmp_path, sandbox) as task:
            await until(lambda: client.zcard("audiences:workers"))
            await client.client_pause(30_000)
            began = asyncio.get_running_loop().time()
            task.cancel()
            await asyncio.wait({task})
            assert asyncio.get_running_loop().time() - began < 8


async def test_a_redis_that_restarts(
    sandbox: Sandbox, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With a limit in a Redis that restarts, the worker waits, and no account fails."""
    accounts = opened(sandbox, 60)
    port, folder, parts = free_port(), tmp_path_factory.mktemp("redis"), tmp_path / "parts"
    with redis_server(folder, port) as url:
        redis = distributed.connect(url, 5)
        job = asyncio.create_task(submitted(url, accounts, parts, tmp_path / "out"))
        running = worker(url, accounts, parts, sandbox, client=limited(sandbox, redis))
        await running.__aenter__()
        await asyncio.to_thread(sandbox.wait_for_requests, 10)
    await asyncio.sleep(2.0)
    with redis_server(folder, port):
        await job
        await running.__aexit__(None, None, None)
        await redis.aclose()
    assert fetched(tmp_path / "out") == expected(60)


async def dies(first: Redis, second: Redis) -> None:
    """Kill the master; its replica takes over."""
    with contextlib.suppress(RedisError):
        await first.shutdown(nosave=True)
    await second.replicaof("NO", "ONE")


async def steps_down(first: Redis, second: Redis) -> None:
    """Swap the roles and drop all connections, as Sentinel does."""
    await second.replicaof("NO", "ONE")
    await first.replicaof("127.0.0.1", port_of(second))
    await first.client_kill_filter(_type="normal", skipme=True)


def port_of(client: Redis) -> int:
    """Return the port of the Redis that a client speaks to."""
    return int(client.connection_pool.connection_kwargs["port"])


@pytest.mark.parametrize("failover", [dies, steps_down])
async def test_a_redis_that_fails_over(
    failover: Callable[[Redis, Redis], Awaitable[None]],
    sandbox: Sandbox,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """If a replica takes over, workers and submitter go on with it, and every account is fetched once."""
    accounts, parts = opened(sandbox, 60), tmp_path / "parts"
    folders = [tmp_path_factory.mktemp("redis") for _ in range(2)]
    ports = [free_port(), free_port()]
    with (
        redis_server(folders[0], ports[0]) as first,
        redis_server(folders[1], ports[1], "--replicaof", "127.0.0.1", str(ports[0])) as second,
    ):
        async with (
            Redis.from_url(first) as master,
            Redis.from_url(second) as replica,
            Forwarder(ports[0]) as address,
            distributed.connect(f"redis://127.0.0.1:{address.port}", 2) as shared,
        ):
            url = f"redis://127.0.0.1:{address.port}"
            await until(lambda: is_in_sync(replica))
            async with (
                worker(url, accounts, parts, sandbox, client=limited(sandbox, shared)),
                worker(url, accounts, parts, sandbox, client=limited(sandbox, shared)),
            ):
                job = asyncio.create_task(submitted(url, accounts, parts, tmp_path / "out"))
                await asyncio.to_thread(sandbox.wait_for_requests, 10)
                await master.wait(1, 1000)
                await failover(master, replica)
                address.target = ports[1]
                await job
    assert fetched(tmp_path / "out") == expected(60)
    assert sorted(asked(sandbox)) == sorted(accounts)


async def is_in_sync(replica: Redis) -> bool:
    """Return whether a replica has what its master has."""
    return bool((await replica.info("replication"))["master_link_status"] == "up")


async def drops_connections(client: Redis) -> None:
    """Drop all connections again and again."""
    for _ in range(10):
        await client.client_kill_filter(_type="normal", skipme=True)
        await asyncio.sleep(0.1)


async def drops_idle_connections(client: Redis) -> None:
    """Drop connections that were idle for a second."""
    await client.config_set("timeout", 1)
    for _ in range(6):
        await asyncio.sleep(0.5)
        await client.ping()
    await client.config_set("timeout", 0)


async def is_full(client: Redis) -> None:
    """Refuse what needs memory."""
    await client.config_set("maxmemory", 1)
    await asyncio.sleep(0.7)
    await client.config_set("maxmemory", 0)


async def is_demoted(client: Redis) -> None:
    """Be a replica for a while, which refuses to write, and then the master again."""
    await client.replicaof("127.0.0.1", free_port())
    await asyncio.sleep(0.7)
    await client.replicaof("NO", "ONE")


@pytest.mark.parametrize("trouble", [drops_connections, drops_idle_connections, is_full, is_demoted])
async def test_a_redis_in_trouble(
    trouble: Callable[[Redis], Awaitable[None]],
    redis: str,
    sandbox: Sandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers keep their chunks, slow ones too, and what was fetched is not fetched again."""
    monkeypatch.setattr(working, "_TAKEOVER", timedelta(seconds=5))
    monkeypatch.setattr(handling, "_RENEW_EVERY", 0.2)
    accounts, parts = opened(sandbox, 60), tmp_path / "parts"
    sandbox.script("a0", Answer(delay=8.0))
    async with (
        Redis.from_url(redis) as admin,
        distributed.connect(redis, 2) as shared,
        worker(redis, accounts, parts, sandbox, client=limited(sandbox, shared)),
        worker(redis, accounts, parts, sandbox, client=limited(sandbox, shared)),
    ):
        job = asyncio.create_task(submitted(redis, accounts, parts, tmp_path / "out"))
        await asyncio.to_thread(sandbox.wait_for_requests, 10)
        await trouble(admin)
        await job
    assert fetched(tmp_path / "out") == expected(60)
    assert sorted(asked(sandbox)) == sorted(accounts)


def limited(sandbox: Sandbox, redis: Redis) -> AudiencesClient:
    """Return a client with a limit in Redis."""
    limiter = RedisLimiter(redis, RateLimit(30), name="service")
    retry = RetryPolicy(max_attempts=2, base_delay=0.1)
    return AudiencesClient(base_url=sandbox.base_url, retry=retry, service_rate_limit=limiter)


async def test_a_redis_that_is_not_there(tmp_path: Path) -> None:
    """If Redis does not listen at the start, the worker ends with an error."""
    with pytest.raises(DocketError):
        await distributed.work(f"redis://127.0.0.1:{free_port()}", {}, tmp_path, AudiencesClient())


@pytest.mark.parametrize("setting", [{"concurrency": 0}, {"grace": -1}, {"patience": 0}, {"queue": "a b"}])
async def test_a_setting_that_is_wrong(setting: dict[str, Any], tmp_path: Path) -> None:
    """Refuse a wrong setting."""
    with pytest.raises(ConfigurationError):
        await distributed.work("redis://127.0.0.1:1", {}, tmp_path, AudiencesClient(), **setting)
