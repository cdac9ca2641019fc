"""Rates, known and learned, and the pause after a 429: in virtual time, so exactly."""

import asyncio
import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import pytest
import virtual
from virtual import FixedWindow, LeakyBucket, Service, SlidingWindow, TokenBucket

from audiences_async import (
    Account,
    AudiencesClient,
    AudiencesError,
    AudiencesResponse,
    ConfigurationError,
    DeadlineExceededError,
    Event,
    RateLimit,
    RetryBudget,
    RetryPolicy,
    ServerError,
    TooManyRequestsError,
)
from audiences_async._base.deadlines import CallTime, Deadlines
from audiences_async._pace.pacer import Pacer, watching
from audiences_async._pace.pacing import Report, Turn, Verdict
from audiences_async.clock import Clock
from audiences_async.credentials import ApiKey
from audiences_async.events import AccountPaused, AccountResumed, AttemptFinished, RateLearned
from audiences_async.snapshots import AccountPace

pytestmark = [pytest.mark.once, pytest.mark.simulated]

NORTH, SOUTH = Account("north", "key-north"), Account("south", "key-south")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AudiencesClient]:
    """Makes clients of a service in virtual time."""

    def make(service: Service, *, draw: Callable[[], float] = lambda: 0.5, **settings: Any) -> AudiencesClient:
        monkeypatch.setattr("audiences_async._call.engine.Transport", service)
        return AudiencesClient("key-north", base_url="http://localhost/", clock=virtual.clock(draw), **settings)

    return make


async def outcomes(calls: Iterable[Any]) -> list[Any]:
    """Run calls at once; return the result or the exception of each."""
    return await asyncio.gather(*calls, return_exceptions=True)


def kinds(results: Iterable[Any]) -> Counter[str]:
    """Count results by class."""
    return Counter(type(result).__name__ for result in results)


def pacer(limit: RateLimit | None = None, connections: int = 1000, clock: Clock | None = None) -> Pacer:
    """Create a pacer on virtual time."""
    return Pacer(
        limit, None, connections=connections, attempt_timeout=15.0, throttle_base_delay=1.0, max_delay=20.0,
        clock=clock or virtual.clock(), deadlines=Deadlines(), on_event=None,
    )  # fmt: skip


class Way:
    """An account's way to the wire, as a call uses it."""

    def __init__(self, paces: Pacer, account: Account = NORTH) -> None:
        self.paces = paces
        self.lane = paces.lane(account)

    async def acquire(self, deadline: float = 1e9) -> Turn:
        """Wait for a turn."""
        now = self.paces.clock.monotonic
        with self.paces.deadlines.within(math.inf) as scope:
            return await self.paces.acquire(self.lane, CallTime(now, scope, deadline - now()), None)

    def release(self, taken: Turn, verdict: Verdict, *, pause: float | None = None) -> None:
        """Give a turn back with what came of it."""
        self.paces.release(self.lane, taken, Report(verdict, pause))


async def turn(way: Way, turns: list[tuple[float, int]], number: int) -> None:
    """Wait for a turn, note when it came, and use it for no time."""
    taken = await way.acquire()
    turns.append((virtual.now(), number))
    way.release(taken, "answered")


# --- a known rate


def test_a_known_rate_is_kept_exactly() -> None:
    """After the burst, turns come evenly spaced; a pause earns the burst again, and no more."""

    async def main() -> list[float]:
        turns: list[tuple[float, int]] = []
        lane = Way(pacer(RateLimit(4, per=2.0, burst=3)))
        await asyncio.gather(*(turn(lane, turns, n) for n in range(6)))
        await asyncio.sleep(100)
        await asyncio.gather(*(turn(lane, turns, n) for n in range(5)))
        return [round(at, 6) for at, _ in turns]

    assert virtual.run(main()) == [0, 0, 0, 0.5, 1.0, 1.5, *[101.5] * 3, 102.0, 102.5]


def test_many_waiters_are_served_in_order_and_within_the_limit() -> None:
    """Serve 2,000 waiters at 500/s in order, at most burst + rate * t in every window of t seconds."""

    async def main() -> list[tuple[float, int]]:
        turns: list[tuple[float, int]] = []
        lane = Way(pacer(RateLimit(500, burst=10)))
        await asyncio.gather(*(turn(lane, turns, n) for n in range(2000)))
        return turns

    turns = virtual.run(main())
    assert [number for _, number in turns] == list(range(2000))
    times = [at for at, _ in turns]
    assert times[-1] == pytest.approx((2000 - 10) / 500)
    for first in range(0, 2000, 7):
        for last in range(first, 2000, 101):
            assert last - first + 1 <= 10 + 500 * (times[last] - times[first]) + 1e-6


def test_a_cancelled_waiter_delays_nobody() -> None:
    """Waiters that are cancelled, at the head of the queue or inside it, give their places to those behind them."""

    async def main() -> list[tuple[float, int]]:
        turns: list[tuple[float, int]] = []
        lane = Way(pacer(RateLimit(10)))
        tasks = [asyncio.create_task(turn(lane, turns, n)) for n in range(8)]
        await asyncio.sleep(0.05)
        for number in (1, 3, 7):
            tasks[number].cancel()
        await asyncio.wait(tasks)
        return [(round(at, 6), number) for at, number in turns]

    assert virtual.run(main()) == [(0, 0), (0.1, 2), (0.2, 4), (0.3, 5), (0.4, 6)]


