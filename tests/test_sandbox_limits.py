"""The sandbox's limits and outages: the meters by themselves, and the replies on the wire."""

import asyncio
import copy
import time as real_time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiences_async import Account, AudiencesClient, ConfigurationError
from audiences_async.sandbox import (
    Answer,
    ConnectionLimit,
    FixedWindow,
    LeakyBucket,
    Limit,
    Quota,
    Sandbox,
    SlidingWindow,
    SteppedTime,
    TokenBucket,
)

# Times and rates are multiples of 1/64 and powers of 2: their sums are exact, and so is the comparison.
gaps = st.lists(st.integers(0, 256).map(lambda ticks: ticks / 64), max_size=60)
counts = st.integers(1, 5)
rates = st.integers(-2, 3).map(lambda power: 2.0**power)
periods = st.integers(1, 256).map(lambda ticks: ticks / 64)
limits = (
    st.builds(FixedWindow, counts, periods)
    | st.builds(SlidingWindow, counts, periods)
    | st.builds(TokenBucket, rates, counts)
    | st.builds(LeakyBucket, rates, st.integers(0, 4))
)


def allowed(limit: Limit, granted: list[float], now: float) -> bool:
    """Whether the definition of a limit allows a request at *now*, after the requests that were granted."""
    times = [*granted, now]
    match limit:
        case FixedWindow(limit=most, per=per):
            opened, used = times[0], 0
            for at in times:
                opened, used = (opened, used + 1) if at < opened + per else (at, 1)
            return used <= most
        case SlidingWindow(limit=most, per=per):
            return sum(at > now - per for at in times) <= most
        case TokenBucket(rate=rate, capacity=capacity):
            return all(len(times) - n <= capacity + rate * (now - at) for n, at in enumerate(times))
        case LeakyBucket(rate=rate, burst=burst):
            return all(len(times) - n <= 1 + burst + rate * (now - at) for n, at in enumerate(times))
        case _:
            raise AssertionError(limit)


@given(limits, gaps)
def test_a_meter_grants_what_the_definition_allows_and_no_more(limit: Limit, gaps: list[float]) -> None:
    """Whatever came before, a request is granted if and only if the definition of the limit allows it."""
    meter, granted, now = limit.meter(), list[float](), 1000.0
    for gap in gaps:
        now += gap
        has_quota = meter.quota(now).remaining > 0
        assert has_quota == allowed(limit, granted, now)
        if has_quota:
            meter.take(now)
            meter.release()
            granted.append(now)


@given(
    st.builds(FixedWindow, counts, st.floats(0.01, 100))
    | st.builds(SlidingWindow, counts, st.floats(0.01, 100))
    | st.builds(TokenBucket, st.floats(0.01, 100), counts)
    | st.builds(LeakyBucket, st.floats(0.01, 100), counts),
    st.lists(st.floats(0, 10), max_size=30),
)
def test_the_reset_is_when_the_quota_grows(limit: Limit, gaps: list[float]) -> None:
    """More requests remain after `Quota.reset` seconds, and no sooner."""
    meter, full, now = limit.meter(), limit.meter().quota(0.0).remaining, 1000.0
    for gap in gaps:
        now += gap
        quota = meter.quota(now)
        if quota.remaining:
            meter.take(now)
            quota = meter.quota(now)
        assert 0 <= quota.remaining < full
        assert quota.reset is not None
        just_before = now + max(0.0, quota.reset - 0.001)
        assert copy.deepcopy(meter).quota(just_before).remaining == quota.remaining
        assert copy.deepcopy(meter).quota(now + quota.reset).remaining > quota.remaining


