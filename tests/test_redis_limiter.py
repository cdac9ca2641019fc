"""A rate that several processes share, on a real Redis."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from services import free_port, missing, redis_server

from audiences_async import Account, AudiencesClient, DeadlineExceededError, Failed, RateLimit, RetryPolicy, distributed
from audiences_async.distributed import DocketError, RedisLimiter
from audiences_async.sandbox import Sandbox

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Redis and return its URL."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    """Return a client of an empty Redis."""
    async with distributed.connect(url, 10) as client:
        await client.flushall()
        yield client


@pytest.mark.once
@pytest.mark.timed
async def test_one_rate_for_all_processes(url: str, redis: Redis) -> None:
    """Clients that share a Redis share each account's rate, bursts included; other accounts are not delayed."""
    async with distributed.connect(url, 10) as other:
        limiters = [RedisLimiter(client, RateLimit(rate=10, burst=3)) for client in (redis, other)]
        now = asyncio.get_running_loop().time
        started = now()
        times: list[float] = []

        async def ask(number: int) -> None:
            await limiters[number % 2].acquire("north")
            times.append(now() - started)

        await asyncio.gather(*map(ask, range(9)))
        before = now()
        await limiters[0].acquire("south")
        assert now() - before < 0.1, "less than north would have to wait"
    times.sort()
    assert times[2] < 0.1, "the burst at once"
    assert all(time >= (number - 2) / 10 - 0.002 for number, time in enumerate(times))


@pytest.mark.once
@pytest.mark.timed
async def test_one_rate_for_all_accounts(redis: Redis) -> None:
    """A limit with a name is shared by all accounts."""
    limiter = RedisLimiter(redis, RateLimit(rate=20), name="service")
    now = asyncio.get_running_loop().time
    started = now()
    await asyncio.gather(*(limiter.acquire(name) for name in "abcde"))
    assert now() - started >= 4 / 20 - 0.002


@pytest.mark.parametrize("patience", [0.02, 0.3])
@pytest.mark.once
@pytest.mark.timed
async def test_callers_that_give_up_take_nothing_from_others(redis: Redis, patience: float) -> None:
    """Of many callers that time out, as many have their turn as the rate allows, to the end."""
    limiter = RedisLimiter(redis, RateLimit(rate=10))
    now = asyncio.get_running_loop().time
    started, turns = now(), []

    async def ask() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await limiter.acquire("north")
                turns.append(now() - started)

    async with asyncio.TaskGroup() as callers:
        while now() - started < 2.0:
            callers.create_task(ask())
            await asyncio.sleep(0.005)
    assert len([turn for turn in turns if 0.5 <= turn < 2.0]) in range(10, 17)


async def test_a_wait_that_does_not_fit_is_refused_at_once(redis: Redis) -> None:
    """Refuse a call whose turn comes too late, behind others of this process or of another, with the time to wait."""
    limiter, other = (RedisLimiter(redis, RateLimit(rate=1, per=60)) for _ in range(2))
    await other.acquire("north")
    async with asyncio.timeout(1):
        with pytest.raises(DeadlineExceededError) as caught:
            await limiter.acquire_within("north", 30)
        assert caught.value.retry_after == pytest.approx(60, abs=1)
        waiting = [asyncio.ensure_future(limiter.acquire("north")) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlineExceededError):
            await limiter.acquire_within("north", 59)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_a_client_refuses_at_once(redis: Redis, sandbox: Sandbox) -> None:
    """Calls of a client that come too late for their timeout fail at once, with the time to wait."""
    limiter = RedisLimiter(redis, RateLimit(rate=2))
    account = sandbox.add_account("north")
    async with AudiencesClient(base_url=sandbox.base_url, rate_limit=limiter) as client, asyncio.timeout(4):
        outcomes = await asyncio.gather(
            *(client.get_audiences(account, timeout=1.2) for _ in range(20)), return_exceptions=True
        )
        again = await client.get_audiences(account, timeout=3)
    late = [outcome for outcome in outcomes if isinstance(outcome, DeadlineExceededError)]
    assert len(late) in {17, 18}
    assert max(error.retry_after or 0.0 for error in late) > 5
    assert again.status == 200


