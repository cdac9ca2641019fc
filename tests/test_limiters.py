"""A caller's limiters, kept in memory or in Redis, and the learned pace against a real nginx."""

import asyncio
from pathlib import Path
from time import monotonic

import pytest
from conftest import EMPTY_ANSWER
from services import missing, nginx, redis_server

from audiences_async import (
    Account,
    AudiencesClient,
    ConfigurationError,
    Limiter,
    RateLimit,
    RetryPolicy,
    TransportError,
)
from audiences_async.distributed import RedisLimiter, connect
from audiences_async.sandbox import Answer, Sandbox


class LeakyBucketLimiter:
    """A limiter like aiolimiter's, one per account: a burst in each period, then one at a time."""

    def __init__(self, limit: int, period: float) -> None:
        self._limit = limit
        self._period = period
        self._levels: dict[str, float] = {}
        self.asked: list[str] = []

    async def acquire(self, account_name: str) -> None:
        """Wait until the account's level allows a request."""
        self.asked.append(account_name)
        self._levels[account_name] = self._levels.get(account_name, 0.0) + 1
        over = self._levels[account_name] - self._limit
        if over > 0:
            await asyncio.sleep(over * self._period / self._limit)


async def test_a_limiter_is_asked_before_every_attempt(sandbox: Sandbox, north: Account, at_once: RetryPolicy) -> None:
    """Call a caller's limiter with the account's name, for retries too."""
    south = sandbox.add_account("south")
    sandbox.script("north", Answer(500), Answer(429))
    limiter = LeakyBucketLimiter(100, 1.0)
    async with AudiencesClient(base_url=sandbox.base_url, rate_limit=limiter, retry=at_once) as client:
        await client.get_audiences(north)
        await client.get_audiences(south)
        assert {pace.rate for pace in client.snapshot().accounts} == {None}
    assert limiter.asked == ["north", "north", "north", "south"]
    assert isinstance(limiter, Limiter)


@pytest.mark.parametrize("kind", [OSError, asyncio.CancelledError])
async def test_a_limiter_that_fails_is_an_error_of_the_call(
    sandbox: Sandbox, north: Account, at_once: RetryPolicy, kind: type[BaseException]
) -> None:
    """End the call if a limiter keeps failing for a transient reason, and send nothing."""

    class Broken:
        async def acquire(self, account_name: str) -> None:
            raise kind("Redis is away")

    told = rf"account 'north': rate_limit.acquire.* raised {kind.__name__}"
    async with AudiencesClient(base_url=sandbox.base_url, rate_limit=Broken(), retry=at_once) as client:
        with pytest.raises(TransportError, match=told) as caught:
            await client.get_audiences(north, timeout=10.0)
    assert isinstance(caught.value.__cause__, kind)
    assert sandbox.requests == []


def test_what_is_no_limiter_is_refused() -> None:
    """Reject a rate_limit that is no RateLimit and has no acquire()."""
    with pytest.raises(ConfigurationError, match="rate_limit must be RateLimit or Limiter or None, got int"):
        AudiencesClient(rate_limit=20)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed")
async def test_a_limit_shared_by_clients_through_redis(sandbox: Sandbox, north: Account, tmp_path: Path) -> None:
    """Share one account's rate between two clients, as in two processes; no key reaches Redis."""
    with redis_server(tmp_path) as url:
        async with connect(url, 10) as store:
            settings = {"base_url": sandbox.base_url, "rate_limit": RedisLimiter(store, RateLimit(50))}
            started = monotonic()  # the first request may come late; the last one may not come early
            async with AudiencesClient(**settings) as one, AudiencesClient(**settings) as other:  # type: ignore[arg-type]
                await asyncio.gather(*(client.get_audiences(north) for client in (one, other) * 10))
            assert await store.keys("*") in ([], [b"audiences:pace:north"])
    assert sandbox.seen("north")[-1].at - started >= 0.95 * 19 * 0.020


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.skipif(missing("nginx"), reason="nginx is not installed")
async def test_a_real_limit_is_learned_with_few_requests_to_spare(tmp_path: Path) -> None:
    """Against nginx's limit_req, 60 concurrent calls are all answered with at most 1.25 requests each."""
    with nginx(tmp_path, EMPTY_ANSWER, rate=20, burst=5) as server:
        async with AudiencesClient("one", base_url=server.base_url) as client:
            answers = await asyncio.gather(*(client.get_audiences() for _ in range(60)))
    # nginx writes its log after its answers: it is complete once nginx has ended.
    assert len(answers) == 60
    assert server.statuses("one").count(200) == 60
    assert len(server.statuses("one")) <= 75