@pytest.mark.parametrize(
    ("limit", "policy"),
    [
        (FixedWindow(100, per=60.0), "q=100;w=60"),
        (SlidingWindow(10, per=0.5), "q=10;w=1"),
        (TokenBucket(2.0, 5), "q=5;w=3"),
        (LeakyBucket(2.0), "q=1;w=1"),
        (ConnectionLimit(8), 'q=8;qu="concurrent-requests"'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fresh_meter(limit: Limit, policy: str) -> None:
    """A description states its policy, and each of its meters begins with the whole quota."""
    used = limit.meter()
    used.take(0.0)
    quota = limit.meter().quota(0.0)
    assert (limit.policy, quota.reset) == (policy, None)
    assert quota.remaining == used.quota(0.0).remaining + 1
    assert isinstance(limit, Limit)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: FixedWindow(0, per=1.0), "limit must be a whole number of 1 or more, got 0"),
        (lambda: SlidingWindow(1, per=0.0), "per must be a finite number above 0"),
        (lambda: TokenBucket(float("nan"), 1), "rate must be a finite number above 0"),
        (lambda: TokenBucket(1.0, 0), "capacity must be a whole number of 1 or more"),
        (lambda: LeakyBucket(1.0, burst=-1), "burst must be a whole number of 0 or more, got -1"),
        (lambda: ConnectionLimit(True), "limit must be a whole number of 1 or more, got True"),
        (lambda: Sandbox().add_account(limit=5), "limit must be Limit, got int"),  # type: ignore[arg-type]
        (lambda: Sandbox().add_account(rate=1.0, limit=LeakyBucket(1.0)), "either rate or limit, got both"),
        (lambda: Sandbox().add_account(rate=0), "rate must be a finite number above 0, got 0"),
        (
            lambda: Sandbox().set_shared_limit(LeakyBucket(1.0), refusal=500),  # type: ignore[arg-type]
            "refusal must be 429 or 503, got 500",
        ),
    ],
)
def test_invalid_arguments(make: Any, problem: str) -> None:
    """An argument out of range is a ConfigurationError that names it."""
    with pytest.raises(ConfigurationError, match=problem):
        make()


@pytest.fixture
def stepped(time: SteppedTime) -> Iterator[Sandbox]:
    """Yield a sandbox whose limits are measured by stepped time."""
    with Sandbox(time=time.clock.monotonic) as sandbox:
        yield sandbox


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Open an HTTP session that sends each GET once."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        session._retry_connection = False  # aiohttp would send a GET again
        yield session


async def get(http: aiohttp.ClientSession, sandbox: Sandbox, account: Account) -> tuple[int, Any]:
    """Return the status and headers of one answer."""
    headers = {"Authorization": f"Bearer {account.api_key}"}
    async with http.get(sandbox.base_url + "audiences", headers=headers) as response:
        await response.read()
        return response.status, response.headers


async def statuses(http: aiohttp.ClientSession, sandbox: Sandbox, account: Account, count: int) -> list[int]:
    """Send requests one after the other; return their statuses."""
    return [(await get(http, sandbox, account))[0] for _ in range(count)]


async def begin(http: aiohttp.ClientSession, sandbox: Sandbox, account: Account) -> "asyncio.Task[Any]":
    """Return a request that has reached the sandbox."""
    request = asyncio.create_task(get(http, sandbox, account))
    await asyncio.to_thread(sandbox.wait_for_requests, len(sandbox.requests) + 1)
    return request


@pytest.mark.parametrize("refusal", [429, 503])
@pytest.mark.parametrize(
    ("limit", "at_once", "wait", "later"),
    [
        (FixedWindow(3, per=10.0), 3, 10.0, 3),
        (SlidingWindow(3, per=10.0), 3, 10.0, 3),
        (TokenBucket(0.1, 3), 3, 10.0, 1),
        (LeakyBucket(0.1, burst=2), 3, 10.0, 1),
        (LeakyBucket(0.1), 1, 10.0, 1),
    ],
    ids=repr,
)
async def test_a_limit_on_the_wire(
    stepped: Sandbox,
    time: SteppedTime,
    http: aiohttp.ClientSession,
    limit: Limit,
    at_once: int,
    wait: float,
    later: int,
    refusal: Any,
) -> None:
    """Requests above the limit are refused with the chosen status, until time brings the quota back."""
    north = stepped.add_account("north", limit=limit, refusal=refusal)
    assert await statuses(http, stepped, north, at_once + 2) == [200] * at_once + [refusal] * 2
    time.now += wait
    assert await statuses(http, stepped, north, later + 1) == [200] * later + [refusal]


