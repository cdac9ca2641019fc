"""What accounts share, in virtual time: limits, outages and load, by counts and times that are exact."""

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
import virtual
from attrs import define
from virtual import ConnectionLimit, FixedWindow, LeakyBucket, Service, SlidingWindow, TokenBucket, Workers, shared

from audiences_async import (
    Account,
    AudiencesClient,
    CachePolicy,
    ConfigurationError,
    Event,
    Failed,
    Outcome,
    RateLimit,
    RetryPolicy,
    ServerError,
    TooManyRequestsError,
)
from audiences_async._distributed.shares import Pace
from audiences_async._http.wire import Reply
from audiences_async.credentials import ApiKey
from audiences_async.errors import AttemptTimeoutError, ConnectionFailedError, TransportError
from audiences_async.events import (
    AttemptFinished,
    ServiceConcurrencyLearned,
    ServicePaused,
    ServiceRateLearned,
    ServiceResumed,
)
from audiences_async.snapshots import ServicePace

pytestmark = [pytest.mark.once, pytest.mark.simulated, pytest.mark.slow]


@define
class Done:
    """Results of a job.

    Attributes:
        outcomes: Each account's, and when it came.
        requests: All that reached the service.
        pace: The service's pace at the end.
    """

    outcomes: list[tuple[float, Outcome]]
    requests: int
    pace: ServicePace

    @property
    def answered(self) -> list[float]:
        """Return when accounts were answered."""
        return [at for at, outcome in self.outcomes if outcome.ok]

    @property
    def reasons(self) -> Counter[str]:
        """Count why accounts failed."""
        return Counter(outcome.error.stop_reason for _, outcome in self.outcomes if isinstance(outcome, Failed))

    @property
    def failed(self) -> set[str]:
        """Return the names of the accounts that failed."""
        return {outcome.account.name for _, outcome in self.outcomes if not outcome.ok}

    @property
    def took(self) -> float:
        """Return the seconds until the last answer."""
        return self.answered[-1]

    @property
    def requests_per_answer(self) -> float:
        """Requests for each answer."""
        return self.requests / len(self.answered)