def test_a_call_that_comes_as_the_queue_empties_is_served() -> None:
    """Serve a call that comes in the same moment as the last waiter is cancelled."""

    async def main() -> None:
        lane = Way(pacer(RateLimit(1)))
        await lane.acquire(1e9)
        first = asyncio.create_task(lane.acquire(1e9))
        await asyncio.sleep(0.5)
        first.cancel()
        await asyncio.sleep(0)
        second = asyncio.create_task(lane.acquire(1e9))
        await second
        assert virtual.now() == pytest.approx(1.0)

    virtual.run(main())


def test_a_known_limit_outlives_a_long_wait_of_its_caller(client: Callable[..., AudiencesClient]) -> None:
    """Keep an account whose call only waits for its key, while calls for other accounts come."""
    service = Service(lambda key, at: 200)

    async def slow_key() -> str:
        await asyncio.sleep(3.0)
        return "key-slow"

    async def main() -> None:
        async with client(service, rate_limit=RateLimit(1, per=10.0), timeout=100.0) as c:
            slow = Account("slow", slow_key)
            calls = [asyncio.create_task(c.get_audiences(slow)) for _ in range(2)]
            for number in range(20):
                await asyncio.sleep(1)
                calls.append(asyncio.create_task(c.get_audiences(Account(f"a{number}", f"key-{number}"))))
            await asyncio.gather(*calls)

    virtual.run(main())
    first, second = service.times(key="key-slow")
    assert second - first >= 10.0 - 1e-6


def test_a_cancelled_queue_leaves_no_task() -> None:
    """Leave no task of the lane when the last waiter is cancelled."""

    async def main() -> None:
        lane = Way(pacer(RateLimit(0.001)))
        await lane.acquire(1e9)
        tasks = [asyncio.create_task(lane.acquire(1e9)) for _ in range(3)]
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    virtual.run(main())


def test_a_call_whose_turn_comes_too_late_fails_at_once(client: Callable[..., AudiencesClient]) -> None:
    """Fail at once, with a known rate, a call that cannot get its turn in time, and report when it would."""

    async def main() -> None:
        async with client(Service(lambda key, at: 200), rate_limit=RateLimit(1)) as c:
            calls = [asyncio.create_task(c.get_audiences(timeout=4.5)) for _ in range(7)]
            results = await outcomes(calls)
            assert kinds(results) == {"AudiencesResponse": 5, "DeadlineExceededError": 2}
            errors = [result for result in results if isinstance(result, DeadlineExceededError)]
            assert [(error.retry_after, error.elapsed, error.attempts) for error in errors] == [(5.0, 0.0, ())] * 2
            assert errors[0].stop_reason == "deadline"

    virtual.run(main())


def test_every_attempt_asks_first(client: Callable[..., AudiencesClient]) -> None:
    """Retries are paced like first attempts."""
    service = Service(lambda key, at: 200 if at > 4.5 else 500)

    async def main() -> None:
        async with client(service, rate_limit=RateLimit(2), retry=RetryPolicy(max_attempts=20, base_delay=0)) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(3)))

    virtual.run(main())
    gaps = [later - earlier for earlier, later in zip(service.times(), service.times()[1:], strict=False)]
    assert min(gaps) == pytest.approx(0.5)
    assert len(service.seen) == 12


def test_connections_are_handed_on_in_order() -> None:
    """Connections go to waiters in the order asked for; one that is cancelled, even as it gets its turn, loses none."""

    async def main() -> None:
        paces, got = pacer(connections=1), list[int]()

        async def use(number: int) -> None:
            way = Way(paces, Account(f"a{number}", "key"))
            taken = await way.acquire()
            got.append(number)
            await asyncio.sleep(1)
            way.release(taken, "answered")

        tasks = [asyncio.create_task(use(number)) for number in range(6)]
        await asyncio.sleep(0.5)
        tasks[2].cancel()
        await asyncio.sleep(0.5)
        tasks[1].cancel()  # as it gets its turn
        await asyncio.wait(tasks)
        assert got[0] == 0
        assert got[-3:] == [3, 4, 5]
        assert paces.service.in_flight == 0

    virtual.run(main())


# --- a learned rate


@pytest.mark.parametrize(("rate", "burst"), [(20, 5), (5, 1), (100, 20), (2, 10)])
@pytest.mark.parametrize("round_trip", [0.001, 0.05, 0.3])
def test_a_rate_is_learned(client: Callable[..., AudiencesClient], rate: int, burst: int, round_trip: float) -> None:
    """Finish calls close to the ideal time under an unknown limit, with few requests to spare."""
    service = Service(LeakyBucket(rate, burst), round_trip)
    chance = random.Random(1)

    async def main() -> float:
        async with client(service, draw=chance.random, timeout=1000.0) as c:
            results = await asyncio.gather(*(c.get_audiences() for _ in range(200)))
            assert len(results) == 200
        return virtual.now()

    took = virtual.run(main())
    ideal = (200 - burst - 1) / rate + round_trip
    assert took <= 1.05 * ideal + 15 * round_trip, "a slow start and a few probes cost round trips"
    assert len(service.seen) <= 1.2 * 200


