"""The retry budget: what costs tokens, what is free, and that no account of a job fails because of others."""

import asyncio
import itertools
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import aiohttp
import pytest
import virtual
from conftest import RawConnection, RawServer
from virtual import LeakyBucket, Service

from audiences_async import (
    Account,
    AudiencesClient,
    CachePolicy,
    ConnectionFailedError,
    Failed,
    Outcome,
    RetryBudget,
    RetryPolicy,
    ServerError,
    TransportError,
)
from audiences_async.sandbox import Answer, Sandbox

pytestmark = pytest.mark.slow

StartRaw: TypeAlias = Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]]
MakeClient: TypeAlias = Callable[..., AudiencesClient]
FULL = RetryBudget().capacity
LOST = 0  # instead of a status: no response arrives


class LossyService(Service):
    """A service in virtual time whose connections may be lost."""

    async def attempt(self, *arguments: Any, **named: Any) -> Any:
        """Turn a status of `LOST` into a reset connection."""
        reply = await super().attempt(*arguments, **named)
        return ConnectionFailedError("reset") if not isinstance(reply, TransportError) and not reply.status else reply


class PartlyDown:
    """A service that answers a fifth of the keys with *down*, and every tenth of the other requests with *flaky*."""

    def __init__(self, down: int, flaky: int) -> None:
        self._down, self._flaky = down, flaky
        self._numbers = itertools.count(1)

    def __call__(self, key: str, at: float) -> int:
        """Return the status of a request."""
        if int(key) % 5 == 0:
            return self._down
        return self._flaky if next(self._numbers) % 10 == 0 else 200


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> MakeClient:
    """Yield a function that creates clients of a service in virtual time."""

    def make(service: Service, **settings: Any) -> AudiencesClient:
        monkeypatch.setattr("audiences_async._call.engine.Transport", service)
        return AudiencesClient(base_url="http://localhost/", clock=virtual.clock(), **settings)

    return make


def many(count: int) -> list[Account]:
    """Return *count* accounts; their names and keys are numbers."""
    return [Account(str(number), str(number)) for number in range(count)]


def reasons(results: list[Outcome]) -> Counter[str]:
    """Count the errors of failed accounts."""
    return Counter(str(result.error.stop_reason) for result in results if isinstance(result, Failed))


# --- what a retry costs


@pytest.mark.parametrize(
    ("answer", "cost"),
    [
        (Answer(429), 0),
        (Answer(429, retry_after=0), 0),
        (Answer(200, {"status": 429, "data": []}), 0),
        (Answer(401), 0),
        *[(Answer(status), 5) for status in (408, 500, 502, 503, 504)],
        (Answer(200, {"status": "503", "data": []}), 5),
        (Answer(failure="reset"), 5),
        (Answer(failure="cut-body"), 5),
        (Answer(delay=0.2), 5),
    ],
    ids=lambda value: f"{value.failure or value.status}-{value.delay}" if isinstance(value, Answer) else None,
)
async def test_what_a_retry_costs(sandbox: Sandbox, at_once: RetryPolicy, answer: Answer, cost: int) -> None:
    """Take tokens only for a retry after a 5xx, a 408, a timeout or a failed connection; refund one per answer."""
    key = sandbox.add_account("north").api_key
    sandbox.script("north", answer)
    attempt_timeout = 0.1 if answer.delay else 10.0  # so that on a busy machine nothing else times out
    async with AudiencesClient(base_url=sandbox.base_url, retry=at_once, attempt_timeout=attempt_timeout) as client:
        await client.get_audiences(Account("north", lambda: str(key)))
        assert client.snapshot().budget_left == min(FULL, FULL - cost + 1)
    assert len(sandbox.requests) == 2


# --- what is free fails no call, however often it is needed


@pytest.mark.long
@pytest.mark.once
@pytest.mark.simulated
@pytest.mark.parametrize("way", ["get_audiences", "fetch_all"])
def test_429s_of_many_accounts_fail_no_call(client: MakeClient, way: str) -> None:
    """Answer every call of 1,000 accounts with three calls each, limited to two requests per second each."""
    accounts = many(1000) * 3

    async def main() -> float:
        async with client(Service(LeakyBucket(2.0, 1))) as c:
            if way == "fetch_all":
                assert reasons(await c.fetch_all(accounts, concurrency=3000)) == {}
            else:
                await asyncio.gather(*map(c.get_audiences, accounts))
            return c.snapshot().budget_left

    assert virtual.run(main()) == FULL