@pytest.mark.parametrize("shared", [False, True])
async def test_retry_after_of_a_limit(stepped: Sandbox, http: aiohttp.ClientSession, shared: bool) -> None:
    """With retry_after, a refusal states a long enough wait in whole seconds; other replies do not."""
    limit = FixedWindow(1, per=2.5)
    stepped.set_shared_limit(limit if shared else None, retry_after=True)
    north = stepped.add_account("north", limit=None if shared else limit, retry_after=True)
    assert "Retry-After" not in (await get(http, stepped, north))[1]
    assert (await get(http, stepped, north))[1]["Retry-After"] == "3"


async def test_a_refusal_is_silent_by_default(stepped: Sandbox, http: aiohttp.ClientSession) -> None:
    """By default no reply states a wait or a quota."""
    north = stepped.add_account("north", limit=FixedWindow(1, per=60.0))
    for _ in range(2):
        _, headers = await get(http, stepped, north)
        assert {"Retry-After", "RateLimit", "RateLimit-Policy"}.isdisjoint(headers)


async def test_quota_headers(stepped: Sandbox, time: SteppedTime, http: aiohttp.ClientSession) -> None:
    """Every reply, scripted and refused ones too, announces the quotas of the account and of the shared limit."""
    stepped.set_shared_limit(TokenBucket(0.5, 2), quota_headers=True)
    north = stepped.add_account("north", limit=FixedWindow(5, per=60.0), quota_headers=True)
    stepped.script("north", Answer(500))
    seen = []
    for _ in range(3):
        status, headers = await get(http, stepped, north)
        seen.append((status, headers["RateLimit"]))
        assert headers["RateLimit-Policy"] == '"shared";q=2;w=4, "default";q=5;w=60'
        time.now += 0.5
    assert seen == [
        (500, '"shared";r=1;t=2, "default";r=4;t=60'),
        (200, '"shared";r=0;t=2, "default";r=3;t=60'),
        (429, '"shared";r=0;t=1, "default";r=3;t=59'),
    ]


async def test_a_client_heeds_the_quota_headers(stepped: Sandbox, time: SteppedTime) -> None:
    """A client that reads the headers has no request refused."""
    north = stepped.add_account("north", limit=FixedWindow(2, per=5.0), quota_headers=True)
    async with AudiencesClient(base_url=stepped.base_url, clock=time.clock) as client:
        for _ in range(5):
            await client.get_audiences(north)
    assert [request.answer for request in stepped.requests] == [200] * 5
    assert sum(time.slept) >= 10.0


async def test_the_same_description_for_two_accounts(stepped: Sandbox, http: aiohttp.ClientSession) -> None:
    """Two accounts with the same description do not use up each other's quota."""
    limit = SlidingWindow(2, per=60.0)
    north, south = (stepped.add_account(name, limit=limit) for name in ("north", "south"))
    assert await statuses(http, stepped, north, 3) == [200, 200, 429]
    assert await statuses(http, stepped, south, 3) == [200, 200, 429]


async def test_a_shared_limit(stepped: Sandbox, http: aiohttp.ClientSession) -> None:
    """A shared limit counts the requests of all accounts, except those that an account's own limit refuses."""
    stepped.set_shared_limit(FixedWindow(3, per=60.0), refusal=503)
    north = stepped.add_account("north", limit=FixedWindow(1, per=60.0))
    south = stepped.add_account("south")
    assert await statuses(http, stepped, north, 3) == [200, 429, 429]
    assert await statuses(http, stepped, south, 3) == [200, 200, 503]
    assert await statuses(http, stepped, north, 1) == [503]
    assert await statuses(http, stepped, Account("nobody", "unknown"), 1) == [401]
    stepped.set_shared_limit(None)
    assert await statuses(http, stepped, south, 4) == [200] * 4