def test_the_first_burst_buys_few_429s(client: Callable[..., AudiencesClient]) -> None:
    """Start slowly: a thousand calls at once on a limit of one request meet a handful of 429s, not hundreds."""
    service = Service(LeakyBucket(0.001, 1))

    async def main() -> None:
        async with client(service, timeout=5.0) as c:
            await outcomes(c.get_audiences() for _ in range(1000))

    virtual.run(main())
    assert len(service.times(200)) == 2
    assert len(service.times(429)) <= 10


def test_a_service_without_a_limit_is_not_held_back(client: Callable[..., AudiencesClient]) -> None:
    """Where no 429 comes, the window opens until only the connections bound it."""
    service = Service(lambda key, at: 200, round_trip=0.1)

    async def main() -> float:
        async with client(service) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(1000)))
        return virtual.now()

    assert virtual.run(main()) < 0.1 * (10 + 12), "ten rounds of 100 connections, and a dozen to open the window"


@pytest.mark.parametrize("seed", range(10))
def test_a_window_of_the_services_is_learned_too(client: Callable[..., AudiencesClient], seed: int) -> None:
    """Where the service counts by the minute, calls go on in the next minute, and few requests are wasted."""
    service = Service(FixedWindow(100, 60.0))

    async def main() -> None:
        draw = random.Random(seed).random
        async with client(service, draw=draw, timeout=900.0, retry=RetryPolicy(max_attempts=10)) as c:
            assert kinds(await outcomes(c.get_audiences() for _ in range(300))) == {"AudiencesResponse": 300}

    virtual.run(main())
    assert max(service.times(200)) < 3 * 120, "the ideal is 120 s; spread evenly it takes longer"
    assert len(service.times(429)) <= 100, "a window that doubles finds the limit for at most what it was granted"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "calls", "ideal"),
    [
        (lambda: FixedWindow(10, 2.0), 100, 18.0),
        (lambda: FixedWindow(60, 10.0), 240, 30.0),
        (lambda: SlidingWindow(10, 2.0), 100, 18.0),
        (lambda: SlidingWindow(60, 10.0), 240, 30.0),
        (lambda: TokenBucket(20, 10), 200, 9.5),
        (lambda: LeakyBucket(20, 5), 200, 9.7),
    ],
    ids=["fixed-10", "fixed-60", "sliding-10", "sliding-60", "token", "leaky"],
)
@pytest.mark.parametrize("round_trip", [0.002, 0.05])
def test_every_kind_of_limit_is_learned(
    client: Callable[..., AudiencesClient],
    limit: Callable[[], Callable[[str, float], int]],
    calls: int,
    ideal: float,
    round_trip: float,
) -> None:
    """Fail no call with the defaults and without headers; the median of five seeds keeps to both bounds."""
    times, requests = [], []
    for seed in range(5):
        service = Service(limit(), round_trip=round_trip)

        async def main(service: Service, seed: int) -> float:
            async with client(service, draw=random.Random(seed).random) as c:
                assert kinds(await outcomes(c.get_audiences() for _ in range(calls))) == {"AudiencesResponse": calls}
            return virtual.now()

        times.append(virtual.run(main(service, seed)) / ideal)
        requests.append(len(service.seen) / calls)
    assert statistics.median(times) <= 1.25
    assert statistics.median(requests) <= 1.15


