"""The cache: one request for concurrent callers, an answer for a while, and never another account's."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from conftest import eager_task_factory

from audiences_async import (
    Account,
    AudiencesClient,
    AudiencesError,
    AudiencesResponse,
    CachePolicy,
    ClientClosedError,
    Clock,
    ConfigurationError,
    DeadlineExceededError,
    Event,
    RateLimit,
    RetryBudget,
    RetryPolicy,
    ServerError,
    TooManyRequestsError,
    UnauthorizedError,
)
from audiences_async._call import cache as caching
from audiences_async.events import AttemptStarted, CacheLookup, CallFinished, CallStarted, EventHook
from audiences_async.sandbox import Answer, Sandbox, SteppedTime, many_audiences

ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture
def north(sandbox: Sandbox) -> Account:
    """Open an account with two audiences."""
    return sandbox.add_account("north", audiences=many_audiences("north", 2))


@pytest.fixture
def make(sandbox: Sandbox, time: SteppedTime) -> Callable[..., AudiencesClient]:
    """Yield a function that creates clients with a cache and stepped time."""

    def client(
        ttl: float = 10.0, retry: RetryPolicy = ONCE, on_event: EventHook | None = None, **policy: Any
    ) -> AudiencesClient:
        cache = CachePolicy(ttl, **policy)
        return AudiencesClient(base_url=sandbox.base_url, cache=cache, clock=time.clock, retry=retry, on_event=on_event)

    return client


def ids(response: AudiencesResponse) -> list[str | None]:
    """Return the ids of the audiences."""
    return [audience.id for audience in response]


async def the_others() -> None:
    """Return when all other tasks have ended."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait({task}, timeout=10)


async def error_of(call: Any) -> AudiencesError:
    """Return the error that an awaitable raises."""
    with pytest.raises(AudiencesError) as caught:
        await call
    return caught.value


async def test_who_asks_at_once_shares_one_request(
    sandbox: Sandbox, north: Account, make: Callable[..., AudiencesClient]
) -> None:
    """Share one request among a hundred concurrent calls, even without caching; send another account its own."""
    south = sandbox.add_account("south", audiences=many_audiences("south", 1))
    async with make(ttl=0) as client:
        answers = await asyncio.gather(*(client.get_audiences(each) for each in [north, south] * 50))
    assert [ids(answer) for answer in answers] == [["north-0", "north-1"], ["south-0"]] * 50
    assert sorted(request.account or "" for request in sandbox.requests) == ["north", "south"]