async def test_a_connection_limit(stepped: Sandbox, http: aiohttp.ClientSession) -> None:
    """A request is refused only while another one is under way; a client that leaves makes room."""
    north = stepped.add_account("north", limit=ConnectionLimit(1), retry_after=True, quota_headers=True)
    stepped.script("north", Answer(failure="hang"))
    request = await begin(http, stepped, north)
    status, headers = await get(http, stepped, north)
    assert (status, headers["RateLimit"], headers.get("Retry-After")) == (429, '"default";r=0', None)
    request.cancel()
    while (await get(http, stepped, north))[0] == 429:
        pass  # the server has yet to notice that its client has left
    assert await statuses(http, stepped, north, 3) == [200] * 3


async def test_a_limit_of_your_own(stepped: Sandbox, http: aiohttp.ClientSession) -> None:
    """Any object with the two members of `Limit` is one."""

    class Closed:
        policy = "q=0"

        def meter(self) -> Any:
            return self

        def quota(self, now: float) -> Quota:
            return Quota(0, 7200.0)

    north = stepped.add_account("north", limit=Closed(), retry_after=True)
    status, headers = await get(http, stepped, north)
    assert (status, headers["Retry-After"]) == (429, "7200")


@pytest.mark.parametrize("status", [500, 503])
async def test_an_outage(sandbox: Sandbox, http: aiohttp.ClientSession, status: int) -> None:
    """During an outage each request gets its answer, counts for no limit and uses no scripted answer."""
    north = sandbox.add_account("north", limit=FixedWindow(2, per=60.0))
    sandbox.script("north", Answer(404))
    with sandbox.outage(Answer(status)):
        assert await statuses(http, sandbox, north, 5) == [status] * 5
        assert await statuses(http, sandbox, Account("nobody", "unknown"), 1) == [status]
    assert await statuses(http, sandbox, north, 3) == [404, 200, 429]


async def test_an_outage_by_reset(sandbox: Sandbox, north: Account, http: aiohttp.ClientSession) -> None:
    """An outage may reset each connection."""
    with sandbox.outage(Answer(failure="reset")), pytest.raises(aiohttp.ClientError):
        await get(http, sandbox, north)
    assert [request.answer for request in sandbox.requests] == [None]
    assert (await get(http, sandbox, north))[0] == 200


async def test_outages_that_overlap(sandbox: Sandbox, north: Account, http: aiohttp.ClientSession) -> None:
    """The outage that began last decides; after its end, an earlier one does; a second end has no effect."""
    first = sandbox.outage()
    second, twin = sandbox.outage(Answer(500)), sandbox.outage(Answer(500))
    twin.end()
    twin.end()
    assert await statuses(http, sandbox, north, 1) == [500]
    second.end()
    assert await statuses(http, sandbox, north, 1) == [503]
    first.end()
    assert await statuses(http, sandbox, north, 1) == [200]


async def test_a_hang_ends_with_its_outage(sandbox: Sandbox, north: Account, http: aiohttp.ClientSession) -> None:
    """A hanging request loses its connection when another thread ends the outage."""
    outage = sandbox.outage(Answer(failure="hang"))
    request = await begin(http, sandbox, north)
    assert not request.done()
    await asyncio.to_thread(outage.end)
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await request
    assert await statuses(http, sandbox, north, 1) == [200]


@pytest.mark.parametrize("scripted", [False, True])
async def test_closing_ends_a_hang(http: aiohttp.ClientSession, scripted: bool) -> None:
    """A closing sandbox does not wait for hanging requests, be they of an outage or of a script."""
    with Sandbox() as sandbox:
        north = sandbox.add_account("north")
        if scripted:
            sandbox.script("north", Answer(failure="hang"))
        else:
            outage = sandbox.outage(Answer(failure="hang"))
        request = await begin(http, sandbox, north)
        began = real_time.monotonic()
    assert real_time.monotonic() - began < 5.0
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await request
    if not scripted:
        outage.end()


async def test_an_outage_before_the_start(http: aiohttp.ClientSession) -> None:
    """An outage may begin, and end, before the sandbox starts."""
    sandbox = Sandbox()
    sandbox.outage(Answer(500)).end()
    sandbox.outage()
    with sandbox:
        assert (await get(http, sandbox, sandbox.add_account("north")))[0] == 503