class Later:
    """A limit whose clock is ahead: a job begins in the middle of a window."""

    def __init__(self, limit: Callable[[str, float], int], seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds

    def __call__(self, key: str, at: float) -> int:
        """Return the status of a request."""
        return self._limit(key, at + self._seconds)


def test_a_window_that_began_earlier_is_learned(client: Callable[..., AudiencesClient]) -> None:
    """Find the window although the first period that is seen is too short, and fail no call."""
    for seed in range(5):
        service = Service(Later(FixedWindow(60, 10.0), 7.0), round_trip=0.05)

        async def main(seed: int, service: Service) -> float:
            async with client(service, draw=random.Random(seed).random) as c:
                assert kinds(await outcomes(c.get_audiences() for _ in range(240))) == {"AudiencesResponse": 240}
            return virtual.now()

        assert virtual.run(main(seed, service)) <= 1.5 * 23
        assert len(service.seen) <= 1.15 * 240


def test_a_window_that_grants_more_or_less_later_is_learned_anew(client: Callable[..., AudiencesClient]) -> None:
    """Follow a limit that is raised from 10 to 30 per 2 s, and then lowered to 5."""
    raised, lowered = FixedWindow(30, 2.0), FixedWindow(5, 2.0)
    first = FixedWindow(10, 2.0)

    def decide(key: str, at: float) -> int:
        return (first if at < 40 else raised if at < 120 else lowered)(key, at)

    service = Service(decide)

    async def main() -> AccountPace:
        async with client(service, draw=random.Random(2).random, timeout=900.0) as c:
            await outcomes(c.get_audiences(timeout=900.0) for _ in range(1500))
            return next(iter(c.snapshot().accounts))

    virtual.run(main())
    granted = service.times(200)
    assert sum(90 <= at < 118 for at in granted) >= 0.6 * 14 * 30
    assert sum(130 <= at < 230 for at in granted) >= 0.6 * 50 * 5
    assert len(service.seen) <= 1.3 * len(granted), "a window of five has few requests to spare for probes"


def test_a_bucket_is_not_taken_for_a_window(client: Callable[..., AudiencesClient]) -> None:
    """Learn the rate of a slow bucket with a burst, which is closed for long too."""
    service = Service(TokenBucket(1, 10))

    async def main() -> float | None:
        async with client(service, draw=random.Random(3).random, timeout=900.0) as c:
            await outcomes(c.get_audiences() for _ in range(60))
            return next(iter(c.snapshot().accounts)).rate

    rate = virtual.run(main())
    assert service.times(200)[59] <= 1.15 * 50
    assert rate == pytest.approx(1.0, rel=0.25)


def test_a_window_ends_a_call_that_has_no_time_for_the_next_one(client: Callable[..., AudiencesClient]) -> None:
    """Once the window is known, a call whose turn comes too late fails at once, and says when to come back."""
    service = Service(FixedWindow(10, 2.0))

    async def main() -> None:
        async with client(service, draw=random.Random(1).random) as c:
            await outcomes(c.get_audiences() for _ in range(105))
            waiting = [asyncio.create_task(c.get_audiences()) for _ in range(100)]
            await asyncio.sleep(0)
            before = virtual.now()
            with pytest.raises(DeadlineExceededError) as caught:
                await c.get_audiences(timeout=5.0)
            assert virtual.now() == before
            assert caught.value.retry_after is not None
            assert caught.value.retry_after > 5.0
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)

    virtual.run(main())


def test_a_window_is_an_event(client: Callable[..., AudiencesClient]) -> None:
    """Report the rate in a window with the window's length."""
    events: list[Event] = []

    async def main() -> None:
        async with client(Service(FixedWindow(10, 2.0)), on_event=events.append) as c:
            await outcomes(c.get_audiences() for _ in range(60))

    virtual.run(main())
    learned = [event for event in events if isinstance(event, RateLearned) and event.per is not None]
    assert learned[-1].per == pytest.approx(2.0, rel=0.25)
    assert learned[-1].rate == pytest.approx(5.0, rel=0.25)


def announced(limit: int, per: float, *, is_fixed: bool = True) -> Callable[[str, float], tuple[int, dict[str, str]]]:
    """Return a window that announces what remains of it on every reply."""
    used: list[float] = []

    def decide(key: str, at: float) -> tuple[int, dict[str, str]]:
        start = math.floor(at / per) * per if is_fixed else at - per
        used[:] = [time for time in used if (time >= start if is_fixed else time > start)]
        status = 200 if len(used) < limit else 429
        if status == 200:
            used.append(at)
        reset = (start if is_fixed else used[0]) + per - at
        return status, {"RateLimit": f'"default";r={limit - len(used)};t={math.ceil(reset)}'}

    return decide


@pytest.mark.parametrize("is_fixed", [True, False])
@pytest.mark.parametrize("round_trip", [0.002, 0.05, 0.3])
def test_an_announced_quota_is_spent_and_never_overshot(
    client: Callable[..., AudiencesClient], is_fixed: bool, round_trip: float
) -> None:
    """Meet no refusal, and lose hardly any time, if the service announces what remains."""
    service = Service(announced(60, 10.0, is_fixed=is_fixed), round_trip=round_trip)

    async def main() -> float:
        async with client(service, draw=random.Random(1).random) as c:
            assert kinds(await outcomes(c.get_audiences() for _ in range(240))) == {"AudiencesResponse": 240}
        return virtual.now()

    assert virtual.run(main()) <= 1.25 * 30
    assert not service.times(429)


def test_a_quota_that_is_no_longer_announced_holds_nothing_back(client: Callable[..., AudiencesClient]) -> None:
    """After its reset, and in a reply without the header, the announced quota is forgotten."""

    def decide(key: str, at: float) -> tuple[int, dict[str, str]]:
        return 200, {"RateLimit": '"default";r=5;t=3'} if at < 1 else {}

    service = Service(decide, round_trip=0.01)

    async def main() -> float:
        async with client(service) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(100)))
            await asyncio.sleep(5)
            await c.get_audiences()
            before = virtual.now()
            await asyncio.gather(*(c.get_audiences() for _ in range(100)))
            return virtual.now() - before

    assert virtual.run(main()) < 0.5


def test_a_limit_that_is_lifted_is_noticed(client: Callable[..., AudiencesClient]) -> None:
    """Follow with the pace when the service grants more than it did."""
    limit = LeakyBucket(10, 2)
    service = Service(limit)

    async def main() -> None:
        async with client(service, timeout=900.0, draw=random.Random(1).random) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(100)))
            limit.rate = 1000.0
            started = virtual.now()
            await asyncio.gather(*(c.get_audiences() for _ in range(1000)))
            assert virtual.now() - started < 1000 / 10 / 3

    virtual.run(main())


