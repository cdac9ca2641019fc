"""Many accounts: one outcome each, whatever fails, in bounded tasks, and nothing left behind."""

import asyncio
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest
from conftest import eager_task_factory

from audiences_async import (
    Account,
    AudiencesClient,
    ClientClosedError,
    ConfigurationError,
    Failed,
    Fetched,
    RetryPolicy,
    TransportError,
    UnauthorizedError,
)
from audiences_async._jobs import jobs
from audiences_async._jobs.places import Place
from audiences_async.sandbox import Answer, Sandbox, many_audiences


@pytest.fixture
async def client(sandbox: Sandbox, at_once: RetryPolicy) -> AsyncIterator[AudiencesClient]:
    """Yield a client of the sandbox that never waits between attempts."""
    async with AudiencesClient(base_url=sandbox.base_url, retry=at_once, budget=None) as client:
        yield client


def opened(sandbox: Sandbox, count: int, **settings: Any) -> list[Account]:
    """Open *count* accounts whose audiences carry their names."""
    names = [f"a{number}" for number in range(count)]
    return [sandbox.add_account(name, audiences=many_audiences(name, 3), **settings) for name in names]


def others() -> set["asyncio.Task[Any]"]:
    """Return all tasks but the test's own."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def numbers(count: int) -> AsyncIterator[int]:
    """Yield the numbers below *count*."""
    for number in range(count):
        yield number


async def test_every_account_has_its_own_outcome(sandbox: Sandbox, client: AudiencesClient) -> None:
    """Return 300 outcomes for 300 accounts with a tenth of the answers wrong; none gets another's audiences."""
    accounts = opened(sandbox, 300, fault_rate=0.1)
    async with client.stream(accounts, concurrency=20) as outcomes:
        fetched = [outcome async for outcome in outcomes]
    assert sorted(outcome.account.name for outcome in fetched) == sorted(account.name for account in accounts)
    for outcome in fetched:
        assert isinstance(outcome, Fetched), outcome
        names = {str(audience.id).split("-")[0] for audience in outcome.response}
        assert (names, len(outcome.response)) == ({outcome.account.name}, 3)
    assert others() == set()


async def test_a_source_that_waits(sandbox: Sandbox, client: AudiencesClient) -> None:
    """While the source waits for its next account, one that retries gets its place back."""
    first, second = opened(sandbox, 2)
    sandbox.script("a0", Answer(500))
    fetched = asyncio.Event()

    async def accounts() -> AsyncIterator[Account]:
        yield first
        await fetched.wait()
        yield second

    async with client.stream(accounts(), concurrency=1) as outcomes, asyncio.timeout(10):
        assert (await anext(outcomes)).account == first
        fetched.set()
        assert (await anext(outcomes)).account == second


async def test_a_source_is_read_in_one_task(sandbox: Sandbox, client: AudiencesClient) -> None:
    """A source may hold a timeout and a task group open while it yields."""
    source = opened(sandbox, 20)

    async def account_of(number: int) -> Account:
        return source[number]

    async def accounts() -> AsyncIterator[Account]:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for number in range(20):
                yield await group.create_task(account_of(number))

    async with client.stream(accounts(), concurrency=4) as outcomes:
        assert len([outcome async for outcome in outcomes if outcome.ok]) == 20


async def test_a_failed_account_is_an_outcome(sandbox: Sandbox, client: AudiencesClient) -> None:
    """Return the error as the account's outcome, without the frames that it was raised in; it pickles."""
    north = sandbox.add_account("north")
    stranger = Account("stranger", "wrong")
    failed, fetched = await client.fetch_all([stranger, north])
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, UnauthorizedError)
    assert (failed.ok, failed.account, failed.error.account) == (False, stranger, "stranger")
    assert failed.error.__traceback__ is None
    assert str(pickle.loads(pickle.dumps(failed)).error) == str(failed.error)
    assert (fetched.ok, fetched.account) == (True, north)
    assert 0 < fetched.elapsed < 60


async def test_fetch_all_keeps_the_order(sandbox: Sandbox, client: AudiencesClient) -> None:
    """Outcomes are in the order given, also of an async iterable, if the first is slow and one occurs twice."""
    first, second = opened(sandbox, 2)
    sandbox.script(first.name, Answer(delay=0.1))

    async def source() -> AsyncIterator[Account]:
        for account in (first, second, second, first):
            yield account

    outcomes = await client.fetch_all(source())
    assert [outcome.account for outcome in outcomes] == [first, second, second, first]
    assert all(outcome.ok for outcome in outcomes)
    assert await client.fetch_all([]) == []


