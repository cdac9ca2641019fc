"""What workers learn of the service from each other."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from docket import Docket
from paces import LearnedPace
from services import missing, redis_server
from workers import expected, fetched, opened, submitted, worker

from audiences_async import Attempt, AudiencesClient, RateLimit, RetryPolicy, TransportError, distributed
from audiences_async._distributed import peers as module
from audiences_async._distributed.peers import Peers
from audiences_async.distributed import RedisLimiter
from audiences_async.events import AttemptFinished, ServicePaused, ServiceResumed
from audiences_async.sandbox import Answer, Sandbox

pytestmark = [
    pytest.mark.timed,
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed"),
]

OUT = ServicePaused("", 1.0, asked=False, state="out")
ANSWERED = AttemptFinished("a", Attempt(1, 200, None, 0.1, 0.0, "success"))


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Redis and return its URL."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
async def fleet(
    redis: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[list[Peers]]:
    """Yield three workers that are busy, and know of each other."""
    monkeypatch.setattr(module, "_EVERY", 0.02)
    monkeypatch.setattr(module, "_TURN", 0.2)
    found = [Peers(patience=1.0) for _ in range(3)]
    async with Docket(request.node.name, redis) as docket, AsyncExitStack() as stack:
        for number, one in enumerate(found):
            task = asyncio.create_task(one.run(docket, f"w{number}", lambda: {"waiting": 5}))
            stack.callback(task.cancel)
        await asyncio.sleep(0.2)
        yield found
        for one in found:
            await one.leave(docket)


async def turns(one: Peers, seconds: float) -> int:
    """Return how many requests a worker may send within *seconds*."""
    count = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                await one.acquire("a")
                count += 1
                await asyncio.sleep(0.01)
    except TimeoutError:
        return count


async def test_an_outage_is_shared(fleet: list[Peers]) -> None:
    """If the service is out for one, one request in a turn is sent by all together, until one is answered."""
    assert await turns(fleet[1], 0.1) > 3
    fleet[0](OUT)
    await asyncio.sleep(0.1)
    assert sum(await asyncio.gather(*(turns(one, 0.8) for one in fleet))) in range(3, 7)
    fleet[0](ServiceResumed(""))
    await asyncio.sleep(0.1)
    assert min(await asyncio.gather(*(turns(one, 0.1) for one in fleet))) > 3


async def test_a_long_refusal_is_shared(fleet: list[Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause after a refusal counts for others if it lasts, or the service named a time."""
    monkeypatch.setattr(module, "_SETTLED", 0.3)
    fleet[0](ServicePaused("", 0.1, asked=False, state="limited"))
    await asyncio.sleep(0.1)
    assert await turns(fleet[1], 0.1) > 3
    await asyncio.sleep(0.2)
    assert await turns(fleet[1], 0.4) <= 2
    fleet[0](ServicePaused("", 0.1, asked=True, state="limited"))
    monkeypatch.setattr(module, "_SETTLED", 10.0)
    await asyncio.sleep(0.1)
    assert await turns(fleet[1], 0.4) <= 2


async def test_one_machine_without_a_network(fleet: list[Peers]) -> None:
    """A worker that gets no answer does not stop those that do."""
    fleet[0](OUT)
    await asyncio.sleep(0.1)
    fleet[1](ANSWERED)
    await asyncio.sleep(0.1)
    assert min(await asyncio.gather(*(turns(one, 0.1) for one in fleet))) > 3


async def test_patience(fleet: list[Peers]) -> None:
    """An account waits for others' probes as long as the patience."""
    fleet[0](OUT)
    await asyncio.sleep(0.1)
    with pytest.raises(TransportError, match="longer than the patience of 1 s") as caught:
        await turns(fleet[1], 5.0)
    assert caught.value.stop_reason == "patience"


async def test_a_rate_is_shared(fleet: list[Peers]) -> None:
    """A worker that was never refused keeps to the mean of the rates that others have learned."""
    paces = [LearnedPace(rate) for rate in (10.0, 30.0, None)]
    for one, pace in zip(fleet, paces, strict=True):
        one.attach_pace(pace)
    await asyncio.sleep(0.2)
    assert [pace.learned_rate for pace in paces] == [10.0, 30.0, 20.0]


async def test_one_limit_of_all(redis: str) -> None:
    """The limit of all workers is asked for each request, with the time that is left."""
    async with distributed.connect(redis, 2) as client:
        one = Peers(1.0, RedisLimiter(client, RateLimit(20), name="all"))
        assert one.limit == RateLimit(20)
        assert await turns(one, 0.5) in range(9, 12)


class Simple:
    """A limiter of the user's own."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def acquire(self, account_name: str) -> None:
        """Note the account."""
        self.asked.append(account_name)


async def test_a_limiter_of_ones_own() -> None:
    """Any limiter may be the limit of all workers."""
    limiter = Simple()
    await Peers(1.0, limiter).acquire("north")
    assert limiter.asked == ["north"]


async def test_a_worker_that_died_is_forgotten(redis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of a worker that died counts for a few seconds, and is removed later; so is one that is no report."""
    monkeypatch.setattr(module, "_EVERY", 0.02)
    async with Docket("dead", redis) as docket:
        dead = asyncio.create_task(Peers(1.0).run(docket, "dead", dict))
        await asyncio.sleep(0.1)
        dead.cancel()
        monkeypatch.setattr(module, "_KEPT", 0.1)
        async with docket.redis() as client:
            await client.hset("dead:reports", "of another version", "no JSON")
        alive = asyncio.create_task(Peers(1.0).run(docket, "alive", dict))
        await asyncio.sleep(0.3)
        alive.cancel()
        async with docket.redis() as client:
            assert set(await client.hgetall("dead:reports")) == {b"alive"}


@pytest.mark.once
async def test_an_outage_of_workers(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """During an outage three workers send few probes together; then all accounts arrive."""
    accounts = opened(sandbox, 300)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            peers = Peers(30.0)
            client = AudiencesClient(
                base_url=sandbox.base_url, service_rate_limit=peers, on_event=peers, retry=RetryPolicy(base_delay=0.1)
            )
            await stack.enter_async_context(
                worker(redis, accounts, tmp_path / "parts", sandbox, client=client, peers=peers, patience=30.0)
            )
        for name in accounts:
            sandbox.script(name, Answer(delay=0.1))
        job = asyncio.create_task(submitted(redis, accounts, tmp_path / "parts", tmp_path / "out"))
        await asyncio.to_thread(sandbox.wait_for_requests, 60)
        with sandbox.outage(Answer(503)):
            await asyncio.sleep(2.5)
            before = len(sandbox.requests)
            await asyncio.sleep(4.0)
            probes = len(sandbox.requests) - before
        await job
    assert fetched(tmp_path / "out") == expected(300)
    assert probes <= 5, "each worker alone sends as many"