async def test_an_answer_is_given_again_until_its_ttl(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """Cache an answer for the ttl and no longer."""
    async with make(ttl=10.0) as client:
        first = await client.get_audiences(north)
        time.now += 9.9
        assert (await client.get_audiences(north)).data is first.data
        assert len(sandbox.requests) == 1
        time.now += 0.1
        assert (await client.get_audiences(north)).data is not first.data
    assert len(sandbox.requests) == 2


async def test_errors_are_not_kept(sandbox: Sandbox, north: Account, make: Callable[..., AudiencesClient]) -> None:
    """Raise the error to all concurrent callers, each its own exception; the next caller makes a new request."""
    sandbox.script("north", Answer(400, {"description": "no"}))
    namesake = Account("namesake", north.api_key)
    async with make() as client:
        errors = await asyncio.gather(*(error_of(client.get_audiences(each)) for each in [north, north, namesake]))
        assert len({id(error) for error in errors}) == 3
        assert [error.account for error in errors] == ["north", "north", "namesake"]
        assert all(len(error.attempts) == 1 for error in errors)
        assert len(sandbox.requests) == 1
        assert len(await client.get_audiences(north)) == 2


async def test_an_answer_is_never_another_accounts(sandbox: Sandbox, make: Callable[..., AudiencesClient]) -> None:
    """Key the cache by key, not by name: also if a name, or a function, comes with another key."""
    one = sandbox.add_account("one", audiences=many_audiences("one", 1))
    other = sandbox.add_account("other", audiences=many_audiences("other", 1))
    keys = [one.api_key, other.api_key, other.api_key, one.api_key]
    function = Account("mine", lambda: str(keys[0]))
    async with make() as client:
        for account, expected in [(one, "one-0"), (Account("one", other.api_key), "other-0"), (one, "one-0")]:
            assert ids(await client.get_audiences(account)) == [expected]
        while keys:
            expected = "one-0" if keys[0] == one.api_key else "other-0"
            assert ids(await client.get_audiences(function)) == [expected]
            del keys[0]
    assert len(sandbox.requests) == 2


async def test_a_key_that_is_refused_meanwhile(sandbox: Sandbox, make: Callable[..., AudiencesClient]) -> None:
    """Cache an answer that arrived with a fresh key for that key, not for the refused one."""
    account = sandbox.add_account("north", audiences=many_audiences("north", 1))
    given = iter(["a revoked key", account.api_key, account.api_key])
    function = Account("north", lambda: str(next(given)))
    async with make(retry=RetryPolicy(max_attempts=2)) as client:
        assert ids(await client.get_audiences(function)) == ["north-0"]
        assert type(await error_of(client.get_audiences(Account("x", "a revoked key")))) is UnauthorizedError
        before = len(sandbox.requests)
        assert ids(await client.get_audiences(account)) == ["north-0"]
        assert len(sandbox.requests) == before
        client.invalidate(function)
        assert ids(await client.get_audiences(function)) == ["north-0"]
    assert len(sandbox.requests) == before + 1


async def test_one_who_leaves_does_not_hurt_the_others(
    sandbox: Sandbox, north: Account, make: Callable[..., AudiencesClient]
) -> None:
    """Release a caller that is cancelled or times out; the others get the answer of the one request."""
    sandbox.script("north", Answer(delay=0.4))
    async with make() as client:
        short = asyncio.create_task(error_of(client.get_audiences(north, timeout=0.1)))
        leaving = asyncio.create_task(client.get_audiences(north))
        staying = asyncio.create_task(client.get_audiences(north, timeout=5.0))
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        leaving.cancel()
        error = await short
        assert (type(error), error.stop_reason, error.account) == (DeadlineExceededError, "deadline", "north")
        assert len(await staying) == 2
    assert leaving.cancelled()
    assert len(sandbox.requests) == 1


async def test_the_request_ends_with_the_last_who_waits(
    sandbox: Sandbox, north: Account, make: Callable[..., AudiencesClient]
) -> None:
    """Cancel the request when all callers have left; the next caller starts another."""
    sandbox.script("north", Answer(delay=60))
    async with make() as client:
        leaving = [asyncio.create_task(client.get_audiences(north)) for _ in range(3)]
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert client.snapshot().accounts[0].in_flight == 0
        assert len(await client.get_audiences(north, timeout=5.0)) == 2


async def test_a_wait_that_does_not_fit_is_told_at_once(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """Raise at once, with a cache too, for a wait beyond the timeout, with retry_after."""
    sandbox.script("north", Answer(429, retry_after=30))
    async with make(retry=RetryPolicy()) as client:
        error = await error_of(client.get_audiences(north, timeout=5.0))
    assert (type(error), error.retry_after, time.slept) == (TooManyRequestsError, 30.0, [])


async def test_who_joins_with_more_time_is_not_turned_away_with_the_first(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """Give two callers of one request each their own timeout for the wait after a 429."""
    sandbox.script("north", Answer(429, retry_after=30, delay=0.1))
    async with make(retry=RetryPolicy()) as client:
        first = asyncio.create_task(client.get_audiences(north, timeout=5.0))
        second = asyncio.create_task(client.get_audiences(north, timeout=50.0))
        assert len(await second) == 2
        await asyncio.wait({first})
    assert 30.0 <= sum(time.slept) < 50.0


async def test_who_joins_a_request_that_waits_for_its_turn_has_its_own_time(
    sandbox: Sandbox, north: Account, make: Callable[..., AudiencesClient]
) -> None:
    """If the pause is too long for the first caller, a joined caller with more time still gets the answer."""
    sandbox.script("north", Answer(429, retry_after=0.4, delay=0.1))
    started = asyncio.Event()
    async with AudiencesClient(
        base_url=sandbox.base_url,
        cache=CachePolicy(0),
        rate_limit=RateLimit(5),
        retry=ONCE,
        on_event=lambda event: started.set() if isinstance(event, AttemptStarted) else None,
    ) as client:
        throttled = asyncio.create_task(error_of(client.get_audiences(north)))
        await started.wait()
        client.invalidate(north)  # so that the next call is another request, which waits for its turn
        first = asyncio.create_task(error_of(client.get_audiences(north, timeout=0.3)))
        for _ in range(10):  # turns of the loop until it waits
            await asyncio.sleep(0)
        second = asyncio.create_task(client.get_audiences(north, timeout=30.0))
        assert isinstance(await throttled, TooManyRequestsError)
        assert isinstance(await first, DeadlineExceededError)
        assert len(await second) == 2


async def test_a_crowd_whose_turn_comes_too_late_is_told_at_once(sandbox: Sandbox, north: Account) -> None:
    """If a pause fits no caller's time, a hundred callers that share a call get the error from that one."""
    sandbox.script("north", Answer(429, retry_after=30))
    events: list[Event] = []
    cache = CachePolicy(0)
    async with AudiencesClient(base_url=sandbox.base_url, cache=cache, retry=ONCE, on_event=events.append) as client:
        for expected in (TooManyRequestsError, DeadlineExceededError):
            calls = [error_of(client.get_audiences(north, timeout=5.0)) for _ in range(100)]
            assert {type(error) for error in await asyncio.gather(*calls)} == {expected}
    assert sum(isinstance(event, CallStarted) for event in events) == 2


async def test_cached_accounts_that_begin_together_keep_their_pace(
    sandbox: Sandbox, make: Callable[..., AudiencesClient]
) -> None:
    """Remember each of several accounts that begin in one turn of the event loop: its pause is kept."""
    accounts = [sandbox.add_account(f"a{number}") for number in range(10)]
    for account in accounts:
        sandbox.script(account.name, Answer(429, retry_after=30))
    async with make() as client:
        for expected in (TooManyRequestsError, DeadlineExceededError):
            errors = await asyncio.gather(*(error_of(client.get_audiences(each, timeout=5.0)) for each in accounts))
            assert {type(error) for error in errors} == {expected}
        assert len(client.snapshot().accounts) == 10
    assert len(sandbox.requests) == 10


async def test_a_cached_call_that_is_cut_off_tells_its_attempts(sandbox: Sandbox, north: Account) -> None:
    """Report the attempts of a shared request to a caller that times out waiting for it."""
    sandbox.script("north", Answer(500), Answer(delay=30.0))
    at_once = RetryPolicy(base_delay=0)
    async with AudiencesClient(base_url=sandbox.base_url, cache=CachePolicy(0), retry=at_once) as client:
        error = await error_of(client.get_audiences(north, timeout=0.3))
    assert isinstance(error, DeadlineExceededError)
    assert [(attempt.status, attempt.reason) for attempt in error.attempts] == [(500, "backoff"), (None, "deadline")]


async def test_a_caller_and_its_request_run_out_of_time_together(sandbox: Sandbox, north: Account) -> None:
    """Tell a caller what its request waited for, also if both run out of time at the same moment."""
    sandbox.script("north", *[Answer(failure="hang")] * 20)
    events: list[Event] = []
    async with AudiencesClient(base_url=sandbox.base_url, cache=CachePolicy(30.0), on_event=events.append) as client:
        errors = [await error_of(client.get_audiences(north, timeout=0.03)) for _ in range(20)]
        await the_others()
    assert {event.error for event in events if isinstance(event, CallFinished)} == {"DeadlineExceededError"}
    assert {(error.gateway_status, error.retry_after) for error in errors} == {(504, None)}
    assert not [error for error in errors if "waiting for its turn" in str(error)]


async def test_a_caller_whose_time_ends_in_the_backoff(sandbox: Sandbox, north: Account) -> None:
    """Raise the error of the last attempt, as without a cache, though the request waits on for a later caller."""
    retry = RetryPolicy(base_delay=1.0)
    clock = Clock(random=lambda: 1.0)
    async with AudiencesClient(base_url=sandbox.base_url, cache=CachePolicy(30.0), retry=retry, clock=clock) as client:
        sandbox.script("north", Answer(503))
        first = asyncio.create_task(error_of(client.get_audiences(north, timeout=0.2)))
        second = asyncio.create_task(client.get_audiences(north, timeout=10.0))
        error = await first
        assert (type(error), error.stop_reason, error.gateway_status) == (ServerError, "deadline", 502)
        assert ([attempt.status for attempt in error.attempts], error.account) == ([503], "north")
        assert error.elapsed == pytest.approx(0.2, abs=0.1)
        assert error.retry_after == pytest.approx(0.8, abs=0.1)
        assert len(await second) == 2
    assert [request.answer for request in sandbox.requests] == [503, 200]


async def test_an_answer_that_a_key_function_makes_late(sandbox: Sandbox, north: Account) -> None:
    """If a key function swallows the end of the caller's time, no request is sent, and no answer is returned."""

    async def provider() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return str(north.api_key)

    async with AudiencesClient(base_url=sandbox.base_url, cache=CachePolicy(10)) as client:
        error = await error_of(client.get_audiences(Account("north", provider), timeout=0.05))
    assert isinstance(error, DeadlineExceededError)
    assert sandbox.requests == []


async def test_eager_tasks_keep_no_error(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """If tasks start eagerly, an immediate error is not the next call's result."""
    asyncio.get_running_loop().set_task_factory(eager_task_factory())
    sandbox.script("north", Answer(429, retry_after=30))
    async with make() as client:
        for expected in (TooManyRequestsError, DeadlineExceededError):
            assert type(await error_of(client.get_audiences(north, timeout=5.0))) is expected
        time.now += 30.0
        assert len(await client.get_audiences(north, timeout=5.0)) == 2


async def test_stale_while_revalidate(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """After the ttl the old answer is returned at once, while one request fetches the new one in the background."""
    async with make(ttl=10.0, stale_while_revalidate=60.0) as client:
        first = await client.get_audiences(north)
        time.now += 20
        assert await asyncio.gather(*(client.get_audiences(north) for _ in range(5))) == [first] * 5
        await asyncio.to_thread(sandbox.wait_for_requests, 2)
        await the_others()
        assert (await client.get_audiences(north)).data is not first.data
        assert len(sandbox.requests) == 2
        time.now += 71
        sandbox.script("north", Answer(500))
        assert type(await error_of(client.get_audiences(north))) is ServerError


async def test_a_refresh_that_fails_is_nobodys_error(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """If the refresh fails, the old answer is returned as long as it is valid, and the next call tries again."""
    async with make(ttl=10.0, stale_while_revalidate=60.0) as client:
        first = await client.get_audiences(north)
        time.now += 20
        for count in (2, 3):
            sandbox.script("north", Answer(500))
            assert (await client.get_audiences(north)).data is first.data
            await asyncio.to_thread(sandbox.wait_for_requests, count)
            await the_others()


async def test_closing_ends_a_refresh(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """End a refresh with its client, and also a caller that waits for an answer."""
    client = make(ttl=10.0, stale_while_revalidate=60.0)
    await client.get_audiences(north)
    time.now += 20
    sandbox.script("north", Answer(delay=60))
    await client.get_audiences(north)
    await asyncio.to_thread(sandbox.wait_for_requests, 2)
    time.now += 100
    waiting = asyncio.create_task(error_of(client.get_audiences(north)))
    await asyncio.sleep(0)
    await client.aclose()
    assert type(await waiting) is ClientClosedError
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        (Answer(500), True),
        (Answer(429, retry_after=100), True),
        (Answer(failure="reset"), True),
        (Answer(delay=60), True),
        (Answer(401), False),
        (Answer(404), False),
        (Answer(200, "<html>"), False),
    ],
)
async def test_stale_if_error(
    sandbox: Sandbox,
    north: Account,
    time: SteppedTime,
    make: Callable[..., AudiencesClient],
    answer: Answer,
    given: bool,
) -> None:
    """Return the old answer for a while in an outage; raise an error such as 403 all the same."""
    async with make(ttl=10.0, stale_if_error=100.0) as client:
        first = await client.get_audiences(north)
        time.now += 50
        sandbox.script("north", answer, answer)
        if given:
            assert (await client.get_audiences(north, timeout=0.3)).data is first.data
        else:
            await error_of(client.get_audiences(north, timeout=0.3))
        time.now += 61
        await error_of(client.get_audiences(north, timeout=0.3))


async def test_invalidate(sandbox: Sandbox, north: Account, make: Callable[..., AudiencesClient]) -> None:
    """Discard an answer requested earlier, even if its request is in flight; other accounts keep theirs."""
    south = sandbox.add_account("south")
    function = Account("function", lambda: str(south.api_key))
    async with make() as client:
        for account in (north, function):
            await client.get_audiences(account)
        client.invalidate(north)
        client.invalidate(Account("unknown", lambda: "key"))
        client.invalidate(Account("unknown", "key"))
        for account in (north, function):
            await client.get_audiences(account)
        assert len(sandbox.requests) == 3
        client.invalidate(function)
        await client.get_audiences(function)
        assert len(sandbox.requests) == 4
        client.invalidate(north)
        sandbox.script("north", Answer(delay=0.1))
        early = asyncio.create_task(client.get_audiences(north))
        await asyncio.to_thread(sandbox.wait_for_requests, 5)
        client.invalidate(north)
        late = asyncio.create_task(client.get_audiences(north))
        assert len(await early) == len(await late) == 2
        assert len(sandbox.requests) == 6
        with pytest.raises(ConfigurationError, match="no account"):
            client.invalidate()


@pytest.mark.parametrize("others", [0, 2, 5])
async def test_invalidate_an_account_whose_key_a_function_gives(
    sandbox: Sandbox, north: Account, make: Callable[..., AudiencesClient], others: int
) -> None:
    """Such an account goes by name: its function may be new for each call, and many others be invalidated too."""

    def again() -> Account:
        return Account("north", lambda: str(north.api_key))

    async with make(max_accounts=3) as client:
        await client.get_audiences(again())
        await client.get_audiences(again())
        assert len(sandbox.requests) == 1
        client.invalidate(again())
        for number in range(others):
            client.invalidate(Account(f"a{number}", lambda: "key"))
        await client.get_audiences(again())
        await client.get_audiences(again())
    assert len(sandbox.requests) == 2


async def test_invalidate_each_key_of_a_function(sandbox: Sandbox, make: Callable[..., AudiencesClient]) -> None:
    """Discard the answers for all keys that a function has returned, those of requests in flight included."""
    keys = [str(sandbox.add_account(name).api_key) for name in ("one", "other")]
    account = Account("mine", lambda: keys[0])
    async with make() as client:
        for _ in range(2):
            await client.get_audiences(account)
            keys.reverse()
        sandbox.script("one", Answer(delay=0.1))
        client.invalidate(account)
        early = asyncio.create_task(client.get_audiences(account))
        await asyncio.to_thread(sandbox.wait_for_requests, 3)
        client.invalidate(account)
        await early
        for _ in range(4):
            await client.get_audiences(account)
            keys.reverse()
    assert [request.account for request in sandbox.requests] == ["one", "other", "one", "one", "other"]


async def test_an_answer_with_too_many_names_is_fetched_again(
    sandbox: Sandbox, north: Account, make: Callable[..., AudiencesClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reuse an answer for no more accounts of one key than the cache remembers, so that memory is bounded."""
    monkeypatch.setattr(caching, "_MAX_NAMES", 3)
    async with make() as client:
        for number in range(4):
            await client.get_audiences(Account(f"north-{number}", north.api_key))
    assert len(sandbox.requests) == 2


async def test_invalidate_while_a_key_is_replaced(sandbox: Sandbox, north: Account) -> None:
    """Leave an answer uncached that was requested before invalidate(), and arrived with a fresh key afterwards."""
    keys = ["old", str(north.api_key)]
    account = Account("north", lambda: keys.pop(0) if len(keys) > 1 else keys[0])
    replaced = asyncio.Event()
    sandbox.script("north", Answer(delay=0.2))

    def hook(event: Event) -> None:
        if isinstance(event, AttemptStarted) and event.number == 2:
            replaced.set()

    async with AudiencesClient(base_url=sandbox.base_url, cache=CachePolicy(10), on_event=hook) as client:
        call = asyncio.create_task(client.get_audiences(account))
        await replaced.wait()
        await client.get_audiences(account)
        client.invalidate(account)
        await call
        await client.get_audiences(account)
    assert len(sandbox.requests) == 4


async def test_as_many_answers_are_kept_as_allowed(sandbox: Sandbox, make: Callable[..., AudiencesClient]) -> None:
    """Keep the most recently used answers."""
    accounts = [sandbox.add_account(f"a{number}") for number in range(3)]
    async with make(max_accounts=2) as client:
        for number in (0, 1, 0, 2, 0, 1):
            await client.get_audiences(accounts[number])
    assert [request.account for request in sandbox.requests] == ["a0", "a1", "a2", "a1"]


async def test_a_key_function_has_the_callers_time(sandbox: Sandbox, make: Callable[..., AudiencesClient]) -> None:
    """End a key function that hangs at its caller's deadline; raise an error of its own."""

    async def hangs() -> str:
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async with make() as client:
        assert type(await error_of(client.get_audiences(Account("x", hangs), timeout=0.05))) is DeadlineExceededError
        error = await error_of(client.get_audiences(Account("x", lambda: "")))
        assert type(error) is ConfigurationError
    assert sandbox.requests == []


@pytest.mark.parametrize(
    "wrong", [{"ttl": -1}, {"ttl": None}, {"stale_while_revalidate": -1}, {"stale_if_error": "1"}, {"max_accounts": 0}]
)
def test_a_policy_that_cannot_be_used(wrong: dict[str, Any]) -> None:
    """Numbers out of range are refused at once."""
    with pytest.raises(ConfigurationError):
        CachePolicy(**{"ttl": 1.0, **wrong})
    with pytest.raises(ConfigurationError, match="cache must be CachePolicy or None"):
        AudiencesClient(cache=10.0)  # type: ignore[arg-type]


async def test_without_a_cache_there_is_nothing_to_invalidate(sandbox: Sandbox, north: Account) -> None:
    """Offer invalidate() without a cache too, when every call sends a request."""
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        client.invalidate(north)
        await client.get_audiences(north)
        await client.get_audiences(north)
    assert len(sandbox.requests) == 2


async def test_a_job_that_joins_a_request_without_tokens(sandbox: Sandbox, north: Account) -> None:
    """Fetch a job's account that shares a single call's request, even if that call found the budget empty."""
    sandbox.script("north", Answer(500, delay=0.1), Answer(500))
    settings: dict[str, Any] = {"cache": CachePolicy(ttl=9), "budget": RetryBudget(capacity=1, cost=5)}
    async with AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(base_delay=0), **settings) as client:
        single = asyncio.create_task(client.get_audiences(north))
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        (outcome,) = await client.fetch_all([north])
        with pytest.raises(ServerError) as caught:
            await single
    assert (outcome.ok, caught.value.stop_reason) == (True, "budget")


def test_nothing_is_invalidated_before_the_first_call(north: Account) -> None:
    """Ignore an invalidation before the client is used."""
    AudiencesClient(cache=CachePolicy(ttl=60)).invalidate(north)


def lookups(events: list[Event]) -> list[tuple[str, float]]:
    """Return what callers got, and its age."""
    return [(event.result, event.age) for event in events if isinstance(event, CacheLookup)]


async def test_each_caller_is_told_where_its_answer_comes_from(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """Report one lookup for each answer, with its age and the call that fetched it."""
    events: list[Event] = []
    async with make(ttl=10.0, stale_while_revalidate=60.0, on_event=events.append) as client:
        first, second = await asyncio.gather(client.get_audiences(north), client.get_audiences(north))
        time.now += 9.0
        fresh = await client.get_audiences(north)
        time.now += 11.0
        stale = await client.get_audiences(north)
        await asyncio.to_thread(sandbox.wait_for_requests, 2)
    assert lookups(events) == [("wire", 0.0), ("shared", 0.0), ("fresh", 9.0), ("stale", 20.0)]
    assert [response.age for response in (first, second, fresh, stale)] == [0.0, 0.0, 9.0, 20.0]
    assert first == stale
    call_ids = {event.call_id for event in events if isinstance(event, CacheLookup | AttemptStarted)}
    assert len(call_ids - {None}) == len(call_ids) == 2  # and the refresh


async def test_a_stale_answer_is_reported_with_the_error_that_it_replaces(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """Mark the end of a failed call as stale if callers get the old answer, and not otherwise."""
    events: list[Event] = []
    async with make(ttl=10.0, stale_if_error=100.0, on_event=events.append) as client:
        await client.get_audiences(north)
        time.now += 50
        sandbox.script("north", Answer(500), Answer(404), Answer(delay=60))
        assert (await client.get_audiences(north)).age == 50.0
        await error_of(client.get_audiences(north))
        assert (await client.get_audiences(north, timeout=0.1)).age == 50.0
        await the_others()
    ends = [(event.error, event.stale) for event in events if isinstance(event, CallFinished)]
    assert ends == [(None, False), ("ServerError", True), ("NotFoundError", False), ("DeadlineExceededError", True)]
    assert lookups(events) == [("wire", 0.0), ("stale", 50.0), ("stale", 50.0)]


async def test_a_refresh_uses_the_key_that_its_caller_was_given(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """Ask a key function once for a stale answer and the request that replaces it."""
    asked: list[float] = []

    def provider() -> str:
        asked.append(time.now)
        return str(north.api_key)

    account = Account("north", provider)
    async with make(ttl=10.0, stale_while_revalidate=60.0) as client:
        await client.get_audiences(account)
        time.now += 20.0
        await client.get_audiences(account)
        await asyncio.to_thread(sandbox.wait_for_requests, 2)
        await the_others()
    assert len(asked) == 2


async def test_a_failed_refresh_is_marked_stale(
    sandbox: Sandbox, north: Account, time: SteppedTime, make: Callable[..., AudiencesClient]
) -> None:
    """Count no error for a refresh that fails while the old answer is still given."""
    events: list[Event] = []
    async with make(ttl=10.0, stale_while_revalidate=60.0, on_event=events.append) as client:
        await client.get_audiences(north)
        time.now += 20
        sandbox.script("north", Answer(500))
        await client.get_audiences(north)
        await asyncio.to_thread(sandbox.wait_for_requests, 2)
        await the_others()
    ends = [(event.error, event.stale) for event in events if isinstance(event, CallFinished)]
    assert ends == [(None, False), ("ServerError", True)]