async def test_accounts_are_read_as_there_is_room(sandbox: Sandbox, client: AudiencesClient) -> None:
    """Stop the job at twice its concurrency if a consumer takes nothing; taking some lets as many in."""
    account = sandbox.add_account("north")
    read = 0

    def source() -> Iterator[Account]:
        nonlocal read
        while True:
            read += 1
            yield account

    async with client.stream(source(), concurrency=3) as outcomes:
        for taken in range(5):
            await asyncio.to_thread(sandbox.wait_for_requests, 6 + taken)
            assert read == 6 + taken
            assert len(others()) <= 3
            await anext(outcomes)
    assert others() == set()


async def test_no_more_tasks_than_accounts() -> None:
    """Tasks never exceed the concurrency, and a job of three does not start a hundred."""
    running = most = tasks = 0

    async def work(number: int, _place: Place) -> int:
        nonlocal running, most, tasks
        running += 1
        most, tasks = max(most, running), max(tasks, len(others()))
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1
        return number

    async with jobs.stream(jobs.each(range(50)), work, 4) as results:
        assert sorted([number async for number in results]) == list(range(50))
    assert most == 4
    async with jobs.stream(numbers_of(3), work, 100) as results:
        assert len([number async for number in results]) == 3
    assert tasks <= 5


async def test_new_items_pass_those_that_return() -> None:
    """An item that returns waits until fifty new ones for each place have begun, or none is left."""
    begun: list[int] = []

    async def work(number: int, place: Place) -> int:
        begun.append(number)
        if number in {0, 150}:
            place.leave()
            await place.enter(lets_pass=True)
            begun.append(-number)
        return number

    async with jobs.stream(numbers_of(160), work, 2) as results:
        assert len([number async for number in results]) == 160
    assert 100 < begun.index(0, 1) <= 104
    assert begun[-1] == -150


def numbers_of(count: int) -> Any:
    """Return the numbers as a job's source."""
    return jobs.each(numbers(count))


@pytest.mark.parametrize("way", ["break", "exception", "cancel"])
async def test_leaving_early_ends_every_task(sandbox: Sandbox, client: AudiencesClient, way: str) -> None:
    """However the block is left, no task stays and no further request is sent."""
    accounts = opened(sandbox, 20)
    for account in accounts[1:]:
        sandbox.script(account.name, Answer(delay=30.0))

    async def consume() -> None:
        async with client.stream(accounts, concurrency=5) as outcomes:
            async for _ in outcomes:
                await asyncio.to_thread(sandbox.wait_for_requests, 6)
                if way == "exception":
                    raise LookupError
                if way == "break":
                    break

    consumer = asyncio.create_task(consume())
    await asyncio.to_thread(sandbox.wait_for_requests, 6)
    if way == "cancel":
        consumer.cancel()
    await asyncio.wait({consumer})
    assert consumer.cancelled() == (way == "cancel")
    if way == "exception":
        assert isinstance(consumer.exception(), LookupError)
    assert others() == set()
    assert len(sandbox.requests) == 6
    assert sum(pace.in_flight + pace.waiting for pace in client.snapshot().accounts) == 0


async def test_a_source_that_raises_ends_the_job_after_what_was_begun(
    sandbox: Sandbox, client: AudiencesClient
) -> None:
    """Items read before are delivered, then the source's own error is raised; a later consumer gets an error too."""
    accounts = opened(sandbox, 4)

    def source() -> Iterator[Account]:
        yield from accounts
        raise LookupError("the file ends here")

    delivered: list[str] = []

    async def take_all() -> None:
        async for outcome in outcomes:
            delivered.append(outcome.account.name)  # noqa: PERF401 -- what came before the error counts

    async with client.stream(source(), concurrency=2) as outcomes:
        with pytest.raises(LookupError, match="the file ends here"):
            await take_all()
        with pytest.raises(ClientClosedError, match="before its end"):
            await take_all()
    assert sorted(delivered) == [account.name for account in accounts]


async def test_fetch_all_sends_nothing_where_the_source_fails(sandbox: Sandbox, client: AudiencesClient) -> None:
    """Refuse an item that is not an account with its index, before the first request."""
    accounts: list[Any] = [*opened(sandbox, 2), "a2"]
    with pytest.raises(ConfigurationError, match=r"accounts\[2\] must be Account, got str"):
        await client.fetch_all(accounts)
    assert sandbox.requests == []


@pytest.mark.parametrize(
    ("accounts", "settings", "message"),
    [
        (None, {}, "accounts must be Iterable or AsyncIterable, got NoneType"),
        ([], {"concurrency": 0}, "concurrency must be a whole number of 1 or more, got 0"),
        ([], {"timeout": -1.0}, "timeout must be a finite number of seconds above 0"),
    ],
)
async def test_bad_arguments_are_refused(
    client: AudiencesClient, accounts: Any, settings: dict[str, Any], message: str
) -> None:
    """Invalid arguments are refused when the job is created."""
    with pytest.raises(ConfigurationError, match=message):
        client.stream(accounts, **settings)
    with pytest.raises(ConfigurationError, match=message):
        await client.fetch_all(accounts, **settings)