# --- the pause after a 429


def test_a_429_pauses_its_own_account_only(client: Callable[..., AudiencesClient]) -> None:
    """While one account is refused for ever, another's calls are answered as if alone, on the same connections."""
    service = Service(lambda key, at: 429 if key == "key-south" else 200, connections=2)

    async def main() -> float:
        async with client(service) as c:
            blocked = [asyncio.create_task(c.get_audiences(SOUTH)) for _ in range(50)]
            await asyncio.sleep(0.01)
            started = virtual.now()
            await asyncio.gather(*(c.get_audiences(NORTH) for _ in range(100)))
            took = virtual.now() - started
            results = await outcomes(blocked)
        assert set(kinds(results)) <= {"TooManyRequestsError", "DeadlineExceededError"}
        return took

    assert virtual.run(main()) < 0.1
    assert len(service.times(key="key-south")) < 25


def test_retry_after_holds_for_the_whole_account(client: Callable[..., AudiencesClient]) -> None:
    """Close the account until a Retry-After; one probe goes first, the rest follow when it is answered."""
    service = Service(lambda key, at: 200 if at >= 30 else (429, {"Retry-After": "30"}), round_trip=1.0)
    events: list[Event] = []

    async def main() -> None:
        async with client(service, timeout=100.0, on_event=events.append) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(10)))

    virtual.run(main())
    after = [at for at in service.times() if at > 2]
    assert after[0] == pytest.approx(31.5)
    assert after[1] >= after[0] + 1.0, "nobody goes before the probe's answer is there"
    assert [event.seconds for event in events if isinstance(event, AccountPaused)] == [30.0]
    assert sum(isinstance(event, AccountResumed) for event in events) == 1


def test_a_probe_that_fails_doubles_the_pause(client: Callable[..., AudiencesClient]) -> None:
    """While the account is refused, its probes come ever more seldom, up to max_delay."""
    service = Service(lambda key, at: 429)

    async def main() -> None:
        policy = RetryPolicy(max_attempts=2, max_delay=5.0)
        async with client(service, timeout=59.0, retry=policy) as c:
            await outcomes(c.get_audiences() for _ in range(50))

    virtual.run(main())
    gaps = [later - earlier for earlier, later in zip(service.times(), service.times()[1:], strict=False)]
    assert len(service.seen) < 30
    assert max(gaps) == pytest.approx(5.0, abs=0.01)


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"RateLimit": '"default";r=0;t=30'}, 30),
        ({"RateLimit-Remaining": "0", "RateLimit-Reset": "30"}, 30),
        ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1030"}, 30),
        ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "-5"}, 0),
        ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "99999999999"}, 0),
        ({"X-RateLimit-Remaining": "0"}, 0),
        ({"X-Rate-Limit-Remaining": "0", "X-Rate-Limit-Reset": "20"}, 20),
        ({"RateLimit": "limit=100, remaining=0, reset=30"}, 30),
        ({"RateLimit-Remaining": "1", "RateLimit-Reset": "30"}, 0),
        ({"RateLimit": '"default";r=1;t=30'}, 0),
        ({"RateLimit": "r=zero"}, 0),
    ],
)
def test_what_the_service_says_of_its_limit_is_taken(
    client: Callable[..., AudiencesClient], headers: dict[str, str], pause: float
) -> None:
    """Pause the account before any 429 after an answer marked as the last one; ignore malformed headers."""
    service = Service(lambda key, at: (200, headers if at < 1 else {}))
    events: list[Event] = []

    async def main() -> None:
        async with client(service, on_event=events.append, timeout=2000.0) as c:
            await c.get_audiences()
            await c.get_audiences()

    virtual.run(main())
    paused = [event.seconds for event in events if isinstance(event, AccountPaused)]
    assert paused == ([float(pause)] if pause else [])


def test_a_pause_that_does_not_fit_ends_waiting_calls_at_once(client: Callable[..., AudiencesClient]) -> None:
    """End a waiting call when the account closes for longer than it has, and report when to come back."""
    service = Service(lambda key, at: (429, {"Retry-After": "120"}), round_trip=1.0)

    async def main() -> list[Any]:
        async with client(service) as c:
            return await outcomes(c.get_audiences() for _ in range(10))

    results = virtual.run(main())
    assert kinds(results) == {"TooManyRequestsError": 2, "DeadlineExceededError": 8}
    for error in results:
        assert isinstance(error, AudiencesError)
        assert error.retry_after == 120.0
        assert error.elapsed == pytest.approx(1.0)
        assert error.stop_reason == "deadline"
    assert len(service.seen) == 2


def test_a_pause_meets_a_cancelled_call_in_the_queue() -> None:
    """Cancel one of two waiting calls and refuse the other as the account closes: neither disturbs the other."""

    async def main() -> list[Any]:
        lane = Way(pacer(RateLimit(1)))
        sent_at = await lane.acquire(1e9)
        calls = [asyncio.create_task(lane.acquire(1005.0)) for _ in range(2)]
        await asyncio.sleep(0.5)
        calls[0].cancel()
        lane.release(sent_at, "throttled", pause=100.0)
        return await outcomes(calls)

    assert kinds(virtual.run(main())) == {"CancelledError": 1, "DeadlineExceededError": 1}