@pytest.mark.long
@pytest.mark.once
@pytest.mark.parametrize("way", ["get_audiences", "fetch_all"])
async def test_rotated_keys_fail_no_call(sandbox: Sandbox, way: str) -> None:
    """Answer 500 accounts whose functions return the old key first, and the new one when called again."""
    for number in range(500):
        sandbox.add_account(str(number), api_key=f"new-{number}")
    functions = [iter([f"old-{number}", f"new-{number}"]) for number in range(500)]
    accounts = [Account(str(number), functions[number].__next__) for number in range(500)]
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        if way == "get_audiences":
            await asyncio.gather(*map(client.get_audiences, accounts))
        else:
            assert reasons(await client.fetch_all(accounts)) == {}
        assert client.snapshot().budget_left == FULL
    assert Counter(request.answer for request in sandbox.requests) == {401: 500, 200: 500}


@pytest.mark.long
@pytest.mark.parametrize("how", ["closes", "resets"])
@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
async def test_stale_connections_fail_no_call(raw: StartRaw, how: str, *, is_given: bool) -> None:
    """Answer 600 successive calls, for no tokens, from a server that ends each connection after one answer."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.answer()
        if how == "closes":
            await asyncio.sleep(0.0005)
        else:
            await connection.request()
            linger = struct.pack("ii", 1, 0)  # closing it sends a reset
            connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    server = await raw(serve)
    async with aiohttp.ClientSession() as session:
        client = AudiencesClient("key", base_url=server.base_url, session=session if is_given else None)
        async with client:
            for _ in range(600):
                await client.get_audiences()
            assert client.snapshot().budget_left == FULL
    assert server.connections == 600


# --- a job


@pytest.mark.long
@pytest.mark.once
@pytest.mark.simulated
@pytest.mark.parametrize("cache", [None, CachePolicy(ttl=60.0)], ids=["", "cached"])
@pytest.mark.parametrize(("down", "flaky"), [(500, 503), (LOST, 408), (504, LOST)])
def test_accounts_that_are_down_fail_no_others(
    client: MakeClient, down: int, flaky: int, cache: CachePolicy | None
) -> None:
    """Fetch every healthy account with a fifth of the accounts down and the others failing once in ten."""

    async def main() -> list[Outcome]:
        async with client(LossyService(PartlyDown(down, flaky)), cache=cache) as c:
            return await c.fetch_all(many(1000))

    results = virtual.run(main())
    assert {result.account.name for result in results if not result.ok} == {str(n) for n in range(0, 1000, 5)}
    assert reasons(results) == {"attempts": 200}


@pytest.mark.once
@pytest.mark.simulated
@pytest.mark.parametrize("concurrency", [1, 2, 100])
def test_a_job_without_tokens_comes_to_its_end(client: MakeClient, concurrency: int) -> None:
    """Fetch all healthy accounts with a budget of one retry without refunds, at any concurrency."""

    async def main() -> list[Outcome]:
        budget = RetryBudget(capacity=5, refund=0)
        async with client(Service(PartlyDown(down=500, flaky=503)), budget=budget) as c:
            return await c.fetch_all(many(100), concurrency=concurrency)

    assert reasons(virtual.run(main())) == {"attempts": 20}


@pytest.mark.once
@pytest.mark.simulated
def test_a_job_of_which_nothing_is_answered_comes_to_its_end(client: MakeClient) -> None:
    """However many accounts wait to retry without tokens, each has its outcome in the end."""

    async def main() -> list[Outcome]:
        async with client(Service(lambda key, at: 500)) as c:
            return await c.fetch_all(many(1300))

    stopped = reasons(virtual.run(main()))
    assert (stopped.total(), stopped["budget"]) == (1300, 0)


@pytest.mark.once
@pytest.mark.simulated
def test_a_single_call_without_tokens_ends(client: MakeClient) -> None:
    """Outside a job an empty budget ends a call with its first error, even while a job that emptied it continues."""

    async def main() -> None:
        service = Service(lambda key, at: 500, round_trip=1.0)
        async with client(service, budget=RetryBudget(5, refund=0)) as c, c.stream(many(500)) as results:
            await anext(results)
            with pytest.raises(ServerError) as caught:
                await c.get_audiences(Account("north", "north"))
            assert (caught.value.stop_reason, len(caught.value.attempts)) == ("budget", 1)

    virtual.run(main())