async def test_the_timeout_is_each_accounts_own(sandbox: Sandbox, client: AudiencesClient) -> None:
    """Give each account its full timeout, even if another one times out."""
    slow, quick = opened(sandbox, 2)
    sandbox.script(slow.name, Answer(delay=30.0))
    late, answered = await client.fetch_all([slow, quick], timeout=0.3, concurrency=1)
    assert isinstance(late, Failed)
    assert late.error.stop_reason == "deadline"
    assert answered.ok


async def test_a_client_closed_meanwhile_loses_no_account(sandbox: Sandbox, client: AudiencesClient) -> None:
    """Return each account's outcome all the same; a closed client begins no job."""
    accounts = opened(sandbox, 4)
    for account in accounts:
        sandbox.script(account.name, Answer(delay=30.0))
    async with client.stream(accounts, concurrency=2) as outcomes:
        await asyncio.to_thread(sandbox.wait_for_requests, 2)
        await client.aclose()
        errors = [outcome.error async for outcome in outcomes if isinstance(outcome, Failed)]
    assert [type(error) for error in errors] == [ClientClosedError] * 4
    with pytest.raises(ClientClosedError):
        client.stream(accounts)


async def test_several_consumers_share_the_results() -> None:
    """Share the results between two tasks that iterate, each exactly once; both reach the end."""

    async def work(number: int, _place: Place) -> int:
        await asyncio.sleep(0)
        return number

    async with jobs.stream(numbers_of(20), work, 3) as results:

        async def consume() -> list[int]:
            return [number async for number in results]

        one, other = await asyncio.gather(consume(), consume())
    assert sorted(one + other) == list(range(20))


async def test_whoever_still_iterates_when_the_stream_is_left_is_told() -> None:
    """Raise for a task that still iterates when the stream is left, so that it never takes it for the end."""

    async def work(number: int, _place: Place) -> int:
        await asyncio.Event().wait()
        return number

    async with jobs.stream(numbers_of(2), work, 1) as results:
        consumer = asyncio.ensure_future(anext(results))
        await asyncio.sleep(0)
    with pytest.raises(ClientClosedError, match="closed before its end"):
        await consumer


async def test_a_cancelled_worker_is_not_passed_over() -> None:
    """End the iteration as a cancellation, not as an end, if the job's tasks are cancelled from outside."""

    async def work(number: int, _place: Place) -> int:
        await asyncio.Event().wait()
        return number

    async with jobs.stream(numbers_of(2), work, 1) as results:
        await asyncio.sleep(0)
        for task in others():
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await anext(results)


async def test_a_job_of_one_place_ends_although_its_task_was_cancelled() -> None:
    """End the iteration as a cancellation if the only task that has a place is cancelled from outside."""
    begun: list[int] = []
    tasks: list[asyncio.Task[Any] | None] = []

    async def work(number: int, _place: Place) -> int:
        begun.append(number)
        tasks.append(asyncio.current_task())
        await asyncio.Event().wait()
        return number

    async with jobs.stream(numbers_of(5), work, 1) as results:
        consumer = asyncio.ensure_future(anext(results))
        for _ in range(5):
            await asyncio.sleep(0)
        assert tasks[0] is not None
        tasks[0].cancel()
        await asyncio.wait({consumer}, timeout=1)
        assert consumer.done()
    assert consumer.cancelled()
    assert begun == [0]


async def test_a_job_of_one_place_ends_although_an_item_waits_for_it() -> None:
    """End the iteration with the error if an item fails in the only place, and another one waits to return to it."""

    async def work(number: int, place: Place) -> int:
        if number == 0:
            place.leave()
            await asyncio.sleep(0.01)
            await place.enter()
            return number
        await asyncio.sleep(0.02)
        raise LookupError("no place was given back")

    async with asyncio.timeout(5), jobs.stream(numbers_of(5), work, 1) as results:
        assert await anext(results) == 0
        with pytest.raises(LookupError):
            await anext(results)


@pytest.mark.parametrize("way", ["left", "failed"])
async def test_the_clean_up_of_a_source_is_not_interrupted(way: str) -> None:
    """Cancel the source once, although several tasks end: what it does about that may take a while."""
    ended: list[str] = []

    async def work(number: int, _place: Place) -> int:
        await asyncio.sleep(0.01)
        raise LookupError("a failed item")

    async def source() -> AsyncGenerator[int, None]:
        try:
            yield 0
            yield 1
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.03)
            ended.append("cleaned up")

    async with jobs.stream(source(), work, 3) as results:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if way == "failed":
            with pytest.raises(LookupError):
                await anext(results)
    assert ended == ["cleaned up"]