@pytest.mark.parametrize("stored", ["99999999999999999", "nan", "inf", "-5", "nonsense"])
async def test_an_absurd_time_is_not_trusted(redis: Redis, stored: str) -> None:
    """Start anew from a time that the rate cannot have led to."""
    await redis.set("audiences:pace:north", stored)
    async with asyncio.timeout(1):
        await RedisLimiter(redis, RateLimit(rate=10)).acquire("north")


async def test_more_callers_than_connections(url: str) -> None:
    """Callers wait for a connection instead of failing."""
    async with distributed.connect(url, 2) as redis:
        limiter = RedisLimiter(redis, RateLimit(rate=1000))
        await asyncio.gather(*(limiter.acquire(f"a{number}") for number in range(200)))


async def test_a_redis_that_is_away(sandbox: Sandbox) -> None:
    """A Redis that cannot be reached is a failure that may pass, as of the transport."""
    async with distributed.connect(f"redis://127.0.0.1:{free_port()}", 2) as redis:
        limiter = RedisLimiter(redis, RateLimit(rate=10))
        retry = RetryPolicy(max_attempts=2, base_delay=0.0)
        async with AudiencesClient(base_url=sandbox.base_url, rate_limit=limiter, retry=retry) as client:
            (outcome,) = await client.fetch_all([sandbox.add_account("north")])
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, DocketError)
    assert (outcome.error.stop_reason, outcome.error.gateway_status) == ("attempts", 502)
    assert sandbox.requests == []


async def test_a_limiter_of_ones_own_that_knows_the_deadline(sandbox: Sandbox) -> None:
    """A limiter with *acquire_within* is given the time that is left, and its error is the call's."""

    class Late:
        async def acquire(self, account_name: str) -> None:
            raise AssertionError

        async def acquire_within(self, account_name: str, timeout: float) -> None:
            raise DeadlineExceededError("later", retry_after=timeout)

    account = Account("north", "key")
    for limits in ((Late(), None), (None, Late())):
        client = AudiencesClient(base_url=sandbox.base_url, rate_limit=limits[0], service_rate_limit=limits[1])
        async with client:
            with pytest.raises(DeadlineExceededError, match="later") as caught:
                await client.get_audiences(account, timeout=7)
            assert caught.value.retry_after == pytest.approx(7, abs=0.5)


async def test_a_turn_that_is_far_away(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that is further away than a little is not reserved, and comes in time nevertheless."""
    monkeypatch.setattr("audiences_async._distributed.limiter._AHEAD", 0.05)
    limiter = RedisLimiter(redis, RateLimit(rate=5))
    await limiter.acquire("north")
    before = await redis.get("audiences:pace:north")
    started = time.monotonic()
    waiting = asyncio.ensure_future(limiter.acquire("north"))
    await asyncio.sleep(0.05)
    assert await redis.get("audiences:pace:north") == before
    await waiting
    assert 0.18 <= time.monotonic() - started < 0.4


@pytest.mark.once
@pytest.mark.timed
async def test_a_turn_that_was_missed(redis: Redis) -> None:
    """A process that is too busy to use its turn in time asks for another one."""
    limiter = RedisLimiter(redis, RateLimit(rate=100))
    loop = asyncio.get_running_loop()
    await limiter.acquire("north")
    before = await redis.get("audiences:pace:north")
    loop.call_later(0.005, time.sleep, 0.1)
    await limiter.acquire("north")
    assert int(await redis.get("audiences:pace:north") or 0) - int(before or 0) > 100_000


def test_urls(tmp_path: Path) -> None:
    """Keep the size of the pool that the URL sets."""
    assert distributed.connect("redis://h?max_connections=3", 10).connection_pool.max_connections == 3