RunJob = Callable[..., Done]
Limit = Callable[[str, float], int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> RunJob:
    """Runs a job of many accounts against a service, with the defaults and 100 accounts at once."""

    def run(
        service: Service,
        count: int,
        *,
        each: int = 1,
        is_bad: Callable[[int], bool] = lambda number: False,
        patience: float = 900.0,
        timeout: float = 60.0,
        concurrency: int = 100,
        **settings: Any,
    ) -> Done:
        monkeypatch.setattr("audiences_async._call.engine.Transport", service)
        names = [f"{'bad' if is_bad(number) else 'good'}-{number}" for number in range(count)]
        accounts = [Account(name, name) for name in names for _ in range(each)]
        came: list[tuple[float, Outcome]] = []

        async def main() -> ServicePace:
            clock = virtual.clock(random.Random(20261127).random)
            async with AudiencesClient(base_url="http://localhost/", clock=clock, **settings) as client:
                async with client.stream(
                    accounts, concurrency=concurrency, timeout=timeout, patience=patience
                ) as outcomes:
                    came.extend([(virtual.now(), outcome) async for outcome in outcomes])
                pace = client.snapshot().service
                assert pace is not None
                return pace

        pace = virtual.run(main())
        assert sorted(outcome.account.name for _, outcome in came) == sorted(account.name for account in accounts)
        return Done(came, len(service.seen), pace)

    return run


# --- a rate that all accounts share


@pytest.mark.long
@pytest.mark.parametrize("refusal", [429, 503])
@pytest.mark.parametrize("round_trip", [0.001, 0.1])
def test_a_shared_rate_is_learned(run: RunJob, refusal: int, round_trip: float) -> None:
    """Learn a limit of all accounts together without failing any, with 15 % more requests and time at the most."""
    done = run(Service(shared(LeakyBucket(50, 5), refusal), round_trip=round_trip), 2000)
    assert not done.reasons
    assert done.took <= 1.15 * (2000 - 6) / 50
    assert done.requests_per_answer <= 1.15
    assert done.pace.state == "limited"
    assert done.pace.rate == pytest.approx(50, rel=0.25)


def test_a_shared_rate_whose_refusals_name_a_pause(run: RunJob) -> None:
    """Find the rate although each refusal has to be waited out."""
    bucket = LeakyBucket(50, 5)
    refusing = Service(lambda key, at: (429, {"Retry-After": "1"}) if bucket("", at) == 429 else 200, round_trip=0.01)
    done = run(refusing, 2000)
    assert not done.reasons
    assert done.requests_per_answer <= 1.05
    assert done.took <= 1.35 * (2000 - 6) / 50


def test_a_slow_window_whose_refusals_look_like_an_outage(run: RunJob) -> None:
    """Answer every account of a service that grants 60 requests a minute, and answers 503 to the others."""
    done = run(Service(shared(FixedWindow(60, 60.0), 503), round_trip=0.05), 400)
    assert not done.reasons
    assert done.took <= 1.05 * 360
    assert done.requests_per_answer <= 1.8


def test_a_small_job_under_a_shared_rate(run: RunJob) -> None:
    """Fetch a hundred accounts at 10 a second in little more time than the limit allows."""
    done = run(Service(shared(LeakyBucket(10, 5)), round_trip=0.01), 100)
    assert not done.reasons
    assert done.took <= 1.15 * 9.5


def test_a_shared_rate_and_one_for_each_account(run: RunJob) -> None:
    """Where both bite, each is attributed to whom it belongs."""
    own, all_together = LeakyBucket(2, 1), LeakyBucket(50, 5)
    service = Service(lambda key, at: max(own(key, at), all_together("", at)), round_trip=0.01)
    done = run(service, 300, each=3)
    assert not done.reasons
    assert done.took <= 1.25 * 900 / 50
    assert done.requests_per_answer <= 1.2


@pytest.mark.parametrize("refusal", [429, 503])
def test_a_limit_of_connections(run: RunJob, refusal: int) -> None:
    """Use the capacity of a service that refuses the eleventh request at a time."""
    done = run(ConnectionLimit(round_trip=0.2, refusal=refusal), 2000)
    assert not done.reasons
    assert done.took <= 1.25 * 40
    assert done.requests_per_answer <= 1.1


@pytest.mark.long
@pytest.mark.parametrize(
    "limit",
    [lambda: FixedWindow(500, 10.0), lambda: SlidingWindow(500, 10.0), lambda: TokenBucket(50, 500)],
    ids=["fixed", "sliding", "token"],
)
def test_every_kind_of_shared_limit_is_learned(run: RunJob, limit: Callable[[], Limit]) -> None:
    """Fail no account under a shared window or bucket, with few requests refused."""
    done = run(Service(shared(limit()), round_trip=0.02), 3000)
    assert not done.reasons
    assert done.took <= 1.4 * 50
    assert done.requests_per_answer <= 1.1


def test_a_shared_quota_is_announced_to_different_accounts(run: RunJob) -> None:
    """Counts that go on from one account to the next are of one quota, which is spent and not overshot."""
    used: list[float] = []

    def decide(key: str, at: float) -> tuple[int, dict[str, str]]:
        start = math.floor(at / 2) * 2
        used[:] = [time for time in used if time >= start]
        status = 200 if len(used) < 100 else 429
        if status == 200:
            used.append(at)
        return status, {"RateLimit": f'"default";r={100 - len(used)};t={math.ceil(start + 2 - at)}'}

    class InOrder(Service):
        async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
            """Answer requests that are sent at the same moment in their order."""
            self.round_trip += 1e-9
            return await super().attempt(key)

    done = run(InOrder(decide, round_trip=0.05), 1000)
    assert not done.reasons
    assert done.requests <= 1000 + 100, "until it is recognized, as many as are in flight may be refused"
    assert done.took <= 1.15 * 18


def test_quotas_of_accounts_are_no_shared_quota(run: RunJob) -> None:
    """Treat the same count announced to all accounts as a quota of each, for which no other account waits."""
    used: Counter[str] = Counter()

    def decide(key: str, at: float) -> tuple[int, dict[str, str]]:
        used[key] += 1
        return 200, {"RateLimit": f'"default";r={5 - used[key]};t=60'}

    done = run(Service(decide, round_trip=0.02), 1000, each=2)
    assert not done.reasons
    assert done.took <= 1.0


@pytest.mark.long
@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_refusals_that_slowing_does_not_help_do_not_stop_a_job(run: RunJob, share: float) -> None:
    """After a flood of refusals, those of a share that comes at any rate do not drive the rate to nothing."""
    chance = random.Random(3)
    service = Service(lambda key, at: 429 if at < 0.1 or chance.random() < share else 200, round_trip=0.02)
    done = run(service, 2000)
    assert done.reasons.keys() <= {"attempts"}
    assert done.reasons["attempts"] <= 2 * 2000 * share**5 + 5
    assert done.took <= 300


@pytest.mark.long
@pytest.mark.parametrize("status", [429, 500, 503])
def test_accounts_that_fail_for_ever_under_a_shared_rate(run: RunJob, status: int) -> None:
    """Keep the others' pace if a twentieth of the accounts fails under a rate that all share."""
    bucket = shared(LeakyBucket(50, 5))

    def decide(key: str, at: float) -> int:
        granted = bucket("", at)
        return status if key.startswith("bad") and granted == 200 else granted

    done = run(Service(decide, round_trip=0.02), 1500, is_bad=lambda number: number % 20 == 0)
    assert done.failed == {f"bad-{number}" for number in range(0, 1500, 20)}
    assert done.took <= 1.05 * (1425 + 75 * (5 + 4)) / 50, "as long as the limit takes for all their requests"


@pytest.mark.long
@pytest.mark.parametrize("refusal", [429, 503])
@pytest.mark.parametrize("outage", [503, 500])
def test_an_outage_under_a_shared_rate(run: RunJob, refusal: int, outage: int) -> None:
    """Resume the job within 2 s of an outage, at the rate it had: a limit that is known does not hide it."""
    bucket = shared(LeakyBucket(100, 5), refusal)
    service = Service(lambda key, at: outage if 8 < at < 18 else bucket("", at), round_trip=0.02)
    done = run(service, 3000)
    assert not done.reasons
    assert len([at for at in service.times() if 8 < at < 18]) <= 40
    assert min(at for at in service.times(200) if at >= 18) <= 18 + 2
    assert done.took <= 1.25 * 40


def test_a_limit_of_connections_is_an_event(run: RunJob) -> None:
    """Report the number of requests that the service takes at the same time; the window keeps to it."""
    events: list[Event] = []
    done = run(ConnectionLimit(round_trip=0.2), 2000, on_event=events.append)
    learned = [event.limit for event in events if isinstance(event, ServiceConcurrencyLearned)]
    assert (learned[-1], done.pace.window, done.pace.rate) == (10, 10, None)
    events.clear()
    done = run(
        ConnectionLimit(round_trip=0.2), 500, on_event=events.append, service_rate_limit=RateLimit(1000, burst=100)
    )
    assert not done.reasons
    assert any(isinstance(event, ServiceConcurrencyLearned) for event in events)


def test_a_limit_of_connections_that_is_lowered(run: RunJob) -> None:
    """Follow a limit that falls to one request at a time, and fail no account."""

    @define
    class Falling(ConnectionLimit):
        async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
            self.limit = 10 if virtual.now() < 10 else 4 if virtual.now() < 20 else 1
            return await super().attempt(key)

    done = run(Falling(round_trip=0.2), 800)
    assert not done.reasons
    assert done.requests_per_answer <= 1.5


def test_a_known_shared_rate_is_never_overshot(run: RunJob) -> None:
    """Meet no refusal with *service_rate_limit*, and keep the wait for it out of an account's time."""
    service = Service(shared(LeakyBucket(5, 1)))
    done = run(service, 50, timeout=1.0, service_rate_limit=RateLimit(5))
    assert not done.reasons
    assert done.requests == 50
    assert done.took == pytest.approx(49 / 5, abs=0.01)


def test_a_limiter_of_all_accounts_together(run: RunJob) -> None:
    """Given as a `Limiter`, the service's limit is asked before every request, with the account's name."""
    asked: list[str] = []

    class Limiter:
        async def acquire(self, account_name: str) -> None:
            asked.append(account_name)
            await asyncio.sleep(1.0)

    done = run(Service(lambda key, at: 200), 5, timeout=1.5, service_rate_limit=Limiter())
    assert (sorted(asked), not done.reasons) == ([f"good-{number}" for number in range(5)], True)
    with pytest.raises(ConfigurationError, match="service_rate_limit"):
        AudiencesClient(service_rate_limit=5)  # type: ignore[arg-type]


def test_a_rate_that_is_known_from_others(run: RunJob) -> None:
    """A limiter that knows the pace from elsewhere sets it; refusals teach the rest."""

    class Limiter:
        def attach_pace(self, pace: Pace) -> None:
            assert pace.learned_rate is None
            pace.adopt(40.0)
            assert pace.learned_rate == 40.0

        async def acquire(self, account_name: str) -> None: ...

    learned: list[Event] = []
    alone = run(Service(shared(LeakyBucket(50, 5)), round_trip=0.02), 500)
    service = Service(shared(LeakyBucket(50, 5)), round_trip=0.02)
    done = run(service, 500, service_rate_limit=Limiter(), on_event=learned.append)
    assert not done.reasons
    assert done.took <= 1.15 * 500 / 50
    assert done.requests - 500 <= (alone.requests - 500) / 2, "no flood at the start"
    assert next(event for event in learned if isinstance(event, ServiceRateLearned)).rate == 40.0


@pytest.mark.long
def test_limits_of_accounts_are_no_shared_limit(run: RunJob) -> None:
    """Keep a thousand accounts that are throttled at once, each for itself, from slowing each other down."""
    done = run(Service(LeakyBucket(2, 1), round_trip=0.01), 1000, each=3)
    assert not done.reasons
    assert done.pace.state == "open"


def test_a_limit_that_is_lifted_is_forgotten(run: RunJob) -> None:
    """Reopen a service that refused every request at first, and none later, after some answers."""
    done = run(Service(lambda key, at: 429 if at < 0.3 else 200, round_trip=0.01), 500)
    assert not done.reasons
    assert (done.pace.state, done.pace.rate) == ("open", None)


def test_refusals_that_come_late_are_old_news(run: RunJob) -> None:
    """Where replies take different times, a refusal from before the last cut does not cut once more."""

    class Uneven(Service):
        async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
            self.round_trip = chance.choice((0.01, 0.2))
            return await super().attempt(key)

    chance = random.Random(5)
    done = run(Uneven(shared(LeakyBucket(50, 5))), 1000)
    assert not done.reasons
    assert done.took <= 1.25 * (1000 - 6) / 50


def test_a_machine_without_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing is in flight that could return a socket, the call fails, and says what to change."""

    class NoSockets(Service):
        async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
            return ConnectionFailedError("cannot open another socket", unsent=True)

    monkeypatch.setattr("audiences_async._call.engine.Transport", NoSockets(lambda key, at: 200))

    async def main() -> None:
        async with AudiencesClient("key", base_url="http://localhost/", clock=virtual.clock()) as client:
            with pytest.raises(ConnectionFailedError, match="another socket"):
                await client.get_audiences()

    virtual.run(main())


# --- an outage


@define
class Swallowing(Service):
    """A service that takes requests from second 1 to 11 and never answers them."""

    waiting: set["asyncio.Future[None]"] | None = None

    async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
        """Leave a request from second 1 to 11 without an answer, until it is abandoned or times out."""
        if not 1 < virtual.now() < 11:
            return await super().attempt(key)
        self.seen.append((virtual.now(), key.reveal(), 0))
        self.waiting = self.waiting or set()
        never = asyncio.get_running_loop().create_future()
        self.waiting.add(never)
        try:
            await asyncio.wait({never}, timeout=15)
        finally:
            self.waiting.discard(never)
        return AttemptTimeoutError("no whole reply")

    def abandon(self) -> None:
        """End all waiting requests."""
        for never in self.waiting or ():
            if not never.done():
                never.set_result(None)


@define
class Resetting(Service):
    """A service that resets every connection from second 1 to 11, those first that have been used before."""

    pooled: int = 100

    async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
        """Reset the connection from second 1 to 11."""
        reply = await super().attempt(key)
        if not 1 < virtual.now() < 11:
            return reply
        self.pooled -= 1
        return ConnectionFailedError("reset", stale_connection=self.pooled >= 0)


def lost(status: int) -> Callable[[str, float], int]:
    """Return answers that have this status from second 1 to 11."""
    return lambda key, at: status if 1 < at < 11 else 200


@pytest.mark.parametrize(
    "service",
    [
        pytest.param(Service(lost(503), 0.05), id="503", marks=pytest.mark.long),
        pytest.param(Service(lost(500), 0.05), id="500", marks=pytest.mark.long),
        pytest.param(Service(lost(502), 0.05), id="502", marks=pytest.mark.long),
        pytest.param(Swallowing(lost(200), 0.05), id="swallows"),
        pytest.param(Resetting(lost(200), 0.05), id="resets"),
    ],
)
def test_an_outage_is_waited_out(run: RunJob, service: Service) -> None:
    """Send probes only during an outage, fail no account, and go on within 2 s of its end."""
    service.seen.clear()
    done = run(service, 5000)
    during = [at for at, _, _ in service.seen if 1 < at < 11]
    assert not done.reasons
    rounds = 2 if isinstance(service, Swallowing) else 1  # until it shows
    assert len(during) <= rounds * 100 + 2 * 10
    assert min(at for at, _, status in service.seen if status == 200 and at >= 11) <= 11 + 2


def test_a_job_without_patience(run: RunJob) -> None:
    """Fail the other accounts, with the reason, after *patience* seconds without any answer."""
    done = run(Service(lambda key, at: 503 if at > 0.2 else 200, round_trip=0.05), 1000, patience=5.0)
    assert done.reasons.keys() == {"patience"}
    assert len(done.answered) + done.reasons["patience"] == 1000
    last, outcome = done.outcomes[-1]
    assert isinstance(outcome, Failed)
    assert "answered no account for" in str(outcome.error)
    errors = [str(each.error) for at, each in done.outcomes if isinstance(each, Failed) and at < 5.2]
    assert errors
    assert all("and patience=5 s ends before the next probe; the latest failure: HTTP 503" in error for error in errors)
    assert last == pytest.approx(5.2, abs=1.5)


def test_closing_ends_a_job_in_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """End a job that waits for the service when its client is closed."""
    monkeypatch.setattr("audiences_async._call.engine.Transport", Service(lambda key, at: 500, round_trip=0.05))

    async def main() -> list[Outcome]:
        client = AudiencesClient(base_url="http://localhost/", clock=virtual.clock())
        job = asyncio.create_task(client.fetch_all([Account(f"a{number}", "key") for number in range(200)]))
        await asyncio.sleep(10)
        await client.aclose()
        return await job

    outcomes = virtual.run(main())
    assert {type(outcome.error).__name__ for outcome in outcomes if isinstance(outcome, Failed)} == {
        "ClientClosedError"
    }
    assert len(outcomes) == 200


def test_an_outage_and_a_limit_are_events(run: RunJob) -> None:
    """Pauses of the service, its return and its rate are events, with the state that they mean."""
    events: list[Event] = []
    run(Service(lost(503), 0.05), 3000, on_event=events.append)
    paused = [event for event in events if isinstance(event, ServicePaused)]
    assert {event.state for event in paused} == {"out"}
    assert max(event.seconds for event in paused) <= 2
    assert any(isinstance(event, ServiceResumed) for event in events)
    probes = [event for event in events if isinstance(event, AttemptFinished) and event.attempt.reason == "probe"]
    assert len(probes) >= 3
    events.clear()
    run(Service(shared(LeakyBucket(50, 5))), 500, on_event=events.append)
    assert {event.state for event in events if isinstance(event, ServicePaused)} == {"limited"}
    assert any(isinstance(event, ServiceRateLearned) for event in events)


@define
class Talking(Service):
    """A service that describes each refusal by the last words of the account's key."""

    async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
        """Answer with the end of the key in the description."""
        reply = await super().attempt(key)
        assert isinstance(reply, Reply)
        about = json.dumps({"status": reply.status, "description": f"about {key.reveal()[-4:]}"}).encode()
        return reply if reply.status == 200 else Reply(reply.status, reply.headers, about)


def test_a_probe_for_another_account_shows_nothing_of_it(run: RunJob) -> None:
    """Record a probe with another account's key without the text of its reply, which is not for this account."""
    events: list[Event] = []
    run(Talking(lost(503), 0.05), 3000, on_event=events.append)
    probes = [event for event in events if isinstance(event, AttemptFinished) and event.attempt.reason == "probe"]
    others = [event for event in probes if event.attempt.error and "probe for all accounts" in event.attempt.error]
    assert 0 < len(others) < len(probes)
    for probe in probes:
        assert probe in others or not probe.attempt.error or f"about {probe.account[-4:]}" in probe.attempt.error


def test_the_snapshot_during_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show in the snapshot that the service is out, since when, and when the next probe is due."""
    service = Service(lambda key, at: 500 if at > 0.2 else 200, round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> ServicePace:
        async with AudiencesClient(base_url="http://localhost/", clock=virtual.clock()) as client:
            accounts = [Account(f"a{number}", "key") for number in range(1000)]
            job = asyncio.create_task(client.fetch_all(accounts, patience=30.0))
            await asyncio.sleep(10)
            pace = client.snapshot().service
            assert pace is not None
            job.cancel()
            await asyncio.wait({job})
            return pace

    pace = virtual.run(main())
    assert pace.state == "out"
    assert pace.silent_for == pytest.approx(9.8, abs=0.5)
    assert 0 < pace.paused_for <= 2
    assert pace.waiting >= 99


def test_one_account_shows_that_the_service_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report since when nobody has been answered, also if a single account asks and no outage is recognized."""
    service = Service(lambda key, at: 500 if at < 14 else 200, round_trip=0.5)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> list[float]:
        silent = []
        async with AudiencesClient("key", base_url="http://localhost/", clock=virtual.clock()) as client:
            for _ in range(3):
                with suppress(ServerError):
                    await client.get_audiences(timeout=10.0)
                pace = client.snapshot().service
                assert pace is not None
                assert pace.state == "open"
                silent.append(pace.silent_for)
        return silent

    first, second, after = virtual.run(main())
    assert 0 < first < second
    assert after == 0.0


@pytest.mark.parametrize("limit", [None, RateLimit(50)])
def test_an_old_failure_uses_up_no_patience(monkeypatch: pytest.MonkeyPatch, limit: RateLimit | None) -> None:
    """Count idle time neither as silence nor for the patience of a job that begins later."""
    service = Service(lambda key, at: 500 if at < 20 else 200, round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        clock = virtual.clock()
        async with AudiencesClient(
            "key", base_url="http://localhost/", clock=clock, service_rate_limit=limit
        ) as client:
            with pytest.raises(ServerError):
                await client.get_audiences(timeout=10.0)
            await asyncio.sleep(3600)
            pace = client.snapshot().service
            assert pace is not None
            assert 0 < pace.silent_for < 20
            accounts = [Account(f"a{number}", f"key{number}") for number in range(300)]
            assert all(outcome.ok for outcome in await client.fetch_all(accounts, patience=60.0))

    virtual.run(main())


def test_a_single_call_does_not_wait_for_the_end_of_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the service is out, a call of no job goes out at once."""
    service = Service(lambda key, at: 500, round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        async with AudiencesClient(base_url="http://localhost/", clock=virtual.clock()) as client:
            accounts = [Account(f"a{number}", f"key{number}") for number in range(200)]
            job = asyncio.create_task(client.fetch_all(accounts))
            await asyncio.sleep(10)
            for account in [Account("web", "key"), *accounts[:30]]:  # also of the job, whose call for it waits
                before = virtual.now()
                with pytest.raises(ServerError):
                    await client.get_audiences(account, timeout=0.3)
                assert service.times(key=str(account.api_key))[-1] >= before
                assert virtual.now() - before <= 0.3
            job.cancel()
            await asyncio.wait({job})

    virtual.run(main())


def test_calls_of_one_account_in_an_outage_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waits in an outage for the reply to another one of its account goes when that has come."""
    service = Service(lambda key, at: 500, round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        async with AudiencesClient(base_url="http://localhost/", clock=virtual.clock(), budget=None) as client:
            job = asyncio.create_task(client.fetch_all(Account(f"a{number}", f"key{number}") for number in range(100)))
            await asyncio.sleep(10)
            calls = (client.get_audiences(Account("web", "key"), timeout=60.0) for _ in range(20))
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(error, ServerError) and error.stop_reason == "attempts" for error in errors)
            job.cancel()
            await asyncio.wait({job})

    virtual.run(main())


def test_a_single_call_in_an_outage_keeps_to_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry in an outage at the account's known rate, also beside a job's call of the same account, which waits."""
    service = Service(lambda key, at: 500, round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        options: dict[str, Any] = {"clock": virtual.clock(), "rate_limit": RateLimit(1.0), "budget": None}
        async with AudiencesClient(base_url="http://localhost/", **options) as client:
            accounts = [Account(f"a{number}", f"key{number}") for number in range(100)]
            job = asyncio.create_task(client.fetch_all(accounts))
            await asyncio.sleep(10)
            for account in accounts[20:40]:
                with pytest.raises(ServerError) as caught:
                    await client.get_audiences(account, timeout=8.0)
                assert len(caught.value.attempts) >= 3
                times = service.times(key=str(account.api_key))[-len(caught.value.attempts) :]
                assert all(later - sooner >= 0.999 for sooner, later in pairwise(times))
            job.cancel()
            await asyncio.wait({job})

    virtual.run(main())


@pytest.mark.parametrize("is_limiter", [False, True])
def test_single_calls_in_an_outage_keep_to_a_known_rate_of_all(
    monkeypatch: pytest.MonkeyPatch, is_limiter: bool
) -> None:
    """Send them one by one at the rate of all accounts together, or as the caller's own limiter lets them."""
    service = Service(lambda key, at: 500, round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    class Limiter:
        async def acquire(self, account_name: str) -> None:
            asked.append(account_name)

    asked: list[str] = []
    limit: Any = Limiter() if is_limiter else RateLimit(2.0)

    async def main() -> None:
        options: dict[str, Any] = {"clock": virtual.clock(), "service_rate_limit": limit}
        async with AudiencesClient(base_url="http://localhost/", **options) as client:
            job = asyncio.create_task(client.fetch_all([Account(f"a{number}", f"key{number}") for number in range(50)]))
            await asyncio.sleep(30)
            pace = client.snapshot().service
            assert pace is not None
            assert pace.state == "out"
            asked.clear()
            once = client.with_options(retry=RetryPolicy(max_attempts=1))
            singles = [Account(f"s{number}", f"single{number}") for number in range(8)]
            results = await asyncio.gather(*map(once.get_audiences, singles), return_exceptions=True)
            assert {type(result) for result in results} == {ServerError}
            job.cancel()
            await asyncio.wait({job})

    virtual.run(main())
    times = sorted(moment for number in range(8) for moment in service.times(key=f"single{number}"))
    if is_limiter:
        assert {name for name in asked if name.startswith("s")} == {f"s{number}" for number in range(8)}
    else:
        assert all(later - sooner >= 0.499 for sooner, later in pairwise(times))


def test_a_single_call_in_an_outage_waits_for_its_own_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send nothing for an account that the service has told to wait, also while the service is out."""
    answers = {"web": iter([(429, {"Retry-After": "12"})])}
    service = Service(lambda key, at: next(answers.get(key, iter(())), 500), round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        async with AudiencesClient(base_url="http://localhost/", clock=virtual.clock()) as client:
            web = Account("web", "web")
            with pytest.raises(TooManyRequestsError):
                await client.get_audiences(web, timeout=1.0)
            job = asyncio.create_task(client.fetch_all([Account(f"a{number}", f"key{number}") for number in range(50)]))
            await asyncio.sleep(5)
            with pytest.raises(ServerError):
                await client.get_audiences(web, timeout=8.0)
            first, second, *_ = service.times(key="web")
            assert second - first >= 12.0
            job.cancel()
            await asyncio.wait({job})

    virtual.run(main())


# --- accounts that fail, and load


@pytest.mark.long
@pytest.mark.parametrize("status", [500, 429])
@pytest.mark.parametrize("every", [20, 5])
def test_accounts_that_fail_for_ever_slow_nobody(run: RunJob, status: int, every: int) -> None:
    """Answer all others in 1.3 times the time at the most, if a twentieth or a fifth of the accounts fails."""
    alone = run(Service(lambda key, at: 200, round_trip=0.05), 3000).took
    service = Service(lambda key, at: status if key.startswith("bad") else 200, round_trip=0.05)
    done = run(service, 3000, is_bad=lambda number: number % every == 0)
    assert done.reasons == {"attempts": 3000 // every}
    assert done.took <= 1.3 * alone
    assert done.pace.state == "open"


@pytest.mark.long
def test_accounts_that_fail_side_by_side_are_no_outage(run: RunJob) -> None:
    """Three hundred accounts in a row that fail for ever do not close the service for those behind them."""
    service = Service(lambda key, at: 500 if key.startswith("bad") else 200, round_trip=0.05)
    done = run(service, 3000, is_bad=lambda number: 1000 <= number < 1300)
    assert done.reasons == {"attempts": 300}
    assert done.took <= 60


@pytest.mark.long
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_random_failures_end_no_call_for_lack_of_budget(run: RunJob, share: float) -> None:
    """Retry them all in a job, with no more requests than independent retries need."""
    chance = random.Random(3)
    done = run(Service(lambda key, at: 503 if chance.random() < share else 200, round_trip=0.05), 5000)
    assert done.reasons.keys() <= {"attempts"}
    assert done.reasons["attempts"] <= 2 * 5000 * share**5 + 5
    assert done.requests_per_answer <= 1.2 / (1 - share)


def test_a_slow_service_is_asked_for_what_it_can_finish(run: RunJob) -> None:
    """Four workers of a second each, and room for more requests than they can do in an attempt's time."""
    service = Workers()
    done = run(service, 400)
    assert not done.reasons
    assert done.took <= 1.3 * 100
    assert service.wasted <= 0.1 * 400


def test_a_service_without_a_limit_is_asked_at_full_speed(run: RunJob) -> None:
    """Start a job slowly at the cost of no more than a round trip or two."""
    done = run(Service(lambda key, at: 200, round_trip=0.1), 3000)
    assert done.took <= 3.0 + 0.15
    assert done.requests == 3000


def test_single_calls_in_an_outage_keep_to_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many calls of no job come while the service is out, no more are in flight than there are connections."""
    service = Service(lambda key, at: 500, round_trip=0.05, connections=7)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)
    most = 0

    async def main() -> None:
        nonlocal most
        retry = RetryPolicy(max_attempts=1)
        async with AudiencesClient(base_url="http://localhost/", clock=virtual.clock(), retry=retry) as client:
            calls = [asyncio.create_task(client.get_audiences(Account(f"a{n}", "key"))) for n in range(200)]
            states = set()
            while not all(call.done() for call in calls):
                pace = client.snapshot().service
                assert pace is not None
                most = max(most, pace.in_flight)
                states.add(pace.state)
                await asyncio.sleep(0.01)
            assert all(isinstance(call.exception(), ServerError) for call in calls)
            assert states == {"open", "out"}

    virtual.run(main())
    assert most == 7


@pytest.mark.parametrize("cache", [None, CachePolicy(ttl=60)])
def test_an_outage_takes_nothing_of_an_accounts_time(run: RunJob, cache: CachePolicy | None) -> None:
    """Accounts with a timeout far shorter than the outage are all answered, with a cache and without."""
    service = Service(lambda key, at: 503 if 0.2 < at < 8 else 200, round_trip=0.05)
    done = run(service, 1000, timeout=1.5, cache=cache)
    assert not done.reasons


@pytest.mark.parametrize(("accounts", "each", "concurrency"), [(1, 100, 10), (3, 100, 10), (2, 500, 100)])
def test_a_job_that_names_accounts_often_does_not_block_itself(
    run: RunJob, accounts: int, each: int, concurrency: int
) -> None:
    """Let retries of an account proceed although its other calls hold all places of the job."""
    done = run(Service(LeakyBucket(20, 5)), accounts, each=each, concurrency=concurrency)
    assert not done.reasons
    assert done.took <= 1.15 * accounts * each / 20, "one after the other, as they are given"


@pytest.mark.parametrize("status", [500, 429, 503])
@pytest.mark.parametrize(("accounts", "each", "concurrency"), [(1, 2, 1), (1, 300, 10), (2, 300, 10)])
def test_a_job_with_a_cache_does_not_block_itself(
    run: RunJob, accounts: int, each: int, concurrency: int, status: int
) -> None:
    """Let the retry of a request proceed although the calls that share it hold all places of the job."""
    done = run(
        Service(lambda key, at: status if at < 0.1 else 200, round_trip=0.05),
        accounts, each=each, concurrency=concurrency, cache=CachePolicy(ttl=60), timeout=30.0,
    )  # fmt: skip
    assert not done.reasons
    assert done.took <= 10


def test_a_job_does_not_wait_for_another_ones_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer the account of a job that shares a request of another job, whose consumer takes no outcome."""
    service = Service(lambda key, at: 500 if at < 0.1 else 200, round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        options: dict[str, Any] = {"clock": virtual.clock(), "cache": CachePolicy(ttl=60)}
        async with AudiencesClient(base_url="http://localhost/", **options) as client:
            shared_by_both = Account("both", "key")
            accounts = [shared_by_both, *(Account(f"a{number}", f"key{number}") for number in range(9))]
            async with client.stream(accounts, concurrency=1):
                await asyncio.sleep(0.01)
                async with asyncio.timeout(20):
                    (outcome,) = await client.fetch_all([shared_by_both], timeout=5.0)
            assert outcome.ok

    virtual.run(main())


def test_an_idle_night_ends_what_is_known_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pause for a usual time after a single 429 that follows hours without a request."""
    window = FixedWindow(20, 10.0)
    strays = [28_790.0]

    def decide(key: str, at: float) -> int:
        return 429 if strays and at > strays[0] and strays.pop() else window(key, at)

    service = Service(decide)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        async with AudiencesClient("key", base_url="http://localhost/", clock=virtual.clock()) as client:
            await asyncio.gather(*(client.get_audiences(timeout=300.0) for _ in range(200)))
            await asyncio.sleep(28_800 - virtual.now())
            await client.get_audiences(timeout=30.0)
            assert service.times(429)[-1] > 28_000
            assert virtual.now() < 28_825

    virtual.run(main())


@pytest.mark.parametrize("status", [429, 503])
def test_a_rate_is_not_lost_to_accounts_that_are_all_refused(run: RunJob, status: int) -> None:
    """If all accounts at the end of a job are refused for ever, keep some of the rate that was learned before them."""
    bucket = shared(LeakyBucket(50, 5))

    def decide(key: str, at: float) -> int:
        granted = bucket("", at)
        return status if key.startswith("bad") and granted == 200 else granted

    done = run(Service(decide, round_trip=0.02), 1500, is_bad=lambda number: number >= 1200)
    assert done.reasons == {"attempts": 300}
    assert done.took <= 2 * 1200 / 50
    assert done.outcomes[-1][0] <= 100, "417,000 if each refusal lowers the rate further"


@pytest.mark.long
@pytest.mark.parametrize(("status", "seconds"), [(429, 45), (503, 180), (500, 45)])
@pytest.mark.parametrize("bad", [range(500, 900), range(1600, 2000)])
def test_many_accounts_that_fail_for_ever_are_no_limit(run: RunJob, bad: range, status: int, seconds: float) -> None:
    """Learn no rate for all accounts from many in a row that are refused for ever, amid others or at the end."""
    service = Service(lambda key, at: status if key.startswith("bad") else 200, round_trip=0.02)
    done = run(service, 2000, is_bad=bad.__contains__)
    assert done.reasons == {"attempts": 400}
    assert done.outcomes[-1][0] <= seconds, "177,000 if their refusals lower the rate of all"
    assert done.pace.state == "open"
    assert done.pace.rate is None


@pytest.mark.long
@pytest.mark.parametrize("status", [429, 503])
def test_most_accounts_fail_for_ever(run: RunJob, status: int) -> None:
    """End in minutes although seven of ten accounts are refused for ever, in whatever order."""
    service = Service(lambda key, at: status if key.startswith("bad") else 200, round_trip=0.02)
    done = run(service, 1000, is_bad=lambda number: number * 37 % 10 < 7)
    assert done.reasons == {"attempts": 700}
    assert done.outcomes[-1][0] <= 600, "100,000 if their refusals lower the rate of all"


@pytest.mark.parametrize("status", [503, pytest.param(500, marks=pytest.mark.long)])
def test_an_outage_after_accounts_that_fail_for_ever(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Wait for the end of an outage although accounts were to blame for the failures before it."""
    service = Service(lambda key, at: status if at > 100 else 429 if key.startswith("bad") else 200, round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> None:
        clock = virtual.clock(random.Random(20261127).random)
        async with AudiencesClient(base_url="http://localhost/", clock=clock) as client:
            names = [f"{'good' if number < 500 else 'bad'}-{number}" for number in range(900)]
            outcomes = await client.fetch_all([Account(name, name) for name in names])
            assert sum(outcome.ok for outcome in outcomes) == 500
            assert virtual.now() < 100
            await asyncio.sleep(101 - virtual.now())
            service.decide = lambda key, at: status if at < 131 else 200
            outcomes = await client.fetch_all([Account(f"new-{number}", f"new-{number}") for number in range(300)])
            assert all(outcome.ok for outcome in outcomes)
            assert 131 < virtual.now() < 135

    virtual.run(main())


def test_an_account_that_is_unauthorized_is_no_witness(run: RunJob) -> None:
    """Send no probes with a key that is refused by 401, which a service may send before it looks at any limit."""
    window = shared(FixedWindow(60, 60.0))

    def decide(key: str, at: float) -> int:
        return 401 if key.startswith("bad") else window("", at)

    done = run(Service(decide, round_trip=0.03), 400, is_bad=lambda number: number % 10 in {2, 5, 8})
    assert done.reasons == {"final": 120}
    assert len(done.answered) == 280


@pytest.mark.parametrize("limiter", [lambda: FixedWindow(60, 60.0), lambda: LeakyBucket(10, 5)], ids=["window", "rate"])
def test_a_witness_whose_key_is_refused_later_shows_nothing(run: RunJob, limiter: Callable[[], Limit]) -> None:
    """Wait for a limit although each key that was answered is refused by 401 from then on, before any limit."""
    limit, used = shared(limiter()), set()

    def decide(key: str, at: float) -> int:
        if key in used:
            return 401
        status = limit("", at)
        if status == 200:
            used.add(key)
        return status

    done = run(Service(decide, round_trip=0.03), 400)
    assert len(done.answered) == 400


@pytest.mark.long
@pytest.mark.parametrize("refusal", [429, 503])
@pytest.mark.parametrize(("count", "seconds"), [(10, 10.0), (100, 60.0)])
@pytest.mark.parametrize("concurrency", [10, 100])
def test_a_later_job_meets_a_limit_that_the_first_did_not(
    monkeypatch: pytest.MonkeyPatch, count: int, seconds: float, refusal: int, concurrency: int
) -> None:
    """Fail no account of a client's second job, which begins without a slow start."""
    limited = shared(FixedWindow(count, seconds), refusal)
    service = Service(lambda key, at: limited("", at) if at > 3600.0 else 200, round_trip=0.05)
    monkeypatch.setattr("audiences_async._call.engine.Transport", service)

    async def main() -> list[Outcome]:
        clock = virtual.clock(random.Random(20261129).random)
        async with AudiencesClient(base_url="http://localhost/", clock=clock) as client:
            await client.fetch_all([Account(f"a{number}", f"a{number}") for number in range(400)])
            await asyncio.sleep(4000.0)
            accounts = [Account(f"b{number}", f"b{number}") for number in range(300)]
            return await client.fetch_all(accounts, concurrency=concurrency, timeout=60.0)

    assert [outcome.account.name for outcome in virtual.run(main()) if not outcome.ok] == []


@pytest.mark.long
def test_accounts_that_fail_for_ever_do_not_prolong_a_job_under_a_shared_rate(run: RunJob) -> None:
    """End the job soon after the last healthy account, although a fifth of the accounts is refused for ever."""
    bucket = shared(LeakyBucket(50, 5))

    def decide(key: str, at: float) -> int:
        granted = bucket("", at)
        return 429 if key.startswith("bad") else granted

    done = run(Service(decide, round_trip=0.02), 1500, is_bad=lambda number: number % 5 == 0)
    assert done.failed == {f"bad-{number}" for number in range(0, 1500, 5)}
    assert done.outcomes[-1][0] <= 300