def test_a_call_that_comes_during_a_pause_does_not_sleep_in_vain(client: Callable[..., AudiencesClient]) -> None:
    """Fail a web handler with two seconds left at once."""
    service = Service(lambda key, at: (429, {"Retry-After": "50"}))

    async def main() -> None:
        async with client(service, timeout=40.0) as c:
            with pytest.raises(TooManyRequestsError):
                await c.get_audiences()
            with pytest.raises(DeadlineExceededError, match="does not fit") as caught:
                await c.get_audiences(timeout=2.0)
            assert caught.value.retry_after == pytest.approx(50, abs=0.01)
            assert caught.value.elapsed == 0.0

    virtual.run(main())


def test_a_lone_call_backs_off_as_its_policy_says(client: Callable[..., AudiencesClient]) -> None:
    """Wait by full jitter from throttle_base_delay on for one call on an account that is refused."""
    service = Service(lambda key, at: 429 if at < 4 else 200)
    events: list[Event] = []

    async def main() -> None:
        async with client(service, on_event=events.append, draw=lambda: 1.0) as c:
            await c.get_audiences()

    virtual.run(main())
    waits = [event.attempt.wait for event in events if isinstance(event, AttemptFinished)]
    assert waits == [1.0, 2.0, 4.0, 0.0]


def test_a_turn_is_held_back_when_a_429_comes_first(client: Callable[..., AudiencesClient]) -> None:
    """Hold back a call that waits for a connection which has just brought a 429."""
    service = Service(lambda key, at: 429 if at < 0.01 else 200, connections=1)

    async def main() -> None:
        async with client(service) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(3)))

    virtual.run(main())
    assert len(service.times(429)) == 1


@pytest.mark.parametrize("gap", [60.0, 600.0, 3600.0])
def test_stray_429s_do_not_collapse_the_pace(client: Callable[..., AudiencesClient], gap: float) -> None:
    """Single 429s with long idle times between them measure nothing: later calls are served at once."""
    stray = {0, 2, 4}
    service = Service(lambda key, at: 429 if len(service.seen) in stray else 200)

    async def main() -> None:
        async with client(service) as c:
            for _ in range(4):
                await c.get_audiences()
                await asyncio.sleep(gap)
            started = virtual.now()
            await asyncio.gather(*(c.get_audiences() for _ in range(100)))
            assert virtual.now() - started < 10.0

    virtual.run(main())


def test_a_pace_that_is_not_used_does_not_grow(client: Callable[..., AudiencesClient]) -> None:
    """Callers slower than the pace do not push it up: the next burst meets few 429s."""
    service = Service(LeakyBucket(20, 5))

    async def main() -> None:
        async with client(service, timeout=900.0) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(100)))
            for _ in range(1000):
                await asyncio.sleep(0.2)
                await c.get_audiences()
            before = len(service.times(429))
            await asyncio.gather(*(c.get_audiences() for _ in range(200)))
            assert len(service.times(429)) - before < 20

    virtual.run(main())


def test_a_retry_after_of_zero_does_not_open_the_gate(client: Callable[..., AudiencesClient]) -> None:
    """Against 429s for ever that ask for no wait, the pauses are our own and double."""
    service = Service(lambda key, at: (429, {"Retry-After": "0"}))

    async def main() -> None:
        async with client(service) as c:
            await outcomes(c.get_audiences() for _ in range(1000))

    virtual.run(main())
    assert len(service.seen) < 40


def test_an_absurd_retry_after_does_not_close_the_account_for_ever(client: Callable[..., AudiencesClient]) -> None:
    """End only its own call on a Retry-After of years, a date taken for seconds; the others are not held."""
    service = Service(lambda key, at: 200 if at > 1 else (429, {"Retry-After": "1700000000"}))

    async def main() -> None:
        async with client(service) as c:
            with pytest.raises(TooManyRequestsError):
                await c.get_audiences()
            await asyncio.sleep(2)
            await c.get_audiences()

    virtual.run(main())


def test_a_limiter_is_asked_only_when_the_gate_is_open(client: Callable[..., AudiencesClient]) -> None:
    """Ask a limiter for nothing during a pause, so that its grants do not pile up behind it."""

    class Limiter:
        def __init__(self) -> None:
            self.free_at = 0.0

        async def acquire(self, account_name: str) -> None:
            self.free_at = max(self.free_at, virtual.now()) + 0.1
            await asyncio.sleep(self.free_at - virtual.now())

    service = Service(lambda key, at: 200 if at > 30 else (429, {"Retry-After": "30"}))

    async def main() -> None:
        async with client(service, timeout=200.0, rate_limit=Limiter()) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(300)))

    virtual.run(main())
    times = service.times(200)
    assert all(later - earlier >= 0.1 - 1e-6 for earlier, later in itertools.pairwise(times))


def test_a_burst_on_few_connections_is_not_refused(client: Callable[..., AudiencesClient]) -> None:
    """Let calls that a limit's burst covers wait for a connection, without failing them as too late."""
    service = Service(lambda key, at: 200, connections=1)

    async def main() -> None:
        async with client(service, rate_limit=RateLimit(1, burst=100), timeout=10.0) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(50)))

    virtual.run(main())