async def test_a_failed_job_begins_no_further_item() -> None:
    """If one of the job's tasks is cancelled from outside, what it had begun is delivered, then the cancellation."""
    begun: list[int] = []
    tasks: list[asyncio.Task[Any] | None] = []

    async def work(number: int, _place: Place) -> int:
        begun.append(number)
        tasks.append(asyncio.current_task())
        for _ in range(20):
            await asyncio.sleep(0)
        return number

    async def source() -> AsyncIterator[int]:
        for number in range(100):
            yield number
            for _ in range(5):
                await asyncio.sleep(0)

    delivered: list[int] = []

    async def take_all() -> None:
        async for number in results:
            delivered.append(number)  # noqa: PERF401 -- what came before the error counts

    async with jobs.stream(jobs.each(source()), work, 3) as results:
        for _ in range(5):
            await asyncio.sleep(0)
        assert tasks[0] is not None
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await take_all()
    assert 1 <= len(begun) <= 3
    assert delivered == begun[1:]


async def test_a_source_is_closed_although_leaving_is_cancelled() -> None:
    """Close the source in the task that reads it, also if a second cancellation comes while the block is left."""
    closed: list[bool] = []

    async def work(number: int, _place: Place) -> int:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        for _ in range(20):
            await asyncio.sleep(0)
        return number

    async def source() -> AsyncGenerator[int, None]:
        try:
            for number in range(100):
                yield number
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    async def job() -> None:
        async with jobs.stream(source(), work, 2):
            await asyncio.Event().wait()

    task = asyncio.create_task(job())
    for _ in range(2):
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait({task})
    for _ in range(30):
        await asyncio.sleep(0)
    assert closed == [True]
    assert others() == set()


async def test_a_worker_that_loses_its_cancellation_stops_all_the_same() -> None:
    """If a source or a worker swallows the cancellation, as 3.11's wait_for can, no further item begins."""
    begun: list[int] = []

    async def work(number: int, _place: Place) -> int:
        begun.append(number)
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return number

    async def source() -> AsyncIterator[int]:
        yield 0
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        for number in range(1, 100):
            yield number

    async with jobs.stream(jobs.each(source()), work, 2):
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(others()) == 2
    assert begun == [0]
    assert others() == set()


async def test_eager_tasks_keep_the_bounds() -> None:
    """If tasks start eagerly, no more of them run than allowed, and the job ends."""
    asyncio.get_running_loop().set_task_factory(eager_task_factory())
    under_way: list[int] = []

    async def work(number: int, _place: Place) -> int:
        under_way.append(number)
        await asyncio.sleep(0)
        assert len(under_way) <= 3
        under_way.remove(number)
        return number

    async with jobs.stream(numbers_of(2000), work, 3) as results:
        assert sorted([number async for number in results]) == list(range(2000))


@pytest.mark.parametrize("way", ["left", "source"])
async def test_every_consumer_is_told_that_the_results_are_not_whole(way: str) -> None:
    """Raise the reason in one of several tasks that iterate; none takes it for the end of the job."""

    async def work(number: int, _place: Place) -> int:
        if way == "left":
            await asyncio.Event().wait()
        return number

    async def source() -> AsyncIterator[int]:
        yield 0
        if way == "source":
            raise LookupError("no more")

    async with jobs.stream(jobs.each(source()), work, 1) as results:

        async def consume() -> None:
            async for _ in results:
                pass

        consumers = [asyncio.create_task(consume()) for _ in range(3)]
        await asyncio.wait(consumers, timeout=None if way == "source" else 0.01)
    errors = await asyncio.gather(*consumers, return_exceptions=True)
    expected = [ClientClosedError] * 3 if way == "left" else [ClientClosedError, ClientClosedError, LookupError]
    assert sorted(map(type, errors), key=lambda kind: kind.__name__) == expected
    assert len({id(error) for error in errors}) == 3


async def test_a_token_task_that_somebody_cancelled_is_an_accounts_failure(
    sandbox: Sandbox, client: AudiencesClient
) -> None:
    """Continue the job after a cancellation raised by a key function, but not aimed at the call."""
    token = asyncio.get_running_loop().create_future()
    token.cancel()

    async def provider() -> str:
        return str(await token)

    north = sandbox.add_account("north")
    failed, fetched = await client.fetch_all([Account("bad", provider), north])
    assert isinstance(failed, Failed)
    assert type(failed.error) is TransportError
    assert str(failed.error).startswith("account 'bad': the API key function raised CancelledError; gave up")
    assert fetched.ok
