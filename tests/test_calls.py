"""The calls of one client in virtual time: their answers and errors as values, with and without the cache."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import virtual
from virtual import LeakyBucket, Service

from audiences_async import (
    Account,
    AudiencesClient,
    AudiencesResponse,
    CachePolicy,
    ClientClosedError,
    DeadlineExceededError,
    RateLimit,
    RetryPolicy,
    TooManyRequestsError,
    TransportError,
)
from audiences_async._base.deadlines import Deadlines
from audiences_async._call.calls import Calls
from audiences_async._call.context import CallContext, Caller
from audiences_async._call.retrying import RetryTokens
from audiences_async._pace.pacer import Pacer

pytestmark = [pytest.mark.once, pytest.mark.simulated]

NORTH = Account("north", "key-north")
CACHES = pytest.mark.parametrize("cache", [None, CachePolicy(ttl=60)], ids=["without a cache", "with one"])


def calls_of(service: Any, *, cache: CachePolicy | None = None) -> Calls:
    """Return the calls of a client of this service."""
    clock, deadlines = virtual.clock(), Deadlines()
    pacer = Pacer(
        None, None, connections=100, attempt_timeout=15.0, throttle_base_delay=1.0, max_delay=20.0,
        clock=clock, deadlines=deadlines, on_event=None,
    )  # fmt: skip
    context = CallContext(RetryPolicy(), RetryTokens(None), clock, None, pacer, service)
    return Calls(context, deadlines, cache=cache, timeout=60.0)


@CACHES
def test_a_call_out_of_time_is_an_error_with_its_attempts(cache: CachePolicy | None) -> None:
    """Return `DeadlineExceededError` at the deadline, with the account and the attempt that was cut off."""

    async def main() -> None:
        calls = calls_of(Service(lambda key, at: 200, round_trip=100.0), cache=cache)
        error = await calls.answer(Caller(NORTH, 5.0, None))
        assert isinstance(error, DeadlineExceededError)
        assert (error.account, error.stop_reason, len(error.attempts)) == ("north", "deadline", 1)
        assert virtual.now() == pytest.approx(5.0)
        await calls.close()

    virtual.run(main())


@CACHES
def test_closing_ends_all_calls(cache: CachePolicy | None) -> None:
    """Return `ClientClosedError` from every call in flight, and wait for them."""

    async def main() -> None:
        calls = calls_of(Service(lambda key, at: 200, round_trip=100.0), cache=cache)
        tasks = [asyncio.create_task(calls.answer(Caller(Account(f"a{n}", f"key-{n}"), 60.0, None))) for n in range(3)]
        await asyncio.sleep(1)
        await calls.close()
        assert all(task.done() for task in tasks)
        assert all(isinstance(task.result(), ClientClosedError) for task in tasks)

    virtual.run(main())


@pytest.mark.parametrize(("cache", "requests"), [(None, 3), (CachePolicy(ttl=60), 1)], ids=["without", "with"])
def test_only_a_cache_reuses_an_answer(cache: CachePolicy | None, requests: int) -> None:
    """Send a request for each call without a cache, and one for all with it, until the answer is invalidated."""

    async def main() -> None:
        service = Service(lambda key, at: 200)
        calls = calls_of(service, cache=cache)
        for _ in range(3):
            assert isinstance(await calls.answer(Caller(NORTH, 60.0, None)), AudiencesResponse)
        assert len(service.seen) == requests
        calls.invalidate(NORTH)
        await calls.answer(Caller(NORTH, 60.0, None))
        assert len(service.seen) == requests + 1
        await calls.close()

    virtual.run(main())


@CACHES
def test_a_key_function_that_fails_is_retried(cache: CachePolicy | None) -> None:
    """Ask the key function again after a failure, and send one request with its key."""
    asked: list[float] = []

    async def key() -> str:
        asked.append(virtual.now())
        if len(asked) == 1:
            raise TransportError("the vault is busy")
        return "key-late"

    async def main() -> None:
        service = Service(lambda key, at: 200)
        calls = calls_of(service, cache=cache)
        assert isinstance(await calls.answer(Caller(Account("north", key), 60.0, None)), AudiencesResponse)
        assert service.times(key="key-late") == service.times()
        await calls.close()

    virtual.run(main())
    assert len(asked) == 2


def test_concurrent_calls_share_one_key() -> None:
    """Call an account's key function once for calls at the same time, and again once they are over."""
    asked: list[float] = []

    async def key() -> str:
        asked.append(virtual.now())
        await asyncio.sleep(1)
        return "key"

    async def main() -> None:
        calls = calls_of(Service(lambda key, at: 200))
        account = Account("north", key)
        await asyncio.gather(*(calls.answer(Caller(account, 60.0, None)) for _ in range(5)))
        await calls.answer(Caller(account, 60.0, None))
        await calls.close()

    virtual.run(main())
    assert len(asked) == 2


@pytest.mark.parametrize("retry", [RetryPolicy(statuses={500}), RetryPolicy(max_attempts=1)], ids=["other", "once"])
def test_a_429_paces_its_account_whatever_is_retried(monkeypatch: pytest.MonkeyPatch, retry: RetryPolicy) -> None:
    """Learn the account's limit from refusals that the policy does not retry."""
    service = Service(LeakyBucket(5, 1))
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        async with AudiencesClient(clock=virtual.clock(), retry=retry) as client:
            for _ in range(40):
                with suppress(TooManyRequestsError):
                    await client.get_audiences(NORTH)
            (pace,) = client.snapshot().accounts
            assert pace.rate == pytest.approx(5.0, rel=0.3)

    virtual.run(main())
    assert len(service.times(429)) <= 8


def test_a_job_that_waits_for_its_turn_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who joins the request of a job gets all the time that it asked for, in one request."""
    service = Service(lambda key, at: 200, round_trip=10.0)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        limit, cache = RateLimit(1, per=2.0), CachePolicy(ttl=0.0)
        async with AudiencesClient(
            clock=virtual.clock(), cache=cache, service_rate_limit=limit, retry=RetryPolicy(max_attempts=1)
        ) as client:
            job = asyncio.create_task(client.fetch_all([Account("first", "f"), NORTH], timeout=1.0))
            await asyncio.sleep(0.5)  # the job's second account waits until 2.0 for the service's turn
            with pytest.raises(DeadlineExceededError):
                await client.get_audiences(NORTH, timeout=8.0)
            assert virtual.now() == pytest.approx(8.5)
            outcome = (await job)[1]
            assert not outcome.ok
            assert "inf" not in str(outcome.error)

    virtual.run(main())
    assert len(service.times(key="key-north")) == 1