def test_slow_callers_do_not_spoil_the_measure(client: Callable[..., AudiencesClient]) -> None:
    """Measure a rate only while calls queue for it: after an idle minute a 429 is a cut, and no measure."""
    service = Service(LeakyBucket(20, 2))
    events: list[Event] = []

    async def main() -> None:
        async with client(service, on_event=events.append) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(60)))
            await asyncio.sleep(60)
            await asyncio.gather(*(c.get_audiences() for _ in range(100)))

    virtual.run(main())
    rates = [event.rate for event in events if isinstance(event, RateLearned)]
    assert rates[-1] == pytest.approx(20, rel=0.1)
    assert min(rates) > 5


# --- the budget


def outage(until: float) -> Service:
    """Return a service that answers 503 until this second."""
    return Service(lambda key, at: 503 if at < until else 200, round_trip=0.01)


@pytest.mark.slow
def test_a_full_outage_is_not_multiplied(client: Callable[..., AudiencesClient]) -> None:
    """Make at most 1.2 requests for each of a thousand calls while everything fails, and report why they stopped."""
    service = outage(1e9)

    async def main() -> list[Any]:
        async with client(service, draw=random.Random(1).random) as c:
            assert c.snapshot().budget_left == 500
            results = await outcomes(c.get_audiences() for _ in range(1000))
            assert c.snapshot().budget_left == 0
            return results

    results = virtual.run(main())
    assert kinds(results) == {"ServerError": 1000}
    assert len(service.seen) == 1100
    assert Counter(error.stop_reason for error in results)["budget"] >= 900
    assert "budget is used up" in str(results[-1])


def test_recovery_after_an_outage_is_spread(client: Callable[..., AudiencesClient]) -> None:
    """After an outage the waiting calls recover within the longest backoff and a second, without a second spike."""
    service = outage(0.3)
    events: list[Event] = []

    async def main() -> tuple[list[Any], float]:
        async with client(service, draw=random.Random(1).random, on_event=events.append) as c:
            results = await outcomes(c.get_audiences() for _ in range(1000))
            return results, virtual.now()

    results, took = virtual.run(main())
    waits = [event.attempt.wait for event in events if isinstance(event, AttemptFinished)]
    assert kinds(results)["AudiencesResponse"] >= 20
    assert took <= 0.3 + max(waits) + 1.0
    after = Counter(int(at / 0.1) for at in service.times(200) if at >= 0.3)
    assert max(after.values()) <= 50, "of 1,000 calls, in a tenth of a second"


def test_answers_earn_retries_back(client: Callable[..., AudiencesClient]) -> None:
    """Refund tokens with each answer, up to the capacity; without a budget nothing is counted."""
    service = Service(lambda key, at: 500 if at < 0.5 else 200)

    async def main() -> None:
        async with client(service, budget=RetryBudget(capacity=10, cost=4, refund=3), draw=lambda: 1.0) as c:
            await c.get_audiences()
            assert c.snapshot().budget_left == 9
            await c.get_audiences()
            assert c.snapshot().budget_left == 10
        async with client(Service(lambda key, at: 500 if at < 20 else 200), budget=None, draw=lambda: 1.0) as c:
            for _ in range(3):
                await asyncio.sleep(8)
                with suppress(ServerError):
                    await c.get_audiences()
            assert c.snapshot().budget_left == float("inf")

    virtual.run(main())


def test_first_attempts_never_wait_for_the_budget(client: Callable[..., AudiencesClient]) -> None:
    """Make a new call's one attempt even with the budget used up."""
    service = Service(lambda key, at: 500)

    async def main() -> None:
        async with client(service, budget=RetryBudget(capacity=5)) as c:
            for attempts in (2, 1, 1):
                with pytest.raises(ServerError) as caught:
                    await c.get_audiences()
                assert (len(caught.value.attempts), caught.value.stop_reason) == (attempts, "budget")

    virtual.run(main())


@pytest.mark.parametrize("wrong", [{"capacity": 0}, {"cost": 0}, {"refund": -1}, {"cost": "5"}])
def test_a_budget_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    """Check a budget's numbers by name."""
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        RetryBudget(**wrong)


# --- snapshots and events


def test_the_snapshot_says_why_a_call_waits(client: Callable[..., AudiencesClient]) -> None:
    """Show each account's rate, pause, queue and requests on the wire in the snapshot, and no key."""
    service = Service(lambda key, at: (429, {"Retry-After": "30"}) if key == "key-south" else 200)

    async def main() -> None:
        async with client(service, rate_limit=RateLimit(5, per=2.0)) as c:
            assert c.snapshot().accounts == ()
            calls = [asyncio.create_task(c.get_audiences(account)) for account in (NORTH, NORTH, SOUTH, SOUTH)]
            await asyncio.sleep(0.1)
            north, south = c.snapshot().accounts
            assert north == AccountPace("north", rate=2.5, paused_for=0.0, waiting=1, in_flight=0)
            assert south.paused_for == pytest.approx(29.9, abs=0.01)
            assert (south.account, south.waiting) == ("south", 1)
            assert "key-" not in repr(c.snapshot())
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)

    virtual.run(main())


def test_a_learned_rate_is_told(client: Callable[..., AudiencesClient]) -> None:
    """Emit an event for each new measure of the rate."""
    events: list[Event] = []

    async def main() -> None:
        async with client(Service(LeakyBucket(20, 5)), on_event=events.append) as c:
            await asyncio.gather(*(c.get_audiences() for _ in range(150)))

    virtual.run(main())
    rates = [event.rate for event in events if isinstance(event, RateLearned)]
    assert rates[-1] == pytest.approx(20, rel=0.05)


def test_idle_accounts_are_forgotten() -> None:
    """Memory follows the accounts in use, not those that were ever used."""

    async def main() -> None:
        paces = pacer(RateLimit(1000))
        for number in range(10_000):
            lane = Way(paces, Account(f"a{number}", "key"))
            lane.release(await lane.acquire(1e9), "answered")
            await asyncio.sleep(0.01)
        assert len(list(paces.snapshot())) <= 64

    virtual.run(main())


@pytest.mark.slow
def test_a_paused_account_is_not_forgotten() -> None:
    """However many accounts come, one that is closed stays closed."""

    async def main() -> None:
        paces = pacer()
        lane = Way(paces)
        lane.release(await lane.acquire(1e9), "throttled", pause=3600.0)
        for number in range(6000):
            other = Way(paces, Account(f"a{number}", "key"))
            other.release(await other.acquire(1e9), "throttled")
        assert paces.lane(NORTH) is lane.lane

    virtual.run(main())


@pytest.mark.slow
def test_only_the_latest_witness_is_dismissed() -> None:
    """Keep a key that was answered since the probe with another one began."""

    async def main() -> None:
        outage, earlier, later = pacer().service.outage, ApiKey("earlier"), ApiKey("later")
        outage.witness = later
        outage.dismiss(earlier)
        assert outage.witness is later
        outage.dismiss(later)
        assert outage.witness is None

    virtual.run(main())


def test_the_blame_ends_with_the_last_job() -> None:
    """Blame accounts as long as a job goes on, and no longer."""

    async def main() -> list[bool]:
        service, blamed = pacer().service, []
        with watching(service):
            with watching(service):
                for _ in range(5):
                    service.evidence.returned("throttled", Way(pacer()).lane, is_probe=True)
                    service.evidence.returned("answered", None, is_probe=True)
            blamed.append(service.evidence.blames_accounts)
        return [*blamed, service.evidence.blames_accounts]

    assert virtual.run(main()) == [True, False]


def test_learned_rates_are_kept_for_a_while() -> None:
    """Keep the learned pace for a bounded number of accounts."""

    async def main() -> None:
        paces = pacer()
        for number in range(6000):
            lane = Way(paces, Account(f"a{number}", "key"))
            for verdict in ("answered", "throttled", "answered", "throttled"):  # its own doing, not the service's
                lane.release(await lane.acquire(1e9), verdict)
        kept = [pace.account for pace in paces.snapshot()]
        assert kept[-2000:] == [f"a{number}" for number in range(4000, 6000)], "the latest"
        assert len(kept) <= 4096 + 64

    virtual.run(main())


@pytest.mark.parametrize("kind", [OSError, TimeoutError])
def test_a_clock_that_fails_ends_waiting_calls(kind: type[Exception]) -> None:
    """Raise in every call that waits when the clock's own sleep raises."""

    async def sleep(seconds: float) -> None:
        raise kind("no time")

    async def main() -> list[Any]:
        lane = Way(pacer(RateLimit(1), clock=Clock(monotonic=asyncio.get_running_loop().time, sleep=sleep)))
        return await outcomes(lane.acquire() for _ in range(3))

    results = virtual.run(main())
    assert kinds(results) == {"Turn": 1, kind.__name__: 2}


def test_closing_ends_waiting_calls(client: Callable[..., AudiencesClient]) -> None:
    """Calls that wait for their turn at aclose() end, and leave no task."""

    async def main() -> list[Any]:
        c = client(Service(lambda key, at: 200), rate_limit=RateLimit(0.1))
        calls = [asyncio.create_task(c.get_audiences()) for _ in range(3)]
        await asyncio.sleep(1)
        await c.aclose()
        return await outcomes(calls)

    assert kinds(virtual.run(main())) == {"AudiencesResponse": 1, "ClientClosedError": 2}


def test_old_news_is_no_new_cut(client: Callable[..., AudiencesClient]) -> None:
    """Keep the length of a pause when 429s arrive for requests that were sent before it."""
    service = Service(lambda key, at: 200 if at < 1 or at > 3 else 429, round_trip=1.0)
    events: list[Event] = []

    async def main() -> list[Any]:
        async with client(service, on_event=events.append) as c:
            return await outcomes(c.get_audiences() for _ in range(12))

    results = virtual.run(main())
    assert all(isinstance(result, AudiencesResponse) for result in results)
    assert len(service.times(429)) > sum(isinstance(event, AccountPaused) for event in events)
